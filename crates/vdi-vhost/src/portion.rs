//! How much of what a seat's guest wants is taken in one turn of its worker.
//!
//! A worker copies what the host has in memory on its own time, and everybody else at it waits meanwhile. Counted in requests that is little
//! for small ones (a burst of a queue), but 32 requests of 1 MiB take some milliseconds. So a turn begins to move [`TURN_BYTES`], and what
//! is beyond that is left in the rings for the next turns, which begin with other seats. A seat whose requests are small takes a burst in every
//! turn, whatever the others want: it is nobody's burden.
//!
//! How large requests are is known when they are taken. So a seat is judged by the last ones, and the first burst after many small ones is taken
//! whole.
//!
//! Measured by `ci/neighbours`.

use crate::queue::BURST;

/// Bytes that a worker begins to move in a turn, but for the last request of them and those of seats with small ones: some tenths of a
/// millisecond.
pub(crate) const TURN_BYTES: u64 = 2 << 20;

/// Requests of no more bytes cost about what they cost without any.
const SMALL: u64 = 16 << 10;

/// What one seat asks for, of late.
#[derive(Debug, Default)]
pub(crate) struct Portion {
    /// Bytes of the largest request, or half of that of those before: a large one is remembered for some bursts.
    largest: u64,
    /// The same of those of this burst.
    now: u64,
}

impl Portion {
    /// How many chains may be taken from a queue at once if so many bytes are left of the turn's.
    pub(crate) fn chains(&self, left: u64) -> u16 {
        if self.largest <= SMALL {
            return BURST;
        }
        let fit = u16::try_from(left / self.largest).unwrap_or(BURST);
        // One that is larger than all of a turn goes when there is something left.
        fit.clamp(u16::from(left > 0), BURST)
    }

    /// A request was taken that moves so many bytes.
    pub(crate) fn add(&mut self, bytes: u64) {
        self.now = self.now.max(bytes);
    }

    /// The burst is over.
    pub(crate) fn end(&mut self) {
        self.largest = std::mem::take(&mut self.now).max(self.largest / 2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(requests: &[u64]) -> Portion {
        let mut portion = Portion::default();
        requests.iter().for_each(|bytes| portion.add(*bytes));
        portion.end();
        portion
    }

    #[test]
    fn small_requests_are_taken_whatever_others_took() {
        for requests in [&[][..], &[512; 32], &[SMALL]] {
            assert_eq!(after(requests).chains(0), BURST);
        }
    }

    #[test]
    fn large_requests_are_taken_as_far_as_the_turn_has_bytes_for_them() {
        let portion = after(&[4096, 1 << 20, 4096]);
        let taken = [TURN_BYTES, TURN_BYTES / 2, 1, 0].map(|left| portion.chains(left));
        assert_eq!(taken, [2, 1, 1, 0]);
        assert_eq!(after(&[64 << 20]).chains(TURN_BYTES), 1);
        assert_eq!(after(&[SMALL + 1]).chains(u64::MAX), BURST);
    }

    #[test]
    fn a_large_request_is_remembered_for_some_bursts_of_small_ones() {
        let mut portion = after(&[1 << 20]);
        for _ in 0..5 {
            assert_eq!(portion.chains(0), 0);
            portion.add(4096);
            portion.end();
        }
        portion.end();
        assert_eq!(portion.chains(0), BURST);
    }
}
