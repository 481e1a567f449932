//! Our images under QEMU's tools, QEMU's images under ours, and both in turn.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "the disks of these tests fit in memory, and bytes may be cut to patterns"
)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use vdi_core::{Access, CreateOptions, Disk, HostFile, Locking, NewKind, create};
use vdi_tests::builder::image;
use vdi_tests::corpus::{Case, corpus};
use vdi_tests::tool::{qemu_img, qemu_io, settle, spawn, vdi};
use vdi_tests::words;

const MIB: u64 = 1 << 20;

fn open(path: &Path, access: Access) -> Arc<Disk> {
    settle();
    let file = HostFile::open(path, access, Locking::Locked).unwrap();
    Arc::new(Disk::open(Arc::new(file), access).unwrap())
}

fn write(disk: &Arc<Disk>, at: u64, bytes: &[u8]) {
    let range = disk
        .capacity()
        .range_of_bytes(at..at + bytes.len() as u64)
        .unwrap();
    disk.write_at(range, bytes).unwrap();
}

/// All the contents, by our reader.
fn contents(path: &Path) -> Vec<u8> {
    let disk = open(path, Access::ReadOnly);
    let mut bytes = vec![0xEE; usize::try_from(disk.capacity().bytes()).unwrap()];
    disk.read_at(disk.capacity().whole(), &mut bytes).unwrap();
    bytes
}

/// All the contents, by QEMU's.
fn contents_by_qemu(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("qemu-raw");
    qemu_img(words!["convert", "-f", "vdi", "-O", "raw", path, raw]).expect_code(0);
    fs::read(raw).unwrap()
}

/// Neither tool finds anything wrong.
fn both_check(path: &Path) {
    vdi(words!["check", path]).expect_code(0);
    let answer = qemu_img(words!["check", "-f", "vdi", path]).expect_code(0);
    assert!(answer.out.contains("No errors"), "{answer:#?}");
}

/// Numbers that look random and are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // Knuth's linear congruence; its high bits are good enough.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

fn new_image(directory: &Path, kind: NewKind, capacity_bytes: u64) -> PathBuf {
    let path = directory.join("ours.vdi");
    let _ = fs::remove_file(&path);
    create(
        &path,
        &CreateOptions {
            capacity_bytes,
            block_size: 1 << 20,
            kind,
            uuid: None,
        },
    )
    .unwrap();
    path
}

#[test]
fn qemu_reads_what_we_wrote_in_images_of_every_size() {
    let directory = tempfile::tempdir().unwrap();
    for kind in [NewKind::Dynamic, NewKind::Fixed] {
        for size in [
            512,
            1024,
            MIB - 512,
            MIB,
            MIB + 512,
            3 * MIB + 512,
            17 * MIB,
        ] {
            let path = new_image(directory.path(), kind, size);
            both_check(&path);
            assert_eq!(
                contents_by_qemu(&path),
                vec![0; size as usize],
                "{kind:?} {size}"
            );

            let mut model = vec![0; size as usize];
            let disk = open(&path, Access::Writable);
            // The first, the last and a middle sector, from the end.
            for (at, byte) in [(size - 512, 3), (size / 1024 * 512, 2), (0, 1)] {
                let at = at.min(size - 512);
                write(&disk, at, &[byte; 512]);
                model[at as usize..][..512].fill(byte);
            }
            disk.close().unwrap();
            drop(disk);
            both_check(&path);
            assert_eq!(contents_by_qemu(&path), model, "{kind:?} {size}");
            assert_eq!(contents(&path), model, "{kind:?} {size}");
        }
    }
}

#[test]
fn qemu_and_we_agree_on_a_sparse_disk_of_two_tebibytes() {
    let directory = tempfile::tempdir().unwrap();
    let size = 2 << 40;
    let path = new_image(directory.path(), NewKind::Dynamic, size);
    both_check(&path);
    let places = [0, MIB - 512, 1 << 32, (1 << 40) - 512, size - 4096];
    let disk = open(&path, Access::Writable);
    for (byte, at) in (1..).zip(places) {
        write(&disk, at, &vec![byte; 4096]);
    }
    disk.close().unwrap();
    drop(disk);
    both_check(&path);
    let reads: Vec<String> = (1..)
        .zip(places)
        .map(|(byte, at): (u8, _)| format!("read -P {byte} {at} 4096"))
        .collect();
    let answer = qemu_io(&path, &reads);
    assert_eq!(
        answer.out.matches("read 4096/4096").count(),
        places.len(),
        "{answer:#?}"
    );
    let (raw, ours) = (
        directory.path().join("raw"),
        directory.path().join("again.vdi"),
    );
    vdi(words!["convert", "-O", "raw", path, raw]).expect_code(0);
    qemu_img(words!["compare", "-f", "vdi", "-F", "raw", path, raw]).expect_code(0);
    vdi(words!["convert", "-f", "raw", "-O", "vdi", raw, ours]).expect_code(0);
    qemu_img(words!["compare", "-f", "vdi", "-F", "vdi", path, ours]).expect_code(0);
    assert!(fs::metadata(&ours).unwrap().len() < 32 * MIB);
}

#[test]
fn a_fixed_image_has_its_space_and_a_dynamic_one_grows() {
    use std::os::unix::fs::MetadataExt;
    let directory = tempfile::tempdir().unwrap();
    let fixed = new_image(directory.path(), NewKind::Fixed, 20 * MIB);
    assert!(fs::metadata(&fixed).unwrap().blocks() * 512 >= 20 * MIB);
    let dynamic = new_image(directory.path(), NewKind::Dynamic, 20 * MIB);
    assert!(fs::metadata(&dynamic).unwrap().blocks() * 512 < MIB);
}

/// QEMU and we write into one image in turn, against a byte array.
fn take_turns(path: &Path, seed: u64) {
    let mut numbers = Numbers(seed);
    let mut model = contents(path);
    let sectors = model.len() as u64 / 512;
    for turn in 0..8_u8 {
        let mut writes = Vec::new();
        for step in 1..=6_u8 {
            let at = numbers.below(sectors);
            let most = if numbers.below(3) == 0 { 5000 } else { 16 };
            let count = 1 + numbers.below(most.min(sectors - at));
            writes.push((at * 512, count * 512, turn * 16 + step));
        }
        if turn % 2 == 0 {
            let commands: Vec<_> = writes
                .iter()
                .map(|(at, len, byte)| format!("write -P {byte} {at} {len}"))
                .collect();
            qemu_io(path, &commands);
        } else {
            let disk = open(path, Access::Writable);
            for &(at, len, byte) in &writes {
                write(&disk, at, &vec![byte; len as usize]);
            }
            disk.close().unwrap();
        }
        for (at, len, byte) in writes {
            model[at as usize..][..len as usize].fill(byte);
        }
        both_check(path);
        assert!(
            contents(path) == model,
            "turn {turn} of seed {seed}: our reader"
        );
        assert!(
            contents_by_qemu(path) == model,
            "turn {turn} of seed {seed}: QEMU's reader"
        );
    }
}

#[test]
fn qemu_and_we_write_in_turn_into_images_that_we_made() {
    let directory = tempfile::tempdir().unwrap();
    for (seed, kind) in [
        (1, NewKind::Dynamic),
        (2, NewKind::Dynamic),
        (3, NewKind::Fixed),
    ] {
        take_turns(&new_image(directory.path(), kind, 9 * MIB + 512), seed);
    }
}

#[test]
fn qemu_and_we_write_in_turn_into_images_that_qemu_made() {
    let directory = tempfile::tempdir().unwrap();
    for (seed, is_static) in [(4, "static=off"), (5, "static=off"), (6, "static=on")] {
        let path = directory.path().join("qemu.vdi");
        qemu_img(words![
            "create", "-q", "-f", "vdi", "-o", is_static, path, "9437696"
        ])
        .expect_code(0);
        take_turns(&path, seed);
    }
}

/// A raw disk of an odd length in bytes, with data at odd places and holes between.
fn islands() -> Vec<u8> {
    let mut numbers = Numbers(7);
    let mut bytes = vec![0; (11 * MIB + 777) as usize];
    for _ in 0..40 {
        let at = numbers.below(11 * MIB) as usize;
        let len = numbers.below(20_000).min(777 + 11 * MIB - at as u64) as usize;
        for byte in &mut bytes[at..at + len] {
            *byte = numbers.next() as u8;
        }
    }
    // What is read before the last, partial sector must not show in its padding.
    bytes[(10 * MIB) as usize..][..1024].fill(9);
    *bytes.last_mut().unwrap() = 1;
    bytes
}

#[test]
fn converted_images_are_identical_for_qemu() {
    let directory = tempfile::tempdir().unwrap();
    let name = |name: &str| directory.path().join(name);
    let mut bytes = islands();
    fs::write(name("raw"), &bytes).unwrap();
    vdi(words![
        "convert",
        "-f",
        "raw",
        "-O",
        "vdi",
        name("raw"),
        name("dynamic")
    ])
    .expect_code(0);
    vdi(words![
        "convert",
        "-f",
        "raw",
        "-O",
        "vdi",
        "--fixed",
        name("raw"),
        name("fixed")
    ])
    .expect_code(0);
    vdi(words!["convert", "-O", "raw", name("fixed"), name("back")]).expect_code(0);
    qemu_img(words![
        "convert",
        "-f",
        "raw",
        "-O",
        "vdi",
        name("raw"),
        name("by-qemu")
    ])
    .expect_code(0);
    // What QEMU reads behind the end of the raw file is zeros, as we do.
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    assert!(fs::read(name("back")).unwrap() == bytes);
    for image in ["dynamic", "fixed", "by-qemu"] {
        both_check(&name(image));
        assert!(contents(&name(image)) == bytes, "{image}");
        qemu_img(words![
            "compare",
            "-f",
            "raw",
            "-F",
            "vdi",
            name("back"),
            name(image)
        ])
        .expect_code(0);
    }
    // Sequential: neighbours on the disk are neighbours in the file.
    let map = vdi(words!["map", "--json", name("dynamic")])
        .expect_code(0)
        .json();
    let offsets: Vec<_> = map
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|extent| extent["offset"].as_u64())
        .collect();
    assert!(offsets.is_sorted(), "{offsets:?}");
}

#[test]
fn qemu_maps_the_same_data_to_the_same_offsets() {
    let same = |case: &&Case| case.qemu_10_0 == "same contents" && case.leaf().image_type == 1;
    let mut compared = 0;
    for case in corpus().iter().filter(same) {
        let directory = tempfile::tempdir().unwrap();
        let path = case.leaf().unpack(directory.path());
        let ours = vdi(words!["map", "--json", path]).expect_code(0).json();
        let theirs = qemu_img(words!["map", "-f", "vdi", "--output=json", path])
            .expect_code(0)
            .json();
        let data = |map: &serde_json::Value| -> Vec<[u64; 3]> {
            let stored = map
                .as_array()
                .unwrap()
                .iter()
                .filter(|extent| extent["data"] == true);
            let number = |extent: &serde_json::Value, key: &str| extent[key].as_u64().unwrap();
            stored
                .map(|extent| ["start", "length", "offset"].map(|key| number(extent, key)))
                .collect()
        };
        assert_eq!(data(&ours), data(&theirs), "{}", case.name);
        let keys = |map: &serde_json::Value| -> Vec<String> {
            let stored = map
                .as_array()
                .unwrap()
                .iter()
                .find(|extent| extent["data"] == true);
            stored
                .map(|extent| extent.as_object().unwrap().keys().cloned().collect())
                .unwrap_or_default()
        };
        // QEMU has got more keys over the years (`compressed` is not in 7.2).
        let (ours, theirs) = (keys(&ours), keys(&theirs));
        let missing: Vec<_> = theirs.iter().filter(|key| !ours.contains(key)).collect();
        assert!(missing.is_empty(), "{}: {missing:?}", case.name);
        compared += 1;
    }
    assert!(compared >= 15, "{compared}");
}

#[test]
fn an_image_that_we_write_is_refused_by_qemu_and_by_the_tool() {
    let directory = tempfile::tempdir().unwrap();
    let path = new_image(directory.path(), NewKind::Dynamic, 4 * MIB);
    let held = open(&path, Access::Writable);
    let answer = qemu_img(words!["info", path]);
    assert!(
        answer.code == Some(1) && answer.err.contains("lock"),
        "{answer:#?}"
    );
    let answer = vdi(words!["info", path]).expect_code(1);
    assert!(
        answer.err.contains("in use") && answer.err.contains("--force-share"),
        "{answer:#?}"
    );
    for verb in ["info", "check", "map"] {
        vdi(words![verb, "-U", path]).expect_code(0);
        vdi(words![verb, path]).expect_code(1);
    }
    let raw = directory.path().join("raw");
    vdi(words!["convert", "-O", "raw", path, raw]).expect_code(1);
    vdi(words!["convert", "-U", "-O", "raw", path, raw]).expect_code(0);
    vdi(words!["create", "--force", path, "1M"]).expect_code(1);
    held.close().unwrap();
    drop(held);
    vdi(words!["info", path]).expect_code(0);
}

/// A QEMU that has an image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn new(path: &Path, options: &[&str]) -> Self {
        let mut child = spawn(
            Command::new("qemu-io")
                .args(options)
                .args(words!["-f", "vdi", path])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped()),
        );
        // When it has answered, it has the image open.
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"read 0 512\n")
            .unwrap();
        let mut answer = String::new();
        let mut out = BufReader::new(child.stdout.as_mut().unwrap());
        while !answer.contains("512/512") {
            answer.clear();
            assert!(out.read_line(&mut answer).unwrap() > 0, "qemu-io ended");
        }
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Its end of input ends it.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn an_image_that_qemu_holds_is_not_disturbed() {
    let directory = tempfile::tempdir().unwrap();
    let path = new_image(directory.path(), NewKind::Dynamic, 4 * MIB);
    let may_open = |access| {
        settle();
        HostFile::open(&path, access, Locking::Locked).is_ok()
    };
    let writer = Holder::new(&path, &[]);
    assert!(!may_open(Access::ReadOnly));
    assert!(!may_open(Access::Writable));
    vdi(words!["info", path]).expect_code(1);
    vdi(words!["info", "-U", path]).expect_code(0);
    vdi(words!["create", "--force", path, "1M"]).expect_code(1);
    drop(writer);
    let reader = Holder::new(&path, &["-r"]);
    assert!(may_open(Access::ReadOnly));
    assert!(!may_open(Access::Writable));
    vdi(words!["info", path]).expect_code(0);
    drop(reader);
    assert!(may_open(Access::Writable));
}

#[test]
fn blocks_behind_the_first_4_gib_of_the_file_are_found_where_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("far.vdi");
    let builder = image()
        .with_blocks(6000)
        .with_entry(5000, 5999)
        .with_field("blocks_allocated", 6000);
    builder.with_len_change((6000 - 3) << 20).write(&path);
    let file = fs::File::options().write(true).open(&path).unwrap();
    let end = file.metadata().unwrap().len();
    file.write_all_at(&[0x77; 512], end - 512).unwrap();
    let disk = open(&path, Access::ReadOnly);
    let mut found = [0; 512];
    let at = 5001 * MIB - 512;
    disk.read_at(
        disk.capacity().range_of_bytes(at..at + 512).unwrap(),
        &mut found,
    )
    .unwrap();
    assert_eq!(found, [0x77; 512]);
    drop(disk);
    qemu_io(&path, &[format!("read -P 0x77 {at} 512")]);
    // What nobody owns of so much room is leaked, and nothing else is wrong.
    let report = vdi(words!["check", "--json", path]).expect_code(3).json();
    assert_eq!(report["findings"].as_array().unwrap().len(), 1, "{report}");
}

#[test]
fn block_sizes_that_only_virtualbox_and_we_open_hold_what_was_written() {
    let directory = tempfile::tempdir().unwrap();
    for shift in [17, 18, 19, 21, 25, 27] {
        let path = directory.path().join(format!("{shift}.vdi"));
        let size = (1_u64 << shift) * 3 + 512;
        vdi(words![
            "create",
            "--block-size",
            (1 << shift).to_string(),
            path,
            size.to_string()
        ])
        .expect_code(0);
        let places = [0, (1 << shift) - 512, (1 << shift) * 2 - 1024, size - 512];
        let disk = open(&path, Access::Writable);
        for (byte, at) in (1..).zip(places) {
            write(&disk, at, &[byte; 512]);
        }
        disk.close().unwrap();
        drop(disk);
        vdi(words!["check", path]).expect_code(0);
        let disk = open(&path, Access::ReadOnly);
        for (byte, at) in (1..).zip(places) {
            let mut found = [0; 512];
            disk.read_at(
                disk.capacity().range_of_bytes(at..at + 512).unwrap(),
                &mut found,
            )
            .unwrap();
            assert_eq!(found, [byte; 512], "{shift} {at}");
        }
        let raw = directory.path().join("raw");
        vdi(words!["convert", "--force", "-O", "raw", path, raw]).expect_code(0);
        qemu_img(words![
            "convert",
            "-f",
            "raw",
            "-O",
            "vdi",
            raw,
            directory.path().join("by-qemu")
        ])
        .expect_code(0);
        assert_eq!(fs::metadata(&raw).unwrap().len(), size);
    }
}
