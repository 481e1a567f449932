//! What was done to a file, and what could be left of it after a crash.
//!
//! The rules of a power cut:
//!
//! - What ended before a successful sync began is durable when that sync has ended. After a failed sync,
//!   what it should have covered is never durable, whatever a later one says: that is how
//!   Linux behaves.
//! - Of the rest each piece of 512 bytes has reached the disk in any of the versions
//!   that were written since, independently of all others: writes are lost, torn and reordered.
//! - So has the length, independently of the bytes.
//!
//! A record begins and ends at different moments, so that programs with many
//! operations in flight can keep a history too: `begin` when one is handed to the kernel, `end` when
//! its completion was seen.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use super::contents::Contents;
use super::percent;
use super::replay::Replay;
use crate::random::Random;

const PIECE: u64 = 512;

/// A point in time: before the event of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub(super) usize);

impl Moment {
    /// Before all that was done.
    pub const START: Self = Self(0);

    /// The moment after it.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// What can be done to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the file operations")]
pub enum Operation {
    Write {
        at: u64,
        bytes: Arc<[u8]>,
    },
    SetLen(u64),
    Punch(Range<u64>),
    Sync,
    /// A sync of the length and of what was written there.
    SyncOf(Range<u64>),
    FailedSync,
}

impl Operation {
    /// The bytes that it changes, its length aside.
    #[must_use]
    pub fn touched(&self) -> Range<u64> {
        match self {
            Self::Write { at, bytes } => *at..at + bytes.len() as u64,
            Self::Punch(range) => range.clone(),
            Self::SetLen(_) | Self::Sync | Self::SyncOf(_) | Self::FailedSync => 0..0,
        }
    }

    /// Whether it changes the length alone, or bytes of `range` alone.
    pub(super) fn is_inside(&self, range: &Range<u64>) -> bool {
        let touched = self.touched();
        let is_there = range.start <= touched.start && touched.end <= range.end;
        self.new_len().is_some() || (is_there && !touched.is_empty())
    }

    /// The length that it sets.
    #[must_use]
    pub const fn new_len(&self) -> Option<u64> {
        match self {
            Self::SetLen(len) => Some(*len),
            Self::Write { .. }
            | Self::Punch(_)
            | Self::Sync
            | Self::SyncOf(_)
            | Self::FailedSync => None,
        }
    }

    /// Does it.
    pub(crate) fn apply(&self, contents: &mut Contents) {
        match self {
            Self::Write { at, bytes } => contents.write(*at, bytes),
            Self::SetLen(len) => contents.set_len(*len),
            Self::Punch(range) => contents.zero(range.clone()),
            Self::Sync | Self::SyncOf(_) | Self::FailedSync => {}
        }
    }
}

/// An operation and when it was in flight.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub(super) operation: Operation,
    pub(super) begun: usize,
    pub(super) ended: Option<usize>,
}

/// All that was done to a file.
#[derive(Clone, Debug)]
pub struct History {
    start: Contents,
    pub(super) records: Vec<Record>,
    clock: usize,
}

/// The number of a record.
#[derive(Clone, Copy, Debug)]
#[must_use = "an operation ends"]
pub struct InFlight(usize);

impl History {
    /// Nothing was done yet to a file that holds `start`, durably.
    #[must_use]
    pub const fn new(start: Contents) -> Self {
        Self {
            start,
            records: Vec::new(),
            clock: 0,
        }
    }

    /// The file at first.
    #[must_use]
    pub const fn start(&self) -> &Contents {
        &self.start
    }

    /// An operation begins.
    pub fn begin(&mut self, operation: Operation) -> InFlight {
        self.records.push(Record {
            operation,
            begun: self.clock,
            ended: None,
        });
        self.clock += 1;
        InFlight(self.records.len() - 1)
    }

    /// An operation has ended well.
    pub fn end(&mut self, record: InFlight) {
        self.records[record.0].ended = Some(self.clock);
        self.clock += 1;
    }

    /// The present.
    #[must_use]
    pub const fn now(&self) -> Moment {
        Moment(self.clock)
    }

    /// Something else happens, at a moment of its own.
    pub fn note(&mut self) -> Moment {
        self.clock += 1;
        Moment(self.clock - 1)
    }

    /// Nothing happens to this file until `moment`: several files can keep their histories by one clock.
    pub fn wait_until(&mut self, moment: Moment) {
        self.clock = self.clock.max(moment.0);
    }

    /// All moments, from before the first operation to the present. Between two neighbours
    /// one thing happens.
    pub fn moments(&self) -> impl Iterator<Item = Moment> + use<> {
        (0..=self.clock).map(Moment)
    }

    /// What was begun since.
    pub fn since(&self, moment: Moment) -> impl Iterator<Item = &Operation> {
        self.records
            .iter()
            .filter(move |record| record.begun >= moment.0)
            .map(|record| &record.operation)
    }

    /// All that was done before `moment`, one operation a line.
    #[must_use]
    pub fn tell_until(&self, moment: Moment) -> String {
        let before = self.records.iter().filter(|one| one.begun < moment.0);
        let tell = |one: &Record| {
            let (begun, ended) = (one.begun, one.ended);
            let what = match &one.operation {
                Operation::Write { at, bytes } => format!("write {at}+{}", bytes.len()),
                other => format!("{other:?}"),
            };
            format!("{begun}..{ended:?} {what}\n")
        };
        before.map(tell).collect()
    }

    /// The file when the program is killed at `moment`: all that had ended, and any
    /// part of what was in flight.
    #[must_use]
    pub fn killed_at(&self, moment: Moment, random: &mut Random) -> Contents {
        let mut contents = self.start.clone();
        for record in self
            .records
            .iter()
            .take_while(|record| record.begun < moment.0)
        {
            let ended = record.ended.is_some_and(|ended| ended < moment.0);
            match &record.operation {
                Operation::Write { at, bytes } if !ended => {
                    let pages = (bytes.len() as u64).div_ceil(PIECE);
                    let done = random.within(0..pages + 1) * PIECE;
                    contents.write(*at, &bytes[..bytes.len().min(super::index(done))]);
                }
                operation if ended || percent(random, 50) => operation.apply(&mut contents),
                _ => {}
            }
        }
        contents
    }

    /// What the power can be cut at.
    #[must_use]
    pub fn at(&self, moment: Moment) -> CutPoint<'_> {
        Replay::new(self).advance(moment)
    }
}

/// A moment at which the power may be cut: what is durable, and what may be.
#[derive(Debug)]
pub struct CutPoint<'h> {
    pub(super) base: Contents,
    /// Those that are newer than the oldest pending one.
    pub(super) durable: Vec<&'h Record>,
    pub(super) pending: Vec<&'h Record>,
}

/// Which of the pending operations have reached the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// None.
    Nothing,
    /// All.
    Everything,
    /// One.
    Only(usize),
    /// All but one.
    Without(usize),
    /// So many of the first.
    Prefix(usize),
    /// Any, each as a whole.
    Subset,
    /// Any parts of any.
    Torn,
}

impl CutPoint<'_> {
    /// Cuts of all kinds, at most about `most` of them.
    #[must_use]
    pub fn cuts(&self, most: usize, random: &mut Random) -> Vec<Cut> {
        let count = self.pending.len();
        if count == 0 {
            return vec![Cut::Nothing];
        }
        let mut cuts = vec![Cut::Nothing, Cut::Everything];
        let singles =
            (0..count).flat_map(|nth| [Cut::Only(nth), Cut::Without(nth), Cut::Prefix(nth)]);
        let mut singles: Vec<Cut> = singles.filter(|_| count > 1).collect();
        while cuts.len() < most {
            if singles.is_empty() || percent(random, 40) {
                cuts.push(Cut::Torn);
            } else if percent(random, 30) {
                cuts.push(Cut::Subset);
            } else {
                let nth = super::index(random.within(0..singles.len() as u64));
                cuts.push(singles.swap_remove(nth));
            }
        }
        cuts
    }

    /// The file after the cut.
    #[must_use]
    pub fn cut(&self, cut: Cut, random: &mut Random) -> Contents {
        let mut disk = Survivor {
            len: self.base.len_bytes(),
            len_is_final: false,
            contents: self.base.clone(),
            lost: HashSet::new(),
        };
        let torn = [0, 20, 50, 80, 100];
        for (nth, record) in self.pending.iter().enumerate() {
            let chance = match cut {
                Cut::Nothing => 0,
                Cut::Everything => 100,
                Cut::Only(one) => 100 * u64::from(nth == one),
                Cut::Without(one) => 100 * u64::from(nth != one),
                Cut::Prefix(count) => 100 * u64::from(nth < count),
                Cut::Subset => 100 * random.within(0..2),
                Cut::Torn => *random.pick(&torn),
            };
            let keeps_older = cut == Cut::Torn;
            let newer: Vec<Range<u64>> = self
                .durable
                .iter()
                .filter(|durable| durable.begun > record.begun)
                .map(|durable| durable.operation.touched())
                .collect();
            disk.take(&record.operation, &newer, chance, keeps_older, random);
        }
        let mut contents = disk.contents;
        contents.set_len(disk.len);
        contents
    }
}

/// A disk that gets some of the pending pieces.
struct Survivor {
    contents: Contents,
    len: u64,
    /// The length stays in the version that it has.
    len_is_final: bool,
    /// Pieces that stay in the version that they have.
    lost: HashSet<u64>,
}

impl Survivor {
    fn take(
        &mut self,
        operation: &Operation,
        newer: &[Range<u64>],
        chance: u64,
        keeps_older: bool,
        random: &mut Random,
    ) {
        let new_len = match operation {
            Operation::SetLen(len) => *len,
            other => self.len.max(other.touched().end),
        };
        let grows = !matches!(operation, Operation::Punch(_));
        if grows && new_len != self.len && !self.len_is_final {
            if percent(random, chance) {
                self.len = new_len;
            } else {
                self.len_is_final = keeps_older;
            }
        }
        let range = match operation {
            Operation::SetLen(len) => *len..self.contents.len_bytes().max(*len),
            other => other.touched(),
        };
        let pieces: Vec<u64> = match operation {
            Operation::Write { .. } => (range.start / PIECE..range.end.div_ceil(PIECE)).collect(),
            _ => self.contents.pieces_held(&range),
        };
        for piece in pieces {
            let start = range.start.max(piece * PIECE);
            let end = range.end.min((piece + 1) * PIECE);
            let is_newer = newer.iter().any(|new| new.start < end && start < new.end);
            if is_newer || self.lost.contains(&piece) {
                continue;
            }
            if !percent(random, chance) {
                if keeps_older {
                    self.lost.insert(piece);
                }
                continue;
            }
            match operation {
                Operation::Write { at, bytes } => {
                    let (from, to) = (super::index(start - at), super::index(end - at));
                    self.contents.write(start, &bytes[from..to]);
                }
                _ => self.contents.zero(start..end),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(history: &mut History, at: u64, byte: u8, len: usize) {
        let bytes = vec![byte; len].into();
        let record = history.begin(Operation::Write { at, bytes });
        history.end(record);
    }

    fn done(history: &mut History, operation: Operation) {
        let record = history.begin(operation);
        history.end(record);
    }

    /// Each version of a piece that some cut shows.
    fn seen(history: &History, piece: u64) -> Vec<u8> {
        let mut random = Random::seeded(3);
        let point = history.at(history.now());
        let mut seen: Vec<u8> = (0..300)
            .map(|_| {
                point
                    .cut(Cut::Torn, &mut random)
                    .bytes(piece * 512..piece * 512 + 1)[0]
            })
            .collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn what_a_sync_covers_stays_and_the_rest_comes_in_any_version() {
        let mut history = History::new(Contents::default());
        write(&mut history, 0, 1, 2048);
        done(&mut history, Operation::Sync);
        write(&mut history, 512, 2, 1024);
        write(&mut history, 1024, 3, 1024);
        assert_eq!(seen(&history, 0), [1]);
        assert_eq!(seen(&history, 1), [1, 2]);
        assert_eq!(seen(&history, 2), [1, 2, 3]);
        assert_eq!(seen(&history, 3), [1, 3]);
        done(&mut history, Operation::Sync);
        assert_eq!(seen(&history, 2), [3]);
    }

    #[test]
    fn a_sync_does_not_cover_what_is_still_in_flight_when_it_begins() {
        let mut history = History::new(Contents::default());
        write(&mut history, 0, 1, 512);
        done(&mut history, Operation::Sync);
        let bytes = vec![2; 512].into();
        let slow = history.begin(Operation::Write { at: 0, bytes });
        let sync = history.begin(Operation::Sync);
        history.end(slow);
        history.end(sync);
        assert_eq!(seen(&history, 0), [1, 2]);
    }

    #[test]
    fn what_a_failed_sync_dropped_is_not_saved_by_the_next() {
        let mut history = History::new(Contents::default());
        write(&mut history, 0, 1, 512);
        done(&mut history, Operation::FailedSync);
        write(&mut history, 512, 2, 512);
        done(&mut history, Operation::Sync);
        assert_eq!(seen(&history, 0), [0, 1]);
        assert_eq!(seen(&history, 1), [2]);
    }

    #[test]
    fn a_length_is_lost_independently_of_the_bytes() {
        let mut history = History::new(Contents::default());
        write(&mut history, 0, 1, 512);
        done(&mut history, Operation::Sync);
        done(&mut history, Operation::SetLen(4096));
        write(&mut history, 0, 2, 512);
        let mut random = Random::seeded(5);
        let point = history.at(history.now());
        let mut seen: Vec<(u64, u8)> = (0..200)
            .map(|_| point.cut(Cut::Torn, &mut random))
            .map(|contents| (contents.len_bytes(), contents.bytes(0..1)[0]))
            .collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, [(512, 1), (512, 2), (4096, 1), (4096, 2)]);
    }

    #[test]
    fn a_kill_loses_nothing_that_has_ended() {
        let mut history = History::new(Contents::default());
        write(&mut history, 0, 1, 512);
        let killed = history.killed_at(history.now(), &mut Random::seeded(1));
        assert_eq!(killed.bytes(0..1), [1]);
        let before = history.killed_at(Moment(0), &mut Random::seeded(1));
        assert_eq!(before.len_bytes(), 0);
    }
}
