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

/// The file grows by an eighth of what it has, within these bounds: few syncs for a
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
    step_blocks: u32,
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
        let step_bytes =
            (u64::from(next) * area.stride_bytes() / 8).clamp(STEP_BYTES.start, STEP_BYTES.end);
        let step_blocks = u32::try_from(step_bytes.div_ceil(area.stride_bytes()))
            .expect("1 GiB has few blocks")
            .max(2);
        Self {
            fresh: VecDeque::new(),
            fresh_blocks: 0,
            stale,
            uncounted,
            next,
            blocks_in_image: blocks.in_image,
            step_blocks,
        }
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

    /// The plan is done, and that is durable.
    pub(crate) fn add(&mut self, plan: Plan) {
        let ranges = match plan {
            Plan::Recycle(ranges) => ranges,
            Plan::Extend(range) => {
                self.next = range.end;
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
