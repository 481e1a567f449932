//! Descriptor chains of a split virtqueue: from a head to the guest memory it names.
//!
//! Not a parser of requests (`request`), and not a judge of their layout: a driver may cut a request into
//! descriptors as it likes. `virtio-queue`'s own `DescriptorChain` ends silently at a bad descriptor, so that
//! a cut chain looks complete, and allows tables of 65535 entries; hence this walker.
//!
//! - **R3** Each descriptor is copied out of guest memory once, before it is judged.
//! - A [`Chain`] is complete: it was followed to its last descriptor.
//!
//! Source: virtio 1.2 sections 2.7.4 to 2.7.5 (message framing, descriptor table).

use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestAddress};

use crate::access;
use crate::memory::Memory;

/// Most descriptors of one chain: the kernel's UIO_MAXIOV and QEMU's limit; without it a guest could have us
/// walk 65536 descriptors per request.
pub(crate) const MAX_DESCRIPTORS: usize = 1024;

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u64 = 16;

/// A run of guest memory that one descriptor names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Its first byte, not yet known to lie in the guest's memory.
    pub(crate) at: GuestAddress,
    /// Its length in bytes, never zero in a [`Chain`].
    pub(crate) len: u32,
}

/// Runs of guest memory in the driver's order.
pub(crate) type Pieces = SmallVec<[Piece; 4]>;

/// What a chain offers: bytes to read, then bytes to write.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// What the device may read.
    pub(crate) readable: Pieces,
    /// What the device may write.
    pub(crate) writable: Pieces,
    /// Whether a readable descriptor came after a writable one, which virtio 1.2 section 2.7.4.2 forbids.
    pub(crate) out_of_order: bool,
}

/// Why a chain cannot be followed to its end. The driver has lost its way, so the ring stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChainError {
    /// A `next` or head outside the table.
    #[error("descriptor {index} is outside a table of {table_len}")]
    OutsideTable { index: u16, table_len: u32 },
    /// A table outside the guest's memory.
    #[error("descriptor at {at:#x} is outside the guest's memory")]
    Unreadable { at: u64 },
    /// A loop, or more than anyone needs.
    #[error("the chain has more than {limit} descriptors or is a loop")]
    TooLong { limit: usize },
    /// An indirect descriptor inside an indirect table.
    #[error("an indirect table contains an indirect descriptor")]
    NestedIndirect,
    /// An indirect descriptor that also has a `next`.
    #[error("an indirect descriptor has a next descriptor")]
    IndirectWithNext,
    /// An indirect table that is no array of descriptors.
    #[error("an indirect table of {len} bytes is not made of 16-byte descriptors")]
    IndirectLength { len: u32 },
}

/// Follows the chain of `head` in the queue's descriptor table of `queue_size` entries.
pub(crate) fn walk(
    memory: &Memory,
    table: GuestAddress,
    queue_size: u16,
    head: u16,
) -> Result<Chain, ChainError> {
    let mut table = Table {
        at: table,
        len: u32::from(queue_size),
        indirect: false,
    };
    let mut chain = Chain::default();
    let mut index = head;
    for _ in 0..MAX_DESCRIPTORS {
        let descriptor = table.read(memory, index)?;
        if descriptor.refers_to_indirect_table() {
            table = table.enter(&descriptor)?;
            index = 0;
            continue;
        }
        chain.push(&descriptor);
        if !descriptor.has_next() {
            return Ok(chain);
        }
        index = descriptor.next();
    }
    Err(ChainError::TooLong {
        limit: MAX_DESCRIPTORS,
    })
}

impl Chain {
    fn push(&mut self, descriptor: &Descriptor) {
        let piece = Piece {
            at: descriptor.addr(),
            len: descriptor.len(),
        };
        if descriptor.is_write_only() {
            if piece.len > 0 {
                self.writable.push(piece);
            }
        } else if piece.len > 0 {
            self.out_of_order |= !self.writable.is_empty();
            self.readable.push(piece);
        }
    }
}

/// A table of descriptors: the queue's, or an indirect one.
struct Table {
    at: GuestAddress,
    len: u32,
    indirect: bool,
}

impl Table {
    fn read(&self, memory: &Memory, index: u16) -> Result<Descriptor, ChainError> {
        if u32::from(index) >= self.len {
            return Err(ChainError::OutsideTable {
                index,
                table_len: self.len,
            });
        }
        let offset = u64::from(index) * DESCRIPTOR_BYTES;
        let at = self.at.checked_add(offset);
        at.and_then(|at| access::read(memory, at).ok())
            .ok_or(ChainError::Unreadable {
                at: self.at.0.wrapping_add(offset),
            })
    }

    /// The table that an indirect descriptor names. Its WRITE flag means nothing (virtio 1.2 section 2.7.5.3.2).
    fn enter(&self, descriptor: &Descriptor) -> Result<Self, ChainError> {
        let len = descriptor.len();
        if self.indirect {
            return Err(ChainError::NestedIndirect);
        }
        if descriptor.has_next() {
            return Err(ChainError::IndirectWithNext);
        }
        if len == 0 || u64::from(len) % DESCRIPTOR_BYTES != 0 {
            return Err(ChainError::IndirectLength { len });
        }
        let len = len / 16;
        Ok(Self {
            at: descriptor.addr(),
            len,
            indirect: true,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use vhost::vhost_user::message::VhostUserMemoryRegion;
    use vm_memory::Bytes;

    use super::*;
    use crate::fault::Account;
    use crate::memory::{Region, from_regions};

    pub(crate) const NEXT: u16 = 1;
    pub(crate) const WRITE: u16 = 2;
    pub(crate) const INDIRECT: u16 = 4;
    /// Where tests keep the queue's descriptor table.
    pub(crate) const TABLE: GuestAddress = GuestAddress(0);

    /// 1 MiB of guest memory in two regions that touch at 512 KiB.
    pub(crate) fn memory() -> Memory {
        let half = 0x8_0000;
        let account = Account::default();
        let region = |at| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(half).unwrap();
            let region = VhostUserMemoryRegion::new(at, half, at, 0);
            Arc::new(Region::map(&region, file, &account).unwrap())
        };
        from_regions(vec![region(0), region(half)]).unwrap()
    }

    pub(crate) fn put(memory: &Memory, table: GuestAddress, descriptors: &[(u64, u32, u16, u16)]) {
        for (index, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
            let at = GuestAddress(table.0 + 16 * index as u64);
            memory
                .write_obj(Descriptor::new(addr, len, flags, next), at)
                .unwrap();
        }
    }

    fn walked(descriptors: &[(u64, u32, u16, u16)], head: u16) -> Result<Chain, ChainError> {
        let memory = memory();
        put(&memory, TABLE, descriptors);
        walk(&memory, TABLE, 16, head)
    }

    #[test]
    fn a_chain_is_followed_in_its_own_order() {
        let table = [
            (0x1000, 512, WRITE, 0),
            (0x2000, 16, NEXT, 3),
            (0, 0, 0, 0),
            (0x3000, 8, NEXT | WRITE, 0),
        ];
        let chain = walked(&table, 1).unwrap();
        assert_eq!(
            chain.readable[..],
            [Piece {
                at: GuestAddress(0x2000),
                len: 16
            }]
        );
        let writable = [
            Piece {
                at: GuestAddress(0x3000),
                len: 8,
            },
            Piece {
                at: GuestAddress(0x1000),
                len: 512,
            },
        ];
        assert_eq!(chain.writable[..], writable);
        assert!(!chain.out_of_order);
    }

    #[test]
    fn an_indirect_table_may_follow_normal_descriptors_whatever_its_write_flag() {
        let memory = memory();
        put(
            &memory,
            TABLE,
            &[(0x1000, 16, NEXT, 1), (0x4000, 32, INDIRECT | WRITE, 9)],
        );
        put(
            &memory,
            GuestAddress(0x4000),
            &[(0x2000, 512, NEXT, 1), (0x3000, 1, WRITE, 7)],
        );
        let chain = walk(&memory, TABLE, 16, 0).unwrap();
        assert_eq!(chain.readable.len(), 2);
        assert_eq!(
            chain.writable[..],
            [Piece {
                at: GuestAddress(0x3000),
                len: 1
            }]
        );
    }

    #[test]
    fn empty_descriptors_are_skipped() {
        let table = [
            (0x1000, 0, NEXT | WRITE, 1),
            (0x2000, 16, NEXT, 2),
            (0x3000, 1, WRITE, 0),
        ];
        let chain = walked(&table, 0).unwrap();
        assert_eq!((chain.readable.len(), chain.writable.len()), (1, 1));
        assert!(!chain.out_of_order);
    }

    #[test]
    fn readable_after_writable_is_noticed() {
        let table = [(0x1000, 1, NEXT | WRITE, 1), (0x2000, 16, 0, 0)];
        assert!(walked(&table, 0).unwrap().out_of_order);
    }

    #[test]
    fn a_chain_that_leaves_its_table_is_refused() {
        let table = [(0x1000, 16, NEXT, 16)];
        let outside = |index, table_len| Err(ChainError::OutsideTable { index, table_len });
        assert_eq!(walked(&table, 0), outside(16, 16));
        assert_eq!(walked(&table, 16), outside(16, 16));
        let memory = memory();
        put(&memory, TABLE, &[(0x4000, 32, INDIRECT, 0)]);
        put(&memory, GuestAddress(0x4000), &[(0x2000, 512, NEXT, 2)]);
        assert_eq!(walk(&memory, TABLE, 16, 0), outside(2, 2));
    }

    #[test]
    fn a_loop_is_refused() {
        let table = [(0x1000, 16, NEXT, 1), (0x1000, 16, NEXT, 0)];
        assert_eq!(
            walked(&table, 0),
            Err(ChainError::TooLong {
                limit: MAX_DESCRIPTORS
            })
        );
    }

    #[test]
    fn bad_indirect_tables_are_refused() {
        for len in [0, 8, 17] {
            let refused = Err(ChainError::IndirectLength { len });
            assert_eq!(walked(&[(0x4000, len, INDIRECT, 0)], 0), refused);
        }
        let with_next = walked(&[(0x4000, 16, INDIRECT | NEXT, 1)], 0);
        assert_eq!(with_next, Err(ChainError::IndirectWithNext));
        let unreadable = walked(&[(0x10_0000, 16, INDIRECT, 0)], 0);
        assert_eq!(unreadable, Err(ChainError::Unreadable { at: 0x10_0000 }));
        let overflow = walked(&[(u64::MAX - 15, 48, INDIRECT, 0)], 0);
        assert!(matches!(overflow, Err(ChainError::Unreadable { .. })));
        let memory = memory();
        put(&memory, TABLE, &[(0x4000, 16, INDIRECT, 0)]);
        put(&memory, GuestAddress(0x4000), &[(0x4000, 16, INDIRECT, 0)]);
        assert_eq!(walk(&memory, TABLE, 16, 0), Err(ChainError::NestedIndirect));
    }

    #[test]
    fn a_chain_has_no_more_descriptors_than_are_allowed() {
        let most = u32::try_from(MAX_DESCRIPTORS).unwrap();
        // The one that names the table counts.
        for (inner, is_allowed) in [(most - 1, true), (most, false)] {
            let memory = memory();
            let table: Vec<_> = (0..inner)
                .map(|nth| {
                    let is_last = nth + 1 == inner;
                    let next = u16::try_from(nth + 1).unwrap();
                    (0x1000, 1, if is_last { 0 } else { NEXT }, next)
                })
                .collect();
            put(&memory, GuestAddress(0x2_0000), &table);
            put(&memory, TABLE, &[(0x2_0000, 16 * inner, INDIRECT, 0)]);
            let chain = walk(&memory, TABLE, 16, 0);
            assert_eq!(chain.is_ok(), is_allowed, "{inner}");
        }
    }
}
