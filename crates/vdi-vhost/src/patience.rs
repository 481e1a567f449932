//! How long a worker looks for more work before it sleeps: a little while, if that was worth it lately.
//!
//! A worker that sleeps costs the guest a kick and itself a wake-up, on a virtual machine tens of microseconds. A driver
//! that answers at once is worth looking for; one that does not is not, and looking would only burn the host's
//! processor. So a look that found nothing is followed by sleeps without one, twice as many each time; one that found
//! something halves them. An idle worker looks not at all, since it does not wake up; one that is woken now and then by a slow
//! driver spends [`LOOK`] in every [`MOST_SLEEPS`] wake-ups.

use std::time::Duration;

/// How long one look takes: what a driver that polls needs to go on, and less than a sleep costs.
pub(crate) const LOOK: Duration = Duration::from_micros(16);

/// Most sleeps between two looks.
const MOST_SLEEPS: u32 = 64;

/// What the looks of a worker found lately.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    /// Sleeps after the next look that finds nothing.
    pause: u32,
    /// Sleeps until the next look.
    left: u32,
}

impl Patience {
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
        self.pause = (self.pause * 2).clamp(1, MOST_SLEEPS);
        self.left = self.pause;
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
        let mut patience = Patience::default();
        assert_eq!(looks_among(&mut patience, 100, true), 100);
        let misses = looks_among(&mut patience, 6500, false);
        assert!((100..=110).contains(&misses), "{misses}");
        // At most one pause is left, then every sleep has its look.
        let hits = looks_among(&mut patience, 1000, true);
        assert!(hits >= 1000 - 64, "{hits}");
    }
}
