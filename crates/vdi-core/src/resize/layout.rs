//! Where everything lies after growing, and in how many steps to get there. Only numbers, no I/O.
//!
//! A map that does not fit where it is goes behind itself, over the first blocks, which go behind the
//! last. They need numbers for that which the old header allows (B1), so below `blocks_in_image`:
//!
//! 1. There are such numbers, or the larger map fits without a move: one step.
//! 2. There are too few, but a map for more of them costs fewer blocks than the one that is wanted, or none:
//!    first that map, with the disk as it is; then there are.
//! 3. There are too few even for that step: as 1 or 2, but every block of the disk has storage first,
//!    and then blocks may be away ([`crate::block_map`], B1).

use crate::disk::Disk;
use crate::format::ENTRY_BYTES;
use crate::units::{DataArea, SECTOR_SIZE};

/// What an image is before a step. Its blocks are the first ones of the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    map_start: u64,
    offset_data: u64,
    stride_bytes: u64,
    blocks_in_image: u32,
    /// Blocks that the disk has, and those of them with storage.
    disk_blocks: u32,
    owned: u32,
}

/// What the header says of places after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Entries of the map.
    pub(super) blocks: u32,
    pub(super) map_start: u32,
    pub(super) offset_data: u32,
    /// Blocks at the front that make way.
    pub(super) vacated: u32,
}

impl Layout {
    /// Where the first `count` blocks end.
    pub(super) fn end_of(self, count: u32, area: DataArea) -> u64 {
        u64::from(self.offset_data) + u64::from(count) * area.stride_bytes()
    }
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stage {
    pub(super) layout: Layout,
    /// Every block of the disk must have storage before it.
    pub(super) fills: bool,
}

/// The steps of growing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stages {
    /// A larger map for the same disk.
    pub(super) preparation: Option<Stage>,
    /// The size that is wanted.
    pub(super) last: Stage,
}

impl Stages {
    /// One after the other.
    pub(super) fn steps(&self) -> impl Iterator<Item = Stage> {
        self.preparation.into_iter().chain([self.last])
    }

    /// Whether every block of the disk must have storage before one of them.
    pub(super) fn fill(&self) -> bool {
        self.steps().any(|stage| stage.fills)
    }
}

impl Shape {
    /// What `disk` is when its holes are closed.
    pub(super) fn of(disk: &Disk) -> Self {
        let header = disk.header();
        let count = |count: usize| u32::try_from(count).expect("entries have 32-bit indexes");
        let owned = disk.top().map.allocated().count() + usize::from(disk.needs_tail());
        Self {
            map_start: header.map_start().0,
            offset_data: disk.data_area().start().0,
            stride_bytes: disk.data_area().stride_bytes(),
            blocks_in_image: header.blocks_in_image(),
            disk_blocks: count(disk.top().map.len()),
            owned: count(owned),
        }
    }

    /// Blocks of the disk without storage.
    pub(super) const fn open_blocks(&self) -> u32 {
        self.disk_blocks - self.owned
    }

    /// The steps to a map of `blocks` entries, which the disk will need; `None` if their places have no
    /// 32-bit offsets.
    pub(super) fn stages_to(&self, blocks: u32) -> Option<Stages> {
        let stage = |layout, fills| Stage { layout, fills };
        let direct = self.layout(blocks)?;
        if self.has_numbers(direct) {
            let last = stage(direct, false);
            return Some(Stages {
                preparation: None,
                last,
            });
        }
        let preparation = self.layout(self.numbers_for(blocks)?)?;
        if preparation.vacated >= direct.vacated {
            let last = stage(direct, true);
            return Some(Stages {
                preparation: None,
                last,
            });
        }
        let fills = !self.has_numbers(preparation);
        let next = Self {
            map_start: u64::from(preparation.map_start),
            offset_data: u64::from(preparation.offset_data),
            blocks_in_image: preparation.blocks,
            owned: if fills { self.disk_blocks } else { self.owned },
            ..*self
        };
        let last = next.layout(blocks)?;
        assert!(next.has_numbers(last), "the preparation was for this");
        Some(Stages {
            preparation: Some(stage(preparation, fills)),
            last: stage(last, false),
        })
    }

    fn layout(&self, blocks: u32) -> Option<Layout> {
        let map_bytes = u64::from(blocks) * ENTRY_BYTES;
        let is_enough = self.map_start + map_bytes <= self.offset_data;
        let (map_start, vacated) = if is_enough {
            (self.map_start, 0)
        } else {
            // Behind the old map, which counts until the switch; on a sector, as QEMU wants it.
            let old_end = self.map_start + u64::from(self.blocks_in_image) * ENTRY_BYTES;
            let map_start = old_end.next_multiple_of(SECTOR_SIZE);
            let missing = (map_start + map_bytes).saturating_sub(self.offset_data);
            (map_start, missing.div_ceil(self.stride_bytes))
        };
        let offset_data = self.offset_data + vacated * self.stride_bytes;
        Some(Layout {
            blocks,
            map_start: u32::try_from(map_start).ok()?,
            offset_data: u32::try_from(offset_data).ok()?,
            vacated: u32::try_from(vacated).ok()?,
        })
    }

    /// Whether the blocks that make way have numbers.
    fn has_numbers(&self, layout: Layout) -> bool {
        let needed = numbers(self.owned, u64::from(layout.vacated));
        layout.vacated == 0 || self.owned == 0 || needed <= u64::from(self.blocks_in_image)
    }

    /// How many numbers a map of `blocks` entries needs, whatever comes before it: it begins less than a
    /// sector behind where the data begin now.
    fn numbers_for(&self, blocks: u32) -> Option<u32> {
        let most_missing = u64::from(blocks) * ENTRY_BYTES + SECTOR_SIZE;
        let vacated = most_missing.div_ceil(self.stride_bytes);
        u32::try_from(numbers(self.disk_blocks, vacated)).ok()
    }
}

/// The first `vacated` of `owned` blocks go behind the last, and never among those that make way.
fn numbers(owned: u32, vacated: u64) -> u64 {
    let owned = u64::from(owned);
    owned.max(vacated) + owned.min(vacated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_map::MOST_AWAY;

    const STRIDE: u64 = 128 << 10;

    /// An image as QEMU lays it out, with data right behind the map and blocks of 128 KiB.
    fn tight(disk_blocks: u32, owned: u32) -> Shape {
        Shape {
            map_start: 512,
            offset_data: (512 + u64::from(disk_blocks) * ENTRY_BYTES).next_multiple_of(SECTOR_SIZE),
            stride_bytes: STRIDE,
            blocks_in_image: disk_blocks,
            disk_blocks,
            owned,
        }
    }

    fn vacated(stage: Stage) -> (u32, bool) {
        (stage.layout.vacated, stage.fills)
    }

    #[test]
    fn the_gap_behind_a_map_is_used_first() {
        let stages = tight(4, 4).stages_to(128).unwrap();
        assert_eq!(
            (stages.preparation, vacated(stages.last)),
            (None, (0, false))
        );
        // One more entry than the sector holds: its numbers come from the gap.
        let stages = tight(4, 4).stages_to(129).unwrap();
        let preparation = stages.preparation.unwrap();
        assert_eq!(vacated(preparation), (0, false));
        assert_eq!(
            (preparation.layout.map_start, preparation.layout.blocks),
            (512, 5)
        );
        assert_eq!(vacated(stages.last), (1, false));
        let stages = tight(4, 2).stages_to(129).unwrap();
        assert_eq!(
            (stages.preparation, vacated(stages.last)),
            (None, (1, false))
        );
    }

    #[test]
    fn where_there_is_no_gap_blocks_are_away_as_few_as_possible() {
        let stages = tight(128, 128).stages_to(129).unwrap();
        assert_eq!(
            (stages.preparation, vacated(stages.last)),
            (None, (1, true))
        );
        // The wanted map takes many blocks, the preparation one.
        let stages = tight(128, 128).stages_to(10_000_000).unwrap();
        assert_eq!(vacated(stages.preparation.unwrap()), (1, true));
        assert_eq!(vacated(stages.last), (305, false));
        // One number is free, and one block makes way.
        let stages = tight(128, 127).stages_to(10_000_000).unwrap();
        assert_eq!(vacated(stages.preparation.unwrap()), (1, false));
        // Nothing has to make way.
        let stages = tight(128, 0).stages_to(10_000_000).unwrap();
        assert_eq!(
            (stages.preparation, vacated(stages.last)),
            (None, (306, false))
        );
    }

    #[test]
    fn offsets_that_have_no_32_bits_are_refused() {
        assert!(tight(128, 128).stages_to(1 << 29).is_some());
        assert_eq!(tight(128, 128).stages_to(u32::MAX), None);
    }

    #[test]
    fn every_step_of_any_image_has_its_numbers_and_moves_the_map_clear_of_the_old_one() {
        let sizes = [1, 2, 3, 127, 128, 129, 5000, 32_768, 1 << 20, 1 << 27];
        for disk_blocks in sizes {
            for owned in [0, 1, disk_blocks / 2, disk_blocks - 1, disk_blocks] {
                for gap in [0, 4, 512, STRIDE] {
                    for blocks in sizes.into_iter().filter(|&blocks| blocks > disk_blocks) {
                        let mut shape = tight(disk_blocks, owned);
                        shape.offset_data = 512 + u64::from(disk_blocks) * ENTRY_BYTES + gap;
                        check(shape, blocks);
                    }
                }
            }
        }
    }

    fn check(mut shape: Shape, blocks: u32) {
        let stages = shape.stages_to(blocks).unwrap();
        assert_eq!(stages.last.layout.blocks, blocks);
        for stage in stages.preparation.into_iter().chain([stages.last]) {
            let layout = stage.layout;
            let (map_start, data) = (u64::from(layout.map_start), u64::from(layout.offset_data));
            assert!(
                map_start + u64::from(layout.blocks) * ENTRY_BYTES <= data,
                "H1"
            );
            if layout.vacated > 0 {
                let old_bytes = u64::from(shape.blocks_in_image) * ENTRY_BYTES;
                assert!(
                    map_start >= shape.map_start + old_bytes,
                    "{shape:?} {stage:?}"
                );
            }
            if stage.fills {
                shape.owned = shape.disk_blocks;
            }
            let beyond = if stage.fills { MOST_AWAY } else { 0 };
            let most = u64::from(shape.blocks_in_image) + u64::from(beyond);
            let moves = layout.vacated > 0 && shape.owned > 0;
            let needed = numbers(shape.owned, u64::from(layout.vacated));
            assert!(!moves || needed <= most, "B1: {shape:?} {stage:?}");
            assert!(layout.blocks >= shape.disk_blocks);
            shape.map_start = map_start;
            shape.offset_data = data;
            shape.blocks_in_image = layout.blocks;
        }
    }
}
