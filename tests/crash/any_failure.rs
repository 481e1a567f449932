//! Random use of a disk on a host of which any operation may fail, and then a crash.
//!
//! W5: whatever fails, nothing but the write that failed is lost, and the image is right.

use std::sync::Arc;

use nix::errno::Errno;
use vdi_core::{Access, Disk, Sector, SectorRange, Storage, WriteError};
use vdi_tests::random::Random;
use vdi_tests::simulated::parts::{parts_without, stored_parts};
use vdi_tests::simulated::{
    Crash, Failure, Kind, Layout, Moment, Oracle, SimulatedFile, for_each_seed, percent,
};

use crate::any_instant::Scene;

/// A disk with one writer, on the convenient road.
struct User {
    file: Arc<SimulatedFile>,
    disk: Arc<Disk>,
    oracle: Oracle,
    random: Random,
}

impl User {
    fn any_range(&mut self) -> SectorRange {
        let sectors = self.disk.capacity().sectors();
        let count = self.random.within(1..sectors.min(300) + 1);
        let start = Sector(self.random.within(0..sectors - count + 1));
        self.disk.capacity().range(start, count).unwrap()
    }

    fn write(&mut self) {
        let range = self.any_range();
        let start = range.start_bytes();
        let whole = start..start + range.len_bytes();
        let tag = self.random.number().to_le_bytes();
        let data: Arc<[u8]> = tag
            .repeat(usize::try_from(range.len_bytes() / 8).unwrap())
            .into();
        let in_place = stored_parts(&self.disk, range);
        let begun = self.file.note();
        let result = self.disk.write_at(range, &data);
        for part in &in_place {
            self.oracle.begin(start, &data, part, begun);
        }
        if matches!(result, Ok(()) | Err(WriteError::Metadata { .. })) {
            // Some of the entries may be in the file.
            for part in parts_without(whole, &in_place) {
                self.oracle.begin(start, &data, &part, begun);
            }
        }
        match result {
            Ok(()) => self.oracle.answer(start, &data, self.file.note()),
            Err(WriteError::Metadata { .. } | WriteError::Failed) => {
                assert!(self.disk.is_failed());
            }
            Err(WriteError::Data { .. } | WriteError::NoSpace { .. }) => {
                assert!(!self.disk.is_failed());
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn flush(&mut self) {
        let begun = self.file.note();
        match self.disk.flush() {
            Ok(()) => self.oracle.flush(begun, self.file.note()),
            Err(_) => assert!(self.disk.is_failed()),
        }
    }

    fn break_something(&mut self) {
        let kind = *self.random.pick(&[
            Kind::Write,
            Kind::Write,
            Kind::SetLen,
            Kind::Punch,
            Kind::Sync,
        ]);
        let errno = *self.random.pick(&[Errno::EIO, Errno::ENOSPC]);
        let len = usize::try_from(self.random.within(0..80) * 512).unwrap();
        let failure = *self
            .random
            .pick(&[Failure::Clean(errno), Failure::Short(errno, len)]);
        let after = usize::try_from(self.random.within(0..4)).unwrap();
        self.file.fail(kind, 0..u64::MAX, after, failure);
    }

    /// Reads go on, whatever failed.
    fn check(&self) {
        let whole = self.disk.capacity().whole();
        let mut found = vec![1; usize::try_from(whole.len_bytes()).unwrap()];
        self.disk.read_at(whole, &mut found).unwrap();
        let now = self.file.note();
        let wrong = self.oracle.judge(0, &found, now, Crash::Kill, |_| 0);
        assert_eq!(wrong, None);
    }
}

#[test]
fn whatever_fails_nothing_else_is_lost() {
    let mut failed = 0;
    for_each_seed(40, |mut random| {
        let mut layout = Layout::plain(128 << 10, 10 * (128 << 10));
        let some = u32::try_from(random.within(0..10)).unwrap();
        layout = layout.with_blocks(some);
        let (contents, disk) = layout.build(&mut random);
        let file = SimulatedFile::new(contents);
        let storage = Arc::clone(&file) as Arc<dyn Storage>;
        let mut user = User {
            disk: Arc::new(Disk::open(storage, Access::Writable).unwrap()),
            file,
            oracle: Oracle::new(disk),
            random: random.fork(),
        };
        for _ in 0..40 {
            match random.within(0..10) {
                0 => user.break_something(),
                1 => user.flush(),
                2 => user.check(),
                _ => user.write(),
            }
            if user.disk.is_failed() {
                failed += 1;
                let moment = user.file.now();
                user.write();
                user.flush();
                assert!(user.disk.close().is_err());
                assert_eq!(user.file.done_since(moment), []);
                break;
            }
        }
        user.check();
        let history = user.file.history();
        let scene = Scene {
            layout: &layout,
            parents: &[],
            oracle: &user.oracle,
            harmless_from: Moment::START,
        };
        for moment in history.moments().filter(|_| percent(&mut random, 10)) {
            let killed = history.killed_at(moment, &mut user.random);
            scene.check(&killed, moment, Crash::Kill);
            let point = history.at(moment);
            for cut in point.cuts(3, &mut user.random) {
                let left = point.cut(cut, &mut user.random);
                scene.check(&left, moment, Crash::PowerCut);
            }
        }
    });
    assert!(failed > 0, "some failure was final");
}

/// A disk of 100 blocks on a file, with its first block written.
fn with_one_block() -> (Arc<SimulatedFile>, Arc<Disk>) {
    let layout = Layout::plain(1 << 20, 100 << 20);
    let file = SimulatedFile::new(layout.build(&mut Random::seeded(1)).0);
    let storage = Arc::clone(&file) as Arc<dyn Storage>;
    let disk = Arc::new(Disk::open(storage, Access::Writable).unwrap());
    let first = disk.capacity().range(Sector(0), 2048).unwrap();
    disk.write_at(first, &[1; 1 << 20]).unwrap();
    (file, disk)
}

/// Knows whether it was woken.
#[derive(Default)]
struct Woken(std::sync::atomic::AtomicBool);

impl std::task::Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, std::sync::atomic::Ordering::Release);
    }
}

#[test]
fn a_punch_that_fails_does_not_keep_those_waiting_who_want_room() {
    let (file, disk) = with_one_block();
    let range = |start, blocks: u64| disk.capacity().range(Sector(start), blocks * 2048).unwrap();
    disk.zero_at(range(0, 1), vdi_core::Zeroing::Discard)
        .unwrap();
    let (woken, lane) = (Arc::<Woken>::default(), disk.lane());
    let waker = std::task::Waker::from(Arc::clone(&woken));
    let asked = disk.reserve(range(2048, 99), &lane, &waker).unwrap();
    assert!(matches!(asked, vdi_core::Reserve::Parked));
    file.fail_all(Kind::Punch, Errno::EIO);
    disk.do_chores().unwrap_err();
    assert!(woken.0.load(std::sync::atomic::Ordering::Acquire));
}

#[test]
fn a_file_that_was_cut_is_not_lengthened_over_what_is_missing() {
    for is_closed in [false, true] {
        let (file, disk) = with_one_block();
        file.set_len(1 << 20).unwrap();
        let error = if is_closed {
            disk.close().unwrap_err()
        } else {
            let first = |block: u64| disk.capacity().range(Sector(block * 2048), 1).unwrap();
            let mut writes = (1..100).map(|block| disk.write_at(first(block), &[2; 512]));
            writes.find_map(Result::err).unwrap()
        };
        assert!(matches!(error, WriteError::Shortened { .. }), "{error}");
        assert!(disk.is_failed());
    }
}
