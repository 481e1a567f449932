//! How much a disk may do in a second, and a group of disks together.
//!
//! The numbers have the names and the meaning of those of QEMU's `throttle-group`: each fills a leaky bucket, and requests are taken while
//! that is not over its brim.
//!
//! | limit | leaks in a second | up to the brim |
//! | --- | --- | --- |
//! | `iops_total` | so many requests | a tenth of that, or `iops_total_max` times `iops_total_max_length` requests |
//! | `bps_total` | so many bytes | a tenth of that, or `bps_total_max` times `bps_total_max_length` bytes |
//! | `…_max`, if its `…_max_length` is above 1 | so many | a tenth of that |
//!
//! So with a `_max_length` of 1, which is what it is unless it is given, all of `_max` may come at once after a time with less, and with a
//! greater one `_max` is a rate, for so many seconds (and as much longer as leaks meanwhile). A request is paid for when it is taken, so one
//! that is larger than the bucket is taken like any other, and what it owes keeps the next ones waiting. Every request that the guest sends
//! counts as one; bytes are those that reads and writes move. (QEMU counts no flushes, and the bytes of write-zeroes, which move none here.)
//!
//! Chains that an earlier daemon left in flight are not held: they were paid for there.
//!
//! Not here: the buckets and how disks take turns (`bucket`), where chains wait (`gate`), groups by their names (`groups`).
//!
//! Source: QEMU, docs/throttle.txt and util/throttle.c.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;

use crate::bucket::{Bucket, Unit};

/// Limits that make sense, by the names of QEMU's options; none: there is no such limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", default, deny_unknown_fields)]
pub(crate) struct Limits {
    /// Requests per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_total: Option<NonZeroU64>,
    /// The same in a burst.
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_total_max: Option<NonZeroU64>,
    /// Seconds that a burst lasts.
    #[serde(skip_serializing_if = "Option::is_none")]
    iops_total_max_length: Option<NonZeroU64>,
    /// Bytes per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    bps_total: Option<NonZeroU64>,
    /// The same in a burst.
    #[serde(skip_serializing_if = "Option::is_none")]
    bps_total_max: Option<NonZeroU64>,
    /// Seconds that a burst lasts.
    #[serde(skip_serializing_if = "Option::is_none")]
    bps_total_max_length: Option<NonZeroU64>,
}

/// Why limits make no sense. QEMU refuses the same.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum LimitsError {
    #[error("{of}_max is given without {of}; give both")]
    BurstAlone { of: &'static str },
    #[error("{of}_max_length is given without {of}_max; give both")]
    LengthAlone { of: &'static str },
    #[error("{of}_max is {max}, which is less than {of}, {rate}; give at least that")]
    SmallBurst {
        of: &'static str,
        max: NonZeroU64,
        rate: NonZeroU64,
    },
}

/// How much of one unit.
struct Limit {
    of: &'static str,
    unit: Unit,
    rate: Option<NonZeroU64>,
    max: Option<NonZeroU64>,
    length: Option<NonZeroU64>,
}

/// The buckets of what is limited together.
pub(crate) type Buckets = SmallVec<[Arc<Bucket>; 2]>;

/// The limits of one disk; its seats heed them.
#[derive(Debug, Default)]
pub(crate) struct Throttle {
    /// Changes with what is below.
    version: AtomicU64,
    own: Mutex<Own>,
    /// Seats that are held.
    pub(crate) held: AtomicUsize,
}

#[derive(Debug, Default)]
struct Own {
    limits: Limits,
    buckets: Buckets,
    group: Option<Arc<Group>>,
}

/// Disks that share limits.
#[derive(Debug)]
pub(crate) struct Group {
    name: String,
    version: AtomicU64,
    shared: Mutex<(Limits, Buckets)>,
}

impl Limits {
    fn each(&self) -> [Limit; 2] {
        let requests = Limit {
            of: "iops_total",
            unit: Unit::Request,
            rate: self.iops_total,
            max: self.iops_total_max,
            length: self.iops_total_max_length,
        };
        let bytes = Limit {
            of: "bps_total",
            unit: Unit::Byte,
            rate: self.bps_total,
            max: self.bps_total_max,
            length: self.bps_total_max_length,
        };
        [requests, bytes]
    }

    fn buckets(&self) -> Buckets {
        let mut buckets = Buckets::new();
        for limit in self.each() {
            let Some(rate) = limit.rate else {
                continue;
            };
            let bucket = match (limit.max, limit.length.map_or(1, NonZeroU64::get)) {
                (None, _) => Bucket::shallow(limit.unit, rate),
                (Some(max), length) => {
                    if length > 1 {
                        buckets.push(Arc::new(Bucket::shallow(limit.unit, max)));
                    }
                    let most = max.get().saturating_mul(length);
                    Bucket::holding(limit.unit, rate, most)
                }
            };
            buckets.push(Arc::new(bucket));
        }
        buckets
    }
}

impl Limit {
    fn check(&self) -> Result<(), LimitsError> {
        let of = self.of;
        match (self.rate, self.max, self.length) {
            (_, None, Some(_)) => Err(LimitsError::LengthAlone { of }),
            (None, Some(_), _) => Err(LimitsError::BurstAlone { of }),
            (Some(rate), Some(max), _) if max < rate => {
                Err(LimitsError::SmallBurst { of, max, rate })
            }
            (_, _, _) => Ok(()),
        }
    }
}

impl<'de> Deserialize<'de> for Limits {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let limits = Self::deserialize(source)?;
        let checked = limits.each().iter().try_for_each(Limit::check);
        checked.map_err(serde::de::Error::custom)?;
        Ok(limits)
    }
}

impl Serialize for Limits {
    fn serialize<S: Serializer>(&self, into: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, into)
    }
}

impl Throttle {
    /// Has the disk heed these limits from now on, with empty buckets. Requests that wait for older ones heed them within a tenth of a
    /// second.
    pub(crate) fn set_limits(&self, limits: &Limits) {
        {
            let mut own = lock(&self.own);
            (own.limits, own.buckets) = (*limits, limits.buckets());
        }
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Has the disk share a group's limits beside its own, or only heed its own.
    pub(crate) fn set_group(&self, group: Option<Arc<Group>>) {
        lock(&self.own).group = group;
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Its own limits.
    pub(crate) fn limits(&self) -> Limits {
        lock(&self.own).limits
    }

    /// The group that it is in.
    pub(crate) fn group(&self) -> Option<Arc<Group>> {
        lock(&self.own).group.clone()
    }

    /// How many seats wait for its limits or its group's.
    pub(crate) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// What its own limits fill.
    pub(crate) fn buckets(&self) -> Buckets {
        lock(&self.own).buckets.clone()
    }

    /// Another number after each change.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }
}

impl Group {
    /// A group without disks.
    pub(crate) fn new(name: String, limits: &Limits) -> Self {
        Self {
            name,
            version: AtomicU64::new(0),
            shared: Mutex::new((*limits, limits.buckets())),
        }
    }

    /// What operators call it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Has the group's disks heed these limits from now on, with empty buckets.
    pub(crate) fn set_limits(&self, limits: &Limits) {
        *lock(&self.shared) = (*limits, limits.buckets());
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Its limits.
    pub(crate) fn limits(&self) -> Limits {
        lock(&self.shared).0
    }

    /// What they fill.
    pub(crate) fn buckets(&self) -> Buckets {
        lock(&self.shared).1.clone()
    }

    /// Another number after each change.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (json, said) in [
            (
                r#"{"bps_total_max": 5}"#,
                "bps_total_max is given without bps_total; give both",
            ),
            (
                r#"{"iops_total": 6, "iops_total_max": 5}"#,
                "iops_total_max is 5, which is less than iops_total, 6; give at least that",
            ),
            (
                r#"{"iops_total": 6, "iops_total_max_length": 5}"#,
                "iops_total_max_length is given without iops_total_max; give both",
            ),
            (r#"{"iops_total": 0}"#, "nonzero"),
            (r#"{"iops": 5}"#, "unknown field `iops`"),
        ] {
            let error = serde_json::from_str::<Limits>(json).unwrap_err();
            assert!(error.to_string().contains(said), "{json}: {error}");
        }
    }

    #[test]
    fn limits_are_shown_as_they_were_written() {
        let json = r#"{"iops_total":5,"bps_total":6,"bps_total_max":7,"bps_total_max_length":8}"#;
        let limits: Limits = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&limits).unwrap(), json);
        assert_eq!(serde_json::to_string(&Limits::default()).unwrap(), "{}");
    }
}
