//! `vdi convert`, `clone` and `compare` as movers of bytes: the same result whatever the threads, what the file
//! system shares, and what becomes of a copy that fails.
//!
//! Where extents are shared is tested on XFS and btrfs in loop mounts. Where those cannot be made (no root, no
//! loop devices, no mkfs), the test says so and tests nothing else.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use vdi_tests::driver::PATIENCE;
use vdi_tests::mounted::{Mounted, free_bytes};
use vdi_tests::random::Random;
use vdi_tests::simulated::for_each_seed;
use vdi_tests::tool::{program, spawn, vdi};
use vdi_tests::words;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The UUIDs of a header: `uuid_image` and `uuid_modify`, which are random.
const UUIDS: std::ops::Range<usize> = 0x188..0x1A8;

fn index(at: u64) -> usize {
    usize::try_from(at).expect("64-bit hosts only")
}

/// Contents with data, zeros and what is between them: whole runs and single sectors.
fn contents(random: &mut Random, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; index(len)];
    for _ in 0..random.within(1..12) {
        let at = random.within(0..len);
        let most = *random.pick(&[1, 700, 5000, 300 * KIB, 3 * MIB]);
        let len = index(random.within(0..most + 1).min(len - at));
        let piece = random.bytes(len);
        let at = index(at);
        bytes[at..at + len].copy_from_slice(&piece);
        // Zeros inside of data.
        if len > 20_000 {
            bytes[at + len / 2..at + len / 2 + 8192].fill(0);
        }
    }
    bytes
}

/// Writes a file with holes where `bytes` has 64 KiB of zeros, unless zeros shall have storage there.
fn write_sparse(path: &Path, bytes: &[u8], random: &mut Random) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (nth, piece) in (0..).zip(bytes.chunks(index(64 * KIB))) {
        if piece.iter().any(|&byte| byte != 0) || random.within(0..4) == 0 {
            file.write_all_at(piece, nth * 64 * KIB).unwrap();
        }
    }
}

/// Converts and gives the file, with its random UUIDs blanked if it is an image.
#[track_caller]
fn converted(words: &[&str], from: &Path, to: &Path) -> Vec<u8> {
    let mut all = words!["convert", "-q", "--force"].to_vec();
    all.extend(words.iter().map(std::ffi::OsStr::new));
    all.extend(words![from, to]);
    vdi(all).expect_code(0);
    let mut bytes = fs::read(to).unwrap();
    if words.windows(2).any(|pair| pair == ["-O", "vdi"]) {
        vdi(words!["check", to]).expect_code(0);
        bytes[UUIDS].fill(0);
    }
    bytes
}

#[track_caller]
fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    if found == expected {
        return;
    }
    let differ = (0..found.len()).find(|&at| found[at] != expected[at]);
    assert_eq!(differ, None, "{what}: the first byte that differs");
}

#[test]
fn a_copy_is_the_same_whatever_the_threads_and_the_blocks() {
    let directory = tempfile::tempdir().unwrap();
    let name = |name: &str| directory.path().join(name);
    let mut round = 0;
    for_each_seed(8, |mut random| {
        round += 1;
        let len = random.within(1..12 * MIB);
        let mut expected = contents(&mut random, len);
        write_sparse(&name("raw"), &expected, &mut random);
        expected.resize(index(len.next_multiple_of(512)), 0);
        let block = ["128k", "256k", "1M", "2M", "16M", "128M"][index(round % 6)];
        let mut layout = vec!["-f", "raw", "-O", "vdi", "--block-size", block];
        if round % 4 == 3 && block != "128M" {
            layout.push("--fixed");
        }
        let with = |words: &[&'static str], threads| [words, &["-m", threads]].concat();
        let one = converted(&with(&layout, "1"), &name("raw"), &name("one.vdi"));
        let back = converted(&["-O", "raw", "-m", "1"], &name("one.vdi"), &name("back"));
        assert_same(&back, &expected, "there and back");
        for threads in ["2", "5", "16"] {
            let what = format!("{threads} threads, {layout:?}");
            let many = converted(&with(&layout, threads), &name("raw"), &name("many.vdi"));
            assert_same(&many, &one, &what);
            let out = ["-O", "raw", "-m", threads];
            let back = converted(&out, &name("many.vdi"), &name("back"));
            assert_same(&back, &expected, &what);
            let again = ["-O", "vdi", "-m", threads];
            converted(&again, &name("many.vdi"), &name("again.vdi"));
            vdi(words![
                "compare",
                "-m",
                threads,
                name("again.vdi"),
                name("one.vdi")
            ])
            .expect_code(0);
        }
    });
}

/// Puts a file out of the page cache.
fn evict(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Where the map is in an image that was made here.
const MAP_AT: u32 = 1 << 20;

/// The same image with its blocks at `data_at`, behind a map that ends before.
fn with_data_at(image: &[u8], data_at: u32) -> Vec<u8> {
    let field = 0x158..0x15C;
    let was = u32::from_le_bytes(image[field.clone()].try_into().unwrap());
    let mut moved = image[..index(u64::from(data_at))].to_vec();
    moved[field].copy_from_slice(&data_at.to_le_bytes());
    moved.extend_from_slice(&image[index(u64::from(was))..]);
    moved
}

#[test]
fn what_is_not_in_the_page_cache_is_copied_and_compared_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let name = |name: &str| directory.path().join(name);
    for_each_seed(6, |mut random| {
        let len = random.within(4 * MIB..24 * MIB);
        let mut expected = contents(&mut random, len);
        write_sparse(&name("raw"), &expected, &mut random);
        expected.resize(index(len.next_multiple_of(512)), 0);
        let import = ["-f", "raw", "-O", "vdi", "--block-size", "1M"];
        let warm = converted(&import, &name("raw"), &name("a.vdi"));
        evict(&name("raw"));
        let cold = converted(&import, &name("raw"), &name("cold.vdi"));
        assert_same(&cold, &warm, "import");
        let image = fs::read(name("a.vdi")).unwrap();
        for data_at in [2 << 20, MAP_AT + 512, MAP_AT + 1024, MAP_AT + 4608] {
            fs::write(name("a.vdi"), with_data_at(&image, data_at)).unwrap();
            for threads in ["1", "3", "16"] {
                evict(&name("a.vdi"));
                let out = ["-O", "raw", "-m", threads];
                let back = converted(&out, &name("a.vdi"), &name("back"));
                assert_same(&back, &expected, &format!("data at {data_at}"));
                evict(&name("a.vdi"));
                evict(&name("raw"));
                let [image, raw] = [name("a.vdi"), name("raw")];
                vdi(words!["compare", "-m", threads, "-F", "raw", image, raw]).expect_code(0);
            }
        }
    });
}

/// Writes `expected` into a child of `parent`, which differs from it: an image that has only what differs.
fn child_with(directory: &Path, parent: &Path, child: &Path, expected: &[u8]) {
    let (raw, full) = (directory.join("full.raw"), directory.join("full.vdi"));
    fs::write(&raw, expected).unwrap();
    converted(&["-f", "raw", "-O", "vdi"], &raw, &full);
    vdi(words!["snapshot", full, child]).expect_code(0);
    vdi(words!["rebase", "-q", "-b", parent, child]).expect_code(0);
    fs::remove_file(full).unwrap();
}

#[test]
fn a_chain_is_copied_and_compared_as_one_disk() {
    let mut random = Random::printed();
    let directory = tempfile::tempdir().unwrap();
    let name = |name: &str| directory.path().join(name);
    let len = 9 * MIB + 512;
    let mut disk = contents(&mut random, len);
    write_sparse(&name("raw"), &disk, &mut random);
    let base = name("base.vdi");
    converted(
        &["-f", "raw", "-O", "vdi", "--block-size", "256k"],
        &name("raw"),
        &base,
    );
    let (middle, top) = (name("middle.vdi"), name("top.vdi"));
    for (parent, child, at) in [(&base, &middle, 0), (&middle, &top, 2 * MIB)] {
        let data = random.bytes(700_000);
        disk[index(at)..][..data.len()].copy_from_slice(&data);
        child_with(directory.path(), parent, child, &disk);
    }
    let out = name("out");
    let one = converted(&["-O", "vdi", "-m", "1"], &top, &name("flat.vdi"));
    for threads in ["1", "2", "7"] {
        assert_same(
            &converted(&["-O", "raw", "-m", threads], &top, &out),
            &disk,
            threads,
        );
        let many = converted(&["-O", "vdi", "-m", threads], &top, &name("flat.vdi"));
        assert_same(&many, &one, threads);
        vdi(words!["compare", "-m", threads, "-F", "raw", top, out]).expect_code(0);
        vdi(words![
            "clone",
            "-q",
            "--force",
            "-m",
            threads,
            top,
            name("clone.vdi")
        ])
        .expect_code(0);
        vdi(words![
            "compare",
            "-m",
            threads,
            "--image-dir",
            directory.path(),
            top,
            name("clone.vdi")
        ])
        .expect_code(0);
    }
}

#[test]
fn what_two_children_have_of_one_parent_is_not_read() {
    let mut random = Random::printed();
    let directory = tempfile::tempdir().unwrap();
    let name = |name: &str| directory.path().join(name);
    let mut disk = random.bytes(index(4 * MIB));
    fs::write(name("raw"), &disk).unwrap();
    converted(&["-f", "raw", "-O", "vdi"], &name("raw"), &name("base.vdi"));
    let own = disk[index(3 * MIB) + 5];
    let children = [name("a.vdi"), name("b.vdi")];
    for (child, nth) in children.iter().zip(1_u8..) {
        disk[index(3 * MIB) + 5] = own ^ nth;
        child_with(directory.path(), &name("base.vdi"), child, &disk);
    }
    let trace = name("trace");
    let mut strace = Command::new("strace");
    strace.args(words!["-f", "-e", "trace=pread64", "-y", "-o", trace]);
    strace.args(words![
        program("vdi"),
        "compare",
        "-q",
        "-m",
        "1",
        children[0],
        children[1]
    ]);
    let code = spawn(&mut strace).wait().unwrap().code();
    assert_eq!(code, Some(1));
    let reads = fs::read_to_string(&trace).unwrap();
    // Header and map are read, of the data nothing.
    let large = |line: &&str| line.contains("base.vdi") && line.contains("= 262144");
    assert_eq!(reads.lines().find(large), None);
    assert!(
        reads
            .lines()
            .any(|line| line.contains("a.vdi") && line.contains("= 262144"))
    );
    let answer = vdi(words!["compare", children[0], children[1]]).expect_code(1);
    assert_eq!(answer.out, "Content mismatch at offset 3145728!\n");
}

#[test]
fn the_first_difference_is_the_answer_however_many_threads_look() {
    let directory = tempfile::tempdir().unwrap();
    let name = |name: &str| directory.path().join(name);
    for_each_seed(8, |mut random| {
        let len = random.within(1..40) * 512 * KIB;
        let mut other = contents(&mut random, len);
        write_sparse(&name("one.raw"), &other, &mut random);
        converted(
            &["-f", "raw", "-O", "vdi"],
            &name("one.raw"),
            &name("one.vdi"),
        );
        let before = other.clone();
        for _ in 0..random.within(0..30) {
            other[index(random.within(0..len))] ^= 1;
        }
        let first = (0..before.len()).find(|&at| before[at] != other[at]);
        let expected = match first {
            None => "Images are identical.\n".to_owned(),
            Some(at) => format!("Content mismatch at offset {}!\n", at - at % 512),
        };
        fs::write(name("other.raw"), &other).unwrap();
        for threads in ["1", "2", "16"] {
            let answer = vdi(words![
                "compare",
                "-m",
                threads,
                "-F",
                "raw",
                name("one.vdi"),
                name("other.raw")
            ])
            .expect_code(i32::from(first.is_some()));
            assert_eq!(answer.out, expected, "{threads} threads");
        }
    });
}

/// The names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_copy_that_finds_no_space_ends_with_the_error_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let size = words!["-t", "tmpfs", "-o", "size=8M", "tmpfs"];
    let small = match Mounted::new(directory.path().join("small"), &size) {
        Ok(small) => small,
        Err(complaint) => return println!("NOT TESTED: no tmpfs can be mounted: {complaint}"),
    };
    let raw = directory.path().join("raw");
    fs::write(&raw, Random::seeded(1).bytes(index(20 * MIB))).unwrap();
    for threads in ["1", "2", "16"] {
        for format in ["raw", "vdi"] {
            let out = small.at.join("out");
            let answer = vdi(words![
                "convert", "-m", threads, "-f", "raw", "-O", format, raw, out
            ])
            .expect_code(1);
            assert!(
                answer.err.contains("destination cannot be written"),
                "{answer:#?}"
            );
            assert!(answer.err.contains("No space left"), "{answer:#?}");
            assert_eq!(names(&small.at), [""; 0], "{format}, {threads} threads");
        }
    }
}

#[test]
fn a_source_that_cannot_be_read_ends_the_copy_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let name = |name: &str| directory.path().join(name);
    fs::write(name("raw"), Random::seeded(2).bytes(index(80 * MIB))).unwrap();
    converted(&["-f", "raw", "-O", "vdi"], &name("raw"), &name("a.vdi"));
    // Every thread's reads fail from the eighth on; before there are those of header and map.
    for threads in ["1", "4"] {
        let mut strace = Command::new("strace");
        strace.args(words![
            "-f",
            "-o",
            "/dev/null",
            "-e",
            "inject=pread64:error=EIO:when=8+"
        ]);
        strace.args(words![
            program("vdi"),
            "convert",
            "-q",
            "-m",
            threads,
            "-O",
            "raw"
        ]);
        strace
            .args([name("a.vdi"), name("out")])
            .stderr(Stdio::piped());
        let output = spawn(&mut strace).wait_with_output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{err}");
        assert!(err.contains("source cannot be read at byte"), "{err}");
        assert_eq!(names(directory.path()), ["a.vdi", "raw"]);
    }
}

/// Removes a file that has at least so many bytes to itself: the file system may give them back a little later.
fn remove_with(path: &Path, bytes: u64) {
    let at = path.parent().unwrap();
    let before = free_bytes(at);
    fs::remove_file(path).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while free_bytes(at) <= before + bytes {
        assert!(Instant::now() < deadline, "it had no space to itself");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Files on a file system that shares: what is copied takes (nearly) no space, holes stay holes, and the contents
/// are right, also where they cannot be shared.
fn shares_extents(mounted: &Mounted) {
    let mut random = Random::printed();
    let name = |name: &str| mounted.at.join(name);
    let (data, len) = (32 * MIB, 80 * MIB + 700);
    let mut disk = vec![0; index(len.next_multiple_of(512))];
    let file = File::create(name("raw")).unwrap();
    file.set_len(len).unwrap();
    for (at, len) in [(0, data / 2), (40 * MIB, data / 2 - 700), (80 * MIB, 700)] {
        let bytes = random.bytes(index(len));
        file.write_all_at(&bytes, at).unwrap();
        disk[index(at)..][..bytes.len()].copy_from_slice(&bytes);
    }
    let little = 4 * MIB;
    for (words, from, to) in [
        (["-f", "raw", "-O", "vdi"].as_slice(), "raw", "a.vdi"),
        (&["-O", "raw"], "a.vdi", "back"),
        (&["-O", "vdi", "--block-size", "128k"], "a.vdi", "b.vdi"),
    ] {
        let before = free_bytes(&mounted.at);
        converted(words, &name(from), &name(to));
        let taken = before.saturating_sub(free_bytes(&mounted.at));
        assert!(taken < little, "{to} took {taken} bytes");
        let own = fs::metadata(name(to)).unwrap().blocks() * 512;
        assert!(own < data + little, "{to} has {own} bytes");
        let plain = converted(
            &["-O", "raw", "--reflink", "never"],
            &name("a.vdi"),
            &name("out"),
        );
        assert_same(&plain, &disk, to);
        remove_with(&name("out"), data - little);
    }
    assert_same(&fs::read(name("back")).unwrap(), &disk, "shared back");
    vdi(words!["compare", name("b.vdi"), name("a.vdi")]).expect_code(0);
    // Threads make no difference to what is shared.
    let one = converted(
        &["-f", "raw", "-O", "vdi", "-m", "1"],
        &name("raw"),
        &name("m.vdi"),
    );
    let many = converted(
        &["-f", "raw", "-O", "vdi", "-m", "8"],
        &name("raw"),
        &name("m.vdi"),
    );
    assert_same(&many, &one, "8 threads");
    // A fixed image has all of its space to itself.
    let before = free_bytes(&mounted.at);
    converted(
        &["-O", "vdi", "--fixed"],
        &name("a.vdi"),
        &name("fixed.vdi"),
    );
    assert!(before - free_bytes(&mounted.at) >= 80 * MIB);
    fs::remove_file(name("fixed.vdi")).unwrap();
    // Data that begin between two blocks of the file system cannot be shared: QEMU's images are such.
    let qemu = vdi_tests::tool::qemu_img(words![
        "convert",
        "-f",
        "raw",
        "-O",
        "vdi",
        name("raw"),
        name("q.vdi")
    ]);
    qemu.expect_code(0);
    let out = converted(&["-O", "raw"], &name("q.vdi"), &name("out"));
    assert_same(&out, &disk, "of QEMU's image");
}

#[test]
fn files_share_extents_where_the_file_system_can() {
    let directory = tempfile::tempdir().unwrap();
    let mut tested = 0;
    for kind in ["xfs", "btrfs"] {
        match Mounted::made(directory.path(), kind, 512 * MIB, &[]) {
            Ok(mounted) => {
                shares_extents(&mounted);
                tested += 1;
            }
            Err(complaint) => println!("NOT TESTED: no {kind} can be mounted: {complaint}"),
        }
    }
    println!("{tested} of 2 file systems that share were tested");
}
