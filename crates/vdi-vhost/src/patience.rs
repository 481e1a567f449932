//! How long a worker looks for more work before it sleeps: a little while, if that was worth it lately.
//!
//! A worker that sleeps costs the guest a kick and itself a wake-up, on a virtual machine tens of microseconds. A driver
//! that answers at once is worth looking for; one that does not is not, and looking would only burn the host's
//! processor. So a look that found nothing is followed by sleeps without one, twice as many each time; one that found
//! something halves them. An idle worker looks not at all, since it does not wake up; one that is woken now and then by a slow
//! driver spends [`LOOK`] in every [`Waits::ForChains`] wake-ups.
//!
//! The same goes for a single small read or write that is in flight alone: storage that is over with it in less than
//! [`LOOK_FOR_TRANSFER`] is faster than the sleep and the wake-up. Such a look is longer, so the processor is offered to
//! others all the while ([`offer_processor`]); a worker that others take it from stops looking for long.

use std::time::Duration;

use crate::clock::{Moment, nanos};

/// How long one look takes: what a driver that polls needs to go on, and less than a sleep costs.
pub(crate) const LOOK: Duration = Duration::from_micros(16);

/// The same for a transfer: what solid-state storage takes for a small one, and a bound on what is burnt if it does not.
pub(crate) const LOOK_FOR_TRANSFER: Duration = Duration::from_micros(100);

/// A system call alone takes less; somebody else has used the processor.
const SHORT_ABSENCE: Duration = Duration::from_micros(3);

/// Somebody else keeps the processor busy.
const LONG_ABSENCE: Duration = Duration::from_micros(50);

/// What a look is for: decides how many sleeps without one there are at most between two.
#[derive(Debug, Clone, Copy)]
#[repr(u32)]
pub(crate) enum Waits {
    /// More requests.
    ForChains = 64,
    /// The end of a transfer. If the processor is wanted by others, each look can cost a turn of theirs, milliseconds.
    ForTransfer = 512,
}

/// What came of offering the processor to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Offer {
    /// Nobody wanted it.
    Declined,
    /// Somebody did, and gave it back.
    Taken,
    /// Somebody did, for long.
    Kept,
}

impl Offer {
    fn of(absence: u64) -> Self {
        match absence {
            _ if absence > nanos(LONG_ABSENCE) => Self::Kept,
            _ if absence > nanos(SHORT_ABSENCE) => Self::Taken,
            _ => Self::Declined,
        }
    }
}

/// Lets others who want it have this processor; when it is back, and what came of it.
pub(crate) fn offer_processor() -> (Moment, Offer) {
    let before = Moment::now();
    std::thread::yield_now();
    let now = Moment::now();
    (now, Offer::of(now.since(before)))
}

/// What the looks of a worker found lately.
#[derive(Debug)]
pub(crate) struct Patience {
    /// Sleeps after the next look that finds nothing.
    pause: u32,
    /// Sleeps until the next look.
    left: u32,
    most: u32,
}

impl Patience {
    /// Of a worker that has not looked yet.
    pub(crate) fn new(waits: Waits) -> Self {
        Self {
            pause: 0,
            left: 0,
            most: waits as u32,
        }
    }

    /// Whether to look before this sleep.
    pub(crate) fn looks(&mut self) -> bool {
        self.left = match self.left.checked_sub(1) {
            None => return true,
            Some(left) => left,
        };
        false
    }

    /// The look found something.
    pub(crate) fn found(&mut self) {
        self.pause /= 2;
    }

    /// The look found nothing.
    pub(crate) fn missed(&mut self) {
        self.pause = (self.pause * 2).clamp(1, self.most);
        self.left = self.pause;
    }

    /// Looking is wrong: somebody else needs the processor.
    pub(crate) fn is_in_the_way(&mut self) {
        (self.pause, self.left) = (self.most, self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks_among(patience: &mut Patience, sleeps: usize, finds: bool) -> usize {
        let mut looks = 0;
        for _ in 0..sleeps {
            if patience.looks() {
                looks += 1;
                if finds {
                    patience.found();
                } else {
                    patience.missed();
                }
            }
        }
        looks
    }

    #[test]
    fn looking_stops_where_nothing_is_found_and_comes_back_where_something_is() {
        let mut patience = Patience::new(Waits::ForChains);
        assert_eq!(looks_among(&mut patience, 100, true), 100);
        let misses = looks_among(&mut patience, 6500, false);
        assert!((100..=110).contains(&misses), "{misses}");
        // At most one pause is left, then every sleep has its look.
        let hits = looks_among(&mut patience, 1000, true);
        assert!(hits >= 1000 - 64, "{hits}");
    }

    #[test]
    fn a_worker_in_the_way_of_others_does_not_look_for_long() {
        let mut patience = Patience::new(Waits::ForTransfer);
        patience.is_in_the_way();
        assert_eq!(looks_among(&mut patience, 512, true), 0);
        assert_eq!(looks_among(&mut patience, 1, true), 1);
    }

    #[test]
    fn whoever_has_the_processor_for_long_keeps_it_from_the_worker() {
        let micros = |count: u64| Offer::of(count * 1000);
        assert_eq!(
            [1, 10, 3000].map(micros),
            [Offer::Declined, Offer::Taken, Offer::Kept]
        );
    }
}
