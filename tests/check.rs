//! Every way in which an image can be broken: made by name, and found by name.
//!
//! Each case is also looked at by the library's own door to disks: what `check` calls
//! sound must open, and what does not open must not be called sound.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::fs;
use std::path::Path;
use std::sync::Arc;

use vdi_core::check::{Finding, LISTED_PER_KIND, Report, Severity, check};
use vdi_core::{Access, Disk, HostFile, Locking, OpenError};
use vdi_tests::builder::{FREE, ImageBuilder, ZERO, image};
use vdi_tests::corpus::sha256_of_file;
use vdi_tests::tool::{settle, vdi};
use vdi_tests::words;

const MIB: u64 = 1 << 20;

/// A way to break an image and what must be found then.
struct Break {
    image: ImageBuilder,
    /// Kinds in the order in which they are found.
    kinds: &'static [&'static str],
    /// What the message of the first must name: the value and the limit.
    names: &'static [&'static str],
    exit_code: i32,
    opens: Opens,
}

#[derive(Debug, PartialEq, Eq)]
enum Opens {
    Writable,
    ReadOnly,
    Never,
}

use Opens::{Never, ReadOnly, Writable};

fn corrupt(
    image: ImageBuilder,
    kinds: &'static [&'static str],
    names: &'static [&'static str],
) -> Break {
    Break {
        image,
        kinds,
        names,
        exit_code: 2,
        opens: Never,
    }
}

impl Break {
    fn opens(self, opens: Opens) -> Self {
        Self { opens, ..self }
    }

    fn exits(self, exit_code: i32) -> Self {
        Self { exit_code, ..self }
    }
}

fn field(name: &str, value: u64) -> ImageBuilder {
    image().with_field(name, value)
}

fn breaks_of_places() -> Vec<Break> {
    vec![
        corrupt(
            field("signature", 0x1234_5678),
            &["signature"],
            &["signature", "0x12345678", "0xbeda107f"],
        ),
        corrupt(
            image().with_len_change(-3 * (1 << 20) - 1024 + 455),
            &["header-truncated"],
            &["455 bytes", "456"],
        ),
        corrupt(
            field("header_size", 0x17F),
            &["header-size"],
            &["header_size", "383", "384"],
        ),
        corrupt(
            field("offset_bmap", 455),
            &["map-offset"],
            &["offset_bmap", "455", "456"],
        ),
        corrupt(
            field("offset_data", 543),
            &["data-offset"],
            &["offset_data", "543", "544", "8 entries"],
        ),
        corrupt(
            field("blocks_in_image", 0xFFFF_FFFF),
            &["data-offset"],
            &["offset_data", "1024", "4294967295 entries", "17179869692"],
        ),
    ]
}

fn breaks_of_kinds() -> Vec<Break> {
    vec![
        corrupt(
            field("image_type", 5),
            &["image-type"],
            &["image_type", "5", "4 (differencing)"],
        ),
        corrupt(
            field("image_flags", 0x102),
            &["image-flags"],
            &["image_flags", "0x102", "0x2"],
        ),
        corrupt(
            field("lchs_sector_size", 513),
            &["lchs-sector-size"],
            &["LCHS sector size", "513", "512"],
        ),
        corrupt(
            field("image_type", 2).with_field("uuid_parent", 7),
            &["fixed-with-parent"],
            &["2 (fixed)", "uuid_parent", "00000007-0000"],
        ),
        corrupt(
            field("image_type", 4),
            &["no-parent"],
            &["4 (differencing)", "uuid_parent is null"],
        ),
        corrupt(
            field("image_type", 0)
                .with_field("disk_size", 0)
                .with_field("lchs_sector_size", 1),
            &["image-type", "lchs-sector-size", "disk-size-zero"],
            &["image_type"],
        ),
    ]
}

fn breaks_of_sizes() -> Vec<Break> {
    vec![
        corrupt(
            field("disk_size", 0),
            &["disk-size-zero"],
            &["disk_size", "0"],
        ),
        corrupt(
            field("block_size", 3 << 20),
            &["block-size"],
            &["block_size", "3145728", "131072", "134217728"],
        ),
        corrupt(
            field("block_size", 64 << 10),
            &["block-size"],
            &["block_size", "65536", "131072"],
        ),
        corrupt(
            field("block_extra", 513),
            &["block-extra"],
            &["block_extra", "513", "power of two"],
        ),
        corrupt(
            field("disk_size", 8 * MIB + 512),
            &["too-few-blocks"],
            &["blocks_in_image", "8", "8389120", "9"],
        ),
        corrupt(
            field("blocks_in_image", 0),
            &["too-few-blocks", "count-too-large", "leaked-blocks"],
            &["blocks_in_image", "0", "8"],
        ),
    ]
}

fn flaws() -> Vec<Break> {
    vec![
        // Its only entry is then the last byte of the LCHS sector size and zeros.
        corrupt(
            field("offset_bmap", 0x1D7)
                .with_field("blocks_in_image", 1)
                .with_field("blocks_allocated", 1)
                .with_field("disk_size", 1 << 20),
            &["map-in-header", "trailing-bytes"],
            &["offset_bmap is 471", "ends at 472"],
        )
        .opens(ReadOnly),
        corrupt(
            field("uuid_image", 0),
            &["null-uuid"],
            &["uuid_image is null"],
        )
        .opens(ReadOnly),
        corrupt(
            field("uuid_modify", 0),
            &["null-uuid"],
            &["uuid_modify is null"],
        )
        .opens(ReadOnly),
        corrupt(
            field("blocks_allocated", 9),
            &["count-too-large"],
            &["blocks_allocated", "9", "8 of blocks_in_image"],
        )
        .opens(ReadOnly),
    ]
}

fn breaks_of_entries() -> Vec<Break> {
    vec![
        corrupt(
            image().with_len_change(-3 * (1 << 20) - 512 + 16),
            &[
                "map-truncated",
                "block-behind-end",
                "block-behind-end",
                "count-behind-end",
            ],
            &[
                "8 entries",
                "ends at 544",
                "ends at 528",
                "4 entries are missing",
            ],
        ),
        corrupt(
            image().with_entry(5, 8),
            &["entry-out-of-range"],
            &["disk block 5", "file block 8", "8 blocks"],
        ),
        corrupt(
            image().with_entry(5, 0xFFFF_FFFD),
            &["entry-out-of-range"],
            &["disk block 5", "file block 4294967293", "blocks_in_image"],
        ),
        corrupt(
            image().with_entry(5, 3),
            &["block-behind-end", "count-too-small"],
            &["disk block 5", "file block 3", "4195328", "3146752"],
        ),
        corrupt(
            image().with_len_change(-1),
            &["block-behind-end"],
            &["disk block 4", "file block 2", "3146752", "3146751"],
        ),
        corrupt(
            image().with_shared_block(1, 6),
            &["shared-block"],
            &["disk blocks 1 and 6", "file block 1"],
        ),
    ]
}

/// A full image whose first block is behind the last number, as a stopped resize leaves it.
fn away() -> ImageBuilder {
    let full = image().with_blocks(3).with_entry(2, 2);
    full.with_entry(0, 3).with_len_change(1 << 20)
}

fn breaks_of_full_images() -> Vec<Break> {
    const NOT_AWAY: &[&str] = &["disk block 0", "file block 3", "3 blocks"];
    vec![
        corrupt(
            away(),
            &["blocks-away"],
            &[
                "1 of its blocks",
                "disk block 0",
                "file block 3",
                "number of 3",
            ],
        )
        .opens(Writable)
        .exits(3),
        // Not full: a new block would want a number.
        corrupt(
            away().with_entry(2, ZERO),
            &["entry-out-of-range", "leaked-blocks", "trailing-bytes"],
            NOT_AWAY,
        ),
        // A block that the disk does not have.
        corrupt(
            away().with_field("disk_size", 2 * MIB),
            &["entry-out-of-range", "leaked-blocks", "trailing-bytes"],
            NOT_AWAY,
        ),
        // QEMU may give the last sector storage.
        corrupt(
            away().with_field("disk_size", 2 * MIB + 100),
            &[
                "odd-disk-size",
                "entry-out-of-range",
                "leaked-blocks",
                "trailing-bytes",
            ],
            &["2097252"],
        ),
        // Not in the file.
        corrupt(
            away().with_len_change(0),
            &["entry-out-of-range", "leaked-blocks"],
            NOT_AWAY,
        ),
        corrupt(
            away().with_shared_block(0, 1),
            &[
                "entry-out-of-range",
                "entry-out-of-range",
                "leaked-blocks",
                "trailing-bytes",
            ],
            NOT_AWAY,
        ),
    ]
}

fn breaks_of_counts() -> Vec<Break> {
    vec![
        corrupt(
            field("blocks_allocated", 2),
            &["count-too-small"],
            &["blocks_allocated is 2", "up to 2", "at least 3"],
        )
        .opens(Writable),
        corrupt(
            image().with_entry(1, FREE),
            &["leaked-blocks"],
            &["1 of the 3"],
        )
        .opens(Writable)
        .exits(3),
        corrupt(
            image().with_len_change(700),
            &["trailing-bytes"],
            &["700 bytes", "3146752"],
        )
        .opens(Writable)
        .exits(3),
        corrupt(
            field("blocks_allocated", 5),
            &["count-behind-end"],
            &["blocks_allocated is 5", "3146752", "file block 3"],
        )
        .opens(Writable)
        .exits(0),
        // Entry 7 is for a block that the disk does not have: nothing need be there.
        corrupt(
            field("disk_size", 7 * MIB)
                .with_entry(7, 4)
                .with_field("blocks_allocated", 5),
            &["count-behind-end"],
            &["blocks_allocated is 5"],
        )
        .opens(Writable)
        .exits(0),
        corrupt(
            field("legacy_sector_size", 0),
            &["legacy-sector-size"],
            &["legacy sector size is 0", "512"],
        )
        .opens(Writable)
        .exits(0),
        corrupt(
            field("disk_size", 8 * MIB - 100),
            &["odd-disk-size"],
            &["8388508", "8388096"],
        )
        .opens(Writable)
        .exits(0),
    ]
}

fn sound() -> Vec<ImageBuilder> {
    vec![
        image(),
        image().with_field("version", 0x0001_0000),
        image()
            .with_field("header_size", 0x180)
            .with_field("lchs_sector_size", 0),
        image().with_field("header_size", 0xFFFF_FFFF),
        image().with_field("image_flags", 0xFF00_0301),
        image().with_field("image_type", 3),
        image().with_comment(&[b'x'; 256]),
        image().with_entry(4, ZERO).with_entry(7, 2),
        // The last block need not be whole where the disk ends in it.
        image()
            .with_entry(4, FREE)
            .with_entry(7, 2)
            .with_field("disk_size", 7 * MIB + 512)
            .with_len_change(512 - (1 << 20)),
    ]
}

fn examine(path: &Path) -> Report {
    settle();
    let file = HostFile::open(path, Access::ReadOnly, Locking::Locked).unwrap();
    check(&file).unwrap()
}

fn open(path: &Path, access: Access) -> Result<Disk, OpenError> {
    settle();
    let file = HostFile::open(path, access, Locking::Locked).unwrap();
    Disk::open(Arc::new(file), access)
}

fn how_it_opens(path: &Path) -> Opens {
    // One after the other: a writer is alone.
    let opens = |access| open(path, access).is_ok();
    match (opens(Access::ReadOnly), opens(Access::Writable)) {
        (true, true) => Writable,
        (true, false) => ReadOnly,
        (false, _) => Never,
    }
}

fn expect(break_: &Break) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("broken.vdi");
    break_.image.write(&path);
    let before = sha256_of_file(&path);

    let report = examine(&path);
    let kinds: Vec<_> = report.findings().iter().map(Finding::kind).collect();
    assert_eq!(kinds, break_.kinds, "{:#?}", report.findings());
    let message = report.findings()[0].to_string();
    for name in break_.names {
        assert!(message.contains(name), "`{message}` must name {name}");
    }
    assert_eq!(how_it_opens(&path), break_.opens, "{message}");

    let answer = vdi(words!["check", path]).expect_code(break_.exit_code);
    assert!(answer.out.contains(&message), "{answer:#?}");
    let json = vdi(words!["check", "--json", path])
        .expect_code(break_.exit_code)
        .json();
    let listed: Vec<_> = json["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|found| &found["kind"])
        .collect();
    assert_eq!(listed, break_.kinds);
    assert_eq!(sha256_of_file(&path), before, "check changes nothing");
}

#[test]
fn every_broken_rule_of_the_header_is_found_by_name() {
    for breaks in [
        breaks_of_places(),
        breaks_of_kinds(),
        breaks_of_full_images(),
        breaks_of_sizes(),
        flaws(),
    ] {
        breaks.iter().for_each(expect);
    }
}

#[test]
fn every_broken_rule_of_the_map_is_found_by_name() {
    for breaks in [breaks_of_entries(), breaks_of_counts()] {
        breaks.iter().for_each(expect);
    }
}

#[test]
fn what_is_sound_is_called_sound_and_opens() {
    for (index, builder) in sound().iter().enumerate() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sound.vdi");
        builder.write(&path);
        let report = examine(&path);
        assert_eq!(report.findings(), [], "{index}");
        assert_eq!(how_it_opens(&path), Writable, "{index}");
        vdi(words!["check", path]).expect_code(0);
    }
}

#[test]
fn a_fixed_image_is_checked_like_any_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fixed.vdi");
    vdi(words!["create", "--fixed", path, "5M"]).expect_code(0);
    assert_eq!(examine(&path).findings(), []);
}

#[test]
fn a_differencing_image_is_checked_without_its_parent() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("child.vdi");
    let child = image()
        .with_field("image_type", 4)
        .with_field("uuid_parent", 9);
    child.write(&path);
    assert_eq!(examine(&path).findings(), []);
    child.with_shared_block(0, 7).write(&path);
    assert_eq!(examine(&path).count("shared-block"), 1);
}

#[test]
fn of_each_kind_a_few_are_listed_and_all_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("broken.vdi");
    let mut broken = image().with_blocks(1000);
    for block in 100..500 {
        broken = broken.with_entry(block, 1);
    }
    for block in 500..1000 {
        broken = broken.with_entry(block, 5000);
    }
    broken.write(&path);
    let report = examine(&path);
    assert_eq!(report.count("shared-block"), 400);
    assert_eq!(report.count("entry-out-of-range"), 500);
    assert_eq!(report.findings().len(), 2 * LISTED_PER_KIND);
    assert_eq!(report.count_of(Severity::Corruption), 900);
    let shared = report
        .findings()
        .iter()
        .filter(|finding| finding.kind() == "shared-block");
    for (block, finding) in (100..).zip(shared) {
        assert_eq!(
            *finding,
            Finding::SharedBlock {
                first: 1,
                second: block,
                file_block: 1
            }
        );
    }
    let answer = vdi(words!["check", path]).expect_code(2);
    assert!(
        answer.out.contains("380 more") && answer.out.contains("480 more"),
        "{answer:#?}"
    );
    assert!(answer.out.lines().count() < 60);
    let json = vdi(words!["check", "--json", path]).expect_code(2).json();
    assert_eq!(json["corruptions"], 900);
    assert_eq!(json["counts"]["shared-block"], 400);
}

#[test]
fn a_lying_count_costs_neither_time_nor_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("huge.vdi");
    // A map of 256 MiB, most of it a hole: entries 0. What `image` has as data lies in it, too.
    let blocks = 1_u32 << 26;
    image()
        .with_field("blocks_in_image", blocks.into())
        .with_field("offset_data", 1024 + u64::from(blocks) * 4)
        .with_field("blocks_allocated", 1)
        .write(&path);
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(6 << 30)
        .unwrap();
    let report = examine(&path);
    assert_eq!(
        report
            .findings()
            .iter()
            .filter(|finding| finding.kind() == "shared-block")
            .count(),
        LISTED_PER_KIND
    );
    assert_eq!(report.count("shared-block"), u64::from(blocks) - 11);
}

#[test]
fn what_cannot_be_checked_is_no_verdict() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vdi");
    image().with_field("version", 3).write(&path);
    let answer = vdi(words!["check", path]).expect_code(1);
    assert!(answer.err.contains("version is 0.3"), "{answer:#?}");
    assert_eq!(answer.out, "");
    vdi(words!["check", directory.path().join("nothing")]).expect_code(1);
    vdi(words!["check", directory.path()]).expect_code(1);
    vdi(words!["check", "--no-such-option", path]).expect_code(1);
}
