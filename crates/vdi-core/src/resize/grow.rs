//! Growing.
//!
//! ```text
//!            old map        gap      block 0    block 1   block 2 ...
//! grow in    [------][++]........[-----------][---------][------- ...   new entries into the gap
//! place
//!
//! grow and   [------]  [+ new map ++++++++++++++++++]    [------- ...   blocks 0 and 1 were moved to the
//! move                                                    new block 0    end before: they are in no entry
//! ```
//!
//! Stopped at any instant the image opens for everybody, and reads as before or has its new size. Blocks
//! that make way may have to be *away* until the switch ([`crate::block_map`], B1). Then QEMU's check calls
//! them corrupt and VirtualBox does not open the image for discards; the first write through this library,
//! `vdi repair` or a new attempt brings them home. (VirtualBox's repair must not be run then: its
//! table of blocks is too short for their numbers.)
//!
//! The new blocks of a fixed image get their storage before the switch and their entries behind it: there
//! may be entries beyond the old disk already, which must own nothing.

use std::io;
use std::sync::Arc;

use super::layout::{Layout, Shape, Stage, Stages};
use super::{ResizeError, ResizeStep};
use crate::block_map::BlockMapEntry;
use crate::chores::Modified;
use crate::disk::{Disk, ModifiedParent};
use crate::format::ENTRY_BYTES;
use crate::header::ImageKind;
use crate::holes::Move;
use crate::storage::Access;
use crate::units::{Capacity, DiskBlock, FileBlock, FileOffset, SECTOR_SIZE, Sector};

/// What growing would do.
pub(super) fn plan(disk: &Disk, to: Capacity) -> Result<ResizeStep, ResizeError> {
    let shape = Shape::of(disk);
    let stages = stages(disk, shape, to)?;
    let filled = if stages.fill() {
        shape.open_blocks()
    } else {
        0
    };
    let vacated = stages.steps().map(|stage| stage.layout.vacated).sum();
    Ok(ResizeStep::Grow { vacated, filled })
}

pub(super) fn grow(disk: &Arc<Disk>, to: Capacity) -> Result<(), ResizeError> {
    disk.begin_maintenance(Modified::Places)?;
    disk.keep_parents_out_of_the_tail()?;
    let Stages { preparation, last } = stages(disk, Shape::of(disk), to)?;
    let Some(preparation) = preparation else {
        return disk.grow_to(last, to);
    };
    disk.grow_to(preparation, disk.capacity())?;
    let disk = reopened(disk)?;
    disk.begin_maintenance(Modified::Places)?;
    disk.grow_to(last, to)
}

fn stages(disk: &Disk, shape: Shape, to: Capacity) -> Result<Stages, ResizeError> {
    let size = disk.header().block_size();
    let too_large = || ResizeError::TooLarge {
        to: to.bytes(),
        block_size: size.bytes(),
    };
    let mut blocks = u32::try_from(size.blocks_for(to.bytes())).map_err(|_| too_large())?;
    if disk.header().raw().is_version_0() {
        let blocks_in_image = disk.header().blocks_in_image();
        if blocks > blocks_in_image {
            let most = u64::from(blocks_in_image) * u64::from(size.bytes());
            return Err(ResizeError::Version0 {
                most,
                blocks_in_image,
            });
        }
        blocks = blocks_in_image;
    }
    let stages = shape.stages_to(blocks).ok_or_else(too_large)?;
    if stages.fill() && disk.header().ends_in_a_block_of_qemu() {
        let disk_size = disk.header().raw().disk_size.get();
        return Err(ResizeError::OddSize { disk_size });
    }
    Ok(stages)
}

/// The same disk once more, after its header was switched.
fn reopened(disk: &Disk) -> Result<Arc<Disk>, ResizeError> {
    let storages = disk.storages().map(Arc::clone).collect();
    // It was open, so whoever opened it has judged its parents.
    let disk = Disk::open_chain(storages, Access::Writable, ModifiedParent::Allow);
    Ok(Arc::new(
        disk.map_err(|source| ResizeError::Reopen { source })?,
    ))
}

impl Disk {
    fn grow_to(self: &Arc<Self>, stage: Stage, to: Capacity) -> Result<(), ResizeError> {
        if stage.fills {
            self.fill_up()?;
        }
        self.close_moving(u64::MAX)?;
        self.clear_tail()
            .and_then(|()| self.grow_closed(to, stage.layout))
            .map_err(|source| ResizeError::Io { source })
    }

    /// Gives every block of the disk storage, so that nobody wants a number for a new one.
    fn fill_up(self: &Arc<Self>) -> Result<(), ResizeError> {
        let blocks = (0..).map(DiskBlock::new).zip(self.entries());
        let open = blocks.filter(|(_, entry)| !matches!(entry, BlockMapEntry::Allocated(_)));
        for (block, _) in open {
            self.give_storage(block)?;
        }
        Ok(())
    }

    /// Gives a block storage and leaves it what it reads as.
    fn give_storage(self: &Arc<Self>, block: DiskBlock) -> Result<(), ResizeError> {
        let sector = Sector(self.header().block_size().start_of(block) / SECTOR_SIZE);
        let range = self
            .capacity()
            .range(sector, 1)
            .expect("every block of the disk has a sector");
        let mut bytes = [0; 512];
        self.read_at(range, &mut bytes)?;
        self.write_at(range, &bytes)?;
        Ok(())
    }

    /// The disk is closed, and its blocks are the first ones of the file.
    fn grow_closed(&self, to: Capacity, layout: Layout) -> io::Result<()> {
        let storage = &self.top().storage;
        let (old_blocks, owned, reserved) = self
            .prepare(to, layout)
            .inspect_err(|error| self.give_back(error))?;
        self.switch_header(|raw| {
            raw.offset_bmap = layout.map_start.into();
            raw.offset_data = layout.offset_data.into();
            raw.disk_size = to.bytes().into();
            raw.blocks_in_image = layout.blocks.into();
            raw.blocks_allocated = (owned + reserved).into();
        })?;
        let numbers = (owned..owned + reserved).filter_map(FileBlock::new);
        self.write_new_entries(layout, old_blocks, numbers.map(BlockMapEntry::Allocated))?;
        storage.sync()
    }

    /// Does all that the old header sees nothing of. The number of old entries, of blocks in use, and of those reserved
    /// behind them.
    fn prepare(&self, to: Capacity, layout: Layout) -> io::Result<(u32, u32, u32)> {
        let storage = &self.top().storage;
        self.vacate(layout.vacated)?;
        let owned = self.top().map.owned_end().saturating_sub(layout.vacated);
        let end = layout.end_of(owned, self.data_area());
        // The last block may have ended where the disk did, and all of it may have been the map's.
        if storage.len_bytes()? < end {
            storage.set_len(end)?;
        }
        let old_blocks = u32::try_from(self.top().map.len()).expect("entries have 32-bit indexes");
        let new_entries = (old_blocks..layout.blocks).map(|_| self.new_entry());
        let moved = u64::from(layout.map_start) != self.header().map_start().0;
        let first = if moved { 0 } else { old_blocks };
        let old_entries = (first..old_blocks).map(|block| self.entry_after(block, layout.vacated));
        self.write_new_entries(layout, first, old_entries.chain(new_entries))?;
        let reserved = self.reserve_new(to, layout, owned)?;
        Ok((old_blocks, owned, reserved))
    }

    /// A growth for which there is no room must not fill the file system with what it got done. After any other error
    /// nobody knows what the file's entries say.
    fn give_back(&self, error: &io::Error) {
        if error.kind() == io::ErrorKind::StorageFull {
            // The first error is the one to report; and what stays is leaked, no more.
            let _ = self.move_home();
        }
    }

    /// Moves the blocks that made way back, over what was to be the map, and cuts the file behind them.
    fn move_home(&self) -> io::Result<()> {
        let top = self.top();
        top.storage.sync()?;
        let owned_end = self.fill_holes(u64::MAX)?;
        self.write_counted(owned_end)?;
        top.storage.set_len(top.area.end_of(owned_end).0)?;
        top.storage.sync()
    }

    /// Makes the header count the first `blocks`, as far as it may: those that are away it does not (H3).
    fn write_counted(&self, blocks: u32) -> io::Result<()> {
        let top = self.top();
        let counted = blocks.min(top.header.blocks_in_image());
        let at = top.header.raw().places().blocks_allocated;
        top.storage.write_all_at(&counted.to_le_bytes(), at)
    }

    /// Reserves storage for the new blocks of a fixed image behind the `owned` ones, and tells for how many.
    fn reserve_new(&self, to: Capacity, layout: Layout, owned: u32) -> io::Result<u32> {
        let blocks = self.header().block_size().blocks_for(to.bytes());
        let count = blocks - self.top().map.len() as u64;
        if self.header().kind() != ImageKind::Fixed || count == 0 {
            return Ok(0);
        }
        let start = FileOffset(layout.end_of(owned, self.data_area()));
        let len_bytes = count * self.data_area().stride_bytes();
        let storage = &self.top().storage;
        if let Err(no_space) = storage.reserve(start, len_bytes) {
            // What there was of it must not fill the file system.
            storage.set_len(start.0)?;
            return Err(no_space);
        }
        Ok(u32::try_from(count).expect("fewer than the map has entries"))
    }

    /// Writes entries where the map will be, from that of block `first` on.
    fn write_new_entries(
        &self,
        layout: Layout,
        first: u32,
        entries: impl Iterator<Item = BlockMapEntry>,
    ) -> io::Result<()> {
        const PIECE_BYTES: usize = 1 << 20;
        let storage = &self.top().storage;
        let mut at = FileOffset(u64::from(layout.map_start) + u64::from(first) * ENTRY_BYTES);
        let mut bytes = Vec::with_capacity(PIECE_BYTES);
        for entry in entries {
            bytes.extend_from_slice(&entry.to_raw().to_le_bytes());
            if bytes.len() == PIECE_BYTES {
                storage.write_all_at(&bytes, at)?;
                at = at.plus(bytes.len() as u64);
                bytes.clear();
            }
        }
        if bytes.is_empty() {
            return Ok(());
        }
        storage.write_all_at(&bytes, at)
    }

    /// What a block behind the old end reads as: zeros, whatever a larger parent has there.
    fn new_entry(&self) -> BlockMapEntry {
        let from = self.capacity();
        let hides = self
            .headers()
            .skip(1)
            .any(|parent| parent.capacity() > from);
        if hides {
            BlockMapEntry::Zero
        } else {
            BlockMapEntry::Unallocated
        }
    }

    fn entry_after(&self, block: u32, vacated: u32) -> BlockMapEntry {
        match self.top().map.get(DiskBlock::new(block)) {
            BlockMapEntry::Allocated(at) => {
                let number = at
                    .get()
                    .checked_sub(vacated)
                    .expect("the first blocks were vacated");
                BlockMapEntry::Allocated(FileBlock::new(number).expect("below the old one"))
            }
            other @ (BlockMapEntry::Unallocated | BlockMapEntry::Zero) => other,
        }
    }

    /// Moves the first blocks behind the last, with room made first (W1).
    fn vacate(&self, count: u32) -> io::Result<()> {
        let top = self.top();
        let free = (top.map.owned_end().max(count)..).filter_map(FileBlock::new);
        let in_the_way = top.map.allocated().filter(|(from, _)| from.get() < count);
        let moves: Vec<_> = in_the_way
            .zip(free)
            .map(|((from, disk_block), to)| Move {
                disk_block,
                from,
                to,
            })
            .collect();
        let Some(last) = moves.last() else {
            return Ok(());
        };
        let end = last.to.get() + 1;
        top.storage.set_len(top.area.end_of(end).0)?;
        self.write_counted(end)?;
        top.storage.sync()?;
        if self.move_all(&moves)? {
            return Ok(());
        }
        // The map may not grow over what is left there.
        Err(io::ErrorKind::StorageFull.into())
    }

    /// The bytes of the last block behind the old end are zeros by rule, but some program may not have kept it.
    fn clear_tail(&self) -> io::Result<()> {
        let (capacity, size) = (self.capacity().bytes(), self.header().block_size());
        let Some(span) = self.tail() else {
            return Ok(());
        };
        if let BlockMapEntry::Allocated(at) = self.top().map.get(span) {
            let skip = capacity - size.start_of(span);
            let at = self.top().area.contents_of(at).plus(skip);
            self.top()
                .storage
                .zero(at, u64::from(size.bytes()) - skip)?;
        }
        Ok(())
    }

    /// Gives the last block storage of its own if it is not full and a larger parent would show in the rest.
    fn keep_parents_out_of_the_tail(self: &Arc<Self>) -> Result<(), ResizeError> {
        match self.tail() {
            Some(block) if self.needs_tail() => self.give_storage(block),
            _ => Ok(()),
        }
    }

    /// Whether the last block needs storage for that, and has none.
    pub(super) fn needs_tail(&self) -> bool {
        let hides = self.new_entry() != BlockMapEntry::Unallocated;
        let tail = self.tail().filter(|_| hides);
        tail.is_some_and(|block| self.top().map.get(block) == BlockMapEntry::Unallocated)
    }

    /// The last block, if the disk ends inside of it.
    fn tail(&self) -> Option<DiskBlock> {
        let (capacity, size) = (self.capacity().bytes(), self.header().block_size());
        let is_partial = !capacity.is_multiple_of(u64::from(size.bytes()));
        is_partial.then(|| size.block_of(capacity)).flatten()
    }
}
