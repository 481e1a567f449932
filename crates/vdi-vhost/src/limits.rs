//! How much a disk may do in a second, and a group of disks together.
//!
//! The numbers mean what those of QEMU's `throttle-group` mean. `iops_total` requests and `bps_total` bytes per second leak out of a bucket
//! each, and requests are taken while it is not over its brim: what leaks in a tenth of a second, or what `iops_total_max` and
//! `bps_total_max` leak in one (`-max-length` 1). A request is paid for when it is taken, so one that is larger than the bucket is taken
//! like any other, and what it owes keeps the next ones waiting. Every request that the guest sends counts as one; bytes are those that
//! reads and writes move. (QEMU counts no flushes, and the bytes of write-zeroes, which move none here.)
//!
//! ```text
//! Seat: Gate ── Place in ─► Bucket of the disk (Throttle)
//!            └─ Place in ─► Bucket of its group (Group)
//! ```
//!
//! A bucket is one number: when it will be empty. Whoever finds it over its brim gets a place: the moment when all that was taken before has
//! leaked down to the brim. At that moment it may take what leaks in a [`QUANTUM`], whatever others took meanwhile, and then goes for a
//! new place behind theirs. So those who wait take turns, nobody has to be told that it is another one's turn, and one that does not
//! come for its turn keeps nobody waiting. Who owes more than a quantum pays one in each of its turns. The seats of a
//! disk share its turns in the group.
//!
//! Chains that an earlier daemon left in flight are not held: they were paid for there.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::clock::Moment;

/// Nanoseconds in a second.
const SECOND: u64 = 1_000_000_000;

/// What leaks in this time is the brim of a bucket without a burst, as QEMU has it.
const DEFAULT_BRIM: u64 = SECOND / 10;

/// What leaks in this time may be taken in one turn of those who wait. Less costs more wake-ups, more makes turns rarer.
const QUANTUM: u64 = 2_000_000;

/// At low rates it is as long as this takes, or one request, so that turns are not mostly spent with paying debts.
const QUANTUM_BYTES: u64 = 16 << 10;

/// How late a turn may begin, and how long it may last, before it is forfeited by who does not use it.
const GRACE: u64 = SECOND / 10;

/// How soon limits that were changed are heeded by who waits for the old ones.
const LONGEST_HOLD: u64 = SECOND / 10;

/// Limits, by the names of QEMU's options; none: there is no such limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Limits {
    /// Requests per second.
    pub(crate) iops_total: Option<NonZeroU64>,
    /// Requests that may come at once after a time with fewer.
    pub(crate) iops_total_max: Option<NonZeroU64>,
    /// Bytes per second.
    pub(crate) bps_total: Option<NonZeroU64>,
    /// Bytes that may come at once after a time with fewer.
    pub(crate) bps_total_max: Option<NonZeroU64>,
}

/// Why limits make no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LimitsError {
    /// A burst of what is not limited.
    #[error("{of}_max is given without {of}; give both")]
    BurstAlone { of: &'static str },
    /// QEMU refuses that, too.
    #[error("{of}_max is {max}, which is less than {of}, {rate}; give at least that")]
    SmallBurst {
        of: &'static str,
        max: NonZeroU64,
        rate: NonZeroU64,
    },
}

/// What of a request is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Request,
    Byte,
}

/// A leaky bucket, filled by many.
#[derive(Debug)]
struct Bucket {
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

/// The buckets of what is limited together.
type Buckets = SmallVec<[Arc<Bucket>; 2]>;

/// The limits of one disk; its seats hold them.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    /// Changes with `all`.
    version: AtomicU64,
    all: Mutex<Own>,
    /// Seats that are held.
    held: AtomicUsize,
}

#[derive(Debug, Default)]
struct Own {
    limits: Limits,
    buckets: Buckets,
    group: Option<Arc<Group>>,
}

/// Disks that share limits.
#[derive(Debug, Default)]
pub(crate) struct Group {
    version: AtomicU64,
    buckets: Mutex<Buckets>,
}

impl Limits {
    fn buckets(&self) -> Result<Buckets, LimitsError> {
        let requests = (
            "iops_total",
            Unit::Request,
            self.iops_total,
            self.iops_total_max,
        );
        let bytes = ("bps_total", Unit::Byte, self.bps_total, self.bps_total_max);
        let mut buckets = Buckets::new();
        for (of, unit, rate, max) in [requests, bytes] {
            match (rate, max) {
                (None, None) => {}
                (None, Some(_)) => return Err(LimitsError::BurstAlone { of }),
                (Some(rate), Some(max)) if max < rate => {
                    return Err(LimitsError::SmallBurst { of, max, rate });
                }
                (Some(rate), max) => buckets.push(Arc::new(Bucket::new(unit, rate, max))),
            }
        }
        Ok(buckets)
    }
}

impl Throttle {
    /// Has the disk heed these limits from now on, with empty buckets.
    pub(crate) fn set_limits(&self, limits: &Limits) -> Result<(), LimitsError> {
        let buckets = limits.buckets()?;
        {
            let mut all = lock(&self.all);
            (all.limits, all.buckets) = (*limits, buckets);
        }
        self.version.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// The disk's own limits.
    pub(crate) fn limits(&self) -> Limits {
        lock(&self.all).limits
    }

    /// Has the disk share a group's limits beside its own, or only heed its own.
    pub(crate) fn set_group(&self, group: Option<Arc<Group>>) {
        lock(&self.all).group = group;
        self.version.fetch_add(1, Ordering::Release);
    }
}

impl Group {
    /// Has the group's disks heed these limits from now on, with empty buckets.
    pub(crate) fn set_limits(&self, limits: &Limits) -> Result<(), LimitsError> {
        *lock(&self.buckets) = limits.buckets()?;
        self.version.fetch_add(1, Ordering::Release);
        Ok(())
    }
}

impl Bucket {
    fn new(unit: Unit, rate: NonZeroU64, max: Option<NonZeroU64>) -> Self {
        let least = match unit {
            Unit::Request => 1,
            Unit::Byte => QUANTUM_BYTES,
        };
        Self {
            unit,
            rate,
            quantum: time_of(least, rate).max(QUANTUM),
            brim: max.map_or(DEFAULT_BRIM, |max| time_of(max.get(), rate)),
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
struct Place {
    bucket: Arc<Bucket>,
    /// Whether the seats of the disk share it with others.
    is_group: bool,
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
    fn new(bucket: &Arc<Bucket>, is_group: bool) -> Self {
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
    fn wait(&mut self, now: Moment, share: u64) -> Option<Moment> {
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

    fn charge(&mut self, now: Moment, bytes: u64) {
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

/// Where the chains of one seat pass, if its disk has limits.
#[derive(Debug)]
pub(crate) struct Gate {
    throttle: Arc<Throttle>,
    version: u64,
    group: Option<Arc<Group>>,
    group_version: u64,
    places: SmallVec<[Place; 4]>,
    is_held: bool,
}

impl Gate {
    /// A gate of a seat of this disk.
    pub(crate) fn new(throttle: Arc<Throttle>) -> Self {
        let mut gate = Self {
            throttle,
            version: 0,
            group: None,
            group_version: 0,
            places: SmallVec::new(),
            is_held: false,
        };
        gate.renew();
        gate
    }

    /// Whether there are limits.
    pub(crate) fn is_limited(&mut self) -> bool {
        let is_old = self.throttle.version.load(Ordering::Acquire) != self.version;
        let group = self.group.as_ref();
        let version = group.map(|group| group.version.load(Ordering::Acquire));
        if is_old || version.is_some_and(|version| version != self.group_version) {
            self.renew();
        }
        !self.places.is_empty()
    }

    fn renew(&mut self) {
        // A change after that is seen the next time.
        self.version = self.throttle.version.load(Ordering::Acquire);
        let own = lock(&self.throttle.all);
        let place = |bucket| Place::new(bucket, false);
        self.places = own.buckets.iter().map(place).collect();
        self.group.clone_from(&own.group);
        if let Some(group) = &self.group {
            self.group_version = group.version.load(Ordering::Acquire);
            let buckets = lock(&group.buckets);
            let place = |bucket| Place::new(bucket, true);
            self.places.extend(buckets.iter().map(place));
        }
    }

    /// Whether a chain may be taken in the turn that began at `now`; else when to ask again.
    pub(crate) fn admit(&mut self, now: Moment) -> Result<(), Moment> {
        let seats = self.throttle.held.load(Ordering::Relaxed) as u64;
        let wait = |place: &mut Place| place.wait(now, if place.is_group { seats } else { 1 });
        match self.places.iter_mut().filter_map(wait).max() {
            Some(due) => Err(due.min(now.plus(LONGEST_HOLD))),
            None => Ok(()),
        }
    }

    /// A chain was taken that moves so many bytes.
    pub(crate) fn charge(&mut self, now: Moment, bytes: u64) {
        for place in &mut self.places {
            place.charge(now, bytes);
        }
    }

    /// Whether chains wait at it, from now on.
    pub(crate) fn set_held(&mut self, is_held: bool) {
        match (self.is_held, is_held) {
            (false, true) => self.throttle.held.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.throttle.held.fetch_sub(1, Ordering::Relaxed),
            (true, true) | (false, false) => return,
        };
        self.is_held = is_held;
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.set_held(false);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: u64 = SECOND / 1000;

    fn limits(json: &str) -> Limits {
        serde_json::from_str(json).unwrap()
    }

    fn disk(own: &str, group: Option<&Arc<Group>>) -> Arc<Throttle> {
        let throttle = Arc::new(Throttle::default());
        throttle.set_limits(&limits(own)).unwrap();
        throttle.set_group(group.cloned());
        throttle
    }

    fn group(json: &str) -> Arc<Group> {
        let group = Arc::new(Group::default());
        group.set_limits(&limits(json)).unwrap();
        group
    }

    /// A seat that always has chains of one size, and what passed its gate.
    struct Flood {
        gate: Gate,
        bytes: u64,
        passed: u64,
        until: Moment,
    }

    impl Flood {
        fn new(throttle: &Arc<Throttle>, bytes: u64) -> Self {
            Self {
                gate: Gate::new(Arc::clone(throttle)),
                bytes,
                passed: 0,
                until: Moment(0),
            }
        }

        /// A turn of its worker, if there is one.
        fn turn(&mut self, now: Moment) {
            if now < self.until {
                return;
            }
            assert!(self.gate.is_limited());
            for _ in 0..32 {
                match self.gate.admit(now) {
                    Ok(()) => self.gate.charge(now, self.bytes),
                    Err(until) => {
                        assert!(until > now, "nobody waits for the past");
                        self.until = until;
                        self.gate.set_held(true);
                        return;
                    }
                }
                self.passed += 1;
            }
            self.gate.set_held(false);
        }
    }

    /// Turns of all in every step of 50 µs of so many milliseconds.
    fn run(floods: &mut [Flood], start: u64, milliseconds: u64) {
        for step in 0..milliseconds * 20 {
            let now = Moment(start + step * 50_000);
            floods.iter_mut().for_each(|flood| flood.turn(now));
        }
    }

    fn passed(floods: &[Flood]) -> Vec<u64> {
        floods.iter().map(|flood| flood.passed).collect()
    }

    #[test]
    fn a_disk_gets_its_burst_and_then_its_rate() {
        let second = |json, bytes| {
            let mut floods = [Flood::new(&disk(json, None), bytes)];
            run(&mut floods, 0, 1);
            let burst = floods[0].passed;
            run(&mut floods, MILLISECOND, 2000);
            (burst, floods[0].passed - burst)
        };
        // A tenth of a second's, and the one that goes over the brim. Small ones come in quanta then.
        assert_eq!(second(r#"{"iops_total": 100}"#, 1), (11, 200));
        assert_eq!(
            second(r#"{"iops_total": 100, "iops_total_max": 300}"#, 1),
            (301, 200)
        );
        assert_eq!(second(r#"{"bps_total": 1000000}"#, 1000), (101, 2016));
        let both = r#"{"bps_total": 1000000, "iops_total": 100}"#;
        assert_eq!(second(both, 100), (11, 200));
        assert_eq!(second(both, 100_000).1, 20);
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_and_is_paid_for() {
        let throttle = disk(r#"{"bps_total": 1000000}"#, None);
        let mut floods = [Flood::new(&throttle, 3_000_000)];
        run(&mut floods, 0, 2899);
        assert_eq!(floods[0].passed, 1);
        run(&mut floods, 2899 * MILLISECOND, 4);
        assert_eq!(floods[0].passed, 2);
        run(&mut floods, 2903 * MILLISECOND, 30_000);
        assert_eq!(floods[0].passed, 12);
        // It is paid for by time in which nothing is asked for, too.
        let mut gate = Gate::new(disk(r#"{"bps_total": 1000000}"#, None));
        gate.charge(Moment(0), 3_000_000);
        assert!(gate.admit(Moment(2 * SECOND)).is_err());
        let mut gate = Gate::new(disk(r#"{"bps_total": 1000000}"#, None));
        gate.charge(Moment(0), 3_000_000);
        assert!(gate.admit(Moment(3 * SECOND)).is_ok());
        // The largest request that there could be neither overflows nor stops others of the group.
        let group = group(r#"{"bps_total": 1000}"#);
        let mut floods = [
            Flood::new(&disk("{}", Some(&group)), u64::MAX),
            Flood::new(&disk("{}", Some(&group)), 10),
        ];
        run(&mut floods, 0, 200_000);
        assert_eq!(floods[0].passed, 1);
        // Half of the time is its own.
        assert!(
            (8000..12_000).contains(&floods[1].passed),
            "{:?}",
            passed(&floods)
        );
    }

    #[test]
    fn disks_of_a_group_take_turns_whatever_they_ask_for() {
        let group = group(r#"{"bps_total": 10000000}"#);
        let of_group = || disk("{}", Some(&group));
        let large = 1_000_000;
        let mut floods = [
            Flood::new(&of_group(), large),
            Flood::new(&of_group(), 10_000),
            Flood::new(&of_group(), 100_000),
        ];
        run(&mut floods, 0, 1000);
        let before = passed(&floods);
        run(&mut floods, SECOND, 30_000);
        let bytes: Vec<_> = floods
            .iter()
            .zip(before)
            .map(|(flood, before)| (flood.passed - before) * flood.bytes)
            .collect();
        let all: u64 = bytes.iter().sum();
        assert!(all.abs_diff(300_000_000) <= 2 * large, "{bytes:?}");
        for bytes in &bytes {
            assert!(bytes.abs_diff(100_000_000) < 10_000_000, "{bytes:?}");
        }
    }

    #[test]
    fn a_disk_that_asks_for_little_waits_for_no_more_than_a_turn_of_each_other() {
        let group = group(r#"{"iops_total": 1000}"#);
        let of_group = || disk("{}", Some(&group));
        let mut floods: Vec<_> = (0..8).map(|_| Flood::new(&of_group(), 1)).collect();
        run(&mut floods, 0, 1000);
        let mut calm = Flood::new(&of_group(), 1);
        for nth in 1..20 {
            let start = nth * SECOND;
            let mut waited = 0;
            while {
                run(&mut floods, start + waited, 1);
                calm.gate.admit(Moment(start + waited)).is_err()
            } {
                waited += MILLISECOND;
            }
            calm.gate.charge(Moment(start + waited), 1);
            assert!(waited <= 8 * 2 * MILLISECOND + MILLISECOND, "{waited}");
            run(&mut floods, start + waited, 900 - waited / MILLISECOND);
        }
    }

    #[test]
    fn a_disk_with_many_seats_has_no_larger_share_of_its_group() {
        let group = group(r#"{"iops_total": 1000}"#);
        let [wide, narrow] = [(), ()].map(|()| disk("{}", Some(&group)));
        let seats = [&wide, &wide, &wide, &wide, &narrow];
        let mut floods = seats.map(|disk| Flood::new(disk, 1));
        run(&mut floods, 0, 20_000);
        let wide: u64 = floods[..4].iter().map(|flood| flood.passed).sum();
        assert!(
            (8000..=12_000).contains(&wide) && (8000..=12_000).contains(&floods[4].passed),
            "{:?}",
            passed(&floods)
        );
        for flood in &floods[..4] {
            assert!(flood.passed > wide / 8, "{:?}", passed(&floods));
        }
    }

    #[test]
    fn limits_change_at_once_and_forget_what_was_owed() {
        let (slow, fast) = (r#"{"iops_total": 1}"#, r#"{"iops_total": 1000}"#);
        let throttle = disk(slow, None);
        let mut gate = Gate::new(Arc::clone(&throttle));
        let now = Moment(SECOND);
        gate.charge(now, 1);
        assert_eq!(gate.admit(now), Err(now.plus(LONGEST_HOLD)));
        throttle.set_limits(&limits(fast)).unwrap();
        assert!(gate.is_limited() && gate.admit(now).is_ok());
        let group = group(slow);
        throttle.set_group(Some(Arc::clone(&group)));
        assert!(gate.is_limited());
        gate.charge(now, 1);
        assert!(gate.admit(now).is_err());
        group.set_limits(&Limits::default()).unwrap();
        assert!(gate.is_limited() && gate.admit(now).is_ok());
        throttle.set_limits(&Limits::default()).unwrap();
        assert!(!gate.is_limited());
        group.set_limits(&limits(slow)).unwrap();
        assert!(gate.is_limited());
        throttle.set_group(None);
        assert!(!gate.is_limited());
    }

    #[test]
    fn bursts_without_their_rates_or_below_them_are_refused() {
        let refused = |json| limits(json).buckets().unwrap_err().to_string();
        assert_eq!(
            refused(r#"{"bps_total_max": 5}"#),
            "bps_total_max is given without bps_total; give both"
        );
        assert_eq!(
            refused(r#"{"iops_total": 6, "iops_total_max": 5}"#),
            "iops_total_max is 5, which is less than iops_total, 6; give at least that"
        );
        for wrong in [r#"{"iops_total": 0}"#, r#"{"iops": 5}"#] {
            assert!(serde_json::from_str::<Limits>(wrong).is_err(), "{wrong}");
        }
    }
}
