//! Finding the parents of a differencing image.
//!
//! An image names its parent by UUID only. The file is looked for among those that the
//! user names, then among the images beside the child and in the directories that the
//! user names. More than one answer is an error, since a copy of a parent has its UUID and
//! may have other contents.
//!
//! Only headers are read here; whether the links hold is judged by
//! [`crate::disk::Disk::open_chain`].

use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::libc;
use uuid::Uuid;

use crate::disk::MOST_IMAGES;
use crate::format::RawHeader;
use crate::repair::is_back_up;
use crate::storage::{Access, FileError, HostFile, Locking};
use crate::units::FileOffset;

/// How many directory entries are looked at for one parent: a directory with more is no place for
/// images, and reading it would take minutes.
pub const MOST_CANDIDATES: usize = 100_000;

/// Where parents may be.
#[derive(Clone, Debug)]
pub struct ChainOptions {
    /// Files that are looked at first.
    pub parents: Vec<PathBuf>,
    /// Directories whose images are looked at, besides each child's own.
    pub image_dirs: Vec<PathBuf>,
    /// Whether the files are locked.
    pub locking: Locking,
    /// What earlier searches saw, for those who open many disks.
    pub seen: Arc<SeenImages>,
}

/// What files were seen to be, so that a directory of a thousand clones is not read anew for each of them. A file
/// that was changed since, by its times, is looked at again.
#[derive(Debug, Default)]
pub struct SeenImages(Mutex<HashMap<PathBuf, (Stamp, Option<Uuid>)>>);

/// Which file it is, and in which state.
type Stamp = [i64; 5];

impl SeenImages {
    /// The UUID of the image at `path`, if it is one.
    fn uuid_of(&self, path: &Path, metadata: &Metadata) -> Option<Uuid> {
        let stamp = [
            metadata.dev().cast_signed(),
            metadata.ino().cast_signed(),
            metadata.ctime(),
            metadata.ctime_nsec(),
            metadata.len().cast_signed(),
        ];
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((seen, uuid)) = lock().get(path)
            && *seen == stamp
        {
            return *uuid;
        }
        // What cannot be opened or read is not the parent.
        let header = open_quietly(path).ok().map(|file| read_header(&file, path));
        let header = header.and_then(Result::ok).filter(RawHeader::is_vdi);
        let uuid = header.map(|header| header.uuid_image.get());
        let mut seen = lock();
        if seen.len() >= MOST_CANDIDATES {
            seen.clear();
        }
        seen.insert(path.to_owned(), (stamp, uuid));
        uuid
    }
}

/// Opens an image and all its parents, the image first. Parents are opened read-only.
///
/// # Errors
/// If a file cannot be opened, or a parent is missing, found twice, or its own ancestor.
pub fn find_chain(
    path: &Path,
    access: Access,
    options: &ChainOptions,
) -> Result<Vec<HostFile>, ChainError> {
    let mut chain = vec![HostFile::open(path, access, options.locking)?];
    let mut seen = HashSet::new();
    loop {
        let child = chain.last().expect("it begins with one");
        let header = read_header(child.file(), child.path())?;
        let parent = header.uuid_parent.get();
        if !header.is_vdi() || parent.is_nil() {
            return Ok(chain);
        }
        if chain.len() == MOST_IMAGES {
            return Err(ChainError::TooLong { most: MOST_IMAGES });
        }
        seen.insert(header.uuid_image.get());
        if seen.contains(&parent) {
            let child = child.path().to_owned();
            return Err(ChainError::Loop { child, parent });
        }
        let found = find_parent(child.path(), parent, options)?;
        chain.push(HostFile::open(&found, Access::ReadOnly, options.locking)?);
    }
}

/// The file of the image `parent`: the user's choice, or the only one that there is.
///
/// # Errors
/// If there is none, or more than one, or a directory cannot be read.
pub fn find_parent(
    child: &Path,
    parent: Uuid,
    options: &ChainOptions,
) -> Result<PathBuf, ChainError> {
    for named in &options.parents {
        // The user means a file that is there.
        if let Err(source) = open_quietly(named) {
            let path = named.clone();
            return Err(FileError::Open { path, source }.into());
        }
    }
    let named = candidates(options.parents.iter().cloned(), parent, &options.seen);
    if let Some(found) = only_one(named, parent)? {
        return Ok(found);
    }
    let own = match child.parent() {
        Some(dir) if dir.as_os_str().is_empty() => Path::new("."),
        Some(dir) => dir,
        None => Path::new("/"),
    };
    let mut files = Vec::new();
    let dirs = || std::iter::once(own).chain(options.image_dirs.iter().map(PathBuf::as_path));
    for dir in dirs() {
        let unreadable = |source| ChainError::Dir {
            dir: dir.to_owned(),
            source,
        };
        for entry in std::fs::read_dir(dir).map_err(unreadable)? {
            let file = entry.map_err(unreadable)?.path();
            if !is_back_up(&file) {
                files.push(file);
            }
            if files.len() > MOST_CANDIDATES {
                let dir = dir.to_owned();
                return Err(ChainError::TooManyFiles {
                    dir,
                    most: MOST_CANDIDATES,
                });
            }
        }
    }
    let found = only_one(candidates(files.into_iter(), parent, &options.seen), parent)?;
    found.ok_or_else(|| ChainError::Missing {
        child: child.to_owned(),
        parent,
        named: options.parents.clone(),
        searched: dirs().map(Path::to_owned).collect(),
    })
}

/// The files that are the image `parent`, each once, by whatever name it was reached.
fn candidates(
    files: impl Iterator<Item = PathBuf>,
    parent: Uuid,
    seen: &SeenImages,
) -> Vec<PathBuf> {
    let mut known = HashSet::new();
    files
        .filter(|path| {
            let Ok(metadata) = std::fs::metadata(path) else {
                return false;
            };
            metadata.is_file()
                && seen.uuid_of(path, &metadata) == Some(parent)
                && known.insert((metadata.dev(), metadata.ino()))
        })
        .collect()
}

fn only_one(mut found: Vec<PathBuf>, parent: Uuid) -> Result<Option<PathBuf>, ChainError> {
    match found.len() {
        0 | 1 => Ok(found.pop()),
        _ => {
            let (second, first) = (found.swap_remove(1), found.swap_remove(0));
            Err(ChainError::Ambiguous {
                parent,
                first,
                second,
            })
        }
    }
}

/// Opens without waiting for the other end of a pipe.
fn open_quietly(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    File::options().read(true).custom_flags(flags).open(path)
}

fn read_header(file: &File, path: &Path) -> Result<RawHeader, ChainError> {
    let read = || {
        let len = file.metadata()?.len();
        RawHeader::read_with(len, |buf, at: FileOffset| {
            std::os::unix::fs::FileExt::read_exact_at(file, buf, at.0)
        })
    };
    read().map_err(|source| ChainError::Header {
        path: path.to_owned(),
        source,
    })
}

fn named_files(named: &[PathBuf]) -> String {
    let each = |file: &PathBuf| format!("{}, and not ", file.display());
    named.iter().map(each).collect()
}

/// Why the images of a disk could not be found.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum ChainError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot read the header of {}", path.display())]
    Header { path: PathBuf, source: io::Error },
    #[error("cannot look for parents in {}", dir.display())]
    Dir { dir: PathBuf, source: io::Error },
    #[error("{} has more than {most} entries, too many to look for a parent in; name the file with --parent", dir.display())]
    TooManyFiles { dir: PathBuf, most: usize },
    #[error(
        "the parent {parent} of {} is not {}in {}; name its file with --parent or its directory with --image-dir",
        child.display(),
        named_files(named),
        searched.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    Missing {
        child: PathBuf,
        parent: Uuid,
        /// Files that the user named.
        named: Vec<PathBuf>,
        searched: Vec<PathBuf>,
    },
    #[error(
        "both {} and {} are the parent {parent} by their UUID; name the right one with --parent",
        first.display(),
        second.display()
    )]
    Ambiguous {
        parent: Uuid,
        first: PathBuf,
        second: PathBuf,
    },
    #[error("{} has the parent {parent}, which is its own descendant", child.display())]
    Loop { child: PathBuf, parent: Uuid },
    #[error("the chain has more than {most} images; merge some of them first")]
    TooLong { most: usize },
}
