//! A leaky bucket, and the places of those who fill it.
//!
//! A bucket is one number: when it will be empty. Whoever finds it over its brim gets a place: the moment when all that was taken before has
//! leaked down to the brim. At that moment it may take what leaks in a [`QUANTUM`], whatever others took meanwhile, and then goes for a
//! new place behind theirs. So those who wait take turns, nobody has to be told that it is another one's turn, and one that does not
//! come for its turn keeps nobody waiting. Who owes more than a quantum pays one in each of its turns.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::Moment;

/// Nanoseconds in a second.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// What leaks in this time is the brim of a bucket without a burst, as QEMU has it.
const DEFAULT_BRIM: u64 = SECOND / 10;

/// What leaks in this time may be taken in one turn of those who wait. Less costs more wake-ups, more makes turns rarer.
const QUANTUM: u64 = 2_000_000;

/// At low rates it is as long as this takes, or one request, so that turns are not mostly spent with paying debts.
const QUANTUM_BYTES: u64 = 16 << 10;

/// How late a turn may begin, and how long it may last, before it is forfeited by who does not use it.
const GRACE: u64 = SECOND / 10;

/// What of a request is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Requests, whatever their size.
    Request,
    /// Bytes that are moved.
    Byte,
}

/// A leaky bucket, filled by many.
#[derive(Debug)]
pub(crate) struct Bucket {
    unit: Unit,
    /// What leaks in a second.
    rate: NonZeroU64,
    /// How long it takes to leak from the brim to the bottom, in nanoseconds.
    brim: u64,
    /// What may be taken in one turn, as the time in which it leaks.
    quantum: u64,
    /// When nothing will be left in it, as a [`Moment`].
    empty_at: AtomicU64,
}

impl Bucket {
    /// A bucket that leaks `rate` a second, and holds what leaks in a tenth of that.
    pub(crate) fn shallow(unit: Unit, rate: NonZeroU64) -> Self {
        Self::new(unit, rate, DEFAULT_BRIM)
    }

    /// A bucket that leaks `rate` a second, and holds `most`.
    pub(crate) fn holding(unit: Unit, rate: NonZeroU64, most: u64) -> Self {
        Self::new(unit, rate, time_of(most, rate))
    }

    fn new(unit: Unit, rate: NonZeroU64, brim: u64) -> Self {
        let least = match unit {
            Unit::Request => 1,
            Unit::Byte => QUANTUM_BYTES,
        };
        Self {
            unit,
            rate,
            quantum: time_of(least, rate).max(QUANTUM),
            brim,
            empty_at: AtomicU64::new(0),
        }
    }

    /// How long it takes until this much has leaked.
    fn cost(&self, bytes: u64) -> u64 {
        match self.unit {
            Unit::Request => time_of(1, self.rate),
            Unit::Byte => time_of(bytes, self.rate),
        }
    }

    /// When it is not over its brim any more.
    fn due(&self) -> Moment {
        let empty_at = self.empty_at.load(Ordering::Relaxed);
        Moment(empty_at.saturating_sub(self.brim))
    }

    /// What goes into it up to the brim.
    fn room(&self, now: Moment) -> u64 {
        let empty_at = Moment(self.empty_at.load(Ordering::Relaxed));
        self.brim.saturating_sub(empty_at.since(now))
    }

    fn fill(&self, now: Moment, cost: u64) {
        let more = |empty_at: u64| Some(empty_at.max(now.0).saturating_add(cost));
        let relaxed = Ordering::Relaxed;
        let _ = self.empty_at.fetch_update(relaxed, relaxed, more);
    }
}

/// How long so many take at so many per second, in nanoseconds.
fn time_of(units: u64, rate: NonZeroU64) -> u64 {
    let nanos = u128::from(units) * u128::from(SECOND) / u128::from(rate.get());
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

/// A seat's place among those who fill a bucket.
#[derive(Debug)]
pub(crate) struct Place {
    bucket: Arc<Bucket>,
    /// Whether the seats of the disk share it with others.
    pub(crate) is_group: bool,
    /// When it is its turn, if it waits.
    due: Option<Moment>,
    /// Since when it has been its turn, if it was.
    turn: Option<Moment>,
    /// What it may still take in that.
    left: u64,
    /// What it took and has not paid.
    owed: u64,
    /// Up to when that is right.
    since: Moment,
}

impl Place {
    /// A place of a seat that has not taken anything yet.
    pub(crate) fn new(bucket: &Arc<Bucket>, is_group: bool) -> Self {
        Self {
            bucket: Arc::clone(bucket),
            is_group,
            due: None,
            turn: None,
            left: 0,
            owed: 0,
            since: Moment(0),
        }
    }

    /// When it may take something, if not now. Of the bucket's quantum it may use the `share`th part.
    pub(crate) fn wait(&mut self, now: Moment, share: u64) -> Option<Moment> {
        let quantum = (self.bucket.quantum / share.max(1)).max(1);
        self.forgive(now);
        loop {
            let has_turn = self.turn.is_some_and(|turn| now < turn.plus(GRACE));
            if has_turn && self.left > 0 {
                self.pay(now, self.left);
                if self.owed == 0 && self.left > 0 {
                    return None;
                }
            }
            let place = self.due.filter(|due| now < due.plus(GRACE));
            let due = place.unwrap_or_else(|| self.bucket.due());
            if now < due {
                self.due = Some(due);
                return Some(due);
            }
            if place.is_some() {
                (self.turn, self.left) = (Some(now), quantum);
            } else if self.owed == 0 {
                return None;
            } else {
                self.pay(now, quantum);
            }
        }
    }

    /// Something was taken.
    pub(crate) fn charge(&mut self, now: Moment, bytes: u64) {
        self.forgive(now);
        self.owed = self.owed.saturating_add(self.bucket.cost(bytes));
        let most = match self.left {
            0 => self.bucket.quantum,
            left => left,
        };
        self.pay(now, most);
    }

    /// What leaked from the empty bucket since it was in debt is paid.
    fn forgive(&mut self, now: Moment) {
        let empty_at = Moment(self.bucket.empty_at.load(Ordering::Relaxed));
        let unused = now.since(empty_at.max(self.since));
        self.owed = self.owed.saturating_sub(unused);
        self.since = now;
    }

    /// Pays what it owes, as far as it may: all that there is room for, since nobody else waits then, or this much.
    fn pay(&mut self, now: Moment, most: u64) {
        let paid = self.owed.min(most.max(self.bucket.room(now)));
        if paid == 0 {
            return; // It keeps its place.
        }
        self.due = None;
        self.bucket.fill(now, paid);
        self.owed -= paid;
        self.left = self.left.saturating_sub(paid);
    }
}
