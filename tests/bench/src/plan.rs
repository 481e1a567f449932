//! What a load asks for: which requests, where, and for how long. Not how they are asked: see [`crate::lane`].

use std::time::Duration;

use crate::contents::mix;
use crate::workload::{Operation, Order};

/// What is to be done, and where.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) operation: Operation,
    pub(crate) bytes: usize,
    pub(crate) places: Places,
    /// Check every read, not only samples.
    pub(crate) check_all: bool,
}

/// The offsets of requests, one after the other.
#[derive(Debug, Clone)]
pub(crate) enum Places {
    /// Anywhere; each slot has places of its own, so that no two requests in flight meet.
    Random {
        seed: u64,
        slots: u64,
        first_slot: u64,
    },
    /// From `next` to `end`, then from `start` again.
    Around { next: u64, start: u64, end: u64 },
    /// From `next` to `end` in steps.
    Once { next: u64, step: u64, end: u64 },
    /// These.
    Listed(Vec<u64>),
}

impl Places {
    /// The places of one queue of several, for requests in an order.
    pub(crate) fn new(
        order: Order,
        disk: u64,
        block: u64,
        lane: (u64, u64),
        depth: u64,
        seed: u64,
    ) -> Self {
        let (nth, lanes) = lane;
        let share = disk / lanes / block * block;
        match order {
            Order::Random => Self::Random {
                seed: mix(seed ^ nth),
                slots: lanes * depth,
                first_slot: nth * depth,
            },
            Order::Sequential => Self::Around {
                next: nth * share,
                start: nth * share,
                end: (nth + 1) * share,
            },
            Order::OnceEachBlock => Self::Once {
                next: nth * share,
                step: block,
                end: (nth + 1) * share,
            },
        }
    }

    /// The next place for a request of so many bytes from a slot; nothing when there are no more.
    pub(crate) fn next(&mut self, slot: u16, disk: u64, bytes: u64) -> Option<u64> {
        match self {
            Self::Random {
                seed,
                slots,
                first_slot,
            } => {
                *seed = seed.wrapping_add(1);
                let own = disk / bytes / *slots;
                let nth = (u128::from(mix(*seed)) * u128::from(own)) >> 64;
                let nth = u64::try_from(nth).expect("less than a u64 by construction");
                Some((nth * *slots + *first_slot + u64::from(slot)) * bytes)
            }
            Self::Around { next, start, end } => {
                let at = *next;
                *next = if at + 2 * bytes > *end {
                    *start
                } else {
                    at + bytes
                };
                Some(at)
            }
            Self::Once { next, step, end } => {
                let at = *next;
                *next += *step;
                (at < *end).then_some(at)
            }
            Self::Listed(places) => places.pop(),
        }
    }
}

/// When a load ends, if its places do not run out before.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span {
    /// Requests answered before are not counted.
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn of(order: Order, lane: (u64, u64)) -> Places {
        Places::new(order, 64 << 20, 4096, lane, 4, 1)
    }

    #[test]
    fn slots_never_meet_at_random_places() {
        let mut seen: [HashSet<u64>; 8] = Default::default();
        for lane in 0..2 {
            let mut places = of(Order::Random, (lane, 2));
            for nth in 0..10_000_u16 {
                let at = places.next(nth % 4, 64 << 20, 4096);
                let at = at.expect("there is no end of random places");
                assert!(at.is_multiple_of(4096) && at < 64 << 20);
                seen[usize::try_from(lane).unwrap() * 4 + usize::from(nth % 4)].insert(at);
            }
        }
        for (nth, slot) in seen.iter().enumerate() {
            assert!(seen[..nth].iter().all(|other| other.is_disjoint(slot)));
        }
    }

    #[test]
    fn queues_share_a_disk_in_order_without_meeting() {
        let mut first = of(Order::OnceEachBlock, (0, 2));
        let mut second = of(Order::OnceEachBlock, (1, 2));
        let all = |places: &mut Places| -> Vec<u64> {
            std::iter::from_fn(|| places.next(0, 64 << 20, 4096)).collect()
        };
        let visited = [all(&mut first), all(&mut second)].concat();
        assert!(visited.iter().copied().eq((0..64 << 20).step_by(4096)));
    }
}
