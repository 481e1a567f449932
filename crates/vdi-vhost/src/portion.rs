//! How much of what a seat's guest wants is taken in one turn of its worker.
//!
//! A worker copies what the host has in memory on its own time, and everybody else at it waits meanwhile. Counted in requests that is little
//! for small ones (a burst of a queue), but 32 requests of 1 MiB take some milliseconds. So a turn begins to move [`TURN_BYTES`], and what
//! is beyond that is left in the rings for the next turns, or waits at its seat if it was taken already: how large requests are is known when they are taken, so
//! a seat is judged by the last ones, and the first burst after many small ones is taken whole. A request that is larger than a turn moves in steps of a turn's bytes.
//!
//! A request costs something whatever it moves ([`REQUEST_BYTES`]), so a burst of small ones is a turn's, too, and disks that are flooded with them take turns, each with
//! a whole burst.
//!
//! A seat whose requests are small and few takes them in every turn, whatever the others want: it is nobody's burden. It goes before the others, and its guest is called before
//! their requests are begun with; so it waits for the rest of one turn, and not for a second one. The others have a whole turn then, and go on with the one that had nothing of
//! the last one.
//!
//! Measured by `ci/neighbours`.

use vdi_core::SECTOR_SIZE;

use crate::queue::BURST;

/// Bytes that a worker begins to move in a turn, but for the last request of them, which is no larger than that, and those of small ones: some
/// tenths of a millisecond.
pub(crate) const TURN_BYTES: u64 = 1 << 20;

/// Requests of no more bytes cost about what they cost without any.
pub(crate) const SMALL: u64 = 16 << 10;

/// What a request of fewer bytes counts as, so that a burst is a turn's: one of 4 KiB takes a worker 2 to 4 microseconds (`ci/neighbours`), and so
/// do 32 KiB that are copied.
pub(crate) const REQUEST_BYTES: u64 = TURN_BYTES / BURST as u64;

/// Requests of a seat in one turn that hold nobody up for long.
const FEW: u32 = 8;

/// How many of `count` sectors from `start` on move in one step, if anything may: they end where a block does, if one does, so that no block is begun
/// with in one step and ended in another.
pub(crate) fn step_sectors(start: u64, count: u64, block_sectors: u64) -> u64 {
    let most = TURN_BYTES / SECTOR_SIZE;
    if count <= most {
        return count;
    }
    let behind = (start + most) % block_sectors;
    if behind < most { most - behind } else { most }
}

/// What one seat asks for, of late.
#[derive(Debug, Default)]
pub(crate) struct Portion {
    /// Bytes of the largest request, or half of that of those before: a large one is remembered for some bursts.
    largest: u64,
    /// The same of those of this burst.
    now: u64,
    /// Requests that were taken in a turn, or half of those in the one before.
    many: u32,
    /// Those of this turn, if it was the seat's turn.
    taken: Option<u32>,
}

impl Portion {
    /// Whether its requests are small and few.
    pub(crate) fn is_light(&self) -> bool {
        self.is_small() && self.many <= FEW
    }

    fn is_small(&self) -> bool {
        self.largest <= SMALL
    }

    /// How many chains may be taken from a queue at once if so many bytes are left of the turn's.
    pub(crate) fn chains(&self, left: u64) -> u16 {
        if self.is_light() || (self.is_small() && left > 0) {
            return BURST;
        }
        let fit = u16::try_from(left / self.largest).unwrap_or(BURST);
        // One that is larger than what is left goes when there is something left.
        fit.clamp(u16::from(left > 0), BURST)
    }

    /// A request was taken that moves so many bytes.
    pub(crate) fn add(&mut self, bytes: u64) {
        self.now = self.now.max(bytes);
        *self.taken.get_or_insert(0) += 1;
    }

    /// The burst is over, of which it may be that nothing came.
    pub(crate) fn end(&mut self) {
        self.taken.get_or_insert(0);
        self.largest = std::mem::take(&mut self.now).max(self.largest / 2);
    }

    /// The turn is over, as far as requests are taken.
    pub(crate) fn end_turn(&mut self) {
        if let Some(taken) = self.taken.take() {
            self.many = taken.max(self.many / 2);
        }
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
    fn many_small_requests_are_taken_by_bursts_while_the_turn_has_anything_left() {
        let turn = |portion: &mut Portion, requests| {
            (0..requests).for_each(|_| portion.add(4096));
            portion.end();
            portion.end_turn();
        };
        let mut portion = Portion::default();
        turn(&mut portion, FEW);
        assert!(portion.is_light());
        turn(&mut portion, u32::from(BURST));
        let taken = [TURN_BYTES, 1, 0].map(|left| portion.chains(left));
        assert_eq!(taken, [BURST, BURST, 0]);
        // A turn that others had says nothing of it.
        (0..9).for_each(|_| portion.end_turn());
        assert!(!portion.is_light());
        turn(&mut portion, 0);
        assert!(!portion.is_light());
        turn(&mut portion, 0);
        assert!(portion.is_light());
    }

    #[test]
    fn large_requests_are_taken_as_far_as_the_turn_has_bytes_for_them() {
        let portion = after(&[4096, 1 << 20, 4096]);
        let taken = [TURN_BYTES, TURN_BYTES / 2, 1, 0].map(|left| portion.chains(left));
        assert_eq!(taken, [1, 1, 1, 0]);
        assert_eq!(after(&[TURN_BYTES / 4]).chains(TURN_BYTES), 4);
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

    #[test]
    fn a_step_is_no_larger_than_a_turn_and_ends_no_block_in_two() {
        let turn = TURN_BYTES / SECTOR_SIZE;
        for count in [1, 8, turn] {
            assert_eq!(step_sectors(5, count, turn), count);
        }
        // The first one ends with the block that it begins in.
        assert_eq!(step_sectors(5, 3 * turn, turn), turn - 5);
        assert_eq!(step_sectors(turn, 2 * turn, turn), turn);
        assert_eq!(step_sectors(5, 3 * turn, turn / 4), turn - 5);
        // Of blocks that are larger it has a part.
        assert_eq!(step_sectors(0, 9 * turn, 8 * turn), turn);
        assert_eq!(step_sectors(8 * turn - 5, 9 * turn, 8 * turn), 5);
    }
}
