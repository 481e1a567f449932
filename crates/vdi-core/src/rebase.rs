//! Giving a child another parent, or none.
//!
//! First the child gets, as blocks of its own, what would otherwise read differently: with its old
//! parent it reads as before all the while. When that is durable, one write of the header
//! (`link.rs`) switches. What a child reads as does not change, so its `uuid_modify`
//! stays and its own children stay valid. (A child of version 0 has no place for the state of its parent
//! that it knows: it takes any, before and after.)

use std::io;
use std::sync::Arc;

use uuid::Uuid;

use crate::batch::{self, Batch};
use crate::block_map::BlockMapEntry;
use crate::chores::Modified;
use crate::convert::is_zero;
use crate::disk::{Disk, ReadError, Source, WriteError};
use crate::format::RawHeader;
use crate::header::{Header, HeaderError, ImageKind};
use crate::link::{self, Link};
use crate::storage::{Access, Storage};
use crate::units::{DiskBlock, Span};

/// Blocks that are changed with one write of the map.
const BATCH: usize = 1024;

/// What a child got of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Blocks that were copied from the old parents.
    pub blocks_copied: u32,
    /// Blocks of zeros that hide what the new parent has there.
    pub blocks_zeroed: u32,
}

/// Gives a child all that its parents have, and makes it an image without a parent. Closes it.
/// `progress` is told blocks done, and of how many.
///
/// # Errors
/// If the image has no parent or the host fails: the child then reads as before.
pub fn flatten(
    child: &Arc<Disk>,
    progress: &mut dyn FnMut(u32, u32),
) -> Result<Copied, RebaseError> {
    if child.headers().len() == 1 {
        return Err(RebaseError::NoParent);
    }
    check_child(child.header(), None)?;
    let copied = copy(child, None, progress)?;
    switch(&*child.top().storage, Link::Base)?;
    Ok(copied)
}

/// Makes `parent` the parent of an image, which keeps its contents, and closes the image.
///
/// # Errors
/// If that cannot be its parent, or the host fails: the image then reads as before.
pub fn rebase(
    child: &Arc<Disk>,
    parent: &Disk,
    progress: &mut dyn FnMut(u32, u32),
) -> Result<Copied, RebaseError> {
    check_child(child.header(), Some(parent))?;
    let copied = copy(child, Some(parent), progress)?;
    switch(
        &*child.top().storage,
        Link::ChildOf(parent.header().as_parent()),
    )?;
    Ok(copied)
}

/// Makes `parent` the parent of the image in a file and copies nothing: where the image has
/// nothing it shows whatever the new parent has there.
///
/// # Errors
/// If that cannot be its parent, or the host fails.
pub fn rebase_unsafe(child: &dyn Storage, parent: &Disk) -> Result<(), RebaseError> {
    let raw = RawHeader::read(child).map_err(|source| RebaseError::Link { source })?;
    let header = Header::check(raw, Access::Writable)?;
    check_child(&header, Some(parent))?;
    switch(child, Link::ChildOf(parent.header().as_parent()))
}

/// Whether the image in a file may have this parent: not if it would be its own ancestor.
///
/// # Errors
/// If not, or if the file cannot be read.
pub fn check_ancestry(child: &dyn Storage, parent: &Disk) -> Result<(), RebaseError> {
    let raw = RawHeader::read(child).map_err(|source| RebaseError::Link { source })?;
    check_loop(raw.uuid_image.get(), parent)
}

fn check_loop(child: Uuid, parent: &Disk) -> Result<(), RebaseError> {
    if parent.headers().any(|header| header.uuid_image() == child) {
        return Err(RebaseError::Loop { child });
    }
    Ok(())
}

fn check_child(header: &Header, parent: Option<&Disk>) -> Result<(), RebaseError> {
    if header.kind() == ImageKind::Fixed {
        return Err(RebaseError::Fixed);
    }
    let Some(parent) = parent else { return Ok(()) };
    check_loop(header.uuid_image(), parent)?;
    if parent.header().uuid_image().is_nil() {
        return Err(RebaseError::ParentWithoutName);
    }
    Ok(())
}

fn switch(child: &dyn Storage, link: Link) -> Result<(), RebaseError> {
    link::switch(child, link).map_err(|source| RebaseError::Link { source })
}

/// Gives the child what it must have of its own, and closes it.
fn copy(
    child: &Arc<Disk>,
    parent: Option<&Disk>,
    progress: &mut dyn FnMut(u32, u32),
) -> Result<Copied, RebaseError> {
    let copied = copy_blocks(child, parent, progress);
    // Whatever failed: where the host is full, room that was not used is missed most.
    let closed = child.close();
    let copied = copied?;
    closed?;
    Ok(copied)
}

fn copy_blocks(
    child: &Arc<Disk>,
    parent: Option<&Disk>,
    progress: &mut dyn FnMut(u32, u32),
) -> Result<Copied, RebaseError> {
    child.begin_maintenance(Modified::Places)?;
    let open: Vec<_> = (0..)
        .map(DiskBlock::new)
        .zip(child.entries())
        .filter(|(_, entry)| *entry == BlockMapEntry::Unallocated)
        .map(|(block, _)| block)
        .collect();
    let total = u32::try_from(open.len()).expect("block numbers have 32 bits");
    let mut batch = Batch::new(child, batch::MOST_BYTES);
    let (mut old, mut new) = (Vec::new(), Vec::new());
    let (mut zeros, mut blocks_copied) = (Vec::new(), 0);
    for (done, block) in (0..).zip(open) {
        progress(done, total);
        match compare(child, parent, block, &mut old, &mut new)? {
            Need::Nothing => {}
            Need::Zeros => zeros.push(block),
            Need::Copy => {
                let range = child.capacity().range_of_bytes(child.bytes_of_block(block));
                batch.write(range.expect("blocks end with a sector or the disk"), &old)?;
                blocks_copied += 1;
            }
        }
    }
    batch.finish()?;
    for blocks in zeros.chunks(BATCH) {
        child.replace_entries(blocks, BlockMapEntry::Zero)?;
    }
    progress(total, total);
    Ok(Copied {
        blocks_copied,
        blocks_zeroed: u32::try_from(zeros.len()).expect("block numbers have 32 bits"),
    })
}

/// What a block without an entry needs, to read with the new parent as it does now.
enum Need {
    Nothing,
    Zeros,
    /// What `old` holds now.
    Copy,
}

fn compare(
    child: &Disk,
    parent: Option<&Disk>,
    block: DiskBlock,
    old: &mut Vec<u8>,
    new: &mut Vec<u8>,
) -> Result<Need, ReadError> {
    let bytes = child.bytes_of_block(block);
    let len_bytes = bytes.end - bytes.start;
    let shown = parent.and_then(|parent| {
        let end = bytes.end.min(parent.capacity().bytes());
        let range = parent.capacity().range_of_bytes(bytes.start..end)?;
        Some((parent, range))
    });
    let is_stored = |source| matches!(source, Source::Stored { .. });
    let old_has = child
        .parents_of(block)
        .any(|extent| is_stored(extent.source));
    let new_has = shown.is_some_and(|(parent, range)| {
        let lane = parent.lane();
        let visit = lane.enter();
        parent
            .map(range, &visit)
            .any(|extent| is_stored(extent.source))
    });
    if !old_has && !new_has {
        return Ok(Need::Nothing);
    }
    let len = usize::try_from(len_bytes).expect("a block fits in memory");
    old.resize(len, 0);
    let span = Span {
        block,
        skip_bytes: 0,
        len_bytes,
    };
    child.read_parents(span, old)?;
    new.clear();
    new.resize(len, 0);
    if let Some((parent, range)) = shown {
        let shown_len = usize::try_from(range.len_bytes()).expect("a block fits in memory");
        parent.read_at(range, &mut new[..shown_len])?;
    }
    Ok(match (old == new, is_zero(old)) {
        (true, _) => Need::Nothing,
        (false, true) => Need::Zeros,
        (false, false) => Need::Copy,
    })
}

/// Why an image could not get another parent.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum RebaseError {
    #[error("the image has no parent, so it is flat already")]
    NoParent,
    #[error("a fixed image holds all of its contents and can have no parent")]
    Fixed,
    #[error("the new parent is the image {child} itself or has it as an ancestor")]
    Loop { child: Uuid },
    #[error("the new parent has a null uuid_image, so no child can name it; run `vdi repair`")]
    ParentWithoutName,
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("cannot read what is to be kept")]
    Read(#[from] ReadError),
    #[error("cannot write to the image; it reads as before")]
    Write(#[from] WriteError),
    #[error("cannot read or change the image's header")]
    Link { source: io::Error },
}
