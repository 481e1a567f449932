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
//! - An image that gets a child while it is served is still its daemon's in between: writers stay locked out until the child is there.
//!
//! Not here: how images are opened (`vdi-core`), how their data are reached (`image_file`).

pub(crate) mod kept;
pub(crate) mod merge;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vdi_core::commit::live::{self, LoosenError};
use vdi_core::disk::MOST_IMAGES;
use vdi_core::resize::{self, ResizeError};
use vdi_core::{
    Access, Capacity, ChainError, ChainOptions, CreateError, Disk, HostFile, Image, Locking,
    OpenError, Storage, WriteError, find_chain,
};

use crate::args::Cache;
use crate::child::{self, Child};
use crate::complaints::Complaints;
use crate::config::DiskOptions;
use crate::housekeeper::{Housekeepers, Kept};
use crate::image_file::{DirectError, ImageFile};
use crate::parents::{Parent, ParentError, Parents};

/// How often an image that another daemon writes is looked at, until its header and map fit together.
const LOOKS: u32 = 20;

/// How long it may take for them to do so.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// Which image is served, and how.
#[derive(Debug)]
pub(crate) struct Opening {
    disk: DiskOptions,
    /// Those of all disks.
    parents: Arc<Parents>,
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
    /// What was taken when it was let go of.
    last_usage: vdi_core::Usage,
    /// What was said of images that were opened.
    said: Complaints,
}

/// The files of a disk, locked.
#[derive(Debug)]
struct Files {
    top: Arc<HostFile>,
    /// The nearest first.
    parents: Vec<Arc<Parent>>,
}

#[derive(Debug)]
struct Held {
    disk: Arc<Disk>,
    files: Files,
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
    /// A parent cannot be trusted, or the process is out of descriptors.
    #[error("cannot use the parent {}", path.display())]
    Parent {
        path: PathBuf,
        #[source]
        source: ParentError,
    },
    /// It cannot be read past the page cache.
    #[error("--cache direct is not possible")]
    Direct(#[from] DirectError),
    /// Out of descriptors.
    #[error("cannot duplicate the image's descriptor")]
    Duplicate(#[source] io::Error),
    /// The file system knows no locks.
    #[error("cannot lock the image for reading only")]
    Lock(#[source] io::Error),
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

/// What an image is frozen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be kept as it is, under a child whose blocks are like its own or of this size.
    Keep { block_size: Option<u32> },
    /// To be merged into its parent, which changes with that.
    Merge,
}

/// Why a disk was not frozen; it is as it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    #[error("the disk is served read-only")]
    ReadOnly,
    #[error(
        "{} is not in the directory of the image, where its child would look for it",
        to.display()
    )]
    Elsewhere { to: PathBuf },
    #[error("the disk has {MOST_IMAGES} images already; merge some of them first")]
    TooLong,
    #[error("what the disk holds is being merged into its parent; wait for that, or cancel it")]
    Merging,
    #[error("the image cannot forget the state of its parent")]
    Loosen(#[from] LoosenError),
    #[error("the image cannot be made exact")]
    Close(#[from] WriteError),
    #[error("the image cannot be read again")]
    Examine(#[from] OpenError),
    #[error("no child can be made")]
    Create(#[from] CreateError),
    #[error("cannot {step}")]
    Name {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

impl Opening {
    /// What the configuration says.
    pub(crate) const fn new(disk: DiskOptions, parents: Arc<Parents>) -> Self {
        Self { disk, parents }
    }

    /// How the disk is to be served.
    pub(crate) const fn options(&self) -> &DiskOptions {
        &self.disk
    }

    /// The files of the image's parents, and those that may become some.
    pub(crate) fn parents(&self) -> Result<Vec<PathBuf>, TurnError> {
        let chain = self.find(Access::ReadOnly, Locking::ForceShare)?;
        let parents = chain.iter().skip(1).map(|file| file.path().to_owned());
        Ok(parents.chain(self.disk.parents.iter().cloned()).collect())
    }

    /// Finds and locks the files of the image and its parents.
    fn find(&self, access: Access, locking: Locking) -> Result<Vec<HostFile>, TurnError> {
        let options = ChainOptions {
            parents: self.disk.parents.clone(),
            image_dirs: self.disk.image_dirs.clone(),
            locking,
            seen: Arc::clone(&self.parents.seen),
        };
        let files = find_chain(&self.disk.image, access, &options)?;
        for (nth, file) in files.iter().enumerate() {
            tracing::debug!("image {nth} is {}", file.path().display());
        }
        Ok(files)
    }

    /// The same, with parents that are shared.
    fn lock(&self, access: Access) -> Result<Files, TurnError> {
        let mut files = self.find(access, Locking::Locked)?.into_iter();
        let top = Arc::new(files.next().expect("a chain begins with its top image"));
        let parents = files.map(|file| self.share(file));
        let parents = parents.collect::<Result<_, _>>()?;
        Ok(Files { top, parents })
    }

    /// The files of a disk whose image is called `to` now and has a child in its place. Nobody who writes gets the image in
    /// between, and its parents are not looked for again.
    fn over(&self, frozen: Files, to: &Path) -> Result<Files, TurnError> {
        let open = |path, access| {
            let file = HostFile::open(path, access, Locking::Locked);
            file.map_err(|error| TurnError::Chain(error.into()))
        };
        frozen.top.keep_reading().map_err(TurnError::Lock)?;
        let top = Arc::new(open(&self.disk.image, self.disk.access)?);
        let parent = self.share(open(to, Access::ReadOnly)?)?;
        let parents = std::iter::once(parent).chain(frozen.parents).collect();
        Ok(Files { top, parents })
    }

    fn share(&self, file: HostFile) -> Result<Arc<Parent>, TurnError> {
        let path = file.path().to_owned();
        let shared = self.parents.share(file);
        shared.map_err(|source| TurnError::Parent { path, source })
    }

    /// The disk that these files are.
    fn disk_of(&self, files: &Files, access: Access) -> Result<Disk, TurnError> {
        let parents: Vec<_> = files
            .parents
            .iter()
            .map(|parent| Arc::clone(&parent.image))
            .collect();
        let top = Arc::clone(&files.top) as Arc<dyn Storage>;
        let disk = Disk::open_over(top, access, &parents, self.disk.modified);
        disk.map_err(|source| self.cannot_serve(source))
    }

    fn cannot_serve(&self, source: OpenError) -> TurnError {
        let path = self.disk.image.clone();
        TurnError::Open { path, source }
    }

    /// Opens the disk that these files are, and the ways to their data.
    fn open(&self, files: &Files) -> Result<Opened, TurnError> {
        let (access, cache) = (self.disk.access, self.disk.cache);
        let disk = self.disk_of(files, access)?;
        let file = files.top.file().try_clone().map_err(TurnError::Duplicate)?;
        let top = match cache {
            Cache::Writeback => ImageFile::buffered(file),
            Cache::Direct => ImageFile::direct(file, access, disk.data_area())?,
        };
        let lend = |parent: &Arc<Parent>| parent.data(cache).lending_to(&top);
        let parents: Vec<_> = files.parents.iter().map(lend).collect();
        Ok(Opened {
            images: std::iter::once(top).chain(parents).collect(),
            disk: Arc::new(disk),
        })
    }

    /// Looks at an image that another daemon may be writing; it is not opened for anything else.
    ///
    /// Its header and map are written one after the other, so they may be caught in between.
    pub(crate) fn look(&self) -> Result<Disk, TurnError> {
        let look = || {
            let files = self.find(Access::ReadOnly, Locking::ForceShare)?;
            let storages = files
                .into_iter()
                .map(|file| Arc::new(file) as Arc<dyn Storage>);
            let disk = Disk::open_chain(storages.collect(), Access::ReadOnly, self.disk.modified);
            disk.map_err(|source| self.cannot_serve(source))
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
            last_usage: vdi_core::Usage::default(),
            said: Complaints::default(),
        }
    }

    /// How the disk is served.
    pub(crate) const fn options(&self) -> &DiskOptions {
        self.opening.options()
    }

    /// What is taken, now or, if it is not our turn, when it last was.
    pub(crate) fn usage(&self) -> vdi_core::Usage {
        let Some(disk) = self.disk() else {
            return self.last_usage;
        };
        let mut usage = disk.usage();
        usage.released_blocks += self.last_usage.released_blocks;
        usage
    }

    /// The open disk, if it is our turn.
    pub(crate) fn disk(&self) -> Option<&Arc<Disk>> {
        self.held.as_ref().map(|held| &held.disk)
    }

    /// Whether a failure ended all writing (W5).
    pub(crate) fn has_failed(&self) -> bool {
        self.has_failed || self.disk().is_some_and(|disk| disk.is_failed())
    }

    /// Whether it was changed and let go of, so that count and length are not exact.
    pub(crate) const fn is_untidy(&self) -> bool {
        self.is_untidy
    }

    /// Another daemon of this disk left it untidy.
    pub(crate) const fn inherit_changes(&mut self) {
        self.is_untidy = true;
    }

    /// Opens and locks the image. Nothing may be held.
    pub(crate) fn begin(&mut self) -> Result<Opened, TurnError> {
        if self.has_failed {
            let path = self.opening.disk.image.clone();
            return Err(TurnError::Failed { path });
        }
        let files = self.opening.lock(self.opening.disk.access)?;
        self.hold(files)
    }

    fn hold(&mut self, files: Files) -> Result<Opened, TurnError> {
        let opened = self.opening.open(&files)?;
        for warning in opened.disk.warnings() {
            // A front end can start and stop rings as often as it likes.
            let image = self.opening.disk.image.display();
            self.said.warn(format_args!("{image}: {warning}"));
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
            held.housekeeper = Some(housekeepers.keep(&held.disk, &self.opening.disk.image));
        }
    }

    /// Makes the disk larger. It must be held, and nobody may be at work with it; the locks stay. What is returned is
    /// to be served from now on, whether the disk grew or not.
    pub(crate) fn grow(
        &mut self,
        to: Capacity,
    ) -> Result<(Opened, Result<(), GrowError>), TurnError> {
        let (files, grown) = self.change(|_, disk, _| grow(disk, to))?;
        Ok((self.hold(files)?, grown))
    }

    /// Freezes the disk as it is: the image gets the name `to`, and an empty child of it takes its place. The disk must be held,
    /// and nobody may be at work with it. What is returned is to be served from now on, whether there is a child or not.
    pub(crate) fn snapshot(
        &mut self,
        to: &Path,
        purpose: Purpose,
    ) -> Result<(Opened, Result<(), SnapshotError>), TurnError> {
        let (files, frozen) =
            self.change(|turn, disk, files| turn.freeze(disk, files, to, purpose))?;
        let files = if frozen.is_ok() {
            self.is_untidy = false;
            self.opening.disk.parents.insert(0, to.to_owned());
            self.opening.over(files, to)?
        } else {
            files
        };
        Ok((self.hold(files)?, frozen))
    }

    /// Has the disk that is held changed, with nobody looking after it. It is not held afterwards: its files are to be
    /// opened anew, whatever became of the change.
    fn change<E>(
        &mut self,
        change: impl FnOnce(&Self, &Arc<Disk>, &Files) -> Result<(), E>,
    ) -> Result<(Files, Result<(), E>), TurnError> {
        self.last_usage = self.usage();
        let Held {
            disk,
            files,
            housekeeper,
        } = self.held.take().ok_or(TurnError::NotHeld)?;
        drop(housekeeper);
        let changed = change(self, &disk, &files);
        self.has_failed |= disk.is_failed();
        Ok((files, changed))
    }

    /// Makes the image exact and durable, and puts a child in its place.
    fn freeze(
        &self,
        disk: &Arc<Disk>,
        files: &Files,
        to: &Path,
        purpose: Purpose,
    ) -> Result<(), SnapshotError> {
        let image = &self.opening.disk.image;
        if self.opening.disk.access == Access::ReadOnly {
            return Err(SnapshotError::ReadOnly);
        }
        if to.parent() != image.parent() {
            return Err(SnapshotError::Elsewhere { to: to.to_owned() });
        }
        if files.parents.len() + 2 > MOST_IMAGES {
            return Err(SnapshotError::TooLong);
        }
        if self.is_untidy {
            disk.close_tidily()?;
        } else {
            disk.close()?;
        }
        let block_size = match purpose {
            Purpose::Keep { block_size } => block_size,
            Purpose::Merge => {
                live::loosen(&*files.top)?;
                None
            }
        };
        // As it is now, not as it was opened.
        let now = Image::examine(Arc::clone(&files.top) as Arc<dyn Storage>)?;
        let child = Child::in_place_of(image, now.header(), block_size)?;
        let failed = |step, source| SnapshotError::Name { step, source };
        child::name_too(image, to).map_err(|error| failed("give the image its new name", error))?;
        let placed = child.take_place(image, to);
        placed.map_err(|error| failed("put the child in its place", error))
    }

    /// Makes everything durable and lets the image go; whoever opens it finds it as after a crash, without harm. The
    /// workers must have ended.
    pub(crate) fn end(&mut self) {
        self.last_usage = self.usage();
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
    pub(crate) fn close(&mut self) -> Result<(), WriteError> {
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
        let opened = self.opening.lock(Access::Writable);
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
