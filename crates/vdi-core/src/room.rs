//! Room for new blocks (W1): which file blocks may be handed out, and how more are had.
//!
//! A file block is *fresh* when the header's count covers it, it lies inside the file,
//! it reads as zeros, nothing names it, and all that is durable. Only fresh blocks are
//! handed out, so an entry that names one reads right at any moment (W2).
//! A *stale* block has no owner either, but may hold old bytes: it was leaked by a crash or
//! let go by a write that failed. It becomes fresh when it is punched and synced.
//!
//! Nothing here does I/O: [`Room::plan`] says what is to be done, and
//! [`Room::add`] takes the result.

use std::collections::VecDeque;
use std::ops::Range;

use crate::block_map::Owners;
use crate::units::{DataArea, FileBlock};

/// The file grows by an eighth of what it has when it grows, within these bounds: few syncs for a
/// disk that fills, little to leak for one that does not.
const STEP_BYTES: Range<u64> = (64 << 20)..(1 << 30);

/// The blocks that may be handed out, and those that could be.
#[derive(Debug)]
pub(crate) struct Room {
    fresh: VecDeque<Range<u32>>,
    fresh_blocks: u32,
    stale: Vec<Range<u32>>,
    /// Blocks behind the header's count that the file covered at open, for whatever
    /// reason: used only when there is nothing else.
    uncounted: Vec<Range<u32>>,
    /// The file is lengthened from here.
    next: u32,
    blocks_in_image: u32,
    /// The file grows by so many next.
    step_blocks: u32,
    /// [`STEP_BYTES`] in blocks.
    step_bounds: (u32, u32),
}

/// How room is made.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Punch these out of the file.
    Recycle(Vec<Range<u32>>),
    /// Lengthen the file by these.
    Extend(Range<u32>),
}

impl Room {
    /// The room of an image as it was found at open.
    pub(crate) fn new(owners: &Owners, area: DataArea, blocks: Counts, file_len: u64) -> Self {
        let covered = u32::try_from(area.blocks_covered(file_len)).unwrap_or(u32::MAX);
        let counted = blocks.allocated.min(blocks.in_image);
        let next = owners.end().max(counted).max(covered).min(blocks.in_image);
        let (mut stale, mut uncounted) = (Vec::new(), Vec::new());
        for gap in owners.gaps(next) {
            let cut = counted.clamp(gap.start, gap.end);
            stale.extend((gap.start < cut).then_some(gap.start..cut));
            uncounted.extend((cut < gap.end).then_some(cut..gap.end));
        }
        let blocks_of = |bytes: u64| {
            let blocks = u32::try_from(bytes.div_ceil(area.stride_bytes()));
            blocks.expect("1 GiB has few blocks").max(2)
        };
        let mut room = Self {
            fresh: VecDeque::new(),
            fresh_blocks: 0,
            stale,
            uncounted,
            next,
            blocks_in_image: blocks.in_image,
            step_blocks: 0,
            step_bounds: (blocks_of(STEP_BYTES.start), blocks_of(STEP_BYTES.end)),
        };
        room.lengthen_step();
        room
    }

    /// The next step is an eighth of what the file has now.
    fn lengthen_step(&mut self) {
        let (shortest, longest) = self.step_bounds;
        self.step_blocks = (self.next / 8).clamp(shortest, longest);
    }

    /// How many blocks can be handed out, and how many more are nobody's; where the file is lengthened.
    pub(crate) fn counts(&self) -> (u32, u32, u32) {
        let sum = |ranges: &[Range<u32>]| ranges.iter().map(|range| range.end - range.start).sum();
        (self.fresh_blocks, sum(&self.stale), self.next)
    }

    /// Whether `count` blocks can be handed out.
    pub(crate) fn has(&self, count: u32) -> bool {
        self.fresh_blocks >= count
    }

    /// Whether more should be made before it is needed.
    pub(crate) fn is_low(&self) -> bool {
        let can_grow = self.next < self.blocks_in_image || !self.stale.is_empty();
        can_grow && !self.has(self.step_blocks / 2)
    }

    /// Hands one out.
    pub(crate) fn take(&mut self) -> Option<FileBlock> {
        let first = self.fresh.front_mut()?;
        let block = FileBlock::new(first.next()?)?;
        if first.start == first.end {
            self.fresh.pop_front();
        }
        self.fresh_blocks -= 1;
        Some(block)
    }

    /// Takes one back that was handed out and is in no entry; what it holds is unknown.
    pub(crate) fn give_back(&mut self, block: FileBlock) {
        self.stale.push(block.get()..block.get() + 1);
    }

    /// Takes back what was released and nobody uses any more.
    pub(crate) fn add_stale(&mut self, ranges: Vec<Range<u32>>) {
        self.stale.extend(ranges);
    }

    /// What to do for `wanted` blocks more; `None` if there is no more.
    ///
    /// The blocks named are the plan's until [`Self::add`] or [`Self::abandon`].
    pub(crate) fn plan(&mut self, wanted: u32) -> Option<Plan> {
        if !self.stale.is_empty() {
            return Some(Plan::Recycle(std::mem::take(&mut self.stale)));
        }
        let count = self
            .step_blocks
            .max(wanted)
            .min(self.blocks_in_image - self.next);
        if count > 0 {
            return Some(Plan::Extend(self.next..self.next + count));
        }
        let last = std::mem::take(&mut self.uncounted);
        (!last.is_empty()).then_some(Plan::Recycle(last))
    }

    /// What to do instead of a plan that failed for lack of space: only what is missing of `wanted` blocks, if
    /// that is less. A whole step is more than a file system that is almost full, or a limit, may allow.
    pub(crate) fn least(&self, plan: &Plan, wanted: u32) -> Option<Plan> {
        let missing = wanted.saturating_sub(self.fresh_blocks);
        match plan {
            Plan::Extend(range) if (1..range.end - range.start).contains(&missing) => {
                Some(Plan::Extend(range.start..range.start + missing))
            }
            Plan::Extend(_) | Plan::Recycle(_) => None,
        }
    }

    /// The plan is done, and that is durable.
    pub(crate) fn add(&mut self, plan: Plan) {
        let ranges = match plan {
            Plan::Recycle(ranges) => ranges,
            Plan::Extend(range) => {
                self.next = range.end;
                self.lengthen_step();
                vec![range]
            }
        };
        for range in ranges {
            self.fresh_blocks += range.end - range.start;
            self.fresh.push_back(range);
        }
    }

    /// The plan could not be done.
    pub(crate) fn abandon(&mut self, plan: Plan) {
        match plan {
            Plan::Recycle(ranges) => self.stale.extend(ranges),
            Plan::Extend(_) => {}
        }
    }
}

/// The two counts of the header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    pub(crate) in_image: u32,
    pub(crate) allocated: u32,
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges are what is compared"
)]
mod tests {
    use super::*;
    use crate::units::BlockSize;

    const IN_IMAGE: u32 = 1000;

    fn area() -> DataArea {
        DataArea::new(512, 0, BlockSize::new(1 << 20).unwrap())
    }

    /// The room of an image with 1 MiB blocks that owns `owned`.
    fn room(owned: &[u32], counted: u32, file_blocks: u32) -> Room {
        let counts = Counts {
            in_image: IN_IMAGE,
            allocated: counted,
        };
        let owners = Owners::of(owned);
        Room::new(&owners, area(), counts, area().end_of(file_blocks).0)
    }

    fn done(room: &mut Room, wanted: u32) -> Option<Plan> {
        let plan = room.plan(wanted)?;
        let copy = match &plan {
            Plan::Recycle(ranges) => Plan::Recycle(ranges.clone()),
            Plan::Extend(range) => Plan::Extend(range.clone()),
        };
        room.add(plan);
        Some(copy)
    }

    fn all(room: &mut Room) -> Vec<u32> {
        std::iter::from_fn(|| room.take())
            .map(FileBlock::get)
            .collect()
    }

    #[test]
    fn nothing_is_handed_out_before_a_plan_is_done() {
        let mut room = room(&[0], 5, 5);
        assert!(!room.has(1) && room.has(0) && room.is_low());
        assert_eq!(room.take(), None);
        let plan = room.plan(1).unwrap();
        assert_eq!(plan, Plan::Recycle(vec![1..5]));
        assert_eq!(room.take(), None);
        room.add(plan);
        assert!(room.has(4) && !room.has(5));
        assert_eq!(all(&mut room), [1, 2, 3, 4]);
    }

    #[test]
    fn the_next_number_is_behind_map_count_and_file() {
        for (owned, counted, file) in [(9, 2, 3), (1, 10, 3), (1, 2, 10)] {
            let mut room = room(&[owned], counted, file);
            room.stale.clear();
            let Some(Plan::Extend(range)) = room.plan(1) else {
                panic!("it grows");
            };
            assert_eq!(range, 10..10 + 64);
        }
    }

    #[test]
    fn a_step_is_an_eighth_within_its_bounds_and_at_least_what_is_wanted() {
        let step = |owned: u32, wanted| match room(&[owned - 1], owned, owned).plan(wanted) {
            Some(Plan::Extend(range)) => range.end - range.start,
            _ => 0,
        };
        let mut grown = room(&[0], 1, 1);
        assert_eq!(done(&mut grown, 100), Some(Plan::Extend(1..101)));
        grown.stale.clear();
        assert_eq!(done(&mut grown, 1), Some(Plan::Extend(101..165)));
        let full: Vec<u32> = (0..800).collect();
        assert_eq!(room(&full, 800, 800).plan(1), Some(Plan::Extend(800..900)));
        assert_eq!(step(1, 1), 64);
        assert_eq!(step(1, 2000), 999, "blocks_in_image is the end");
    }

    #[test]
    fn steps_become_longer_as_the_file_does() {
        let mut room = room(&[], 0, 0);
        let steps = std::iter::from_fn(|| match done(&mut room, 1)? {
            Plan::Extend(range) => Some(range.end - range.start),
            Plan::Recycle(_) => None,
        });
        let (shortest, rest) = ([64; 9], [72, 81, 91, 102, 78]);
        assert!(steps.eq(shortest.into_iter().chain(rest)));
    }

    #[test]
    fn what_is_not_counted_is_used_when_there_is_nothing_else() {
        let owned: Vec<u32> = (0..990).filter(|number| *number != 7).collect();
        let mut room = room(&owned, 990, 995);
        assert_eq!(done(&mut room, 1), Some(Plan::Recycle(vec![7..8])));
        assert_eq!(done(&mut room, 1), Some(Plan::Extend(995..1000)));
        assert_eq!(done(&mut room, 1), Some(Plan::Recycle(vec![990..995])));
        assert_eq!(done(&mut room, 1), None);
        assert!(!room.is_low(), "there is nothing to be had");
        let blocks = all(&mut room);
        assert_eq!(blocks.len(), 11);
        assert!(blocks.iter().all(|number| !owned.contains(number)));
    }

    #[test]
    fn a_block_given_back_is_recycled_before_it_is_taken_again() {
        let mut room = room(&[], 0, 0);
        assert_eq!(done(&mut room, 1), Some(Plan::Extend(0..64)));
        let block = room.take().unwrap();
        room.give_back(block);
        assert!(!all(&mut room).contains(&block.get()));
        assert_eq!(done(&mut room, 1), Some(Plan::Recycle(vec![0..1])));
        assert_eq!(room.take(), Some(block));
    }

    #[test]
    fn the_least_instead_of_a_step_is_what_is_missing() {
        let mut room = room(&[0], 1, 1);
        let plan = room.plan(3).unwrap();
        assert_eq!(room.least(&plan, 3), Some(Plan::Extend(1..4)));
        assert_eq!(room.least(&plan, 0), None, "nobody waits for it");
        assert_eq!(room.least(&plan, 64), None, "it is no less");
        room.add(Plan::Extend(1..4));
        room.take();
        let plan = room.plan(3).unwrap();
        assert_eq!(plan, Plan::Extend(4..68));
        assert_eq!(room.least(&plan, 3), Some(Plan::Extend(4..5)));
        assert_eq!(room.least(&Plan::Recycle(vec![0..9]), 3), None);
    }

    #[test]
    fn a_plan_that_failed_can_be_made_again() {
        let mut room = room(&[3], 4, 4);
        for _ in 0..2 {
            let plan = room.plan(1).unwrap();
            assert_eq!(plan, Plan::Recycle(vec![0..3]));
            room.abandon(plan);
        }
        room.stale.clear();
        for _ in 0..2 {
            let plan = room.plan(1).unwrap();
            assert_eq!(plan, Plan::Extend(4..68));
            room.abandon(plan);
        }
        assert!(!room.has(1));
    }
}
