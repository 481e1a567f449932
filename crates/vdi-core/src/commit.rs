//! Merging a child into its parent.
//!
//! ```text
//! 1  the child forgets the parent's uuid_modify ─► synced
//! 2  the parent gets what the child has ─► closed, synced
//! 3  the child's entries become FREE ─► synced ─► closed
//! 4  the child learns the parent's new uuid_modify ─► synced
//! ```
//!
//! After a crash at any instant the child reads as before: until 3 it has all that 2 changes in the
//! parent, and no entry of 3 goes before the parent is durable. Nor is a block of the child punched
//! before its entry is gone for good: it would read as zeros. Doing all of it again completes it.
//! A child of version 0 never knows a state of its parent, so 1 and 4 change nothing in it.

pub mod live;

use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use uuid::Uuid;

use crate::batch::{self, Batch};
use crate::block_map::BlockMapEntry;
use crate::chores::Modified;
use crate::convert::is_zero;
use crate::disk::{Disk, ModifiedParent, ReadError, WriteError, Zeroing};
use crate::format::RawHeader;
use crate::header::ParentLink;
use crate::image::OpenError;
use crate::link::{self, Link};
use crate::resize::{self, ResizeError};
use crate::storage::{Access, Storage};
use crate::units::{Capacity, DiskBlock, SectorRange, Span};

/// Blocks that are changed with one write of the map.
const BATCH: usize = 1024;
/// How much of the parent is compared at a time.
const PIECE_BYTES: usize = 256 << 10;

/// What a merge did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Blocks of the child that were written into the parent.
    pub blocks_written: u32,
    /// Blocks of the child that are zeros in the parent now.
    pub blocks_zeroed: u32,
    /// The parent's new size, if it had to grow.
    pub grown_to: Option<Capacity>,
}

/// Merges the first image of a chain into the second, and empties it. Both must be writable and
/// nobody else's; the others are only read. `progress` is told blocks done, and of how many.
///
/// # Errors
/// If the images cannot be opened, or the host fails: the child then reads as before.
pub fn commit(
    chain: &[Arc<dyn Storage>],
    modified: ModifiedParent,
    progress: &mut dyn FnMut(u32, u32),
) -> Result<Merged, CommitError> {
    let open = |images: &[Arc<dyn Storage>]| {
        Disk::open_chain(images.to_vec(), Access::Writable, modified).map(Arc::new)
    };
    let child = open(chain).map_err(|source| CommitError::OpenChild { source })?;
    let [_, parents @ ..] = chain else {
        return Err(CommitError::NoParent);
    };
    let Some(parent_file) = parents.first() else {
        return Err(CommitError::NoParent);
    };
    let open_parent = || open(parents).map_err(|source| CommitError::OpenParent { source });
    let mut parent = open_parent()?;
    let grown_to = (parent.capacity() < child.capacity()).then(|| child.capacity());
    if let Some(to) = grown_to {
        grow(&parent, to)?;
        drop(parent);
        parent = open_parent()?;
    }
    child.begin_maintenance(Modified::Places)?;
    let uuid_image = parent.header().uuid_image();
    set_link(&child, uuid_image, Uuid::nil())?;
    let mut all = |done, total| {
        progress(done, total);
        ControlFlow::Continue(())
    };
    let merged = Merge::new(&child, &parent, batch::MOST_BYTES).run(&mut all);
    // Whatever failed: where the host is full, room that was not used is missed most.
    let closed = parent.close().map_err(CommitError::Parent);
    let merged = merged?.expect("nobody stops it");
    closed?;
    empty(&child)?;
    let renewed = RawHeader::read(&**parent_file).map_err(|source| CommitError::Link { source })?;
    set_link(&child, uuid_image, renewed.uuid_modify.get())?;
    Ok(Merged { grown_to, ..merged })
}

fn grow(parent: &Arc<Disk>, to: Capacity) -> Result<(), CommitError> {
    let failed = |source| CommitError::Grow {
        to: to.bytes(),
        source,
    };
    let plan = resize::plan(parent, to).map_err(failed)?;
    resize::apply(parent, &plan).map_err(failed)
}

fn set_link(child: &Disk, uuid_image: Uuid, uuid_modify: Uuid) -> Result<(), CommitError> {
    let parent = ParentLink {
        uuid_image,
        uuid_modify,
    };
    link::switch(&*child.top().storage, Link::ChildOf(parent))
        .map_err(|source| CommitError::Link { source })
}

/// Lets the child show its parent everywhere. The parent is durable.
fn empty(child: &Arc<Disk>) -> Result<(), CommitError> {
    let own: Vec<_> = own_blocks(child).map(|(block, _)| block).collect();
    for batch in own.chunks(BATCH) {
        child.replace_entries(batch, BlockMapEntry::Unallocated)?;
    }
    // Only now may blocks be punched.
    child.flush()?;
    child.do_chores()?;
    child.close_moving(u64::MAX)?;
    Ok(())
}

fn own_blocks(child: &Disk) -> impl Iterator<Item = (DiskBlock, BlockMapEntry)> {
    (0..)
        .map(DiskBlock::new)
        .zip(child.entries())
        .filter(|(_, entry)| *entry != BlockMapEntry::Unallocated)
}

/// The second step: what it has done, and what it is about to do.
struct Merge<'d> {
    child: &'d Disk,
    parent: &'d Arc<Disk>,
    batch: Batch<'d>,
    /// A run that is to become zeros.
    zeros: Range<u64>,
    merged: Merged,
}

impl<'d> Merge<'d> {
    fn new(child: &'d Disk, parent: &'d Arc<Disk>, batch_bytes: u64) -> Self {
        Self {
            child,
            parent,
            batch: Batch::new(parent, batch_bytes),
            zeros: 0..0,
            merged: Merged::default(),
        }
    }

    /// `None` if it was told to stop.
    fn run(
        mut self,
        progress: &mut dyn FnMut(u32, u32) -> ControlFlow<()>,
    ) -> Result<Option<Merged>, CommitError> {
        let own: Vec<_> = own_blocks(self.child).collect();
        let total = u32::try_from(own.len()).expect("block numbers have 32 bits");
        let mut buf = Vec::new();
        for (done, (block, entry)) in (0..).zip(own) {
            if progress(done, total).is_break() {
                self.batch.finish().map_err(CommitError::Parent)?;
                return Ok(None);
            }
            self.merge_block(block, entry, &mut buf)?;
        }
        self.zero_run().map_err(CommitError::Parent)?;
        self.batch.finish().map_err(CommitError::Parent)?;
        // It is done, whether there is more to go on with or not.
        let _ = progress(total, total);
        Ok(Some(self.merged))
    }

    fn merge_block(
        &mut self,
        block: DiskBlock,
        entry: BlockMapEntry,
        buf: &mut Vec<u8>,
    ) -> Result<(), CommitError> {
        let bytes = self.child.bytes_of_block(block);
        let len_bytes = bytes.end - bytes.start;
        buf.resize(
            usize::try_from(len_bytes).expect("a block fits in memory"),
            0,
        );
        if let BlockMapEntry::Allocated(_) = entry {
            let span = Span {
                block,
                skip_bytes: 0,
                len_bytes,
            };
            self.child.read_own(span, buf)?;
            if !is_zero(buf) {
                return self.write(bytes, buf);
            }
        }
        self.merged.blocks_zeroed += 1;
        if self.zeros.end != bytes.start {
            self.zero_run().map_err(CommitError::Parent)?;
            self.zeros.start = bytes.start;
        }
        self.zeros.end = bytes.end;
        Ok(())
    }

    /// Writes a block, unless the parent reads so already.
    fn write(&mut self, bytes: Range<u64>, buf: &[u8]) -> Result<(), CommitError> {
        if self.parent_has(bytes.start, buf)? {
            return Ok(());
        }
        self.merged.blocks_written += 1;
        let range = self.range(bytes);
        self.batch.write(range, buf).map_err(CommitError::Parent)
    }

    fn parent_has(&self, start: u64, buf: &[u8]) -> Result<bool, ReadError> {
        let mut found = [0; PIECE_BYTES];
        let mut at = start;
        for piece in buf.chunks(PIECE_BYTES) {
            let found = &mut found[..piece.len()];
            let end = at + piece.len() as u64;
            self.parent.read_at(self.range(at..end), found)?;
            if found != piece {
                return Ok(false);
            }
            at = end;
        }
        Ok(true)
    }

    fn zero_run(&mut self) -> Result<(), WriteError> {
        let bytes = std::mem::take(&mut self.zeros);
        if bytes.is_empty() {
            return Ok(());
        }
        // W7: a block of the parent that the batch holds would be waited for.
        self.batch.finish()?;
        self.parent.zero_at(self.range(bytes), Zeroing::Release)
    }

    fn range(&self, bytes: Range<u64>) -> SectorRange {
        let range = self.parent.capacity().range_of_bytes(bytes);
        range.expect("the parent is at least as large, and blocks end with a sector or the disk")
    }
}

impl Disk {
    /// The bytes of the disk in a block.
    pub(crate) fn bytes_of_block(&self, block: DiskBlock) -> Range<u64> {
        let size = self.header().block_size();
        let start = size.start_of(block);
        start..self.capacity().bytes().min(start + u64::from(size.bytes()))
    }
}

/// Why a child could not be merged.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum CommitError {
    #[error("cannot open the child")]
    OpenChild { source: OpenError },
    #[error("cannot open the parent for writing")]
    OpenParent { source: OpenError },
    #[error("the image has no parent to be merged into")]
    NoParent,
    #[error("the parent must grow to {to} bytes, the child's size, and cannot; see `vdi resize`")]
    Grow { to: u64, source: ResizeError },
    #[error(
        "the parent has {found} bytes, fewer than its child, {needed}; it can grow while nobody uses it (`vdi commit`, or `vdi resize`)"
    )]
    Smaller { found: u64, needed: u64 },
    #[error(
        "the parent has blocks where its map once was, and they must move first; run `vdi compact`"
    )]
    Away,
    #[error("cannot read what is to be merged")]
    Read(#[from] ReadError),
    #[error("cannot change the parent; the child reads as before, and a new attempt completes it")]
    Parent(#[source] WriteError),
    #[error("cannot change the child; it reads as before, and a new attempt completes it")]
    Child(#[from] WriteError),
    #[error(
        "cannot note in the child which state of the parent it belongs to; a new attempt completes it"
    )]
    Link { source: io::Error },
}
