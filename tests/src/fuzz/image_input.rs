//! How the bytes of an input become an image, and what is done with it.
//!
//! ```text
//!   0  flags, shape of the parent, kind of the length, what fails, length
//!  16  eight operations of 6 bytes
//!  64  the words of the header that mean something
//! 216  the map, as far as it is not like the rest
//! ```
//!
//! An image's file is mostly hole; map and blocks are put where the header says, and each block that the map names is
//! marked with its number, so that a few hundred bytes reach as deep as an image of terabytes. Missing bytes
//! are zeros: every input means something.

use super::reference::{FREE, Reference, ZERO};
use crate::simulated::{Contents, index};

/// Where the operations are.
pub(super) const OPERATIONS: usize = 16;
/// Where the header is.
pub(super) const HEADER: usize = 64;
/// Where the map is.
pub(super) const MAP: usize = HEADER + HEADER_LEN;
/// Bytes of an operation.
pub(super) const OPERATION_LEN: usize = 6;

/// What is kept of a header: all but the text and the comment.
const KEPT: [std::ops::Range<u64>; 2] = [0x40..0x54, 0x154..0x1D8];
const HEADER_LEN: usize = 152;

/// Files end below this, so that positions behind them have no more than 63 bits.
const MOST_LEN: u64 = 1 << 60;
/// The entries that are filled in.
const FILLED: u64 = 4096;
/// The blocks that are marked.
const MARKED: usize = 64;

/// What the first byte says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flags(u8);

impl Flags {
    /// The flag for entries behind those given.
    pub(super) const FREE_REST: u8 = 4;

    /// Blocks that cannot be read are given up.
    pub(super) const fn drops(self) -> bool {
        self.0 & 1 != 0
    }

    /// The disk is not closed when it was written.
    pub(super) const fn dies(self) -> bool {
        self.0 & 2 != 0
    }

    /// Entries behind those given are FREE, not a hole.
    const fn frees_rest(self) -> bool {
        self.0 & Self::FREE_REST != 0
    }

    /// Something fails while the image is mended.
    pub(super) const fn fails(self) -> bool {
        self.0 & 8 != 0
    }

    /// The parent of a child is missing.
    pub(super) const fn is_orphan(self) -> bool {
        self.0 & 16 != 0
    }
}

/// What is done with a disk, not yet cut to its size.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operation {
    pub(super) kind: u8,
    pub(super) count: u8,
    pub(super) block: u16,
    pub(super) sector: u16,
}

/// What an input means.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) flags: Flags,
    pub(super) operations: Vec<Operation>,
    /// Which operation fails.
    pub(super) fails_at: usize,
    pub(super) file: Contents,
    /// The file of the parent that the image names, if it names one.
    pub(super) parent: Option<Contents>,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut number = [0; N];
    let rest = bytes.get(at..).unwrap_or_default();
    let len = rest.len().min(N);
    number[..len].copy_from_slice(&rest[..len]);
    number
}

impl Input {
    /// What some bytes mean.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let flags = Flags(number::<1>(bytes, 0)[0]);
        let operations = (0..8).map(|nth| {
            let at = OPERATIONS + nth * OPERATION_LEN;
            let [kind, count, ..] = number::<2>(bytes, at);
            Operation {
                kind,
                count,
                block: u16::from_le_bytes(number(bytes, at + 2)),
                sector: u16::from_le_bytes(number(bytes, at + 4)),
            }
        });
        let file = build(bytes, flags);
        let parent = parent(number::<1>(bytes, 1)[0], &file);
        Self {
            flags,
            operations: operations.collect(),
            fails_at: usize::from(number::<1>(bytes, 5)[0]),
            parent: parent.filter(|_| !flags.is_orphan()),
            file,
        }
    }
}

/// The image's file.
fn build(bytes: &[u8], flags: Flags) -> Contents {
    let mut file = Contents::default();
    put_header(&mut file, bytes);
    let shape = Reference::of(file.clone());
    let mut map = bytes.get(MAP..).unwrap_or_default().to_vec();
    map.truncate(map.len() / 4 * 4);
    if flags.frees_rest() {
        let filled = shape.blocks.min(FILLED);
        map.resize(map.len().max(index(filled) * 4), 0xFF);
    }
    let (entries, _) = map.as_chunks();
    let mut marked = entries.iter().map(|&entry| u32::from_le_bytes(entry));
    for number in marked.by_ref().filter(|&entry| entry < ZERO).take(MARKED) {
        mark(&mut file, &shape, number);
    }
    // Where header and map overlap the header counts.
    file.write(shape.map_at, &map);
    if shape.map_at < shape.header_end() {
        put_header(&mut file, bytes);
    }
    file.set_len(length(bytes, &shape));
    file
}

fn put_header(file: &mut Contents, bytes: &[u8]) {
    let header: [u8; HEADER_LEN] = number(bytes, HEADER);
    let mut rest = &header[..];
    for range in KEPT {
        let (piece, behind) = rest.split_at(index(range.end - range.start));
        file.write(range.start, piece);
        rest = behind;
    }
}

/// Writes its number into the first and last sector of a block, and before it.
fn mark(file: &mut Contents, shape: &Reference, number: u32) {
    let start = shape.contents_of(number);
    if start >= MOST_LEN || shape.block_size < 512 {
        return;
    }
    let sector = number
        .wrapping_mul(0x0101_0101)
        .wrapping_add(1)
        .to_le_bytes();
    let sector = sector.repeat(128);
    file.write(start, &sector);
    file.write(start + shape.block_size - 512, &sector);
    let private = shape.block_extra.min(16);
    file.write(start - private, &sector[..index(private)]);
}

/// The length of the file: a number, or where something ends, and a little more or less.
fn length(bytes: &[u8], shape: &Reference) -> u64 {
    let base = match number::<1>(bytes, 2)[0] % 4 {
        0 => u64::from_le_bytes(number(bytes, 8)),
        1 => shape.end_of(shape.blocks_allocated),
        2 => shape.end_of(u32::try_from(shape.blocks).unwrap_or(u32::MAX)),
        _ => shape.map_end(),
    };
    let more = i16::from_le_bytes(number(bytes, 3));
    base.saturating_add_signed(more.into()) % MOST_LEN
}

/// A sound image that has the name by which `child` calls its parent.
fn parent(shape: u8, child: &Contents) -> Option<Contents> {
    let name = Reference::of(child.clone()).uuid_parent();
    if name == [0; 16] {
        return None;
    }
    let block_size = 1_u32 << (17 + (shape & 3));
    let blocks = 1 + u32::from(shape >> 2 & 7);
    let cut = u32::from(shape >> 5) * 512;
    let mut file = Contents::default();
    let mut put = |at: u64, value: u32| file.write(at, &value.to_le_bytes());
    put(0x40, 0xBEDA_107F);
    put(0x44, 0x0001_0001);
    put(0x48, 0x180);
    put(0x4C, 1);
    put(0x154, 512);
    put(0x158, 1024);
    put(0x168, 512);
    put(0x170, blocks * block_size - cut);
    put(0x178, block_size);
    put(0x180, blocks);
    put(0x184, blocks.div_ceil(2));
    file.write(0x188, &name);
    for block in 0..blocks {
        let entry = if block % 2 == 0 { block / 2 } else { FREE };
        file.write(512 + 4 * u64::from(block), &entry.to_le_bytes());
    }
    let shape = Reference::of(file.clone());
    for number in 0..blocks.div_ceil(2) {
        mark(&mut file, &shape, number);
    }
    file.set_len(shape.end_of(blocks.div_ceil(2)));
    Some(file)
}

/// The input for an image that is used in some way: `how` is the first 64 bytes or less, of which the length is set here.
pub(super) fn encode(how: &[u8], file: &Contents) -> Vec<u8> {
    let mut bytes = how.to_vec();
    bytes.resize(HEADER, 0);
    bytes[2] = 0;
    bytes[8..16].copy_from_slice(&file.len_bytes().to_le_bytes());
    for range in KEPT {
        bytes.extend(file.bytes(range));
    }
    let shape = Reference::of(file.clone());
    let given = shape.blocks.min(FILLED / 8);
    if given < shape.blocks {
        bytes[0] |= Flags::FREE_REST;
    }
    bytes.extend(file.bytes(shape.map_at..shape.map_at + 4 * given));
    bytes
}
