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

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vdi_core::resize::{self, ResizeError};
use vdi_core::{
    Access, Capacity, ChainError, ChainOptions, Disk, HostFile, Locking, ModifiedParent, OpenError,
    Storage, WriteError, find_chain,
};

use crate::args::{Args, Cache};
use crate::housekeeper::{Housekeepers, Kept};
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
    /// It was changed and let go of, so that count and length are not exact.
    is_untidy: bool,
    has_failed: bool,
}

#[derive(Debug)]
struct Held {
    disk: Arc<Disk>,
    /// The locked files of its images, the top one's first.
    files: Vec<Arc<HostFile>>,
    /// None before the daemon is in its sandbox.
    housekeeper: Option<Kept>,
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
    /// Another daemon has it, or nobody.
    #[error("the image is not open here")]
    NotHeld,
    /// W5.
    #[error("{} failed before; run `vdi check` and start the daemon again", path.display())]
    Failed { path: PathBuf },
}

/// Why a disk did not grow.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GrowError {
    /// A guest that uses its end would lose it.
    #[error(
        "the disk has {from} bytes and would shrink to {to}; stop the guest and use `vdi resize --shrink`"
    )]
    Smaller { from: u64, to: u64 },
    /// The format or the host says no.
    #[error("the disk cannot have this size")]
    Resize(#[from] ResizeError),
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

    /// The files of the image's parents, and those that may become some.
    pub(crate) fn parents(&self) -> Result<Vec<PathBuf>, TurnError> {
        let chain = self.find(Access::ReadOnly, Locking::ForceShare)?;
        let parents = chain.iter().skip(1).map(|file| file.path().to_owned());
        Ok(parents.chain(self.parents.iter().cloned()).collect())
    }

    /// Finds and locks the files of the image and its parents.
    fn find(&self, access: Access, locking: Locking) -> Result<Vec<Arc<HostFile>>, TurnError> {
        let options = ChainOptions {
            parents: self.parents.clone(),
            image_dirs: self.image_dirs.clone(),
            locking,
            seen: Arc::default(),
        };
        let files = find_chain(&self.image, access, &options)?;
        for (nth, file) in files.iter().enumerate() {
            tracing::debug!("image {nth} is {}", file.path().display());
        }
        Ok(files.into_iter().map(Arc::new).collect())
    }

    fn disk_of(&self, files: &[Arc<HostFile>], access: Access) -> Result<Disk, TurnError> {
        let storage = |file: &Arc<HostFile>| Arc::clone(file) as Arc<dyn Storage>;
        let storages = files.iter().map(storage).collect();
        Disk::open_chain(storages, access, self.modified).map_err(|source| TurnError::Open {
            path: self.image.clone(),
            source,
        })
    }

    /// Opens the disk that these files are, and the ways to their data.
    fn open(&self, files: &[Arc<HostFile>]) -> Result<Opened, TurnError> {
        let disk = self.disk_of(files, self.access)?;
        let mut images = Vec::new();
        for (file, header) in files.iter().zip(disk.headers()) {
            let is_top = images.is_empty();
            let area = header.data_area();
            let copy = || file.file().try_clone().map_err(TurnError::Duplicate);
            images.push(match self.cache {
                Cache::Writeback => ImageFile::buffered(copy()?),
                Cache::Direct if is_top => ImageFile::direct(copy()?, self.access, area)?,
                // A parent whose blocks lie askew may as well be read through the page cache.
                Cache::Direct => match ImageFile::direct(copy()?, Access::ReadOnly, area) {
                    Ok(direct) => direct,
                    Err(_) => ImageFile::buffered(copy()?),
                },
            });
        }
        Ok(Opened {
            disk: Arc::new(disk),
            images: images.into(),
        })
    }

    /// Looks at an image that another daemon may be writing; it is not opened for anything else.
    ///
    /// Its header and map are written one after the other, so they may be caught in between.
    pub(crate) fn look(&self) -> Result<Disk, TurnError> {
        let look = || {
            let files = self.find(Access::ReadOnly, Locking::ForceShare)?;
            self.disk_of(&files, Access::ReadOnly)
        };
        for _ in 1..LOOKS {
            if let Ok(disk) = look() {
                return Ok(disk);
            }
            std::thread::sleep(LOOK_PAUSE);
        }
        look()
    }
}

impl Turn {
    /// A turn that has not begun.
    pub(crate) fn waiting(opening: Opening) -> Self {
        Self {
            opening,
            held: None,
            is_untidy: false,
            has_failed: false,
        }
    }

    /// The open disk, if it is our turn.
    pub(crate) fn disk(&self) -> Option<&Arc<Disk>> {
        self.held.as_ref().map(|held| &held.disk)
    }

    /// Whether a failure ended all writing (W5).
    pub(crate) fn has_failed(&self) -> bool {
        self.has_failed || self.disk().is_some_and(|disk| disk.is_failed())
    }

    /// Opens and locks the image. Nothing may be held.
    pub(crate) fn begin(&mut self) -> Result<Opened, TurnError> {
        if self.has_failed {
            let path = self.opening.image.clone();
            return Err(TurnError::Failed { path });
        }
        let files = self.opening.find(self.opening.access, Locking::Locked)?;
        self.hold(files)
    }

    fn hold(&mut self, files: Vec<Arc<HostFile>>) -> Result<Opened, TurnError> {
        let opened = self.opening.open(&files)?;
        for warning in opened.disk.warnings() {
            tracing::warn!("{}: {warning}", self.opening.image.display());
        }
        self.held = Some(Held {
            disk: Arc::clone(&opened.disk),
            files,
            housekeeper: None,
        });
        Ok(opened)
    }

    /// Has the disk that is held looked after.
    pub(crate) fn keep_house(&mut self, housekeepers: &Arc<Housekeepers>) {
        if let Some(held) = &mut self.held {
            held.housekeeper = Some(housekeepers.keep(&held.disk));
        }
    }

    /// Makes the disk larger. It must be held, and nobody may be at work with it; the locks stay. What is returned is
    /// to be served from now on, whether the disk grew or not.
    pub(crate) fn grow(
        &mut self,
        to: Capacity,
    ) -> Result<(Opened, Result<(), GrowError>), TurnError> {
        let Some(Held {
            disk,
            files,
            housekeeper,
        }) = self.held.take()
        else {
            return Err(TurnError::NotHeld);
        };
        drop(housekeeper);
        let grown = grow(&disk, to);
        self.has_failed |= disk.is_failed();
        drop(disk);
        Ok((self.hold(files)?, grown))
    }

    /// Makes everything durable and lets the image go; whoever opens it finds it as after a crash, without harm. The
    /// workers must have ended.
    pub(crate) fn end(&mut self) {
        let Some(Held {
            disk, housekeeper, ..
        }) = self.held.take()
        else {
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
        self.is_untidy |= disk.is_changed();
    }

    /// Closes the image for good: its count and length are exact afterwards. If it was let go of and nobody else has it,
    /// that is made up for.
    pub(crate) fn close(mut self) -> Result<(), WriteError> {
        if let Some(Held {
            disk, housekeeper, ..
        }) = self.held.take()
        {
            drop(housekeeper);
            return if self.is_untidy {
                disk.close_tidily()
            } else {
                disk.close()
            };
        }
        if !self.is_untidy || self.has_failed {
            return Ok(());
        }
        let opened = self.opening.find(Access::Writable, Locking::Locked);
        match opened.and_then(|files| self.opening.disk_of(&files, Access::Writable)) {
            Ok(disk) => disk.close_tidily(),
            Err(error) => {
                tracing::debug!("not closed once more: {}", crate::chain_of(&error));
                Ok(())
            }
        }
    }
}

fn grow(disk: &Arc<Disk>, to: Capacity) -> Result<(), GrowError> {
    let from = disk.capacity();
    if to < from {
        let (from, to) = (from.bytes(), to.bytes());
        return Err(GrowError::Smaller { from, to });
    }
    let plan = resize::plan(disk, to)?;
    Ok(resize::apply(disk, &plan)?)
}
