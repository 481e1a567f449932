//! A disk that is read: where it has storage, and its bytes.
//!
//! Everything is learnt in one look ([`Reading`]), so what the maps say is asked for once and
//! stays good to the end.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use crate::convert::CopyError;
use crate::convert::raw::{self, RawDisk};
use crate::disk::{Disk, Extents, Source};
use crate::units::{Capacity, FileOffset, SECTOR_SIZE};
use crate::visit::Visit;

/// A disk to read: what is copied, or one of two that are compared.
#[derive(Debug)]
pub enum End {
    /// A raw disk.
    Raw(RawDisk),
    /// An image and its parents.
    Image(Arc<Disk>),
}

impl End {
    /// The size of the disk.
    pub fn capacity(&self) -> Capacity {
        match self {
            Self::Raw(raw) => raw.capacity(),
            Self::Image(disk) => disk.capacity(),
        }
    }

    /// Whether some of the disk is kept in the file with this device and inode, a parent's included.
    pub fn is_in_file(&self, device: u64, inode: u64) -> bool {
        let mut files = self.look().identities().into_iter();
        files.any(|file| file == Some((device, inode)))
    }

    pub(crate) fn look(&self) -> Reading<'_> {
        match self {
            Self::Raw(raw) => Reading::Raw(raw),
            Self::Image(disk) => Reading::Image(disk, disk.lane().enter()),
        }
    }
}

/// A look at a disk: as long as it lasts, what was learnt of storage stays good.
pub(crate) enum Reading<'e> {
    Raw(&'e RawDisk),
    Image(&'e Disk, Visit),
}

/// Where bytes of the disk are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    /// Which of the disk's files.
    pub(crate) depth: usize,
    /// The first byte in it.
    pub(crate) at: FileOffset,
}

impl Stored {
    pub(crate) const fn plus(self, bytes: u64) -> Self {
        Self {
            at: self.at.plus(bytes),
            ..self
        }
    }
}

/// A run of the disk, whole sectors, that is kept in one place, or reads as zeros without storage.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) disk: Range<u64>,
    pub(crate) stored: Option<Stored>,
}

impl Run {
    pub(crate) const fn len_bytes(&self) -> u64 {
        self.disk.end - self.disk.start
    }

    /// Takes the first `bytes` off.
    pub(crate) fn advance(&mut self, bytes: u64) {
        self.disk.start += bytes;
        self.stored = self.stored.map(|stored| stored.plus(bytes));
    }
}

impl Reading<'_> {
    /// All of the disk, in order.
    pub(crate) fn runs(&self) -> Runs<'_> {
        match self {
            Self::Raw(raw) => Runs::Raw {
                raw,
                at: 0,
                data: None,
            },
            Self::Image(disk, visit) => Runs::Image {
                extents: disk.map(disk.capacity().whole(), visit),
                at: 0,
            },
        }
    }

    /// The files that a [`Stored::depth`] counts, where the host has them.
    pub(crate) fn files(&self) -> Vec<Option<&File>> {
        match self {
            Self::Raw(raw) => vec![Some(raw.file())],
            Self::Image(disk, _) => disk.host_files().collect(),
        }
    }

    /// What tells files from each other: whoever has the same has the same bytes.
    pub(crate) fn identities(&self) -> Vec<Option<(u64, u64)>> {
        let identity = |file: &File| {
            let found = file.metadata().ok()?;
            Some((found.dev(), found.ino()))
        };
        let files = self.files().into_iter();
        files.map(|file| file.and_then(identity)).collect()
    }

    /// How many of the first bytes of a stored run are surely a hole in the file; whole sectors.
    pub(crate) fn hole_bytes(&self, stored: Stored, len_bytes: u64) -> Result<u64, CopyError> {
        let file = match self {
            // Its runs end where its holes begin.
            Self::Raw(_) => return Ok(0),
            Self::Image(disk, _) => disk.host_files().nth(stored.depth).flatten(),
        };
        let Some(file) = file else { return Ok(0) };
        let range = stored.at.0..stored.at.plus(len_bytes).0;
        let start = raw::data_start(file, range.clone()).map_err(|source| CopyError::Seek {
            at: stored.at,
            source,
        })?;
        let hole = start.map_or(len_bytes, |start| start - range.start);
        Ok(hole - hole % SECTOR_SIZE)
    }

    /// How long the data are with which a stored run begins, before a hole in the file.
    pub(crate) fn data_bytes(&self, stored: Stored, len_bytes: u64) -> Result<u64, CopyError> {
        let files = self.files();
        let Some(file) = files[stored.depth] else {
            return Ok(len_bytes);
        };
        let range = stored.at.0..stored.at.plus(len_bytes).0;
        let end = raw::data_end(file, range).map_err(|source| CopyError::Seek {
            at: stored.at,
            source,
        })?;
        Ok(end - stored.at.0)
    }

    /// Reads what is stored at the disk's byte `at_bytes`.
    pub(crate) fn read(
        &self,
        stored: Stored,
        at_bytes: u64,
        buf: &mut [u8],
    ) -> Result<(), CopyError> {
        match self {
            Self::Raw(raw) => raw
                .read(buf, at_bytes)
                .map_err(|source| CopyError::ReadRaw { at_bytes, source }),
            Self::Image(disk, _) => disk
                .read_image(stored.depth, buf, stored.at)
                .map_err(|source| CopyError::ReadImage { at_bytes, source }),
        }
    }
}

/// The runs of a disk, found as they are asked for.
pub(crate) enum Runs<'r> {
    Raw {
        raw: &'r RawDisk,
        at: u64,
        /// The data behind a hole that was given last.
        data: Option<Range<u64>>,
    },
    Image {
        extents: Extents<'r>,
        at: u64,
    },
}

impl Iterator for Runs<'_> {
    type Item = Result<Run, CopyError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Raw { raw, at, data } => {
                let start = *at;
                let end = raw.capacity().bytes();
                if start >= end {
                    return None;
                }
                let next = match data.take() {
                    Some(data) => data,
                    None => match next_sectors(raw, start) {
                        Ok(data) => data.unwrap_or(end..end),
                        Err(error) => return Some(Err(error)),
                    },
                };
                // Rounding to sectors may have brought two runs together.
                let next = next.start.max(start)..next.end;
                if next.start > start {
                    *at = next.start;
                    let disk = start..next.start;
                    *data = (!next.is_empty()).then_some(next);
                    return Some(Ok(Run { disk, stored: None }));
                }
                *at = next.end;
                let stored = Some(Stored {
                    depth: 0,
                    at: FileOffset(start),
                });
                Some(Ok(Run { disk: next, stored }))
            }
            Self::Image { extents, at } => {
                let extent = extents.next()?;
                let start = *at;
                *at += extent.len_bytes;
                let stored = match extent.source {
                    Source::Stored { depth, at } => Some(Stored { depth, at }),
                    Source::Unallocated | Source::Zero { .. } => None,
                };
                Some(Ok(Run {
                    disk: start..*at,
                    stored,
                }))
            }
        }
    }
}

/// The next data of a raw disk, in whole sectors.
fn next_sectors(raw: &RawDisk, at_bytes: u64) -> Result<Option<Range<u64>>, CopyError> {
    let data = raw
        .next_data(at_bytes)
        .map_err(|source| CopyError::ReadRaw { at_bytes, source })?;
    // Bytes of a raw disk lie on it.
    let sectors = data.and_then(|data| raw.capacity().range_around_bytes(data));
    Ok(sectors.map(|range| range.start_bytes()..range.end_bytes()))
}
