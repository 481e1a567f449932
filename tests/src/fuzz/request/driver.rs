//! The driver of the target for requests: it makes chains as an input says, and breaks each in the way the input says.
//!
//! It knows nothing of what becomes of them: that is `device.rs`.

use super::input::{REQUESTS, Shape, Step};
use super::memory::{ALL, GuestMemory, REGION};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Where headers, segments, status bytes and tables are put unless a step says otherwise: behind the ring.
const SMALL: usize = 0x2800;
/// Where data are put.
const DATA: usize = REGION;
/// Most pieces of a chain, more than may be.
const MOST_PIECES: usize = 1030;
/// Most chains of one input that name their data again and again, which take long.
const MOST_LARGE: u8 = 3;

/// A descriptor that is not linked yet.
#[derive(Clone, Copy)]
struct Piece {
    at: u64,
    len: u32,
    flags: u16,
}

/// Where the ring is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ring {
    pub(super) size: u16,
    pub(super) table: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl Ring {
    pub(super) fn new(shape: Shape, memory: &GuestMemory) -> Self {
        let size = shape.queue_size();
        let at =
            |nth: usize, align: u64| memory.address(shape.ring_part(nth) % ALL) / align * align;
        Self {
            size,
            table: at(0, 16),
            available: at(1, 2),
            used: at(2, 4),
        }
    }

    pub(super) fn available_len(self) -> u64 {
        6 + 2 * u64::from(self.size)
    }

    pub(super) fn used_len(self) -> u64 {
        6 + 8 * u64::from(self.size)
    }

    /// Where the device says from which available index on it wants to be kicked.
    pub(super) fn kick_event(self) -> u64 {
        self.used.saturating_add(4 + 8 * u64::from(self.size))
    }

    /// Where the driver says from which used index on it wants to be called.
    pub(super) fn call_event(self) -> u64 {
        self.available.saturating_add(4 + 2 * u64::from(self.size))
    }
}

/// The driver's side of a queue.
pub(super) struct Driver {
    pub(super) ring: Ring,
    /// The next available index.
    pub(super) index: u16,
    /// What was put into the available ring since the last run.
    pub(super) heads: Vec<u16>,
    /// Free memory, as places in the order of addresses.
    small: usize,
    data: usize,
    /// The next free descriptor.
    descriptor: u16,
    /// Large chains that may still be made.
    large: u8,
}

impl Driver {
    pub(super) fn new(ring: Ring, index: u16) -> Self {
        Self {
            ring,
            index,
            heads: Vec::new(),
            small: SMALL,
            data: DATA,
            descriptor: 0,
            large: MOST_LARGE,
        }
    }

    /// What was made before is over.
    pub(super) fn forget(&mut self) {
        self.heads.clear();
        (self.small, self.data, self.descriptor) = (SMALL, DATA, 0);
    }

    fn small(&mut self, len: usize) -> usize {
        if self.small + len > REGION {
            self.small = SMALL;
        }
        self.small += len;
        self.small - len
    }

    fn data(&mut self, len: usize, step: Step) -> usize {
        if step.byte(5) >> 6 == 1 {
            return usize::from(step.half(8)) * 2;
        }
        if self.data + len > ALL {
            self.data = DATA;
        }
        self.data += len;
        self.data - len
    }

    /// Puts a head into the available ring.
    pub(super) fn offer(&mut self, memory: &mut GuestMemory, head: u16) {
        if self.heads.len() < usize::from(self.ring.size) {
            let slot = u64::from(self.index % self.ring.size);
            memory.put(
                self.ring.available.saturating_add(4 + 2 * slot),
                &head.to_le_bytes(),
            );
            self.index = self.index.wrapping_add(1);
            self.heads.push(head);
        }
    }

    /// Writes the index that says how far the available ring goes, and mends what other writes did to the used one.
    pub(super) fn publish(&self, memory: &mut GuestMemory, used: u16) {
        memory.put(self.ring.used + 2, &used.to_le_bytes());
        memory.put(self.ring.available + 2, &self.index.to_le_bytes());
    }

    /// Writes a descriptor of the ring's table.
    pub(super) fn set_descriptor(&self, memory: &mut GuestMemory, nth: u16, bytes: &[u8; 16]) {
        let nth = u64::from(nth % self.ring.size);
        memory.put(self.ring.table.saturating_add(16 * nth), bytes);
    }

    /// Makes a chain and offers it.
    pub(super) fn make(&mut self, memory: &mut GuestMemory, step: Step) {
        let mut pieces = self.request(memory, step);
        cut(&mut pieces, step.byte(5) & 7, step.byte(7));
        self.damage(memory, &mut pieces, step);
        if pieces.len() > MOST_PIECES {
            let last = pieces.split_off(pieces.len() - 1);
            pieces.truncate(MOST_PIECES - 1);
            pieces.extend(last);
        }
        let direct = match step.byte(5) >> 3 & 3 {
            0 => pieces.len(),
            1 => 0,
            fewer => usize::from(fewer) - 1,
        };
        let room = usize::from(self.ring.size - self.descriptor.min(self.ring.size));
        // What does not fit into the ring goes into a table of its own.
        let direct = if pieces.len() > room {
            0
        } else {
            direct.min(pieces.len())
        };
        let mut indirect = pieces.split_off(direct);
        if step.byte(6) % 32 == 9 && indirect.len() > 1 {
            // A table in a table.
            let inner = indirect.split_off(indirect.len() / 2);
            indirect.push(self.table(memory, &inner, step));
        }
        if !indirect.is_empty() {
            pieces.push(self.table(memory, &indirect, step));
        }
        if pieces.len() <= room && !pieces.is_empty() {
            self.link(memory, &pieces, step);
        }
    }

    /// Header, data and status of a request, each in one piece.
    fn request(&mut self, memory: &mut GuestMemory, step: Step) -> Vec<Piece> {
        let kind = REQUESTS[usize::from(step.byte(1)) % REQUESTS.len()];
        let count = usize::from(step.byte(4));
        let is_far = step.byte(6) % 32 == 31;
        let sector = if is_far {
            step.long(8)
        } else {
            step.half(2).into()
        };
        // In one stretch of memory, so that pieces can be joined.
        let is_joined = step.byte(5) & 7 >= 6;
        let room = if is_joined {
            16 + count % 16 * 512 + 1
        } else {
            16
        };
        let header_at = self.small(room);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        memory.put(memory.address(header_at), &header);
        let mut pieces = vec![piece(memory, header_at, 16, 0)];
        let flags = if matches!(kind & 0xFF, 0 | 8) {
            WRITE
        } else {
            0
        };
        match kind & 0xFF {
            0 | 1 => {
                let len = count * 512;
                let is_large = step.byte(5) >> 5 & 1 != 0 && !is_joined && self.large > 0;
                self.large -= u8::from(is_large);
                let times = if is_large { count * 4 } else { 1 };
                let len = if times > 1 { REGION } else { len.min(ALL / 2) };
                let (at, len) = match times {
                    _ if is_joined => (header_at + 16, count % 16 * 512),
                    0 | 1 => (self.data(len, step), len),
                    _ => (3 * REGION, len),
                };
                if flags == 0 {
                    fill(memory, at, len, step.byte(10));
                }
                for _ in 0..times.min(MOST_PIECES) {
                    pieces.push(piece(memory, at, len, flags));
                }
            }
            8 => {
                let at = self.data(count, step);
                pieces.push(piece(memory, at, count, WRITE));
            }
            11 | 13 => pieces.push(self.segments(memory, kind, sector, step)),
            _ => {}
        }
        pieces.retain(|piece| piece.len > 0);
        let status_at = if is_joined {
            header_at + room - 1
        } else {
            self.small(1)
        };
        memory.put(memory.address(status_at), &[0xEE]);
        pieces.push(piece(memory, status_at, 1, WRITE));
        pieces
    }

    /// The segments of a discard or write-zeroes.
    fn segments(&mut self, memory: &mut GuestMemory, kind: u32, sector: u64, step: Step) -> Piece {
        let count = usize::from(step.byte(4)) % 70;
        let at = self.small(count * 16);
        // A flag that must not be is rare.
        let legal = if step.byte(11) == 0 { 0xFF } else { 1 };
        let flags = match kind {
            11 if step.byte(11) < 250 => 0,
            _ => u32::from(step.byte(10)) & legal,
        };
        for nth in 0..count {
            let start = sector.wrapping_add(nth as u64 * u64::from(step.half(8)));
            let mut segment = start.to_le_bytes().to_vec();
            segment.extend((u32::from(step.half(12)) % 2000).to_le_bytes());
            segment.extend(flags.to_le_bytes());
            memory.put(memory.address(at + nth * 16), &segment);
        }
        piece(memory, at, count * 16, 0)
    }

    /// Breaks it, in most cases not.
    fn damage(&mut self, memory: &GuestMemory, pieces: &mut Vec<Piece>, step: Step) {
        let (how, which) = (step.byte(6) % 32, usize::from(step.byte(7)));
        let count = pieces.len();
        let one = &mut pieces[which % count];
        match how {
            12 => one.flags ^= WRITE,
            13 => one.len = step.word(8),
            14 => one.at = step.long(8),
            15 => one.at = memory.end() - u64::from(step.byte(8)),
            16 => one.len = one.len.wrapping_add(u32::from(step.byte(8)) + 1),
            17 => one.len = one.len.saturating_sub(u32::from(step.byte(8)) + 1),
            18 => pieces.swap(which % count, count - 1),
            19 => {
                pieces.pop();
            }
            20 => pieces.insert(
                which % count,
                Piece {
                    len: 0,
                    ..pieces[0]
                },
            ),
            21 => {
                let again = pieces[which % count];
                let times = usize::from(step.half(8)) % MOST_PIECES;
                pieces.splice(count - 1..count - 1, std::iter::repeat_n(again, times));
            }
            22 => one.flags |= INDIRECT,
            23 => one.at = memory.address(usize::from(step.half(8)) * 2),
            _ => {}
        }
    }

    /// Puts pieces into a table of their own; the descriptor that names it.
    fn table(&mut self, memory: &mut GuestMemory, pieces: &[Piece], step: Step) -> Piece {
        let len = pieces.len() * 16;
        let at = self.small(len);
        for (nth, piece) in (0_u16..).zip(pieces) {
            let is_last = usize::from(nth) + 1 == pieces.len();
            let flags = if is_last {
                piece.flags
            } else {
                piece.flags | NEXT
            };
            let bytes = descriptor(*piece, flags, nth + 1);
            memory.put(memory.address(at + usize::from(nth) * 16), &bytes);
        }
        let mut table = piece(memory, at, len, INDIRECT);
        match step.byte(6) % 32 {
            24 => table.len = table.len.wrapping_add(u32::from(step.byte(7))),
            25 => table.len = table.len.saturating_sub(u32::from(step.byte(7))),
            26 => table.at = memory.end() - u64::from(step.byte(7)),
            27 => table.flags |= if step.byte(7) & 1 == 0 { NEXT } else { WRITE },
            _ => {}
        }
        table
    }

    /// Links pieces in the ring's table and offers their head.
    fn link(&mut self, memory: &mut GuestMemory, pieces: &[Piece], step: Step) {
        let head = self.descriptor;
        for (nth, piece) in pieces.iter().enumerate() {
            let is_last = nth + 1 == pieces.len();
            let next = match step.byte(6) % 32 {
                // A loop, and a next that is nowhere.
                28 if is_last => Some(head),
                29 if is_last => Some(self.ring.size.wrapping_add(step.half(8))),
                _ if is_last => None,
                _ => Some(self.descriptor + 1),
            };
            let flags = piece.flags | next.map_or(0, |_| NEXT);
            let bytes = descriptor(*piece, flags, next.unwrap_or(0));
            self.set_descriptor(memory, self.descriptor, &bytes);
            self.descriptor += 1;
        }
        self.offer(memory, head);
        if step.byte(6) % 32 == 30 {
            self.offer(memory, head);
        }
    }
}

fn piece(memory: &GuestMemory, at: usize, len: usize, flags: u16) -> Piece {
    Piece {
        at: memory.address(at),
        len: u32::try_from(len).expect("it is in the file"),
        flags,
    }
}

fn descriptor(piece: Piece, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&piece.at.to_le_bytes());
    bytes[8..12].copy_from_slice(&piece.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// Data that show which sector they are of, or all the same.
fn fill(memory: &mut GuestMemory, at: usize, len: usize, byte: u8) {
    for (nth, from) in (0..len).step_by(512).enumerate() {
        let mark = if byte & 1 == 0 {
            byte
        } else {
            byte.wrapping_add(nth.to_le_bytes()[0])
        };
        let address = memory.address(at + from);
        memory.put(address, &[mark; 512][..512.min(len - from)]);
    }
}

/// Cuts pieces into smaller ones.
fn cut(pieces: &mut Vec<Piece>, how: u8, where_to: u8) {
    let sizes: &[u32] = match how {
        1 => &[3, 13],
        2 => &[512],
        3 => &[7],
        4 => &[1, 511, 1000],
        5 => &[4096],
        _ => &[],
    };
    let skipped = usize::from(how == 5 && where_to & 1 == 0);
    let mut result: Vec<Piece> = pieces[..skipped].to_vec();
    for piece in &pieces[skipped..] {
        let mut rest = *piece;
        let mut nth = usize::from(where_to);
        while !sizes.is_empty() && rest.len > sizes[nth % sizes.len()] && result.len() < 900 {
            let len = sizes[nth % sizes.len()];
            result.push(Piece { len, ..rest });
            (rest.at, rest.len) = (rest.at.wrapping_add(len.into()), rest.len - len);
            nth += 1;
        }
        result.push(rest);
    }
    if how >= 6 {
        join(&mut result);
    }
    *pieces = result;
}

/// One descriptor for neighbours of the same direction.
fn join(pieces: &mut Vec<Piece>) {
    pieces.dedup_by(|next, before| {
        let touches = before.at.checked_add(before.len.into()) == Some(next.at);
        let joins = touches && before.flags == next.flags;
        if joins {
            before.len += next.len;
        }
        joins
    });
}
