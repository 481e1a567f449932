//! Every kind of finding, mended or left alone with a reason; and repairs that the power ends.
//!
//! What a block reads as is found out by [`Picture`], which shares nothing with the library.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use vdi_core::check::{Severity, check};
use vdi_core::repair::{Plan, Unreadable, apply, plan};
use vdi_core::{Access, Disk, HostFile, Locking, Storage};
use vdi_tests::builder::{FREE, ImageBuilder, ZERO, image};
use vdi_tests::corpus::{corpus, sha256_of_file};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::simulated::{Contents, Cut, SimulatedFile, for_each_seed, percent};
use vdi_tests::tool::{Answer, settle, vdi};
use vdi_tests::words;

const MIB: u64 = 1 << 20;

/// What each block of a disk reads as: the part that the file has of it.
#[derive(Debug, PartialEq, Eq)]
struct Picture(Vec<Vec<u8>>);

impl Picture {
    /// Looks at an image with its map at 512 and its data at 1024.
    fn of(file: &[u8], blocks: usize, block_size: usize) -> Self {
        let block = |nth: usize| {
            let entry: [u8; 4] = file[512 + nth * 4..][..4].try_into().unwrap();
            let entry = u32::from_le_bytes(entry);
            if entry == FREE || entry == ZERO {
                return vec![0; block_size];
            }
            let at = 1024 + entry as usize * block_size;
            let end = (at + block_size).min(file.len());
            file.get(at..end).unwrap_or_default().to_vec()
        };
        Self((0..blocks).map(block).collect())
    }

    /// Whether what could be read here can be read there, and the rest is nobody else's.
    fn is_kept_by(&self, after: &Self) -> Result<(), String> {
        for (nth, (before, after)) in self.0.iter().zip(&after.0).enumerate() {
            if !after.starts_with(before) {
                return Err(format!("disk block {nth} reads otherwise"));
            }
            if after[before.len()..].iter().any(|&byte| byte != 0) {
                return Err(format!("disk block {nth} has got bytes of another"));
            }
        }
        Ok(())
    }
}

/// A damaged image: its file, and what the tool is told besides.
struct Damage {
    image: ImageBuilder,
    /// Bytes that are put into the file behind the builder's back.
    block: Option<u64>,
    options: &'static [&'static str],
    /// The kind that the check must find.
    kind: &'static str,
    /// What the tool must say.
    says: &'static [&'static str],
}

fn damage(kind: &'static str, image: ImageBuilder, says: &'static [&'static str]) -> Damage {
    Damage {
        image,
        block: None,
        options: &[],
        kind,
        says,
    }
}

impl Damage {
    fn with(self, options: &'static [&'static str]) -> Self {
        Self { options, ..self }
    }

    /// A file block has contents.
    fn with_block(self, number: u64) -> Self {
        let block = Some(number);
        Self { block, ..self }
    }

    fn write(&self, path: &Path) {
        self.image.write(path);
        if let Some(number) = self.block {
            let file = File::options().write(true).open(path).unwrap();
            let at = 1024 + number * MIB;
            file.write_all_at(&[0xAB; 1 << 20], at).unwrap();
        }
    }

    fn repair(&self, path: &Path, options: &[&str]) -> Answer {
        let mut words = vec!["repair", path.to_str().unwrap()];
        words.extend(self.options);
        words.extend(options);
        vdi(words)
    }
}

fn field(name: &str, value: u64) -> ImageBuilder {
    image().with_field(name, value)
}

fn curable_headers() -> Vec<Damage> {
    vec![
        damage(
            "legacy-sector-size",
            field("legacy_sector_size", 0),
            &["legacy sector size: 0 becomes 512"],
        ),
        damage(
            "lchs-sector-size",
            field("lchs_sector_size", 513),
            &["LCHS sector size: 513 becomes 512"],
        ),
        damage(
            "header-size",
            field("header_size", 0x17F),
            &["header_size: 383 becomes 400"],
        ),
        damage(
            "header-size",
            field("header_size", 7).with_field("lchs_sector_size", 0),
            &["header_size: 7 becomes 384"],
        ),
        damage(
            "null-uuid",
            field("uuid_image", 0),
            &["uuid_image: null", "children"],
        ),
        damage("null-uuid", field("uuid_modify", 0), &["uuid_modify: null"]),
        damage(
            "count-too-large",
            field("blocks_allocated", 9),
            &["blocks_allocated: 9 becomes 3"],
        ),
        damage(
            "count-too-small",
            field("blocks_allocated", 1),
            &["blocks_allocated: 1 becomes 3"],
        ),
        damage(
            "count-behind-end",
            field("blocks_allocated", 5),
            &["blocks_allocated: 5 becomes 3"],
        ),
    ]
}

/// All but the first block of the disk have storage in the nine blocks of the file, of which 0 and 8 are free.
fn full_but_for_the_first() -> ImageBuilder {
    let builder = image().with_len_change(6 << 20);
    [(2, 3), (3, 4), (5, 5), (6, 6), (7, 7)]
        .into_iter()
        .fold(builder, |image, (block, number)| {
            image.with_entry(block, number)
        })
        .with_field("blocks_allocated", 8)
}

fn curable_maps() -> Vec<Damage> {
    let behind = |entry| {
        image()
            .with_entry(5, entry)
            .with_field("blocks_allocated", 4)
    };
    vec![
        damage(
            "shared-block",
            image().with_shared_block(1, 6).with_shared_block(1, 7),
            &[
                "disk block 6: moves from file block 1",
                "to 4",
                "2097152 bytes are copied",
            ],
        ),
        damage(
            "shared-block",
            image().with_entry(1, 0),
            &["disk block 1: moves from file block 0", "to 1"],
        ),
        damage(
            "entry-out-of-range",
            image().with_entry(5, 9),
            &["disk block 5: moves from file block 9", "to 3", "file: cut"],
        )
        .with_block(9),
        damage(
            "entry-out-of-range",
            behind(0xFFFF_FFFD),
            &["disk block 5: in file block 4294967293", "lost"],
        )
        .with(&["--drop-unreadable"]),
        damage(
            "blocks-away",
            full_but_for_the_first().with_entry(0, 8),
            &["disk block 0: moves from file block 8", "to 0", "file: cut"],
        )
        .with_block(8),
        damage(
            "block-behind-end",
            image().with_len_change(-1000),
            &["disk block 4", "last 1000 bytes are lost", "lengthened"],
        ),
        damage("block-behind-end", behind(3), &["disk block 5", "lost"])
            .with(&["--drop-unreadable"]),
        damage(
            "leaked-blocks",
            image().with_entry(1, FREE),
            &["disk block 4: moves from file block 2", "hole, to 1", "cut"],
        ),
        damage(
            "leaked-blocks",
            image().with_entry(4, FREE),
            &[
                "blocks_allocated: 3 becomes 2",
                "cut from 3146752 to 2098176",
            ],
        ),
        damage(
            "trailing-bytes",
            image().with_len_change(700),
            &["cut from 3147452 to 3146752"],
        ),
    ]
}

#[test]
fn what_can_be_mended_is_mended_and_reads_as_before() {
    for damage in curable_headers().into_iter().chain(curable_maps()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.vdi");
        damage.write(&path);
        let (bytes, kind) = (fs::read(&path).unwrap(), damage.kind);
        let code = vdi(words!["check", path]).code.unwrap();

        let shown = damage.repair(&path, &[]).expect_code(code);
        assert!(
            shown.out.contains("nothing was changed"),
            "{kind}: {shown:#?}"
        );
        for word in damage.says {
            assert!(shown.out.contains(word), "{kind}: {word}: {shown:#?}");
        }
        assert_eq!(
            fs::read(&path).unwrap(),
            bytes,
            "{kind}: a plan changes nothing"
        );

        damage.repair(&path, &["--apply"]).expect_code(0);
        let after = fs::read(&path).unwrap();
        let kept = Picture::of(&bytes, 8, 1 << 20).is_kept_by(&Picture::of(&after, 8, 1 << 20));
        if !damage.options.is_empty() {
            let zeros = &Picture::of(&after, 8, 1 << 20).0[5];
            assert!(zeros.len() == 1 << 20 && zeros.iter().all(|&byte| byte == 0));
        }
        assert_eq!(kept, Ok(()), "{kind}");
        expect_sound(&path, kind);
        let again = damage.repair(&path, &[]).expect_code(0);
        assert!(again.out.contains("nothing to mend"), "{kind}: {again:#?}");
    }
}

fn expect_sound(path: &Path, kind: &str) {
    let answer = vdi(words!["check", path]).expect_code(0);
    assert!(
        answer.out.contains("nothing is wrong"),
        "{kind}: {answer:#?}"
    );
    assert!(!answer.out.contains("notes"), "{kind}: {answer:#?}");
    qemu::expect_clean(path);
    settle();
    let file = HostFile::open(path, Access::Writable, Locking::Locked).unwrap();
    let disk = Disk::open(Arc::new(file), Access::Writable);
    assert!(disk.is_ok(), "{kind}: {disk:?}");
}

fn incurable_headers() -> Vec<Damage> {
    vec![
        damage("signature", field("signature", 7), &["no VDI image"]),
        damage(
            "header-truncated",
            image().with_len_change(455 - 3 * (1 << 20) - 1024),
            &["most of the image is missing"],
        ),
        damage("map-offset", field("offset_bmap", 455), &["overlap"]),
        damage("data-offset", field("offset_data", 543), &["overlap"]),
        damage(
            "map-in-header",
            field("offset_bmap", 0x1D7),
            &["471", "472", "convert the image"],
        ),
        damage("image-type", field("image_type", 5), &["cannot be deduced"]),
        damage(
            "image-flags",
            field("image_flags", 2),
            &["cannot be deduced"],
        ),
        damage(
            "fixed-with-parent",
            field("image_type", 2).with_field("uuid_parent", 7),
            &["cannot be deduced"],
        ),
        damage(
            "no-parent",
            field("image_type", 4),
            &["which image is the parent"],
        ),
        damage(
            "disk-size-zero",
            field("disk_size", 0),
            &["cannot be deduced"],
        ),
        damage("block-size", field("block_size", 3), &["cannot be deduced"]),
        damage(
            "block-extra",
            field("block_extra", 3),
            &["cannot be deduced"],
        ),
        damage(
            "too-few-blocks",
            field("disk_size", 9 * MIB),
            &["cannot be deduced"],
        ),
    ]
}

fn incurable_maps() -> Vec<Damage> {
    let blocks = |says| says;
    vec![
        damage(
            "map-truncated",
            image().with_len_change(16 - 3 * (1 << 20) - 512),
            &["4 entries are missing", "restore the image"],
        ),
        damage(
            "block-behind-end",
            image().with_entry(5, 3).with_field("blocks_allocated", 4),
            blocks(&["disk block 5", "--drop-unreadable"]),
        ),
        damage(
            "entry-out-of-range",
            image().with_entry(5, 8),
            blocks(&["disk block 5", "--drop-unreadable"]),
        ),
        damage(
            "odd-disk-size",
            field("disk_size", 8 * MIB - 100),
            &["8388508", "a guess"],
        ),
        // Not a byte is given back where the header may be wrong about which are free.
        damage(
            "leaked-blocks",
            field("disk_size", 7 * MIB).with_entry(1, FREE),
            &["1 of the 3", "blocks_in_image is not what"],
        ),
    ]
}

#[test]
fn what_cannot_be_mended_is_named_and_left_as_it_is() {
    for damage in incurable_headers().into_iter().chain(incurable_maps()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.vdi");
        damage.write(&path);
        let kind = damage.kind;
        let before = sha256_of_file(&path);
        let found = vdi(words!["check", "--json", path]);
        let counted = &found.json()["counts"][kind];
        assert!(counted.is_u64(), "{kind}: {found:#?}");
        for options in [&[][..], &["--apply"]] {
            let answer = damage
                .repair(&path, options)
                .expect_code(found.code.unwrap());
            for word in damage.says {
                assert!(answer.out.contains(word), "{kind}: {word}: {answer:#?}");
            }
            assert!(answer.out.contains("nothing can be mended"), "{answer:#?}");
            assert_eq!(sha256_of_file(&path), before, "{kind}");
        }
        let files = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(
            files, 1,
            "{kind}: no copy of header and map without a change"
        );
    }
}

#[test]
fn header_and_map_are_kept_beside_the_image_unless_told_not_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vdi");
    let broken = image().with_shared_block(1, 6);
    broken.write(&path);
    let before = fs::read(&path).unwrap();
    vdi(words!["repair", "--apply", "--no-backup", path]).expect_code(0);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    broken.write(&path);
    let answer = vdi(words!["repair", "--apply", path]).expect_code(0);
    let kept = fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|found| *found != path)
        .unwrap();
    assert!(answer.out.contains(kept.to_str().unwrap()), "{answer:#?}");
    let kept = fs::read(kept).unwrap();
    assert_eq!(kept, before[..kept.len()]);
    assert!(kept.len() >= 512 + 8 * 4);
}

/// The copy has the image's UUID.
#[test]
fn what_a_repair_keeps_beside_a_parent_is_not_taken_for_it() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name| directory.path().join(name);
    let (parent, child) = (at("parent.vdi"), at("child.vdi"));
    image().with_len_change(100).write(&parent);
    vdi(words!["snapshot", parent, child]).expect_code(0);
    let answer = vdi(words!["repair", "--apply", parent]).expect_code(0);
    assert!(answer.out.contains("are kept in"), "{answer:#?}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    vdi(words!["compare", parent, child]).expect_code(0);
    let answer = vdi(words!["check", child]).expect_code(0);
    assert!(!answer.out.contains("both"), "{answer:#?}");
}

/// The map is a hole: all its million entries name file block 0.
#[test]
fn an_image_that_claims_more_than_there_is_room_for_is_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vdi");
    let blocks = 1_u64 << 20;
    let broken = image()
        .with_field("block_size", 128 << 20)
        .with_field("disk_size", blocks << 27)
        .with_field("blocks_in_image", blocks)
        .with_field("offset_data", 512 + blocks * 4);
    broken.write(&path);
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(512).unwrap();
    file.set_len(512 + blocks * 4 + (128 << 20)).unwrap();
    drop(file);
    let before = sha256_of_file(&path);
    let answer = vdi(words!["repair", "--apply", path]).expect_code(1);
    let needed = ((blocks - 1) << 27).to_string();
    assert!(answer.err.contains(&needed), "{answer:#?}");
    assert!(answer.err.contains("make room"), "{answer:#?}");
    assert_eq!(sha256_of_file(&path), before);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
}

#[test]
fn an_image_in_use_is_not_repaired() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vdi");
    image().with_shared_block(1, 6).write(&path);
    settle();
    let held = HostFile::open(&path, Access::ReadOnly, Locking::Locked).unwrap();
    let before = sha256_of_file(&path);
    let answer = vdi(words!["repair", "--apply", path]).expect_code(1);
    assert!(answer.err.contains("in use"), "{answer:#?}");
    assert_eq!(sha256_of_file(&path), before);
    drop(held);
}

#[test]
fn what_is_dropped_from_a_child_does_not_let_its_parent_show_through() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("child.vdi");
    let child = image()
        .with_field("image_type", 4)
        .with_field("uuid_parent", 9);
    child.with_entry(5, 3).write(&path);
    vdi(words!["repair", "--apply", "--drop-unreadable", path]).expect_code(0);
    let bytes = fs::read(&path).unwrap();
    assert_eq!(bytes[512 + 5 * 4..][..4], ZERO.to_le_bytes());
}

#[test]
fn an_image_of_version_0_is_mended_where_its_own_fields_are() {
    let case = corpus().into_iter().find(|case| case.name == "version-0");
    let directory = tempfile::tempdir().unwrap();
    let path = case.unwrap().images[0].unpack(directory.path());
    vdi(words!["check", path]).expect_code(0);
    let before = fs::read(&path).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    // blocks_allocated, and uuid_image behind it.
    file.write_all_at(&[0; 20], 0x170).unwrap();
    vdi(words!["repair", path]).expect_code(2);
    vdi(words!["repair", "--apply", path]).expect_code(0);
    let after = fs::read(&path).unwrap();
    assert_eq!(after[..0x174], before[..0x174]);
    assert_ne!(after[0x174..0x184], [0; 16]);
    assert_eq!(after[0x184..], before[0x184..]);
}

const BLOCKS: u32 = 10;
const SMALL: u64 = 128 << 10;

/// An image with every damage that a map can have, somewhere.
fn damaged(random: &mut Random) -> Contents {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vdi");
    let mut builder = image()
        .with_field("blocks_in_image", BLOCKS.into())
        .with_field("block_size", SMALL)
        .with_field("disk_size", u64::from(BLOCKS) * SMALL)
        .with_field("blocks_allocated", random.within(0..u64::from(BLOCKS) + 2));
    if percent(random, 20) {
        builder = builder.with_field("uuid_modify", 0);
    }
    builder.write(&path);
    let bytes = fs::read(&path).unwrap();
    let mut contents = Contents::default();
    contents.write(0, &bytes[..1024]);
    for block in 0..u64::from(BLOCKS) {
        let entry = match random.within(0..10) {
            0 => FREE,
            1 => ZERO,
            _ => u32::try_from(random.within(0..14)).unwrap(),
        };
        contents.write(512 + block * 4, &entry.to_le_bytes());
    }
    let in_file = random.within(0..14);
    for number in 0..in_file {
        let byte = u8::try_from(number + 1).unwrap();
        contents.write(1024 + number * SMALL, &vec![byte; 128 << 10]);
    }
    let cut = if percent(random, 50) {
        random.within(0..SMALL)
    } else {
        0
    };
    contents.set_len(1024 + in_file * SMALL + cut);
    contents
}

fn picture(contents: &Contents) -> Picture {
    let bytes = contents.bytes(0..contents.len_bytes());
    Picture::of(&bytes, BLOCKS as usize, 128 << 10)
}

fn repair(file: &SimulatedFile, unreadable: Unreadable) -> Plan {
    let plan = plan(file, unreadable).unwrap();
    apply(file, &plan).unwrap();
    plan
}

/// Repairs what is left, and looks at what becomes of it.
fn expect_mended(left: Contents, before: &Picture, unreadable: Unreadable) {
    let file = SimulatedFile::new(left);
    repair(&file, unreadable);
    assert_eq!(before.is_kept_by(&picture(&file.contents())), Ok(()));
    let again = plan(&*file, unreadable).unwrap();
    assert!(again.is_empty(), "{again:#?}");
    let report = check(&*file).unwrap();
    let corrupt = report.count_of(Severity::Corruption);
    if unreadable == Unreadable::Drop {
        assert_eq!(report.worst(), None, "{report:#?}");
        let disk = Disk::open(file as Arc<dyn Storage>, Access::Writable);
        assert!(disk.is_ok(), "{disk:?}");
    } else {
        let unread = report.count("block-behind-end") + report.count("entry-out-of-range");
        let shared = report.count("shared-block");
        assert_eq!(corrupt, unread + shared, "{report:#?}");
        assert_eq!(corrupt > 0, !again.left.is_empty(), "{again:#?}");
    }
}

#[test]
fn a_repair_that_the_power_ends_anywhere_loses_nothing_and_is_finished_by_another() {
    for_each_seed(40, |mut random| {
        let contents = damaged(&mut random);
        let before = picture(&contents);
        let unreadable = if percent(&mut random, 50) {
            Unreadable::Drop
        } else {
            Unreadable::Keep
        };
        expect_mended(contents.clone(), &before, unreadable);
        let file = SimulatedFile::new(contents);
        repair(&file, unreadable);
        let history = file.history();
        for moment in history.moments() {
            let point = history.at(moment);
            for cut in point.cuts(4, &mut random) {
                let left = point.cut(cut, &mut random);
                let kept = before.is_kept_by(&picture(&left));
                assert_eq!(kept, Ok(()), "{cut:?} at {moment:?}");
                expect_mended(left, &before, unreadable);
            }
        }
    });
}

/// File block 1 is where the copy goes, and where the entry of the unreadable disk block 2 points.
#[test]
fn no_copy_goes_where_an_entry_still_points() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.vdi");
    let broken = image()
        .with_shared_block(0, 1)
        .with_entry(2, 1)
        .with_entry(4, FREE);
    broken.with_len_change(-2 << 20).write(&path);
    let mut contents = Contents::default();
    contents.write(0, &fs::read(&path).unwrap());
    let file = SimulatedFile::new(contents);
    let plan = repair(&file, Unreadable::Drop);
    assert_eq!(plan.blocks.unwrap().copied_bytes(), MIB);
    let history = file.history();
    for moment in history.moments() {
        let left = history
            .at(moment)
            .cut(Cut::Everything, &mut Random::seeded(1));
        let bytes = left.bytes(0..left.len_bytes());
        let Picture(blocks) = Picture::of(&bytes, 8, 1 << 20);
        assert!(blocks[2].iter().all(|&byte| byte == 0), "at {moment:?}");
    }
}

#[test]
fn blocks_that_cannot_be_read_do_not_begin_to_read_as_zeros() {
    for_each_seed(100, |mut random| {
        let contents = damaged(&mut random);
        let before = picture(&contents);
        let file = SimulatedFile::new(contents);
        repair(&file, Unreadable::Keep);
        let after = picture(&file.contents());
        for (nth, (before, after)) in before.0.iter().zip(&after.0).enumerate() {
            assert_eq!(before.is_empty(), after.is_empty(), "disk block {nth}");
        }
    });
}
