//! A reader of images that has nothing in common with the core, and judges nothing.
//!
//! Source: `VDICore.h` of VirtualBox for the places of the fields.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::simulated::Contents;

pub(super) const FREE: u32 = 0xFFFF_FFFF;
pub(super) const ZERO: u32 = 0xFFFF_FFFE;

/// Entries that an input may have in its file; more only takes time.
const MOST_ENTRIES: u64 = 70_000;

/// An image as its fields describe it, right or wrong.
#[derive(Clone, Debug)]
pub(super) struct Reference {
    pub(super) contents: Contents,
    is_version_0: bool,
    pub(super) map_at: u64,
    data_at: u64,
    pub(super) disk_size: u64,
    pub(super) block_size: u64,
    pub(super) block_extra: u64,
    /// `blocks_in_image`.
    pub(super) blocks: u64,
    pub(super) blocks_allocated: u32,
}

impl Reference {
    pub(super) fn of(contents: Contents) -> Self {
        let word = |at: u64| {
            let bytes = contents.bytes(at..at + 4);
            u32::from_le_bytes(*bytes.first_chunk().expect("four bytes"))
        };
        let long = |at: u64| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let is_version_0 = word(0x44) == 2;
        if is_version_0 {
            let blocks = u64::from(word(0x16C));
            return Self {
                is_version_0,
                map_at: 0x1A4,
                data_at: 0x1A4 + 4 * blocks,
                disk_size: long(0x160),
                block_size: word(0x168).into(),
                block_extra: 0,
                blocks,
                blocks_allocated: word(0x170),
                contents,
            };
        }
        Self {
            is_version_0,
            map_at: word(0x154).into(),
            data_at: word(0x158).into(),
            disk_size: long(0x170),
            block_size: word(0x178).into(),
            block_extra: word(0x17C).into(),
            blocks: word(0x180).into(),
            blocks_allocated: word(0x184),
            contents,
        }
    }

    pub(super) const fn header_end(&self) -> u64 {
        if self.is_version_0 { 0x1A4 } else { 0x1C8 }
    }

    pub(super) fn uuid_parent(&self) -> [u8; 16] {
        let at = if self.is_version_0 { 0x194 } else { 0x1A8 };
        *self
            .contents
            .bytes(at..at + 16)
            .first_chunk()
            .expect("16 bytes")
    }

    /// Where the fields are that a disk changes when it is written: the count and `uuid_modify`.
    pub(super) const fn changing(&self) -> [Range<u64>; 2] {
        if self.is_version_0 {
            [0x170..0x174, 0x184..0x194]
        } else {
            [0x184..0x188, 0x198..0x1A8]
        }
    }

    pub(super) const fn map_end(&self) -> u64 {
        self.map_at + 4 * self.blocks
    }

    /// Whether map and data overlap nothing, and sizes are such that blocks can be spoken of.
    pub(super) const fn is_laid_out(&self) -> bool {
        self.map_at >= self.header_end()
            && self.data_at >= self.map_end()
            && self.block_size >= 128 << 10
            && self.block_size <= 128 << 20
            && self.block_size.is_power_of_two()
    }

    /// The disk's size in whole sectors.
    pub(super) const fn sectors(&self) -> u64 {
        self.disk_size / 512
    }

    /// Where the first `count` blocks end. What is beyond 2^64 is at its end.
    pub(super) const fn end_of(&self, count: u32) -> u64 {
        let blocks = (count as u64).saturating_mul(self.block_extra + self.block_size);
        self.data_at.saturating_add(blocks)
    }

    pub(super) const fn contents_of(&self, number: u32) -> u64 {
        self.end_of(number).saturating_add(self.block_extra)
    }

    /// How many bytes of a block belong to the disk.
    pub(super) fn needed(&self, block: u64) -> u64 {
        let left = (self.sectors() * 512).saturating_sub(block.saturating_mul(self.block_size));
        left.min(self.block_size)
    }

    /// Entries that the file has.
    pub(super) fn count_present(&self) -> u64 {
        let bytes = self.contents.len_bytes().saturating_sub(self.map_at);
        (bytes / 4).min(self.blocks)
    }

    /// Whether there are so many entries that only time would be spent.
    pub(super) fn is_too_large(&self) -> bool {
        self.count_present() > MOST_ENTRIES
    }

    /// The entries that the file has.
    pub(super) fn entries(&self) -> Vec<u32> {
        let map = self
            .contents
            .bytes(self.map_at..self.map_at + 4 * self.count_present());
        let (entries, _) = map.as_chunks();
        entries
            .iter()
            .map(|&entry| u32::from_le_bytes(entry))
            .collect()
    }

    /// Bytes of a block, from its start, that the disk needs and the file has.
    pub(super) fn present(&self, block: u64, number: u32) -> u64 {
        let behind = self
            .contents
            .len_bytes()
            .saturating_sub(self.contents_of(number));
        behind.min(self.needed(block))
    }

    /// The sectors of the disk that may hold something else than zeros, and those at the ends of blocks with storage.
    pub(super) fn sectors_held(&self) -> BTreeSet<u64> {
        let mut held = BTreeSet::new();
        for (block, entry) in (0..).zip(self.entries()) {
            let needed = self.needed(block);
            if entry >= ZERO || needed == 0 {
                continue;
            }
            let (start, first) = (self.contents_of(entry), block * self.block_size / 512);
            for at in held_bytes(&self.contents, &(start..start + needed)) {
                held.insert(first + at.start / 512);
                held.insert(first + (at.end - 1) / 512);
            }
            held.extend([first, first + needed.div_ceil(512) - 1]);
        }
        held.retain(|&sector| sector < self.sectors());
        held
    }

    /// A sector as the disk shows it; `None` where the image says that the parent counts.
    pub(super) fn sector(&self, sector: u64) -> Option<Vec<u8>> {
        let (at, zeros) = (sector * 512, vec![0; 512]);
        if sector >= self.sectors() {
            return Some(zeros);
        }
        let entry_at = self.map_at + at / self.block_size * 4;
        let entry = self.contents.bytes(entry_at..entry_at + 4);
        match u32::from_le_bytes(*entry.first_chunk().expect("four bytes")) {
            FREE => None,
            ZERO => Some(zeros),
            number => {
                let start = self.contents_of(number) + at % self.block_size;
                Some(self.contents.bytes(start..start + 512))
            }
        }
    }
}

/// The parts of a range that may hold something else than zeros, from its start.
pub(super) fn held_bytes(contents: &Contents, range: &Range<u64>) -> Vec<Range<u64>> {
    let pieces = contents.pieces_held(range);
    let cut = pieces.into_iter().map(|piece| {
        let (start, end) = (
            (piece * 512).max(range.start),
            (piece * 512 + 512).min(range.end),
        );
        start - range.start..end - range.start
    });
    cut.filter(|part| part.start < part.end).collect()
}

/// Whether `len` bytes at one place of a file are those at a place of another.
pub(super) fn is_same(one: (&Contents, u64), other: (&Contents, u64), len: u64) -> bool {
    [one, other].into_iter().all(|(contents, at)| {
        held_bytes(contents, &(at..at + len))
            .into_iter()
            .all(|part| {
                let bytes = |(contents, at): (&Contents, u64)| {
                    contents.bytes(at + part.start..at + part.end)
                };
                bytes(one) == bytes(other)
            })
    })
}

/// Whether a range holds zeros only.
pub(super) fn is_zeros(contents: &Contents, range: &Range<u64>) -> bool {
    let parts = held_bytes(contents, range);
    parts.into_iter().all(|part| {
        let bytes = contents.bytes(range.start + part.start..range.start + part.end);
        bytes.iter().all(|&byte| byte == 0)
    })
}
