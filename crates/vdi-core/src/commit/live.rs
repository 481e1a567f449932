//! Merging an image into its parent while a disk uses both: the image is frozen, and the disk writes to a child of it.
//!
//! ```text
//! 0  top ─► image ─► parent            the image forgets the parent's uuid_modify ─► synced
//! 1  the parent gets what the image has ─► closed, synced
//! 2  top ────────────► parent          one write of the top's header ─► synced
//! ```
//!
//! The image keeps its blocks, so what 1 changes in the parent nobody sees through it: whoever reads the disk may go on with the parent's
//! map as it was before. For that no block of the parent may move, since the one who reads it looks for it at its old place: it is closed as
//! it is, without the exact count that moving its last blocks into holes would give it.
//!
//! After a crash at any instant the top reads as before: until 2 the image has all that 1 changes, and after it the parent has. Doing 1 and 2
//! again completes it.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use uuid::Uuid;

use super::{CommitError, Merge, Merged};
use crate::disk::{Disk, ModifiedParent};
use crate::format::RawHeader;
use crate::header::{Header, HeaderError, ImageKind, ParentLink};
use crate::image::Image;
use crate::link::{self, Link};
use crate::storage::{Access, Storage};

/// How much is written between two syncs: little, since a guest may be waiting for its own.
const BATCH_BYTES: u64 = 8 << 20;

/// Why an image cannot forget its parent's state.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages are the documentation")]
pub enum LoosenError {
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("the image has no parent to be merged into")]
    NoParent,
    #[error("cannot read or change the image's header")]
    Io(#[from] io::Error),
}

/// Step 0: from now on the image takes its parent in any state. It must be closed, and nobody else's.
///
/// # Errors
/// If it has no parent or the host fails.
pub fn loosen(image: &dyn Storage) -> Result<(), LoosenError> {
    let header = Header::check(RawHeader::read(image)?, Access::Writable)?;
    let ImageKind::Differencing(link) = header.kind() else {
        return Err(LoosenError::NoParent);
    };
    let uuid_modify = Uuid::nil();
    let loose = Link::ChildOf(ParentLink {
        uuid_modify,
        ..link
    });
    Ok(link::switch(image, loose)?)
}

/// The reverse, when it was merged: from now on the image takes this parent as it is now only.
///
/// # Errors
/// If it is no child of it, or the host fails.
pub fn tighten(image: &dyn Storage, parent: &Header) -> Result<(), LoosenError> {
    let header = Header::check(RawHeader::read(image)?, Access::Writable)?;
    if loose_parent(&header) != Some(parent.uuid_image()) {
        return Err(LoosenError::NoParent);
    }
    Ok(link::switch(image, Link::ChildOf(parent.as_parent()))?)
}

/// The parent of an image that takes it in any state.
pub fn loose_parent(image: &Header) -> Option<Uuid> {
    match image.kind() {
        ImageKind::Differencing(link) if link.uuid_modify.is_nil() => Some(link.uuid_image),
        ImageKind::Differencing(_) | ImageKind::Dynamic | ImageKind::Fixed => None,
    }
}

/// Whether a child of these sizes can be merged into this parent while both are used.
///
/// # Errors
/// If the parent would have to grow, or blocks of it to move.
pub fn check(child: &Header, parent: &Image) -> Result<(), CommitError> {
    let (found, needed) = (parent.header().capacity(), child.capacity());
    if found < needed {
        let (found, needed) = (found.bytes(), needed.bytes());
        return Err(CommitError::Smaller { found, needed });
    }
    if parent.map.owned_end() > parent.header().blocks_in_image() {
        return Err(CommitError::Away);
    }
    Ok(())
}

/// Step 1: merges the first image of a chain, which stays as it is, into the second, which must be writable and nobody else's.
/// `progress` is told blocks done, and of how many, and says whether to go on; `None` if it did not.
///
/// # Errors
/// If the images cannot be opened, or the host fails: the image then reads as before.
pub fn merge(
    chain: &[Arc<dyn Storage>],
    modified: ModifiedParent,
    progress: &mut dyn FnMut(u32, u32) -> ControlFlow<()>,
) -> Result<Option<Merged>, CommitError> {
    let child = Disk::open_chain(chain.to_vec(), Access::ReadOnly, modified);
    let child = child.map_err(|source| CommitError::OpenChild { source })?;
    let parents = chain.get(1..).filter(|parents| !parents.is_empty());
    let parents = parents.ok_or(CommitError::NoParent)?.to_vec();
    let parent = Disk::open_chain(parents, Access::Writable, modified);
    let parent = Arc::new(parent.map_err(|source| CommitError::OpenParent { source })?);
    check(child.header(), parent.top())?;
    let merged = Merge::new(&child, &parent, BATCH_BYTES).run(progress)?;
    parent.close_moving(0).map_err(CommitError::Parent)?;
    Ok(merged)
}
