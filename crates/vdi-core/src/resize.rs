//! Growing and shrinking an image in place.
//!
//! The map's place and length, where the data begin, the size and both counts lie in the
//! header's first 512 bytes, so one write of a sector switches all of them. Before it everything
//! is written where the old header sees nothing:
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
//! VirtualBox destroys images here in three ways (it moves too few blocks when there are few, assumes that block 0
//! has an owner and that the file ends with the last block). None can happen: blocks are first
//! closed up to the front with [`crate::holes`], those in the way move by their owners, and the file is cut
//! and lengthened to what the numbers say.

use std::io;
use std::sync::Arc;

use zerocopy::IntoBytes;

use crate::block_map::BlockMapEntry;
use crate::chores::Modified;
use crate::disk::{Disk, ReadError, Source, WriteError, Zeroing};
use crate::format::{ENTRY_BYTES, RawHeader};
use crate::header::ImageKind;
use crate::holes::Move;
use crate::storage::Access;
use crate::units::{Capacity, DiskBlock, FileBlock, FileOffset, SECTOR_SIZE, Sector, SectorRange};

/// The bytes of the header that a resize switches: `offset_bmap` to `blocks_allocated`.
const SWITCHED: std::ops::Range<usize> = 0x154..0x188;
/// Blocks whose entries are written in one go.
const BATCH: usize = 1024;

/// What a resize would do.
#[derive(Clone, Debug)]
pub struct ResizePlan {
    /// The size before.
    pub from: Capacity,
    /// The size after.
    pub to: Capacity,
    /// How it is done.
    pub step: ResizeStep,
}

/// How a size changes.
#[derive(Clone, Debug)]
pub enum ResizeStep {
    /// It is the size that the disk has.
    Nothing,
    /// The disk gets larger.
    Grow {
        /// Blocks at the front of the data that make way for the map.
        vacated: u32,
    },
    /// The disk gets smaller.
    Shrink {
        /// Blocks with storage behind the new end.
        cut: Vec<DiskBlock>,
        /// Bytes behind the new end, counted in sectors, that are not all zeros.
        lost_bytes: u64,
    },
}

/// Says what a resize would do. Changes nothing.
///
/// # Errors
/// If the size is not possible, or what would be cut cannot be read.
pub fn plan(disk: &Disk, to: Capacity) -> Result<ResizePlan, ResizeError> {
    let from = disk.capacity();
    if disk.header().raw().is_version_0() {
        return Err(ResizeError::Version0);
    }
    if to.sectors() == 0 {
        return Err(ResizeError::Empty);
    }
    if disk.hidden_end() > 0 {
        return Err(ResizeError::HiddenBlocks);
    }
    let step = match to.cmp(&from) {
        std::cmp::Ordering::Equal => ResizeStep::Nothing,
        std::cmp::Ordering::Greater => ResizeStep::Grow {
            vacated: Layout::of(disk, to)?.vacated,
        },
        std::cmp::Ordering::Less => plan_shrink(disk, to)?,
    };
    Ok(ResizePlan { from, to, step })
}

/// Does what the plan says and closes the disk. No request may be at work.
///
/// # Errors
/// If the host fails. The image then has the old size and reads as before, or has the new one.
pub fn apply(disk: &Arc<Disk>, plan: &ResizePlan) -> Result<(), ResizeError> {
    if disk.access() == Access::ReadOnly {
        return Err(ResizeError::Write(WriteError::ReadOnly));
    }
    match &plan.step {
        ResizeStep::Nothing => Ok(disk.close()?),
        ResizeStep::Grow { .. } => grow(disk, plan.to),
        ResizeStep::Shrink { cut, lost_bytes } => shrink(disk, plan.to, cut, *lost_bytes),
    }
}

fn plan_shrink(disk: &Disk, to: Capacity) -> Result<ResizeStep, ResizeError> {
    let size = disk.header().block_size();
    let first_cut = size.blocks_for(to.bytes());
    let mut cut: Vec<_> = disk
        .top()
        .map
        .allocated()
        .map(|(_, block)| block)
        .filter(|block| u64::from(block.get()) >= first_cut)
        .collect();
    cut.sort_unstable();
    let lost = disk
        .capacity()
        .range_of_bytes(to.bytes()..disk.capacity().bytes());
    let lost_bytes = match lost {
        Some(range) => disk.nonzero_bytes(range)?,
        None => 0,
    };
    Ok(ResizeStep::Shrink { cut, lost_bytes })
}

fn shrink(
    disk: &Arc<Disk>,
    to: Capacity,
    cut: &[DiskBlock],
    lost_bytes: u64,
) -> Result<(), ResizeError> {
    disk.begin_maintenance(if lost_bytes > 0 {
        Modified::Contents
    } else {
        Modified::Places
    })?;
    let size = disk.header().block_size();
    let block_end = size.blocks_for(to.bytes()) * u64::from(size.bytes());
    let tail = to.sectors()..block_end.min(disk.capacity().bytes()) / SECTOR_SIZE;
    if let Some(range) = disk
        .capacity()
        .range(Sector(tail.start), tail.end - tail.start)
    {
        // What grows again must not show what was cut.
        disk.zero_at(range, Zeroing::Keep)?;
    }
    for batch in cut.chunks(BATCH) {
        disk.replace_entries(batch, BlockMapEntry::Zero)?;
        disk.do_chores()?;
    }
    // Afterwards the blocks in use are the first ones, and so fewer than the entries that are left.
    disk.close_moving(u64::MAX)?;
    let mut raw = *disk.header().raw();
    let blocks = u32::try_from(size.blocks_for(to.bytes())).expect("fewer than before");
    raw.blocks_in_image = blocks.into();
    raw.blocks_allocated = disk.top().map.owned_end().into();
    raw.disk_size = to.bytes().into();
    disk.switch_header(&raw)
        .map_err(|source| ResizeError::Io { source })
}

/// Where everything lies after growing.
struct Layout {
    blocks: u32,
    map_start: u64,
    offset_data: u32,
    /// Blocks at the front that make way.
    vacated: u32,
}

impl Layout {
    fn of(disk: &Disk, to: Capacity) -> Result<Self, ResizeError> {
        let header = disk.header();
        let raw = header.raw();
        let size = header.block_size();
        let too_large = || ResizeError::TooLarge {
            to: to.bytes(),
            block_size: size.bytes(),
        };
        let blocks = u32::try_from(size.blocks_for(to.bytes())).map_err(|_| too_large())?;
        let map_bytes = u64::from(blocks) * ENTRY_BYTES;
        let offset_data = raw.offset_data.get();
        let in_place = header.map_start().0;
        if in_place + map_bytes <= u64::from(offset_data) {
            return Ok(Self {
                blocks,
                map_start: in_place,
                offset_data,
                vacated: 0,
            });
        }
        // Behind the old map, which counts until the switch; on a sector, as QEMU wants it.
        let map_start = raw.map_end().next_multiple_of(SECTOR_SIZE);
        let stride = disk.data_area().stride_bytes();
        let missing = map_start + map_bytes - u64::from(offset_data).min(map_start + map_bytes);
        let vacated = missing.div_ceil(stride);
        let end = u64::from(offset_data) + vacated * stride;
        let offset_data = u32::try_from(end).map_err(|_| too_large())?;
        if u32::try_from(map_start).is_err() {
            return Err(too_large());
        }
        let vacated = u32::try_from(vacated).map_err(|_| too_large())?;
        let layout = Self {
            blocks,
            map_start,
            offset_data,
            vacated,
        };
        layout.check_numbers(disk)?;
        Ok(layout)
    }

    /// Blocks that make way need numbers that the old header allows (B1).
    fn check_numbers(&self, disk: &Disk) -> Result<(), ResizeError> {
        let owned = u32::try_from(disk.top().map.allocated().count()).expect("as many as entries");
        let highest = owned.max(self.vacated).checked_add(self.vacated.min(owned));
        let most = disk.header().blocks_in_image();
        match highest {
            Some(highest) if highest <= most || owned == 0 => Ok(()),
            _ => Err(ResizeError::NoNumbers {
                vacated: self.vacated,
                owned,
                blocks_in_image: most,
            }),
        }
    }
}

fn grow(disk: &Arc<Disk>, to: Capacity) -> Result<(), ResizeError> {
    let layout = Layout::of(disk, to)?;
    disk.begin_maintenance(Modified::Places)?;
    disk.keep_parents_out_of_the_tail()?;
    disk.close_moving(u64::MAX)?;
    let result = disk
        .clear_tail()
        .and_then(|()| disk.grow_closed(to, &layout));
    result.map_err(|source| ResizeError::Io { source })
}

/// Steps on a closed disk, whose blocks are the first ones of the file.
impl Disk {
    fn grow_closed(&self, to: Capacity, layout: &Layout) -> io::Result<()> {
        let storage = &self.top().storage;
        if storage.len_bytes()? < u64::from(layout.offset_data) {
            storage.set_len(u64::from(layout.offset_data))?;
        }
        self.vacate(layout.vacated)?;
        let owned_end = self.top().map.owned_end().saturating_sub(layout.vacated);
        let old_blocks = u32::try_from(self.top().map.len()).expect("entries have 32-bit indexes");
        let is_fixed = self.header().kind() == ImageKind::Fixed;
        let mut next = owned_end;
        let new_entries = (old_blocks..layout.blocks).map(|_| {
            if !is_fixed {
                return self.new_entry();
            }
            let number = next;
            next += 1;
            FileBlock::new(number).map_or(BlockMapEntry::Unallocated, BlockMapEntry::Allocated)
        });
        let moved = layout.map_start != self.header().map_start().0;
        let first = if moved { 0 } else { old_blocks };
        let old_entries = (first..old_blocks).map(|block| self.entry_after(block, layout.vacated));
        write_entries(
            self,
            layout.map_start + u64::from(first) * ENTRY_BYTES,
            old_entries.chain(new_entries),
        )?;
        let mut raw = *self.header().raw();
        raw.offset_bmap = u32::try_from(layout.map_start)
            .expect("the layout checked it")
            .into();
        raw.offset_data = layout.offset_data.into();
        raw.disk_size = to.bytes().into();
        raw.blocks_in_image = layout.blocks.into();
        raw.blocks_allocated = next.into();
        if is_fixed {
            let stride = self.data_area().stride_bytes();
            let start = FileOffset(u64::from(layout.offset_data) + u64::from(owned_end) * stride);
            storage.reserve(start, u64::from(next - owned_end) * stride)?;
        }
        self.switch_header(&raw)
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
        let at = top.header.raw().places().blocks_allocated;
        top.storage.write_all_at(&end.to_le_bytes(), at)?;
        top.storage.sync()?;
        self.move_all(&moves)
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
        let Some(block) = self.tail() else {
            return Ok(());
        };
        let unallocated = self.top().map.get(block) == BlockMapEntry::Unallocated;
        if !unallocated || self.new_entry() == BlockMapEntry::Unallocated {
            return Ok(());
        }
        let sector = Sector(self.header().block_size().start_of(block) / SECTOR_SIZE);
        let range = self
            .capacity()
            .range(sector, 1)
            .expect("the last block has a sector");
        let mut bytes = [0; 512];
        self.read_at(range, &mut bytes)?;
        self.write_at(range, &bytes)?;
        Ok(())
    }

    /// The last block, if the disk ends inside of it.
    fn tail(&self) -> Option<DiskBlock> {
        let (capacity, size) = (self.capacity().bytes(), self.header().block_size());
        let is_partial = !capacity.is_multiple_of(u64::from(size.bytes()));
        is_partial.then(|| size.block_of(capacity)).flatten()
    }

    /// The one write that counts; then the file is cut to what the new header says.
    fn switch_header(&self, raw: &RawHeader) -> io::Result<()> {
        let storage = &self.top().storage;
        storage.sync()?;
        let at = FileOffset(SWITCHED.start as u64);
        storage.write_all_at(&raw.as_bytes()[SWITCHED], at)?;
        storage.sync()?;
        let stride = self.data_area().stride_bytes();
        let blocks = u64::from(raw.blocks_allocated.get());
        let end = u64::from(raw.offset_data.get()) + blocks * stride;
        if storage.len_bytes()? > end {
            storage.set_len(end)?;
            storage.sync()?;
        }
        Ok(())
    }

    /// How much of a range is in sectors that are not all zeros, in whichever image they are.
    fn nonzero_bytes(&self, range: SectorRange) -> Result<u64, ReadError> {
        let mut buf = vec![0; 256 << 10];
        let mut count = 0;
        let lane = self.lane();
        let visit = lane.enter();
        for extent in self.map(range, &visit) {
            let Source::Stored { depth, at } = extent.source else {
                continue;
            };
            let mut done = 0;
            while done < extent.len_bytes {
                let left = usize::try_from(extent.len_bytes - done).unwrap_or(usize::MAX);
                let len = left.min(buf.len());
                let piece = &mut buf[..len];
                self.read_image(depth, piece, at.plus(done))?;
                let (sectors, _) = piece.as_chunks::<512>();
                count += sectors
                    .iter()
                    .filter(|sector| sector.iter().any(|&byte| byte != 0))
                    .count() as u64;
                done += len as u64;
            }
        }
        Ok(count * SECTOR_SIZE)
    }
}

fn write_entries(
    disk: &Disk,
    start: u64,
    entries: impl Iterator<Item = BlockMapEntry>,
) -> io::Result<()> {
    const PIECE_BYTES: usize = 1 << 20;
    let storage = &disk.top().storage;
    let mut at = FileOffset(start);
    let mut bytes = Vec::with_capacity(PIECE_BYTES);
    for entry in entries {
        bytes.extend_from_slice(&entry.to_raw().to_le_bytes());
        if bytes.len() == PIECE_BYTES {
            storage.write_all_at(&bytes, at)?;
            at = at.plus(bytes.len() as u64);
            bytes.clear();
        }
    }
    storage.write_all_at(&bytes, at)
}

/// Why an image could not be resized.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum ResizeError {
    #[error("images of version 0 cannot be resized; convert it first")]
    Version0,
    #[error("a disk has at least one sector")]
    Empty,
    #[error("the map has entries with data beyond the end of the disk; run `vdi check`")]
    HiddenBlocks,
    #[error(
        "{to} bytes need a map that does not fit before data blocks of {block_size} bytes; \
         convert it to an image with larger blocks"
    )]
    TooLarge { to: u64, block_size: u32 },
    #[error(
        "{vacated} of {owned} blocks would have to make way for the larger map, but the map has only \
         {blocks_in_image} numbers for them (blocks_in_image); convert the image to a larger one instead"
    )]
    NoNumbers {
        vacated: u32,
        owned: u32,
        blocks_in_image: u32,
    },
    #[error("cannot change the image's file")]
    Io { source: io::Error },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
}
