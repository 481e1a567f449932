//! Images that are made to be broken, field by field.
//!
//! Nothing here uses `vdi-core`: what a test compares with must not come from what it tests. The layout is written
//! down again in [`FIELDS`].

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use crate::image::MIB;

/// A map entry that says "nothing here".
pub const FREE: u32 = 0xFFFF_FFFF;
/// A map entry that says "zeros".
pub const ZERO: u32 = 0xFFFF_FFFE;

/// The fields of a header of version 1.1: name, offset, bytes.
pub const FIELDS: [(&str, usize, usize); 23] = [
    ("signature", 0x40, 4),
    ("version", 0x44, 4),
    ("header_size", 0x48, 4),
    ("image_type", 0x4C, 4),
    ("image_flags", 0x50, 4),
    ("comment", 0x54, 256),
    ("offset_bmap", 0x154, 4),
    ("offset_data", 0x158, 4),
    ("legacy_sector_size", 0x168, 4),
    ("unused", 0x16C, 4),
    ("disk_size", 0x170, 8),
    ("block_size", 0x178, 4),
    ("block_extra", 0x17C, 4),
    ("blocks_in_image", 0x180, 4),
    ("blocks_allocated", 0x184, 4),
    ("uuid_image", 0x188, 16),
    ("uuid_modify", 0x198, 16),
    ("uuid_parent", 0x1A8, 16),
    ("uuid_parent_modify", 0x1B8, 16),
    ("lchs_cylinders", 0x1C8, 4),
    ("lchs_heads", 0x1CC, 4),
    ("lchs_sectors", 0x1D0, 4),
    ("lchs_sector_size", 0x1D4, 4),
];

/// An image to be made, right or wrong.
///
/// As [`image`] gives it: 8 blocks of 1 MiB, of which blocks 0, 1 and 4 are kept in the
/// file blocks 0, 1 and 2, filled with the bytes 1, 2 and 3; block 3 is ZERO. The
/// map is at 512, the data at 1024, so that every program opens it.
#[derive(Debug, Clone)]
pub struct ImageBuilder {
    header: Vec<u8>,
    entries: Vec<u32>,
    map_at: u64,
    data_at: u64,
    blocks_in_file: u32,
    len_change: i64,
}

/// A sound image.
pub fn image() -> ImageBuilder {
    let mut header = vec![0; 512];
    header[..8].copy_from_slice(b"<<< test");
    let mut builder = ImageBuilder {
        header,
        entries: vec![0, 1, FREE, ZERO, 2, FREE, FREE, FREE],
        map_at: 512,
        data_at: 1024,
        blocks_in_file: 3,
        len_change: 0,
    };
    for (name, value) in [
        ("signature", 0xBEDA_107F),
        ("version", 0x0001_0001),
        ("header_size", 400),
        ("image_type", 1),
        ("offset_bmap", 512),
        ("offset_data", 1024),
        ("legacy_sector_size", 512),
        ("disk_size", 8 << 20),
        ("block_size", 1 << 20),
        ("blocks_in_image", 8),
        ("blocks_allocated", 3),
        ("uuid_image", 0x1111),
        ("uuid_modify", 0x2222),
        ("lchs_sector_size", 512),
    ] {
        builder = builder.with_field(name, value);
    }
    builder
}

impl ImageBuilder {
    /// Puts a number into a field of the header; the rest of a long field is zeros.
    ///
    /// # Panics
    /// If there is no such field.
    #[must_use]
    pub fn with_field(mut self, name: &str, value: u64) -> Self {
        let (at, len) = field(name);
        let stored = value.to_le_bytes();
        let kept = len.min(stored.len());
        self.header[at..at + len].fill(0);
        self.header[at..at + kept].copy_from_slice(&stored[..kept]);
        self
    }

    /// Sets the comment, without a NUL if it fills the field.
    #[must_use]
    pub fn with_comment(mut self, comment: &[u8]) -> Self {
        let (at, len) = field("comment");
        self.header[at..at + len].fill(0);
        self.header[at..at + comment.len()].copy_from_slice(comment);
        self
    }

    /// Sets an entry of the map.
    #[must_use]
    pub fn with_entry(mut self, block: usize, entry: u32) -> Self {
        self.entries[block] = entry;
        self
    }

    /// Lets `block` be kept where `owner` is.
    #[must_use]
    pub fn with_shared_block(self, owner: usize, block: usize) -> Self {
        let entry = self.entries[owner];
        self.with_entry(block, entry)
    }

    /// Makes a larger image: `count` blocks, the new ones FREE.
    #[must_use]
    pub fn with_blocks(mut self, count: u32) -> Self {
        self.entries.resize(count as usize, FREE);
        let map_end = self.map_at + u64::from(count) * 4;
        self.data_at = map_end.next_multiple_of(512);
        let (data_at, size) = (self.data_at, u64::from(count) << 20);
        self.with_field("offset_data", data_at)
            .with_field("blocks_in_image", count.into())
            .with_field("disk_size", size)
    }

    /// Lengthens the file by so many bytes, or cuts them off.
    #[must_use]
    pub fn with_len_change(mut self, bytes: i64) -> Self {
        self.len_change = bytes;
        self
    }

    /// Writes the image to a file.
    ///
    /// # Panics
    /// If that fails.
    pub fn write(&self, path: &Path) {
        let mut file = File::create(path).expect("the directory is ours");
        file.write_all(&self.header).expect("there is room");
        file.seek(SeekFrom::Start(self.map_at))
            .expect("it is a file");
        let map: Vec<u8> = self
            .entries
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect();
        file.write_all(&map).expect("there is room");
        file.seek(SeekFrom::Start(self.data_at))
            .expect("it is a file");
        for number in 1..=self.blocks_in_file {
            let byte = u8::try_from(number).expect("few blocks");
            file.write_all(&vec![byte; 1 << 20]).expect("there is room");
        }
        let len_bytes = self.data_at + u64::from(self.blocks_in_file) * MIB;
        file.set_len(
            len_bytes
                .checked_add_signed(self.len_change)
                .expect("a length"),
        )
        .expect("there is room");
    }
}

fn field(name: &str) -> (usize, usize) {
    let (_, at, len) = FIELDS
        .iter()
        .find(|(of, ..)| *of == name)
        .expect("a field of the header");
    (*at, *len)
}
