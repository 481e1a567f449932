//! What becomes of an image that was merged: it goes, or is an operator's, who asked for it to be kept.
//!
//! ```text
//! vm.vdi ─► vm.vdi.merging ─► parent                         the parent has all
//! vm.vdi ─► vm.vdi.merging, vm.vdi.merged ─► parent          one image with two names, durably
//! vm.vdi ─► parent ◄─ vm.vdi.merging, vm.vdi.merged          skipped
//! vm.vdi ─► parent ◄─ vm.vdi.merged                          it takes the parent as it is, and in no other state
//! ```
//!
//! So once the disk may do without the image, it has a name that no merge takes away. A merge that a crash ended goes on by the first name, or takes that
//! away alone. The image is no part of the disk any more and reads as the disk did when it was frozen, until something else is merged into the parent: then it is
//! refused, as all the parent's children are.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdi_core::commit::live::{self, LoosenError};
use vdi_core::{Access, FileError, Header, HostFile, Image, ImageKind, Locking};

use super::merge::numbered;
use crate::child::name_too;

/// What the name of an image ends with that was merged and kept.
const SUFFIX: &str = ".merged";

/// How many kept images of a disk there may be: as many as an operator may overlook.
const MOST_KEPT: usize = 1000;

/// What becomes of an image when it is merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Spent {
    #[default]
    Remove,
    Keep,
}

/// Why an image is not kept in its last state.
#[derive(Debug, thiserror::Error)]
pub(super) enum SettleError {
    #[error("cannot open it")]
    Open(#[from] FileError),
    #[error("it cannot remember the parent's state")]
    Link(#[from] LoosenError),
}

/// Gives what is merged of the disk's `image` the name that it keeps, durably. It may have that from a merge that ended before its end.
pub(super) fn name(image: &Path, merging: &Path) -> io::Result<PathBuf> {
    for nth in 1..=MOST_KEPT {
        let name = numbered(image, SUFFIX, nth);
        match name_too(merging, &name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            named => return named.map(|()| name),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// Has a kept image take the parent in the state that this is, and in no other.
pub(super) fn settle(kept: &Path, parent: &Header) -> Result<(), SettleError> {
    let file = HostFile::open(kept, Access::Writable, Locking::Locked)?;
    Ok(live::tighten(&file, parent)?)
}

/// Whether what an earlier merge into this parent left can lose this name: nothing is lost with it, or it has another, and is settled then.
pub(super) fn is_spent(path: &Path, parent: &Header) -> bool {
    let Ok(file) = HostFile::open(path, Access::Writable, Locking::Locked) else {
        return false;
    };
    let file = Arc::new(file);
    let Ok(image) = Image::examine(Arc::clone(&file) as Arc<_>) else {
        return false;
    };
    let is_kept = file.file().metadata().is_ok_and(|file| file.nlink() > 1);
    let is_loose = live::loose_parent(image.header()) == Some(parent.uuid_image());
    match (is_loose, is_kept) {
        (true, false) => true,
        (true, true) => live::tighten(&*file, parent).is_ok(),
        (false, true) => image.header().kind() == ImageKind::Differencing(parent.as_parent()),
        (false, false) => false,
    }
}
