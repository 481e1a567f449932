//! `compare` beside `qemu-img compare`, and what a clone is.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vdi_tests::builder::image;
use vdi_tests::image::MIB;
use vdi_tests::tool::{Answer, qemu_img, vdi};
use vdi_tests::words;

use crate::chains::{Chain, chains};

/// A raw disk with these bytes set to 7, sparse elsewhere.
fn raw(path: &Path, size: u64, set: &[u64]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    for &at in set {
        file.write_all_at(&[7], at).unwrap();
    }
}

#[test]
fn compare_answers_as_qemu_does() {
    let directory = tempfile::tempdir().unwrap();
    let path = |nth: usize| directory.path().join(format!("{nth}"));
    let disks: [(u64, &[u64]); 8] = [
        (3 * MIB, &[]),
        (3 * MIB, &[700]),
        (3 * MIB, &[700, 2 * MIB + 5000]),
        (3 * MIB, &[700, 3 * MIB - 1]),
        (5 * MIB, &[700]),
        (5 * MIB, &[700, 4 * MIB + 1030]),
        (5 * MIB + 512, &[]),
        (3 * MIB - 300, &[700]),
    ];
    for (nth, (size, set)) in disks.into_iter().enumerate() {
        raw(&path(nth), size, set);
        let (from, to) = (path(nth), path(nth + 10));
        vdi(words!["convert", "-q", "-f", "raw", "-O", "vdi", from, to]).expect_code(0);
    }
    let same = |ours: Answer, theirs: Answer| {
        assert_eq!(
            (ours.code, &ours.out),
            (theirs.code, &theirs.out),
            "{ours:#?} {theirs:#?}"
        );
    };
    for one in 0..disks.len() {
        for other in 0..disks.len() {
            let (raw, other_raw) = (path(one), path(other));
            let raws = words!["compare", "-f", "raw", "-F", "raw", raw, other_raw];
            same(vdi(raws), qemu_img(raws));
            let other_image = path(other + 10);
            let mixed = words!["compare", "-f", "raw", "-F", "vdi", raw, other_image];
            same(vdi(mixed), qemu_img(mixed));
            let images = [path(one + 10), path(other + 10)];
            let [a, b] = &images;
            let theirs = qemu_img(words!["compare", "-s", "-f", "vdi", "-F", "vdi", a, b]);
            same(vdi(words!["compare", "-s", a, b]), theirs);
            let quiet = vdi(words!["compare", "-q", a, b]);
            assert_eq!(quiet.out, "");
            assert_eq!(quiet.code, vdi(words!["compare", a, b]).code);
        }
    }
}

#[test]
fn what_cannot_be_compared_is_neither_the_same_nor_different() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vdi");
    image().write(&path);
    let missing = directory.path().join("none");
    for words in [
        words!["compare", path, missing].to_vec(),
        words!["compare", "-F", "qcow2", path, path].to_vec(),
        words!["compare", path].to_vec(),
    ] {
        let answer = vdi(words).expect_code(2);
        assert!(
            !answer.err.is_empty() && answer.out.is_empty(),
            "{answer:#?}"
        );
    }
    vdi(words!["compare", path, path]).expect_code(0);
    vdi(words!["compare", "--help"]).expect_code(0);
}

#[test]
fn a_full_clone_is_the_whole_chain_in_one_image() {
    for chain in chains() {
        let clone = chain.directory.path().join("clone.vdi");
        vdi(words!["clone", "-q", chain.child(), clone]).expect_code(0);
        vdi(words!["compare", "-q", chain.child(), clone]).expect_code(0);
        vdi(words!["check", clone]).expect_code(0);
        let info = vdi(words!["info", "--json", clone]).expect_code(0).json();
        let header = &info["format-specific"]["data"]["header"];
        let leaf = chain.case.leaf();
        assert_eq!(header["uuid-modify"], *leaf.uuid_modify, "{info}");
        assert_ne!(header["uuid-image"], *leaf.uuid_image);
        assert_eq!(info["virtual-size"], leaf.virtual_size);
        for image in &chain.images {
            fs::remove_file(image).unwrap();
        }
        chain.verify(&clone, chain.contents());
    }
}

#[test]
fn a_linked_clone_is_an_empty_child() {
    for chain in chains() {
        let clone = chain.directory.path().join("clone.vdi");
        vdi(words!["clone", "--linked", chain.child(), clone]).expect_code(0);
        chain.verify(&clone, chain.contents());
        let info = vdi(words!["info", "--json", clone]).expect_code(0).json();
        let data = &info["format-specific"]["data"];
        assert_eq!(data["kind"], "differencing", "{info}");
        assert_eq!(data["blocks"]["allocated"], 0);
        let header = &data["header"];
        let leaf = chain.case.leaf();
        assert_eq!(header["uuid-parent"], *leaf.uuid_image, "{info}");
        assert_eq!(header["uuid-parent-modify"], *leaf.uuid_modify);
        let of_source = vdi(words!["info", "--json", chain.child()])
            .expect_code(0)
            .json();
        let of_source = &of_source["format-specific"]["data"]["header"];
        assert_eq!(header["block-size"], of_source["block-size"], "{info}");
    }
}

#[test]
fn a_linked_clone_may_have_blocks_of_another_size() {
    let chain = Chain::named("diff-partial-writes");
    let clone = chain.directory.path().join("clone.vdi");
    let whole = vdi(words![
        "clone",
        "--block-size",
        "256k",
        chain.child(),
        clone
    ])
    .expect_code(1);
    assert!(whole.err.contains("--linked"), "{whole:#?}");
    vdi(words![
        "clone",
        "--linked",
        "--block-size",
        "256k",
        chain.child(),
        clone
    ])
    .expect_code(0);
    let info = vdi(words!["info", "--json", clone]).expect_code(0).json();
    let header = &info["format-specific"]["data"]["header"];
    assert_eq!(header["block-size"], 256 << 10, "{info}");
    chain.verify(&clone, chain.contents());
}

#[test]
fn a_clone_replaces_a_file_only_by_force_and_never_its_source() {
    let chain = Chain::named("diff-partial-writes");
    for words in [["clone"].as_slice(), &["clone", "--linked"]] {
        let with = |tail: [&Path; 2], force: bool| {
            let tail = tail.map(Path::as_os_str);
            let force = force.then_some(std::ffi::OsStr::new("--force"));
            let all = words
                .iter()
                .map(std::ffi::OsStr::new)
                .chain(tail)
                .chain(force);
            vdi(all.collect::<Vec<_>>())
        };
        let before = fs::read(chain.child()).unwrap();
        let refused = with([chain.child(), chain.child()], true).expect_code(1);
        assert!(refused.err.contains("the same file"), "{refused:#?}");
        let clone = chain.directory.path().join("clone.vdi");
        fs::write(&clone, "precious").unwrap();
        with([chain.child(), &clone], false).expect_code(1);
        assert_eq!(fs::read(&clone).unwrap(), b"precious");
        with([chain.child(), &clone], true).expect_code(0);
        assert!(fs::read(chain.child()).unwrap() == before);
        fs::remove_file(clone).unwrap();
    }
}

#[test]
fn a_full_clone_keeps_comment_and_geometry() {
    let chain = Chain::named("lchs-geometry");
    let clone = chain.directory.path().join("clone.vdi");
    let commented = chain.directory.path().join("commented.vdi");
    image()
        .with_comment(b"of mine")
        .with_field("header_size", 400)
        .with_field("lchs_heads", 16)
        .write(&commented);
    for source in [&chain.images[0], &commented] {
        vdi(words!["clone", "-q", "--force", source, clone]).expect_code(0);
        let read = |path: &Path| fs::read(path).unwrap();
        let (one, other) = (read(source), read(&clone));
        assert!(one[0x54..0x154] == other[0x54..0x154], "the comment");
        assert!(one[0x1C8..0x1D8] == other[0x1C8..0x1D8], "the geometry");
        assert!(one[0x188..0x198] != other[0x188..0x198], "the UUID");
    }
}
