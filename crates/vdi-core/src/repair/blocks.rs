//! What a repair does to blocks, found out by walking through the map.
//!
//! The map is walked twice at most: once to see who owns what, and once to find the
//! owners of the last file blocks when they have to move into holes.
//!
//! ```text
//! before  | a | - | b | b c | - | d |        two holes; c is a second owner
//! after   | a | c | b | d |                  every entry has a number below how many there are
//! ```
//!
//! All copies go where nobody's data are, so that their order does not matter (M1).

use std::io;
use std::ops::{ControlFlow, Range};

use super::{Left, Unreadable};
use crate::check::{Finding, LISTED_PER_KIND, Layout, Report, for_each_entry};
use crate::storage::Storage;
use crate::units::{DataArea, FileBlock, FileOffset};

/// Why an entry changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Why {
    /// Another disk block has the file block, too.
    Shared,
    /// The number is not below `blocks_in_image`.
    OutOfRange,
    /// It lies behind a hole that can take it.
    Hole,
    /// It lies behind the end of the file.
    Unreadable,
}

/// What an entry becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A copy of the block in this one.
    Copy(FileBlock),
    /// Zeros.
    Zero,
}

/// An entry that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The disk block.
    pub block: u32,
    /// The file block that it is kept in.
    pub from: FileBlock,
    /// What becomes of it.
    pub to: Target,
    /// The reason.
    pub why: Why,
}

/// What happens to the blocks of an image, in the order of its fields.
#[derive(Clone, Debug)]
pub struct BlockPlan {
    /// The file is lengthened from and to this.
    pub lengthen: Option<(u64, u64)>,
    /// The block that the file's end cuts: its disk block, and how many of its bytes are missing.
    pub cut_short: Option<(u32, u64)>,
    /// `blocks_allocated` is raised from and to this.
    pub raise_count: Option<(u32, u32)>,
    /// Entries that change, those that become ZERO first.
    pub changes: Vec<Change>,
    /// `blocks_allocated` is set from and to this at the end.
    pub set_count: Option<(u32, u32)>,
    /// The file is cut from and to this.
    pub cut_to: Option<(u64, u64)>,
    /// There is more to do than a plan may hold (M4).
    pub goes_on: bool,
    /// Why space that is free is not given back.
    pub(super) keeps_space: Option<&'static str>,
    pub(super) area: DataArea,
    pub(super) map_start: FileOffset,
}

impl BlockPlan {
    /// Whether nothing happens.
    pub const fn is_empty(&self) -> bool {
        self.lengthen.is_none()
            && self.raise_count.is_none()
            && self.changes.is_empty()
            && self.set_count.is_none()
            && self.cut_to.is_none()
    }

    /// The entries that become ZERO, and those that get copies.
    pub(super) fn dropped_and_copied(&self) -> (&[Change], &[Change]) {
        let is_dropped = |change: &Change| change.to == Target::Zero;
        let dropped = self.changes.partition_point(is_dropped);
        self.changes.split_at(dropped)
    }

    /// How many bytes are copied.
    pub fn copied_bytes(&self) -> u64 {
        let copies = |change: &&Change| matches!(change.to, Target::Copy(_));
        self.changes.iter().filter(copies).count() as u64 * self.area.stride_bytes()
    }
}

/// A bit per file block.
struct Bits(Vec<u64>);

impl Bits {
    fn new(count: u32) -> Self {
        Self(vec![0; count.div_ceil(u64::BITS) as usize])
    }

    fn has(&self, number: u32) -> bool {
        self.0[number as usize / 64] & (1 << (number % 64)) != 0
    }

    /// Sets the bit, and tells whether it was not set.
    fn take(&mut self, number: u32) -> bool {
        let was_set = self.has(number);
        self.0[number as usize / 64] |= 1 << (number % 64);
        !was_set
    }

    /// Clears the bit, and tells whether it was set.
    fn give(&mut self, number: u32) -> bool {
        let was_set = self.has(number);
        self.0[number as usize / 64] &= !(1 << (number % 64));
        was_set
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// What the map says, and what has to change whatever becomes of the rest.
pub(super) struct Survey<'l> {
    layout: &'l Layout,
    unreadable: Unreadable,
    /// File blocks with an owner that stays, or moves into a hole.
    used: Bits,
    highest: Option<u32>,
    /// Entries that need a copy; their targets are not known yet.
    needs: Vec<(u32, FileBlock, Why)>,
    dropped: Vec<Change>,
    cut_short: Option<(u32, u64)>,
    /// Where the file must reach for the block that is cut.
    len_needed: u64,
    /// Entries that are left because they cannot be read, a few of them.
    left: Vec<Left>,
    left_unnamed: u64,
    /// What the check says of blocks that are away, and whether some of them stay there.
    away: Option<Finding>,
    leaves_away: bool,
    /// The lowest legal number that is left so: the file must not reach it.
    lowest_left: Option<u32>,
    /// An entry that no sector needs names a block that the file does not have.
    pinned: bool,
    goes_on: bool,
    /// How many entries may change (M4).
    most_changes: usize,
}

const CANNOT_BE_READ: &str = "nothing of the block is in the file; give --drop-unreadable to let it read as zeros, \
     if no copy of the image is whole";
const NO_ROOM: &str =
    "no free file block can take it as long as blocks behind the end of the file are kept";
const GEOMETRY: &str = "blocks_in_image is not what disk_size and block_size need, so space that seems free may not be; \
     the image works as it is";
const AWAY: &str = "blocks_in_image is not what disk_size and block_size need, so no file block is surely free to take them; \
     the image works as it is";
const KEPT: &str = "space is given back when no block is unreadable any more";

impl<'l> Survey<'l> {
    pub(super) fn of(
        storage: &dyn Storage,
        layout: &'l Layout,
        unreadable: Unreadable,
        most_changes: usize,
    ) -> io::Result<Self> {
        let mut survey = Self {
            layout,
            unreadable,
            used: Bits::new(layout.blocks_in_image),
            highest: None,
            needs: Vec::new(),
            dropped: Vec::new(),
            cut_short: None,
            len_needed: layout.len_bytes,
            left: Vec::new(),
            left_unnamed: 0,
            away: None,
            leaves_away: false,
            lowest_left: None,
            pinned: false,
            goes_on: false,
            most_changes,
        };
        for_each_entry(storage, layout, |block, entry| {
            if let Some(file_block) = FileBlock::new(entry) {
                survey.visit(block, file_block);
            }
            ControlFlow::Continue(())
        })?;
        Ok(survey)
    }

    /// Takes from the check whether entries with too high numbers name blocks that are away, which is no corruption.
    pub(super) fn that_knows(mut self, report: &Report) -> Self {
        let is_away = |finding: &&Finding| matches!(finding, Finding::BlocksAway { .. });
        self.away = report.findings().iter().find(is_away).cloned();
        self
    }

    fn visit(&mut self, block: u32, file_block: FileBlock) {
        let number = file_block.get();
        let needed = self.layout.needed_bytes(block);
        let contents = self.layout.area.contents_of(file_block);
        let present = self.layout.len_bytes.saturating_sub(contents.0);
        let in_range = number < self.layout.blocks_in_image;
        if present == 0 && needed > 0 {
            self.unreadable(block, file_block);
        } else if in_range && self.used.take(number) {
            self.highest = self.highest.max(Some(number));
            self.pinned |= present == 0;
            if present < needed {
                self.cut_short = Some((block, needed - present));
                self.len_needed = contents.plus(needed).0;
            }
        } else if present == 0 {
            // No sector of the disk is in it.
            self.drop_entry(block, file_block);
        } else {
            if present < needed {
                self.cut_short = Some((block, needed - present));
            }
            let why = if in_range {
                Why::Shared
            } else {
                Why::OutOfRange
            };
            self.need(block, file_block, why);
        }
    }

    fn unreadable(&mut self, block: u32, file_block: FileBlock) {
        if self.unreadable == Unreadable::Drop {
            return self.drop_entry(block, file_block);
        }
        let number = file_block.get();
        if number < self.layout.blocks_in_image {
            self.keep_out_of_file(number);
            self.used.take(number);
            self.highest = self.highest.max(Some(number));
        }
        self.leave(block, file_block, CANNOT_BE_READ);
    }

    fn leave(&mut self, block: u32, file_block: FileBlock, why: &'static str) {
        if self.away.is_some() && file_block.get() >= self.layout.blocks_in_image {
            self.leaves_away = true;
            return;
        }
        if self.left.len() < LISTED_PER_KIND {
            let finding = self.layout.misplaced(block, file_block);
            self.left.push(Left { finding, why });
        } else {
            self.left_unnamed += 1;
        }
    }

    fn drop_entry(&mut self, block: u32, from: FileBlock) {
        if !self.has_room() {
            // The next plan drops it. Until then no copy goes there.
            return self.keep_out_of_file(from.get());
        }
        let (to, why) = (Target::Zero, Why::Unreadable);
        self.dropped.push(Change {
            block,
            from,
            to,
            why,
        });
    }

    fn keep_out_of_file(&mut self, number: u32) {
        self.lowest_left = Some(self.lowest_left.map_or(number, |low| low.min(number)));
    }

    fn need(&mut self, block: u32, file_block: FileBlock, why: Why) {
        if self.has_room() {
            self.needs.push((block, file_block, why));
        }
    }

    /// M4.
    fn has_room(&mut self) -> bool {
        let has_room = self.dropped.len() + self.needs.len() < self.most_changes;
        self.goes_on |= !has_room;
        has_room
    }

    /// Whether `blocks_in_image` is what every program makes it.
    fn is_consistent(&self) -> bool {
        let needed = self.layout.block_size.blocks_for(self.layout.disk_size);
        needed == u64::from(self.layout.blocks_in_image)
    }

    /// Decides where everything goes, and what stays as it is.
    pub(super) fn plan(mut self, storage: &dyn Storage) -> io::Result<(BlockPlan, Vec<Left>, u64)> {
        let settled = self.left.is_empty() && !self.goes_on && !self.pinned && self.is_consistent();
        let mut changes = std::mem::take(&mut self.dropped);
        let end = if settled {
            let wanted = self.used.count() + self.needs.len() as u64;
            u32::try_from(wanted).expect("entries are counted by 32 bits")
        } else {
            self.layout.blocks_in_image
        };
        let mut free = self.free_numbers(settled, end);
        for (block, from, why) in std::mem::take(&mut self.needs) {
            match free.find(|&number| !self.used.has(number)) {
                Some(number) => changes.push(copy(block, from, number, why)),
                None => self.leave(block, from, NO_ROOM),
            }
        }
        if settled {
            self.move_into_holes(storage, end, free, &mut changes)?;
        }
        Ok(self.finish(changes, settled.then_some(end)))
    }

    /// Where a fresh block may lie: below the blocks that must stay unreadable, and where the
    /// header seems wrong, behind all that the file has.
    fn free_numbers(&self, settled: bool, end: u32) -> Range<u32> {
        let limit = self.lowest_left.unwrap_or(end);
        if settled || self.is_consistent() {
            return 0..limit;
        }
        let behind = self.highest.map_or(0, |highest| highest + 1);
        behind.max(self.layout.covered())..limit
    }

    /// The owners of the file blocks from `end` on move below it.
    fn move_into_holes(
        &mut self,
        storage: &dyn Storage,
        end: u32,
        mut free: Range<u32>,
        changes: &mut Vec<Change>,
    ) -> io::Result<()> {
        if self.highest.is_none_or(|highest| highest < end) {
            return Ok(());
        }
        let range = end..self.layout.blocks_in_image;
        for_each_entry(storage, self.layout, |block, entry| {
            let Some(from) = FileBlock::new(entry) else {
                return ControlFlow::Continue(());
            };
            // Only the first owner moves; for the others copies are planned.
            if !range.contains(&entry) || !self.used.has(entry) {
                return ControlFlow::Continue(());
            }
            if changes.len() >= self.most_changes {
                self.goes_on = true;
                return ControlFlow::Break(());
            }
            self.used.give(entry);
            // An image in use may have changed between the walks.
            if let Some(number) = free.find(|&number| !self.used.has(number)) {
                changes.push(copy(block, from, number, Why::Hole));
            }
            ControlFlow::Continue(())
        })
    }

    fn finish(
        mut self,
        changes: Vec<Change>,
        settled_end: Option<u32>,
    ) -> (BlockPlan, Vec<Left>, u64) {
        let layout = self.layout;
        let ends = changes.iter().map(|change| match change.to {
            Target::Copy(to) => to.get() + 1,
            Target::Zero => 0,
        });
        let copies_end = ends.max().unwrap_or(0);
        let used_end = self
            .highest
            .map_or(0, |highest| highest + 1)
            .max(copies_end);
        let count = layout.blocks_allocated;
        let exact = settled_end.filter(|_| !self.goes_on);
        let last = exact.unwrap_or_else(|| count.min(layout.blocks_in_image).max(used_end));
        let raise_count = (count < used_end).then_some((count, used_end));
        let counted = raise_count.map_or(count, |(_, to)| to);
        let room_end = match copies_end {
            0 => 0,
            end => layout.area.end_of(end).0,
        };
        let len_needed = self.len_needed.max(room_end);
        let len_bytes = layout.len_bytes.max(len_needed);
        let cut_to = exact
            .map(|end| layout.area.end_of(end).0)
            .filter(|&to| len_bytes > to);
        let keeps_space = match (exact, self.left.is_empty()) {
            (Some(_), _) => None,
            (None, true) if self.goes_on => None,
            (None, true) => Some(GEOMETRY),
            (None, false) => Some(KEPT),
        };
        let away = self.away.filter(|_| self.leaves_away);
        self.left
            .extend(away.map(|finding| Left { finding, why: AWAY }));
        let plan = BlockPlan {
            lengthen: (len_needed > layout.len_bytes).then_some((layout.len_bytes, len_needed)),
            cut_short: self.cut_short,
            raise_count,
            changes,
            set_count: (last != counted).then_some((counted, last)),
            cut_to: cut_to.map(|to| (len_bytes, to)),
            goes_on: self.goes_on,
            keeps_space,
            area: layout.area,
            map_start: layout.map_start,
        };
        (plan, self.left, self.left_unnamed)
    }
}

fn copy(block: u32, from: FileBlock, number: u32, why: Why) -> Change {
    let to = FileBlock::new(number).expect("it is below blocks_in_image, which a map can hold");
    Change {
        block,
        from,
        to: Target::Copy(to),
        why,
    }
}
