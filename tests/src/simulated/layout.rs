//! Images of every shape, written without the help of what is tested, and what can be
//! found in an image without it.
//!
//! Source: VirtualBox `VDICore.h` for the places of the fields.

use std::collections::HashSet;
use std::ops::Range;

use super::contents::Contents;
use super::{index, percent};
use crate::random::Random;

/// A map entry that says "nothing here".
pub const FREE: u32 = 0xFFFF_FFFF;
/// A map entry that says "zeros".
pub const ZERO: u32 = 0xFFFF_FFFE;
/// The bytes of blocks that nobody owns; no disk may ever show them.
const POISON: u8 = 0xEE;

const AT_COUNT: u64 = 0x184;
/// Where `uuid_modify` is.
pub const AT_UUID_MODIFY: u64 = 0x198;
const SHORT_HEADER: u32 = 0x180;
const LONG_HEADER: u32 = 0x190;

/// What an image shall be. Fields are the header's, by its names.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the fields are the header's")]
pub struct Layout {
    pub header_size: u32,
    pub image_type: u32,
    pub offset_bmap: u32,
    pub offset_data: u32,
    pub disk_size: u64,
    pub block_size: u32,
    pub block_extra: u32,
    pub blocks_allocated: u32,
    /// The map.
    pub entries: Vec<u32>,
    /// The length of the file.
    pub file_len: u64,
    /// Each byte of `uuid_image`.
    pub uuid: u8,
    /// Each byte of `uuid_parent`, if there is a parent.
    pub parent: Option<u8>,
}

impl Layout {
    /// An image that was never written, as QEMU lays it out.
    #[must_use]
    pub fn plain(block_size: u32, disk_size: u64) -> Self {
        let blocks = disk_size.div_ceil(u64::from(block_size));
        let offset_data = (512 + blocks * 4).next_multiple_of(512);
        Self {
            header_size: SHORT_HEADER,
            image_type: 1,
            offset_bmap: 512,
            offset_data: u32::try_from(offset_data).expect("small disks only"),
            disk_size,
            block_size,
            block_extra: 0,
            blocks_allocated: 0,
            entries: vec![FREE; index(blocks)],
            file_len: offset_data,
            uuid: 1,
            parent: None,
        }
    }

    /// With a first run of blocks that are allocated in order.
    #[must_use]
    pub fn with_blocks(mut self, count: u32) -> Self {
        for (entry, number) in self.entries.iter_mut().zip(0..count) {
            *entry = number;
        }
        self.blocks_allocated = count;
        self.file_len = self.end_of(count);
        self
    }

    /// An image of any shape that is opened for writing, with blocks of one of some sizes; small
    /// enough to be read often.
    #[must_use]
    pub fn any(block_sizes: &[u32], random: &mut Random) -> Self {
        let block_size = *random.pick(block_sizes);
        let blocks = random.within(1..u64::from((8 << 20) / block_size).min(20) + 1);
        let cut = match random.within(0..4) {
            0 | 1 => 0,
            2 => random.within(0..100) * 512,
            _ => random.within(0..60_000),
        };
        let mut layout = Self::plain(block_size, blocks * u64::from(block_size) - cut);
        layout.image_type = *random.pick(&[1, 1, 1, 2, 3]);
        layout.block_extra = *random.pick(&[0, 0, 0, 2, 512, 4096]);
        let more = *random.pick(&[0, 0, 0, 1, 5]);
        layout.entries.resize(layout.entries.len() + more, FREE);
        layout.place(random);
        if layout.image_type == 2 && percent(random, 70) {
            let all = u32::try_from(layout.entries.len()).expect("small disks only");
            layout = layout.with_blocks(all);
        } else {
            layout.allocate(random);
        }
        layout
    }

    /// An image that any program opens and writes, with some blocks.
    #[must_use]
    pub fn common(random: &mut Random) -> Self {
        let mut layout = Self::plain(
            1 << 20,
            (random.within(1..9) << 20) - 512 * random.within(0..9),
        );
        layout.header_size = *random.pick(&[SHORT_HEADER, LONG_HEADER]);
        layout.offset_data += 512 * *random.pick(&[0, 1, 7, 2048]);
        layout.file_len = u64::from(layout.offset_data);
        let some = random.within(0..layout.entries.len() as u64 + 1);
        layout.with_blocks(u32::try_from(some).expect("small disks only"))
    }

    /// Puts header, map and data anywhere that is legal.
    fn place(&mut self, random: &mut Random) {
        self.header_size = *random.pick(&[SHORT_HEADER, LONG_HEADER, 0x1000, u32::MAX]);
        let least = match self.header_size {
            SHORT_HEADER => 0x1C8,
            _ => 0x1D8,
        };
        self.offset_bmap = least
            + match random.within(0..6) {
                0 => 0,
                1 => u32::try_from(random.within(1..100)).expect("small"),
                2 => 4096 + 1 - least,
                3 => (1 << 20) - least,
                _ => 512 - least,
            };
        let map_end = self.map_end();
        let offset_data = match random.within(0..5) {
            0 => map_end,
            1 => map_end + random.within(1..777),
            2 => map_end.next_multiple_of(1 << 20),
            3 => map_end + (3 << 20) + random.within(0..512),
            _ => map_end.next_multiple_of(512),
        };
        self.offset_data = u32::try_from(offset_data).expect("small disks only");
        self.file_len = offset_data;
    }

    /// Gives some blocks storage, in any order, with blocks between and behind them that nobody owns.
    fn allocate(&mut self, random: &mut Random) {
        let in_image = u32::try_from(self.entries.len()).expect("small disks only");
        let limit = random.within(0..u64::from(in_image) + 1);
        let mut numbers: Vec<u32> = (0..u32::try_from(limit).expect("small")).collect();
        for at in (1..numbers.len()).rev() {
            numbers.swap(at, index(random.within(0..at as u64 + 1)));
        }
        let chance = *random.pick(&[0, 30, 70, 100]);
        for entry in &mut self.entries {
            *entry = *random.pick(&[FREE, FREE, ZERO]);
            if percent(random, chance) {
                *entry = numbers.pop().unwrap_or(*entry);
            }
        }
        let end = self.owned_end();
        let leaked = random.within(u64::from(end)..u64::from(in_image) + 1);
        let leaked = u32::try_from(leaked).expect("small");
        (self.blocks_allocated, self.file_len) = match random.within(0..8) {
            0 => (leaked, self.end_of(leaked)),
            // Not counted, but in the file.
            1 => (end, self.end_of(leaked)),
            // Counted, but not in the file.
            2 => (leaked, self.end_of(end)),
            3 => (end, self.end_of(end) + random.within(1..self.stride())),
            // Others would overwrite blocks.
            4 => {
                let small = random.within(0..u64::from(end) + 1);
                (u32::try_from(small).expect("small"), self.end_of(end))
            }
            5 => (end, self.end_of(in_image) + random.within(0..5000)),
            6 if end == 0 => (0, random.within(self.map_end()..self.file_len + 1)),
            7 => (end, self.shortest_len()),
            _ => (end, self.end_of(end)),
        };
    }

    /// The length of a file whose last block ends where the disk does.
    fn shortest_len(&self) -> u64 {
        let end = self.owned_end();
        let last = self.disk_blocks() - 1;
        let is_last = end > 0 && self.entries[last] == end - 1;
        let beyond = self.blocks_capacity() - self.capacity();
        self.end_of(end) - if is_last { beyond } else { 0 }
    }

    /// The disk's size in bytes, without a partial sector.
    #[must_use]
    pub const fn capacity(&self) -> u64 {
        self.disk_size / 512 * 512
    }

    /// How many blocks the disk needs.
    #[must_use]
    pub fn disk_blocks(&self) -> usize {
        index(self.capacity().div_ceil(u64::from(self.block_size)))
    }

    fn blocks_capacity(&self) -> u64 {
        self.disk_blocks() as u64 * u64::from(self.block_size)
    }

    /// Bytes from one file block to the next.
    #[must_use]
    pub fn stride(&self) -> u64 {
        u64::from(self.block_extra) + u64::from(self.block_size)
    }

    /// Where the first `count` file blocks end.
    #[must_use]
    pub fn end_of(&self, count: u32) -> u64 {
        u64::from(self.offset_data) + u64::from(count) * self.stride()
    }

    /// The bytes of a file block, the private ones first.
    #[must_use]
    pub fn file_block(&self, number: u32) -> Range<u64> {
        self.end_of(number)..self.end_of(number + 1)
    }

    /// Where the map is.
    #[must_use]
    pub fn map(&self) -> Range<u64> {
        u64::from(self.offset_bmap)..self.map_end()
    }

    fn map_end(&self) -> u64 {
        u64::from(self.offset_bmap) + 4 * self.entries.len() as u64
    }

    /// The number behind the highest one in the map.
    #[must_use]
    pub fn owned_end(&self) -> u32 {
        owned_end(&self.entries)
    }

    /// The file, and the bytes of the disk in it.
    #[must_use]
    pub fn build(&self, random: &mut Random) -> (Contents, Vec<u8>) {
        let mut file = Contents::default();
        let noise = random.bytes(8192);
        // All that is not known must be kept, so it must be told apart from zeros.
        file.write(0, &noise[..index(u64::from(self.offset_bmap).min(8192))]);
        let gap = self.map_end()..u64::from(self.offset_data);
        let near = index((gap.end - gap.start).min(4096));
        file.write(gap.start, &noise[..near]);
        file.write(gap.end - near as u64, &noise[..near]);
        self.write_header(&mut file);
        for (nth, entry) in self.entries.iter().enumerate() {
            file.write(
                u64::from(self.offset_bmap) + 4 * nth as u64,
                &entry.to_le_bytes(),
            );
        }
        let blocks = self.end_of(0)..self.file_len.max(self.end_of(0));
        let mut at = blocks.start;
        while at < blocks.end {
            let len = self.stride().min(blocks.end - at);
            file.write(at, &vec![POISON; index(len)]);
            at += len;
        }
        let mut disk = vec![0; index(self.capacity())];
        for (nth, &number) in self.entries.iter().enumerate() {
            if number < ZERO {
                self.write_block(&mut file, &mut disk, nth, number, random);
            }
        }
        file.set_len(self.file_len);
        (file, disk)
    }

    fn write_header(&self, file: &mut Contents) {
        let mut put = |at: u64, value: u32| file.write(at, &value.to_le_bytes());
        put(0x40, 0xBEDA_107F);
        put(0x44, 0x0001_0001);
        put(0x48, self.header_size);
        put(0x4C, self.image_type);
        put(0x50, 0);
        put(0x154, self.offset_bmap);
        put(0x158, self.offset_data);
        put(0x168, 512);
        let [low, high] = [self.disk_size, self.disk_size >> 32]
            .map(|half| u32::try_from(half & 0xFFFF_FFFF).expect("masked"));
        put(0x170, low);
        put(0x174, high);
        put(0x178, self.block_size);
        put(0x17C, self.block_extra);
        put(
            0x180,
            u32::try_from(self.entries.len()).expect("small disks only"),
        );
        put(0x184, self.blocks_allocated);
        if self.header_size > SHORT_HEADER {
            put(0x1D4, 512);
        }
        file.write(0x188, &[self.uuid; 16]);
        // A child whose `uuid_parent_modify` is null knows nothing of its parent's state.
        file.write(0x1A8, &[self.parent.unwrap_or(0); 16]);
        file.write(0x1B8, &[0; 16]);
    }

    fn write_block(
        &self,
        file: &mut Contents,
        disk: &mut [u8],
        nth: usize,
        number: u32,
        random: &mut Random,
    ) {
        let block = self.file_block(number);
        let private = random.bytes(self.block_extra as usize);
        file.write(block.start, &private);
        let contents = block.start + u64::from(self.block_extra);
        file.write(contents, &vec![0; self.block_size as usize]);
        if nth >= self.disk_blocks() {
            return;
        }
        let start = nth * self.block_size as usize;
        let end = (start + self.block_size as usize).min(disk.len());
        for sector in disk[start..end].chunks_mut(512) {
            sector.fill(u8::try_from(random.within(0..200)).expect("below 200"));
        }
        file.write(contents, &disk[start..end]);
    }

    /// The bytes that no use of the disk may change: all of the header but count and
    /// `uuid_modify`, the gaps, entries beyond the disk. (Blocks move when a disk is closed.)
    #[must_use]
    pub fn kept(&self) -> Vec<Range<u64>> {
        let map = self.map();
        let disk_entries = map.start + 4 * self.disk_blocks() as u64;
        vec![
            0..AT_COUNT,
            AT_COUNT + 4..AT_UUID_MODIFY,
            AT_UUID_MODIFY + 16..map.start,
            disk_entries..u64::from(self.offset_data),
        ]
    }

    /// The first block of this image whose private bytes have changed, wherever they are now. A block
    /// that was released and allocated anew may have lost them.
    #[must_use]
    pub fn lost_private_bytes(
        &self,
        before: &Contents,
        after: &Contents,
        may_be_new: bool,
    ) -> Option<usize> {
        let private = |contents: &Contents, number: u32| {
            let start = self.end_of(number);
            contents.bytes(start..start + u64::from(self.block_extra))
        };
        let now = Found::within(after, self).entries;
        let pairs = self.entries.iter().zip(&now).enumerate();
        let mut kept = pairs.filter(|(_, (old, new))| **old < ZERO && **new < ZERO);
        let lost = kept.find(|&(_, (&old, &new))| {
            let found = private(after, new);
            let is_new = may_be_new && found.iter().all(|&byte| byte == 0);
            found != private(before, old) && !is_new
        });
        lost.map(|(nth, _)| nth)
    }

    /// Whether entries beyond the disk own blocks, which therefore are not moved.
    #[must_use]
    pub fn has_hidden_blocks(&self) -> bool {
        self.entries[self.disk_blocks()..]
            .iter()
            .any(|&entry| entry < ZERO)
    }
}

fn owned_end(entries: &[u32]) -> u32 {
    let owned = entries.iter().filter(|&&entry| entry < ZERO);
    owned.max().map_or(0, |&highest| highest + 1)
}

/// What is found in an image of a layout that is known.
#[derive(Debug)]
pub struct Found {
    /// `blocks_allocated`.
    pub blocks_allocated: u32,
    /// `uuid_modify`.
    pub uuid_modify: Vec<u8>,
    /// The map.
    pub entries: Vec<u32>,
    /// The file's length.
    pub file_len: u64,
}

impl Found {
    /// Looks.
    #[must_use]
    pub fn within(contents: &Contents, layout: &Layout) -> Self {
        let map = contents.bytes(layout.map());
        let (entries, _) = map.as_chunks();
        let count = contents.bytes(AT_COUNT..AT_COUNT + 4);
        Self {
            blocks_allocated: u32::from_le_bytes(*count.first_chunk().expect("four bytes")),
            uuid_modify: contents.bytes(AT_UUID_MODIFY..AT_UUID_MODIFY + 16),
            entries: entries
                .iter()
                .map(|&entry| u32::from_le_bytes(entry))
                .collect(),
            file_len: contents.len_bytes(),
        }
    }

    /// The number behind the highest one in the map.
    #[must_use]
    pub fn owned_end(&self) -> u32 {
        owned_end(&self.entries)
    }

    /// How many blocks have an owner.
    #[must_use]
    pub fn owned(&self) -> u32 {
        let owned = self.entries.iter().filter(|&&entry| entry < ZERO);
        u32::try_from(owned.count()).expect("small disks only")
    }

    /// How many bytes of a sector of the disk lie before a boundary of 512 bytes in the file: a power
    /// cut may tear it there.
    #[must_use]
    pub fn cut_of(&self, sector: u64, layout: &Layout) -> u64 {
        let sectors = u64::from(layout.block_size) / 512;
        match self.entries[index(sector / sectors)] {
            FREE | ZERO => 0,
            number => {
                let contents = layout.end_of(number) + u64::from(layout.block_extra);
                contents.next_multiple_of(512) - contents
            }
        }
    }

    /// What would harm VirtualBox, QEMU or us if they opened and wrote the image now. (They give the
    /// next block the number `blocks_allocated`.)
    #[must_use]
    pub fn harm(&self, layout: &Layout) -> Option<String> {
        let mut owned = HashSet::new();
        for (nth, &entry) in self.entries.iter().enumerate() {
            if entry >= ZERO {
                continue;
            }
            if !owned.insert(entry) {
                return Some(format!("file block {entry} has two owners, one is {nth}"));
            }
            if entry >= self.blocks_allocated {
                let count = self.blocks_allocated;
                return Some(format!(
                    "{nth} is kept in {entry}, but blocks_allocated is {count}: the next block overwrites it"
                ));
            }
            let is_old = layout.entries[nth] == entry;
            if !is_old && layout.end_of(entry + 1) > self.file_len {
                let len = self.file_len;
                return Some(format!(
                    "{nth} is kept in {entry}, but the file ends at {len}"
                ));
            }
        }
        let in_image = self.entries.len() as u64;
        (u64::from(self.blocks_allocated) > in_image).then(|| "more blocks than entries".into())
    }
}
