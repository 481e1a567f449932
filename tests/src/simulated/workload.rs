//! Somebody who uses a disk in every way that its doors allow, at random: many
//! writes in flight that end in any order or fail, chores that come late, flushes that take long.
//!
//! All on one thread, so a seed always does the same. Sectors that are in flight are left alone,
//! as guests do; blocks are not.

use std::ops::Range;
use std::sync::Arc;

use vdi_core::{
    Access, Disk, Flush, Reservation, Reserve, Sector, SectorRange, Storage, WriteError,
};

use super::flag::{Flag, flag};
use super::history::Moment;
use super::layout::{Found, Layout};
use super::oracle::Oracle;
use super::parts::{parts_without, stored_parts};
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
}

/// A write that has its places.
#[derive(Debug)]
struct Ready {
    range: SectorRange,
    data: Arc<[u8]>,
    reservation: Reservation,
    /// Bytes of the data that are written.
    written: u64,
    /// The parts of the disk, in bytes, that had storage before.
    in_place: Vec<Range<u64>>,
}

/// A write that waits.
#[derive(Debug)]
struct Parked {
    range: SectorRange,
    data: Arc<[u8]>,
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
    disk: Arc<Disk>,
    habits: Habits,
    random: Random,
    ready: Vec<Ready>,
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
        layout: Layout,
        disk: Vec<u8>,
        habits: Habits,
        random: Random,
    ) -> Self {
        let (opened, chores) = open(&file);
        Self {
            file,
            layout,
            oracle: Oracle::new(disk),
            first_write_ever: None,
            first_write: None,
            disk: opened,
            habits,
            random,
            ready: Vec::new(),
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
            0..30 => self.begin(),
            30..50 => self.transfer_some(),
            50..62 => self.commit_some(),
            62..67 if self.habits.gives_up => self.abandon_one(),
            62..80 => self.retry_woken(),
            80..87 => self.do_chores(),
            87..93 => self.flush_some(),
            93..95 => self.write_blocking(),
            _ => self.read_some(),
        }
    }

    /// Answers all that is in flight.
    ///
    /// # Panics
    /// If a write waits for what nobody will do.
    pub fn settle(&mut self) {
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
        let mut found = vec![1; self.oracle.now().len()];
        let all = self.disk.read_at(self.disk.capacity().whole(), &mut found);
        all.expect("nothing was made to fail");
        if found != self.oracle.now() {
            let is_wrong = |(_, (a, b)): &(usize, (&u8, &u8))| a != b;
            let pairs = found.iter().zip(self.oracle.now()).enumerate();
            let (at, (found, expected)) = pairs.clone().find(is_wrong).expect("they differ");
            let wrong = pairs.filter(is_wrong).count();
            panic!("byte {at} is {found}, should be {expected}; {wrong} bytes are wrong");
        }
    }

    fn reopen(&mut self) {
        self.first_write = None;
        let (disk, chores) = open(&self.file);
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

    fn any_range(&mut self) -> SectorRange {
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

    fn is_in_flight(&self, range: SectorRange) -> bool {
        let flying = self.ready.iter().map(|one| one.range);
        let waiting = self.parked.iter().map(|one| one.range);
        flying.chain(waiting).any(|other| {
            let (start, end) = (range.start().0, range.start().0 + range.count());
            other.start().0 < end && start < other.start().0 + other.count()
        })
    }

    fn begin(&mut self) {
        let range = self.any_range();
        let is_full = self.ready.len() + self.parked.len() >= self.habits.most_in_flight;
        if is_full || self.is_in_flight(range) {
            return;
        }
        let data = self.any_data(range);
        self.reserve(range, data);
    }

    fn reserve(&mut self, range: SectorRange, data: Arc<[u8]>) {
        let in_place = stored_parts(&self.disk, range);
        let (flag, waker) = flag();
        match self.disk.reserve(range, &self.disk.lane(), &waker) {
            Ok(Reserve::Ready(reservation)) => {
                let now = self.file.note();
                self.first_write_ever.get_or_insert(now);
                self.first_write.get_or_insert(now);
                for part in &in_place {
                    self.oracle.begin(range.start_bytes(), &data, part, now);
                }
                self.ready.push(Ready {
                    range,
                    data,
                    reservation,
                    written: 0,
                    in_place,
                });
            }
            Ok(Reserve::Parked) => self.parked.push(Parked { range, data, flag }),
            Err(error) => panic!("a write is refused: {error}"),
        }
    }

    fn retry_woken(&mut self) {
        if !self.parked.is_empty() {
            let nth = index(self.random.within(0..self.parked.len() as u64));
            if self.parked[nth].flag.take() {
                let one = self.parked.swap_remove(nth);
                self.reserve(one.range, one.data);
            }
        }
    }

    fn retry_woken_all(&mut self) -> bool {
        let all = std::mem::take(&mut self.parked);
        let (woken, parked): (Vec<_>, Vec<_>) = all.into_iter().partition(|one| one.flag.take());
        self.parked = parked;
        let was_woken = !woken.is_empty();
        for one in woken {
            self.reserve(one.range, one.data);
        }
        was_woken
    }

    fn transfer_some(&mut self) {
        if !self.ready.is_empty() {
            let nth = index(self.random.within(0..self.ready.len() as u64));
            let all = percent(&mut self.random, 70);
            let sectors = self.ready[nth].range.count();
            let some = self.random.within(0..sectors + 1) * 512;
            self.transfer(nth, if all { u64::MAX } else { some });
        }
    }

    /// Writes the data of a write up to a number of bytes.
    fn transfer(&mut self, nth: usize, up_to: u64) {
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
            writes.push((whole, one.data));
        }
        let done = self.disk.commit(&mut reservations);
        done.expect("nothing was made to fail");
        assert!(reservations.is_empty(), "commit takes all");
        for (whole, data) in writes {
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
        drop(self.ready.swap_remove(nth));
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
        if !self.ready.is_empty() {
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
        self.first_write_ever.get_or_insert(self.file.note());
        self.first_write.get_or_insert(self.file.note());
        self.oracle.show(start, &data, &whole);
        self.oracle.answer(start, &data, self.file.note());
    }

    fn read_some(&mut self) {
        let range = self.any_range();
        let mut found = vec![1; index(range.len_bytes())];
        let done = self.disk.read_at(range, &mut found);
        done.expect("nothing was made to fail");
        let start = range.start_bytes();
        let expected = &self.oracle.now()[index(start)..index(start + range.len_bytes())];
        assert!(found == expected, "{range:?} reads wrong");
    }
}

fn open(file: &Arc<SimulatedFile>) -> (Arc<Disk>, Arc<Flag>) {
    let storage: Arc<dyn Storage> = Arc::clone(file) as Arc<dyn Storage>;
    let disk = Disk::open(storage, Access::Writable).expect("the image is right");
    let (chores, waker) = flag();
    disk.set_housekeeper(waker);
    (Arc::new(disk), chores)
}
