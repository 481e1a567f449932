//! Where the chains of one seat wait for the limits of their disk and its group.
//!
//! ```text
//! Seat: Gate ── Place in ─► Bucket of the disk (Throttle)
//!            └─ Place in ─► Bucket of its group (Group)
//! ```
//!
//! The seats of a disk share its turns in the group.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use smallvec::SmallVec;

use crate::bucket::{Place, SECOND};
use crate::clock::Moment;
use crate::limits::{Group, Throttle};

/// How soon limits that were changed are heeded by who waits for the old ones.
const LONGEST_HOLD: u64 = SECOND / 10;

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
        let is_old = self.throttle.version() != self.version;
        let group = self.group.as_ref();
        let version = group.map(|group| group.version());
        if is_old || version.is_some_and(|version| version != self.group_version) {
            self.renew();
        }
        !self.places.is_empty()
    }

    fn renew(&mut self) {
        // A change after that is seen the next time.
        self.version = self.throttle.version();
        let place = |bucket| Place::new(bucket, false);
        self.places = self.throttle.buckets().iter().map(place).collect();
        self.group = self.throttle.group();
        if let Some(group) = &self.group {
            self.group_version = group.version();
            let place = |bucket| Place::new(bucket, true);
            self.places.extend(group.buckets().iter().map(place));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Limits;

    const MILLISECOND: u64 = SECOND / 1000;

    fn limits(json: &str) -> Limits {
        serde_json::from_str(json).unwrap()
    }

    fn disk(own: &str, group: Option<&Arc<Group>>) -> Arc<Throttle> {
        let throttle = Arc::new(Throttle::default());
        throttle.set_limits(&limits(own));
        throttle.set_group(group.cloned());
        throttle
    }

    fn group(json: &str) -> Arc<Group> {
        Arc::new(Group::new("tenants".to_owned(), &limits(json)))
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
        // For three seconds it may do its burst's rate, and for as much longer as leaked meanwhile.
        let long = r#"{"iops_total": 100, "iops_total_max": 1000, "iops_total_max_length": 3}"#;
        let mut floods = [Flood::new(&disk(long, None), 1)];
        run(&mut floods, 0, 1);
        assert_eq!(floods[0].passed, 101);
        run(&mut floods, MILLISECOND, 2999);
        assert!(floods[0].passed.abs_diff(3100) < 10, "{}", floods[0].passed);
        run(&mut floods, 3 * SECOND, 2000);
        assert!(floods[0].passed.abs_diff(3500) < 10, "{}", floods[0].passed);
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
        throttle.set_limits(&limits(fast));
        assert!(gate.is_limited() && gate.admit(now).is_ok());
        let group = group(slow);
        throttle.set_group(Some(Arc::clone(&group)));
        assert!(gate.is_limited());
        gate.charge(now, 1);
        assert!(gate.admit(now).is_err());
        group.set_limits(&Limits::default());
        assert!(gate.is_limited() && gate.admit(now).is_ok());
        throttle.set_limits(&Limits::default());
        assert!(!gate.is_limited());
        group.set_limits(&limits(slow));
        assert!(gate.is_limited());
        throttle.set_group(None);
        assert!(!gate.is_limited());
    }
}
