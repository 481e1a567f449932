//! From a descriptor chain to a request: where virtio-blk's bytes become types that cannot be wrong.
//!
//! Whatever a guest can get wrong is found here. What comes out names memory that exists and sectors that lie on the
//! disk.
//!
//! - **R2** Every request is answered exactly once: [`Reply`] is the duty to do it.
//! - **R3** The header is copied out of guest memory once, then judged.
//!
//! Sources: virtio 1.2 sections 2.7.4 (framing is free) and 5.2.6 (request layout and device requirements).

use serde::Serialize;
use smallvec::SmallVec;
use vdi_core::{Sector, SectorRange, Zeroing};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_BARRIER,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use crate::access;
use crate::chain::{Chain, Piece, Pieces};
use crate::device::{Device, SERIAL_BYTES};
use crate::dirty::{Dirty, Guest};
use crate::memory::Memory;
use crate::ring::GuestBuffer;

/// Bytes of `struct virtio_blk_req` before its data.
const HEADER_BYTES: usize = 16;

/// The unit of a request's data, whatever the block size (virtio 1.2 section 5.2.6).
const SECTOR_BYTES: u64 = 512;

/// Bytes of a segment of a discard or write-zeroes request.
const SEGMENT_BYTES: usize = 16;

/// Most data of one request: whole sectors that the length in a used element can tell of. A table may name the same memory a thousand times.
const MAX_DATA_BYTES: u64 = (4 << 30) - SECTOR_BYTES;

/// Most segments of one request: what Linux packs into one at most, give or take.
pub(crate) const MAX_SEGMENTS: u32 = 64;

/// Most sectors of a segment: 4 GiB, since Linux counts a request's bytes in 32 bits and never sends more. Whole blocks of any size. A bound on
/// what one request can ask for.
pub(crate) const MAX_SEGMENT_SECTORS: u32 = 1 << 23;

/// The flag of a write-zeroes segment whose space may be given back.
const FLAG_UNMAP: u32 = 1;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// Done.
    Ok,
    /// Impossible, malformed or failed.
    IoError,
    /// Not a request that this device has.
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        let code = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        code.to_le_bytes()[0]
    }
}

/// The duty to answer a chain (R2).
#[must_use = "every chain is answered"]
#[derive(Debug)]
pub(crate) struct Reply {
    head: u16,
    status_at: GuestAddress,
    /// What is to be marked, for a migration.
    dirty: Option<Box<Dirty>>,
}

/// An answered chain, ready for the used ring.
#[must_use = "an answered chain goes back to the guest"]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Used {
    /// The chain.
    pub(crate) head: u16,
    /// Bytes written to its buffers, status included.
    pub(crate) len: u32,
}

impl Reply {
    /// The same for a request that writes at most the first `bytes` of `data`, and its status.
    fn marking(mut self, guest: &Guest, data: &Pieces, bytes: u64) -> Self {
        let written = || first(data, bytes).collect();
        self.dirty = guest.dirty(written, self.status_at).map(Box::new);
        self
    }

    /// The first `bytes` of the request's data may be written by now, and are not written any more (D1).
    pub(crate) fn wrote(&mut self, bytes: u64) {
        if let Some(dirty) = &mut self.dirty {
            dirty.mark_data(bytes);
        }
    }

    /// Writes the status, after `data_bytes` of data were written.
    pub(crate) fn send(mut self, memory: &Memory, status: Status, data_bytes: u64) -> Used {
        // It was part of the guest's memory when the chain was parsed. If the front end has taken it away since,
        // there is no one to tell.
        let _ = access::write(memory, self.status_at, status.byte());
        self.wrote(data_bytes);
        if let Some(dirty) = &self.dirty {
            dirty.mark_status(); // D1
        }
        let len = u32::try_from(data_bytes.saturating_add(1)).unwrap_or(u32::MAX);
        Used {
            head: self.head,
            len,
        }
    }
}

/// What a guest asks for.
#[derive(Debug)]
pub(crate) enum Request {
    /// Fill the buffer, which is as long as the range.
    Read {
        range: SectorRange,
        into: GuestBuffer,
    },
    /// Write the buffer, which is as long as the range, to a disk that can be written.
    Write {
        range: SectorRange,
        from: GuestBuffer,
    },
    /// Make these zeros, on a disk that can be written.
    Zero { segments: Segments },
    /// Make all completed writes durable.
    Flush,
    /// Tell the serial number.
    GetId { into: GuestBuffer },
}

/// What kind of request it is, for those who count them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    GetId,
}

impl Kind {
    /// How many there are.
    pub(crate) const COUNT: usize = 6;
}

impl Request {
    /// Its kind.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            Self::Read { .. } => Kind::Read,
            Self::Write { .. } => Kind::Write,
            Self::Zero { segments } => match segments.first().map(|segment| segment.how) {
                Some(Zeroing::Discard) => Kind::Discard,
                Some(Zeroing::Release | Zeroing::Keep) | None => Kind::WriteZeroes,
            },
            Self::Flush => Kind::Flush,
            Self::GetId { .. } => Kind::GetId,
        }
    }

    /// Bytes of the disk that it is about.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Read { into, .. } => into.len(),
            Self::Write { from, .. } => from.len(),
            Self::Zero { segments } => {
                let sectors = segments.iter().map(|segment| segment.range.count());
                sectors.sum::<u64>() * SECTOR_BYTES
            }
            Self::Flush | Self::GetId { .. } => 0,
        }
    }
}

/// One range of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Which sectors.
    pub(crate) range: SectorRange,
    /// What becomes of them.
    pub(crate) how: Zeroing,
}

/// The segments of a request, the first one last.
pub(crate) type Segments = SmallVec<[Segment; 1]>;

/// A chain that is not a request. It still goes back to the guest.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Answer it so.
    WithStatus(Reply, Status),
    /// There is no writable byte to put a status in.
    Unanswerable,
}

/// Reads a chain of the guest's as a request to `device`.
pub(crate) fn parse(
    guest: &Guest,
    chain: Chain,
    head: u16,
    device: &Device,
) -> Result<(Reply, Request), Refused> {
    let Chain {
        mut readable,
        mut writable,
        out_of_order,
    } = chain;
    let memory = &guest.memory;
    let status_at = take_last_byte(&mut writable)
        .filter(|at| memory.address_in_range(*at))
        .ok_or(Refused::Unanswerable)?;
    let reply = Reply {
        head,
        status_at,
        dirty: None,
    };
    let header = if out_of_order {
        None
    } else {
        take_header(memory, &mut readable)
    };
    let Some(header) = header else {
        return Err(Refused::WithStatus(
            reply.marking(guest, &writable, 0),
            Status::IoError,
        ));
    };
    let data = |pieces: &Pieces| GuestBuffer::new(memory, pieces).ok_or(Status::IoError);
    let request = match header.kind {
        VIRTIO_BLK_T_IN => data(&writable).and_then(|into| {
            let range = range(device, header.sector, &into)?;
            Ok(Request::Read { range, into })
        }),
        VIRTIO_BLK_T_OUT if device.is_read_only() => Err(Status::IoError),
        VIRTIO_BLK_T_OUT => data(&readable).and_then(|from| {
            let range = range(device, header.sector, &from)?;
            Ok(Request::Write { range, from })
        }),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if device.is_read_only() => {
            Err(Status::IoError)
        }
        VIRTIO_BLK_T_DISCARD if !device.may_discard() => Err(Status::Unsupported),
        kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) => data(&readable)
            .and_then(|buffer| segments(device, kind, &buffer))
            .map(|segments| Request::Zero { segments }),
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID => data(&writable).map(|into| Request::GetId { into }),
        _ => Err(Status::Unsupported),
    };
    let written = match &request {
        Ok(Request::Read { into, .. }) => into.len(),
        Ok(Request::GetId { .. }) => SERIAL_BYTES as u64,
        Ok(Request::Write { .. } | Request::Zero { .. } | Request::Flush) | Err(_) => 0,
    };
    let reply = reply.marking(guest, &writable, written);
    match request {
        Ok(request) => Ok((reply, request)),
        Err(status) => Err(Refused::WithStatus(reply, status)),
    }
}

/// The first `bytes` of some pieces.
fn first(pieces: &Pieces, bytes: u64) -> impl Iterator<Item = Piece> {
    pieces.iter().scan(bytes, |missing, piece| {
        let len = u32::try_from(*missing).map_or(piece.len, |most| most.min(piece.len));
        *missing -= u64::from(len);
        (len > 0).then_some(Piece { at: piece.at, len })
    })
}

/// The part of `struct virtio_blk_req` that says what to do.
struct Header {
    kind: u32,
    sector: u64,
}

/// Takes the first 16 readable bytes, however they are cut up (R3).
fn take_header(memory: &Memory, readable: &mut Pieces) -> Option<Header> {
    let mut bytes = [0; HEADER_BYTES];
    let mut missing = &mut bytes[..];
    let mut whole = 0;
    for piece in readable.iter_mut() {
        let count = missing.len().min(usize::try_from(piece.len).ok()?);
        let (now, later) = missing.split_at_mut(count);
        match now.first_chunk_mut::<HEADER_BYTES>() {
            Some(whole) => *whole = access::read(memory, piece.at).ok()?,
            None => memory.read_slice(now, piece.at).ok()?,
        }
        missing = later;
        let count = u32::try_from(count).ok()?;
        piece.at = piece.at.checked_add(u64::from(count))?;
        piece.len -= count;
        if piece.len > 0 {
            break;
        }
        whole += 1;
        if missing.is_empty() {
            break;
        }
    }
    if !missing.is_empty() {
        return None;
    }
    readable.drain(..whole);
    let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
    Some(Header {
        // The barrier bit is a legacy hint that asks for nothing.
        kind: u32::from_le_bytes([a, b, c, d]) & !VIRTIO_BLK_T_BARRIER,
        sector: u64::from_le_bytes(sector),
    })
}

/// Takes the last writable byte, the place of the status.
fn take_last_byte(writable: &mut Pieces) -> Option<GuestAddress> {
    let Piece { at, len } = writable.last_mut()?;
    *len -= 1;
    let status_at = at.checked_add(u64::from(*len));
    if *len == 0 {
        writable.pop();
    }
    status_at
}

/// The sectors that a buffer's worth of data from `sector` on covers.
fn range(device: &Device, sector: u64, data: &GuestBuffer) -> Result<SectorRange, Status> {
    if !data.len().is_multiple_of(SECTOR_BYTES) || data.len() > MAX_DATA_BYTES {
        return Err(Status::IoError);
    }
    let count = data.len() / SECTOR_BYTES;
    device
        .capacity()
        .range(Sector(sector), count)
        .ok_or(Status::IoError)
}

/// Reads and judges all segments before any is carried out (R3; the specification leaves it open).
fn segments(device: &Device, kind: u32, buffer: &GuestBuffer) -> Result<Segments, Status> {
    let count = buffer.len() / SEGMENT_BYTES as u64;
    let is_whole = buffer.len().is_multiple_of(SEGMENT_BYTES as u64);
    if !is_whole || !(1..=u64::from(MAX_SEGMENTS)).contains(&count) {
        return Err(Status::IoError);
    }
    let mut bytes = [0; SEGMENT_BYTES * MAX_SEGMENTS as usize];
    buffer.copy_out(&mut bytes);
    let (all, _) = bytes.as_chunks::<SEGMENT_BYTES>();
    let count = usize::try_from(count).map_err(|_| Status::IoError)?;
    let segments = all[..count].iter().rev();
    segments
        .map(|bytes| segment(device, kind, *bytes))
        .collect()
}

/// `struct virtio_blk_discard_write_zeroes` (virtio 1.2 section 5.2.6).
fn segment(device: &Device, kind: u32, bytes: [u8; SEGMENT_BYTES]) -> Result<Segment, Status> {
    let [start @ .., a, b, c, d, e, f, g, h] = bytes;
    let count = u32::from_le_bytes([a, b, c, d]);
    let flags = u32::from_le_bytes([e, f, g, h]);
    let is_discard = kind == VIRTIO_BLK_T_DISCARD;
    let how = match (is_discard, flags) {
        (true, 0) => Zeroing::Discard,
        (false, FLAG_UNMAP) if device.may_discard() => Zeroing::Release,
        // `unmap` allows and does not ask.
        (false, 0 | FLAG_UNMAP) => Zeroing::Keep,
        _ => return Err(Status::Unsupported),
    };
    if count > MAX_SEGMENT_SECTORS {
        return Err(Status::IoError);
    }
    let start = Sector(u64::from_le_bytes(start));
    let range = device.capacity().range(start, count.into());
    let range = range.ok_or(Status::IoError)?;
    Ok(Segment { range, how })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;

    use vdi_core::{Access, Capacity};
    use vhost::vhost_user::message::VhostUserLog;

    use super::*;
    use crate::chain::tests::memory;
    use crate::device::tests::zeros;
    use crate::device::{Discard, Serial};
    use crate::dirty::DirtyLog;

    /// Where tests keep the header.
    const HEADER: u64 = 0x1000;

    struct Disk {
        memory: Arc<Memory>,
        device: Device,
    }

    /// A guest with a disk of 100 sectors.
    fn guest(access: Access) -> Disk {
        let capacity = Capacity::from_bytes_rounded_down(100 * 512);
        let serial = Serial::new("serial").unwrap();
        Disk {
            memory: Arc::new(memory()),
            device: Device::new(capacity, access, 1, serial, zeros(Discard::Unmap)),
        }
    }

    impl Disk {
        fn whole(&self) -> Guest {
            Guest {
                memory: Arc::clone(&self.memory),
                log: None,
            }
        }

        fn parse(
            &self,
            kind: u32,
            sector: u64,
            readable: &[(u64, u32)],
            writable: &[(u64, u32)],
        ) -> Result<(Reply, Request), Refused> {
            let chain = self.chain(kind, sector, readable, writable);
            parse(&self.whole(), chain, 5, &self.device)
        }

        fn chain(
            &self,
            kind: u32,
            sector: u64,
            readable: &[(u64, u32)],
            writable: &[(u64, u32)],
        ) -> Chain {
            let mut header = [0; HEADER_BYTES];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            self.memory
                .write_slice(&header, GuestAddress(HEADER))
                .unwrap();
            let pieces = |pieces: &[(u64, u32)]| {
                let piece = |&(at, len)| Piece {
                    at: GuestAddress(at),
                    len,
                };
                pieces.iter().map(piece).collect()
            };
            let (readable, writable) = (pieces(readable), pieces(writable));
            Chain {
                readable,
                writable,
                out_of_order: false,
            }
        }

        fn status(&self, kind: u32, sector: u64, writable: &[(u64, u32)]) -> Option<Status> {
            match self.parse(kind, sector, &[(HEADER, 16), (0x4000, 1024)], writable) {
                Err(Refused::WithStatus(_, status)) => Some(status),
                _ => None,
            }
        }
    }

    #[test]
    fn the_header_may_be_cut_up_and_share_a_descriptor_with_data() {
        let guest = guest(Access::Writable);
        let readable = [
            (HEADER, 3),
            (HEADER + 3, 12),
            (HEADER + 15, 1 + 512),
            (0x4000, 512),
        ];
        let (_, request) = guest
            .parse(VIRTIO_BLK_T_OUT, 7, &readable, &[(0x5000, 1)])
            .unwrap();
        let Request::Write { range, from } = request else {
            panic!("{request:?}")
        };
        assert_eq!((range.start(), range.count()), (Sector(7), 2));
        let mut expected = vec![0; 1024];
        guest
            .memory
            .read_slice(&mut expected[..512], GuestAddress(HEADER + 16))
            .unwrap();
        let mut found = vec![1; 1024];
        from.copy_out(&mut found);
        assert_eq!(found, expected);
    }

    #[test]
    fn the_status_byte_is_the_last_writable_byte_however_it_is_framed() {
        let guest = guest(Access::Writable);
        for (writable, status_at) in [
            (&[(0x5000, 512), (0x6000, 1)][..], 0x6000),
            (&[(0x5000, 513)], 0x5200),
            (&[(0x5000, 100), (0x6000, 413)], 0x6000 + 412),
        ] {
            let parsed = guest.parse(VIRTIO_BLK_T_IN, 0, &[(HEADER, 16)], writable);
            let (reply, request) = parsed.unwrap();
            let Request::Read { into, .. } = request else {
                panic!("{request:?}")
            };
            assert_eq!(into.len(), 512);
            assert_eq!(reply.status_at, GuestAddress(status_at));
            let used = reply.send(&guest.memory, Status::Unsupported, 512);
            assert_eq!(used, Used { head: 5, len: 513 });
            let status: u8 = guest.memory.read_obj(GuestAddress(status_at)).unwrap();
            assert_eq!(status, 2);
        }
    }

    #[test]
    fn a_chain_without_a_byte_for_the_status_cannot_be_answered() {
        let guest = guest(Access::Writable);
        for writable in [&[][..], &[(0x10_0000, 1)], &[(u64::MAX, 2)]] {
            let refused = guest.parse(VIRTIO_BLK_T_FLUSH, 0, &[(HEADER, 16)], writable);
            assert!(
                matches!(refused, Err(Refused::Unanswerable)),
                "{writable:?}"
            );
        }
    }

    #[test]
    fn requests_beyond_the_end_of_the_disk_fail() {
        let guest = guest(Access::Writable);
        let sectors = |count: u32| [(0x5000, count * 512 + 1)];
        assert_eq!(guest.status(VIRTIO_BLK_T_IN, 99, &sectors(1)), None);
        for (sector, count) in [(99, 2), (100, 1), (101, 0), (u64::MAX, 1), (1 << 55, 1)] {
            let status = guest.status(VIRTIO_BLK_T_IN, sector, &sectors(count));
            assert_eq!(status, Some(Status::IoError), "{sector} {count}");
        }
        assert_eq!(
            guest.status(VIRTIO_BLK_T_OUT, 99, &[(0x5000, 1)]),
            Some(Status::IoError)
        );
    }

    #[test]
    fn only_what_a_request_writes_is_marked_however_much_its_chain_names() {
        let disk = guest(Access::Writable);
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x20).unwrap();
        let log = VhostUserLog::new(0x20, 0);
        let marked_by = |kind, writable: &[(u64, u32)]| {
            let log = DirtyLog::map(
                &log,
                file.try_clone().unwrap(),
                &crate::fault::Account::default(),
            )
            .unwrap();
            let guest = Guest {
                log: Some(Arc::new(log)),
                ..disk.whole()
            };
            file.write_all_at(&[0; 0x20], 0).unwrap();
            let chain = disk.chain(kind, 0, &[(HEADER, 16)], writable);
            let (Ok((reply, _)) | Err(Refused::WithStatus(reply, _))) =
                parse(&guest, chain, 5, &disk.device)
            else {
                panic!("there is a status")
            };
            // Whatever is said to have been written.
            let _used = reply.send(&disk.memory, Status::Ok, u64::MAX);
            let mut bits = [0_u8; 0x20];
            file.read_exact_at(&mut bits, 0).unwrap();
            (0..0x100)
                .filter(|page| bits[page / 8] >> (page % 8) & 1 == 1)
                .collect::<Vec<_>>()
        };
        let pages = [(0x5ff6, 0xa), (0x20_000, 0x1_0000), (0x40_000, 1)];
        assert_eq!(marked_by(VIRTIO_BLK_T_GET_ID, &pages), [5, 0x20, 0x40]);
        assert_eq!(marked_by(VIRTIO_BLK_T_FLUSH, &pages), [0x40]);
        assert_eq!(marked_by(VIRTIO_BLK_T_OUT, &pages), [0x40]);
        assert_eq!(marked_by(99, &pages), [0x40]);
        assert_eq!(marked_by(VIRTIO_BLK_T_IN, &pages), [0x40], "no sectors");
        let sectors = [(0x20_000, 0x2000), (0x40_000, 1)];
        assert_eq!(marked_by(VIRTIO_BLK_T_IN, &sectors), [0x20, 0x21, 0x40]);
        assert_eq!(marked_by(VIRTIO_BLK_T_GET_ID, &[(0x5000, 8)]), [5]);
    }

    #[test]
    fn malformed_requests_fail_and_unknown_ones_are_not_supported() {
        let guest = guest(Access::Writable);
        let status = |kind, writable: &[(u64, u32)]| guest.status(kind, 0, writable);
        assert_eq!(
            status(VIRTIO_BLK_T_IN, &[(0x5000, 514)]),
            Some(Status::IoError)
        );
        assert_eq!(
            status(VIRTIO_BLK_T_IN, &[(0x9_0000_0000, 512), (0x5000, 1)]),
            Some(Status::IoError)
        );
        for kind in [2, 5, 14, 16, 99, u32::MAX] {
            assert_eq!(
                status(kind, &[(0x5000, 1)]),
                Some(Status::Unsupported),
                "{kind}"
            );
        }
        let short = guest.parse(VIRTIO_BLK_T_FLUSH, 0, &[(HEADER, 15)], &[(0x5000, 1)]);
        assert!(matches!(
            short,
            Err(Refused::WithStatus(_, Status::IoError))
        ));
        let outside = guest.parse(VIRTIO_BLK_T_FLUSH, 0, &[(0x10_0000, 16)], &[(0x5000, 1)]);
        assert!(matches!(
            outside,
            Err(Refused::WithStatus(_, Status::IoError))
        ));
    }

    #[test]
    fn a_chain_out_of_order_fails() {
        let guest = guest(Access::Writable);
        let piece = |at, len| Piece {
            at: GuestAddress(at),
            len,
        };
        let chain = Chain {
            readable: [piece(HEADER, 16)].into_iter().collect(),
            writable: [piece(0x5000, 1)].into_iter().collect(),
            out_of_order: true,
        };
        let refused = parse(&guest.whole(), chain, 0, &guest.device);
        assert!(matches!(
            refused,
            Err(Refused::WithStatus(_, Status::IoError))
        ));
    }

    #[test]
    fn a_read_only_disk_takes_no_writes_but_flushes() {
        let guest = guest(Access::ReadOnly);
        for kind in [
            VIRTIO_BLK_T_OUT,
            VIRTIO_BLK_T_DISCARD,
            VIRTIO_BLK_T_WRITE_ZEROES,
        ] {
            let status = guest.status(kind, 0, &[(0x5000, 1)]);
            assert_eq!(status, Some(Status::IoError), "{kind}");
        }
        let flush = guest.parse(VIRTIO_BLK_T_FLUSH, 9, &[(HEADER, 16)], &[(0x5000, 1)]);
        assert!(matches!(flush, Ok((_, Request::Flush))));
    }

    #[test]
    fn the_barrier_bit_asks_for_nothing() {
        let guest = guest(Access::Writable);
        let kind = VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_BARRIER;
        let (_, request) = guest
            .parse(kind, 0, &[(HEADER, 16), (0x4000, 512)], &[(0x5000, 1)])
            .unwrap();
        assert!(matches!(request, Request::Write { .. }));
    }

    /// Parses a discard or write-zeroes request of these segments.
    fn parse_segments(
        guest: &Disk,
        kind: u32,
        segments: &[(u64, u32, u32)],
    ) -> Option<Result<Segments, Status>> {
        let mut bytes = Vec::new();
        for (sector, count, flags) in segments {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        guest
            .memory
            .write_slice(&bytes, GuestAddress(0x4000))
            .unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        match guest.parse(kind, 0, &[(HEADER, 16), (0x4000, len)], &[(0x5000, 1)]) {
            Ok((_, Request::Zero { segments })) => Some(Ok(segments)),
            Err(Refused::WithStatus(_, status)) => Some(Err(status)),
            _ => None,
        }
    }

    #[test]
    fn segments_say_what_becomes_of_their_sectors() {
        let guest = guest(Access::Writable);
        let how = |kind, flags| {
            let segments =
                parse_segments(&guest, kind, &[(1, 2, flags), (3, 0, flags)]).unwrap()?;
            assert_eq!(segments.len(), 2);
            let first = segments[1];
            assert_eq!((first.range.start(), first.range.count()), (Sector(1), 2));
            Ok(first.how)
        };
        assert_eq!(how(VIRTIO_BLK_T_DISCARD, 0), Ok(Zeroing::Discard));
        assert_eq!(how(VIRTIO_BLK_T_WRITE_ZEROES, 0), Ok(Zeroing::Keep));
        assert_eq!(how(VIRTIO_BLK_T_WRITE_ZEROES, 1), Ok(Zeroing::Release));
        assert_eq!(how(VIRTIO_BLK_T_DISCARD, 1), Err(Status::Unsupported));
        for flags in [2, 3, u32::MAX] {
            assert_eq!(how(VIRTIO_BLK_T_DISCARD, flags), Err(Status::Unsupported));
            assert_eq!(
                how(VIRTIO_BLK_T_WRITE_ZEROES, flags),
                Err(Status::Unsupported)
            );
        }
    }

    #[test]
    fn one_bad_segment_fails_the_whole_request() {
        let guest = guest(Access::Writable);
        let status = |segments: &[(u64, u32, u32)]| {
            parse_segments(&guest, VIRTIO_BLK_T_WRITE_ZEROES, segments)
                .unwrap()
                .err()
        };
        assert_eq!(status(&[(0, 100, 0)]), None);
        for bad in [(0, 101, 0), (100, 1, 0), (u64::MAX, 1, 0), (0, u32::MAX, 0)] {
            assert_eq!(status(&[(0, 1, 0), bad]), Some(Status::IoError), "{bad:?}");
        }
        assert_eq!(status(&[]), Some(Status::IoError));
        assert_eq!(status(&[(0, 1, 0); 64]), None);
        assert_eq!(status(&[(0, 1, 0); 65]), Some(Status::IoError));
    }

    #[test]
    fn a_segment_has_16_bytes_and_no_more_sectors_than_are_offered() {
        let mut guest = guest(Access::Writable);
        let kind = VIRTIO_BLK_T_WRITE_ZEROES;
        for (len, is_whole) in [(16, true), (17, false), (24, false), (31, false)] {
            let parsed = guest.parse(kind, 0, &[(HEADER, 16), (0x4000, len)], &[(0x5000, 1)]);
            assert_eq!(parsed.is_ok(), is_whole, "{len} bytes");
        }
        let large = Capacity::from_bytes_rounded_down(1 << 40);
        let serial = guest.device.serial().clone();
        guest.device = Device::new(large, Access::Writable, 1, serial, zeros(Discard::Unmap));
        for (count, wanted) in [
            (MAX_SEGMENT_SECTORS, None),
            (MAX_SEGMENT_SECTORS + 1, Some(Status::IoError)),
        ] {
            let parsed = parse_segments(&guest, kind, &[(0, count, 0)]).unwrap();
            assert_eq!(parsed.err(), wanted, "{count} sectors");
        }
    }

    #[test]
    fn a_disk_that_ignores_discards_offers_none_and_keeps_its_space() {
        let mut guest = guest(Access::Writable);
        let (capacity, serial) = (guest.device.capacity(), guest.device.serial().clone());
        guest.device = Device::new(
            capacity,
            Access::Writable,
            1,
            serial,
            zeros(Discard::Ignore),
        );
        let discard = parse_segments(&guest, VIRTIO_BLK_T_DISCARD, &[(0, 1, 0)]);
        assert_eq!(discard, Some(Err(Status::Unsupported)));
        let zeroes = parse_segments(&guest, VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 1)]);
        assert_eq!(zeroes.unwrap().unwrap()[0].how, Zeroing::Keep);
    }
}
