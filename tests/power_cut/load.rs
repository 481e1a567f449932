//! A driver that uses a disk in all ways at once, and knows what it may read as.

use std::sync::Arc;

use vdi_tests::driver::{Answer, Driver, Layout, Request, Segment, Token};
use vdi_tests::random::Random;
use vdi_tests::recorded::Recorded;
use vdi_tests::simulated::{Moment, Oracle, percent};

/// What a driver likes to do, in so many of a hundred requests; the rest are writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    pub(crate) flushes: u64,
    pub(crate) discards: u64,
    pub(crate) zeroes: u64,
    pub(crate) reads: u64,
    pub(crate) most_in_flight: usize,
    pub(crate) most_sectors: u64,
    /// Writes are durable when they are answered.
    pub(crate) write_through: bool,
    /// Writes go to blocks that were not written before, as long as there are some.
    pub(crate) spreads: bool,
}

impl Habits {
    /// Some of everything.
    pub(crate) const ALL: Self = Self {
        flushes: 8,
        discards: 8,
        zeroes: 6,
        reads: 8,
        most_in_flight: 10,
        most_sectors: 40,
        write_through: false,
        spreads: false,
    };
}

#[derive(Debug)]
enum Asked {
    Write,
    Zeroes,
    Discard,
    Flush,
    /// With what it must find.
    Read(Vec<u8>),
}

/// A request in flight.
#[derive(Debug)]
struct Pending {
    queue: usize,
    token: Token,
    asked: Asked,
    /// Where on the disk, in bytes.
    start: u64,
    data: Arc<[u8]>,
    begun: Moment,
}

/// The driver at work.
pub(crate) struct Load<'f> {
    files: &'f Recorded,
    driver: Driver,
    pub(crate) oracle: Oracle,
    habits: Habits,
    random: Random,
    block_sectors: u64,
    pending: Vec<Pending>,
    next_block: u64,
    /// Requests that were answered.
    pub(crate) answered: u64,
    tag: u64,
}

impl<'f> Load<'f> {
    pub(crate) fn new(
        files: &'f Recorded,
        driver: Driver,
        oracle: Oracle,
        habits: Habits,
        block_size: u64,
        random: Random,
    ) -> Self {
        Self {
            files,
            driver,
            oracle,
            habits,
            random,
            block_sectors: block_size / 512,
            pending: Vec::new(),
            next_block: 0,
            answered: 0,
            tag: 0,
        }
    }

    fn sectors(&self) -> u64 {
        self.oracle.now().len() as u64 / 512
    }

    /// Makes so many requests and waits for the last answers.
    pub(crate) fn run(&mut self, requests: u64) {
        for _ in 0..requests {
            self.submit_any();
            let is_full = self.pending.len() >= self.habits.most_in_flight;
            if is_full || percent(&mut self.random, 25) {
                self.reap();
            }
        }
        while !self.pending.is_empty() {
            self.reap();
        }
    }

    /// Flushes before anything else is done; gives the moment after that.
    pub(crate) fn flush(&mut self) -> Moment {
        self.submit(Asked::Flush, 0, Arc::new([]), &Request::flush());
        while !self.pending.is_empty() {
            self.reap();
        }
        self.files.note()
    }

    /// The guest switches write-back off.
    pub(crate) fn write_through_from_now_on(&mut self) {
        self.driver.set_writeback(false).unwrap();
        self.habits.write_through = true;
    }

    /// Ends using the disk; gives what is known of it.
    pub(crate) fn end(self) -> (Driver, Oracle) {
        (self.driver, self.oracle)
    }

    fn submit_any(&mut self) {
        let habits = self.habits;
        let mut dice = self.random.within(0..100);
        let mut is = |chance: u64| {
            let hit = dice < chance;
            dice = dice.wrapping_sub(chance);
            hit
        };
        if is(habits.flushes) {
            self.submit(Asked::Flush, 0, Arc::new([]), &Request::flush());
        } else if is(habits.discards) {
            self.submit_zeros(true);
        } else if is(habits.zeroes) {
            self.submit_zeros(false);
        } else if is(habits.reads) {
            self.submit_read();
        } else {
            self.submit_write();
        }
    }

    fn submit(&mut self, asked: Asked, start: u64, data: Arc<[u8]>, request: &Request) {
        let queue = usize::try_from(self.random.within(0..self.driver.queues.len() as u64));
        let queue = queue.unwrap();
        let begun = self.files.note();
        if matches!(asked, Asked::Write | Asked::Zeroes | Asked::Discard) {
            let whole = start..start + data.len() as u64;
            self.oracle.begin(start, &data, &whole, begun);
        }
        let token = self.driver.queues[queue].submit(request, &Layout::framed());
        self.pending.push(Pending {
            queue,
            token,
            asked,
            start,
            data,
            begun,
        });
    }

    /// Mostly in a few blocks, so that they meet; sometimes across blocks.
    fn any_range(&mut self) -> Option<(u64, u64)> {
        let sectors = self.sectors();
        let blocks = sectors.div_ceil(self.block_sectors);
        let block = if self.habits.spreads && self.next_block < blocks {
            self.next_block += 1;
            self.next_block - 1
        } else if percent(&mut self.random, 60) {
            self.random.within(0..blocks.min(6)) * blocks.div_ceil(6).min(5) % blocks
        } else {
            self.random.within(0..blocks)
        };
        let count = 1 + self.random.within(0..self.habits.most_sectors);
        let skip = self.random.within(0..self.block_sectors);
        let start = (block * self.block_sectors + skip).min(sectors - 1);
        let count = count.min(sectors - start);
        let range = start * 512..(start + count) * 512;
        let meets = |one: &Pending| {
            let end = one.start + one.data.len() as u64;
            one.start < range.end && range.start < end
        };
        (!self.pending.iter().any(meets)).then_some((start, count))
    }

    fn submit_write(&mut self) {
        let Some((sector, count)) = self.any_range() else {
            return;
        };
        // Each sector of each write is like no other, and not zeros.
        let mut bytes = Vec::new();
        for nth in 0..count {
            self.tag += 1;
            let words = [self.tag, sector + nth, !self.tag, 0xDA7A_DA7A];
            let stamp: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            bytes.extend(stamp.repeat(16));
        }
        let request = Request::write(sector, bytes.clone());
        self.submit(Asked::Write, sector * 512, bytes.into(), &request);
    }

    fn submit_zeros(&mut self, discards: bool) {
        let Some((mut sector, mut count)) = self.any_range() else {
            return;
        };
        if percent(&mut self.random, 60) {
            // A whole block, which alone is released.
            let start = sector / self.block_sectors * self.block_sectors;
            let whole = self.block_sectors.min(self.sectors() - start);
            let range = start * 512..(start + whole) * 512;
            let meets = |one: &Pending| {
                one.start < range.end && range.start < one.start + one.data.len() as u64
            };
            if !self.pending.iter().any(meets) {
                (sector, count) = (start, whole);
            }
        }
        let mut segment = Segment::new(sector, u32::try_from(count).unwrap());
        let data: Arc<[u8]> = vec![0; usize::try_from(count * 512).unwrap()].into();
        if discards {
            let request = Request::discard(&[segment]);
            self.submit(Asked::Discard, sector * 512, data, &request);
        } else {
            if percent(&mut self.random, 50) {
                segment = segment.unmap();
            }
            let request = Request::write_zeroes(&[segment]);
            self.submit(Asked::Zeroes, sector * 512, data, &request);
        }
    }

    fn submit_read(&mut self) {
        let Some((sector, count)) = self.any_range() else {
            return;
        };
        let range = usize::try_from(sector * 512).unwrap()..;
        let len = usize::try_from(count * 512).unwrap();
        let expected = self.oracle.now()[range][..len].to_vec();
        // Known to the others, so that none of them changes it meanwhile.
        let data = vec![0; len].into();
        let request = Request::read(sector, u32::try_from(len).unwrap());
        self.submit(Asked::Read(expected), sector * 512, data, &request);
    }

    /// Takes the answers that are there; waits for one if there is none.
    fn reap(&mut self) {
        let mut found = Vec::new();
        for (nth, queue) in self.driver.queues.iter_mut().enumerate() {
            found.extend(queue.answered().into_iter().map(|one| (nth, one)));
        }
        if found.is_empty()
            && let Some(first) = self.pending.first()
        {
            let (queue, token) = (first.queue, first.token);
            found.push((queue, (token, self.driver.queues[queue].wait(token))));
        }
        for (queue, (token, answer)) in found {
            let is_it = |one: &Pending| one.queue == queue && one.token == token;
            let nth = self.pending.iter().position(is_it).unwrap();
            let one = self.pending.remove(nth);
            self.take_answer(one, &answer);
        }
    }

    fn take_answer(&mut self, one: Pending, answer: &Answer) {
        assert_eq!(answer.status, 0, "{:?} at {}", one.asked, one.start);
        self.answered += 1;
        let whole = one.start..one.start + one.data.len() as u64;
        let answered = self.files.note();
        match one.asked {
            Asked::Flush => return self.oracle.flush(one.begun, answered),
            Asked::Read(expected) => {
                assert!(answer.data == expected, "a read at {} is wrong", one.start);
                return;
            }
            Asked::Write | Asked::Zeroes => {
                self.oracle.show(one.start, &one.data, &whole);
                self.oracle.answer(one.start, &one.data, answered);
            }
            Asked::Discard => self.learn_discarded(&one, answered),
        }
        if self.habits.write_through {
            let covered = self.files.note();
            self.oracle.flush(covered, self.files.note());
        }
    }

    /// A discarded sector is zeros now, or as it was.
    fn learn_discarded(&mut self, one: &Pending, answered: Moment) {
        let len = u32::try_from(one.data.len()).unwrap();
        let queue = &mut self.driver.queues[one.queue];
        let read = queue.submit(&Request::read(one.start / 512, len), &Layout::framed());
        let found = queue.wait(read).expect_ok();
        for (at, sector) in (one.start..).step_by(512).zip(found.chunks(512)) {
            let from = usize::try_from(at).unwrap();
            if sector.iter().all(|&byte| byte == 0) {
                let part = at..at + 512;
                self.oracle.show(at, sector, &part);
                self.oracle.answer_part(&part, &one.data, answered);
            } else {
                assert!(
                    sector == &self.oracle.now()[from..from + 512],
                    "a discarded sector at {at} is neither"
                );
            }
        }
    }
}
