//! Disks that are made as they are added: children of an image that nobody writes, such as a golden one.
//!
//! Either a clone is made and served, or there is neither. If the daemon dies in between, the image may be there, whole and durable, and
//! nobody serves it: it can be added.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdi_core::{Access, CreateError, FileError, HostFile, Locking};

use super::{Fleet, FleetError};
use crate::berth::Berth;
use crate::child::{Child, sync_names};
use crate::config::{self, DiskTable};
use crate::parents::{Parent, ParentError};

/// Why there is no clone.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CloneError {
    #[error("the file {} is there already, where the clone is to be", image.display())]
    Exists { image: PathBuf },
    #[error(
        "cannot use the parent; it must lie in one of `image-dirs`, or be named in the configuration"
    )]
    File(#[from] FileError),
    #[error("cannot use the parent {}", of.display())]
    Parent {
        of: PathBuf,
        #[source]
        source: ParentError,
    },
    #[error("cannot make {}; its directory must be one of `image-dirs`", image.display())]
    Create {
        image: PathBuf,
        #[source]
        source: CreateError,
    },
    #[error("cannot give the clone the name {}", image.display())]
    Name {
        image: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Fleet {
    /// Makes a child of the image `of`, with blocks like its own unless it is said, and serves it as an operator describes it.
    pub(crate) fn add_clone(
        self: &Arc<Self>,
        of: &Path,
        block_size: Option<u32>,
        table: DiskTable,
    ) -> Result<Arc<Berth>, FleetError> {
        let _change = self.change_files()?;
        config::refuse_relative(of)?;
        let mut options = self.options_of(table)?;
        // It is kept until the disk has it: nobody may write it in between.
        let parent = self.parent_of_clones(of)?;
        let image = options.image.clone();
        make(&image, &parent, block_size)?;
        // So that it is not looked for.
        options.parents.insert(0, of.to_owned());
        let added = self.add_new(options);
        added.inspect_err(|_| unmake(&image))
    }

    fn parent_of_clones(&self, of: &Path) -> Result<Arc<Parent>, CloneError> {
        let file = HostFile::open(of, Access::ReadOnly, Locking::Locked)?;
        let shared = self.parents.share(file);
        shared.map_err(|source| CloneError::Parent {
            of: of.to_owned(),
            source,
        })
    }
}

fn make(image: &Path, parent: &Parent, block_size: Option<u32>) -> Result<(), CloneError> {
    let image = image.to_owned();
    if image.symlink_metadata().is_ok() {
        return Err(CloneError::Exists { image });
    }
    let child = match Child::to_be(&image, parent.image.header(), block_size) {
        Ok(child) => child,
        Err(source) => return Err(CloneError::Create { image, source }),
    };
    match child.take_name(&image) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(CloneError::Exists { image })
        }
        named => named.map_err(|source| CloneError::Name { image, source }),
    }
}

/// Removes a clone that is not served, unless somebody else has begun to use it: that one holds its lock.
fn unmake(image: &Path) {
    let removed = match HostFile::open(image, Access::Writable, Locking::Locked) {
        Ok(_alone) => std::fs::remove_file(image).and_then(|()| sync_names(image)),
        Err(error) => Err(io::Error::other(error)),
    };
    if let Err(error) = removed {
        let error = crate::chain_of(&error);
        tracing::warn!(
            "the clone {} is not served and stays: {error}",
            image.display()
        );
    }
}
