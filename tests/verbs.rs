//! The verbs that change an image in place: `compact` and `resize`.
//!
//! Whatever they do, the disk reads as before, for us and for QEMU. The traps are those in which
//! VirtualBox loses data (`vdi-format.md`, sections 13 and 15).

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use vdi_tests::builder::{FREE, image};
use vdi_tests::corpus::corpus;
use vdi_tests::image::{are_zeros, field, write_to};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::tool::{Answer, qemu_img, qemu_io, vdi};
use vdi_tests::words;

const MIB: u64 = 1 << 20;

fn scratch() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vdi");
    (directory, path)
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn append(path: &Path, bytes: &[u8]) {
    patch(path, fs::metadata(path).unwrap().len(), bytes);
}

fn header(path: &Path) -> Value {
    let info = vdi(words!["info", "--json", path]).expect_code(0).json();
    info["format-specific"]["data"]["header"].clone()
}

fn set_len(path: &Path, len: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(len).unwrap();
}

fn number(path: &Path, name: &str) -> u64 {
    header(path)[name].as_u64().unwrap()
}

fn raw(path: &Path) -> Vec<u8> {
    let out = path.with_extension("raw");
    vdi(words!["convert", "-O", "raw", "--force", path, out]).expect_code(0);
    fs::read(&out).unwrap()
}

/// The image is what it should be: to us, and to QEMU where it knows such images.
#[track_caller]
fn assert_reads(path: &Path, expected: &[u8]) {
    let found = raw(path);
    assert_eq!(found.len(), expected.len());
    if found != expected {
        let differs = found.iter().zip(expected).position(|(a, b)| a != b);
        panic!("the first byte that differs is {differs:?}");
    }
    vdi(words!["check", path]).expect_code(0);
    let header = header(path);
    let is_child = header["uuid-parent"] != "00000000-0000-0000-0000-000000000000";
    let is_version_1 = header["version"] == "0x00010001";
    if header["block-size"] == MIB && !is_child && is_version_1 {
        qemu_img(words!["check", "-f", "vdi", path]).expect_code(0);
        assert!(
            qemu::contents(path) == expected,
            "QEMU reads something else"
        );
    }
}

/// An image of QEMU's, whose map has a sector and data begin right behind it. The blocks in
/// `written` are stored in this order and hold their number + 1.
fn by_qemu(path: &Path, size: u64, written: &[u64]) -> Vec<u8> {
    qemu::create(path, &size.to_string());
    let commands: Vec<_> = written
        .iter()
        .map(|block| format!("write -P {} {}M 1M", block + 1, block))
        .collect();
    qemu_io(path, &commands);
    let mut expected = vec![0; usize::try_from(size).unwrap()];
    for &block in written {
        let at = usize::try_from(block * MIB).unwrap();
        expected[at..at + (1 << 20)].fill(u8::try_from(block).unwrap() + 1);
    }
    expected
}

fn resize(path: &Path, words: &[&str]) -> Answer {
    let words: Vec<_> = words.iter().map(std::ffi::OsStr::new).collect();
    vdi([words!["resize", path].as_slice(), &words].concat())
}

#[test]
fn compact_releases_zeros_fills_holes_and_leaves_contents_and_children() {
    for is_qemus in [true, false] {
        let (directory, path) = scratch();
        let mut expected = by_qemu(&path, 12 * MIB, &[5, 0, 1, 2, 3, 8, 11]);
        if !is_qemus {
            fs::rename(&path, directory.path().join("q.vdi")).unwrap();
            vdi(words![
                "convert",
                "-O",
                "vdi",
                directory.path().join("q.vdi"),
                path
            ])
            .expect_code(0);
        }
        for block in [0, 3, 5] {
            let zeros = format!("write -P 0 {block}M 1M");
            qemu_io(&path, &[zeros]);
            expected[block << 20..(block + 1) << 20].fill(0);
        }
        let child = directory.path().join("child.vdi");
        vdi(words!["snapshot", path, child]).expect_code(0);
        let before = fs::read(&path).unwrap();
        let plan = vdi(words!["compact", "--dry-run", path]).expect_code(0).out;
        assert!(
            plan.contains("7 blocks have") && plan.contains("3 of zeros"),
            "{plan}"
        );
        assert!(plan.contains("3 MiB shorter"), "{plan}");
        assert!(
            fs::read(&path).unwrap() == before,
            "a dry run changes nothing"
        );
        let modify = header(&path)["uuid-modify"].clone();
        let out = vdi(words!["compact", path]).expect_code(0).out;
        assert!(out.contains("done; the file is 3 MiB shorter"), "{out}");
        assert_reads(&path, &expected);
        let end = number(&path, "offset-data") + 4 * MIB;
        assert_eq!(fs::metadata(&path).unwrap().len(), end);
        assert_eq!(number(&path, "blocks-allocated"), 4);
        assert_eq!(header(&path)["uuid-modify"], modify);
        assert_reads(&child, &expected);
        let compact = fs::read(&path).unwrap();
        let out = vdi(words!["compact", path]).expect_code(0).out;
        assert!(out.contains("compact already"), "{out}");
        assert!(
            fs::read(&path).unwrap() == compact,
            "nothing is written twice"
        );
    }
}

#[test]
fn compact_in_a_child_hides_the_parent_with_zeros_and_shows_it_where_it_is_the_same() {
    let (directory, base) = scratch();
    let mut expected = by_qemu(&base, 6 * MIB, &[0, 1, 2, 3]);
    let [child, grandchild] = ["c.vdi", "g.vdi"].map(|name| directory.path().join(name));
    vdi(words!["snapshot", "--block-size", "512k", base, child]).expect_code(0);
    write_to(&child, MIB, &vec![0; 1 << 20]);
    write_to(&child, 2 * MIB, &vec![3; 1 << 20]);
    write_to(&child, 3 * MIB, &vec![77; 1 << 20]);
    expected[1 << 20..2 << 20].fill(0);
    expected[3 << 20..4 << 20].fill(77);
    vdi(words!["snapshot", child, grandchild]).expect_code(0);
    assert_reads(&child, &expected);
    vdi(words!["compact", "-q", child]).expect_code(0);
    assert_reads(&child, &expected);
    let info = vdi(words!["info", "--json", child]).json();
    let blocks = &info["format-specific"]["data"]["blocks"];
    assert_eq!(
        (&blocks["allocated"], &blocks["zero"]),
        (&4.into(), &2.into())
    );
    vdi(words!["compact", "--same-as-parent", child]).expect_code(0);
    assert_reads(&child, &expected);
    let info = vdi(words!["info", "--json", child]).json();
    let blocks = &info["format-specific"]["data"]["blocks"];
    assert_eq!(
        (&blocks["allocated"], &blocks["zero"]),
        (&2.into(), &2.into())
    );
    assert_reads(&grandchild, &expected);
}

#[test]
fn compact_cuts_trailing_bytes_and_leaked_blocks_off() {
    let (_directory, path) = scratch();
    let expected = by_qemu(&path, 8 * MIB, &[4, 1]);
    append(&path, &[1; 5000]);
    append(&path, &vec![2; 2 << 20]);
    patch(&path, field::BLOCKS_ALLOCATED, &4_u32.to_le_bytes());
    vdi(words!["compact", path]).expect_code(0);
    assert_reads(&path, &expected);
    assert_eq!(fs::metadata(&path).unwrap().len(), 1024 + 2 * MIB);
}

/// QEMU calls such a count corrupt.
#[test]
fn compact_makes_a_count_of_blocks_right_that_are_not_even_in_the_file() {
    let (_directory, path) = scratch();
    let contents = by_qemu(&path, 8 * MIB, &[2, 5]);
    patch(&path, 0x184, &7_u32.to_le_bytes());
    vdi(words!["compact", "-q", path]).expect_code(0);
    assert_eq!(number(&path, "blocks-allocated"), 2);
    qemu_img(words!["check", "-q", path]).expect_code(0);
    assert_reads(&path, &contents);
    let answer = vdi(words!["compact", path]).expect_code(0);
    assert!(answer.out.contains("is compact already"), "{answer:#?}");
}

#[test]
fn compact_throws_nothing_away_where_the_map_is_damaged() {
    let (_directory, path) = scratch();
    // VirtualBox makes the second owner FREE, and a block that ends behind the file.
    for damaged in [
        image().with_shared_block(0, 7),
        image().with_len_change(-512),
    ] {
        damaged.write(&path);
        let before = fs::read(&path).unwrap();
        let answer = vdi(words!["compact", path]).expect_code(1);
        assert!(answer.err.contains("disk block"), "{answer:#?}");
        assert!(fs::read(&path).unwrap() == before);
    }
    vdi(words!["create", "--fixed", "--force", path, "3M"]).expect_code(0);
    let answer = vdi(words!["compact", path]).expect_code(1);
    assert!(answer.err.contains("fixed"), "{answer:#?}");
}

#[test]
fn growing_adds_zeros_and_leaves_uuid_modify_and_children() {
    for (from, to) in [("12M", 40), ("12M", 600), ("12MiB", 13)] {
        let (directory, path) = scratch();
        assert!(from.starts_with("12M"));
        let mut expected = by_qemu(&path, 12 * MIB, &[5, 0, 11]);
        let child = directory.path().join("child.vdi");
        vdi(words!["snapshot", path, child]).expect_code(0);
        let modify = header(&path)["uuid-modify"].clone();
        let dry = fs::read(&path).unwrap();
        resize(&path, &["--dry-run", &format!("{to}M")]).expect_code(0);
        assert!(fs::read(&path).unwrap() == dry);
        resize(&path, &[&format!("{to}M")]).expect_code(0);
        assert_reads(&child, &expected);
        expected.resize(to << 20, 0);
        assert_reads(&path, &expected);
        assert_eq!(header(&path)["uuid-modify"], modify);
    }
}

/// Section 13: VirtualBox moves as many blocks as there are, which is too few.
#[test]
fn one_block_and_a_growth_to_1800_gib_destroy_nothing() {
    let (_directory, path) = scratch();
    by_qemu(&path, 12 * MIB, &[0]);
    let plan = resize(&path, &["1800G"]).expect_code(0).out;
    assert!(plan.contains("first 8 blocks of the file"), "{plan}");
    qemu_img(words!["check", "-f", "vdi", path]).expect_code(0);
    vdi(words!["check", path]).expect_code(0);
    let last = (1800_u64 << 30) - MIB;
    let reads = ["read -P 1 0 1M".to_owned(), format!("read -P 0 {last} 1M")];
    qemu_io(&path, &reads);
    let map = vdi(words!["map", "--json", path]).expect_code(0).json();
    assert_eq!(map[0]["length"], MIB);
    assert_eq!(map[1]["length"], (1800_u64 << 30) - MIB);
    // And it takes writes at its end.
    write_to(&path, last, &[9; 4096]);
    qemu_io(
        &path,
        &[
            format!("read -P 9 {last} 4096"),
            "read -P 1 0 1M".to_owned(),
        ],
    );
}

/// Section 13: VirtualBox shows every block the next one's contents.
#[test]
fn growing_moves_nothing_wrong_if_block_0_has_no_owner() {
    let (_directory, path) = scratch();
    let mut expected = by_qemu(&path, 12 * MIB, &[2, 0, 1, 3]);
    // Disk block 2 has file block 0.
    patch(&path, 512 + 4 * 2, &FREE.to_le_bytes());
    expected[2 << 20..3 << 20].fill(0);
    resize(&path, &["200M"]).expect_code(0);
    expected.resize(200 << 20, 0);
    assert_reads(&path, &expected);
}

/// Section 13: VirtualBox appends at the end of the file.
#[test]
fn growing_is_not_led_astray_by_trailing_bytes() {
    let (_directory, path) = scratch();
    let mut expected = by_qemu(&path, 12 * MIB, &[2, 0, 1, 3]);
    append(&path, &[0xee; 5000]);
    resize(&path, &["+188M"]).expect_code(0);
    expected.resize(200 << 20, 0);
    assert_reads(&path, &expected);
}

/// QEMU's images of a multiple of 128 blocks have no room behind their map, and this one has no number for
/// the block that makes way.
#[test]
fn a_full_image_whose_map_must_move_grows() {
    for (blocks, to, vacated) in [(4, 200, 1), (128, 129, 1), (128, 700_000, 3), (127, 200, 1)] {
        let (_directory, path) = scratch();
        let all: Vec<u64> = (0..blocks).rev().collect();
        let mut expected = by_qemu(&path, blocks * MIB, &all);
        let to = to * MIB;
        let before = fs::read(&path).unwrap();
        let plan = resize(&path, &["--dry-run", &to.to_string()]).expect_code(0);
        let moved = format!("the first {vacated} blocks of the file");
        assert!(plan.out.contains(&moved), "{plan:#?}");
        assert!(fs::read(&path).unwrap() == before);
        resize(&path, &[&to.to_string()]).expect_code(0);
        if to < 1 << 30 {
            expected.resize(usize::try_from(to).unwrap(), 0);
            assert_reads(&path, &expected);
        }
        vdi(words!["check", path]).expect_code(0);
        qemu_img(words!["check", "-f", "vdi", path]).expect_code(0);
        assert_eq!(number(&path, "blocks-allocated"), blocks);
        let end = number(&path, "offset-data") + blocks * MIB;
        assert_eq!(fs::metadata(&path).unwrap().len(), end);
        // QEMU gives the next block a number that is free.
        let mut commands = vec![format!("write -P 200 {} 1M", to - MIB)];
        commands.extend((0..blocks).map(|block| format!("read -P {} {block}M 1M", block + 1)));
        commands.push(format!("read -P 200 {} 1M", to - MIB));
        qemu_io(&path, &commands);
        qemu_img(words!["check", "-f", "vdi", path]).expect_code(0);
    }
}

/// What a growth of a full image leaves that was stopped: a block lies behind the end of what the numbers reach,
/// and part of the new map in its place.
#[test]
fn a_block_that_is_away_is_read_by_everybody_and_brought_home() {
    let stopped = |path: &Path| {
        let expected = by_qemu(path, 4 * MIB, &[0, 1, 2, 3]);
        let data = number(path, "offset-data");
        append(path, &expected[..1 << 20]);
        patch(path, 512, &4_u32.to_le_bytes());
        patch(path, data, &[0; 5000]);
        expected
    };
    let ways: [fn(&Path); 4] = [
        |path| drop(vdi(words!["repair", "--apply", path]).expect_code(0)),
        |path| write_to(path, 3 * MIB, &[4; 512]),
        |path| drop(vdi(words!["compact", "-q", path]).expect_code(0)),
        |path| drop(resize(path, &["--shrink", "--force", "3M"]).expect_code(0)),
    ];
    for bring_home in ways {
        let (_directory, path) = scratch();
        let expected = stopped(&path);
        assert!(raw(&path) == expected);
        assert!(qemu::contents(&path) == expected);
        let found = vdi(words!["check", path]).expect_code(3);
        assert!(found.out.contains("a resize was stopped"), "{found:#?}");
        assert!(found.out.contains("in file block 4"), "{found:#?}");
        bring_home(&path);
        let left = usize::try_from(number(&path, "disk-size")).unwrap();
        assert_reads(&path, &expected[..left]);
        resize(&path, &["200M"]).expect_code(0);
        let mut expected = expected[..left].to_vec();
        expected.resize(200 << 20, 0);
        assert_reads(&path, &expected);
    }
    // The same again completes it.
    let (_directory, path) = scratch();
    let mut expected = stopped(&path);
    resize(&path, &["200M"]).expect_code(0);
    expected.resize(200 << 20, 0);
    assert_reads(&path, &expected);
}

/// QEMU rounds `disk_size` up to sectors, so it may want a number for a block that has no sector here: no block may be away.
#[test]
fn an_image_whose_size_is_odd_is_never_taken_for_full() {
    const BLOCKS: u32 = 32 << 10;
    const BLOCK: u64 = 128 << 10;
    let (_directory, path) = scratch();
    let size = u64::from(BLOCKS) * BLOCK;
    vdi(words![
        "create",
        "--block-size",
        "128k",
        path,
        (size + 512).to_string()
    ])
    .expect_code(0);
    let map = number(&path, "offset-bmap");
    let data = map + 4 * u64::from(BLOCKS + 1);
    patch(&path, 0x158, &u32::try_from(data).unwrap().to_le_bytes());
    patch(&path, 0x170, &(size + 64).to_le_bytes());
    patch(&path, 0x184, &BLOCKS.to_le_bytes());
    let entries: Vec<u8> = (0..BLOCKS).flat_map(u32::to_le_bytes).collect();
    patch(&path, map, &entries);
    set_len(&path, data + size);
    let found = vdi(words!["check", path]).expect_code(0);
    assert!(found.out.contains("no multiple of 512"), "{found:#?}");

    let refused = resize(&path, &["6G"]).expect_code(1);
    assert!(refused.err.contains("no multiple of 512"), "{refused:#?}");
    // One block too far, as if a growth had been stopped.
    patch(&path, map, &(BLOCKS + 1).to_le_bytes());
    set_len(&path, data + size + 2 * BLOCK);
    let refused = vdi(words!["map", path]).expect_code(1);
    assert!(refused.err.contains("file block 32769"), "{refused:#?}");
}

/// Blocks that nobody owns would be counted for good, and take numbers that moved blocks need.
#[test]
fn growing_closes_holes() {
    // In place, and where the blocks 0 and 11 must not be moved behind the last number.
    for to in ["40M", "1800G"] {
        let (_directory, path) = scratch();
        let written: Vec<u64> = (0..12).collect();
        by_qemu(&path, 12 * MIB, &written);
        for block in 1..11 {
            patch(&path, 512 + 4 * block, &FREE.to_le_bytes());
        }
        resize(&path, &[to]).expect_code(0);
        vdi(words!["check", path]).expect_code(0);
        qemu_img(words!["check", "-f", "vdi", path]).expect_code(0);
        assert_eq!(number(&path, "blocks-allocated"), 2);
        let reads = ["read -P 1 0 1M", "read -P 0 1M 10M", "read -P 12 11M 1M"];
        qemu_io(&path, &reads.map(str::to_owned));
    }
}

#[test]
fn growing_completes_a_last_block_that_ends_where_the_disk_did() {
    for to in ["4M", "200M", "600G"] {
        let (_directory, path) = scratch();
        let size = 3 * MIB + 512;
        qemu::create(&path, &size.to_string());
        write_to(&path, 3 * MIB, &[5; 512]);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(number(&path, "offset-data") + 512).unwrap();
        resize(&path, &[to]).expect_code(0);
        vdi(words!["check", path]).expect_code(0);
        let reads = [
            "read -P 5 3M 512".to_owned(),
            "read -P 0 3146240 1048064".to_owned(),
        ];
        qemu_io(&path, &reads[..if to == "4M" { 1 } else { 2 }]);
        write_to(&path, 3 * MIB, &vec![6; 1 << 20]);
        qemu_io(&path, &["read -P 6 3M 1M".to_owned()]);
    }
}

/// Section 8, and `VDResize` in VirtualBox's `VD.cpp`: cylinders are what heads and sectors leave of the size.
#[test]
fn a_resize_scales_the_cylinders_of_a_geometry_that_is_set() {
    let (_directory, path) = scratch();
    let lchs = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        [word(0x1c8), word(0x1cc), word(0x1d0), word(0x1d4)]
    };
    vdi(words!["create", path, "100M"]).expect_code(0);
    resize(&path, &["200M"]).expect_code(0);
    assert_eq!(lchs(&path), [0, 0, 0, 512], "none is set");
    vdi(words!["set", "--lchs", "203/16/63", path]).expect_code(0);
    for (to, cylinders) in [
        ("1000M", 2031),
        ("5001M", 10160),
        ("3M", 6),
        ("512k", 1),
        ("1k", 0),
    ] {
        resize(&path, &["--shrink", to]).expect_code(0);
        assert_eq!(lchs(&path), [cylinders, 16, 63, 512], "{to}");
    }
    // VirtualBox divides by it.
    vdi(words!["set", "--lchs", "203/0/63", path]).expect_code(0);
    resize(&path, &["200M"]).expect_code(0);
    assert_eq!(lchs(&path), [203, 0, 63, 512]);
    // The short header has the map there, or anything.
    image()
        .with_field("header_size", 0x180)
        .with_field("lchs_cylinders", 7)
        .with_field("lchs_heads", 16)
        .with_field("lchs_sectors", 63)
        .write(&path);
    resize(&path, &["20M"]).expect_code(0);
    assert_eq!(lchs(&path)[..3], [7, 16, 63]);
}

/// VirtualBox resizes no image of version 0 (section 3). What its header can say, it says.
#[test]
fn an_image_of_version_0_shrinks_and_grows_as_far_as_its_map_reaches() {
    let case = corpus().into_iter().find(|case| case.name == "version-0");
    let directory = tempfile::tempdir().unwrap();
    let path = case.unwrap().images[0].unpack(directory.path());
    let mut expected = raw(&path);
    let before = fs::read(&path).unwrap();
    let refused = resize(&path, &["4097K"]).expect_code(1).err;
    for part in ["beyond 4194304 bytes", "4 entries", "convert it first"] {
        assert!(refused.contains(part), "{refused}");
    }
    assert!(fs::read(&path).unwrap() == before);
    let short = expected.len() - 700 * 512;
    resize(&path, &["--shrink", "--force", &short.to_string()]).expect_code(0);
    assert_reads(&path, &expected[..short]);
    resize(&path, &["--shrink", "--force", "2560K"]).expect_code(0);
    expected.truncate(2560 << 10);
    assert_reads(&path, &expected);
    assert_eq!(number(&path, "blocks-in-image"), 4);
    assert_eq!(number(&path, "blocks-allocated"), 2);
    for to in [3 << 20, 4 << 20] {
        resize(&path, &[&to.to_string()]).expect_code(0);
        expected.resize(to, 0);
        assert_reads(&path, &expected);
    }
    write_to(&path, 3 * MIB, &[9; 512]);
    expected[3 << 20..(3 << 20) + 512].fill(9);
    assert_reads(&path, &expected);
    let after = fs::read(&path).unwrap();
    assert_eq!(after[..0x160], before[..0x160]);
    // Size, and what the loss of data has changed: uuid_modify. Map and data are behind.
    assert_eq!(after[0x160..0x184], before[0x160..0x184]);
    assert_eq!(after[0x194..0x1a4], before[0x194..0x1a4]);
}

#[test]
fn a_fixed_image_of_version_0_has_its_space_after_a_resize() {
    let (directory, path) = scratch();
    let case = corpus().into_iter().find(|case| case.name == "version-0");
    let unpacked = case.unwrap().images[0].unpack(directory.path());
    fs::rename(unpacked, &path).unwrap();
    patch(&path, 0x48, &2_u32.to_le_bytes());
    let mut expected = raw(&path);
    resize(&path, &["--shrink", "--force", "2M"]).expect_code(0);
    expected.truncate(2 << 20);
    assert_reads(&path, &expected);
    resize(&path, &["4M"]).expect_code(0);
    expected.resize(4 << 20, 0);
    assert_reads(&path, &expected);
    assert_eq!(number(&path, "blocks-allocated"), 3);
    assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 3 * MIB);
}

#[test]
fn set_changes_an_image_of_version_0_where_its_own_fields_are() {
    let case = corpus().into_iter().find(|case| case.name == "version-0");
    let directory = tempfile::tempdir().unwrap();
    let path = case.unwrap().images[0].unpack(directory.path());
    let before = fs::read(&path).unwrap();
    let uuid = "706c398a-86ca-49e3-9a30-3cbc9073cd11";
    for (words, at) in [
        (["--comment", "hello"], 0x50..0x150),
        (["--uuid-image", uuid], 0x174..0x184),
        (["--uuid-modify", uuid], 0x184..0x194),
    ] {
        fs::write(&path, &before).unwrap();
        vdi(words!["set", path, words[0], words[1]]).expect_code(0);
        let mut after = fs::read(&path).unwrap();
        assert!(after[at.clone()] != before[at.clone()], "{words:?}");
        after[at.clone()].copy_from_slice(&before[at]);
        assert!(after == before, "{words:?} changes more");
    }
    let answer = vdi(words!["set", path, "--lchs", "1/2/3"]).expect_code(1);
    assert!(answer.err.contains("short header"), "{answer:#?}");
}

#[test]
fn a_fixed_image_grows_and_shrinks_with_its_space_reserved() {
    let (_directory, path) = scratch();
    vdi(words!["create", "--fixed", path, "5M"]).expect_code(0);
    write_to(&path, 4 * MIB, &vec![7; 1 << 20]);
    write_to(&path, 0, &vec![8; 512]);
    let mut expected = raw(&path);
    resize(&path, &["9M"]).expect_code(0);
    expected.resize(9 << 20, 0);
    assert_reads(&path, &expected);
    assert_eq!(number(&path, "blocks-allocated"), 9);
    assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 9 * MIB);
    write_to(&path, 8 * MIB, &vec![9; 1 << 20]);
    resize(&path, &["--shrink", "--force", "3M"]).expect_code(0);
    expected.truncate(3 << 20);
    assert_reads(&path, &expected);
    assert_eq!(number(&path, "blocks-allocated"), 3);
    // More than any map has entries for is refused.
    let answer = resize(&path, &["7E"]).expect_code(1);
    assert!(answer.err.contains("larger blocks"), "{answer:#?}");
    assert_reads(&path, &expected);
}

#[test]
fn what_lies_behind_the_old_end_never_shows() {
    let (_directory, path) = scratch();
    let size = 3 * MIB + 512;
    qemu::create(&path, &size.to_string());
    write_to(&path, 3 * MIB, &[5; 512]);
    // A program that did not clear the rest of the last block.
    let data = number(&path, "offset-data");
    patch(&path, data + 512, &[6; 4096]);
    resize(&path, &["5M"]).expect_code(0);
    let mut expected = vec![0; 5 << 20];
    expected[3 << 20..(3 << 20) + 512].fill(5);
    assert_reads(&path, &expected);
    write_to(&path, 3 * MIB, &vec![7; 2 << 20]);
    resize(
        &path,
        &["--shrink", "--force", &(3 * MIB + 1024).to_string()],
    )
    .expect_code(0);
    // VirtualBox would show it, too, when it grows the image.
    let file = fs::read(&path).unwrap();
    assert_eq!(file.len() as u64, data + MIB);
    assert!(are_zeros(&file[usize::try_from(data).unwrap() + 1024..]));
    resize(&path, &["5M"]).expect_code(0);
    expected[3 << 20..(3 << 20) + 1024].fill(7);
    assert_reads(&path, &expected);
}

#[test]
fn a_child_that_grows_shows_nothing_of_a_larger_parent() {
    for to in ["5M", "4M", "12M", "300M"] {
        let (directory, base) = scratch();
        let parents = by_qemu(&base, 12 * MIB, &(0..12).collect::<Vec<_>>());
        let child = directory.path().join("c.vdi");
        vdi(words!["snapshot", base, child]).expect_code(0);
        let small = (3 * MIB + 512).to_string();
        let answer = resize(&child, &["--shrink", &small]).expect_code(1);
        let lost = 9 * MIB - 512;
        assert!(
            answer.err.contains(&format!("{lost} bytes of data")),
            "{answer:#?}"
        );
        resize(&child, &["--shrink", "--force", &small]).expect_code(0);
        assert_reads(&child, &parents[..(3 << 20) + 512]);
        resize(&child, &[to]).expect_code(0);
        let mut expected = parents[..(3 << 20) + 512].to_vec();
        expected.resize(usize::try_from(number(&child, "disk-size")).unwrap(), 0);
        assert_reads(&child, &expected);
    }
}

#[test]
fn a_child_without_a_last_block_of_its_own_shows_nothing_of_a_parent_that_grew() {
    let (directory, base) = scratch();
    let small = 3 * MIB + 512;
    qemu::create(&base, &small.to_string());
    write_to(&base, 3 * MIB, &[5; 512]);
    let child = directory.path().join("c.vdi");
    vdi(words!["snapshot", base, child]).expect_code(0);
    resize(&base, &["5M"]).expect_code(0);
    write_to(&base, small, &vec![6; (2 << 20) - 512]);
    // It knows of no state of its parent.
    patch(&child, 0x1b8, &[0; 16]);
    resize(&child, &["5M"]).expect_code(0);
    let mut expected = vec![0; 5 << 20];
    expected[3 << 20..(3 << 20) + 512].fill(5);
    assert_reads(&child, &expected);
}

#[test]
fn shrinking_needs_leave_and_twice_if_it_loses_data() {
    let (_directory, path) = scratch();
    let mut expected = by_qemu(&path, 12 * MIB, &[5, 0, 11]);
    let before = fs::read(&path).unwrap();
    let modify = header(&path)["uuid-modify"].clone();
    let answer = resize(&path, &["-2M"]).expect_code(1);
    assert!(answer.err.contains("--shrink"), "{answer:#?}");
    let answer = resize(&path, &["--shrink", "-512k"]).expect_code(1);
    assert!(answer.err.contains("524288 bytes of data"), "{answer:#?}");
    assert!(answer.err.contains("--force"), "{answer:#?}");
    let answer = resize(&path, &["--shrink", "-12M"]).expect_code(1);
    assert!(answer.err.contains("at least one sector"), "{answer:#?}");
    let answer = resize(&path, &["--shrink", "-13M"]).expect_code(1);
    assert!(answer.err.contains("not possible"), "{answer:#?}");
    assert!(fs::read(&path).unwrap() == before);
    resize(&path, &["--shrink", "--force", "-2M"]).expect_code(0);
    expected.truncate(10 << 20);
    assert_reads(&path, &expected);
    let lost = header(&path)["uuid-modify"].clone();
    assert_ne!(lost, modify, "children shall notice");
    resize(&path, &["--shrink", "7M"]).expect_code(0);
    expected.truncate(7 << 20);
    assert_reads(&path, &expected);
    assert_eq!(header(&path)["uuid-modify"], lost, "nothing was lost");
    resize(&path, &["12M"]).expect_code(0);
    expected.resize(12 << 20, 0);
    assert_reads(&path, &expected);
    assert!(are_zeros(&expected[7 << 20..]));
}

/// An empty image with small blocks and data right behind the map, so that growing moves it soon.
fn empty_without_gaps(path: &Path, sectors: u64) {
    let blocks = (sectors * 512).div_ceil(128 << 10);
    let mut empty = image().with_blocks(u32::try_from(blocks.max(8)).unwrap());
    for block in [0, 1, 3, 4] {
        empty = empty.with_entry(block, FREE);
    }
    empty
        .with_field("block_size", 128 << 10)
        .with_field("disk_size", sectors * 512)
        .with_field("blocks_allocated", 0)
        .write(path);
}

/// Writes, sizes and compactions in any order, against plain bytes.
#[test]
fn any_order_of_writes_resizes_and_compactions_reads_as_plain_bytes() {
    let mut random = Random::printed();
    for maker in ["qemu", "close", "128k", "1M", "2M"] {
        let (_directory, path) = scratch();
        let sectors = random.within(1..40_000);
        let mut expected = vec![0; usize::try_from(sectors * 512).unwrap()];
        let size = (sectors * 512).to_string();
        match maker {
            "qemu" => qemu::create(&path, &size),
            "close" => empty_without_gaps(&path, sectors),
            _ => drop(vdi(words!["create", "--block-size", maker, path, size]).expect_code(0)),
        }
        for _ in 0..12 {
            let sectors = expected.len() as u64 / 512;
            match random.within(0..4) {
                0 | 1 => {
                    let start = random.within(0..sectors);
                    let count = random.within(1..(sectors - start).min(6000) + 1);
                    let at = usize::try_from(start * 512).unwrap();
                    let len = usize::try_from(count * 512).unwrap();
                    let bytes = match random.within(0..3) {
                        0 => vec![0; len],
                        _ => random.bytes(len),
                    };
                    write_to(&path, start * 512, &bytes);
                    expected[at..at + len].copy_from_slice(&bytes);
                }
                2 => drop(vdi(words!["compact", "-q", path]).expect_code(0)),
                _ => {
                    let sectors = random.within(1..100_000);
                    let words = ["--shrink", "--force", &(sectors * 512).to_string()];
                    resize(&path, &words).expect_code(0);
                    expected.resize(usize::try_from(sectors * 512).unwrap(), 0);
                }
            }
            assert_reads(&path, &expected);
        }
    }
}

#[test]
fn set_changes_what_it_is_told_and_nothing_else() {
    let (_directory, path) = scratch();
    vdi(words!["create", path, "9M"]).expect_code(0);
    write_to(&path, 0, &[1; 512]);
    let before = fs::read(&path).unwrap();
    let uuid = "706c398a-86ca-49e3-9a30-3cbc9073cd11";
    let comment = "\u{e4}".repeat(127);
    for (words, at) in [
        (["--comment", &comment], 0x54..0x154),
        (["--uuid-image", uuid], 0x188..0x198),
        (["--uuid-modify", uuid], 0x198..0x1a8),
        (["--lchs", "9/16/63"], 0x1c8..0x1d4),
    ] {
        fs::write(&path, &before).unwrap();
        vdi(words!["set", path, words[0], words[1]]).expect_code(0);
        let mut after = fs::read(&path).unwrap();
        assert!(after[at.clone()] != before[at.clone()], "{words:?}");
        after[at.clone()].copy_from_slice(&before[at]);
        assert!(after == before, "{words:?} changes more");
    }
    let all = words![
        "set",
        "--comment",
        "hello",
        "--uuid-image",
        uuid,
        "--lchs",
        "9/16/63",
        path
    ];
    vdi(all).expect_code(0);
    let info = vdi(words!["info", "--json", path]).expect_code(0).json();
    let data = &info["format-specific"]["data"];
    assert_eq!(data["comment"], "hello");
    assert_eq!(data["header"]["uuid-image"], uuid);
    let geometry = serde_json::json!({"cylinders": 9, "heads": 16, "sectors": 63});
    assert_eq!(data["lchs-geometry"], geometry);
    qemu_img(words!["check", "-f", "vdi", path]).expect_code(0);
}

#[test]
fn set_refuses_what_does_not_fit_and_leaves_the_image() {
    let (_directory, path) = scratch();
    qemu::create(&path, "9M");
    let before = fs::read(&path).unwrap();
    let long = "x".repeat(256);
    for (words, reason) in [
        (words!["--comment", long].as_slice(), "256 bytes"),
        (
            &words!["--uuid-image", "00000000-0000-0000-0000-000000000000"],
            "null",
        ),
        (&words!["--lchs", "1/2"], "three numbers"),
        (&words!["--lchs", "1/2/3"], "short header"),
        (&words![], "--comment"),
    ] {
        let answer = vdi([words!["set", path].as_slice(), words].concat()).expect_code(1);
        assert!(answer.err.contains(reason), "{answer:#?}");
    }
    assert!(fs::read(&path).unwrap() == before);
    image().write(&path);
    let answer = vdi(words!["set", path, "--lchs", "1/256/3"]).expect_code(1);
    assert!(answer.err.contains("255 heads"), "{answer:#?}");
    // What VirtualBox refuses it opens again.
    image().with_field("uuid_image", 0).write(&path);
    vdi(words!["check", path]).expect_code(2);
    let uuid = "706c398a-86ca-49e3-9a30-3cbc9073cd11";
    vdi(words!["set", path, "--uuid-image", uuid]).expect_code(0);
    vdi(words!["check", path]).expect_code(0);
}
