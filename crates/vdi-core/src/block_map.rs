//! The block map: where each block of the virtual disk is kept.
//!
//! Invariants, established by [`BlockMap::load`] and kept by every change:
//!
//! - **B1** An allocated entry names a file block below `blocks_in_image` whose part of
//!   the disk lies inside the file. In a full image, where nobody will ever want a number for a new block,
//!   it may be one of the next [`MOST_AWAY`]: see below.
//! - **B2** No two entries name the same file block.
//!
//! A full image whose map needs more room has no number for the blocks that make way for it. While
//! [`crate::resize`] works they are *away*, behind the end of what the numbers reach. VirtualBox and QEMU
//! read and write such blocks like any other (QEMU's check calls them corrupt), and give no new block
//! a number, since every block of the disk has one. Before the first change [`crate::chores`] brings
//! them home.
//!
//! Look-ups take no lock and never wait. Memory is taken as entries are read and
//! found right, and only where some are not unallocated ([`Entries`]). So a file that only claims to be large costs
//! nothing: its holes read as entries 0, and the second of them breaks B2.
//!
//! Source: VirtualBox `VDICore.h`, `VDIIMAGEBLOCKPOINTER`.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::entries::{Entries, PAGE_BYTES, PAGE_ENTRIES, is_unallocated};
use crate::format::{ENTRY_BYTES, ENTRY_FREE, ENTRY_ZERO};
use crate::header::Header;
use crate::storage::Storage;
use crate::units::{Capacity, DiskBlock, FileBlock, FileOffset};

/// How much of the map is read at a time: whole pages, and what stays in the CPU's cache.
const PIECE_ENTRIES: u32 = 64 * PAGE_ENTRIES;

/// How many blocks can be away: `offset_data` has 32 bits and a block at least 128 KiB, so no more than
/// these make way for a map.
pub(crate) const MOST_AWAY: u32 = 1 << 15;

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

    const fn is_allocated(self) -> bool {
        matches!(self, Self::Allocated(_))
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
    entries: Entries,
    start: FileOffset,
    /// How many of them are allocated.
    count_allocated: AtomicU32,
    /// How many stopped being that since they were loaded.
    count_released: AtomicU64,
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
        let mut entries = Entries::default();
        let mut buf = Vec::new();
        for first in (0..blocks).step_by(PIECE_ENTRIES as usize) {
            let count = PIECE_ENTRIES.min(blocks - first);
            buf.resize(count as usize * size_of::<u32>(), 0);
            let at = entry_at(header.map_start(), DiskBlock::new(first));
            storage
                .read_exact_at(&mut buf, at)
                .map_err(|source| MapError::Read { source })?;
            let pages = (first..).step_by(PAGE_ENTRIES as usize);
            for (first, page) in pages.zip(buf.chunks(PAGE_BYTES)) {
                judge.admit_page(DiskBlock::new(first), page)?;
                let kept = judge.of_disk(DiskBlock::new(first), page);
                if !kept.is_empty() {
                    entries.push(kept);
                }
            }
        }
        let owners = judge.finish()?;
        entries.end();
        let present = entries.present();
        let allocated = present.map(|(_, raw)| BlockMapEntry::from_raw(raw));
        let allocated = allocated.filter(|entry| entry.is_allocated()).count();
        let allocated = u32::try_from(allocated).expect("entries have 32-bit indexes");
        let map = Self {
            entries,
            start: header.map_start(),
            count_allocated: AtomicU32::new(allocated),
            count_released: AtomicU64::new(0),
        };
        Ok((map, owners))
    }

    /// Where `block` is kept.
    pub fn get(&self, block: DiskBlock) -> BlockMapEntry {
        BlockMapEntry::from_raw(self.entries.get(block.index()))
    }

    /// Lets readers see a new entry. The file must have it already (W3).
    pub(crate) fn publish(&self, block: DiskBlock, entry: BlockMapEntry) {
        let before = self.entries.set(block.index(), entry.to_raw());
        match (
            BlockMapEntry::from_raw(before).is_allocated(),
            entry.is_allocated(),
        ) {
            (false, true) => {
                self.count_allocated.fetch_add(1, Ordering::Relaxed);
            }
            (true, false) => {
                self.count_allocated.fetch_sub(1, Ordering::Relaxed);
                self.count_released.fetch_add(1, Ordering::Relaxed);
            }
            (true, true) | (false, false) => {}
        }
    }

    /// How many blocks are allocated, without looking at them.
    pub(crate) fn count_allocated(&self) -> u32 {
        self.count_allocated.load(Ordering::Relaxed)
    }

    /// How many entries stopped being allocated since they were loaded.
    pub(crate) fn count_released(&self) -> u64 {
        self.count_released.load(Ordering::Relaxed)
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
        self.entries.len() == 0
    }

    /// All entries, one for each block of the disk.
    pub fn entries(&self) -> impl Iterator<Item = BlockMapEntry> {
        self.entries.iter().map(BlockMapEntry::from_raw)
    }

    /// The blocks that have storage: where, and which they are.
    pub(crate) fn allocated(&self) -> impl Iterator<Item = (FileBlock, DiskBlock)> {
        let present = self.entries.present();
        present.filter_map(|(at, raw)| match BlockMapEntry::from_raw(raw) {
            BlockMapEntry::Allocated(file_block) => Some((file_block, disk_block(at))),
            BlockMapEntry::Unallocated | BlockMapEntry::Zero => None,
        })
    }

    /// Which file blocks the blocks of the disk use now.
    pub(crate) fn owners(&self) -> Owners {
        let mut owners = Owners::none();
        for (file_block, _) in self.allocated() {
            let is_first = owners.take(file_block);
            assert!(is_first, "B2");
        }
        owners
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

fn disk_block(at: usize) -> DiskBlock {
    DiskBlock::new(u32::try_from(at).expect("entries have 32-bit indexes"))
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
    const fn none() -> Self {
        Self {
            bits: Vec::new(),
            hidden_end: 0,
        }
    }

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
    /// The first block that is away.
    away: Option<MapError>,
    /// Some block of the disk has no storage, here or in QEMU.
    has_open: bool,
}

impl Judge {
    fn new(header: &Header, file_len: u64) -> Self {
        let area = header.data_area();
        let whole = file_len.saturating_sub(area.start().0) / area.stride_bytes();
        Self {
            owners: Owners::none(),
            blocks_in_image: header.blocks_in_image(),
            disk_blocks: header.block_size().blocks_for(header.capacity().bytes()),
            file_len,
            header: header.clone(),
            whole,
            away: None,
            has_open: header.ends_in_a_block_of_qemu(),
        }
    }

    /// Admits the entries of a page, or of the part of one, that begins with `first`.
    fn admit_page(&mut self, first: DiskBlock, page: &[u8]) -> Result<(), MapError> {
        if is_unallocated(page) {
            // Nothing to judge in those, and whether one is the disk's is known by the first.
            return self.admit(first, BlockMapEntry::Unallocated);
        }
        let blocks = (first.get()..).map(DiskBlock::new);
        blocks
            .zip(raw_entries(page))
            .try_for_each(|(block, raw)| self.admit(block, BlockMapEntry::from_raw(raw)))
    }

    /// The part of that page that the disk has; the rest is beyond its end.
    fn of_disk<'p>(&self, first: DiskBlock, page: &'p [u8]) -> &'p [u8] {
        let blocks = self.disk_blocks.saturating_sub(u64::from(first.get()));
        let bytes = usize::try_from(blocks.saturating_mul(ENTRY_BYTES)).unwrap_or(usize::MAX);
        &page[..page.len().min(bytes)]
    }

    fn admit(&mut self, block: DiskBlock, entry: BlockMapEntry) -> Result<(), MapError> {
        let is_hidden = u64::from(block.get()) >= self.disk_blocks;
        let BlockMapEntry::Allocated(file_block) = entry else {
            self.has_open |= !is_hidden;
            return Ok(());
        };
        if file_block.get() >= self.blocks_in_image {
            let blocks_in_image = self.blocks_in_image;
            let out_of_range = MapError::OutOfRange {
                block: block.get(),
                file_block: file_block.get(),
                blocks_in_image,
            };
            let is_too_far = file_block.get() - blocks_in_image >= MOST_AWAY;
            if is_hidden || is_too_far || self.check_inside(block, file_block).is_err() {
                return Err(out_of_range);
            }
            self.away.get_or_insert(out_of_range);
        }
        if is_hidden {
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

    /// All entries are admitted: may blocks be away?
    fn finish(self) -> Result<Owners, MapError> {
        let is_full = !self.has_open && self.owners.hidden_end == 0;
        match self.away {
            Some(out_of_range) if !is_full => Err(out_of_range),
            _ => Ok(self.owners),
        }
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

#[cfg(test)]
impl Owners {
    /// Owners of these blocks.
    pub(crate) fn of(owned: &[u32]) -> Self {
        let mut owners = Self::none();
        for &number in owned {
            assert!(owners.take(FileBlock::new(number).unwrap()));
        }
        owners
    }
}

#[cfg(test)]
#[expect(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges are what is compared"
)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::create::{CreateOptions, NewKind, create_in};
    use crate::format::RawHeader;
    use crate::storage::{Access, HostFile, Locking};

    /// Four blocks of 1 MiB, the last one of which the disk needs 1 KiB of.
    const CAPACITY: u64 = (3 << 20) + 1024;
    const DATA: u64 = 2 << 20;

    /// An image whose map has these entries, in a file of that length.
    fn load(entries: &[u32], file_len: u64) -> Result<(BlockMap, Owners), MapError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.vdi");
        let options = CreateOptions {
            capacity_bytes: CAPACITY,
            block_size: 1 << 20,
            kind: NewKind::Dynamic,
            uuid: None,
        };
        let file = File::create_new(&path).unwrap();
        create_in(&file, &options).unwrap();
        for (nth, entry) in entries.iter().enumerate() {
            let at = (1 << 20) + 4 * nth as u64;
            file.write_all_at(&entry.to_le_bytes(), at).unwrap();
        }
        // blocks_in_image: entries beyond the disk's last block are legal.
        let blocks = u32::try_from(entries.len()).unwrap();
        file.write_all_at(&blocks.to_le_bytes(), 0x180).unwrap();
        file.set_len(file_len).unwrap();
        let file = HostFile::open(&path, Access::ReadOnly, Locking::Locked).unwrap();
        let raw = RawHeader::read(&file).unwrap();
        BlockMap::load(&file, &Header::check(raw, Access::ReadOnly).unwrap())
    }

    fn end_of(blocks: u64) -> u64 {
        DATA + (blocks << 20)
    }

    #[test]
    fn load_gives_the_three_states() {
        let (map, owners) = load(&[2, ENTRY_FREE, ENTRY_ZERO, 0], end_of(3)).unwrap();
        let states: Vec<_> = (0..4).map(|block| map.get(DiskBlock::new(block))).collect();
        let allocated = |number| BlockMapEntry::Allocated(FileBlock::new(number).unwrap());
        let (unallocated, zero) = (BlockMapEntry::Unallocated, BlockMapEntry::Zero);
        assert_eq!(states, [allocated(2), unallocated, zero, allocated(0)]);
        assert_eq!((map.len(), map.owned_end(), owners.end()), (4, 3, 3));
        assert_eq!(owners.gaps(5), [1..2, 3..5]);
    }

    #[test]
    fn load_rejects_a_block_that_is_not_below_blocks_in_image() {
        let refused = load(&[0, 4, ENTRY_FREE, ENTRY_FREE], end_of(9));
        assert!(matches!(
            refused,
            Err(MapError::OutOfRange {
                block: 1,
                file_block: 4,
                blocks_in_image: 4
            })
        ));
        let refused = load(&[ENTRY_ZERO - 1, 0, 1, 2], end_of(9));
        assert!(matches!(refused, Err(MapError::OutOfRange { .. })));
    }

    #[test]
    fn only_in_a_full_image_blocks_may_be_away() {
        let away = [1, 4, 2, 5];
        let (map, owners) = load(&away, end_of(6)).unwrap();
        assert_eq!((map.owned_end(), owners.end()), (6, 6));
        assert_eq!(owners.gaps(4), [0..1, 3..4]);
        assert_eq!(map.owners().gaps(6), owners.gaps(6));
        // The disk has four blocks, entries beyond it may be open.
        assert!(load(&[1, 7, 2, 5, ENTRY_FREE], end_of(8)).is_ok());
        for (entries, blocks) in [
            ([1, 4, ENTRY_ZERO, 5, ENTRY_FREE], 6),
            ([ENTRY_FREE, 7, 2, 5, ENTRY_FREE], 8),
            ([1, 7, 2, 5, 6], 8),
            ([1, 7, 2, 3, 0], 8),
            (
                [1, 2, 3, 5 + MOST_AWAY, ENTRY_FREE],
                6 + u64::from(MOST_AWAY),
            ),
        ] {
            let refused = load(&entries, end_of(blocks));
            assert!(
                matches!(refused, Err(MapError::OutOfRange { .. })),
                "{entries:?}"
            );
        }
        let refused = load(&[1, 4, 2, 4], end_of(6));
        assert!(matches!(refused, Err(MapError::TwoOwners { .. })));
        let refused = load(&away, end_of(5));
        assert!(matches!(
            refused,
            Err(MapError::OutOfRange { block: 3, .. })
        ));
    }

    #[test]
    fn load_rejects_two_owners_of_one_block() {
        let refused = load(&[1, 0, ENTRY_FREE, 1], end_of(4));
        assert!(matches!(
            refused,
            Err(MapError::TwoOwners {
                block: 3,
                file_block: 1
            })
        ));
        // An owner that no sector of the disk needs is one too.
        let refused = load(&[1, 0, ENTRY_FREE, ENTRY_FREE, 1], end_of(4));
        assert!(matches!(refused, Err(MapError::TwoOwners { block: 4, .. })));
    }

    #[test]
    fn load_rejects_a_block_that_the_file_does_not_hold() {
        let entries = [0, 1, ENTRY_FREE, ENTRY_FREE];
        assert!(load(&entries, end_of(2)).is_ok());
        let refused = load(&entries, end_of(2) - 1);
        assert!(matches!(
            refused,
            Err(MapError::BehindEnd { block: 1, file_block: 1, end, file_len })
                if end == end_of(2) && file_len == end - 1
        ));
    }

    #[test]
    fn the_last_block_may_end_where_the_disk_does() {
        let entries = [0, ENTRY_FREE, ENTRY_FREE, 1];
        assert!(load(&entries, end_of(1) + 1024).is_ok());
        let refused = load(&entries, end_of(1) + 1023);
        assert!(matches!(refused, Err(MapError::BehindEnd { block: 3, .. })));
    }

    #[test]
    fn load_rejects_a_map_that_was_cut_off() {
        let entries = [ENTRY_FREE; 4];
        assert!(load(&entries, (1 << 20) + 16).is_ok());
        let refused = load(&entries, (1 << 20) + 15);
        assert!(matches!(refused, Err(MapError::Truncated { .. })));
    }

    #[test]
    fn entries_beyond_the_disk_keep_their_blocks() {
        let entries = [0, ENTRY_FREE, ENTRY_FREE, ENTRY_FREE, ENTRY_FREE, 3];
        let (map, owners) = load(&entries, end_of(4)).unwrap();
        assert_eq!((map.len(), map.owned_end()), (4, 1));
        assert_eq!((owners.hidden_end(), owners.end()), (4, 4));
        assert_eq!(owners.gaps(4), [1..3]);
    }

    #[test]
    fn gaps_are_what_nobody_owns() {
        let owners = Owners::of(&[0, 1, 63, 64, 130]);
        assert_eq!(owners.end(), 131);
        assert_eq!(owners.gaps(200), [2..63, 65..130, 131..200]);
        assert_eq!(owners.gaps(64), [2..63]);
        assert_eq!(Owners::of(&[]).gaps(3), [0..3]);
        assert_eq!(Owners::of(&[]).end(), 0);
    }
}
