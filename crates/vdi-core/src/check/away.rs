//! Entries that name file blocks behind the numbers that the header reaches.
//!
//! In a full image some of them may be *away* (B1 of [`crate::block_map`]): a growth was stopped, and every program reads
//! them. Anywhere else such entries are corruption. Which it is shows when the map was walked to its end, so what is
//! found until then is kept here: a few findings, and a bit for each block that can be away (C1 of [`super`]).

use super::map::Layout;
use super::{Finding, LISTED_PER_KIND, Report, Severity};
use crate::block_map::MOST_AWAY;
use crate::units::FileBlock;

/// What a walk through the map found behind the numbers.
pub(super) struct Behind {
    listed: Vec<Finding>,
    count: u64,
    /// The first one: disk block, file block.
    first: Option<(u32, u32)>,
    /// The number behind the highest one.
    end: u32,
    /// Which of the [`MOST_AWAY`] are taken.
    taken: Vec<u64>,
    /// One of them cannot be away: too far, not in the file, or taken twice.
    is_wrong: bool,
}

/// Blocks that are away.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Away {
    pub(super) count: u64,
    /// The number behind the highest one, if there is one.
    pub(super) end: u32,
}

impl Behind {
    pub(super) fn new() -> Self {
        Self {
            listed: Vec::new(),
            count: 0,
            first: None,
            end: 0,
            taken: vec![0; MOST_AWAY.div_ceil(u64::BITS) as usize],
            is_wrong: false,
        }
    }

    /// Keeps an entry that names `file_block`, which is not below `blocks_in_image`.
    pub(super) fn visit(&mut self, layout: &Layout, block: u32, file_block: FileBlock) {
        self.count += 1;
        if self.listed.len() < LISTED_PER_KIND {
            self.listed.push(layout.misplaced(block, file_block));
        }
        let number = file_block.get();
        self.first.get_or_insert((block, number));
        self.end = self.end.max(number + 1);
        let needed = layout.needed_bytes(block);
        let is_inside = layout.area.contents_of(file_block).plus(needed).0 <= layout.len_bytes;
        self.is_wrong |= needed == 0 || !is_inside || !self.take(number - layout.blocks_in_image);
    }

    fn take(&mut self, nth: u32) -> bool {
        let Some(word) = self.taken.get_mut((nth / u64::BITS) as usize) else {
            return false;
        };
        let bit = 1 << (nth % u64::BITS);
        let is_free = *word & bit == 0;
        *word |= bit;
        is_free
    }

    /// Says what the entries are, now that it is known whether every block of the disk has storage and no other has.
    pub(super) fn report(self, is_full: bool, layout: &Layout, report: &mut Report) -> Away {
        let Some((block, file_block)) = self.first else {
            return Away::default();
        };
        if is_full && !self.is_wrong {
            report.add(Finding::BlocksAway {
                count: self.count,
                block,
                file_block,
                blocks_in_image: layout.blocks_in_image,
            });
            let (count, end) = (self.count, self.end);
            return Away { count, end };
        }
        let unlisted = self.count - self.listed.len() as u64;
        for finding in self.listed {
            report.add(finding);
        }
        report.add_unlisted("entry-out-of-range", Severity::Corruption, unlisted);
        Away::default()
    }
}
