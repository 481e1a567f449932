//! One test for each claim of the rules that a random test could miss.

use std::sync::Arc;
use std::task::Waker;

use nix::errno::Errno;
use vdi_core::{
    Access, Disk, Reservation, Reserve, Sector, SectorRange, Source, Storage, WriteError, Zeroing,
};
use vdi_tests::random::Random;
use vdi_tests::simulated::flag::flag;
use vdi_tests::simulated::{
    Failure, Found, Kind, Layout, Moment, Operation, SimulatedFile, layout,
};

const BLOCK: u32 = 128 << 10;
const BLOCK_SECTORS: u64 = 256;
const COUNT: std::ops::Range<u64> = 0x184..0x188;
const UUID_MODIFY: std::ops::Range<u64> = 0x198..0x1A8;

/// A disk of eight blocks, of which some have storage.
struct Bench {
    layout: Layout,
    file: Arc<SimulatedFile>,
    disk: Arc<Disk>,
}

impl Bench {
    fn with_blocks(count: u32) -> Self {
        Self::of(Layout::plain(BLOCK, 8 * u64::from(BLOCK)).with_blocks(count))
    }

    fn of(layout: Layout) -> Self {
        let file = SimulatedFile::new(layout.build(&mut Random::seeded(0)).0);
        let disk = open(&file);
        Self { layout, file, disk }
    }

    /// With the first write done that marks the image, and room for all blocks.
    fn marked(blocks: u32) -> Self {
        let bench = Self::with_blocks(blocks);
        drop(bench.ready(0, 1));
        drop(bench.ready(7, 1));
        bench.disk.do_chores().unwrap();
        bench.disk.flush().unwrap();
        bench
    }

    /// The first sectors of a block.
    fn range(&self, block: u64, count: u64) -> SectorRange {
        let start = Sector(block * BLOCK_SECTORS);
        self.disk.capacity().range(start, count).unwrap()
    }

    fn try_ready(&self, block: u64, count: u64) -> Result<Reservation, WriteError> {
        loop {
            match self
                .disk
                .reserve(self.range(block, count), &self.disk.lane(), Waker::noop())?
            {
                Reserve::Ready(reservation) => return Ok(reservation),
                Reserve::Parked => assert!(self.disk.do_chores()?, "it waits for nothing"),
            }
        }
    }

    fn ready(&self, block: u64, count: u64) -> Reservation {
        self.try_ready(block, count).unwrap()
    }

    fn transfer(&self, reservation: &Reservation, byte: u8) {
        for extent in reservation.extents() {
            let data = vec![byte; usize::try_from(extent.len_bytes).unwrap()];
            self.file.write_all_at(&data, extent.at).unwrap();
        }
    }

    /// Does not wait: what it would wait for, nobody does.
    fn write(&self, block: u64, byte: u8) -> Result<(), WriteError> {
        let reservation = self.try_ready(block, 1)?;
        self.transfer(&reservation, byte);
        self.disk.commit(&mut vec![reservation])
    }

    fn write_blocking(&self, block: u64, byte: u8) -> Result<(), WriteError> {
        self.disk.write_at(self.range(block, 1), &[byte; 512])
    }

    fn first_byte(&self, block: u64) -> u8 {
        let mut found = [0xAA; 512];
        self.disk.read_at(self.range(block, 1), &mut found).unwrap();
        found[0]
    }

    fn has_storage(&self, block: u64) -> bool {
        let first = self
            .disk
            .map(self.range(block, 1), &self.disk.lane().enter())
            .next()
            .unwrap();
        matches!(first.source, Source::Stored { .. })
    }

    fn writes_to_map_since(&self, moment: Moment) -> Vec<u64> {
        let map = self.layout.map();
        let done = self.file.done_since(moment);
        let touched = done.iter().map(Operation::touched);
        let to_map = touched.filter(|range| map.start <= range.start && range.start < map.end);
        to_map.map(|range| range.end - range.start).collect()
    }
}

fn open(file: &Arc<SimulatedFile>) -> Arc<Disk> {
    let storage = Arc::clone(file) as Arc<dyn Storage>;
    Arc::new(Disk::open(storage, Access::Writable).unwrap())
}

fn syncs(done: &[Operation]) -> usize {
    let is_sync = |one: &&Operation| matches!(one, Operation::Sync | Operation::SyncOf(_));
    done.iter().filter(is_sync).count()
}

// W3: answer after publish.

#[test]
fn the_entry_is_in_the_file_when_commit_returns() {
    let bench = Bench::marked(2);
    let reservation = bench.ready(5, 1);
    bench.transfer(&reservation, 7);
    assert_eq!(bench.first_byte(5), 0, "not to be seen before commit");
    let entries = || Found::within(&bench.file.contents(), &bench.layout).entries;
    assert_eq!(entries()[5], u32::MAX, "W2: no entry before the data");
    bench.disk.commit(&mut vec![reservation]).unwrap();
    assert!(entries()[5] < 8);
    assert_eq!(bench.first_byte(5), 7);
}

#[test]
fn neighbouring_entries_of_a_batch_go_in_one_write() {
    let bench = Bench::marked(0);
    let mut batch: Vec<_> = [6, 2, 4, 3].map(|block| bench.ready(block, 1)).into();
    let moment = bench.file.now();
    bench.disk.commit(&mut batch).unwrap();
    assert_eq!(bench.writes_to_map_since(moment), [12, 4]);
    let one = bench.ready(0, 2 * BLOCK_SECTORS);
    let moment = bench.file.now();
    bench.disk.commit(&mut vec![one]).unwrap();
    assert_eq!(bench.writes_to_map_since(moment), [8]);
}

#[test]
fn a_flush_is_one_sync_and_none_if_nothing_was_written_since() {
    let bench = Bench::marked(4);
    for block in [1, 6] {
        bench.write(block, 1).unwrap();
        let moment = bench.file.now();
        bench.disk.flush().unwrap();
        assert_eq!(bench.file.done_since(moment), [Operation::Sync]);
        bench.disk.flush().unwrap();
        assert!(bench.disk.begin_flush().unwrap().is_none());
        assert_eq!(bench.file.done_since(moment), [Operation::Sync]);
    }
}

#[test]
fn a_flush_does_not_cover_what_was_written_while_it_ran() {
    let bench = Bench::marked(4);
    bench.write(1, 1).unwrap();
    let flush = bench.disk.begin_flush().unwrap().unwrap();
    bench.write(2, 1).unwrap();
    bench.disk.end_flush(flush, Ok(())).unwrap();
    assert!(bench.disk.begin_flush().unwrap().is_some());
}

#[test]
fn a_flush_tells_at_least_how_much_was_written_since_the_last_one() {
    let bench = Bench::marked(4);
    let unknown = open(&bench.file).begin_flush().unwrap().unwrap();
    assert!(unknown.unsynced_bytes() > 1 << 30);
    bench.disk.flush().unwrap();
    // A block of its own, then in place.
    for block in [2, 2] {
        bench.write(block, 1).unwrap();
        bench.write(block, 1).unwrap();
        let flush = bench.disk.begin_flush().unwrap().unwrap();
        assert_eq!(flush.unsynced_bytes(), 2 * 512, "block {block}");
        bench.disk.end_flush(flush, Ok(())).unwrap();
    }
}

#[test]
fn the_first_flush_covers_what_was_written_before_a_kill() {
    let bench = Bench::marked(4);
    bench.write(1, 1).unwrap();
    let disk = open(&bench.file);
    let moment = bench.file.now();
    disk.flush().unwrap();
    assert_eq!(bench.file.done_since(moment), [Operation::Sync]);
}

// W4: release late.

/// Releases a whole block and commits that.
fn release(bench: &Bench, block: u64, how: Zeroing) {
    let range = bench.range(block, BLOCK_SECTORS);
    let lane = bench.disk.lane();
    let reserved = bench.disk.reserve_zeros(range, how, &lane, Waker::noop());
    let Ok(Reserve::Ready(reservation)) = reserved else {
        panic!("{reserved:?}");
    };
    assert!(reservation.zeros().is_empty(), "nothing to zero in place");
    bench.disk.commit(&mut vec![reservation]).unwrap();
}

#[test]
fn a_released_block_is_used_again_only_when_its_last_visitor_is_gone() {
    let bench = Bench::marked(8);
    let lane = bench.disk.lane();
    let (reader, writer) = (lane.enter(), bench.ready(0, 1));
    release(&bench, 0, Zeroing::Discard);
    let (woken, waker) = flag();
    let reserve = || {
        bench
            .disk
            .reserve(bench.range(0, 1), &lane, &waker)
            .unwrap()
    };
    // All other blocks have owners.
    assert!(matches!(reserve(), Reserve::Parked));
    while bench.disk.do_chores().unwrap() {}
    for visitor in [Ok(reader), Err(writer)] {
        let _spurious = woken.take();
        assert!(matches!(reserve(), Reserve::Parked));
        while bench.disk.do_chores().unwrap() {}
        drop(visitor);
    }
    assert!(woken.take(), "who waits is told");
    assert!(matches!(reserve(), Reserve::Parked));
    assert!(bench.disk.do_chores().unwrap());
    assert!(matches!(reserve(), Reserve::Ready(_)));
}

#[test]
fn a_released_block_is_zeroed_between_two_syncs_before_it_is_used_again() {
    let bench = Bench::marked(8);
    let block = bench.layout.file_block(0);
    let moment = bench.file.now();
    release(&bench, 0, Zeroing::Release);
    let entry = Found::within(&bench.file.contents(), &bench.layout).entries[0];
    assert_eq!(entry, layout::ZERO, "never FREE: that would show a parent");
    bench.write(0, 1).unwrap();
    let done = bench.file.done_since(moment);
    let position = |is: &dyn Fn(&Operation) -> bool| done.iter().rposition(is).unwrap();
    let touches = |one: &Operation| one.touched().start == block.start;
    let punched = position(&|one| matches!(one, Operation::Punch(_)) && touches(one));
    let written = position(&|one| matches!(one, Operation::Write { .. }) && touches(one));
    assert!(
        syncs(&done[..punched]) > 0,
        "its old entry is gone for good"
    );
    assert!(syncs(&done[punched..written]) > 0, "so are its old bytes");
}

#[test]
fn the_space_of_a_released_block_returns_at_once() {
    let bench = Bench::marked(8);
    let (woken, waker) = flag();
    bench.disk.set_housekeeper(waker);
    release(&bench, 3, Zeroing::Discard);
    assert!(woken.take(), "there is a chore");
    let moment = bench.file.now();
    assert!(bench.disk.do_chores().unwrap());
    let punch = Operation::Punch(bench.layout.file_block(3));
    assert_eq!(bench.file.done_since(moment), [punch]);
}

#[test]
fn a_close_fills_a_hole_only_when_its_old_entry_is_gone_for_good() {
    let bench = Bench::marked(8);
    bench.disk.do_chores().unwrap();
    let hole = bench.layout.file_block(0);
    let moment = bench.file.now();
    release(&bench, 0, Zeroing::Discard);
    bench.disk.close().unwrap();
    let done = bench.file.done_since(moment);
    let touches = |one: &Operation| one.touched().start == hole.start;
    let touched = done.iter().position(touches).expect("the hole is filled");
    assert!(syncs(&done[..touched]) > 0);
    let found = Found::within(&bench.file.contents(), &bench.layout);
    assert_eq!((found.blocks_allocated, found.owned()), (7, 7));
    assert_eq!(found.file_len, bench.layout.end_of(7));
}

// W5: failure is final.

/// Something that fails for good: a failure that is to come, and what meets it.
type Disaster = (&'static str, fn(&Bench), fn(&Bench) -> bool);

const DISASTERS: [Disaster; 7] = [
    (
        "the sync of a flush",
        |bench| fail(bench, Kind::Sync, 0..u64::MAX, 0),
        |bench| {
            bench.write(0, 9).unwrap();
            matches!(bench.disk.flush(), Err(WriteError::Sync { .. }))
        },
    ),
    (
        "an entry",
        |bench| fail(bench, Kind::Write, bench.layout.map(), 0),
        |bench| is_metadata(&bench.write(4, 9)),
    ),
    (
        "the count",
        |bench| fail(bench, Kind::Write, COUNT, 0),
        |bench| {
            use_up(bench, 511);
            is_metadata(&bench.write(520, 9))
        },
    ),
    (
        "the sync of new room",
        |bench| fail(bench, Kind::Sync, 0..u64::MAX, 0),
        |bench| {
            use_up(bench, 511);
            is_metadata(&bench.write(520, 9))
        },
    ),
    (
        "the sync before a block is punched",
        |bench| fail(bench, Kind::Sync, 0..u64::MAX, 0),
        recycle,
    ),
    (
        "the sync after a block was punched",
        |bench| fail(bench, Kind::Sync, 0..u64::MAX, 1),
        recycle,
    ),
    (
        "the close",
        |bench| fail(bench, Kind::Write, COUNT, 0),
        |bench| is_metadata(&bench.disk.close()),
    ),
];

fn fail(bench: &Bench, kind: Kind, within: std::ops::Range<u64>, after: usize) {
    bench
        .file
        .fail(kind, within, after, Failure::Clean(Errno::EIO));
}

fn is_metadata(result: &Result<(), WriteError>) -> bool {
    matches!(result, Err(WriteError::Metadata { .. }))
}

/// Takes that many blocks; 511 are left of the first step of 64 MiB.
fn use_up(bench: &Bench, blocks: u64) {
    for block in 3..3 + blocks {
        bench.write(block, 1).unwrap();
    }
}

/// Lets a block be let go and used again.
fn recycle(bench: &Bench) -> bool {
    let block = bench.ready(520, 1);
    use_up(bench, 510);
    drop(block);
    is_metadata(&bench.write(520, 1))
}

#[test]
fn after_a_failed_sync_or_metadata_write_nothing_is_written_any_more() {
    for (name, prepare, meet) in DISASTERS {
        let blocks = 1100;
        let layout = Layout::plain(BLOCK, blocks * u64::from(BLOCK)).with_blocks(2);
        let bench = Bench::of(layout);
        bench.write(0, 5).unwrap();
        bench.write(1, 6).unwrap();
        let in_flight = bench.ready(2, 1);
        bench.transfer(&in_flight, 7);
        let (woken, waker) = flag();
        let parked = bench
            .disk
            .reserve(bench.range(2, 9), &bench.disk.lane(), &waker)
            .unwrap();
        assert!(matches!(parked, Reserve::Parked));

        prepare(&bench);
        assert!(meet(&bench), "{name} fails");
        assert!(bench.disk.is_failed(), "{name}");
        assert!(woken.take(), "{name}: a parked request is told");
        let moment = bench.file.now();
        for block in [0, 1, 2, 7] {
            let again = bench
                .disk
                .reserve(bench.range(block, 1), &bench.disk.lane(), &waker);
            assert!(matches!(again, Err(WriteError::Failed)), "{name}");
        }
        let committed = bench.disk.commit(&mut vec![in_flight]);
        assert!(matches!(committed, Err(WriteError::Failed)), "{name}");
        assert!(bench.disk.begin_flush().is_err(), "{name}");
        assert!(bench.disk.flush().is_err(), "{name}");
        assert!(bench.disk.do_chores().is_err(), "{name}");
        assert!(bench.disk.close().is_err(), "{name}");
        assert_eq!(bench.file.done_since(moment), [], "{name}");
        assert_eq!(bench.first_byte(1), 6, "{name}: reads go on");
        assert_eq!(bench.first_byte(2), 0, "{name}: not committed");
    }
}

#[test]
fn a_mark_that_fails_is_final_before_any_data() {
    for (kind, after) in [(Kind::Write, 0), (Kind::Sync, 0)] {
        let bench = Bench::with_blocks(2);
        bench
            .file
            .fail(kind, 0..u64::MAX, after, Failure::Clean(Errno::EIO));
        assert!(is_metadata(&bench.write(0, 1)));
        assert!(bench.disk.is_failed());
        assert!(matches!(bench.write(0, 1), Err(WriteError::Failed)));
        assert!(!bench.has_storage(5));
    }
}

/// The kernel tells a lost write to one sync only; another that runs at the same time succeeds.
#[test]
fn a_flush_that_ends_after_another_failed_is_not_answered_as_done() {
    let bench = Bench::marked(4);
    bench.write(1, 1).unwrap();
    let first = bench.disk.begin_flush().unwrap().unwrap();
    let second = bench.disk.begin_flush().unwrap().unwrap();
    let failed = bench.disk.end_flush(first, Err(Errno::EIO.into()));
    assert!(matches!(failed, Err(WriteError::Sync { .. })));
    let ended = bench.disk.end_flush(second, Ok(()));
    assert!(matches!(ended, Err(WriteError::Failed)));
}

#[test]
fn after_a_close_nothing_is_written_any_more() {
    let bench = Bench::marked(2);
    let late = bench.ready(5, 1);
    bench.disk.close().unwrap();
    let moment = bench.file.now();
    assert!(matches!(
        bench.disk.commit(&mut vec![late]),
        Err(WriteError::Closed)
    ));
    assert!(matches!(bench.write(0, 1), Err(WriteError::Closed)));
    bench.disk.close().unwrap();
    assert_eq!(bench.file.done_since(moment), []);
}

#[test]
fn data_that_cannot_be_written_leave_the_map_as_it_was() {
    let failures = [
        Failure::Clean(Errno::ENOSPC),
        Failure::Clean(Errno::EIO),
        Failure::Short(Errno::ENOSPC, 512),
    ];
    for failure in failures {
        let bench = Bench::marked(2);
        let data = bench.layout.end_of(0)..u64::MAX;
        let before = bench.file.contents().bytes(bench.layout.map());
        bench.file.fail(Kind::Write, data, 0, failure);
        let range = bench.range(4, 9);
        let failed = bench.disk.write_at(range, &[9; 9 * 512]);
        assert!(matches!(failed, Err(WriteError::Data { .. })));
        assert!(!bench.disk.is_failed());
        assert!(!bench.has_storage(4));
        assert_eq!(bench.first_byte(4), 0);
        let after = bench.file.contents().bytes(bench.layout.map());
        assert!(before == after, "the map in the file is as it was");
        bench.write(4, 3).unwrap();
        assert_eq!(bench.first_byte(4), 3);
    }
}

#[test]
fn a_block_of_a_failed_write_is_used_again_only_after_it_was_punched_and_that_synced() {
    let bench = Bench::marked(0);
    let failed = bench.ready(0, BLOCK_SECTORS);
    bench.transfer(&failed, 0xEE);
    let at = failed.extents()[0].at.0;
    drop(failed);
    let moment = bench.file.now();
    for block in 0..8 {
        bench.write(block, 1).unwrap();
    }
    let done = bench.file.done_since(moment);
    let of_block = |operation: &Operation| {
        let touched = operation.touched();
        touched.start < at + u64::from(BLOCK) && at < touched.end
    };
    let is_punch = |operation: &Operation| matches!(operation, Operation::Punch(_));
    let punched = done.iter().position(|one| is_punch(one) && of_block(one));
    let written = done.iter().position(|one| !is_punch(one) && of_block(one));
    let (punched, written) = (punched.unwrap(), written.unwrap());
    assert!(
        syncs(&done[..punched]) > 0,
        "what named it before is durable"
    );
    assert!(syncs(&done[punched..written]) > 0, "the punch is durable");
    let mut found = vec![1; usize::try_from(bench.disk.capacity().bytes()).unwrap()];
    let whole = bench.disk.capacity().whole();
    bench.disk.read_at(whole, &mut found).unwrap();
    assert!(
        !found.contains(&0xEE),
        "what the failed write left is never seen"
    );
}

#[test]
fn a_full_host_refuses_writes_to_new_blocks_only_and_takes_them_again_later() {
    let bench = Bench::with_blocks(2);
    bench.file.fail_all(Kind::SetLen, Errno::ENOSPC);
    for _ in 0..3 {
        let refused = bench.write_blocking(5, 1);
        let Err(WriteError::NoSpace { source }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
        bench.write_blocking(1, 1).unwrap();
    }
    bench.file.heal();
    bench.write_blocking(5, 2).unwrap();
    assert_eq!(bench.first_byte(5), 2);
    bench.disk.close().unwrap();
}

/// W1: a step is 64 MiB at least, but the file may get four blocks longer.
#[test]
fn the_last_blocks_that_a_host_has_room_for_are_used() {
    let bench = Bench::with_blocks(2);
    let limit = bench.layout.end_of(6);
    for _ in 0..1000 {
        let failure = Failure::Clean(Errno::EFBIG);
        bench
            .file
            .fail(Kind::SetLen, limit + 1..u64::MAX, 0, failure);
    }
    for block in 2..6 {
        bench.write_blocking(block, 7).unwrap();
        assert_eq!(bench.first_byte(block), 7);
    }
    assert_eq!(bench.file.contents().len_bytes(), limit);
    let refused = bench.write_blocking(6, 7);
    assert!(
        matches!(refused, Err(WriteError::NoSpace { .. })),
        "{refused:?}"
    );
    bench.file.heal();
    bench.write_blocking(6, 7).unwrap();
    bench.disk.close().unwrap();
}

#[test]
fn a_punch_that_fails_is_tried_again() {
    let bench = Bench::marked(0);
    let all: Vec<_> = (0..8).map(|block| bench.ready(block, 1)).collect();
    drop(all);
    bench
        .file
        .fail(Kind::Punch, 0..u64::MAX, 0, Failure::Clean(Errno::ENOSPC));
    assert!(matches!(
        bench.write_blocking(5, 1),
        Err(WriteError::NoSpace { .. })
    ));
    assert!(!bench.disk.is_failed());
    bench.write_blocking(5, 1).unwrap();
    assert_eq!(bench.first_byte(5), 1);
}

// W6: the first write marks.

#[test]
fn the_uuid_is_new_and_durable_before_the_first_data_write_and_once_per_open() {
    let bench = Bench::with_blocks(4);
    let uuid = || Found::within(&bench.file.contents(), &bench.layout).uuid_modify;
    let before = uuid();
    let (woken, waker) = flag();
    let first = bench
        .disk
        .reserve(bench.range(0, 1), &bench.disk.lane(), &waker)
        .unwrap();
    assert!(matches!(first, Reserve::Parked));
    assert!(!woken.take());
    assert!(bench.disk.do_chores().unwrap());
    assert!(woken.take());
    let marked = uuid();
    assert_ne!(before, marked);
    let done = bench.file.done_since(Moment::START);
    let written = done.iter().position(|one| one.touched() == UUID_MODIFY);
    assert!(syncs(&done[written.unwrap()..]) > 0);

    let moment = bench.file.now();
    bench.write(0, 1).unwrap();
    bench.write(5, 1).unwrap();
    bench.disk.flush().unwrap();
    bench.disk.close().unwrap();
    let again = bench.file.done_since(moment);
    assert!(!again.iter().any(|one| one.touched() == UUID_MODIFY));
    assert_eq!(uuid(), marked);

    let disk = open(&bench.file);
    disk.write_at(bench.range(0, 1), &[2; 512]).unwrap();
    assert_ne!(uuid(), marked, "once for each open");
}

#[test]
fn a_disk_that_is_not_written_keeps_its_uuid_and_every_other_byte() {
    for access in [Access::Writable, Access::ReadOnly] {
        let bench = Bench::with_blocks(4);
        let storage = Arc::clone(&bench.file) as Arc<dyn Storage>;
        let disk = Arc::new(Disk::open(storage, access).unwrap());
        disk.read_at(bench.range(0, 300), &mut vec![0; 300 * 512])
            .unwrap();
        disk.do_chores().unwrap();
        disk.flush().unwrap();
        disk.close().unwrap();
        let done = bench.file.done_since(Moment::START);
        assert_eq!(syncs(&done), done.len(), "nothing but syncs: {done:?}");
        if access == Access::ReadOnly {
            assert!(matches!(
                disk.write_at(bench.range(0, 1), &[1; 512]),
                Err(WriteError::ReadOnly)
            ));
            assert_eq!(bench.file.done_since(Moment::START), []);
        }
    }
}

// W7: one writer per block in transition.

#[test]
fn a_second_writer_of_a_new_block_waits_for_the_first_and_both_data_survive() {
    let bench = Bench::marked(2);
    let first = bench.ready(5, 8);
    let (woken, waker) = flag();
    let second = bench
        .disk
        .capacity()
        .range(Sector(5 * BLOCK_SECTORS + 8), 8)
        .unwrap();
    let reserve = || {
        bench
            .disk
            .reserve(second, &bench.disk.lane(), &waker)
            .unwrap()
    };
    assert!(matches!(reserve(), Reserve::Parked));
    // Others do not wait.
    let other = bench.ready(6, 1);
    let in_place = bench.ready(0, 1);
    bench.transfer(&first, 1);
    assert!(!woken.take());
    bench.disk.commit(&mut vec![first]).unwrap();
    assert!(woken.take());
    let Reserve::Ready(reservation) = reserve() else {
        panic!("the block is there now");
    };
    bench.transfer(&reservation, 2);
    bench
        .disk
        .commit(&mut vec![reservation, other, in_place])
        .unwrap();

    let mut found = [0xAA; 32 * 512];
    bench.disk.read_at(bench.range(5, 32), &mut found).unwrap();
    assert!(found[..4096] == [1; 4096] && found[4096..8192] == [2; 4096]);
    assert!(found[8192..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_second_writer_goes_on_when_the_first_gives_up() {
    let bench = Bench::marked(2);
    let first = bench.ready(5, 8);
    bench.transfer(&first, 0xEE);
    let (woken, waker) = flag();
    let reserve = || {
        bench
            .disk
            .reserve(bench.range(5, 1), &bench.disk.lane(), &waker)
            .unwrap()
    };
    assert!(matches!(reserve(), Reserve::Parked));
    drop(first);
    assert!(woken.take());
    let second = bench.ready(5, 1);
    bench.transfer(&second, 2);
    bench.disk.commit(&mut vec![second]).unwrap();
    let mut found = [0xAA; 8 * 512];
    bench.disk.read_at(bench.range(5, 8), &mut found).unwrap();
    assert!(found[..512] == [2; 512] && found[512..] == [0; 7 * 512]);
}

#[test]
fn a_parked_writer_holds_nothing() {
    let bench = Bench::marked(2);
    let first = bench.ready(5, 1);
    // It wants 4 and 5, and waits for 5.
    let range = bench.range(4, 2 * BLOCK_SECTORS);
    let parked = bench
        .disk
        .reserve(range, &bench.disk.lane(), Waker::noop())
        .unwrap();
    assert!(matches!(parked, Reserve::Parked));
    let other = bench
        .disk
        .reserve(bench.range(4, 1), &bench.disk.lane(), Waker::noop())
        .unwrap();
    assert!(matches!(other, Reserve::Ready(_)));
    drop(first);
}
