//! A disk as a guest sees it, and the doors to it.
//!
//! Reading is a question to the map and takes no lock. Writing is a conversation, see
//! [`crate::writer`] for its rules:
//!
//! ```text
//! reserve ─► Ready(Reservation) ─► the caller writes its extents ─► commit ─► answer
//!        └─► Parked: call again when the waker is woken
//! ```

use std::io;
use std::sync::Arc;
use std::task::{Wake, Waker};
use std::thread::Thread;

use crate::header::{Header, Warning};
use crate::image::{Image, OpenError, Place};
use crate::storage::{Access, Storage};
use crate::units::{Capacity, DataArea, FileOffset, SectorRange, Spans};
use crate::writer::Writer;

pub use crate::writer::{Flush, Reservation, Reserve, WriteError, WriteExtent};

/// An open disk.
#[derive(Debug)]
pub struct Disk {
    pub(crate) image: Image,
    pub(crate) writer: Option<Writer>,
}

impl Disk {
    /// Opens the disk that an image file holds.
    ///
    /// # Errors
    /// If the image breaks a rule of the format; see [`OpenError`].
    pub fn open(storage: Arc<dyn Storage>, access: Access) -> Result<Self, OpenError> {
        let (image, owners) = Image::open(storage, access)?;
        let writer = match access {
            Access::ReadOnly => None,
            Access::Writable => {
                let file_len = image
                    .storage
                    .len_bytes()
                    .map_err(|source| OpenError::Read { source })?;
                Some(Writer::new(&image, &owners, file_len))
            }
        };
        Ok(Self { image, writer })
    }

    /// The virtual size.
    pub const fn capacity(&self) -> Capacity {
        self.image.header.capacity()
    }

    /// What the disk was opened for.
    pub const fn access(&self) -> Access {
        match self.writer {
            Some(_) => Access::Writable,
            None => Access::ReadOnly,
        }
    }

    /// The header as it was at open.
    pub const fn header(&self) -> &Header {
        &self.image.header
    }

    /// What is wrong with the image without harm to its readers.
    pub fn warnings(&self) -> impl Iterator<Item = Warning> {
        self.image.header.warnings()
    }

    /// Where the blocks lie in the file.
    pub const fn data_area(&self) -> DataArea {
        self.image.area
    }

    /// Where the bytes of a range are now, in order, neighbours merged.
    pub fn map(&self, range: SectorRange) -> Extents<'_> {
        Extents {
            image: &self.image,
            spans: range.spans(self.image.header.block_size()),
            next: None,
        }
    }

    /// Reads a range into `buf`, which must have its length.
    ///
    /// # Errors
    /// If the host cannot read the file.
    ///
    /// # Panics
    /// If `buf` has another length than the range.
    pub fn read_at(&self, range: SectorRange, buf: &mut [u8]) -> Result<(), ReadError> {
        assert_eq!(
            buf.len() as u64,
            range.len_bytes(),
            "the buffer has the range's length"
        );
        let mut rest = buf;
        for extent in self.map(range) {
            let len = usize::try_from(extent.len_bytes).expect("an extent is inside the buffer");
            let (piece, behind) = rest.split_at_mut(len);
            match extent.source {
                Source::Unallocated | Source::Zero => piece.fill(0),
                Source::Stored { at } => {
                    self.image
                        .storage
                        .read_exact_at(piece, at)
                        .map_err(|source| ReadError { at, source })?;
                }
            }
            rest = behind;
        }
        Ok(())
    }

    /// Writes `buf`, which must have the range's length, and does what chores that needs.
    ///
    /// # Errors
    /// See [`WriteError`].
    ///
    /// # Panics
    /// If `buf` has another length than the range.
    pub fn write_at(self: &Arc<Self>, range: SectorRange, buf: &[u8]) -> Result<(), WriteError> {
        assert_eq!(
            buf.len() as u64,
            range.len_bytes(),
            "the buffer has the range's length"
        );
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let reservation = loop {
            match self.reserve(range, &waker)? {
                Reserve::Ready(reservation) => break reservation,
                Reserve::Parked => match self.do_chores() {
                    Ok(true) => {}
                    Ok(false) => std::thread::park(),
                    // Told by `reserve`, to whom it concerns.
                    Err(WriteError::NoSpace { .. }) => {}
                    Err(error) => return Err(error),
                },
            }
        };
        let mut rest = buf;
        for extent in reservation.extents() {
            let len = usize::try_from(extent.len_bytes).expect("an extent is inside the buffer");
            let (piece, behind) = rest.split_at(len);
            self.image
                .storage
                .write_all_at(piece, extent.at)
                .map_err(|source| WriteError::Data { source })?;
            rest = behind;
        }
        self.commit(&mut vec![reservation])
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// If the sync fails; the disk then refuses further writes (W5).
    pub fn flush(&self) -> Result<(), WriteError> {
        match self.begin_flush()? {
            None => Ok(()),
            Some(flush) => self.end_flush(flush, self.image.storage.sync()),
        }
    }
}

/// A thread that waits for its turn.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// A run of bytes with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How long it is, a multiple of 512.
    pub len_bytes: u64,
    /// Where its bytes are.
    pub source: Source,
}

/// Where an extent's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: never written, reads as zeros.
    Unallocated,
    /// Nowhere: written as zeros.
    Zero,
    /// In the image's file.
    Stored {
        /// The first byte.
        at: FileOffset,
    },
}

/// The extents of a range, found as they are asked for.
#[derive(Debug)]
pub struct Extents<'d> {
    image: &'d Image,
    spans: Spans,
    /// The start of the extent to give next, if the map was read that far.
    next: Option<Extent>,
}

impl Iterator for Extents<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        let mut extent = self.next.take();
        for span in self.spans.by_ref() {
            let source = match self.image.locate(span) {
                Place::Unallocated => Source::Unallocated,
                Place::Zero => Source::Zero,
                Place::Stored(at) => Source::Stored { at },
            };
            match &mut extent {
                None => {
                    extent = Some(Extent {
                        len_bytes: span.len_bytes,
                        source,
                    });
                }
                Some(before) if before.source.goes_on_as(before.len_bytes, source) => {
                    before.len_bytes += span.len_bytes;
                }
                Some(_) => {
                    self.next = Some(Extent {
                        len_bytes: span.len_bytes,
                        source,
                    });
                    break;
                }
            }
        }
        extent
    }
}

impl Source {
    /// Whether `behind` is where this goes on after `len_bytes`.
    fn goes_on_as(self, len_bytes: u64, behind: Self) -> bool {
        match (self, behind) {
            (Self::Unallocated, Self::Unallocated) | (Self::Zero, Self::Zero) => true,
            (Self::Stored { at }, Self::Stored { at: next }) => at.plus(len_bytes) == next,
            (Self::Unallocated | Self::Zero | Self::Stored { .. }, _) => false,
        }
    }
}

/// The host could not read what the map names.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the image's file at {at}")]
pub struct ReadError {
    /// Where the extent begins.
    pub at: FileOffset,
    /// The host's error.
    pub source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::{CreateOptions, NewKind, create};
    use crate::storage::{HostFile, Locking};
    use crate::units::Sector;

    fn open(path: &std::path::Path) -> Arc<Disk> {
        let file = HostFile::open(path, Access::Writable, Locking::Locked).unwrap();
        Arc::new(Disk::open(Arc::new(file), Access::Writable).unwrap())
    }

    #[test]
    fn what_is_written_is_read_before_and_after_a_clean_close() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.vdi");
        let options = CreateOptions {
            capacity_bytes: 5 << 20,
            block_size: 1 << 20,
            kind: NewKind::Dynamic,
            uuid: None,
        };
        create(&path, &options).unwrap();
        let mut expected = vec![0; 5 << 20];
        {
            let disk = open(&path);
            let range = disk.capacity().range(Sector(2047), 2050).unwrap();
            let data = vec![7; 2050 * 512];
            disk.write_at(range, &data).unwrap();
            expected[2047 * 512..][..data.len()].copy_from_slice(&data);
            let mut found = vec![1; 5 << 20];
            disk.read_at(disk.capacity().whole(), &mut found).unwrap();
            assert!(found == expected);
            disk.close().unwrap();
            assert!(matches!(
                disk.write_at(range, &data),
                Err(WriteError::Closed)
            ));
        }
        let disk = open(&path);
        assert_eq!(disk.header().blocks_allocated(), 3);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), (2 + 3) << 20);
        let mut found = vec![1; 5 << 20];
        disk.read_at(disk.capacity().whole(), &mut found).unwrap();
        assert!(found == expected);
        let extents: Vec<_> = disk
            .map(disk.capacity().whole())
            .map(|extent| (extent.len_bytes, extent.source))
            .collect();
        let stored = Source::Stored {
            at: FileOffset(2 << 20),
        };
        assert_eq!(extents, [(3 << 20, stored), (2 << 20, Source::Unallocated)]);
    }
}
