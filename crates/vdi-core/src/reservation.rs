//! What one write holds while it is under way, and gives back if it fails.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::block_map::BlockMapEntry;
use crate::disk::Disk;
use crate::units::{DiskBlock, FileOffset};
use crate::visit::Visit;
use crate::writer::{lock, wake};

pub(crate) type Changes = SmallVec<[(DiskBlock, BlockMapEntry); 2]>;
pub(crate) type WriteExtents = SmallVec<[WriteExtent; 2]>;

/// What one write changes, kept for it until [`Disk::commit`].
///
/// Dropping it gives all back and leaves the disk as it was.
#[derive(Debug)]
#[must_use = "a reservation that is dropped undoes the write"]
pub struct Reservation {
    pub(crate) extents: WriteExtents,
    pub(crate) zeros: WriteExtents,
    pub(crate) keeps_space: bool,
    pub(crate) fills: Vec<Fill>,
    /// New entries of blocks in transition; the disk is there if there are any.
    pub(crate) changes: Changes,
    pub(crate) disk: Option<Arc<Disk>>,
    pub(crate) publish: Publish,
    /// W4: the blocks behind the extents stay this request's until it ends.
    pub(crate) _visit: Visit,
}

/// What a write holds that changes no entry. Dropping it leaves everything as it is.
#[derive(Debug)]
#[must_use = "a write in place is over when it is committed"]
pub struct InPlace {
    pub(crate) extents: WriteExtents,
    /// W4, as in [`Reservation`].
    pub(crate) _visit: Visit,
}

impl InPlace {
    /// Where the data go, in the order of the disk, neighbours merged.
    pub fn extents(&self) -> &[WriteExtent] {
        &self.extents
    }
}

/// When the entries of a reservation may be written (W2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Publish {
    /// At once: the disk read zeros where its new blocks are, as they do.
    WhenWritten,
    /// A parent's data showed there, so the whole blocks must be durable first.
    WhenSynced,
}

impl Reservation {
    /// One that changes nothing.
    pub(crate) fn empty(visit: Visit) -> Self {
        Self {
            extents: WriteExtents::new(),
            zeros: WriteExtents::new(),
            keeps_space: false,
            fills: Vec::new(),
            changes: Changes::new(),
            disk: None,
            publish: Publish::WhenWritten,
            _visit: visit,
        }
    }

    /// Where the data go, in the order of the disk, neighbours merged.
    pub fn extents(&self) -> &[WriteExtent] {
        &self.extents
    }

    /// Whether it takes blocks that hold nothing yet.
    pub fn allocates(&self) -> bool {
        let is_allocated = |entry| matches!(entry, BlockMapEntry::Allocated(_));
        self.changes.iter().any(|(_, entry)| is_allocated(*entry))
    }

    /// Whether its commit writes to the block map.
    pub fn changes_entries(&self) -> bool {
        !self.changes.is_empty()
    }

    /// What is to be made zeros in the top image's file: punched out of it, or zeroed in place if
    /// [`Self::keeps_space`]. Empty for writes of data.
    pub fn zeros(&self) -> &[WriteExtent] {
        &self.zeros
    }

    /// Whether [`Self::zeros`] stay allocated in the file, as in a fixed image.
    pub const fn keeps_space(&self) -> bool {
        self.keeps_space
    }

    /// What is to be copied from parents, around the data (copy-on-write). No fill overlaps an
    /// extent or another fill, so the order does not matter.
    pub fn fills(&self) -> &[Fill] {
        &self.fills
    }

    /// How many bytes of the file it changes, apart from its entries.
    pub(crate) fn bytes(&self) -> u64 {
        let filled: u64 = self.fills.iter().map(|fill| fill.len_bytes).sum();
        bytes_of(&self.extents) + bytes_of(&self.zeros) + filled
    }

    /// Whether data and fills must be synced before [`Disk::commit`], see [`Disk::begin_data_sync`].
    pub const fn needs_sync(&self) -> bool {
        matches!(self.publish, Publish::WhenSynced)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(disk) = self.disk.take() else { return };
        let Some(writer) = &disk.writer else { return };
        let mut state = lock(&writer.state);
        for (disk_block, entry) in self.changes.drain(..) {
            state.in_transition.remove(&disk_block);
            if let BlockMapEntry::Allocated(file_block) = entry {
                state.room.give_back(file_block);
                state.forget_that_it_is_full();
            }
        }
        wake(&mut state.parked);
    }
}

/// A run of bytes to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteExtent {
    /// The first byte in the image's file.
    pub at: FileOffset,
    /// How many.
    pub len_bytes: u64,
}

/// A run of bytes to copy from a parent into the top image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// Which image has them: 1 for the top image's parent, and so on.
    pub depth: usize,
    /// The first byte in that image's file.
    pub from: FileOffset,
    /// Where it goes in the top image's file.
    pub to: FileOffset,
    /// How many.
    pub len_bytes: u64,
}

impl Fill {
    /// A part of it, in bytes from its first one.
    pub fn part(&self, bytes: &Range<u64>) -> Self {
        Self {
            from: self.from.plus(bytes.start),
            to: self.to.plus(bytes.start),
            len_bytes: bytes.end - bytes.start,
            ..*self
        }
    }
}

/// What came of [`Disk::reserve`].
#[derive(Debug)]
#[must_use = "a reservation that is dropped undoes the write"]
pub enum Reserve {
    /// Write the data now.
    Ready(Reservation),
    /// Call again when the waker was woken; nothing is held until then.
    Parked,
}

/// The duty to sync the image's file and to tell [`Disk::end_flush`].
#[derive(Debug)]
#[must_use = "without `end_flush` the same is synced again by the next flush"]
pub struct Flush {
    pub(crate) covers: u64,
    pub(crate) unsynced_bytes: u64,
}

impl Flush {
    /// How many bytes were committed since the last sync, or more: how much the sync has to bring to the storage.
    pub const fn unsynced_bytes(&self) -> u64 {
        self.unsynced_bytes
    }
}

/// How many bytes extents have.
pub(crate) fn bytes_of(extents: &[WriteExtent]) -> u64 {
    extents.iter().map(|extent| extent.len_bytes).sum()
}

pub(crate) fn push_merged(extents: &mut WriteExtents, next: WriteExtent) {
    match extents.last_mut() {
        Some(last) if last.at.plus(last.len_bytes) == next.at => last.len_bytes += next.len_bytes,
        _ => extents.push(next),
    }
}
