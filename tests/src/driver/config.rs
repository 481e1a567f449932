//! Feature bits and the config space of a block device.
//!
//! Source: virtio 1.2 section 5.2.

/// Feature bits as masks.
pub mod feature {
    use virtio_bindings::{virtio_blk, virtio_config, virtio_ring};

    /// The device says how many segments a request may have.
    pub const SEG_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SEG_MAX;
    /// The device says how long a segment may be.
    pub const SIZE_MAX: u64 = 1 << virtio_blk::VIRTIO_BLK_F_SIZE_MAX;
    /// The disk is read-only.
    pub const RO: u64 = 1 << virtio_blk::VIRTIO_BLK_F_RO;
    /// The device says its block size.
    pub const BLK_SIZE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_BLK_SIZE;
    /// There are flush requests.
    pub const FLUSH: u64 = 1 << virtio_blk::VIRTIO_BLK_F_FLUSH;
    /// The device says its best I/O sizes.
    pub const TOPOLOGY: u64 = 1 << virtio_blk::VIRTIO_BLK_F_TOPOLOGY;
    /// The driver may switch the cache mode.
    pub const CONFIG_WCE: u64 = 1 << virtio_blk::VIRTIO_BLK_F_CONFIG_WCE;
    /// There are discards.
    pub const DISCARD: u64 = 1 << virtio_blk::VIRTIO_BLK_F_DISCARD;
    /// Zeros can be written without sending them.
    pub const WRITE_ZEROES: u64 = 1 << virtio_blk::VIRTIO_BLK_F_WRITE_ZEROES;
    /// There may be several queues.
    pub const MQ: u64 = 1 << virtio_blk::VIRTIO_BLK_F_MQ;
    /// All writes to guest memory are logged.
    pub const LOG_ALL: u64 = 1 << 26;
    /// There are indirect tables.
    pub const INDIRECT_DESC: u64 = 1 << virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// Notifications are asked for by index.
    pub const EVENT_IDX: u64 = 1 << virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    /// There are protocol features.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << virtio_config::VIRTIO_F_VERSION_1;
    /// Rings may have the packed layout.
    pub const RING_PACKED: u64 = 1 << virtio_config::VIRTIO_F_RING_PACKED;
    /// Kicks carry data.
    pub const NOTIFICATION_DATA: u64 = 1 << 38;

    /// What a driver accepts that knows all of a disk, but neither dirty logging nor packed rings.
    pub const USUAL: u64 = SEG_MAX
        | SIZE_MAX
        | RO
        | BLK_SIZE
        | FLUSH
        | TOPOLOGY
        | CONFIG_WCE
        | DISCARD
        | WRITE_ZEROES
        | MQ
        | INDIRECT_DESC
        | EVENT_IDX
        | PROTOCOL_FEATURES
        | VERSION_1;
}

/// `struct virtio_blk_config`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Sectors on the disk.
    pub capacity_sectors: u64,
    /// Longest segment, with SIZE_MAX.
    pub size_max: u32,
    /// Most segments, with SEG_MAX.
    pub seg_max: u32,
    /// Block size, with BLK_SIZE.
    pub blk_size: u32,
    /// Blocks in a physical block, as a power of two.
    pub physical_block_exp: u8,
    /// Offset of the first aligned block.
    pub alignment_offset: u8,
    /// Shortest good I/O, in blocks.
    pub min_io_size: u16,
    /// Best I/O, in blocks.
    pub opt_io_size: u32,
    /// 1: a flush is needed.
    pub writeback: u8,
    /// Number of queues, with MQ.
    pub num_queues: u16,
    /// Most sectors and segments of a discard, with DISCARD.
    pub max_discard: (u32, u32),
    /// What discards should be aligned to, in sectors.
    pub discard_alignment: u32,
    /// Most sectors and segments of a write-zeroes, with WRITE_ZEROES.
    pub max_write_zeroes: (u32, u32),
    /// 1: a write-zeroes may give space back.
    pub write_zeroes_may_unmap: u8,
}

impl Config {
    /// Up to the fields of write-zeroes.
    pub const LEN_BYTES: u32 = 60;
    /// Where `writeback` lies.
    pub const WRITEBACK_AT: u32 = 32;

    /// Reads the fields.
    ///
    /// # Panics
    /// If there are fewer than 57 bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
            *bytes[at..]
                .first_chunk()
                .expect("the config space is long enough")
        }
        Self {
            capacity_sectors: u64::from_le_bytes(field(bytes, 0)),
            size_max: u32::from_le_bytes(field(bytes, 8)),
            seg_max: u32::from_le_bytes(field(bytes, 12)),
            blk_size: u32::from_le_bytes(field(bytes, 20)),
            physical_block_exp: bytes[24],
            alignment_offset: bytes[25],
            min_io_size: u16::from_le_bytes(field(bytes, 26)),
            opt_io_size: u32::from_le_bytes(field(bytes, 28)),
            writeback: bytes[32],
            num_queues: u16::from_le_bytes(field(bytes, 34)),
            max_discard: (
                u32::from_le_bytes(field(bytes, 36)),
                u32::from_le_bytes(field(bytes, 40)),
            ),
            discard_alignment: u32::from_le_bytes(field(bytes, 44)),
            max_write_zeroes: (
                u32::from_le_bytes(field(bytes, 48)),
                u32::from_le_bytes(field(bytes, 52)),
            ),
            write_zeroes_may_unmap: bytes[56],
        }
    }
}
