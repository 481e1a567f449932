//! Copying a disk between forms: raw, dynamic, fixed.
//!
//! [`copy`] moves what reads other than zero and leaves the rest alone, so a sparse
//! source gives a sparse destination. It opens, names and renames nothing, prints
//! nothing, and asks after every chunk whether to go on.
//!
//! Invariants:
//!
//! - **V1** Zeros are left out only where the destination reads zeros before the copy:
//!   in an image or a file that was made for it. Anything else is written everywhere.
//! - **V2** Data are written in the order of the disk, so that neighbours on the disk
//!   become neighbours in the file.
//! - **V3** [`copy`] returns `Ok` only when the destination is on stable storage.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc;
use nix::unistd::{Whence, lseek};

use crate::disk::{Disk, ReadError, Source, WriteError};
use crate::storage::{Access, FileError, HostFile, Locking};
use crate::units::{Capacity, SectorRange};

/// Bytes read and judged at a time.
const CHUNK_BYTES: u64 = 1 << 20;

/// Zeros are left out in steps of this size: a file system's usual block. Smaller
/// steps would save no space.
const STEP_BYTES: usize = 4096;

/// A raw disk: a file, or a block device, with the bytes of the disk and nothing else.
#[derive(Debug)]
pub struct RawDisk {
    file: RawFile,
    len_bytes: u64,
    /// It was just made, so it reads zeros (V1).
    is_new: bool,
}

#[derive(Debug)]
enum RawFile {
    Regular(HostFile),
    Device(File),
}

impl RawDisk {
    /// Opens a raw disk that exists.
    ///
    /// # Errors
    /// If it cannot be opened, is in use, or is neither a file nor a block device.
    pub fn open(path: &Path, access: Access, locking: Locking) -> Result<Self, RawError> {
        let is_device =
            std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
        let file = if is_device {
            let (writable, flags) = match access {
                Access::ReadOnly => (false, 0),
                // On a block device: not while it is mounted.
                Access::Writable => (true, libc::O_EXCL),
            };
            RawFile::Device(
                OpenOptions::new()
                    .read(true)
                    .write(writable)
                    .custom_flags(flags)
                    .open(path)
                    .map_err(RawError::Io)?,
            )
        } else {
            RawFile::Regular(HostFile::open(path, access, locking)?)
        };
        let mut raw = Self {
            file,
            len_bytes: 0,
            is_new: false,
        };
        // The length in a device's metadata is 0.
        let mut file = raw.file();
        raw.len_bytes = file.seek(SeekFrom::End(0)).map_err(RawError::Io)?;
        Ok(raw)
    }

    /// Makes a raw disk of `capacity` that reads zeros everywhere.
    ///
    /// # Errors
    /// If there is a file of that name, or it cannot be made.
    pub fn create(path: &Path, capacity: Capacity) -> Result<Self, RawError> {
        let new = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(RawError::Io)?;
        new.set_len(capacity.bytes()).map_err(RawError::Io)?;
        let raw = Self::open(path, Access::Writable, Locking::Locked)?;
        Ok(Self {
            is_new: true,
            ..raw
        })
    }

    /// The size as a disk: a partial last sector is filled up with zeros.
    pub fn capacity(&self) -> Capacity {
        Capacity::from_bytes_rounded_up(self.len_bytes)
    }

    fn file(&self) -> &File {
        match &self.file {
            RawFile::Regular(file) => file.file(),
            RawFile::Device(file) => file,
        }
    }

    /// The next run at or behind `at_bytes` that is no hole.
    fn next_data(&self, at_bytes: u64) -> io::Result<Option<Range<u64>>> {
        let rest = at_bytes..self.len_bytes;
        if rest.is_empty() {
            return Ok(None);
        }
        let seek = |at: u64, whence| {
            lseek(
                self.file(),
                i64::try_from(at).map_err(|_| Errno::EOVERFLOW)?,
                whence,
            )
        };
        let start = match seek(at_bytes, Whence::SeekData) {
            Ok(start) => start.cast_unsigned(),
            Err(Errno::ENXIO) => return Ok(None),
            // This file system or device knows no holes.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some(rest)),
            Err(error) => return Err(error.into()),
        };
        let end = seek(start, Whence::SeekHole)?.cast_unsigned();
        Ok((start < self.len_bytes).then_some(start..end.min(self.len_bytes)))
    }

    /// Reads; behind the end of the file is the rest of the last sector, zeros.
    fn read(&self, buf: &mut [u8], at_bytes: u64) -> io::Result<()> {
        let in_file = usize::try_from(self.len_bytes.saturating_sub(at_bytes))
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let (stored, padding) = buf.split_at_mut(in_file);
        padding.fill(0);
        self.file().read_exact_at(stored, at_bytes)
    }
}

/// Why a raw disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RawError {
    /// The file cannot be opened as it should.
    #[error(transparent)]
    File(#[from] FileError),
    /// The host failed.
    #[error("the raw disk cannot be opened")]
    Io(#[source] io::Error),
}

/// What a disk is copied from or to.
#[derive(Debug)]
pub enum End {
    /// A raw disk.
    Raw(RawDisk),
    /// An image, dynamic or fixed; as a destination one that was just created (V1).
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
}

/// How far a copy has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the disk that are done, data or not.
    pub done_bytes: u64,
    /// Bytes of the disk.
    pub total_bytes: u64,
}

/// Why a disk could not be copied.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages are the documentation")]
pub enum CopyError {
    #[error("the source cannot be read at byte {at_bytes}")]
    ReadRaw { at_bytes: u64, source: io::Error },
    #[error("the source cannot be read at byte {at_bytes}")]
    ReadImage { at_bytes: u64, source: ReadError },
    #[error("the destination cannot be written at byte {at_bytes}")]
    WriteRaw { at_bytes: u64, source: io::Error },
    #[error("the destination cannot be written at byte {at_bytes}")]
    WriteImage { at_bytes: u64, source: WriteError },
    #[error("the destination has {found} bytes, but the source's disk has {needed}")]
    TooSmall { found: u64, needed: u64 },
    #[error("the destination cannot be brought to stable storage")]
    SyncRaw(#[source] io::Error),
    #[error("the destination cannot be closed")]
    Close(#[source] WriteError),
    #[error("interrupted")]
    Interrupted,
}

/// Copies the disk `from` to `to`, which must be at least as large, and syncs it.
/// `go_on` is told of the progress now and then and may break the copy off.
///
/// # Errors
/// The first failure; the destination is then incomplete.
pub fn copy(
    from: &End,
    to: &End,
    go_on: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<(), CopyError> {
    let (needed, found) = (from.capacity().bytes(), to.capacity().bytes());
    if found < needed {
        return Err(CopyError::TooSmall { found, needed });
    }
    let mut done = 0;
    let mut tell = |done_bytes| match go_on(Progress {
        done_bytes,
        total_bytes: needed,
    }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(CopyError::Interrupted),
    };
    let mut buffer = Vec::new();
    while let Some(data) = from.next_data(done)? {
        to.zero(done..data.start, &mut tell)?;
        done = data.start;
        while done < data.end {
            let end = (done - done % CHUNK_BYTES + CHUNK_BYTES).min(data.end);
            buffer.resize(
                usize::try_from(end - done).expect("a chunk fits in memory"),
                0,
            );
            from.read(&mut buffer, done)?;
            to.write_sparse(&buffer, done)?;
            done = end;
            tell(done)?;
        }
    }
    to.zero(done..needed, &mut tell)?;
    tell(needed)?;
    to.finish()
}

impl End {
    /// The next run at or behind `at_bytes` that may read other than zero, cut to sectors.
    pub(crate) fn next_data(&self, at_bytes: u64) -> Result<Option<Range<u64>>, CopyError> {
        match self {
            Self::Raw(raw) => {
                let data = raw
                    .next_data(at_bytes)
                    .map_err(|source| CopyError::ReadRaw { at_bytes, source })?;
                // Bytes of a raw disk lie on it.
                let sectors = data.and_then(|data| raw.capacity().range_around_bytes(data));
                Ok(sectors
                    .map(|range| range.start_bytes()..range.start_bytes() + range.len_bytes()))
            }
            Self::Image(disk) => {
                let mut at = at_bytes;
                let rest = bytes_of(disk.capacity(), at_bytes..disk.capacity().bytes());
                let visit = disk.lane().enter();
                for extent in disk.map(rest, &visit) {
                    let end = at + extent.len_bytes;
                    if matches!(extent.source, Source::Stored { .. }) {
                        return Ok(Some(at..end));
                    }
                    at = end;
                }
                Ok(None)
            }
        }
    }

    pub(crate) fn read(&self, buf: &mut [u8], at_bytes: u64) -> Result<(), CopyError> {
        match self {
            Self::Raw(raw) => raw
                .read(buf, at_bytes)
                .map_err(|source| CopyError::ReadRaw { at_bytes, source }),
            Self::Image(disk) => {
                let range = bytes_of(disk.capacity(), at_bytes..at_bytes + buf.len() as u64);
                disk.read_at(range, buf)
                    .map_err(|source| CopyError::ReadImage { at_bytes, source })
            }
        }
    }

    /// Writes what of `buf` is not zero, or all of it where zeros are not there already (V1).
    fn write_sparse(&self, buf: &[u8], at_bytes: u64) -> Result<(), CopyError> {
        if !self.reads_zeros() {
            return self.write(buf, at_bytes);
        }
        for piece in nonzero_pieces(buf, at_bytes) {
            self.write(&buf[piece.clone()], at_bytes + piece.start as u64)?;
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], at_bytes: u64) -> Result<(), CopyError> {
        match self {
            Self::Raw(raw) => raw
                .file()
                .write_all_at(buf, at_bytes)
                .map_err(|source| CopyError::WriteRaw { at_bytes, source }),
            Self::Image(disk) => {
                let range = bytes_of(disk.capacity(), at_bytes..at_bytes + buf.len() as u64);
                disk.write_at(range, buf)
                    .map_err(|source| CopyError::WriteImage { at_bytes, source })
            }
        }
    }

    fn reads_zeros(&self) -> bool {
        match self {
            Self::Raw(raw) => raw.is_new,
            Self::Image(_) => true,
        }
    }

    /// Makes `range` read zeros, unless it does (V1).
    fn zero(
        &self,
        range: Range<u64>,
        tell: &mut dyn FnMut(u64) -> Result<(), CopyError>,
    ) -> Result<(), CopyError> {
        if self.reads_zeros() || range.is_empty() {
            return Ok(());
        }
        let zeros = vec![0; usize::try_from(CHUNK_BYTES).expect("a chunk fits in memory")];
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(CHUNK_BYTES);
            self.write(
                &zeros[..usize::try_from(len).expect("a chunk fits in memory")],
                at,
            )?;
            at += len;
            tell(at)?;
        }
        Ok(())
    }

    /// Makes it all durable (V3).
    fn finish(&self) -> Result<(), CopyError> {
        match self {
            Self::Raw(raw) => raw.file().sync_all().map_err(CopyError::SyncRaw),
            Self::Image(disk) => disk.close().map_err(CopyError::Close),
        }
    }
}

/// The sectors of a range of bytes that was cut to sectors and to the disk before.
fn bytes_of(capacity: Capacity, bytes: Range<u64>) -> SectorRange {
    capacity
        .range_of_bytes(bytes)
        .expect("the range was cut to sectors and to the disk")
}

/// The parts of `buf` that are not zero, in steps that begin at multiples of
/// [`STEP_BYTES`] on the disk; neighbours in one piece.
fn nonzero_pieces(buf: &[u8], at_bytes: u64) -> impl Iterator<Item = Range<usize>> + '_ {
    let first =
        STEP_BYTES - usize::try_from(at_bytes % STEP_BYTES as u64).expect("less than a step");
    let step_end = move |start: usize| {
        let end = if start < first {
            first
        } else {
            start - (start - first) % STEP_BYTES + STEP_BYTES
        };
        end.min(buf.len())
    };
    let is_data = move |start: usize| !is_zero(&buf[start..step_end(start)]);
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < buf.len() && !is_data(at) {
            at = step_end(at);
        }
        let start = at;
        while at < buf.len() && is_data(at) {
            at = step_end(at);
        }
        (start < at).then_some(start..at)
    })
}

/// Whether all bytes are zero; in the shape that the compiler makes vector code of.
pub(crate) fn is_zero(buf: &[u8]) -> bool {
    let (lines, rest) = buf.as_chunks::<64>();
    lines
        .iter()
        .all(|line| line.iter().fold(0, |seen, &byte| seen | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(buf: &[u8], at_bytes: u64) -> Vec<Range<usize>> {
        nonzero_pieces(buf, at_bytes).collect()
    }

    #[test]
    fn zeros_are_left_out_in_steps_of_the_disk_not_of_the_buffer() {
        let mut buf = vec![0; 5 * STEP_BYTES];
        assert_eq!(pieces(&buf, 0), []);
        buf[STEP_BYTES] = 1;
        buf[3 * STEP_BYTES - 1] = 1;
        assert_eq!(
            pieces(&buf, 0).as_slice(),
            std::slice::from_ref(&(STEP_BYTES..3 * STEP_BYTES))
        );
        // The buffer begins 512 bytes into a step: the steps end 512 bytes earlier in it.
        assert_eq!(pieces(&buf, 512), [3584..7680, 11_776..15_872]);
        *buf.last_mut().unwrap() = 1;
        assert_eq!(
            pieces(&buf, 0).last(),
            Some(&(4 * STEP_BYTES..5 * STEP_BYTES))
        );
    }

    #[test]
    fn the_pieces_hold_every_byte_that_is_not_zero() {
        for len in [1, 511, 512, 4095, 4096, 4097, 20_000] {
            for set in [0, len / 2, len - 1] {
                let mut buf = vec![0; len];
                buf[set] = 7;
                let found = pieces(&buf, 1536);
                assert_eq!(found.len(), 1, "{len} {set}");
                assert!(found[0].contains(&set), "{len} {set}");
                assert!(found[0].len() <= STEP_BYTES);
            }
        }
    }

    fn raw(path: &Path, access: Access) -> End {
        End::Raw(RawDisk::open(path, access, Locking::Locked).unwrap())
    }

    /// A raw disk of 3 MiB with something in the second.
    fn source(directory: &Path) -> End {
        let path = directory.join("from");
        let file = File::create(&path).unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(&[5; 700], (1 << 20) + 512).unwrap();
        raw(&path, Access::ReadOnly)
    }

    #[test]
    fn what_was_there_before_is_written_over_everywhere() {
        let directory = tempfile::tempdir().unwrap();
        let from = source(directory.path());
        let path = directory.path().join("to");
        std::fs::write(&path, vec![0xFF; 4 << 20]).unwrap();
        let mut told = Vec::new();
        copy(&from, &raw(&path, Access::Writable), &mut |progress| {
            told.push(progress.done_bytes);
            ControlFlow::Continue(())
        })
        .unwrap();
        let found = std::fs::read(&path).unwrap();
        assert!(found[..3 << 20] == std::fs::read(directory.path().join("from")).unwrap());
        assert!(
            found[3 << 20..] == [0xFF; 1 << 20],
            "behind the disk nothing changes"
        );
        assert!(
            told.is_sorted() && told.last() == Some(&(3 << 20)),
            "{told:?}"
        );
    }

    #[test]
    fn a_copy_goes_on_only_while_it_is_told_to() {
        let directory = tempfile::tempdir().unwrap();
        let from = source(directory.path());
        let path = directory.path().join("to");
        let to = End::Raw(RawDisk::create(&path, from.capacity()).unwrap());
        let stopped = copy(&from, &to, &mut |_| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(CopyError::Interrupted)));
    }

    #[test]
    fn a_destination_that_is_too_small_is_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let from = source(directory.path());
        let path = directory.path().join("to");
        let to =
            End::Raw(RawDisk::create(&path, Capacity::from_bytes_rounded_down(1 << 20)).unwrap());
        let refused = copy(&from, &to, &mut |_| ControlFlow::Continue(()));
        assert!(matches!(
            refused,
            Err(CopyError::TooSmall {
                found: 0x10_0000,
                needed: 0x30_0000
            })
        ));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    }
}
