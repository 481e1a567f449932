//! Counts how long requests took, in buckets that are 3 % wide, so that counting is cheap.

use std::time::Duration;

/// Each power of two is cut into so many buckets.
const PARTS: u64 = 32;
/// Up to 2^40 ns, 18 minutes.
const BUCKETS: usize = 40 * 32;

/// How many requests took how long.
#[derive(Debug, Clone)]
pub(crate) struct Latencies {
    counts: Vec<u64>,
}

impl Latencies {
    pub(crate) fn new() -> Self {
        Self {
            counts: vec![0; BUCKETS],
        }
    }

    pub(crate) fn add(&mut self, took: Duration) {
        self.counts[bucket(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX))] += 1;
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    pub(crate) fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The time that this share of the requests did not exceed, in microseconds.
    pub(crate) fn percentile_us(&self, percent: u64) -> f64 {
        let wanted = (self.total() * percent).div_ceil(100);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen > 0 {
                return middle_ns(bucket as u64) / 1000.0;
            }
        }
        0.0
    }
}

fn bucket(ns: u64) -> usize {
    let ns = ns.clamp(PARTS, (1 << 40) - 1);
    let power = u64::from(ns.ilog2());
    let part = (ns >> (power - 5)) - PARTS;
    usize::try_from((power - 5) * PARTS + part).expect("there are few buckets")
}

#[expect(clippy::cast_precision_loss, reason = "40 bits fit in a double")]
fn middle_ns(bucket: u64) -> f64 {
    let (power, part) = (bucket / PARTS, bucket % PARTS);
    let width = 1_u64 << power;
    ((PARTS + part) * width) as f64 + width as f64 / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_bucket_of_the_truth() {
        let mut latencies = Latencies::new();
        for us in 1..=1000 {
            latencies.add(Duration::from_micros(us));
        }
        for (percent, truth) in [(50, 500.0), (99, 990.0), (100, 1000.0)] {
            let seen = latencies.percentile_us(percent);
            assert!((seen / truth - 1.0).abs() < 0.035, "{percent}: {seen}");
        }
    }

    #[test]
    fn buckets_grow_with_the_time_and_hold_the_extremes() {
        let times = [0, 1, 31, 32, 63, 64, 1000, 1 << 39, 1 << 40, u64::MAX];
        let buckets: Vec<_> = times.iter().map(|ns| bucket(*ns)).collect();
        assert!(buckets.is_sorted());
        assert!(buckets.iter().all(|bucket| *bucket < BUCKETS));
    }
}
