//! Children that are made while disks are served, and the names they take.
//!
//! A child is made under a name that nothing else looks for, and synced; only then does it get the name it is for, and that is synced, too. So
//! after a crash at any instant there is nothing of that name, or what was there before, or all of the child. What a crash leaves of the other
//! name does no harm.
//!
//! The two syncs could be one, since a file system with a journal commits names and contents together. That was measured (ext4, `O_TMPFILE`,
//! `sync_file_range`, `linkat`, then one sync of the file and one of the directory): 7.0 writes to the disk for 8.1, and 0.76 ms for 0.80 where
//! the host does not hold writes back. It promises nothing on other file systems, so it is not done.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use vdi_core::{CreateError, Header, create_child};

use crate::sandbox::directory_of;

/// A new child under a name of its own; it goes away unless it takes another.
#[derive(Debug)]
pub(crate) struct Child {
    path: Option<PathBuf>,
}

impl Child {
    /// A child that is to take the place of its parent, which is one daemon's alone.
    pub(crate) fn in_place_of(
        image: &Path,
        parent: &Header,
        block_size: Option<u32>,
    ) -> Result<Self, CreateError> {
        let mut name = image.file_name().unwrap_or_default().to_owned();
        name.push(".new-child");
        let path = image.with_file_name(name);
        // One that is there is what a daemon that was killed left of such a step.
        let _ = std::fs::remove_file(&path);
        Self::make(path, parent, block_size)
    }

    /// A child that is to be called `image`, as others may want theirs to be at the same time.
    pub(crate) fn to_be(
        image: &Path,
        parent: &Header,
        block_size: Option<u32>,
    ) -> Result<Self, CreateError> {
        let mut name = OsString::from(".");
        name.push(image.file_name().unwrap_or_default());
        name.push(format!(".{}.new", Uuid::new_v4().simple()));
        Self::make(image.with_file_name(name), parent, block_size)
    }

    /// With blocks like the parent's unless it is said.
    fn make(path: PathBuf, parent: &Header, block_size: Option<u32>) -> Result<Self, CreateError> {
        let block_size = block_size.unwrap_or(parent.block_size().bytes());
        create_child(&path, parent, block_size, None)?;
        Ok(Self { path: Some(path) })
    }

    /// Takes the place of an image that is called `other`, too. Durably: the file was synced when it was made, the names are now.
    /// If that fails, the image has its place and only that.
    pub(crate) fn take_place(mut self, of: &Path, other: &Path) -> io::Result<()> {
        if let Some(path) = self.path.take()
            && let Err(error) = std::fs::rename(&path, of)
        {
            self.path = Some(path);
            let _ = std::fs::remove_file(other);
            return Err(error);
        }
        // The other name may be the only one of all the data now, and is not taken away.
        sync_names(of).inspect_err(|_| drop(std::fs::rename(other, of)))
    }

    /// Takes a name that nothing has, durably. If that fails, nothing of ours has it.
    pub(crate) fn take_name(self, name: &Path) -> io::Result<()> {
        if let Some(path) = &self.path {
            std::fs::hard_link(path, name)?;
        }
        // Its first name goes away with the same sync.
        drop(self);
        sync_names(name).inspect_err(|_| drop(std::fs::remove_file(name)))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Gives an image another name, durably: only then may it lose the one it has. It may have it already, from a daemon that was
/// killed before that.
pub(crate) fn name_too(image: &Path, to: &Path) -> io::Result<()> {
    match std::fs::hard_link(image, to) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let identity = |path| {
                let metadata = std::fs::metadata(path)?;
                io::Result::Ok((metadata.dev(), metadata.ino()))
            };
            if identity(image)? != identity(to)? {
                return Err(error);
            }
        }
        linked => linked?,
    }
    sync_names(image)
}

/// Makes the names durable that are beside an image.
pub(crate) fn sync_names(image: &Path) -> io::Result<()> {
    File::open(directory_of(image))?.sync_all()
}
