//! What a driver asks of a block device, and what comes back.
//!
//! Not how it is laid out in guest memory: see `layout.rs` and `chain.rs`.
//!
//! Source: virtio 1.2 section 5.2.6.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

/// What memory holds before the device writes it.
pub const UNTOUCHED: u8 = 0xee;

/// A range of a discard or write-zeroes request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The first sector.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
    /// 1: its space may be given back.
    pub flags: u32,
}

impl Segment {
    /// A range without flags.
    #[must_use]
    pub const fn new(sector: u64, sectors: u32) -> Self {
        Self {
            sector,
            sectors,
            flags: 0,
        }
    }

    /// With the flag that lets its space be given back.
    #[must_use]
    pub const fn unmap(mut self) -> Self {
        self.flags = 1;
        self
    }
}

/// What a driver asks of the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `VIRTIO_BLK_T_*`.
    pub kind: u32,
    /// Position on the disk.
    pub sector: u64,
    /// What the device reads after the header.
    pub data: Vec<u8>,
    /// How many bytes the device writes before the status.
    pub answer_bytes: u32,
}

impl Request {
    /// A request with data of neither direction.
    #[must_use]
    pub const fn of_kind(kind: u32) -> Self {
        Self {
            kind,
            sector: 0,
            data: Vec::new(),
            answer_bytes: 0,
        }
    }

    /// Reads `len_bytes` from `sector`.
    #[must_use]
    pub const fn read(sector: u64, len_bytes: u32) -> Self {
        Self {
            kind: VIRTIO_BLK_T_IN,
            sector,
            data: Vec::new(),
            answer_bytes: len_bytes,
        }
    }

    /// Writes `data` to `sector`.
    #[must_use]
    pub const fn write(sector: u64, data: Vec<u8>) -> Self {
        Self {
            kind: VIRTIO_BLK_T_OUT,
            sector,
            data,
            answer_bytes: 0,
        }
    }

    /// Asks that what was written survives power loss.
    #[must_use]
    pub const fn flush() -> Self {
        Self::of_kind(VIRTIO_BLK_T_FLUSH)
    }

    /// Asks for the serial number.
    #[must_use]
    pub const fn get_id() -> Self {
        let mut request = Self::of_kind(VIRTIO_BLK_T_GET_ID);
        request.answer_bytes = 20;
        request
    }

    /// Says that nobody needs these ranges any more.
    #[must_use]
    pub fn discard(segments: &[Segment]) -> Self {
        Self::of_segments(VIRTIO_BLK_T_DISCARD, segments)
    }

    /// Makes these ranges zeros.
    #[must_use]
    pub fn write_zeroes(segments: &[Segment]) -> Self {
        Self::of_segments(VIRTIO_BLK_T_WRITE_ZEROES, segments)
    }

    fn of_segments(kind: u32, segments: &[Segment]) -> Self {
        let mut request = Self::of_kind(kind);
        for segment in segments {
            request.data.extend(segment.sector.to_le_bytes());
            request.data.extend(segment.sectors.to_le_bytes());
            request.data.extend(segment.flags.to_le_bytes());
        }
        request
    }

    /// Header and data as they lie in memory.
    pub(super) fn readable_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 + self.data.len());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(self.sector.to_le_bytes());
        bytes.extend(&self.data);
        bytes
    }
}

/// What the device made of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// `VIRTIO_BLK_S_*`, or [`UNTOUCHED`].
    pub status: u8,
    /// How many bytes the device says it wrote.
    pub used_bytes: u32,
    /// What lies where it was to write data.
    pub data: Vec<u8>,
}

impl Answer {
    /// The data of a request that must have succeeded.
    ///
    /// # Panics
    /// If it did not, or if the device claims another length than it wrote.
    #[must_use]
    pub fn expect_ok(self) -> Vec<u8> {
        assert_eq!(
            u32::from(self.status),
            VIRTIO_BLK_S_OK,
            "the status of a request"
        );
        assert_eq!(
            self.used_bytes as usize,
            self.data.len() + 1,
            "used.len of a request"
        );
        self.data
    }
}
