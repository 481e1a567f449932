//! What a block device must do with a chain, by another reader of the standard: it looks at guest memory as it is, and
//! does nothing.
//!
//! Source: virtio 1.2 sections 2.7 and 5.2.6. Limits of our device: 1024 descriptors of a chain, 64 segments.

use std::ops::Range;

use super::disk::SECTORS;
use super::memory::GuestMemory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Descriptors of one chain, the one that names a table included.
const MOST_DESCRIPTORS: usize = 1024;
const MOST_SEGMENTS: usize = 64;
const MOST_SEGMENT_SECTORS: u32 = u32::MAX / 2048 * 2048;

pub(super) const OK: u8 = 0;
pub(super) const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// What the device is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Traits {
    pub(super) writable: bool,
    pub(super) discards: bool,
}

/// The bytes of guest memory that a chain is made of, as places in its file.
#[derive(Debug, Default)]
pub(super) struct Touched {
    /// Descriptors and what the device reads.
    pub(super) read: Vec<Range<usize>>,
    /// What the device may write.
    pub(super) written: Vec<Range<usize>>,
}

/// What becomes of a chain.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The ring stops.
    Broken,
    /// It is answered.
    Answer(Answer),
}

/// The answer to a chain.
#[derive(Debug)]
pub(super) struct Answer {
    /// Where the status goes.
    pub(super) status_at: usize,
    /// What it is if nothing fails.
    pub(super) status: u8,
    pub(super) effect: Effect,
}

/// What a request does if it succeeds.
#[derive(Debug)]
pub(super) enum Effect {
    Nothing,
    /// These sectors come into these bytes.
    Read(Range<u64>, Vec<Range<usize>>),
    /// These sectors become these bytes.
    Write(Range<u64>, Vec<Range<usize>>),
    /// These sectors become zeros, or may if it is not certain.
    Zeros(Vec<Range<u64>>, bool),
    Flush,
    /// The name comes into these bytes.
    Name(Vec<Range<usize>>),
}

/// Address and length of each.
type Pieces = Vec<(u64, u32)>;

#[derive(Default)]
struct Chain {
    readable: Pieces,
    writable: Pieces,
    is_disordered: bool,
    descriptors: Vec<Range<usize>>,
}

/// What must become of the chain of `head`, and what it is made of.
pub(super) fn judge(
    memory: &GuestMemory,
    table: u64,
    size: u16,
    head: u16,
    traits: Traits,
) -> (Verdict, Touched) {
    let mut chain = Chain::default();
    let is_whole = follow(memory, table, size, head, &mut chain).is_some();
    let mut touched = Touched::default();
    for &(at, len) in &chain.readable {
        touched.read.extend(memory.present(at, len.into()));
    }
    for &(at, len) in &chain.writable {
        touched.written.extend(memory.present(at, len.into()));
    }
    touched.read.append(&mut chain.descriptors);
    let answer = is_whole.then(|| answer(memory, chain, traits)).flatten();
    (answer.map_or(Verdict::Broken, Verdict::Answer), touched)
}

/// Follows a chain to its end, if it has one.
fn follow(
    memory: &GuestMemory,
    mut table: u64,
    size: u16,
    head: u16,
    chain: &mut Chain,
) -> Option<()> {
    let (mut len, mut index, mut is_indirect) = (u64::from(size), u64::from(head), false);
    for _ in 0..MOST_DESCRIPTORS {
        if index >= len {
            return None;
        }
        let at = table.checked_add(index * 16)?;
        let bytes: [u8; 16] = memory.bytes(at)?;
        chain.descriptors.extend(memory.runs(at, 16)?);
        let address = u64::from_le_bytes(*bytes.first_chunk()?);
        let bytes_len = u32::from_le_bytes(*bytes[8..].first_chunk()?);
        let flags = u16::from_le_bytes(*bytes[12..].first_chunk()?);
        let next = u16::from_le_bytes(*bytes[14..].first_chunk()?);
        if flags & INDIRECT != 0 {
            if is_indirect || flags & NEXT != 0 || bytes_len == 0 || bytes_len % 16 != 0 {
                return None;
            }
            (table, len, index, is_indirect) = (address, u64::from(bytes_len / 16), 0, true);
            continue;
        }
        if bytes_len > 0 && flags & WRITE != 0 {
            chain.writable.push((address, bytes_len));
        } else if bytes_len > 0 {
            chain.is_disordered |= !chain.writable.is_empty();
            chain.readable.push((address, bytes_len));
        }
        if flags & NEXT == 0 {
            return Some(());
        }
        index = next.into();
    }
    None
}

/// The answer to a chain, if there is a byte for it.
fn answer(memory: &GuestMemory, mut chain: Chain, traits: Traits) -> Option<Answer> {
    let (at, len) = chain.writable.last_mut()?;
    *len -= 1;
    let status_at = memory.place(at.checked_add(u64::from(*len))?)?;
    let (status, effect) = match request(memory, &chain, traits) {
        Ok(effect) => (OK, effect),
        Err(status) => (status, Effect::Nothing),
    };
    Some(Answer {
        status_at,
        status,
        effect,
    })
}

/// All bytes of some pieces in their order, if they are there.
fn places(memory: &GuestMemory, pieces: &[(u64, u32)]) -> Option<Vec<Range<usize>>> {
    let mut places = Vec::new();
    for &(at, len) in pieces {
        if len > 0 {
            places.extend(memory.runs(at, len.into())?);
        }
    }
    Some(places)
}

pub(super) fn total(places: &[Range<usize>]) -> u64 {
    places.iter().map(|place| place.len() as u64).sum()
}

/// Takes so many bytes off the front of what is readable.
fn header(memory: &GuestMemory, readable: &[(u64, u32)]) -> Option<([u8; 16], Pieces)> {
    let (mut bytes, mut rest) = (Vec::new(), Vec::new());
    for &(at, len) in readable {
        let take = u32::try_from(16 - bytes.len()).ok()?.min(len);
        for place in memory.runs(at, take.into())? {
            bytes.extend(&memory.all()[place]);
        }
        if len > take {
            rest.push((at.checked_add(take.into())?, len - take));
        }
    }
    Some((*bytes.first_chunk()?, rest))
}

fn request(memory: &GuestMemory, chain: &Chain, traits: Traits) -> Result<Effect, u8> {
    if chain.is_disordered {
        return Err(IO_ERROR);
    }
    let (header, rest) = header(memory, &chain.readable).ok_or(IO_ERROR)?;
    let kind = u32::from_le_bytes(*header.first_chunk().ok_or(IO_ERROR)?) & 0x7FFF_FFFF;
    let sector = u64::from_le_bytes(*header[8..].first_chunk().ok_or(IO_ERROR)?);
    let readable = || places(memory, &rest).ok_or(IO_ERROR);
    let writable = || places(memory, &chain.writable).ok_or(IO_ERROR);
    match kind {
        0 => {
            let into = writable()?;
            Ok(Effect::Read(sectors(sector, total(&into))?, into))
        }
        1 | 11 | 13 if !traits.writable => Err(IO_ERROR),
        1 => {
            let from = readable()?;
            Ok(Effect::Write(sectors(sector, total(&from))?, from))
        }
        4 => Ok(Effect::Flush),
        8 => Ok(Effect::Name(writable()?)),
        11 if !traits.discards => Err(UNSUPPORTED),
        11 | 13 => segments(memory, &readable()?, kind == 11),
        _ => Err(UNSUPPORTED),
    }
}

/// The sectors of so many bytes, if they are whole ones of the disk.
fn sectors(sector: u64, len: u64) -> Result<Range<u64>, u8> {
    let end = sector.checked_add(len / 512).ok_or(IO_ERROR)?;
    if !len.is_multiple_of(512) || end > SECTORS {
        return Err(IO_ERROR);
    }
    Ok(sector..end)
}

/// A discard or write-zeroes.
fn segments(memory: &GuestMemory, from: &[Range<usize>], is_discard: bool) -> Result<Effect, u8> {
    let len = total(from);
    if len == 0 || !len.is_multiple_of(16) || len / 16 > MOST_SEGMENTS as u64 {
        return Err(IO_ERROR);
    }
    let places = from.iter().cloned();
    let bytes: Vec<u8> = places
        .flat_map(|place| memory.all()[place].to_vec())
        .collect();
    let (segments, _) = bytes.as_chunks::<16>();
    let mut ranges = Vec::new();
    // The first complaint of all segments, from the last one on, is the answer.
    for segment in segments.iter().rev() {
        let start = u64::from_le_bytes(*segment.first_chunk().ok_or(IO_ERROR)?);
        let count = u32::from_le_bytes(*segment[8..].first_chunk().ok_or(IO_ERROR)?);
        let flags = u32::from_le_bytes(*segment[12..].first_chunk().ok_or(IO_ERROR)?);
        if flags > 1 || is_discard && flags != 0 {
            return Err(UNSUPPORTED);
        }
        if count > MOST_SEGMENT_SECTORS {
            return Err(IO_ERROR);
        }
        ranges.push(sectors(start, u64::from(count) * 512)?);
    }
    Ok(Effect::Zeros(ranges, !is_discard))
}
