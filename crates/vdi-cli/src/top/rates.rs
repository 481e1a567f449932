//! What disks did in a second, from what they had done at two times.

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;
use std::time::{Duration, Instant};

use clap::ValueEnum;

use crate::stats::{DiskStats, KindStats};

/// What all disks had done at a time.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) taken: Instant,
    pub(super) disks: Vec<DiskStats>,
}

/// What a disk did in a second, or has now.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Rate {
    pub(super) name: String,
    pub(super) iops: u64,
    pub(super) read_bps: u64,
    pub(super) write_bps: u64,
    /// Of the requests of the interval, if there were some.
    pub(super) p50_us: Option<u64>,
    pub(super) p99_us: Option<u64>,
    pub(super) in_flight: u64,
    pub(super) allocated_bytes: u64,
    pub(super) size_bytes: u64,
    /// How much of the interval limits kept requests waiting, added up over threads.
    pub(super) throttled_percent: u64,
    pub(super) errors: u64,
    pub(super) failed: bool,
}

/// What disks are sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SortKey {
    /// Name
    Name,
    /// Requests per second
    Iops,
    /// Bytes read per second
    Read,
    /// Bytes written per second
    Write,
    /// 50th percentile of latency
    P50,
    /// 99th percentile of latency
    P99,
    /// Requests in flight
    Queue,
    /// Bytes with storage
    Alloc,
    /// Share of time that limits held requests
    Throttled,
}

impl SortKey {
    /// All, in the order of their columns.
    pub(super) const ALL: [Self; 9] = [
        Self::Name,
        Self::Iops,
        Self::Read,
        Self::Write,
        Self::P50,
        Self::P99,
        Self::Queue,
        Self::Alloc,
        Self::Throttled,
    ];

    /// The one so many columns to the right.
    pub(super) fn moved(self, by: isize) -> Self {
        let at = Self::ALL.iter().position(|key| *key == self).unwrap_or(0);
        let to = at.saturating_add_signed(by).min(Self::ALL.len() - 1);
        Self::ALL[to]
    }
}

/// The rates between two samples. A disk that was not there before, or whose counters began anew, counts from nothing: but over an unknown
/// time, so it did nothing yet.
pub(super) fn rates(before: &Sample, now: &Sample) -> Vec<Rate> {
    let old = before.disks.iter();
    let old: HashMap<&str, &DiskStats> = old.map(|disk| (disk.name.as_str(), disk)).collect();
    let took = now.taken.saturating_duration_since(before.taken);
    let disks = now.disks.iter();
    disks
        .map(|disk| {
            let before = old.get(disk.name.as_str()).copied();
            let before = before.filter(|before| !is_anew(before, disk));
            rate(before.unwrap_or(disk), disk, took)
        })
        .collect()
}

/// Whether a counter is lower than it was.
fn is_anew(before: &DiskStats, now: &DiskStats) -> bool {
    let mut kinds = before.kinds().into_iter().zip(now.kinds());
    kinds.any(|((_, before), (_, now))| now.requests < before.requests)
}

/// Whether the daemon is another one than it was.
pub(super) fn is_restarted(before: &Sample, now: &Sample) -> bool {
    let old = before.disks.iter();
    let old: HashMap<&str, &DiskStats> = old.map(|disk| (disk.name.as_str(), disk)).collect();
    let mut disks = now.disks.iter();
    disks.any(|disk| {
        old.get(disk.name.as_str())
            .is_some_and(|before| is_anew(before, disk))
    })
}

fn rate(before: &DiskStats, now: &DiskStats, took: Duration) -> Rate {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
    let per_second = |more: u64| {
        let rate = u128::from(more) * 1_000_000 / u128::from(micros);
        u64::try_from(rate).unwrap_or(u64::MAX)
    };
    let kinds = before.kinds().into_iter().zip(now.kinds());
    // GET_ID is no I/O.
    let io = kinds.filter(|((kind, _), _)| *kind != "get-id");
    let between: Vec<KindStats> = io
        .map(|((_, before), (_, now))| now.since(before))
        .collect();
    let all = KindStats::sum(&between);
    let held_us = now.throttled_us.saturating_sub(before.throttled_us);
    Rate {
        name: now.name.clone(),
        iops: per_second(all.requests),
        read_bps: per_second(now.read.bytes.saturating_sub(before.read.bytes)),
        write_bps: per_second(now.write.bytes.saturating_sub(before.write.bytes)),
        p50_us: all.percentile_us(50),
        p99_us: all.percentile_us(99),
        in_flight: now.in_flight_requests,
        allocated_bytes: now.allocated_blocks.saturating_mul(now.block_bytes),
        size_bytes: now.size_bytes,
        throttled_percent: held_us.saturating_mul(100) / micros,
        errors: all.errors,
        failed: now.failed,
    }
}

/// Sorts: the busiest first, or by name.
pub(super) fn sort(rates: &mut [Rate], by: SortKey, is_reversed: bool) {
    let order = |one: &Rate, other: &Rate| -> Ordering {
        let larger = |of: fn(&Rate) -> u64| Reverse(of(one)).cmp(&Reverse(of(other)));
        match by {
            SortKey::Name => Ordering::Equal,
            SortKey::Iops => larger(|rate| rate.iops),
            SortKey::Read => larger(|rate| rate.read_bps),
            SortKey::Write => larger(|rate| rate.write_bps),
            SortKey::P50 => larger(|rate| rate.p50_us.unwrap_or(0)),
            SortKey::P99 => larger(|rate| rate.p99_us.unwrap_or(0)),
            SortKey::Queue => larger(|rate| rate.in_flight),
            SortKey::Alloc => larger(|rate| rate.allocated_bytes),
            SortKey::Throttled => larger(|rate| rate.throttled_percent),
        }
    };
    rates.sort_by(|one, other| {
        let found = order(one, other);
        let found = if by == SortKey::Name {
            one.name.cmp(&other.name)
        } else {
            found
        };
        let found = if is_reversed { found.reverse() } else { found };
        // The same from one time to the next.
        found.then_with(|| one.name.cmp(&other.name))
    });
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn sample(taken: Instant, disks: Value) -> Sample {
        Sample {
            taken,
            disks: serde_json::from_value(disks).unwrap(),
        }
    }

    fn disk(name: &str, reads: u64, slow: u64) -> Value {
        json!({
            "name": name, "size_bytes": 1 << 30, "block_bytes": 1 << 20, "allocated_blocks": 3,
            "throttled_us": reads * 1000, "in_flight_requests": 2,
            "read": {"requests": reads, "errors": 0, "bytes": reads * 4096, "latency_us": 0, "latencies": [
                {"at_most_us": 8, "requests": reads - slow}, {"at_most_us": 4096, "requests": slow}]},
            "get_id": {"requests": reads, "errors": 0, "bytes": 0, "latency_us": 0, "latencies": []},
        })
    }

    #[test]
    fn a_rate_is_the_difference_over_the_time() {
        let then = Instant::now();
        let before = sample(then, json!([disk("a", 100, 90)]));
        let now = sample(then + Duration::from_secs(2), json!([disk("a", 300, 95)]));
        let found = rates(&before, &now).remove(0);
        assert_eq!((found.iops, found.read_bps), (100, 100 * 4096));
        // Of the interval alone: 195 fast, 5 slow.
        assert_eq!((found.p50_us, found.p99_us), (Some(8), Some(4096)));
        assert_eq!(found.throttled_percent, 10);
        assert_eq!((found.allocated_bytes, found.in_flight), (3 << 20, 2));
        assert!(!is_restarted(&before, &now));
    }

    #[test]
    fn a_disk_that_is_new_or_began_anew_has_done_nothing_yet() {
        let then = Instant::now();
        let before = sample(then, json!([disk("a", 300, 0)]));
        let later = then + Duration::from_secs(1);
        // Of slow reads there are more than before all the same.
        let now = sample(later, json!([disk("a", 250, 200), disk("b", 1000, 0)]));
        let found = rates(&before, &now);
        assert_eq!((found[0].iops, found[1].iops), (0, 0));
        assert_eq!(found[0].p99_us, None);
        assert!(is_restarted(&before, &now));
    }

    #[test]
    fn the_busiest_comes_first_and_equals_by_name() {
        let rate = |name: &str, iops| Rate {
            name: name.to_owned(),
            iops,
            ..Rate::default()
        };
        let mut all = [rate("c", 1), rate("b", 5), rate("a", 1)];
        let names = |all: &[Rate]| all.iter().map(|rate| rate.name.clone()).collect::<String>();
        sort(&mut all, SortKey::Iops, false);
        assert_eq!(names(&all), "bac");
        sort(&mut all, SortKey::Iops, true);
        assert_eq!(names(&all), "acb");
        sort(&mut all, SortKey::Name, true);
        assert_eq!(names(&all), "cba");
    }
}
