//! What the tool says of chains: images made by VirtualBox, by us, and such as were pulled apart.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use vdi_core::{Access, HostFile, Locking};
use vdi_tests::corpus::corpus;
use vdi_tests::image::{field, write_to};
use vdi_tests::tool::vdi;
use vdi_tests::words;

const UUID_IMAGE: u64 = 0x188;
const UUID_PARENT: u64 = 0x1a8;

/// VirtualBox's chain of four: the leaf first.
fn chain() -> (TempDir, Vec<PathBuf>) {
    let directory = tempfile::tempdir().unwrap();
    let case = corpus().into_iter().find(|case| case.name == "chain-4");
    let mut paths: Vec<_> = case
        .unwrap()
        .images
        .iter()
        .map(|image| image.unpack(directory.path()))
        .collect();
    paths.reverse();
    (directory, paths)
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn bytes_at<const N: usize>(path: &Path, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    let file = fs::File::open(path).unwrap();
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The counts of findings by their kind, and the exit code.
#[track_caller]
fn checked(words: &[&std::ffi::OsStr]) -> (Value, Option<i32>) {
    let words = [words!["check", "--json"].as_slice(), words].concat();
    let answer = vdi(words);
    (answer.json()["counts"].clone(), answer.code)
}

#[test]
fn info_shows_every_image_of_the_chain_and_where_its_parent_is() {
    let (_directory, chain) = chain();
    let list = vdi(words!["info", "--json", "--backing-chain", chain[0]])
        .expect_code(0)
        .json();
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 4);
    for (depth, image) in list.iter().enumerate() {
        assert_eq!(image["filename"], text(&chain[depth]));
        assert_eq!(image["warnings"], serde_json::json!([]));
        let parent = chain.get(depth + 1).map_or(Value::Null, |p| text(p).into());
        assert_eq!(image["full-backing-filename"], parent, "{depth}");
    }
    let people = vdi(words!["info", "--backing-chain", chain[0]])
        .expect_code(0)
        .out;
    for path in &chain {
        let line = format!("image:         {}\n", text(path));
        assert!(people.contains(&line), "{people}");
    }
    let one = vdi(words!["info", "--json", chain[1]])
        .expect_code(0)
        .json();
    assert_eq!(one["backing-filename"], text(&chain[2]));
}

#[test]
fn info_shows_a_child_whose_parent_is_gone_or_modified_and_says_so() {
    let (directory, chain) = chain();
    patch(&chain[1], field::UUID_MODIFY, &[7; 16]);
    let list = vdi(words!["info", "--json", "--backing-chain", chain[0]])
        .expect_code(0)
        .json();
    let warning = list[0]["warnings"][0].as_str().unwrap();
    assert!(warning.contains("was modified after"), "{warning}");
    assert_eq!(list[1]["warnings"], serde_json::json!([]));
    fs::remove_file(&chain[1]).unwrap();
    let people = vdi(words!["info", chain[0]]).expect_code(0).out;
    assert!(
        people.contains("parent:        not found") && people.contains("--image-dir"),
        "{people}"
    );
    let out = directory.path().join("out.raw");
    for words in [
        words!["info", "--backing-chain", chain[0]].as_slice(),
        &words!["map", chain[0]],
        &words!["convert", "-O", "raw", chain[0], out],
    ] {
        let answer = vdi(words).expect_code(1);
        assert!(answer.err.contains("--parent"), "{answer:#?}");
    }
    assert!(!out.exists());
}

#[test]
fn map_says_which_image_a_range_comes_from() {
    let (_directory, chain) = chain();
    let map = vdi(words!["map", "--json", chain[0]]).expect_code(0).json();
    let mut depths = std::collections::BTreeSet::new();
    for extent in map.as_array().unwrap() {
        let depth = usize::try_from(extent["depth"].as_u64().unwrap()).unwrap();
        depths.insert(depth);
        if extent["data"] == true {
            assert_eq!(extent["filename"], text(&chain[depth]), "{extent}");
        } else {
            assert_eq!(extent["filename"], Value::Null, "{extent}");
        }
    }
    assert_eq!(depths.len(), 4, "every image has something: {map}");
    let people = vdi(words!["map", chain[0]]).expect_code(0).out;
    for path in &chain {
        assert!(people.contains(text(path)), "{people}");
    }
    let base = vdi(words!["map", chain[3]]).expect_code(0).out;
    assert!(!base.contains(text(&chain[3])), "{base}");
}

#[test]
fn check_finds_nothing_wrong_with_a_chain_of_virtualbox_and_touches_nothing() {
    let (directory, chain) = chain();
    let before: Vec<_> = chain.iter().map(|path| fs::read(path).unwrap()).collect();
    for path in &chain {
        assert_eq!(checked(&words![path]), (serde_json::json!({}), Some(0)));
    }
    for (path, before) in chain.iter().zip(before) {
        assert!(fs::read(path).unwrap() == before, "{}", path.display());
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4);
}

#[test]
fn check_finds_a_modified_parent_anywhere_in_the_chain() {
    let (_directory, chain) = chain();
    patch(&chain[2], field::UUID_MODIFY, &[7; 16]);
    let found = (serde_json::json!({"parent-modified": 1}), Some(2));
    assert_eq!(checked(&words![chain[0]]), found);
    assert_eq!(checked(&words![chain[1]]), found);
    assert_eq!(checked(&words![chain[2]]).1, Some(0));
    // A child that does not know its parent's is content with any.
    patch(&chain[1], UUID_PARENT + 16, &[0; 16]);
    assert_eq!(checked(&words![chain[0]]).1, Some(0));
}

#[test]
fn check_notes_a_missing_or_ambiguous_parent_and_finds_a_wrong_one() {
    let (directory, chain) = chain();
    let copy = directory.path().join("copy.vdi");
    fs::copy(&chain[2], &copy).unwrap();
    assert_eq!(
        checked(&words![chain[0]]),
        (serde_json::json!({"parent-ambiguous": 1}), Some(0))
    );
    assert_eq!(
        checked(&words![chain[0], "--parent", chain[2]]),
        (serde_json::json!({}), Some(0))
    );
    fs::remove_file(copy).unwrap();
    let aside = tempfile::tempdir().unwrap();
    let moved = aside.path().join("moved.vdi");
    fs::rename(&chain[2], &moved).unwrap();
    assert_eq!(
        checked(&words![chain[0]]),
        (serde_json::json!({"parent-missing": 1}), Some(0))
    );
    assert_eq!(
        checked(&words![chain[1], "--parent", chain[0]]),
        (
            serde_json::json!({"parent-missing": 1, "wrong-parent": 1}),
            Some(2)
        )
    );
    for found in [
        ["--parent", text(&moved)],
        ["--image-dir", text(aside.path())],
    ] {
        // The next one is looked for beside the one that was moved.
        let dir = directory.path();
        assert_eq!(
            checked(&words![chain[0], found[0], found[1], "--image-dir", dir]),
            (serde_json::json!({}), Some(0))
        );
    }
}

#[test]
fn check_finds_a_loop() {
    let (_directory, chain) = chain();
    let leaf: [u8; 16] = bytes_at(&chain[0], UUID_IMAGE);
    patch(&chain[2], UUID_PARENT, &leaf);
    assert_eq!(
        checked(&words![chain[0]]),
        (serde_json::json!({"parent-loop": 1}), Some(2))
    );
    let answer = vdi(words!["map", chain[0]]).expect_code(1);
    assert!(answer.err.contains("its own descendant"), "{answer:#?}");
}

#[test]
fn a_parent_that_was_named_is_there_or_the_error_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let (base, child, other) = (at("base.vdi"), at("child.vdi"), at("other.vdi"));
    for new in [&base, &other] {
        vdi(words!["create", new, "4M"]).expect_code(0);
    }
    vdi(words!["snapshot", base, child]).expect_code(0);
    let info = |named: &Path| vdi(words!["map", "--parent", named, child]);
    info(&other).expect_code(0);
    let answer = info(&at("gone.vdi")).expect_code(1);
    let said = "gone.vdi: No such file";
    assert!(answer.err.contains(said), "{answer:#?}");
    fs::rename(&base, at("elsewhere")).unwrap();
    fs::create_dir(at("empty")).unwrap();
    fs::rename(&child, at("empty/child.vdi")).unwrap();
    let child = at("empty/child.vdi");
    let answer = vdi(words!["map", "--parent", other, child]).expect_code(1);
    let said = format!("is not {}, and not in {}", text(&other), text(&at("empty")));
    assert!(answer.err.contains(&said), "{answer:#?}");
}

#[test]
fn a_copy_that_takes_no_locks_does_not_replace_a_parent_of_its_source() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let (base, middle, top) = (at("base.vdi"), at("middle.vdi"), at("top.vdi"));
    vdi(words!["create", base, "4M"]).expect_code(0);
    vdi(words!["snapshot", base, middle]).expect_code(0);
    vdi(words!["snapshot", middle, top]).expect_code(0);
    let before = fs::read(&base).unwrap();
    for format in ["raw", "vdi"] {
        let answer =
            vdi(words!["convert", "-U", "--force", "-O", format, top, base]).expect_code(1);
        assert!(answer.err.contains("base.vdi is a parent"), "{answer:#?}");
    }
    assert!(fs::read(&base).unwrap() == before);
}

/// Nobody is told of a way out that a verb has not.
#[test]
fn only_verbs_that_can_read_a_shared_image_name_the_option_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let (base, child, new) = (at("base.vdi"), at("child.vdi"), at("new.vdi"));
    vdi(words!["create", base, "4M"]).expect_code(0);
    vdi(words!["snapshot", base, child]).expect_code(0);
    let held = HostFile::open(&base, Access::Writable, Locking::Locked).unwrap();
    let us = format!("process {}", std::process::id());
    for words in [
        words!["info", base].to_vec(),
        words!["check", base].to_vec(),
        words!["map", child].to_vec(),
        words!["compare", child, base].to_vec(),
        words!["repair", base].to_vec(),
        words!["repair", "--apply", base].to_vec(),
        words!["compact", base].to_vec(),
        words!["resize", "--dry-run", base, "+1M"].to_vec(),
        words!["clone", child, new].to_vec(),
        words!["rebase", "-b", base, child].to_vec(),
        words!["commit", child].to_vec(),
        words!["set", "--comment", "x", base].to_vec(),
    ] {
        let answer = vdi(&words);
        assert_ne!(answer.code, Some(0), "{answer:#?}");
        assert!(answer.err.contains(&us), "{answer:#?}");
        let help = vdi(words![words[0], "--help"]).expect_code(0);
        let (has, told) = (
            help.out.contains("--force-share"),
            answer.err.contains("--force-share"),
        );
        assert_eq!(has, told, "{answer:#?}");
    }
    drop(held);
}

fn header(path: &Path) -> Value {
    let info = vdi(words!["info", "--json", path]).expect_code(0).json();
    info["format-specific"]["data"]["header"].clone()
}

fn raw(path: &Path) -> Vec<u8> {
    let out = path.with_extension("raw");
    vdi(words!["convert", "-O", "raw", "--force", path, out]).expect_code(0);
    fs::read(&out).unwrap()
}

/// Five images of mixed block sizes; each has written to the first sectors of its own block and of a shared one.
#[test]
fn a_chain_of_five_made_here_reads_right() {
    let directory = tempfile::tempdir().unwrap();
    let path = |depth: usize| directory.path().join(format!("{depth}.vdi"));
    vdi(words!["create", path(0), "10M"]).expect_code(0);
    let mut expected = vec![0; 10 << 20];
    for depth in 0..5 {
        if depth > 0 {
            let size = ["1M", "128k", "2M", "1M"][depth - 1];
            let child = path(depth);
            vdi(words![
                "snapshot",
                "--block-size",
                size,
                path(depth - 1),
                child
            ])
            .expect_code(0);
            assert_eq!(fs::metadata(&child).unwrap().len(), 2 << 20);
        }
        for at in [depth << 20, (5 << 20) + depth * 512] {
            let bytes = [u8::try_from(depth).unwrap() + 1; 1024];
            write_to(&path(depth), at as u64, &bytes);
            expected[at..at + 1024].copy_from_slice(&bytes);
        }
        assert!(raw(&path(depth)) == expected, "{depth}");
    }
    for depth in 1..5 {
        assert_eq!(
            checked(&words![path(depth)]),
            (serde_json::json!({}), Some(0))
        );
    }
}

#[test]
fn a_child_is_what_virtualbox_would_make() {
    let directory = tempfile::tempdir().unwrap();
    let (base, child) = (
        directory.path().join("b.vdi"),
        directory.path().join("c.vdi"),
    );
    vdi(words!["create", "--block-size", "2M", base, "9M"]).expect_code(0);
    // LCHS: cylinders, heads, sectors.
    patch(&base, 0x1c8, &[9, 0, 0, 0, 16, 0, 0, 0, 63, 0, 0, 0]);
    let before = fs::read(&base).unwrap();
    let uuid = "706c398a-86ca-49e3-9a30-3cbc9073cd11";
    vdi(words!["snapshot", "--uuid", uuid, base, child]).expect_code(0);
    assert!(
        fs::read(&base).unwrap() == before,
        "the base is not touched"
    );
    let (of_base, of_child) = (header(&base), header(&child));
    for (field, value) in [
        ("image-type", serde_json::json!(4)),
        ("uuid-image", uuid.into()),
        ("uuid-parent", of_base["uuid-image"].clone()),
        ("uuid-parent-modify", of_base["uuid-modify"].clone()),
        ("disk-size", of_base["disk-size"].clone()),
        ("block-size", (1 << 20).into()),
        ("blocks-in-image", 9.into()),
        ("blocks-allocated", 0.into()),
    ] {
        assert_eq!(of_child[field], value, "{field}");
    }
    assert_ne!(of_child["uuid-modify"], of_base["uuid-modify"]);
    assert_eq!(bytes_at::<16>(&child, 0x1c8), bytes_at(&base, 0x1c8));
    let map: [u8; 36] = bytes_at(&child, 1 << 20);
    assert_eq!(map, [0xff; 36], "every entry is FREE");
}

#[test]
fn snapshot_refuses_what_it_must_not_do() {
    let directory = tempfile::tempdir().unwrap();
    let (base, child) = (
        directory.path().join("b.vdi"),
        directory.path().join("c.vdi"),
    );
    vdi(words!["create", base, "9M"]).expect_code(0);
    let refused = |reason: &str| {
        let answer = vdi(words!["snapshot", base, child]).expect_code(1);
        assert!(answer.err.contains(reason), "{answer:#?}");
    };
    fs::write(&child, "mine").unwrap();
    refused("choose another name");
    assert_eq!(fs::read(&child).unwrap(), b"mine");
    fs::remove_file(&child).unwrap();
    let answer = vdi(words!["snapshot", base, base]).expect_code(1);
    assert!(answer.err.contains("the same file"), "{answer:#?}");
    let writer = {
        use vdi_core::{Access, HostFile, Locking};
        HostFile::open(&base, Access::Writable, Locking::Locked).unwrap()
    };
    refused("in use");
    drop(writer);
    vdi_tests::tool::settle();
    patch(&base, UUID_IMAGE, &[0; 16]);
    refused("null");
    assert!(!child.exists());
}
