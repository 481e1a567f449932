//! A raw disk: a file, or a block device, with the bytes of the disk and nothing else.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::unistd::{Whence, lseek};

use crate::storage::{Access, FileError, HostFile, Locking};
use crate::units::Capacity;

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

    /// Whether it reads zeros where nothing was written since (V1).
    pub(super) const fn is_new(&self) -> bool {
        self.is_new
    }

    /// The size as a disk: a partial last sector is filled up with zeros.
    pub fn capacity(&self) -> Capacity {
        Capacity::from_bytes_rounded_up(self.len_bytes)
    }

    pub(super) fn file(&self) -> &File {
        match &self.file {
            RawFile::Regular(file) => file.file(),
            RawFile::Device(file) => file,
        }
    }

    /// The next run at or behind `at_bytes` that is no hole.
    pub(super) fn next_data(&self, at_bytes: u64) -> io::Result<Option<Range<u64>>> {
        next_data(self.file(), at_bytes..self.len_bytes)
    }

    /// Reads; behind the end of the file is the rest of the last sector, zeros.
    pub(super) fn read(&self, buf: &mut [u8], at_bytes: u64) -> io::Result<()> {
        let in_file = usize::try_from(self.len_bytes.saturating_sub(at_bytes))
            .unwrap_or(usize::MAX)
            .min(buf.len());
        let (stored, padding) = buf.split_at_mut(in_file);
        padding.fill(0);
        self.file().read_exact_at(stored, at_bytes)
    }
}

/// The first run of a range of a file that is no hole.
fn next_data(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let end = range.end;
    let Some(start) = data_start(file, range)? else {
        return Ok(None);
    };
    Ok(Some(start..data_end(file, start..end)?))
}

/// Where the first byte of a range of a file is that is in no hole.
pub(super) fn data_start(file: &File, range: Range<u64>) -> io::Result<Option<u64>> {
    if range.is_empty() {
        return Ok(None);
    }
    match seek(file, range.start, Whence::SeekData) {
        Ok(start) => Ok((start < range.end).then_some(start)),
        Err(Errno::ENXIO) => Ok(None),
        // This file system or device knows no holes.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(range.start)),
        Err(error) => Err(error.into()),
    }
}

/// Where the data end with which a range of a file begins.
pub(super) fn data_end(file: &File, range: Range<u64>) -> io::Result<u64> {
    match seek(file, range.start, Whence::SeekHole) {
        Ok(end) => Ok(end.min(range.end)),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(range.end),
        Err(error) => Err(error.into()),
    }
}

fn seek(file: &File, at_bytes: u64, whence: Whence) -> nix::Result<u64> {
    let at = i64::try_from(at_bytes).map_err(|_| Errno::EOVERFLOW)?;
    lseek(file, at, whence).map(i64::cast_unsigned)
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
