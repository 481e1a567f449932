//! Who is looking: when a released block may be used again (W4).
//!
//! A request learns file offsets from the map and uses them later. A block that was released
//! meanwhile must not get a new owner before every such request is done. So each
//! request has a [`Visit`] from before it asks the map until its I/O is complete, and a released
//! block waits until all visits have ended that began before its release was visible.
//!
//! Visits are counted per [`Lane`] (one per thread that serves requests, so counting
//! contends with nobody) and per phase. To wait, the phase is turned: new visits count in the
//! other one, and the old one only falls. A phase is turned only after the one before is empty.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;

use crate::writer::lock;

/// The visits to one disk.
#[derive(Debug, Default)]
pub(crate) struct Visits {
    turns: AtomicU64,
    lanes: Mutex<Vec<Arc<LaneCounts>>>,
    /// Somebody wants to know when the old phase is empty.
    is_awaited: AtomicBool,
    waiting: Mutex<Vec<Waker>>,
}

#[derive(Debug, Default)]
struct LaneCounts {
    by_phase: [AtomicU64; 2],
}

/// One thread's way into a disk.
#[derive(Clone, Debug)]
pub struct Lane(Arc<LaneInner>);

#[derive(Debug)]
struct LaneInner {
    visits: Arc<Visits>,
    counts: Arc<LaneCounts>,
}

/// A request's time inside a disk: as long as it lives, what the map said before stays usable.
#[derive(Debug)]
#[must_use = "offsets learnt from the map are good only as long as the visit lasts"]
pub struct Visit {
    lane: Lane,
    phase: usize,
}

impl Visits {
    pub(crate) fn lane(self: &Arc<Self>) -> Lane {
        let counts = Arc::new(LaneCounts::default());
        let mut lanes = lock(&self.lanes);
        // Lanes that nobody has any more and that are empty need no counting.
        lanes.retain(|lane| Arc::strong_count(lane) > 1);
        lanes.push(Arc::clone(&counts));
        Lane(Arc::new(LaneInner {
            visits: Arc::clone(self),
            counts,
        }))
    }

    /// Begins to wait for all visits of now. The last wait must be over ([`Self::is_over`]).
    pub(crate) fn turn(&self) {
        self.turns.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether the visits that the last turn waits for have all ended.
    pub(crate) fn is_over(&self) -> bool {
        let old = phase(self.turns.load(Ordering::SeqCst).wrapping_sub(1));
        lock(&self.lanes)
            .iter()
            .all(|lane| lane.by_phase[old].load(Ordering::SeqCst) == 0)
    }

    /// Wakes `wakers` when a visit ends that the last turn waits for; it may not be the last one.
    pub(crate) fn wake_when_over(&self, wakers: impl IntoIterator<Item = Waker>) {
        lock(&self.waiting).extend(wakers);
        self.is_awaited.store(true, Ordering::SeqCst);
        if self.is_over() {
            self.wake();
        }
    }

    fn wake(&self) {
        if self.is_awaited.swap(false, Ordering::SeqCst) {
            for waker in lock(&self.waiting).drain(..) {
                waker.wake();
            }
        }
    }
}

const fn phase(turns: u64) -> usize {
    if turns.is_multiple_of(2) { 0 } else { 1 }
}

impl Lane {
    /// Begins a visit.
    pub fn enter(&self) -> Visit {
        loop {
            let turns = self.0.visits.turns.load(Ordering::SeqCst);
            let phase = phase(turns);
            self.0.counts.by_phase[phase].fetch_add(1, Ordering::SeqCst);
            // If the phase was turned before the count was seen, nobody waits for this one.
            if self.0.visits.turns.load(Ordering::SeqCst) == turns {
                return Visit {
                    lane: self.clone(),
                    phase,
                };
            }
            self.leave(phase);
        }
    }

    fn leave(&self, phase: usize) {
        let before = self.0.counts.by_phase[phase].fetch_sub(1, Ordering::SeqCst);
        let is_old = phase != self::phase(self.0.visits.turns.load(Ordering::SeqCst));
        if before == 1 && is_old {
            self.0.visits.wake();
        }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.lane.leave(self.phase);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_waits_for_the_visits_before_it_and_for_no_others() {
        let visits = Arc::new(Visits::default());
        let (a, b) = (visits.lane(), visits.lane());
        let (old_a, old_b) = (a.enter(), b.enter());
        visits.turn();
        let new = a.enter();
        assert!(!visits.is_over());
        drop(old_a);
        assert!(!visits.is_over());
        drop(old_b);
        assert!(visits.is_over());
        visits.turn();
        assert!(!visits.is_over());
        drop(new);
        assert!(visits.is_over());
    }

    #[test]
    fn a_visit_counts_although_its_lane_is_gone() {
        let visits = Arc::new(Visits::default());
        let visit = visits.lane().enter();
        let _another = visits.lane();
        visits.turn();
        assert!(!visits.is_over());
        drop(visit);
        assert!(visits.is_over());
    }
}
