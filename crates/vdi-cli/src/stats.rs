//! What a daemon counted of its disks, as `stats` and `stats-of-all` return it.
//!
//! Source: `crates/vdi-vhost/src/stats.rs`. What an older daemon does not count is zero here.

use serde::Deserialize;

/// One disk.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct DiskStats {
    pub(crate) name: String,
    pub(crate) read: KindStats,
    pub(crate) write: KindStats,
    pub(crate) flush: KindStats,
    pub(crate) discard: KindStats,
    pub(crate) write_zeroes: KindStats,
    pub(crate) get_id: KindStats,
    pub(crate) in_flight_requests: u64,
    pub(crate) throttled_us: u64,
    pub(crate) size_bytes: u64,
    pub(crate) block_bytes: u64,
    pub(crate) allocated_blocks: u64,
    pub(crate) failed: bool,
}

/// One kind of its requests.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct KindStats {
    pub(crate) requests: u64,
    pub(crate) errors: u64,
    pub(crate) bytes: u64,
    pub(crate) latency_us: u64,
    latencies: Vec<Bucket>,
}

/// Requests that took about the same time; those with none are left out.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Bucket {
    at_most_us: Option<u64>,
    requests: u64,
}

impl DiskStats {
    /// All kinds, with their names.
    pub(crate) fn kinds(&self) -> [(&'static str, &KindStats); 6] {
        [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
            ("discard", &self.discard),
            ("write-zeroes", &self.write_zeroes),
            ("get-id", &self.get_id),
        ]
    }
}

impl KindStats {
    /// What was counted since `before`.
    pub(crate) fn since(&self, before: &Self) -> Self {
        let less = u64::saturating_sub;
        let old = |bound| {
            let mut all = before.latencies.iter();
            let same = all.find(|bucket| bucket.at_most_us == bound);
            same.map_or(0, |bucket| bucket.requests)
        };
        let latencies = self.latencies.iter().map(|bucket| Bucket {
            at_most_us: bucket.at_most_us,
            requests: less(bucket.requests, old(bucket.at_most_us)),
        });
        Self {
            requests: less(self.requests, before.requests),
            errors: less(self.errors, before.errors),
            bytes: less(self.bytes, before.bytes),
            latency_us: less(self.latency_us, before.latency_us),
            latencies: latencies.filter(|bucket| bucket.requests > 0).collect(),
        }
    }

    /// What was counted of several kinds.
    pub(crate) fn sum(kinds: &[Self]) -> Self {
        let mut latencies: Vec<Bucket> = kinds
            .iter()
            .flat_map(|kind| kind.latencies.clone())
            .collect();
        latencies.sort_by_key(|bucket| bucket.at_most_us.unwrap_or(u64::MAX));
        let sum = |of: fn(&Self) -> u64| kinds.iter().map(of).sum();
        Self {
            requests: sum(|kind| kind.requests),
            errors: sum(|kind| kind.errors),
            bytes: sum(|kind| kind.bytes),
            latency_us: sum(|kind| kind.latency_us),
            latencies,
        }
    }

    /// The latency that so many percent of the requests did not exceed: the bound of its bucket, so at most half too much. None if
    /// there were no requests.
    pub(crate) fn percentile_us(&self, percent: u64) -> Option<u64> {
        let all: u64 = self.latencies.iter().map(|bucket| bucket.requests).sum();
        let wanted = (all * percent).div_ceil(100).max(1);
        let mut found = 0;
        let bucket = self.latencies.iter().find(|bucket| {
            found += bucket.requests;
            found >= wanted
        })?;
        // The last has no bound, but is longer than all others.
        let longest = 1 << 24;
        Some(bucket.at_most_us.unwrap_or(longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_bound_of_the_bucket_it_falls_in() {
        let bucket = |at_most_us, requests| Bucket {
            at_most_us,
            requests,
        };
        let kind = KindStats {
            latencies: vec![bucket(Some(8), 98), bucket(Some(64), 1), bucket(None, 1)],
            ..KindStats::default()
        };
        let found = [1, 50, 98, 99, 100].map(|percent| kind.percentile_us(percent));
        assert_eq!(found.map(Option::unwrap), [8, 8, 8, 64, 1 << 24]);
        assert_eq!(KindStats::default().percentile_us(50), None);
    }
}
