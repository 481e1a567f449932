//! A reader of images that shares no code with the library, for what a crash left: it is written from `vdi-format.md`
//! (VirtualBox `VDICore.h`) alone, knows version 1.1 only, and trusts nothing.

use std::collections::HashSet;

use super::contents::Contents;
use super::index;
use super::layout::{FREE, ZERO};

/// An image whose header and map could be read.
#[derive(Debug)]
pub struct Plain<'c> {
    contents: &'c Contents,
    offset_data: u64,
    block_extra: u64,
    /// `cBlocksAllocated`.
    pub blocks_allocated: u32,
    /// `cbBlock`.
    pub block_size: u64,
    /// `cbDisk`, without a partial sector.
    pub disk_size: u64,
    /// The map.
    pub entries: Vec<u32>,
}

fn number(contents: &Contents, at: u64) -> u32 {
    let bytes = contents.bytes(at..at + 4);
    u32::from_le_bytes(*bytes.first_chunk().expect("four bytes"))
}

impl<'c> Plain<'c> {
    /// Reads header and map.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(contents: &'c Contents) -> Result<Self, String> {
        let field = |at| number(contents, at);
        if field(0x40) != 0xBEDA_107F || field(0x44) != 0x0001_0001 {
            return Err("no VDI image of version 1.1".into());
        }
        let (offset_bmap, offset_data) = (u64::from(field(0x154)), u64::from(field(0x158)));
        let size = u64::from(field(0x170)) | u64::from(field(0x174)) << 32;
        let (block_size, count) = (u64::from(field(0x178)), u64::from(field(0x180)));
        let map_end = offset_bmap + 4 * count;
        if map_end > offset_data || map_end > contents.len_bytes() {
            return Err(format!(
                "a map that ends at {map_end} overlaps the data or the end"
            ));
        }
        if !block_size.is_power_of_two() || size > block_size * count || count > 1 << 20 {
            return Err(format!(
                "{count} blocks of {block_size} bytes hold no {size}"
            ));
        }
        let map = contents.bytes(offset_bmap..map_end);
        let (entries, _) = map.as_chunks();
        Ok(Self {
            contents,
            offset_data,
            block_extra: u64::from(field(0x17C)),
            blocks_allocated: field(0x184),
            block_size,
            disk_size: size / 512 * 512,
            entries: entries
                .iter()
                .map(|&entry| u32::from_le_bytes(entry))
                .collect(),
        })
    }

    fn end_of(&self, block: u32) -> u64 {
        self.offset_data + (u64::from(block) + 1) * (self.block_extra + self.block_size)
    }

    /// What would harm VirtualBox, QEMU or us if they opened and wrote it now.
    #[must_use]
    pub fn harm(&self) -> Option<String> {
        let (count, len) = (self.blocks_allocated, self.contents.len_bytes());
        let mut owned = HashSet::new();
        for (nth, &entry) in self.entries.iter().enumerate() {
            if entry >= ZERO {
                continue;
            }
            if !owned.insert(entry) {
                return Some(format!("file block {entry} has two owners, one is {nth}"));
            }
            if entry >= count {
                return Some(format!(
                    "{nth} is kept in {entry}, but {count} blocks are counted"
                ));
            }
            if self.end_of(entry) > len {
                return Some(format!(
                    "{nth} is kept in {entry}, behind the end of the file, {len}"
                ));
            }
        }
        (count as usize > self.entries.len()).then(|| format!("{count} blocks are counted"))
    }

    /// The blocks that have storage here.
    pub fn stored(&self) -> impl Iterator<Item = u64> + '_ {
        let entries = (0..).zip(&self.entries);
        entries
            .filter(|(_, entry)| **entry < ZERO)
            .map(|(block, _)| block)
    }

    /// Where a byte of the disk is in the file, `Ok(None)` for zeros, `Err` if the parent knows.
    fn place(&self, at: u64) -> Result<Option<u64>, ()> {
        if at >= self.disk_size {
            return Ok(None);
        }
        match self.entries[index(at / self.block_size)] {
            FREE => Err(()),
            ZERO => Ok(None),
            block => Ok(Some(
                self.end_of(block) - self.block_size + at % self.block_size,
            )),
        }
    }
}

/// Reads `len` bytes at `at` of the disk that a chain makes, the leaf first.
///
/// # Errors
/// If they lie behind the end of a file.
pub fn read(chain: &[Plain<'_>], at: u64, len: u64) -> Result<Vec<u8>, String> {
    let step = chain
        .iter()
        .map(|image| image.block_size)
        .min()
        .unwrap_or(512);
    let mut bytes = vec![0; index(len)];
    let mut done = 0;
    while done < len {
        let here = at + done;
        let count = (step - here % step).min(len - done);
        let place = chain
            .iter()
            .find_map(|image| image.place(here).ok().map(|place| (image, place)));
        if let Some((image, Some(place))) = place {
            let piece = &mut bytes[index(done)..index(done + count)];
            if !image.contents.read(piece, place) {
                return Err(format!("{place}, where {here} is kept, is behind the end"));
            }
        }
        done += count;
    }
    Ok(bytes)
}
