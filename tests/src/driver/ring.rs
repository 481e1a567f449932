//! A split virtqueue's three areas, written by hand.
//!
//! Not a driver: nothing here checks that what is written makes sense, so that a test can write nonsense.
//!
//! Source: virtio 1.2 section 2.7.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::memory::{Buffer, Memory};

/// The chain goes on at `next`.
pub const NEXT: u16 = 1;
/// The device may write, not read.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// `struct virtq_desc`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub at: u64,
    /// Length in bytes.
    pub len_bytes: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The next descriptor of the chain.
    pub next: u16,
}

impl Descriptor {
    /// Size in a table.
    pub const LEN_BYTES: u64 = 16;

    /// The descriptor as it lies in memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.at.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len_bytes.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One element of the used ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// The head, 32 bits wide in the ring.
    pub head: u32,
    /// Bytes that the device says it wrote.
    pub len_bytes: u32,
}

/// The descriptor table, the available ring and the used ring.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<Memory>,
    size: u16,
    table: Buffer,
    available: Buffer,
    used: Buffer,
}

impl Ring {
    /// Takes memory for a ring of `size` descriptors and clears it.
    #[must_use]
    pub fn new(memory: &Arc<Memory>, size: u16) -> Self {
        let len = u64::from(size);
        let ring = Self {
            memory: Arc::clone(memory),
            size,
            table: memory.allocate(Descriptor::LEN_BYTES * len, 16),
            available: memory.allocate(6 + 2 * len, 2),
            used: memory.allocate(6 + 8 * len, 4),
        };
        ring.clear();
        ring
    }

    /// Zeros everything, as a driver does before it starts a queue anew.
    pub fn clear(&self) {
        let len = usize::from(self.size);
        self.table.write(&vec![0; 16 * len]);
        self.available.write(&vec![0; 6 + 2 * len]);
        self.used.write(&vec![0; 6 + 8 * len]);
    }

    /// Sets both indexes, as in the memory of a guest that came from elsewhere.
    pub fn set_indexes(&self, index: u16) {
        self.memory.store_u16(self.available.at() + 2, index);
        self.memory.store_u16(self.used.at() + 2, index);
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest addresses of the table, the available ring and the used ring.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [self.table.at(), self.available.at(), self.used.at()]
    }

    /// Writes a descriptor of the table.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        let at = self.table.at() + u64::from(index) * Descriptor::LEN_BYTES;
        self.memory.write(at, &descriptor.to_bytes());
    }

    /// Writes the element that belongs to the available index `index`.
    pub fn set_available(&self, index: u16, head: u16) {
        let slot = u64::from(index % self.size);
        self.memory
            .store_u16(self.available.at() + 4 + 2 * slot, head);
    }

    /// Shows the device all elements before `index`.
    pub fn set_available_index(&self, index: u16) {
        self.memory.store_u16(self.available.at() + 2, index);
        fence(Ordering::SeqCst); // before the device's wish for a kick is read
    }

    /// `VIRTQ_AVAIL_F_NO_INTERRUPT`: 1 asks the device not to call.
    pub fn set_available_flags(&self, flags: u16) {
        self.memory.store_u16(self.available.at(), flags);
        fence(Ordering::SeqCst); // before the used index is looked at again
    }

    /// `used_event`: the device calls when it fills the element with this index.
    pub fn set_used_event(&self, index: u16) {
        let at = self.available.at() + 4 + 2 * u64::from(self.size);
        self.memory.store_u16(at, index);
        fence(Ordering::SeqCst); // before the used index is looked at again
    }

    /// How far the device says it has come.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.memory.load_u16(self.used.at() + 2)
    }

    /// `VIRTQ_USED_F_NO_NOTIFY`: 1 asks the driver not to kick.
    #[must_use]
    pub fn used_flags(&self) -> u16 {
        self.memory.load_u16(self.used.at())
    }

    /// `avail_event`: the driver kicks when it fills the element with this index.
    #[must_use]
    pub fn available_event(&self) -> u16 {
        self.memory
            .load_u16(self.used.at() + 4 + 8 * u64::from(self.size))
    }

    /// Reads the element that belongs to the used index `index`.
    #[must_use]
    pub fn used(&self, index: u16) -> Used {
        let at = self.used.at() + 4 + 8 * u64::from(index % self.size);
        let bytes = self.memory.read(at, 8);
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Used {
            head: word(0),
            len_bytes: word(4),
        }
    }
}

/// Whether an index that moved from `old` to `new` passed `event`.
#[must_use]
pub(super) fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_passed_also_where_indexes_wrap() {
        assert!(passed(5, 6, 5));
        assert!(!passed(6, 6, 5));
        assert!(!passed(4, 6, 5));
        assert!(passed(0xffff, 0, 0xffff));
        assert!(passed(1, 3, 0xfffe));
        assert!(!passed(0xfffd, 3, 0xfffe));
    }
}
