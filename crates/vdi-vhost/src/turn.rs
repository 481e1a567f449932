//! Whose turn it is with the image: it is open, locked and served by one daemon at a time, and daemons of a live
//! migration take turns.
//!
//! ```text
//!            first ring starts: open, lock
//! waiting ───────────────────────────────► serving
//!    ▲                                       │
//!    └───────────────────────────────────────┘
//!        last ring stops: flush, unlock, forget
//! ```
//!
//! A daemon begins with its turn, unless it is told to wait (`--incoming`): then it looks at the image, which another one
//! serves, without a lock, to tell the front end its size. A front end stops all rings before the guest goes on elsewhere,
//! and the rings start there after that, so each daemon reads what the other one wrote. A front end that vanishes with
//! running rings ends nothing: its guest will be back, or another one comes.
//!
//! - W5 holds across turns: an image that failed is not opened again by this process.
//!
//! Not here: how images are opened (`vdi-core`), how their data are reached (`image_file`).

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vdi_core::{
    Access, ChainError, ChainOptions, Disk, Locking, ModifiedParent, OpenError, Storage,
    WriteError, find_chain,
};

use crate::args::{Args, Cache};
use crate::housekeeper::Housekeeper;
use crate::image_file::{DirectError, ImageFile};

/// How often an image that another daemon writes is looked at, until its header and map fit together.
const LOOKS: u32 = 20;

/// How long it may take for them to do so.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Which image is served, and how.
#[derive(Debug)]
pub(crate) struct Opening {
    image: PathBuf,
    access: Access,
    parents: Vec<PathBuf>,
    image_dirs: Vec<PathBuf>,
    modified: ModifiedParent,
    cache: Cache,
}

/// The open image: the disk and the ways to its data, the top image's first.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Where the data are.
    pub(crate) disk: Arc<Disk>,
    /// How they are reached.
    pub(crate) images: Arc<[ImageFile]>,
}

/// The image, open or not.
#[derive(Debug)]
pub(crate) struct Turn {
    opening: Opening,
    held: Option<Held>,
    was_held: bool,
    has_failed: bool,
}

#[derive(Debug)]
struct Held {
    disk: Arc<Disk>,
    housekeeper: Housekeeper,
}

/// Why an image cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TurnError {
    /// It or a parent cannot be found or locked.
    #[error("cannot open the image")]
    Chain(#[from] ChainError),
    /// It is no image, or not one that can be trusted.
    #[error("cannot serve {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: OpenError,
    },
    /// It cannot be read past the page cache.
    #[error("--cache direct is not possible")]
    Direct(#[from] DirectError),
    /// Out of descriptors.
    #[error("cannot duplicate the image's descriptor")]
    Duplicate(#[source] io::Error),
    /// Out of threads.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// W5.
    #[error("{} failed before; run `vdi check` and start the daemon again", path.display())]
    Failed { path: PathBuf },
}

impl Opening {
    /// What the command line says.
    pub(crate) fn new(args: &Args) -> Self {
        Self {
            image: args.blk_file.clone(),
            access: if args.read_only {
                Access::ReadOnly
            } else {
                Access::Writable
            },
            parents: args.parents.clone(),
            image_dirs: args.image_dirs.clone(),
            modified: if args.allow_modified_parent {
                ModifiedParent::Allow
            } else {
                ModifiedParent::Refuse
            },
            cache: args.cache,
        }
    }

    /// For what it is to be opened.
    pub(crate) fn access(&self) -> Access {
        self.access
    }

    /// Looks at an image that another daemon may be writing; it is not opened for anything else.
    ///
    /// Its header and map are written one after the other, so they may be caught in between.
    pub(crate) fn look(&self) -> Result<Disk, TurnError> {
        for _ in 1..LOOKS {
            if let Ok((disk, _)) = self.open_disk(Access::ReadOnly, Locking::ForceShare) {
                return Ok(disk);
            }
            std::thread::sleep(LOOK_PAUSE);
        }
        let (disk, _) = self.open_disk(Access::ReadOnly, Locking::ForceShare)?;
        Ok(disk)
    }

    /// Opens and locks the image, its parents, and the ways to their data.
    fn open(&self) -> Result<Opened, TurnError> {
        let (disk, files) = self.open_disk(self.access, Locking::Locked)?;
        let mut images = Vec::new();
        for (file, header) in files.into_iter().zip(disk.headers()) {
            let is_top = images.is_empty();
            let area = header.data_area();
            images.push(match self.cache {
                Cache::Writeback => ImageFile::buffered(file),
                Cache::Direct if is_top => ImageFile::direct(file, self.access, area)?,
                // A parent whose blocks lie askew may as well be read through the page cache.
                Cache::Direct => match file.try_clone() {
                    Ok(copy) => ImageFile::direct(copy, Access::ReadOnly, area)
                        .unwrap_or_else(|_| ImageFile::buffered(file)),
                    Err(error) => return Err(TurnError::Duplicate(error)),
                },
            });
        }
        Ok(Opened {
            disk: Arc::new(disk),
            images: images.into(),
        })
    }

    fn open_disk(&self, access: Access, locking: Locking) -> Result<(Disk, Vec<File>), TurnError> {
        let options = ChainOptions {
            parents: self.parents.clone(),
            image_dirs: self.image_dirs.clone(),
            locking,
        };
        let (mut files, mut storages) = (Vec::new(), Vec::<Arc<dyn Storage>>::new());
        for file in find_chain(&self.image, access, &options)? {
            files.push(file.file().try_clone().map_err(TurnError::Duplicate)?);
            tracing::debug!("image {} is {}", storages.len(), file.path().display());
            storages.push(Arc::new(file));
        }
        let disk = Disk::open_chain(storages, access, self.modified);
        let disk = disk.map_err(|source| TurnError::Open {
            path: self.image.clone(),
            source,
        })?;
        Ok((disk, files))
    }
}

impl Turn {
    /// A turn that has not begun.
    pub(crate) fn waiting(opening: Opening) -> Self {
        Self {
            opening,
            held: None,
            was_held: false,
            has_failed: false,
        }
    }

    /// The open disk, if it is our turn.
    pub(crate) fn disk(&self) -> Option<&Arc<Disk>> {
        self.held.as_ref().map(|held| &held.disk)
    }

    /// Opens and locks the image. Nothing may be held.
    pub(crate) fn begin(&mut self) -> Result<Opened, TurnError> {
        if self.has_failed {
            let path = self.opening.image.clone();
            return Err(TurnError::Failed { path });
        }
        let opened = self.opening.open()?;
        for warning in opened.disk.warnings() {
            tracing::warn!("{}: {warning}", self.opening.image.display());
        }
        let housekeeper = Housekeeper::start(&opened.disk).map_err(TurnError::Thread)?;
        self.was_held = true;
        self.held = Some(Held {
            disk: Arc::clone(&opened.disk),
            housekeeper,
        });
        Ok(opened)
    }

    /// Makes everything durable and lets the image go; whoever opens it finds it as after a crash, without harm. The
    /// workers must have ended.
    pub(crate) fn end(&mut self) {
        let Some(Held { disk, housekeeper }) = self.held.take() else {
            return;
        };
        drop(housekeeper);
        if let Err(error) = disk.flush() {
            tracing::error!(
                "the image cannot be handed over: {}",
                crate::chain_of(&error)
            );
        }
        self.has_failed |= disk.is_failed();
    }

    /// Closes the image for good: its count and length are exact afterwards. If it was let go of and nobody else has it,
    /// that is made up for.
    pub(crate) fn close(mut self) -> Result<(), WriteError> {
        if let Some(Held { disk, housekeeper }) = self.held.take() {
            drop(housekeeper);
            return disk.close();
        }
        if !self.was_held || self.has_failed || self.opening.access == Access::ReadOnly {
            return Ok(());
        }
        match self.opening.open_disk(Access::Writable, Locking::Locked) {
            Ok((disk, _)) => disk.close(),
            Err(error) => {
                tracing::debug!("not closed once more: {}", crate::chain_of(&error));
                Ok(())
            }
        }
    }
}
