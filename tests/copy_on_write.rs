//! First writes to a child's blocks where the host's file system lets child and parent share extents: what is left of a block is
//! not copied, the disk reads as it must, also after `kill -9` and a power cut, and where the host refuses, all is copied.
//!
//! On XFS and btrfs in loop mounts. Where those cannot be made (no root, no loop devices, no mkfs), the tests say so and test nothing else.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use vdi_core::{Access, CreateOptions, HostFile, Image, Locking, NewKind};
use vdi_tests::driver::{Driver, Layout, Options, Request, Segment, Token};
use vdi_tests::mounted::{Mounted, free_bytes, succeed};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, scratch};
use vdi_tests::tool::{qemu_img, vdi};
use vdi_tests::words;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const K: usize = 1 << 10;

/// What the disks of most tests hold.
const DISK: u64 = 12 * MIB;

fn index(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

/// Runs a test on each file system that shares and can be had.
fn on_each(test: impl Fn(&Mounted)) {
    let directory = scratch();
    let kinds = [("xfs", "-mreflink=1"), ("btrfs", "-msingle")];
    for (kind, how) in kinds {
        match Mounted::made(directory.path(), kind, 512 * MIB, &[how]) {
            Ok(mounted) => test(&mounted),
            Err(complaint) => println!("NOT TESTED: no {kind} can be mounted: {complaint}"),
        }
    }
}

/// A child of an image, of any size.
fn child(parent: &Path, path: &Path, block: u64, capacity_bytes: u64) {
    let file = HostFile::open(parent, Access::ReadOnly, Locking::ForceShare).unwrap();
    let link = Image::examine(Arc::new(file)).unwrap().header().as_parent();
    let options = CreateOptions {
        capacity_bytes,
        block_size: u32::try_from(block).unwrap(),
        kind: NewKind::Differencing(link),
        uuid: None,
    };
    vdi_core::create(path, &options).unwrap();
}

/// A base image with these contents, made from a raw disk.
fn base(directory: &Path, block: &str, contents: &[u8]) -> PathBuf {
    let (raw, path) = (directory.join("raw"), directory.join("base.vdi"));
    fs::write(&raw, contents).unwrap();
    vdi(words![
        "convert",
        "-q",
        "--force",
        "-f",
        "raw",
        "-O",
        "vdi",
        "--block-size",
        block,
        raw,
        path
    ])
    .expect_code(0);
    fs::remove_file(raw).unwrap();
    path
}

/// What a chain of images reads as, the top one first: read by nothing of the project's.
fn read_plainly(chain: &[PathBuf], len: usize) -> Vec<u8> {
    let mut disk = vec![0; len];
    for path in chain.iter().rev() {
        let file = fs::read(path).unwrap();
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
        let (map, data, block) = (word(0x154), word(0x158), word(0x178) as usize);
        let blocks = word(0x180) as usize;
        for (nth, part) in disk.chunks_mut(block).enumerate().take(blocks) {
            match word(map as usize + nth * 4) {
                0xFFFF_FFFF => {}
                0xFFFF_FFFE => part.fill(0),
                entry => {
                    let at = data as usize + entry as usize * block;
                    part.copy_from_slice(&file[at..at + part.len()]);
                }
            }
        }
    }
    disk
}

/// Writes and zeroes here and there, and keeps `disk` in step.
fn change(driver: &mut Driver, disk: &mut [u8], random: &mut Random, requests: u64) {
    for _ in 0..requests {
        let sectors = disk.len() as u64 / 512;
        let mut start = random.within(0..sectors);
        let most = *random.pick(&[8, 90, 700]);
        let mut count = 1 + random.within(0..most);
        if random.within(0..2) == 0 {
            (start, count) = (start & !7, (count + 7) & !7);
        }
        let count = count.min(sectors - start);
        let part = &mut disk[index(start * 512)..][..index(count * 512)];
        let request = if random.within(0..5) == 0 {
            part.fill(0);
            Request::write_zeroes(&[Segment::new(start, u32::try_from(count).unwrap())])
        } else {
            part.copy_from_slice(&random.bytes(part.len()));
            Request::write(start, part.to_vec())
        };
        let answer = driver.queue().run(&request, &Layout::framed());
        assert_eq!(answer.status, 0);
    }
}

fn read_all(driver: &mut Driver, len: usize) -> Vec<u8> {
    let most = 1 << 20;
    let parts = (0..len).step_by(most).map(|at| {
        let count = most.min(len - at);
        driver.read(at as u64 / 512, u32::try_from(count).unwrap())
    });
    parts.collect::<Vec<_>>().concat()
}

#[track_caller]
fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let differ = (0..found.len()).find(|&at| found[at] != expected[at]);
    assert_eq!(differ, None, "{what}: the first byte that differs");
}

/// Random data with zeros in it, that begin and end anywhere.
fn contents(random: &mut Random, len: u64) -> Vec<u8> {
    let mut bytes = random.bytes(index(len));
    for _ in 0..6 {
        let (at, count) = (random.within(0..len), random.within(0..900 * KIB));
        let end = (at + count).min(len);
        bytes[index(at)..index(end)].fill(0);
    }
    bytes
}

#[test]
fn a_first_write_takes_the_space_of_what_it_writes() {
    on_each(|mounted| {
        let mut disk = Random::printed().bytes(index(64 * MIB));
        let parent = base(&mounted.at, "1M", &disk);
        for cache in ["writeback", "direct"] {
            let top = mounted.at.join(cache);
            child(&parent, &top, MIB, 64 * MIB);
            let before = free_bytes(&mounted.at);
            let server = Launch::image(&top).args(["--cache", cache]).start();
            let mut driver = server.driver(&Options::new());
            for block in 0..64 {
                let at = block * MIB + block * 12 * KIB;
                disk[index(at)..][..4 * K].fill(7);
                driver.write(at / 512, &[7; 4 * K]);
            }
            let found = read_all(&mut driver, disk.len());
            assert_same(&found, &disk, cache);
            drop(driver);
            assert_eq!(server.terminate().code, Some(0));
            let taken = before.saturating_sub(free_bytes(&mounted.at));
            assert!(taken < 8 * MIB, "{cache}: {taken} bytes were taken");
            assert_same(
                &read_plainly(&[top, parent.clone()], disk.len()),
                &disk,
                cache,
            );
        }
    });
}

#[test]
fn a_chain_of_any_blocks_reads_as_it_must() {
    on_each(|mounted| {
        let mut random = Random::printed();
        let sizes = [
            [1024, 256, 128],
            [128, 1024, 512],
            [512, 128, 2048],
            [256, 2048, 1024],
        ];
        for (round, [low, middle, high]) in (0..).zip(sizes) {
            // The base ends inside of a block of each of its children, and between two of the file system.
            let mut disk = contents(&mut random, DISK - 3 * MIB - 77 * 512);
            let lowest = base(&mounted.at, &format!("{low}k"), &disk);
            disk.resize(index(DISK), 0);
            let (mid, top) = (mounted.at.join("mid.vdi"), mounted.at.join("top.vdi"));
            let mut chain = vec![lowest];
            for (path, block, requests) in [(&mid, middle, 12), (&top, high, 40)] {
                let _gone = fs::remove_file(path);
                child(&chain[0], path, block * KIB, DISK);
                chain.insert(0, path.clone());
                let cache = *random.pick(&["writeback", "direct"]);
                let zeroes = *random.pick(&["off", "unmap"]);
                let arguments = ["--cache", cache, "--detect-zeroes", zeroes];
                let server = Launch::image(path).args(arguments).start();
                let mut driver = server.driver(&Options::new());
                change(&mut driver, &mut disk, &mut random, requests);
                let what = format!("round {round}, {arguments:?}");
                assert_same(&read_all(&mut driver, disk.len()), &disk, &what);
                drop(driver);
                assert_eq!(server.terminate().code, Some(0));
                vdi(words!["check", path]).expect_code(0);
                assert_same(&read_plainly(&chain, disk.len()), &disk, &what);
            }
        }
    });
}

/// How often a daemon asked for shared extents while one block after the other had its first write; its disk reads as it must.
fn asked_with(top: &Path, chain: &[PathBuf], disk: &mut [u8]) -> usize {
    let trace = scratch();
    let trace = trace.path().join("trace");
    let strace = words!["strace", "-D", "-f", "-q", "-e", "trace=ioctl", "-o", trace];
    let server = Launch::image(top).under(strace).arg("--parent");
    let server = server.arg(&chain[1]).start();
    let mut driver = server.driver(&Options::new());
    for block in 0..8 {
        let at = index(block * MIB + 300 * KIB);
        disk[at..][..4 * K].fill(9);
        driver.write(at as u64 / 512, &[9; 4 * K]);
    }
    assert_same(
        &read_all(&mut driver, disk.len()),
        disk,
        "while it is served",
    );
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    assert_same(&read_plainly(chain, disk.len()), disk, "afterwards");
    let calls = fs::read_to_string(trace).unwrap();
    calls
        .lines()
        .filter(|line| line.contains("FICLONERANGE"))
        .count()
}

#[test]
fn what_the_host_does_not_let_files_share_is_copied_and_it_is_not_asked_again() {
    let directory = scratch();
    let mut disk = Random::printed().bytes(index(8 * MIB));
    let xfs = |words: &[&str]| Mounted::made(directory.path(), "xfs", 512 * MIB, words);
    let mounted = match xfs(&["-mreflink=0"]) {
        Ok(mounted) => mounted,
        Err(complaint) => return println!("NOT TESTED: no XFS can be mounted: {complaint}"),
    };
    // The file system shares nothing: EOPNOTSUPP.
    let top = mounted.at.join("top.vdi");
    let parent = base(&mounted.at, "1M", &disk);
    child(&parent, &top, MIB, 8 * MIB);
    assert_eq!(asked_with(&top, &[top.clone(), parent], &mut disk), 2);
    // The parent lies in another one: EXDEV. Both halves around the first write are asked for at once.
    fs::remove_file(&top).unwrap();
    let parent = base(directory.path(), "1M", &disk);
    child(&parent, &top, MIB, 8 * MIB);
    fs::remove_file(mounted.at.join("base.vdi")).unwrap();
    assert_eq!(asked_with(&top, &[top.clone(), parent], &mut disk), 2);
    drop(mounted);
    fs::remove_dir(directory.path().join("xfs")).unwrap();
    // It shares, but what QEMU's image has lies between its blocks: nobody asks.
    let mounted = xfs(&["-mreflink=1"]).unwrap();
    let (raw, parent) = (mounted.at.join("raw"), mounted.at.join("base.vdi"));
    fs::write(&raw, &disk).unwrap();
    qemu_img(words!["convert", "-f", "raw", "-O", "vdi", raw, parent]).expect_code(0);
    let top = mounted.at.join("top.vdi");
    child(&parent, &top, MIB, 8 * MIB);
    assert_eq!(
        asked_with(&top, &[top.clone(), parent.clone()], &mut disk),
        0
    );
    // The same as our own: two halves of each block.
    fs::remove_file(&top).unwrap();
    let parent = base(&mounted.at, "1M", &disk);
    child(&parent, &top, MIB, 8 * MIB);
    assert_eq!(asked_with(&top, &[top.clone(), parent], &mut disk), 16);
}

/// How the service ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The daemon is killed.
    Kill,
    /// What is not on the disk is lost; but the map is, as far as it was written.
    PowerCut,
}

/// A page of the disk, of which each write has a number.
const PAGE: u64 = 4 * KIB;

/// What a write to a page leaves there; the parent has number 0.
fn stamp(page: u64, number: u64) -> Vec<u8> {
    let words = [page, number, !page, 0x5EC7_0125];
    let sector: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    sector.repeat(index(PAGE) / sector.len())
}

/// The numbers that a page may have.
#[derive(Debug, Default)]
struct Known {
    /// What a flush covered, and what came after that.
    numbers: BTreeMap<u64, Vec<u64>>,
    in_flight: Vec<(Token, u64, u64)>,
}

impl Known {
    fn of(&mut self, page: u64) -> &mut Vec<u64> {
        self.numbers.entry(page).or_insert_with(|| vec![0])
    }

    fn answered(&mut self, token: Token, end: End) {
        let at = self
            .in_flight
            .iter()
            .position(|one| one.0 == token)
            .unwrap();
        let (_, page, number) = self.in_flight.remove(at);
        // No kill takes an answered write back.
        if end == End::Kill {
            *self.of(page) = vec![number];
        }
    }

    fn flushed(&mut self) {
        for numbers in self.numbers.values_mut() {
            numbers.drain(..numbers.len() - 1);
        }
    }
}

/// Writes to pages, eight at a time, and flushes now and then; the last ones are not waited for.
fn write_until_the_end(driver: &mut Driver, known: &mut Known, random: &mut Random, end: End) {
    let pages = DISK / PAGE;
    for number in 1 + random.number() % 1000 * 1000.. {
        let page = random.within(0..pages);
        if known.in_flight.iter().all(|one| one.1 != page) {
            let request = Request::write(page * PAGE / 512, stamp(page, number));
            let token = driver.queue().submit(&request, &Layout::framed());
            known.of(page).push(number);
            known.in_flight.push((token, page, number));
        }
        let is_last = number % 1000 == 40;
        while known.in_flight.len() == 8 && !is_last {
            let (token, answer) = driver.queue().wait_any();
            assert_eq!(answer.status, 0);
            known.answered(token, end);
        }
        if number % 1000 == 25 {
            while let Some(&(token, ..)) = known.in_flight.first() {
                assert_eq!(driver.queue().wait(token).status, 0);
                known.answered(token, end);
            }
            driver.flush();
            known.flushed();
        }
        if is_last {
            break;
        }
    }
    std::thread::sleep(Duration::from_micros(random.within(0..3000)));
}

/// Has the map be on the disk, as the kernel may at any time, and nothing else; then has the file system lose what is not.
fn cut_power(mounted: &Mounted, top: &Path) {
    let file = HostFile::open(top, Access::ReadOnly, Locking::ForceShare).unwrap();
    let image = Image::examine(Arc::new(file)).unwrap();
    let data_start = image.header().data_area().start();
    // Of these flags it takes one at a time.
    let [begin, wait] = ["-w", "-b"].map(|how| format!("sync_range {how} 0 {}", data_start.0));
    let mut xfs_io = Command::new("xfs_io");
    xfs_io.args(["-x", "-c", &begin, "-c", &wait, "-c", "shutdown"]);
    xfs_io.arg(top);
    succeed(&mut xfs_io).unwrap();
    assert!(
        fs::write(mounted.at.join("probe"), "1").is_err(),
        "it still writes"
    );
}

/// Each sector has a number that its page may have.
fn judge(disk: &[u8], known: &mut Known, what: &str) {
    let mut later = 0;
    for (page, found) in (0..).zip(disk.chunks(index(PAGE))) {
        let numbers = known.of(page).clone();
        for sector in found.chunks(512) {
            let is = |number: &&u64| stamp(page, **number)[..512] == *sector;
            let number = numbers.iter().find(is);
            assert!(
                number.is_some(),
                "{what}: page {page} has none of {numbers:?}"
            );
            later += u64::from(number != numbers.first());
        }
    }
    println!("{what}: {later} sectors had a later number than they must");
}

/// Serves a child again and again, with an end like that each time.
fn ends(end: End) {
    let mut random = Random::printed();
    let directory = scratch();
    let kind = "xfs";
    let mut mounted = match Mounted::made(directory.path(), kind, 512 * MIB, &["-mreflink=1"]) {
        Ok(mounted) => mounted,
        Err(complaint) => return println!("NOT TESTED: no XFS can be mounted: {complaint}"),
    };
    let parent: Vec<_> = (0..DISK / PAGE).flat_map(|page| stamp(page, 0)).collect();
    base(&mounted.at, "1M", &parent);
    for round in 0..8 {
        let block = *random.pick(&[128 * KIB, MIB]);
        let cache = *random.pick(&["writeback", "direct"]);
        let what = format!("{end:?} {round}, {cache}, blocks of {block}");
        let (base, top) = (mounted.at.join("base.vdi"), mounted.at.join("top.vdi"));
        let _gone = fs::remove_file(&top);
        child(&base, &top, block, DISK);
        succeed(Command::new("sync").arg("-f").arg(&mounted.at)).unwrap();
        let mut known = Known::default();
        let server = Launch::image(&top).args(["--cache", cache]).start();
        let mut driver = server.driver(&Options::new());
        write_until_the_end(&mut driver, &mut known, &mut random, end);
        if end == End::PowerCut {
            cut_power(&mounted, &top);
        }
        assert_eq!(server.kill().signal, Some(9));
        drop(driver);
        if end == End::PowerCut {
            mounted = mounted.again(directory.path(), kind).unwrap();
        }
        let (base, top) = (mounted.at.join("base.vdi"), mounted.at.join("top.vdi"));
        let code = vdi(words!["check", top]).code;
        assert!(
            matches!(code, Some(0 | 3)),
            "{what}: vdi check says {code:?}"
        );
        let found = read_plainly(&[top.clone(), base.clone()], index(DISK));
        judge(&found, &mut known, &what);
        assert_same(&read_plainly(&[base], index(DISK)), &parent, "the parent");
    }
}

#[test]
fn a_kill_takes_nothing_back_that_was_answered() {
    ends(End::Kill);
}

#[test]
fn a_power_cut_leaves_what_was_flushed_and_the_parent_s_data_around_it() {
    ends(End::PowerCut);
}
