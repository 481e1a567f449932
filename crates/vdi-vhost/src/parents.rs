//! Parents that disks share: each is opened once, with one map in memory, as long as a disk needs it.
//!
//! A parent is known by its file (device and inode), not by its name. Nobody writes it while it is here: its file is locked for
//! that.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use vdi_core::{HostFile, Image, OpenError, SeenImages, Storage};

use crate::args::Cache;
use crate::image_file::ImageFile;

/// All parents that are open.
#[derive(Debug, Default)]
pub(crate) struct Parents {
    open: Mutex<HashMap<Identity, Weak<Parent>>>,
    /// What the files in directories of images were seen to be.
    pub(crate) seen: Arc<SeenImages>,
}

/// One parent.
#[derive(Debug)]
pub(crate) struct Parent {
    /// Keeps the lock.
    file: Arc<HostFile>,
    /// Its header and map.
    pub(crate) image: Arc<Image>,
    cached: ImageFile,
    /// Past the page cache, if that can be.
    direct: Option<ImageFile>,
}

/// Why a parent cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ParentError {
    /// It is no image that can be trusted.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Out of descriptors.
    #[error("cannot duplicate the descriptor of a parent")]
    Duplicate(#[from] io::Error),
}

impl Parents {
    /// The parent that `file` is, which is let go of if the parent is open already.
    pub(crate) fn share(&self, file: HostFile) -> Result<Arc<Parent>, ParentError> {
        let identity = identity(&file)?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parent) = open.get(&identity).and_then(Weak::upgrade) {
            return Ok(parent);
        }
        let parent = Arc::new(Parent::open(Arc::new(file))?);
        open.retain(|_, parent| parent.strong_count() > 0);
        open.insert(identity, Arc::downgrade(&parent));
        Ok(parent)
    }

    /// The parent that `file` is, as it is now: it was written since it was opened, by who had it alone.
    pub(crate) fn renew(&self, file: HostFile) -> Result<Arc<Parent>, ParentError> {
        let identity = identity(&file)?;
        let parent = Arc::new(Parent::open(Arc::new(file))?);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.insert(identity, Arc::downgrade(&parent));
        Ok(parent)
    }
}

/// Which file it is, whatever its name.
pub(crate) type Identity = (u64, u64);

/// Which file that is.
pub(crate) fn identity(file: &HostFile) -> io::Result<Identity> {
    let metadata = file.file().metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

impl Parent {
    fn open(file: Arc<HostFile>) -> Result<Self, ParentError> {
        let image = Image::examine(Arc::clone(&file) as _)?;
        let copy = || file.file().try_clone();
        let area = image.header().data_area();
        Ok(Self {
            cached: ImageFile::buffered(copy()?),
            // One whose blocks lie askew may as well be read through the page cache.
            direct: ImageFile::direct(copy()?, vdi_core::Access::ReadOnly, area).ok(),
            image: Arc::new(image),
            file,
        })
    }

    /// Its file.
    pub(crate) fn file(&self) -> &HostFile {
        &self.file
    }

    /// The same, to read it as an image.
    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.file) as Arc<dyn Storage>
    }

    /// How its data are reached.
    pub(crate) fn data(&self, cache: Cache) -> ImageFile {
        let direct = self.direct.as_ref().filter(|_| cache == Cache::Direct);
        direct.unwrap_or(&self.cached).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vdi_core::{Access, CreateOptions, Locking, NewKind, create};

    #[test]
    fn a_parent_is_open_once_and_only_as_long_as_it_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("golden.vdi");
        let options = CreateOptions {
            capacity_bytes: 4 << 20,
            block_size: 1 << 20,
            kind: NewKind::Dynamic,
            uuid: None,
        };
        create(&path, &options).unwrap();
        let file = |locking| HostFile::open(&path, Access::ReadOnly, locking).unwrap();
        let parents = Parents::default();
        let first = parents.share(file(Locking::Locked)).unwrap();
        let second = parents.share(file(Locking::Locked)).unwrap();
        assert!(Arc::ptr_eq(&first, &second));
        let writable = || HostFile::open(&path, Access::Writable, Locking::Locked);
        drop(first);
        assert!(writable().is_err(), "the lock is kept");
        drop(second);
        assert!(writable().is_ok());
    }
}
