//! Somebody who uses a disk in every way that its doors allow, at random: many
//! writes in flight that end in any order or fail, chores that come late, flushes that take long.
//!
//! All on one thread, so a seed always does the same. Sectors that are in flight are left alone,
//! as guests do; blocks are not.

use std::ops::Range;
use std::sync::Arc;

use vdi_core::{
    Disk, Flush, Lane, Reservation, Reserve, Sector, SectorRange, Storage, WriteError, Zeroing,
};

use super::chain::{contents, open_chain};
use super::flag::{Flag, flag};
use super::history::Moment;
use super::layout::{AT_UUID_MODIFY, Found, Layout};
use super::oracle::Oracle;
use super::parts::{parts_without, stored_parts};
use super::slow_read::SlowRead;
use super::zeros::Zeros;
use super::{SimulatedFile, index, percent};
use crate::random::Random;

/// What a workload likes.
#[derive(Clone, Copy, Debug)]
pub struct Habits {
    /// The longest write.
    pub most_sectors: u64,
    /// How many writes may be in flight.
    pub most_in_flight: usize,
    /// Whether writes are given up, as if their data could not be written.
    pub gives_up: bool,
    /// Whether ranges are zeroed and discarded.
    pub zeros: bool,
}

/// A request that has its places.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) range: SectorRange,
    data: Arc<[u8]>,
    pub(super) reservation: Reservation,
    /// Bytes of the data that are written.
    pub(super) written: u64,
    /// What comes from parents is copied.
    is_filled: bool,
    /// The parts of the disk, in bytes, that had storage before; of a write.
    in_place: Vec<Range<u64>>,
    pub(super) zeros: Option<Zeros>,
}

/// A write that waits.
#[derive(Debug)]
struct Parked {
    range: SectorRange,
    data: Arc<[u8]>,
    zeroing: Option<Zeroing>,
    flag: Arc<Flag>,
}

/// A user of a disk in a simulated file.
#[derive(Debug)]
pub struct Workload {
    /// The file, with its history.
    pub file: Arc<SimulatedFile>,
    /// What the image was at first.
    pub layout: Layout,
    /// What the disk may read as.
    pub oracle: Oracle,
    /// When somebody first could write data to the file.
    pub first_write_ever: Option<Moment>,
    /// The same, since the disk was opened last.
    first_write: Option<Moment>,
    opened: Moment,
    /// The files of its parents.
    pub parents: Vec<Arc<SimulatedFile>>,
    pub(super) disk: Arc<Disk>,
    pub(super) lane: Lane,
    pub(super) habits: Habits,
    pub(super) random: Random,
    pub(super) ready: Vec<Ready>,
    pub(super) slow_reads: Vec<SlowRead>,
    parked: Vec<Parked>,
    flush: Option<(Flush, Moment)>,
    chores: Arc<Flag>,
    writes: u64,
}

impl Workload {
    /// Opens the disk in an image that `layout` describes and that reads as `disk`.
    ///
    /// # Panics
    /// If it cannot be opened.
    #[must_use]
    pub fn open(
        file: Arc<SimulatedFile>,
        parents: Vec<Arc<SimulatedFile>>,
        layout: Layout,
        disk: Vec<u8>,
        habits: Habits,
        random: Random,
    ) -> Self {
        let (disk_opened, chores) = open(&file, &parents);
        Self {
            opened: file.now(),
            file,
            parents,
            layout,
            oracle: Oracle::new(disk),
            first_write_ever: None,
            first_write: None,
            lane: disk_opened.lane(),
            disk: disk_opened,
            habits,
            random,
            ready: Vec::new(),
            slow_reads: Vec::new(),
            parked: Vec::new(),
            flush: None,
            chores,
            writes: 0,
        }
    }

    /// The disk.
    #[must_use]
    pub const fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Does something.
    pub fn step(&mut self) {
        match self.random.within(0..100) {
            0..12 if self.habits.zeros => self.begin_zeros(),
            12..14 if self.habits.zeros => self.zero_blocking(),
            0..30 => self.begin(),
            30..50 => self.transfer_some(),
            50..62 => self.commit_some(),
            62..67 if self.habits.gives_up => self.abandon_one(),
            62..78 => self.retry_woken(),
            78..84 => self.do_chores(),
            84..89 => self.flush_some(),
            89..91 => self.write_blocking(),
            91..95 => self.begin_slow_read(),
            95..98 => self.end_slow_read(),
            _ => self.read_some(),
        }
    }

    /// Answers all that is in flight.
    ///
    /// # Panics
    /// If a write waits for what nobody will do.
    pub fn settle(&mut self) {
        while !self.slow_reads.is_empty() {
            self.end_slow_read();
        }
        while !(self.ready.is_empty() && self.parked.is_empty()) {
            let had_ready = !self.ready.is_empty();
            for nth in 0..self.ready.len() {
                self.transfer(nth, u64::MAX);
            }
            self.commit(|_| true);
            let did_chores = self.do_called_chores();
            let was_woken = self.retry_woken_all();
            assert!(
                had_ready || did_chores || was_woken,
                "W7: {} writes wait for nothing",
                self.parked.len()
            );
        }
        if let Some((flush, begun)) = self.flush.take() {
            self.end_flush(flush, begun);
        }
    }

    /// Closes the disk and looks at what is left; then opens it again.
    pub fn close_and_reopen(&mut self) {
        self.settle();
        let begun = self.file.note();
        self.disk.close().expect("nothing was made to fail");
        self.oracle.flush(begun, self.file.note());
        self.check_closed();
        self.reopen();
    }

    /// Dies with all that is in flight; then opens the disk again.
    pub fn die_and_reopen(&mut self) {
        self.flush = None;
        self.slow_reads.clear();
        while !self.ready.is_empty() {
            self.abandon(0);
        }
        self.parked.clear();
        self.reopen();
    }

    /// Whether all of the disk reads as it should.
    ///
    /// # Panics
    /// If not.
    pub fn check_all(&self) {
        self.check(0, &contents(&self.disk));
    }

    /// Whether what was read from a byte of the disk on is right.
    fn check(&self, start: u64, found: &[u8]) {
        let expected = &self.oracle.now()[index(start)..][..found.len()];
        if found == expected {
            return;
        }
        let zeros = self.zeros_in_flight();
        let sectors = found.chunks(512).zip(expected.chunks(512));
        for (at, (found, expected)) in (start..).step_by(512).zip(sectors) {
            let may_be_zeros = zeros.iter().any(|range| range.contains(&at));
            let is_zero = found.iter().all(|&byte| byte == 0);
            assert!(
                found == expected || (may_be_zeros && is_zero),
                "sector {} is {:?}.., should be {:?}..",
                at / 512,
                &found[..8],
                &expected[..8]
            );
        }
    }

    fn reopen(&mut self) {
        self.first_write = None;
        let (disk, chores) = open(&self.file, &self.parents);
        self.opened = self.file.now();
        self.lane = disk.lane();
        self.disk = disk;
        self.chores = chores;
    }

    /// After a clean close others find an image that is exact.
    fn check_closed(&self) {
        let contents = self.file.contents();
        let found = Found::within(&contents, &self.layout);
        let harm = found.harm(&self.layout);
        if self.first_write.is_some() {
            assert_eq!(harm, None);
            let end = found.owned_end();
            assert_eq!(found.blocks_allocated, end, "W1: the count is exact");
            if !self.layout.has_hidden_blocks() {
                assert_eq!(found.owned(), end, "W4: there are no holes");
            }
            let exact = self.layout.end_of(end);
            let is_cut_off = self.layout.file_len < exact && found.file_len < exact;
            assert!(
                found.file_len == exact
                    || (is_cut_off && found.owned_end() <= self.layout.owned_end()),
                "W1: the file has {} bytes, its blocks end at {exact}",
                found.file_len
            );
        }
    }

    /// From the first write on an image is marked.
    pub(super) fn note_first_write(&mut self) {
        let marks = |one: &super::Operation| {
            let touched = one.touched();
            touched.start <= AT_UUID_MODIFY && AT_UUID_MODIFY < touched.end
        };
        if self.first_write.is_none() && self.file.done_since(self.opened).iter().any(marks) {
            let now = self.file.note();
            self.first_write_ever.get_or_insert(now);
            self.first_write = Some(now);
        }
    }

    pub(super) fn any_range(&mut self) -> SectorRange {
        let sectors = self.disk.capacity().sectors();
        let most = match self.random.within(0..10) {
            0..6 => 8,
            6..9 => 128,
            _ => self.habits.most_sectors,
        };
        let count = self
            .random
            .within(1..most.min(self.habits.most_sectors).min(sectors) + 1);
        let mut start = self.random.within(0..sectors - count + 1);
        let block = u64::from(self.layout.block_size) / 512;
        if percent(&mut self.random, 30) {
            // Near the end of a block.
            let near = (start / block + 1) * block;
            let near = near.saturating_sub(self.random.within(0..count + 1));
            start = near.min(sectors - count);
        }
        let range = self.disk.capacity().range(Sector(start), count);
        range.expect("it ends on the disk")
    }

    fn any_data(&mut self, range: SectorRange) -> Arc<[u8]> {
        self.writes += 1;
        let tag = self.random.number();
        let mut data = vec![0; index(range.len_bytes())];
        for (sector, bytes) in (range.start().0..).zip(data.chunks_mut(512)) {
            bytes.fill(tag.to_le_bytes()[0]);
            bytes[..8].copy_from_slice(&self.writes.to_le_bytes());
            bytes[8..16].copy_from_slice(&sector.to_le_bytes());
            bytes[504..].copy_from_slice(&tag.to_le_bytes());
        }
        data.into()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.ready.len() + self.parked.len()
    }

    /// Whether nothing is under way that a blocking call could wait for.
    pub(super) fn may_block(&self) -> bool {
        self.ready.is_empty() && self.slow_reads.is_empty()
    }

    pub(super) fn is_in_flight(&self, range: SectorRange) -> bool {
        let flying = self.ready.iter().map(|one| one.range);
        let waiting = self.parked.iter().map(|one| one.range);
        flying.chain(waiting).any(|other| {
            let (start, end) = (range.start().0, range.start().0 + range.count());
            other.start().0 < end && start < other.start().0 + other.count()
        })
    }

    fn begin(&mut self) {
        let range = self.any_range();
        let is_full = self.in_flight() >= self.habits.most_in_flight;
        if is_full || self.is_in_flight(range) {
            return;
        }
        let data = self.any_data(range);
        self.reserve(range, data, None);
    }

    pub(super) fn reserve(
        &mut self,
        range: SectorRange,
        data: Arc<[u8]>,
        zeroing: Option<Zeroing>,
    ) {
        let in_place = match zeroing {
            None => stored_parts(&self.disk, range),
            // What becomes zeros, and when, is not its user's affair.
            Some(_) => std::iter::once(range.start_bytes()..range.end_bytes()).collect(),
        };
        let zeros = zeroing.map(|how| Zeros {
            how,
            may_stay: self.may_stay(range, how),
        });
        let (flag, waker) = flag();
        let reserved = match zeroing {
            None => self.disk.reserve(range, &self.lane, &waker),
            Some(how) => self.disk.reserve_zeros(range, how, &self.lane, &waker),
        };
        match reserved {
            Ok(Reserve::Ready(reservation)) => {
                self.note_first_write();
                let now = self.file.note();
                if zeros.is_some() {
                    self.tell_slow_reads(&(range.start_bytes()..range.end_bytes()));
                }
                for part in &in_place {
                    self.oracle.begin(range.start_bytes(), &data, part, now);
                }
                self.ready.push(Ready {
                    range,
                    data,
                    reservation,
                    written: 0,
                    is_filled: false,
                    in_place,
                    zeros,
                });
            }
            Ok(Reserve::Parked) => self.parked.push(Parked {
                range,
                data,
                zeroing,
                flag,
            }),
            Err(error) => panic!("a write is refused: {error}"),
        }
    }

    fn retry_woken(&mut self) {
        if !self.parked.is_empty() {
            let nth = index(self.random.within(0..self.parked.len() as u64));
            if self.parked[nth].flag.take() {
                let one = self.parked.swap_remove(nth);
                self.reserve(one.range, one.data, one.zeroing);
            }
        }
    }

    fn retry_woken_all(&mut self) -> bool {
        let all = std::mem::take(&mut self.parked);
        let (woken, parked): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| one.flag.take());
        self.parked = parked;
        let was_woken = !woken.is_empty();
        for one in woken {
            self.reserve(one.range, one.data, one.zeroing);
        }
        was_woken
    }

    fn transfer_some(&mut self) {
        if !self.ready.is_empty() {
            let nth = index(self.random.within(0..self.ready.len() as u64));
            let all = percent(&mut self.random, 70);
            let sectors = self.ready[nth].range.count();
            let some = self.random.within(0..sectors + 1) * 512;
            if percent(&mut self.random, 30) {
                self.fill(nth);
            }
            self.transfer(nth, if all { u64::MAX } else { some });
        }
    }

    /// Writes the data of a write up to a number of bytes.
    fn transfer(&mut self, nth: usize, up_to: u64) {
        if self.ready[nth].zeros.is_some() {
            self.transfer_zeros(nth);
            return;
        }
        let one = &mut self.ready[nth];
        let up_to = up_to.min(one.range.len_bytes());
        let mut before = 0;
        for extent in one.reservation.extents() {
            let from = one.written.max(before);
            let to = up_to.min(before + extent.len_bytes);
            if from < to {
                let bytes = &one.data[index(from)..index(to)];
                let at = extent.at.plus(from - before);
                let done = self.file.write_all_at(bytes, at);
                done.expect("nothing was made to fail");
            }
            before += extent.len_bytes;
        }
        assert_eq!(before, one.range.len_bytes(), "the extents hold the data");
        let start = one.range.start_bytes();
        let written = start + one.written..start + up_to.max(one.written);
        one.written = one.written.max(up_to);
        for part in &one.in_place {
            let part = part.start.max(written.start)..part.end.min(written.end);
            if part.start < part.end {
                self.oracle.show(start, &one.data, &part);
            }
        }
    }

    /// Copies what comes from parents.
    fn fill(&mut self, nth: usize) {
        let one = &mut self.ready[nth];
        if std::mem::replace(&mut one.is_filled, true) {
            return;
        }
        for fill in one.reservation.fills() {
            let mut bytes = vec![0; index(fill.len_bytes)];
            let parent = &self.parents[fill.depth - 1];
            let read = parent.read_exact_at(&mut bytes, fill.from);
            read.expect("nothing was made to fail");
            let written = self.file.write_all_at(&bytes, fill.to);
            written.expect("nothing was made to fail");
        }
    }

    /// W2: data over a parent's are synced first.
    fn sync_data(&self, reservations: &mut [Reservation]) {
        if reservations.iter().any(Reservation::needs_sync) {
            let flush = self.disk.begin_data_sync();
            let synced = self.file.sync();
            let ended = self.disk.end_data_sync(flush, synced, reservations);
            ended.expect("nothing was made to fail");
        }
    }

    fn commit_some(&mut self) {
        let luck = self.random.within(0..2);
        let mut random = self.random.fork();
        self.commit(|one| {
            let is_done = one.written == one.range.len_bytes();
            is_done && (luck == 0 || percent(&mut random, 50))
        });
    }

    /// Commits the writes that were chosen in one batch.
    fn commit(&mut self, choose: impl FnMut(&Ready) -> bool) {
        for nth in 0..self.ready.len() {
            if self.ready[nth].written == self.ready[nth].range.len_bytes() {
                self.fill(nth);
            }
        }
        let all = std::mem::take(&mut self.ready);
        let (mut chosen, left): (Vec<_>, Vec<_>) = all.into_iter().partition(choose);
        self.ready = left;
        if chosen.is_empty() {
            return;
        }
        for at in (1..chosen.len()).rev() {
            chosen.swap(at, index(self.random.within(0..at as u64 + 1)));
        }
        let begun = self.file.note();
        let mut reservations = Vec::new();
        let mut writes = Vec::new();
        for one in chosen {
            let start = one.range.start_bytes();
            let whole = start..start + one.range.len_bytes();
            for part in parts_without(whole.clone(), &one.in_place) {
                self.oracle.begin(start, &one.data, &part, begun);
            }
            reservations.push(one.reservation);
            writes.push((one.range, one.data, one.zeros));
        }
        self.sync_data(&mut reservations);
        let done = self.disk.commit(&mut reservations);
        done.expect("nothing was made to fail");
        assert!(reservations.is_empty(), "commit takes all");
        for (range, data, zeros) in writes {
            if let Some(zeros) = zeros {
                self.answer_zeros(range, &data, &zeros);
                continue;
            }
            let whole = range.start_bytes()..range.end_bytes();
            self.oracle.show(whole.start, &data, &whole);
            self.oracle.answer(whole.start, &data, self.file.note());
        }
    }

    fn abandon_one(&mut self) {
        if !self.ready.is_empty() {
            let nth = index(self.random.within(0..self.ready.len() as u64));
            self.abandon(nth);
        }
    }

    /// A data write failed: what it wrote in place may be there, what it wrote to new
    /// blocks is not to be seen ever.
    fn abandon(&mut self, nth: usize) {
        let one = self.ready.swap_remove(nth);
        drop(one.reservation);
        if one.zeros.is_some() {
            let _zeros = self.learn(one.range);
        }
    }

    fn do_chores(&mut self) {
        if percent(&mut self.random, 20) {
            self.disk.do_chores().expect("nothing was made to fail");
        } else {
            self.do_called_chores();
        }
    }

    fn do_called_chores(&self) -> bool {
        let called = self.chores.take();
        if called {
            self.disk.do_chores().expect("nothing was made to fail");
        }
        called
    }

    fn flush_some(&mut self) {
        if let Some((flush, begun)) = self.flush.take() {
            self.end_flush(flush, begun);
            return;
        }
        let begun = self.file.note();
        match self.disk.begin_flush().expect("nothing was made to fail") {
            Some(flush) if percent(&mut self.random, 50) => self.flush = Some((flush, begun)),
            Some(flush) => self.end_flush(flush, begun),
            None => self.oracle.flush(begun, self.file.note()),
        }
    }

    fn end_flush(&mut self, flush: Flush, begun: Moment) {
        let done = self.disk.end_flush(flush, self.file.sync());
        done.expect("nothing was made to fail");
        self.oracle.flush(begun, self.file.note());
    }

    /// On the convenient road. It waits, so there may be nothing that it could wait for.
    fn write_blocking(&mut self) {
        if !self.may_block() {
            return;
        }
        let range = self.any_range();
        if self.is_in_flight(range) {
            return;
        }
        let data = self.any_data(range);
        let start = range.start_bytes();
        let whole = start..start + range.len_bytes();
        let begun = self.file.note();
        self.oracle.begin(start, &data, &whole, begun);
        let done: Result<(), WriteError> = self.disk.write_at(range, &data);
        done.expect("nothing was made to fail");
        self.note_first_write();
        self.oracle.show(start, &data, &whole);
        self.oracle.answer(start, &data, self.file.note());
    }

    fn read_some(&mut self) {
        let range = self.any_range();
        let mut found = vec![1; index(range.len_bytes())];
        let done = self.disk.read_at(range, &mut found);
        done.expect("nothing was made to fail");
        self.check(range.start_bytes(), &found);
    }
}

fn open(file: &Arc<SimulatedFile>, parents: &[Arc<SimulatedFile>]) -> (Arc<Disk>, Arc<Flag>) {
    let disk = open_chain(file, parents).expect("the images are right");
    let (chores, waker) = flag();
    disk.set_housekeeper(waker);
    (Arc::new(disk), chores)
}
