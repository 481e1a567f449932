//! What a disk did: requests, bytes, errors and latencies by kind, and what it waited for.
//!
//! ```text
//! seat: Tally ─► Block ─┐
//! seat: Tally ─► Block ─┴► Stats::snapshot
//! ```
//!
//! - A seat counts in numbers of its own and adds them up once per turn, so counting takes no lock and no cache line is written by two
//!   threads. Each block has one writer; readers see every number complete, but not all of one instant.
//! - Latency is from the turn in which a chain was taken until its answer was published, by the worker's clock, which it asks once per turn.
//!   What a request waited in the ring is not known to us.
//! - A block stays when its seat goes, and the next seat of the disk goes on with it: nothing that was counted is lost, and there are never
//!   more blocks than there were seats at the same time. Each has 2.5 KiB.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use crate::clock::Moment;
use crate::request::{Kind, Status};

/// Buckets of a histogram: below 1 µs, 2, 3, 4, 6, 8, 12, 16 ... up to 12.6 s (2^23 + 2^22 µs), and all above.
const BUCKETS: usize = 48;

/// Counters of one disk.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    /// One per seat; those without are held here only.
    blocks: Mutex<Vec<Arc<Block>>>,
}

/// The numbers of one seat, written by that alone. Aligned, so that no two share a cache line.
#[derive(Debug)]
#[repr(align(64))]
struct Block {
    kinds: [KindBlock; Kind::COUNT],
    refused: AtomicU64,
    in_flight: AtomicU64,
    restarted: AtomicU64,
    throttled: AtomicU64,
    throttled_ns: AtomicU64,
    syncs: AtomicU64,
    failed_syncs: AtomicU64,
    syncs_ns: AtomicU64,
}

#[derive(Debug)]
struct KindBlock {
    /// Requests by their latency.
    buckets: [AtomicU64; BUCKETS],
    latency_ns: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
}

/// What was counted of a disk since the daemon was started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct StatsSnapshot {
    /// VIRTIO_BLK_T_IN.
    pub(crate) read: KindSnapshot,
    /// VIRTIO_BLK_T_OUT.
    pub(crate) write: KindSnapshot,
    /// VIRTIO_BLK_T_FLUSH.
    pub(crate) flush: KindSnapshot,
    /// VIRTIO_BLK_T_DISCARD.
    pub(crate) discard: KindSnapshot,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    pub(crate) write_zeroes: KindSnapshot,
    /// VIRTIO_BLK_T_GET_ID.
    pub(crate) get_id: KindSnapshot,
    /// Chains that were answered and are no requests that the disk has: malformed, outside of it, writes to one that is read-only.
    pub(crate) refused_requests: u64,
    /// Requests that were taken and are not answered, as of the end of each thread's last turn.
    pub(crate) in_flight_requests: u64,
    /// Requests that an earlier daemon left in flight and that were started again.
    pub(crate) restarted_requests: u64,
    /// Requests that limits kept waiting in their rings.
    pub(crate) throttled_requests: u64,
    /// How long limits kept requests waiting, added up over the threads that serve the disk.
    pub(crate) throttled_us: u64,
    /// Syncs of the image for flushes, write-through and copies over a parent's data; not those of the housekeeper.
    pub(crate) syncs: u64,
    /// Those that failed.
    pub(crate) failed_syncs: u64,
    /// How long all of them took together.
    pub(crate) syncs_us: u64,
}

/// What a disk takes, and how it fares.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Usage {
    /// The size that the guest sees.
    pub(crate) size_bytes: u64,
    /// The unit of allocation.
    pub(crate) block_bytes: u64,
    /// Blocks with storage in the top image.
    pub(crate) allocated_blocks: u64,
    /// Blocks that lost theirs since the daemon was started.
    pub(crate) released_blocks: u64,
    /// Length of the top image's file.
    pub(crate) file_bytes: u64,
    /// Requests that the host failed.
    pub(crate) failed_requests: u64,
    /// Whether a failure ended all writing until the daemon is started again.
    pub(crate) failed: bool,
}

/// What was counted of one kind of request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct KindSnapshot {
    /// Requests that were answered, with whatever status.
    pub(crate) requests: u64,
    /// Those that were not answered with OK.
    pub(crate) errors: u64,
    /// Bytes that the others read, wrote or made zeros.
    pub(crate) bytes: u64,
    /// From when they were taken until the guest had their answers, added up.
    pub(crate) latency_us: u64,
    /// The same one by one, but for buckets with no requests.
    pub(crate) latencies: Vec<Bucket>,
}

/// Requests that took about the same time. Those of all buckets are as many as there were requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Bucket {
    /// Not longer than this, and longer than the bucket before; none: any longer time.
    pub(crate) at_most_us: Option<u64>,
    /// How many.
    pub(crate) requests: u64,
}

/// A request as it is counted, from when it was taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ticket {
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    pub(crate) taken: Moment,
}

/// Counts for one seat.
#[derive(Debug)]
pub(crate) struct Tally {
    block: Arc<Block>,
    /// What was taken and answered with OK in this turn.
    at_once: [AtOnce; Kind::COUNT],
    /// What was answered in this turn and taken at another time.
    late: Vec<(Kind, Moment)>,
    refused: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct AtOnce {
    requests: u64,
    bytes: u64,
}

impl Stats {
    /// Counts for a seat from now on.
    pub(crate) fn sit(&self) -> Tally {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        // Only one that is nobody's can be had for itself, and then its last writer's numbers are seen.
        let is_free = |block: &mut Arc<Block>| Arc::get_mut(block).is_some();
        let free = blocks.iter_mut().position(is_free);
        let free = free.map(|free| Arc::clone(&blocks[free]));
        let block = free.unwrap_or_else(|| {
            let new = Arc::new(Block::new());
            blocks.push(Arc::clone(&new));
            new
        });
        Tally {
            block,
            at_once: [AtOnce::default(); Kind::COUNT],
            late: Vec::new(),
            refused: 0,
        }
    }

    /// All seats' numbers.
    pub(crate) fn snapshot(&self) -> StatsSnapshot {
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |of: fn(&Block) -> &AtomicU64| -> u64 {
            blocks.iter().map(|block| of(block).load(Relaxed)).sum()
        };
        let kind = |kind| KindSnapshot::of(&blocks, kind);
        StatsSnapshot {
            read: kind(Kind::Read),
            write: kind(Kind::Write),
            flush: kind(Kind::Flush),
            discard: kind(Kind::Discard),
            write_zeroes: kind(Kind::WriteZeroes),
            get_id: kind(Kind::GetId),
            refused_requests: sum(|block| &block.refused),
            in_flight_requests: sum(|block| &block.in_flight),
            restarted_requests: sum(|block| &block.restarted),
            throttled_requests: sum(|block| &block.throttled),
            throttled_us: sum(|block| &block.throttled_ns) / 1000,
            syncs: sum(|block| &block.syncs),
            failed_syncs: sum(|block| &block.failed_syncs),
            syncs_us: sum(|block| &block.syncs_ns) / 1000,
        }
    }
}

impl StatsSnapshot {
    /// All kinds.
    pub(crate) const fn kinds(&self) -> [(Kind, &KindSnapshot); Kind::COUNT] {
        [
            (Kind::Read, &self.read),
            (Kind::Write, &self.write),
            (Kind::Flush, &self.flush),
            (Kind::Discard, &self.discard),
            (Kind::WriteZeroes, &self.write_zeroes),
            (Kind::GetId, &self.get_id),
        ]
    }
}

impl KindSnapshot {
    fn of(blocks: &[Arc<Block>], kind: Kind) -> Self {
        let sum = |of: &dyn Fn(&KindBlock) -> &AtomicU64| -> u64 {
            let of = |block: &Arc<Block>| of(&block.kinds[kind as usize]).load(Relaxed);
            blocks.iter().map(of).sum()
        };
        let bucket = |nth| Bucket {
            at_most_us: bound_us(nth),
            requests: sum(&|block| &block.buckets[nth]),
        };
        let is_some = |bucket: &Bucket| bucket.requests > 0;
        let latencies: Vec<_> = (0..BUCKETS).map(bucket).filter(is_some).collect();
        Self {
            requests: latencies.iter().map(|bucket| bucket.requests).sum(),
            errors: sum(&|block| &block.errors),
            bytes: sum(&|block| &block.bytes),
            latency_us: sum(&|block| &block.latency_ns) / 1000,
            latencies,
        }
    }
}

impl Block {
    fn new() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            kinds: std::array::from_fn(|_| KindBlock {
                buckets: std::array::from_fn(|_| zero()),
                latency_ns: zero(),
                errors: zero(),
                bytes: zero(),
            }),
            refused: zero(),
            in_flight: zero(),
            restarted: zero(),
            throttled: zero(),
            throttled_ns: zero(),
            syncs: zero(),
            failed_syncs: zero(),
            syncs_ns: zero(),
        }
    }
}

impl KindBlock {
    fn took(&self, nanos: u64, requests: u64) {
        add(&self.buckets[bucket_of(nanos)], requests);
        add(&self.latency_ns, nanos.saturating_mul(requests));
    }
}

impl Tally {
    /// A request was taken and answered with OK in this turn.
    #[inline]
    pub(crate) fn at_once(&mut self, kind: Kind, bytes: u64) {
        let at_once = &mut self.at_once[kind as usize];
        at_once.requests += 1;
        at_once.bytes += bytes;
    }

    /// A request is over.
    pub(crate) fn over(&mut self, ticket: Ticket, status: Status) {
        let block = &self.block.kinds[ticket.kind as usize];
        match status {
            Status::Ok => add(&block.bytes, ticket.bytes),
            Status::IoError | Status::Unsupported => add(&block.errors, 1),
        }
        self.late.push((ticket.kind, ticket.taken));
    }

    /// A chain was answered that is no request.
    pub(crate) fn refused(&mut self) {
        self.refused += 1;
    }

    /// So many requests of an earlier daemon are started again.
    pub(crate) fn restarted(&self, requests: usize) {
        add(&self.block.restarted, requests as u64);
    }

    /// So many requests were taken late because of a limit.
    pub(crate) fn throttled(&self, requests: u64) {
        add(&self.block.throttled, requests);
    }

    /// A limit kept requests waiting for so long.
    pub(crate) fn was_held(&self, nanos: u64) {
        add(&self.block.throttled_ns, nanos);
    }

    /// A sync is over.
    pub(crate) fn synced(&self, nanos: u64, is_ok: bool) {
        add(&self.block.syncs, 1);
        add(&self.block.failed_syncs, u64::from(!is_ok));
        add(&self.block.syncs_ns, nanos);
    }

    /// Ends a turn: what it took was taken at `began`, what it answered was answered by `ended`, and so many are in flight.
    pub(crate) fn turn_is_over(&mut self, began: Moment, ended: Moment, in_flight: usize) {
        let blocks = self.block.kinds.iter();
        for (at_once, block) in self.at_once.iter_mut().zip(blocks) {
            if at_once.requests > 0 {
                block.took(ended.since(began), at_once.requests);
                add(&block.bytes, at_once.bytes);
                *at_once = AtOnce::default();
            }
        }
        for (kind, taken) in self.late.drain(..) {
            self.block.kinds[kind as usize].took(ended.since(taken), 1);
        }
        if self.refused > 0 {
            add(&self.block.refused, std::mem::take(&mut self.refused));
        }
        self.block.in_flight.store(in_flight as u64, Relaxed);
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        self.block.in_flight.store(0, Relaxed);
    }
}

/// Adds to a number that nobody else writes.
fn add(number: &AtomicU64, more: u64) {
    number.store(number.load(Relaxed).wrapping_add(more), Relaxed);
}

/// The bucket of a latency.
fn bucket_of(nanos: u64) -> usize {
    // A whole number of microseconds belongs to the bucket that it bounds.
    let us = nanos.saturating_sub(1) / 1000;
    let nth = match us.checked_ilog2() {
        None => 0,
        Some(0) => 1,
        Some(log) => 2 * log as usize + usize::from(us >> (log - 1) & 1 == 1),
    };
    nth.min(BUCKETS - 1)
}

/// The longest latency of a bucket, but for the last.
fn bound_us(nth: usize) -> Option<u64> {
    let next = nth + 1;
    match next {
        1 | 2 => Some(next as u64),
        BUCKETS => None,
        _ => Some((2 + next as u64 % 2) << (next / 2 - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(buckets: &[Bucket]) -> Vec<(Option<u64>, u64)> {
        let some = buckets.iter().filter(|bucket| bucket.requests > 0);
        some.map(|bucket| (bucket.at_most_us, bucket.requests))
            .collect()
    }

    #[test]
    fn a_latency_is_in_the_first_bucket_whose_bound_it_does_not_exceed() {
        let bounds: Vec<_> = (0..BUCKETS).map_while(bound_us).collect();
        assert_eq!(bounds[..8], [1, 2, 3, 4, 6, 8, 12, 16]);
        assert_eq!((bounds.len(), bounds[46]), (BUCKETS - 1, 12_582_912));
        for (nth, bound) in bounds.iter().enumerate() {
            assert_eq!(bucket_of(bound * 1000), nth, "{bound}");
            assert_eq!(bucket_of(bound * 1000 + 1), nth + 1, "{bound}");
        }
        assert_eq!((bucket_of(0), bucket_of(u64::MAX)), (0, BUCKETS - 1));
    }

    #[test]
    fn every_answer_is_counted_with_its_kind_bytes_status_and_latency() {
        let stats = Stats::default();
        let mut tally = stats.sit();
        let began = Moment(1_000_000);
        let ticket = |kind, bytes, taken| Ticket {
            kind,
            bytes,
            taken: Moment(taken),
        };
        tally.at_once(Kind::Read, 4096);
        tally.at_once(Kind::Read, 512);
        tally.over(ticket(Kind::Read, 512, 0), Status::Ok);
        tally.over(ticket(Kind::Write, 8192, 500_000), Status::IoError);
        tally.over(ticket(Kind::Discard, 1 << 20, 1_000_000), Status::Ok);
        tally.refused();
        tally.turn_is_over(began, began.plus(5000), 7);
        // Nothing is counted twice.
        tally.turn_is_over(began, began.plus(9000), 7);
        let all = stats.snapshot();
        assert_eq!(
            (all.read.requests, all.read.bytes, all.read.errors),
            (3, 5120, 0)
        );
        assert_eq!(found(&all.read.latencies), [(Some(6), 2), (Some(1024), 1)]);
        assert_eq!(all.read.latency_us, 5 + 5 + 1005);
        assert_eq!(
            (all.write.requests, all.write.bytes, all.write.errors),
            (1, 0, 1)
        );
        assert_eq!(found(&all.write.latencies), [(Some(512), 1)]);
        assert_eq!((all.discard.requests, all.discard.bytes), (1, 1 << 20));
        assert_eq!((all.refused_requests, all.in_flight_requests), (1, 7));
    }

    #[test]
    fn seats_add_up_and_the_next_seat_goes_on_with_the_numbers_of_one_that_left() {
        let stats = Stats::default();
        let [mut one, mut other] = [stats.sit(), stats.sit()];
        for tally in [&mut one, &mut other] {
            tally.at_once(Kind::Flush, 0);
            tally.turn_is_over(Moment(0), Moment(10), 3);
        }
        assert_eq!(stats.snapshot().in_flight_requests, 6);
        drop(one);
        let mut next = stats.sit();
        next.at_once(Kind::Flush, 0);
        next.turn_is_over(Moment(0), Moment(10), 1);
        let all = stats.snapshot();
        assert_eq!((all.flush.requests, all.in_flight_requests), (3, 4));
        assert_eq!(stats.blocks.lock().unwrap().len(), 2);
        assert!(size_of::<Block>() <= 2560);
    }
}
