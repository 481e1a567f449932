//! What a clone is: a new image that reads as another one's whole chain.
//!
//! A linked clone is a child of it, a full one a copy. Both have a UUID of their own. A full one keeps
//! what the source says about itself besides, as VirtualBox's clones do: `uuid_modify`, the
//! comment and the geometry.

use std::io;
use std::mem::offset_of;

use zerocopy::IntoBytes;

use crate::create::{CreateOptions, NewKind};
use crate::disk::Disk;
use crate::format::RawHeader;
use crate::header::{Header, ImageKind};
use crate::storage::Storage;
use crate::units::FileOffset;

/// How to create a child of this disk's top image, with blocks of the same size unless another is given.
///
/// # Errors
/// If the image has no UUID by which a child could name it.
pub fn linked(disk: &Disk, block_size: Option<u32>) -> Result<CreateOptions, CloneError> {
    let parent = disk.header().as_parent();
    if parent.uuid_image.is_nil() {
        return Err(CloneError::WithoutName);
    }
    let like_it = options(disk, NewKind::Differencing(parent));
    Ok(CreateOptions {
        block_size: block_size.unwrap_or(like_it.block_size),
        ..like_it
    })
}

/// How to create an image to which this disk's contents can be copied.
pub fn full(disk: &Disk) -> CreateOptions {
    let kind = match disk.header().kind() {
        ImageKind::Fixed => NewKind::Fixed,
        ImageKind::Dynamic | ImageKind::Differencing(_) => NewKind::Dynamic,
    };
    options(disk, kind)
}

fn options(disk: &Disk, kind: NewKind) -> CreateOptions {
    CreateOptions {
        capacity_bytes: disk.capacity().bytes(),
        block_size: disk.header().block_size().bytes(),
        kind,
        uuid: None,
    }
}

/// Gives a closed full clone what its source says about itself, durably.
///
/// # Errors
/// If the host fails.
pub fn describe_as(clone: &dyn Storage, source: &Header) -> io::Result<()> {
    let mut raw = RawHeader::read(clone)?;
    raw.uuid_modify = source.raw().uuid_modify;
    raw.comment = source.raw().comment;
    let mut end = offset_of!(RawHeader, lchs_geometry);
    if source.raw().has_lchs() && raw.has_lchs() {
        raw.lchs_geometry = source.raw().lchs_geometry;
        raw.lchs_sector_size = source.raw().lchs_sector_size;
        end = size_of::<RawHeader>();
    }
    clone.write_all_at(&raw.as_bytes()[..end], FileOffset(0))?;
    clone.sync()
}

/// Why an image could not be cloned.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// A child names its parent by UUID.
    #[error("the image has a null uuid_image, so no child can name it; run `vdi repair`")]
    WithoutName,
}
