//! Random use of a disk against a plain byte array, over images of every shape.
//!
//! Covers what a disk reads as (P1 included: a disk that is opened again without a close has lost nothing), that
//! a clean close leaves an exact image, that nothing unknown in a file is touched, and that QEMU
//! agrees. Crashes that lose writes are in `crash.rs`.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread::ScopedJoinHandle;

use vdi_core::{Access, CreateOptions, Disk, HostFile, Locking, NewKind, Sector, Storage};
use vdi_tests::random::Random;
use vdi_tests::simulated::{
    Built, Chain, Contents, Found, Habits, Layout, Moment, Operation, SimulatedFile, Workload,
    for_each_seed, percent,
};

const SIZES: [u32; 5] = [128 << 10, 128 << 10, 512 << 10, 1 << 20, 2 << 20];

const HABITS: Habits = Habits {
    most_sectors: 5 << 11,
    most_in_flight: 8,
    gives_up: true,
    zeros: true,
};

fn workload(chain: &Chain, random: &mut Random) -> (Workload, Contents) {
    let Built { top, parents, disk } = chain.build(random);
    let file = SimulatedFile::new(top.clone());
    let layout = chain.top().clone();
    let workload = Workload::open(file, parents, layout, disk, HABITS, random.fork());
    (workload, top)
}

/// Uses the disk, with closes and deaths between; ends with a close.
fn use_disk(workload: &mut Workload, steps: u64, random: &mut Random) {
    workload.check_all();
    for _ in 0..steps {
        match random.within(0..100) {
            0 => workload.close_and_reopen(),
            1 => workload.die_and_reopen(),
            _ => workload.step(),
        }
        if percent(random, 2) {
            workload.check_all();
        }
    }
    workload.close_and_reopen();
    workload.check_all();
}

fn same(before: &Contents, after: &Contents, range: Range<u64>) -> bool {
    before.bytes(range.clone()) == after.bytes(range)
}

#[test]
fn a_disk_reads_as_a_plain_array_would() {
    for_each_seed(150, |mut random| {
        let chain = Chain::any(&SIZES, &mut random);
        println!("{chain:?}");
        let (mut workload, before) = workload(&chain, &mut random);
        use_disk(&mut workload, 150, &mut random);
        let (after, layout) = (workload.file.contents(), chain.top());
        for range in layout.kept() {
            assert!(
                same(&before, &after, range.clone()),
                "{range:?} was touched"
            );
        }
        let lost = layout.lost_private_bytes(&before, &after, true);
        assert_eq!(lost, None, "a block moves with its private bytes");
        for parent in &workload.parents {
            assert_eq!(
                parent.done_since(Moment::START),
                [],
                "a parent is only read"
            );
        }
    });
}

#[test]
fn a_disk_that_is_only_read_leaves_its_file_alone() {
    for_each_seed(30, |mut random| {
        let layout = Layout::any(&SIZES, &mut random);
        println!("{layout:?}");
        let (contents, expected) = layout.build(&mut random);
        for access in [Access::Writable, Access::ReadOnly] {
            let file = SimulatedFile::new(contents.clone());
            let disk = Disk::open(Arc::clone(&file) as Arc<dyn Storage>, access).unwrap();
            let mut found = vec![1; expected.len()];
            disk.read_at(disk.capacity().whole(), &mut found).unwrap();
            assert!(found == expected);
            disk.flush().unwrap();
            assert!(!disk.do_chores().unwrap());
            disk.close().unwrap();
            let done = file.done_since(Moment::START);
            let is_harmless =
                |one: &Operation| access == Access::Writable && *one == Operation::Sync;
            assert!(done.iter().all(is_harmless), "{access:?}: {done:?}");
        }
    });
}

fn qemu_img(arguments: &[&str], paths: &[&Path]) {
    let output = Command::new("qemu-img")
        .args(arguments)
        .args(paths)
        .output()
        .expect("qemu-img is installed (qemu-utils)");
    let said = String::from_utf8_lossy(&output.stderr) + String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "qemu-img {arguments:?}: {said}");
}

#[test]
fn qemu_finds_nothing_wrong_and_reads_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let (image, raw) = (
        directory.path().join("a.vdi"),
        directory.path().join("a.raw"),
    );
    for_each_seed(10, |mut random| {
        let layout = Layout::common(&mut random);
        println!("{layout:?}");
        let chain = Chain::alone(layout);
        let (mut workload, _) = workload(&chain, &mut random);
        for _ in 0..100 {
            match random.within(0..100) {
                0..2 => workload.close_and_reopen(),
                2 => workload.die_and_reopen(),
                _ => workload.step(),
            }
        }
        workload.close_and_reopen();
        workload.file.contents().save(&image).unwrap();
        qemu_img(&["check", "-f", "vdi"], &[&image]);
        qemu_img(&["convert", "-f", "vdi", "-O", "raw"], &[&image, &raw]);
        let read = std::fs::read(&raw).unwrap();
        let expected = workload.oracle.now();
        assert!(read == expected, "qemu reads something else");
    });
}

/// Threads that write at once: each has sectors of its own in every block.
#[test]
fn threads_that_write_into_the_same_new_blocks_lose_nothing() {
    const THREADS: u64 = 4;
    const SECTORS: u64 = 16 << 11;
    let directory = tempfile::tempdir().unwrap();
    for_each_seed(3, |mut random| {
        let path = directory.path().join(format!("{}.vdi", random.number()));
        let options = CreateOptions {
            capacity_bytes: SECTORS * 512,
            block_size: 128 << 10,
            kind: NewKind::Dynamic,
            uuid: None,
        };
        vdi_core::create(&path, &options).unwrap();
        let file = HostFile::open(&path, Access::Writable, Locking::Locked).unwrap();
        let disk = Arc::new(Disk::open(Arc::new(file), Access::Writable).unwrap());
        let parts: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|nth| (nth, random.fork(), Arc::clone(&disk)))
                .map(|(nth, random, disk)| scope.spawn(move || write_own(&disk, nth, random)))
                .collect();
            let joined = threads.into_iter().map(ScopedJoinHandle::join);
            joined.map(Result::unwrap).collect()
        });
        disk.close().unwrap();
        drop(disk);

        let file = HostFile::open(&path, Access::ReadOnly, Locking::Locked).unwrap();
        let disk = Disk::open(Arc::new(file), Access::ReadOnly).unwrap();
        let mut found = vec![0; usize::try_from(SECTORS * 512).unwrap()];
        disk.read_at(disk.capacity().whole(), &mut found).unwrap();
        for (nth, sector) in found.chunks(512).enumerate() {
            let part = &parts[nth / 4 % 4];
            assert!(sector == &part[nth * 512..][..512], "sector {nth}");
        }
    });

    /// Writes runs of four sectors, every fourth run of the disk; gives what the disk holds there.
    fn write_own(disk: &Arc<Disk>, nth: u64, mut random: Random) -> Vec<u8> {
        let mut own = vec![0; usize::try_from(SECTORS * 512).unwrap()];
        let mut buf = [0; 2048];
        for round in 0..1500 {
            // All threads go through the blocks together, so they meet in new ones.
            let near = round * 16 / 20 / 16 * 16;
            let run = (near + random.within(0..64)) % (SECTORS / 16);
            let sector = Sector(run * 16 + nth * 4);
            let range = disk.capacity().range(sector, 4).unwrap();
            let at = usize::try_from(sector.0 * 512).unwrap();
            if percent(&mut random, 30) {
                disk.read_at(range, &mut buf).unwrap();
                assert!(buf == own[at..at + 2048], "thread {nth} lost a write");
            } else {
                buf = random.bytes(2048).try_into().unwrap();
                disk.write_at(range, &buf).unwrap();
                own[at..at + 2048].copy_from_slice(&buf);
            }
            if percent(&mut random, 1) {
                disk.flush().unwrap();
            }
        }
        own
    }
}

/// Writes every block of a disk, closes it, and reads it from the file again.
fn fill(layout: &Layout) -> Found {
    let mut random = Random::seeded(1);
    let (contents, mut expected) = layout.build(&mut random);
    let file = SimulatedFile::new(contents);
    let open =
        || Arc::new(Disk::open(Arc::clone(&file) as Arc<dyn Storage>, Access::Writable).unwrap());
    let disk = open();
    for start in (0..disk.capacity().sectors()).step_by(layout.block_size as usize / 512) {
        let range = disk.capacity().range(Sector(start), 1).unwrap();
        disk.write_at(range, &[7; 512]).unwrap();
        let at = usize::try_from(start * 512).unwrap();
        expected[at..at + 512].fill(7);
        // What if we died now?
        let found = Found::within(&file.contents(), layout);
        assert_eq!(found.harm(layout), None, "W1: after the write at {start}");
    }
    disk.close().unwrap();
    let mut found = vec![1; expected.len()];
    open().read_at(disk.capacity().whole(), &mut found).unwrap();
    assert!(found == expected, "the disk reads wrong");
    Found::within(&file.contents(), layout)
}

#[test]
fn blocks_that_are_counted_but_not_in_the_file_get_into_it() {
    let mut layout = Layout::plain(1 << 20, 8 << 20).with_blocks(2);
    layout.blocks_allocated = 5;
    assert_eq!(fill(&layout).file_len, layout.end_of(8));
}

#[test]
fn blocks_that_are_in_the_file_but_not_counted_are_counted_before_they_are_used() {
    let mut layout = Layout::plain(1 << 20, 8 << 20).with_blocks(2);
    layout.file_len = layout.end_of(8);
    assert_eq!(fill(&layout).blocks_allocated, 8);
}

#[test]
fn a_count_that_is_too_small_is_mended_before_it_does_harm() {
    let mut layout = Layout::plain(1 << 20, 8 << 20).with_blocks(5);
    layout.blocks_allocated = 2;
    assert_eq!(fill(&layout).blocks_allocated, 8);
}
