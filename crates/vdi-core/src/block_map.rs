//! The block map: where each block of the virtual disk is kept.
//!
//! Invariants, established by [`BlockMap::load`] and kept by every change:
//!
//! - **B1** An allocated entry names a file block below `blocks_in_image` whose part of
//!   the disk lies inside the file.
//! - **B2** No two entries name the same file block.
//!
//! Look-ups take no lock and never wait. Memory is taken as entries are read and
//! found right, so a file that only claims to be large costs nothing: its holes read as
//! entries 0, and the second of them breaks B2.
//!
//! Source: VirtualBox `VDICore.h`, `VDIIMAGEBLOCKPOINTER`.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::format::{ENTRY_BYTES, ENTRY_FREE, ENTRY_ZERO};
use crate::header::Header;
use crate::storage::Storage;
use crate::units::{Capacity, DiskBlock, FileBlock, FileOffset};

/// How much of the map is read at a time.
const PIECE_ENTRIES: u32 = 256 << 10;

/// The three states of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockMapEntry {
    /// Never written: zeros in a base image.
    Unallocated,
    /// Zeros without storage.
    Zero,
    /// Kept in this block of the file.
    Allocated(FileBlock),
}

impl BlockMapEntry {
    /// Reads an entry. Every 32-bit value means something, so this cannot fail.
    pub const fn from_raw(raw: u32) -> Self {
        match FileBlock::new(raw) {
            Some(block) => Self::Allocated(block),
            None if raw == ENTRY_ZERO => Self::Zero,
            None => Self::Unallocated,
        }
    }

    /// The entry as the file has it.
    pub const fn to_raw(self) -> u32 {
        match self {
            Self::Unallocated => ENTRY_FREE,
            Self::Zero => ENTRY_ZERO,
            Self::Allocated(block) => block.get(),
        }
    }
}

/// The map in memory: one entry for each block that the disk has.
#[derive(Debug)]
pub struct BlockMap {
    entries: Box<[AtomicU32]>,
    start: FileOffset,
}

impl BlockMap {
    /// Reads and judges the map of an image whose header is right.
    ///
    /// # Errors
    /// If it cannot be read in full or breaks B1 or B2.
    pub fn load(storage: &dyn Storage, header: &Header) -> Result<(Self, Owners), MapError> {
        let blocks = header.blocks_in_image();
        let file_len = storage
            .len_bytes()
            .map_err(|source| MapError::Read { source })?;
        let map_end = header.raw().map_end();
        if file_len < map_end {
            return Err(MapError::Truncated {
                file_len,
                map_end,
                blocks_in_image: blocks,
            });
        }
        let mut judge = Judge::new(header, file_len);
        let mut entries = Vec::new();
        let mut buf = Vec::new();
        for first in (0..blocks).step_by(PIECE_ENTRIES as usize) {
            let count = PIECE_ENTRIES.min(blocks - first);
            buf.resize(count as usize * size_of::<u32>(), 0);
            let at = entry_at(header.map_start(), DiskBlock::new(first));
            storage
                .read_exact_at(&mut buf, at)
                .map_err(|source| MapError::Read { source })?;
            for (block, raw) in (first..).map(DiskBlock::new).zip(raw_entries(&buf)) {
                judge.admit(block, BlockMapEntry::from_raw(raw))?;
                if u64::from(block.get()) < judge.disk_blocks {
                    entries.push(AtomicU32::new(raw));
                }
            }
        }
        let map = Self {
            entries: entries.into_boxed_slice(),
            start: header.map_start(),
        };
        Ok((map, judge.owners))
    }

    /// Where `block` is kept.
    pub fn get(&self, block: DiskBlock) -> BlockMapEntry {
        BlockMapEntry::from_raw(self.entries[block.index()].load(Ordering::Acquire))
    }

    /// Lets readers see a new entry. The file must have it already (W3).
    pub(crate) fn publish(&self, block: DiskBlock, entry: BlockMapEntry) {
        self.entries[block.index()].store(entry.to_raw(), Ordering::Release);
    }

    /// Where the entry of `block` lies in the file.
    pub(crate) const fn entry_at(&self, block: DiskBlock) -> FileOffset {
        entry_at(self.start, block)
    }

    /// How many blocks the disk has.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the disk has no block: its size rounds down to nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The blocks that have storage: where, and which they are.
    pub(crate) fn allocated(&self) -> impl Iterator<Item = (FileBlock, DiskBlock)> {
        let blocks = (0..).map(DiskBlock::new).zip(&self.entries);
        blocks.filter_map(|(disk_block, raw)| {
            match BlockMapEntry::from_raw(raw.load(Ordering::Acquire)) {
                BlockMapEntry::Allocated(file_block) => Some((file_block, disk_block)),
                BlockMapEntry::Unallocated | BlockMapEntry::Zero => None,
            }
        })
    }

    /// The number behind the highest file block in use.
    pub(crate) fn owned_end(&self) -> u32 {
        let ends = self.allocated().map(|(file_block, _)| file_block.get() + 1);
        ends.max().unwrap_or(0)
    }
}

const fn entry_at(map_start: FileOffset, block: DiskBlock) -> FileOffset {
    map_start.plus(block.get() as u64 * ENTRY_BYTES)
}

fn raw_entries(bytes: &[u8]) -> impl Iterator<Item = u32> {
    let (entries, _) = bytes.as_chunks();
    entries.iter().map(|&entry| u32::from_le_bytes(entry))
}

/// Which file blocks the map uses, as it was found at open.
#[derive(Debug)]
pub struct Owners {
    bits: Vec<u64>,
    /// The number behind the highest block used by an entry beyond the disk's end.
    hidden_end: u32,
}

impl Owners {
    /// Takes `block`, unless it has an owner.
    fn take(&mut self, block: FileBlock) -> bool {
        let (word, bit) = (block.index() / 64, 1u64 << (block.get() % 64));
        if word >= self.bits.len() {
            self.bits.resize(word + 1, 0);
        }
        let free = self.bits[word] & bit == 0;
        self.bits[word] |= bit;
        free
    }

    fn has(&self, number: u32) -> bool {
        let word = self.bits.get(number as usize / 64).copied().unwrap_or(0);
        word & (1 << (number % 64)) != 0
    }

    /// The number behind the highest block used by entries that no sector of the disk
    /// needs; they are kept as they are.
    pub(crate) const fn hidden_end(&self) -> u32 {
        self.hidden_end
    }

    /// The number behind the highest block in use.
    pub fn end(&self) -> u32 {
        let top = self.bits.iter().rposition(|&word| word != 0);
        top.map_or(0, |index| {
            let above = u32::try_from(index).expect("block numbers have 32 bits") * 64;
            above + (64 - self.bits[index].leading_zeros())
        })
    }

    /// The ranges of blocks without an owner below `end`.
    pub fn gaps(&self, end: u32) -> Vec<Range<u32>> {
        let mut gaps = Vec::new();
        let mut at = 0;
        while at < end {
            let from = (at..end).find(|&number| !self.has(number)).unwrap_or(end);
            at = (from..end).find(|&number| self.has(number)).unwrap_or(end);
            if from < at {
                gaps.push(from..at);
            }
        }
        gaps
    }
}

/// Admits entries that keep B1 and B2.
struct Judge {
    owners: Owners,
    blocks_in_image: u32,
    disk_blocks: u64,
    file_len: u64,
    header: Header,
    /// Every lower file block lies inside the file as a whole.
    whole: u64,
}

impl Judge {
    fn new(header: &Header, file_len: u64) -> Self {
        let area = header.data_area();
        let whole = file_len.saturating_sub(area.start().0) / area.stride_bytes();
        Self {
            owners: Owners {
                bits: Vec::new(),
                hidden_end: 0,
            },
            blocks_in_image: header.blocks_in_image(),
            disk_blocks: header.block_size().blocks_for(header.capacity().bytes()),
            file_len,
            header: header.clone(),
            whole,
        }
    }

    fn admit(&mut self, block: DiskBlock, entry: BlockMapEntry) -> Result<(), MapError> {
        let BlockMapEntry::Allocated(file_block) = entry else {
            return Ok(());
        };
        if file_block.get() >= self.blocks_in_image {
            let blocks_in_image = self.blocks_in_image;
            return Err(MapError::OutOfRange {
                block: block.get(),
                file_block: file_block.get(),
                blocks_in_image,
            });
        }
        if u64::from(block.get()) >= self.disk_blocks {
            self.owners.hidden_end = self.owners.hidden_end.max(file_block.get() + 1);
        } else if u64::from(file_block.get()) >= self.whole {
            self.check_inside(block, file_block)?;
        }
        if !self.owners.take(file_block) {
            return Err(MapError::TwoOwners {
                block: block.get(),
                file_block: file_block.get(),
            });
        }
        Ok(())
    }

    /// The last block may be cut where the disk ends (B1).
    fn check_inside(&self, block: DiskBlock, file_block: FileBlock) -> Result<(), MapError> {
        let (capacity, size): (Capacity, _) = (self.header.capacity(), self.header.block_size());
        let needed = (capacity.bytes() - size.start_of(block)).min(u64::from(size.bytes()));
        let end = self
            .header
            .data_area()
            .contents_of(file_block)
            .plus(needed)
            .0;
        if end > self.file_len {
            let file_len = self.file_len;
            return Err(MapError::BehindEnd {
                block: block.get(),
                file_block: file_block.get(),
                end,
                file_len,
            });
        }
        Ok(())
    }
}

/// The rule that a map breaks.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum MapError {
    #[error("cannot read the block map")]
    Read { source: io::Error },
    #[error(
        "the file has {file_len} bytes, but its block map of {blocks_in_image} entries (blocks_in_image) \
         ends at {map_end}; the file was cut off: restore it from a copy"
    )]
    Truncated {
        file_len: u64,
        map_end: u64,
        blocks_in_image: u32,
    },
    #[error(
        "disk block {block} is kept in file block {file_block}, \
         but blocks_in_image is {blocks_in_image}; run `vdi check`"
    )]
    OutOfRange {
        block: u32,
        file_block: u32,
        blocks_in_image: u32,
    },
    #[error(
        "disk block {block} is kept in file block {file_block}, which another disk block has too; run `vdi check`"
    )]
    TwoOwners { block: u32, file_block: u32 },
    #[error(
        "disk block {block} is kept in file block {file_block}, which ends at {end}, \
         but the file has {file_len} bytes; it was cut off: restore it from a copy, or run `vdi check`"
    )]
    BehindEnd {
        block: u32,
        file_block: u32,
        end: u64,
        file_len: u64,
    },
}
