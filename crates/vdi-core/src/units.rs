//! Positions, sizes and ranges, each of its own type, and all arithmetic
//! between them.
//!
//! There are four kinds of place: a [`Sector`] and a [`DiskBlock`] of the
//! virtual disk, a [`FileBlock`] and a [`FileOffset`] of the image file. They
//! meet only here, so a mixed-up position does not compile.
//!
//! Invariants:
//!
//! - **U1** A [`SectorRange`] lies inside the [`Capacity`] that made it.
//! - **U2** A [`DataArea`] reaches every file block with an offset below 2^64, so
//!   no position overflows. (Whether it is inside the file is [`crate::block_map`]'s.)

use std::fmt;
use std::ops::Range;

/// Bytes of a sector, always.
pub const SECTOR_SIZE: u64 = 512;

/// A position on the virtual disk, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

/// The size of a virtual disk: a whole number of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Capacity {
    sectors: u64,
}

impl Capacity {
    /// The whole sectors in `bytes`; VirtualBox drops a partial last one too.
    pub const fn from_bytes_rounded_down(bytes: u64) -> Self {
        Self {
            sectors: bytes / SECTOR_SIZE,
        }
    }

    /// The sectors that it takes to hold `bytes`, below 2^64.
    pub const fn from_bytes_rounded_up(bytes: u64) -> Self {
        Self {
            sectors: bytes.div_ceil(SECTOR_SIZE),
        }
    }

    /// The size in sectors.
    pub const fn sectors(self) -> u64 {
        self.sectors
    }

    /// The size in bytes, a multiple of 512.
    pub const fn bytes(self) -> u64 {
        self.sectors * SECTOR_SIZE
    }

    /// The range of `count` sectors from `start`, if all of it lies on the disk.
    ///
    /// The only way to make a [`SectorRange`] (with [`Self::whole`]), so no
    /// other code checks bounds.
    pub fn range(self, start: Sector, count: u64) -> Option<SectorRange> {
        let end = start.0.checked_add(count)?;
        (end <= self.sectors).then_some(SectorRange { start, count })
    }

    /// The range with exactly these bytes, if they begin and end with a sector of the disk.
    pub fn range_of_bytes(self, bytes: Range<u64>) -> Option<SectorRange> {
        let len_bytes = bytes.end.checked_sub(bytes.start)?;
        let range = self.range_around_bytes(bytes.clone())?;
        (range.start_bytes() == bytes.start && range.len_bytes() == len_bytes).then_some(range)
    }

    /// The smallest range that has these bytes in it, if they lie on the disk.
    pub fn range_around_bytes(self, bytes: Range<u64>) -> Option<SectorRange> {
        let start = bytes.start / SECTOR_SIZE;
        let count = bytes.end.div_ceil(SECTOR_SIZE).checked_sub(start)?;
        self.range(Sector(start), count)
    }

    /// The whole disk.
    pub const fn whole(self) -> SectorRange {
        SectorRange {
            start: Sector(0),
            count: self.sectors,
        }
    }
}

/// Consecutive sectors that all lie on the disk (U1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectorRange {
    start: Sector,
    count: u64,
}

impl SectorRange {
    /// The first sector.
    pub const fn start(self) -> Sector {
        self.start
    }

    /// How many sectors.
    pub const fn count(self) -> u64 {
        self.count
    }

    /// Where the range begins, in bytes from the start of the disk.
    pub const fn start_bytes(self) -> u64 {
        self.start.0 * SECTOR_SIZE
    }

    /// How long the range is, in bytes.
    pub const fn len_bytes(self) -> u64 {
        self.count * SECTOR_SIZE
    }

    /// Where the range ends, in bytes from the start of the disk.
    pub const fn end_bytes(self) -> u64 {
        self.start_bytes() + self.len_bytes()
    }

    /// Whether there is no sector in it.
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    /// The parts of this range, cut at the ends of blocks.
    pub fn spans(self, block_size: BlockSize) -> Spans {
        let at = self.start_bytes();
        Spans {
            at,
            end: at + self.len_bytes(),
            block_size,
        }
    }
}

/// A block of the virtual disk: an index into the block map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskBlock(u32);

impl DiskBlock {
    /// The block with this index.
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

    /// The index as the format has it.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The index into a table in memory.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Whether `other` is the block right behind this one.
    pub const fn is_before(self, other: Self) -> bool {
        self.0.checked_add(1).is_some() && self.0 + 1 == other.0
    }
}

impl fmt::Display for DiskBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A block of the image file's data area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileBlock(u32);

impl FileBlock {
    /// One more than the highest number; the two above it mean "zero" and "free".
    pub const LIMIT: u32 = 0xFFFF_FFFE;

    /// The block with this number, unless the number means something else.
    pub const fn new(number: u32) -> Option<Self> {
        if number < Self::LIMIT {
            Some(Self(number))
        } else {
            None
        }
    }

    /// The number as the format has it.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The index into a table in memory.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Whether `other` is the block right behind this one.
    pub const fn is_before(self, other: Self) -> bool {
        // Numbers are below LIMIT.
        self.0 + 1 == other.0
    }
}

impl fmt::Display for FileBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A byte position in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileOffset(pub u64);

impl FileOffset {
    /// The position `bytes` further on.
    ///
    /// # Panics
    /// If it would pass 2^64, which U2 excludes.
    pub const fn plus(self, bytes: u64) -> Self {
        Self(
            self.0
                .checked_add(bytes)
                .expect("U2: positions in an image are below 2^64"),
        )
    }
}

impl fmt::Display for FileOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes of disk contents in a block: a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSize {
    shift: u32,
}

impl BlockSize {
    /// The smallest block size that VirtualBox opens: 128 KiB.
    pub const MIN: u32 = 128 << 10;
    /// The largest block size that VirtualBox opens: 128 MiB.
    pub const MAX: u32 = 128 << 20;

    /// A size of `bytes`, if it is a power of two that VirtualBox opens.
    pub fn new(bytes: u32) -> Option<Self> {
        let legal = bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes);
        legal.then(|| Self {
            shift: bytes.trailing_zeros(),
        })
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u32 {
        1 << self.shift
    }

    /// The block that holds the disk's byte `at_bytes`, if its index fits.
    pub fn block_of(self, at_bytes: u64) -> Option<DiskBlock> {
        u32::try_from(at_bytes >> self.shift).ok().map(DiskBlock)
    }

    /// Where `block` begins, in bytes from the start of the disk.
    pub const fn start_of(self, block: DiskBlock) -> u64 {
        (block.0 as u64) << self.shift
    }

    /// From the disk's byte `at_bytes` to the end of its block, if the block's index fits.
    pub fn span_at(self, at_bytes: u64) -> Option<Span> {
        let block = self.block_of(at_bytes)?;
        let skip_bytes = at_bytes - self.start_of(block);
        let len_bytes = u64::from(self.bytes()) - skip_bytes;
        Some(Span {
            block,
            skip_bytes,
            len_bytes,
        })
    }

    /// How many blocks it takes to hold `bytes`.
    pub const fn blocks_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(1 << self.shift)
    }
}

/// The part of one block that a range touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The block.
    pub block: DiskBlock,
    /// Bytes from the start of the block.
    pub skip_bytes: u64,
    /// Bytes of the block that belong to the range.
    pub len_bytes: u64,
}

/// The spans of a [`SectorRange`], in order.
#[derive(Clone, Debug)]
pub struct Spans {
    at: u64,
    end: u64,
    block_size: BlockSize,
}

impl Iterator for Spans {
    type Item = Span;

    fn next(&mut self) -> Option<Span> {
        if self.at >= self.end {
            return None;
        }
        let span = self
            .block_size
            .span_at(self.at)
            .expect("U1: the range lies on the disk");
        let len_bytes = span.len_bytes.min(self.end - self.at);
        self.at += len_bytes;
        Some(Span { len_bytes, ..span })
    }
}

/// Where the data blocks of an image lie in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataArea {
    start: FileOffset,
    block_extra: u32,
    block_size: BlockSize,
}

impl DataArea {
    /// The area that begins at `offset_data` with blocks of `block_extra` private
    /// and `block_size` disk bytes.
    ///
    /// `block_extra` is a power of two of 32 bits, so a stride is at most 2^31 + 2^27
    /// and the end of the last block below 2^32 * 2^32 (U2).
    pub fn new(offset_data: u32, block_extra: u32, block_size: BlockSize) -> Self {
        Self {
            start: FileOffset(u64::from(offset_data)),
            block_extra,
            block_size,
        }
    }

    /// Where file block 0 begins.
    pub const fn start(self) -> FileOffset {
        self.start
    }

    /// Bytes from one block to the next.
    pub const fn stride_bytes(self) -> u64 {
        self.block_extra as u64 + self.block_size.bytes() as u64
    }

    /// Where the disk contents of `block` begin.
    pub const fn contents_of(self, block: FileBlock) -> FileOffset {
        self.end_of(block.0).plus(self.block_extra as u64)
    }

    /// Where the first `count` blocks end.
    pub const fn end_of(self, count: u32) -> FileOffset {
        self.start.plus(count as u64 * self.stride_bytes())
    }

    /// How many blocks a file of `len_bytes` holds at least a part of.
    pub const fn blocks_covered(self, len_bytes: u64) -> u64 {
        len_bytes
            .saturating_sub(self.start.0)
            .div_ceil(self.stride_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_ends_where_the_disk_ends() {
        let capacity = Capacity::from_bytes_rounded_down(10 * 512 + 511);
        assert_eq!(capacity.sectors(), 10);
        assert!(capacity.range(Sector(0), 10).is_some());
        assert!(capacity.range(Sector(10), 0).is_some());
        assert_eq!(capacity.range(Sector(10), 1), None);
        assert_eq!(capacity.range(Sector(u64::MAX), 2), None);
    }

    #[test]
    fn bytes_name_a_range_only_where_sectors_begin_and_end() {
        let capacity = Capacity::from_bytes_rounded_up(10 * 512 - 1);
        assert_eq!(capacity.sectors(), 10);
        let range = capacity.range(Sector(1), 3);
        assert!(range.is_some());
        assert_eq!(capacity.range_of_bytes(512..2048), range);
        for (bytes, around) in [(513..2048, range), (512..2047, range), (512..5121, None)] {
            assert_eq!(capacity.range_of_bytes(bytes.clone()), None);
            assert_eq!(capacity.range_around_bytes(bytes), around);
        }
        #[expect(clippy::reversed_empty_ranges, reason = "the caller's mistake")]
        let backwards = 512..511;
        assert_eq!(capacity.range_of_bytes(backwards), None);
    }

    #[test]
    fn spans_are_cut_at_block_ends_and_cover_the_range() {
        let size = BlockSize::new(128 << 10).unwrap();
        let capacity = Capacity::from_bytes_rounded_down(1 << 20);
        let range = capacity.range(Sector(255), 514).unwrap();
        let spans: Vec<_> = range
            .spans(size)
            .map(|s| (s.block.get(), s.skip_bytes, s.len_bytes))
            .collect();
        assert_eq!(
            spans,
            [
                (0, 255 * 512, 512),
                (1, 0, 128 << 10),
                (2, 0, 128 << 10),
                (3, 0, 512)
            ]
        );
        assert_eq!(
            capacity.range(Sector(5), 0).unwrap().spans(size).next(),
            None
        );
    }

    #[test]
    fn block_sizes_are_the_powers_of_two_that_virtualbox_opens() {
        for bytes in [
            0,
            1,
            512,
            64 << 10,
            (128 << 10) + 1,
            192 << 10,
            256 << 20,
            u32::MAX,
        ] {
            assert_eq!(BlockSize::new(bytes), None, "{bytes}");
        }
        for shift in 17..=27 {
            assert_eq!(BlockSize::new(1 << shift).unwrap().bytes(), 1 << shift);
        }
    }

    #[test]
    fn the_last_file_block_has_an_offset() {
        let area = DataArea::new(u32::MAX, 1 << 31, BlockSize::new(BlockSize::MAX).unwrap());
        let last = FileBlock::new(FileBlock::LIMIT - 1).unwrap();
        assert!(area.contents_of(last).plus(1 << 27).0 > area.start().0);
        assert_eq!(FileBlock::new(FileBlock::LIMIT), None);
    }

    #[test]
    fn a_partial_block_at_the_end_of_the_file_counts() {
        let area = DataArea::new(1024, 0, BlockSize::new(1 << 20).unwrap());
        assert_eq!(area.blocks_covered(0), 0);
        assert_eq!(area.blocks_covered(1024), 0);
        assert_eq!(area.blocks_covered(1025), 1);
        assert_eq!(area.blocks_covered(1024 + (1 << 20)), 1);
        assert_eq!(area.blocks_covered(1025 + (1 << 20)), 2);
    }
}
