//! Where images lie, and how their data get there.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A place for images and a way to read and write them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Medium {
    /// A file system in memory: what the software costs
    Tmpfs,
    /// A file system on a disk, through the page cache, with all data in it
    Buffered,
    /// The same file system past the page cache (`O_DIRECT`)
    Direct,
}

impl Medium {
    /// A directory on it that can be written to.
    pub(crate) fn parent(self, on_disk: &Path) -> PathBuf {
        match self {
            Self::Tmpfs => PathBuf::from("/dev/shm"),
            Self::Buffered | Self::Direct => on_disk.to_owned(),
        }
    }

    /// Whether the page cache is passed by.
    pub(crate) fn is_direct(self) -> bool {
        self == Self::Direct
    }
}
