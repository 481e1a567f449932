//! What the guest is told about the device, and what it negotiated: feature bits, the configuration
//! space, the serial number, and whether writes may wait for a flush.
//!
//! Not here: how requests are served (`worker`), how the front end is answered (`backend`).
//!
//! Sources: virtio 1.2 section 5.2 (block device), section 6 (reserved feature bits); the layout of the
//! configuration space is checked against `virtio-bindings` in the tests.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use vdi_core::{Capacity, Zeroing};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use crate::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use crate::ring::GuestBuffer;

/// The longest serial number a guest can ask for (`VIRTIO_BLK_ID_BYTES`).
pub(crate) const SERIAL_BYTES: usize = 20;

/// Most data segments of one request: a queue of 128 (what QEMU and cloud-hypervisor use unless told
/// otherwise) with one descriptor left for the header and one for the status.
const SEG_MAX: u32 = 126;

/// Bytes of a logical block: the sector, so that every guest can use the disk.
const BLK_SIZE: u32 = 512;

/// log2 of logical blocks per physical block: 4 KiB, the page size of the host's cache and of today's
/// storage. A guest that aligns to it spares us read-modify-write.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// The smallest transfer without penalty, in logical blocks: one physical block.
const MIN_IO_SIZE: u16 = 1 << PHYSICAL_BLOCK_EXP;

/// Bytes of the configuration space up to and including the zoned fields of virtio 1.3.
const CONFIG_BYTES: usize = 96;

/// Where old cloud-hypervisor releases believe the configuration space begins.
const CONFIG_ALIAS: usize = 0x100;

/// The offset of `writeback`, the only field that a driver may write.
const WRITEBACK_AT: usize = 32;

/// What is known of the driver's choice of the `writeback` field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writeback {
    /// Every write is durable when it is answered.
    Off,
    /// Flushes make writes durable.
    On,
    /// Nobody chose: what was negotiated decides.
    Unset,
    /// Somebody may have chosen, and it was not heard here. Then it may be off.
    Unknown,
}

impl Writeback {
    /// As one byte, for an atomic and for later daemons: never change the numbers.
    pub(crate) fn to_raw(self) -> u8 {
        match self {
            Self::Off => 0,
            Self::On => 1,
            Self::Unset => 2,
            Self::Unknown => 3,
        }
    }

    /// What the byte says, if it is one of ours.
    pub(crate) fn from_raw(raw: u8) -> Option<Self> {
        [Self::Off, Self::On, Self::Unset, Self::Unknown]
            .into_iter()
            .find(|choice| choice.to_raw() == raw)
    }
}

/// What becomes of discards.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Discard {
    /// They give space back to the host.
    Unmap,
    /// Guests cannot discard; write-zeroes keeps its space.
    Ignore,
}

/// What becomes of data that are nothing but zeros.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum DetectZeroes {
    /// They are written like any other.
    Off,
    /// They take no new space.
    On,
    /// They give space back, as a write-zeroes with `unmap` does.
    Unmap,
}

/// How the device treats zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Zeros {
    /// What becomes of discards.
    pub(crate) discard: Discard,
    /// Whether written zeros are looked for.
    pub(crate) detect: DetectZeroes,
    /// The unit in which space is given back, in sectors.
    pub(crate) block_sectors: u32,
}

/// One virtio block device: what it offers and what was negotiated.
///
/// Shared by the control thread (which changes it) and the workers (which only ask
/// [`Device::is_write_through`]).
#[derive(Debug)]
pub(crate) struct Device {
    capacity_bytes: AtomicU64,
    read_only: bool,
    num_queues: u16,
    serial: Serial,
    zeros: Zeros,
    acked_features: AtomicU64,
    /// A [`Writeback`]. It outlives connections: QEMU keeps the value in its own copy of the
    /// configuration space and does not send it again after a reconnect. Forgetting a 0 would take the
    /// guest's durability away; keeping it costs only speed, and is reported truthfully.
    writeback: AtomicU8,
}

impl Device {
    /// A device over a disk of `capacity` with `num_queues` queues.
    pub(crate) fn new(
        capacity: Capacity,
        access: vdi_core::Access,
        num_queues: u16,
        serial: Serial,
        zeros: Zeros,
    ) -> Self {
        Self {
            capacity_bytes: AtomicU64::new(capacity.bytes()),
            read_only: access == vdi_core::Access::ReadOnly,
            num_queues,
            serial,
            zeros,
            acked_features: AtomicU64::new(0),
            writeback: AtomicU8::new(Writeback::Unset.to_raw()),
        }
    }

    /// How many queues a front end may use.
    pub(crate) fn num_queues(&self) -> u16 {
        self.num_queues
    }

    /// The size of the disk.
    pub(crate) fn capacity(&self) -> Capacity {
        Capacity::from_bytes_rounded_down(self.capacity_bytes.load(Ordering::Acquire))
    }

    /// The disk has another size now. Only while no request is in flight.
    pub(crate) fn set_capacity(&self, capacity: Capacity) {
        self.capacity_bytes
            .store(capacity.bytes(), Ordering::Release);
    }

    /// The unit of allocation.
    pub(crate) fn block_bytes(&self) -> u64 {
        u64::from(self.zeros.block_sectors) * 512
    }

    /// What guests may do with the disk.
    pub(crate) fn access(&self) -> vdi_core::Access {
        if self.read_only {
            vdi_core::Access::ReadOnly
        } else {
            vdi_core::Access::Writable
        }
    }

    /// Whether every write is refused.
    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether guests may give space back.
    pub(crate) fn may_discard(&self) -> bool {
        self.zeros.discard == Discard::Unmap
    }

    /// How the first `len_bytes` of data that a guest writes become zeros, if they are nothing but zeros and that is looked for.
    pub(crate) fn zeroing_of(&self, data: &GuestBuffer, len_bytes: u64) -> Option<Zeroing> {
        let how = match self.zeros.detect {
            DetectZeroes::Off => return None,
            DetectZeroes::On => Zeroing::Keep,
            DetectZeroes::Unmap => Zeroing::Release,
        };
        data.begins_with_zeros(len_bytes).then_some(how)
    }

    /// What GET_ID answers.
    pub(crate) fn serial(&self) -> &Serial {
        &self.serial
    }

    /// The feature bits we offer, virtio's and vhost-user's.
    pub(crate) fn features(&self) -> u64 {
        let mut features = bit(VIRTIO_F_VERSION_1)
            | bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_CONFIG_WCE)
            | bit(VIRTIO_BLK_F_MQ)
            | bit(VIRTIO_BLK_F_WRITE_ZEROES)
            | bit(VIRTIO_RING_F_INDIRECT_DESC)
            | bit(VIRTIO_RING_F_EVENT_IDX)
            | VhostUserVirtioFeatures::LOG_ALL.bits()
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if self.read_only {
            features |= bit(VIRTIO_BLK_F_RO);
        }
        if self.may_discard() {
            features |= bit(VIRTIO_BLK_F_DISCARD);
        }
        features
    }

    /// The vhost-user protocol features we offer; each one is wholly implemented.
    pub(crate) fn protocol_features() -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    /// Remembers what the driver accepted; `None` if it is more than was offered.
    pub(crate) fn ack_features(&self, features: u64) -> Option<()> {
        if features & !self.features() != 0 {
            return None;
        }
        self.acked_features.store(features, Ordering::Release);
        Some(())
    }

    /// Forgets the negotiation: a reset, or a front end that went away.
    pub(crate) fn forget_features(&self) {
        self.acked_features.store(0, Ordering::Release);
    }

    /// Whether rings work without the guest's leave: VHOST_USER_F_PROTOCOL_FEATURES was not accepted.
    pub(crate) fn rings_start_enabled(&self) -> bool {
        self.acked() & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0
    }

    /// Whether writes to the guest's memory are to be marked now.
    pub(crate) fn logs_all(&self) -> bool {
        self.acked() & VhostUserVirtioFeatures::LOG_ALL.bits() != 0
    }

    /// Whether EVENT_IDX was negotiated.
    pub(crate) fn has_event_idx(&self) -> bool {
        self.acked() & bit(VIRTIO_RING_F_EVENT_IDX) != 0
    }

    /// Whether a write must be durable before it is answered (virtio 1.2 section 5.2.6.2): the driver
    /// cannot flush, or has switched write-back off.
    pub(crate) fn is_write_through(&self) -> bool {
        let flushes = || self.acked() & bit(VIRTIO_BLK_F_FLUSH) != 0;
        match self.writeback_choice() {
            Writeback::Off | Writeback::Unknown => true,
            Writeback::On if self.acked() & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0 => false,
            Writeback::On | Writeback::Unset => !flushes(),
        }
    }

    /// `len` bytes of the configuration space from `offset`; zeros where it has none.
    pub(crate) fn read_config(&self, offset: usize, len: usize) -> Vec<u8> {
        let config = self.config();
        let byte = |at: usize| {
            config
                .get(at)
                .or_else(|| config.get(at.wrapping_sub(CONFIG_ALIAS)))
        };
        (offset..offset.saturating_add(len))
            .map(|at| byte(at).copied().unwrap_or(0))
            .collect()
    }

    /// Takes a driver's write to the configuration space; the new value of `writeback`, or `None` if
    /// anything but that one field is meant.
    pub(crate) fn write_config(&self, offset: usize, bytes: &[u8]) -> Option<bool> {
        let at = if offset >= CONFIG_ALIAS {
            offset - CONFIG_ALIAS
        } else {
            offset
        };
        let (WRITEBACK_AT, [value]) = (at, bytes) else {
            return None;
        };
        let on = *value != 0;
        self.writeback.store(u8::from(on), Ordering::Release);
        Some(on)
    }

    /// What is known of the driver's choice of `writeback`.
    pub(crate) fn writeback_choice(&self) -> Writeback {
        let raw = self.writeback.load(Ordering::Acquire);
        Writeback::from_raw(raw).expect("only what to_raw gave is stored")
    }

    /// Takes over what an earlier daemon knew of the driver's choice. What it chose since then holds.
    pub(crate) fn recall_writeback(&self, earlier: Writeback) {
        if self.writeback_choice() == Writeback::Unset {
            self.writeback.store(earlier.to_raw(), Ordering::Release);
        }
    }

    /// A driver that used the device before may have chosen to write through, and nobody says so again. Until it
    /// chooses anew, that is what it gets; true if that is news.
    pub(crate) fn doubt_writeback(&self) -> bool {
        let may_choose = self.acked() & bit(VIRTIO_BLK_F_CONFIG_WCE) != 0;
        let doubted = may_choose && self.writeback_choice() == Writeback::Unset;
        if doubted {
            self.writeback
                .store(Writeback::Unknown.to_raw(), Ordering::Release);
        }
        doubted
    }

    fn acked(&self) -> u64 {
        self.acked_features.load(Ordering::Acquire)
    }

    /// What the `writeback` field says: the choice that was made, or what holds without one.
    fn writeback(&self) -> u8 {
        match self.writeback_choice() {
            // Before negotiation the answer is for a driver that can flush, as every one we know.
            Writeback::Unset if self.acked() == 0 => 1,
            Writeback::Unset | Writeback::Unknown => u8::from(!self.is_write_through()),
            Writeback::Off => 0,
            Writeback::On => 1,
        }
    }

    /// `struct virtio_blk_config`, little-endian; fields of features that are not offered stay zero.
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.capacity().sectors().to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &BLK_SIZE.to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXP]);
        put(26, &MIN_IO_SIZE.to_le_bytes());
        put(WRITEBACK_AT, &[self.writeback()]);
        put(34, &self.num_queues.to_le_bytes());
        if self.may_discard() {
            put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
            put(40, &MAX_SEGMENTS.to_le_bytes());
            put(44, &self.zeros.block_sectors.to_le_bytes());
        }
        put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(52, &MAX_SEGMENTS.to_le_bytes());
        put(56, &[u8::from(self.may_discard())]);
        config
    }
}

/// The name under which a guest's `/dev/disk/by-id` finds the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Serial([u8; SERIAL_BYTES]);

impl Serial {
    /// A serial of at most [`SERIAL_BYTES`] printable ASCII bytes.
    pub(crate) fn new(text: &str) -> Option<Self> {
        let ok =
            text.len() <= SERIAL_BYTES && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
        ok.then(|| {
            let mut bytes = [0; SERIAL_BYTES];
            bytes[..text.len()].copy_from_slice(text.as_bytes());
            Self(bytes)
        })
    }

    /// The serial of an image that was given none: as much of its UUID as fits, so that it stays the
    /// same wherever the image is served.
    pub(crate) fn from_image_uuid(uuid: [u8; 16]) -> Self {
        let digits = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0') as u8;
        let mut hex = uuid.iter().flat_map(|b| [digits(b >> 4), digits(b & 0xf)]);
        Self(std::array::from_fn(|_| hex.next().unwrap_or(0)))
    }

    /// The characters.
    pub(crate) fn text(&self) -> String {
        let used = self.0.iter().take_while(|byte| **byte != 0);
        used.map(|byte| char::from(*byte)).collect()
    }

    /// Padded with NULs, and not terminated by one when it is full (virtio 1.2 section 5.2.6).
    pub(crate) fn bytes(&self) -> &[u8; SERIAL_BYTES] {
        &self.0
    }
}

const fn bit(number: u32) -> u64 {
    1 << number
}

#[cfg(test)]
pub(crate) mod tests {
    use std::mem::offset_of;

    use vdi_core::Access;
    use virtio_bindings::bindings::virtio_blk::virtio_blk_config;

    use super::*;

    fn device() -> Device {
        let serial = Serial::new("disk-1").unwrap();
        let capacity = Capacity::from_bytes_rounded_down(0x1234 * 512);
        Device::new(capacity, Access::Writable, 7, serial, zeros(Discard::Unmap))
    }

    /// Zeros as guests get them unless told otherwise.
    pub(crate) fn zeros(discard: Discard) -> Zeros {
        Zeros {
            discard,
            detect: DetectZeroes::Off,
            block_sectors: 2048,
        }
    }

    fn config_u32(device: &Device, at: usize) -> u32 {
        u32::from_le_bytes(device.read_config(at, 4).try_into().unwrap())
    }

    #[test]
    fn every_config_field_lies_where_the_spec_has_it() {
        let device = device();
        assert_eq!(offset_of!(virtio_blk_config, wce), WRITEBACK_AT);
        assert_eq!(size_of::<virtio_blk_config>(), CONFIG_BYTES);
        assert_eq!(
            config_u32(&device, offset_of!(virtio_blk_config, capacity)),
            0x1234
        );
        assert_eq!(
            config_u32(&device, offset_of!(virtio_blk_config, seg_max)),
            SEG_MAX
        );
        assert_eq!(
            config_u32(&device, offset_of!(virtio_blk_config, blk_size)),
            512
        );
        let exp = offset_of!(virtio_blk_config, physical_block_exp);
        assert_eq!(device.read_config(exp, 4), [3, 0, 8, 0]);
        let queues = offset_of!(virtio_blk_config, num_queues);
        assert_eq!(device.read_config(queues, 2), [7, 0]);
    }

    #[test]
    fn config_reads_beyond_the_end_are_zeros_and_0x100_is_an_alias() {
        let device = device();
        assert_eq!(device.read_config(0x100, 60), device.read_config(0, 60));
        assert_eq!(device.read_config(CONFIG_BYTES, 16), [0; 16]);
        assert_eq!(device.read_config(0x200, 4), [0; 4]);
        assert_eq!(device.read_config(0, 256).len(), 256);
    }

    #[test]
    fn a_driver_that_cannot_flush_gets_write_through() {
        let device = device();
        device.ack_features(bit(VIRTIO_F_VERSION_1)).unwrap();
        assert!(device.is_write_through());
        device.ack_features(bit(VIRTIO_BLK_F_CONFIG_WCE)).unwrap();
        assert!(device.is_write_through());
        assert_eq!(device.read_config(WRITEBACK_AT, 1), [0]);
        device.ack_features(bit(VIRTIO_BLK_F_FLUSH)).unwrap();
        assert!(!device.is_write_through());
        assert_eq!(device.read_config(WRITEBACK_AT, 1), [1]);
    }

    #[test]
    fn writeback_0_stays_until_it_is_set_again() {
        let device = device();
        let features = bit(VIRTIO_BLK_F_FLUSH) | bit(VIRTIO_BLK_F_CONFIG_WCE);
        device.ack_features(features).unwrap();
        assert_eq!(device.write_config(WRITEBACK_AT, &[0]), Some(false));
        assert!(device.is_write_through());
        device.forget_features();
        device.ack_features(features).unwrap();
        assert!(device.is_write_through());
        assert_eq!(device.read_config(WRITEBACK_AT, 1), [0]);
        assert_eq!(
            device.write_config(WRITEBACK_AT + CONFIG_ALIAS, &[1]),
            Some(true)
        );
        assert!(!device.is_write_through());
    }

    #[test]
    fn only_writeback_can_be_written() {
        let device = device();
        assert_eq!(device.write_config(0, &[1]), None);
        assert_eq!(device.write_config(WRITEBACK_AT, &[1, 0]), None);
        assert_eq!(device.write_config(WRITEBACK_AT, &[]), None);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let device = device();
        assert_eq!(device.ack_features(bit(VIRTIO_BLK_F_RO)), None);
        let read_only = Device::new(
            device.capacity(),
            Access::ReadOnly,
            1,
            device.serial().clone(),
            zeros(Discard::Unmap),
        );
        assert_eq!(read_only.ack_features(bit(VIRTIO_BLK_F_RO)), Some(()));
    }

    #[test]
    fn a_serial_is_padded_with_nuls_and_refused_when_too_long() {
        assert_eq!(device().serial().bytes()[..8], *b"disk-1\0\0");
        assert_eq!(Serial::new("123456789012345678901"), None);
        assert_eq!(Serial::new("caf\u{e9}"), None);
        let uuid = *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef";
        assert_eq!(
            Serial::from_image_uuid(uuid).bytes(),
            b"0123456789abcdef0123"
        );
    }
}
