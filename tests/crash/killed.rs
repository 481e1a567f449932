//! A real program that is killed with `kill -9` in the middle of its writes, on a real file.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use vdi_core::{Access, CreateOptions, Disk, HostFile, Locking, NewKind, Sector, SectorRange};
use vdi_tests::random::Random;

const CAPACITY: u64 = 48 << 20;
/// Names the image to the child, and the number of its first write.
const CHILD: &str = "VDI_TEST_KILLED_CHILD";

fn open(path: &Path) -> Arc<Disk> {
    let file = HostFile::open(path, Access::Writable, Locking::Locked).unwrap();
    Arc::new(Disk::open(Arc::new(file), Access::Writable).unwrap())
}

/// The write with a number is always the same.
fn write_number(disk: &Disk, number: u64) -> (SectorRange, Vec<u8>) {
    let mut random = Random::seeded(number);
    let count = random.within(1..1500);
    let start = Sector(random.within(0..disk.capacity().sectors() - count));
    let range = disk.capacity().range(start, count).unwrap();
    let mut data = vec![0; usize::try_from(range.len_bytes()).unwrap()];
    for sector in data.chunks_mut(512) {
        sector.fill(random.number().to_le_bytes()[0]);
        sector[..8].copy_from_slice(&number.to_le_bytes());
    }
    (range, data)
}

#[test]
#[ignore = "the child of a_program_that_is_killed_has_written_all_that_it_answered"]
fn child_that_writes_until_it_is_killed() {
    let Ok(argument) = std::env::var(CHILD) else {
        return;
    };
    let (first, path) = argument.split_once(' ').unwrap();
    let disk = open(Path::new(path));
    let mut answers = std::io::stderr();
    for number in first.parse().unwrap().. {
        let (range, data) = write_number(&disk, number);
        disk.write_at(range, &data).unwrap();
        writeln!(answers, "answered {number}").unwrap();
    }
}

/// Runs the child from a write on and kills it after some answers; gives the last one's number.
fn run_and_kill(path: &Path, first: u64, answers: u64) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "killed::child_that_writes_until_it_is_killed"])
        .args(["--ignored", "--nocapture"])
        .env(CHILD, format!("{first} {}", path.display()))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut last = None;
    let mut take = |line: std::io::Result<String>| {
        let line = line.unwrap();
        let number = line
            .strip_prefix("answered ")
            .unwrap_or_else(|| panic!("{line}"));
        last = Some(number.parse().unwrap());
    };
    for _ in 0..answers {
        take(lines.next().expect("the child goes on until it is killed"));
    }
    child.kill().unwrap();
    lines.for_each(take);
    let status = child.wait().unwrap();
    assert!(!status.success(), "it was killed");
    last.unwrap()
}

#[test]
fn a_program_that_is_killed_has_written_all_that_it_answered() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.vdi");
    let options = CreateOptions {
        capacity_bytes: CAPACITY,
        block_size: 512 << 10,
        kind: NewKind::Dynamic,
        uuid: None,
    };
    vdi_core::create(&path, &options).unwrap();
    let mut expected = vec![0; usize::try_from(CAPACITY).unwrap()];
    let mut found = vec![1; expected.len()];
    let mut next = 1;
    let mut was_torn = 0;
    for answers in [1, 5, 30, 2, 60, 11] {
        let last = run_and_kill(&path, next, answers);
        let disk = open(&path);
        for number in next..=last {
            let (range, data) = write_number(&disk, number);
            let at = usize::try_from(range.start_bytes()).unwrap();
            expected[at..at + data.len()].copy_from_slice(&data);
        }
        disk.read_at(disk.capacity().whole(), &mut found).unwrap();
        // The write that was in flight: each of its sectors as before or as after.
        let (range, data) = write_number(&disk, last + 1);
        let at = usize::try_from(range.start_bytes()).unwrap();
        for (nth, new) in data.chunks(512).enumerate() {
            let sector = at + nth * 512..at + nth * 512 + 512;
            if found[sector.clone()] == *new && expected[sector.clone()] != *new {
                expected[sector].copy_from_slice(new);
                was_torn += 1;
            }
        }
        assert!(found == expected, "after the kill behind write {last}");
        next = last + 2;
        drop(disk);
    }
    println!("{was_torn} sectors of writes in flight were found");
    let disk = open(&path);
    let range = disk.capacity().range(Sector(0), 1).unwrap();
    disk.write_at(range, &[3; 512]).unwrap();
    expected[..512].fill(3);
    disk.close().unwrap();
    drop(disk);
    let disk = open(&path);
    disk.read_at(disk.capacity().whole(), &mut found).unwrap();
    assert!(found == expected);
}
