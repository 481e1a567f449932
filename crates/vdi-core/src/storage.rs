//! The one room where the library touches an image's file.
//!
//! Everything goes through [`Storage`], so that a test can record or fail it.
//! [`HostFile`] is the real thing: a regular file, locked against other programs (P5).
//! Guest data do not pass here; whoever serves a guest moves them on its own.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate, posix_fallocate};
use nix::libc;
use rustix::io::{ReadWriteFlags, pwritev2};

use crate::holder::{self, Holder};
use crate::lock::{self, Outcome};
use crate::units::FileOffset;

/// What an image's file can do.
pub trait Storage: Send + Sync + Debug {
    /// Fills `buf` from the position `at`.
    ///
    /// # Errors
    /// The host's; `UnexpectedEof` where the file ends before `buf` is full.
    fn read_exact_at(&self, buf: &mut [u8], at: FileOffset) -> io::Result<()>;

    /// Writes all of `buf` at the position `at`.
    ///
    /// # Errors
    /// The host's; then any part of `buf` may have been written.
    fn write_all_at(&self, buf: &[u8], at: FileOffset) -> io::Result<()>;

    /// The length of the file in bytes.
    ///
    /// # Errors
    /// The host's.
    fn len_bytes(&self) -> io::Result<u64>;

    /// Cuts or lengthens the file; new bytes read as zeros and take no space.
    ///
    /// # Errors
    /// The host's.
    fn set_len(&self, len_bytes: u64) -> io::Result<()>;

    /// Gives the space of a range back; it reads as zeros afterwards.
    ///
    /// # Errors
    /// The host's.
    fn punch(&self, at: FileOffset, len_bytes: u64) -> io::Result<()>;

    /// Makes a range inside the file read as zeros; it keeps its space.
    ///
    /// # Errors
    /// The host's.
    fn zero(&self, at: FileOffset, len_bytes: u64) -> io::Result<()>;

    /// Reserves space for a range, which may lie behind the end: the file is lengthened. What was not
    /// there reads as zeros.
    ///
    /// # Errors
    /// The host's.
    fn reserve(&self, at: FileOffset, len_bytes: u64) -> io::Result<()>;

    /// Makes all that was written before durable (`fdatasync`).
    ///
    /// # Errors
    /// The host's; what was written since the last success may then be lost.
    fn sync(&self) -> io::Result<()>;

    /// As [`Self::write_all_at`], and when it returns `buf` and the length of the file are durable. Other data need not
    /// be: however much of them waits to be written, this does not wait for it.
    ///
    /// # Errors
    /// The host's, also those of [`Self::sync`].
    fn write_durably(&self, buf: &[u8], at: FileOffset) -> io::Result<()> {
        self.write_all_at(buf, at)?;
        self.sync()
    }

    /// The host's file, where there is one behind this: for what only the host can do with two files or
    /// knows about one, such as sharing extents and finding holes.
    fn host_file(&self) -> Option<&File> {
        None
    }
}

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Not a byte of the file changes.
    ReadOnly,
    /// Reads and writes; nobody else may have the image open.
    Writable,
}

/// Whether other programs are heeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locking {
    /// Locks are taken, and another program's respected.
    Locked,
    /// No locks, for looking at an image that is in use (qemu-img's `--force-share`).
    /// What is read may be half changed.
    ForceShare,
}

/// An image's file on the host.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    path: PathBuf,
}

impl HostFile {
    /// Opens a file and locks it.
    ///
    /// # Errors
    /// If there is no such file, it is no regular file, or another program has it.
    pub fn open(path: &Path, access: Access, locking: Locking) -> Result<Self, FileError> {
        let path = path.to_owned();
        let opened = File::options()
            .read(true)
            .write(access == Access::Writable)
            // A FIFO would wait for its other end.
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(source) => return Err(FileError::Open { path, source }),
        };
        let is_file = file.metadata().map(|metadata| metadata.is_file());
        match is_file {
            Ok(true) => {}
            Ok(false) => return Err(FileError::NotAFile { path }),
            Err(source) => return Err(FileError::Open { path, source }),
        }
        let outcome = match locking {
            Locking::Locked => lock::acquire(&file, access),
            Locking::ForceShare => Ok(Outcome::Held),
        };
        match outcome {
            Ok(Outcome::Held) => Ok(Self { file, path }),
            Ok(Outcome::Conflict) => Err(FileError::Locked {
                path,
                holder: holder::of(&file),
            }),
            Err(source) => Err(FileError::Lock { path, source }),
        }
    }

    /// The open file; its locks last as long as any copy of the descriptor.
    pub const fn file(&self) -> &File {
        &self.file
    }

    /// Has another open file description of a locked image hold the same locks, so that nobody gets
    /// the image while I/O through that one is under way, whatever became of this process.
    ///
    /// # Errors
    /// The host's.
    pub fn lock_too(other: &File, access: Access) -> io::Result<()> {
        lock::hold(other, access)
    }

    /// Has the one who reads an image exclude all others, as who writes it does, if there are none; whether that is so.
    ///
    /// # Errors
    /// The host's.
    pub fn exclude_others(&self) -> io::Result<bool> {
        Ok(lock::begin_writing(&self.file)? == Outcome::Held)
    }

    /// Ends the writing of an image: others may read it from now on, and none has written it in between.
    ///
    /// # Errors
    /// The host's.
    pub fn keep_reading(&self) -> io::Result<()> {
        lock::keep_reading(&self.file)
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// How often a call that was interrupted or could not be done at once is made again. A failure of such a call may be
/// final (W5), so it is not taken for one lightly.
const MOST_RETRIES: u32 = 100;

/// Makes a call again that may be made again.
fn persist<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..MOST_RETRIES {
        match call() {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            other => return other,
        }
    }
    call()
}

impl Storage for HostFile {
    fn read_exact_at(&self, buf: &mut [u8], at: FileOffset) -> io::Result<()> {
        persist(|| self.file.read_exact_at(buf, at.0))
    }

    fn write_all_at(&self, buf: &[u8], at: FileOffset) -> io::Result<()> {
        persist(|| self.file.write_all_at(buf, at.0))
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        persist(|| self.file.set_len(len_bytes))
    }

    fn punch(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        self.clear(FallocateFlags::FALLOC_FL_PUNCH_HOLE, at, len_bytes)
    }

    fn zero(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        self.clear(FallocateFlags::FALLOC_FL_ZERO_RANGE, at, len_bytes)
    }

    fn reserve(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        let signed = |value| i64::try_from(value).map_err(|_| io::Error::from(Errno::EFBIG));
        let (at, len) = (signed(at.0)?, signed(len_bytes)?);
        persist(|| Ok(posix_fallocate(&self.file, at, len)?))
    }

    fn sync(&self) -> io::Result<()> {
        persist(|| self.file.sync_data())
    }

    /// `RWF_SYNC` promises for one write what `O_SYNC` does: its bytes and all metadata of the file, so the length.
    fn write_durably(&self, buf: &[u8], at: FileOffset) -> io::Result<()> {
        let write = || {
            let buf = [IoSlice::new(buf)];
            Ok(pwritev2(&self.file, &buf, at.0, ReadWriteFlags::SYNC)?)
        };
        match persist(write) {
            Ok(done) if done == buf.len() => return Ok(()),
            Err(error) if !is_unknown(&error) => return Err(error),
            Ok(_) | Err(_) => {}
        }
        self.write_all_at(buf, at)?;
        self.sync()
    }

    fn host_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// Whether the host has no such call, or a filter of system calls forbids it.
fn is_unknown(error: &io::Error) -> bool {
    let unknown = [Errno::ENOSYS, Errno::EOPNOTSUPP, Errno::EPERM];
    unknown
        .iter()
        .any(|errno| error.raw_os_error() == Some(*errno as i32))
}

impl HostFile {
    /// Makes a range read as zeros in the way that `mode` says, or by writing them where the
    /// file system has no such way.
    fn clear(&self, mode: FallocateFlags, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |value| i64::try_from(value).map_err(|_| io::Error::from(Errno::EFBIG));
        let (start, len) = (signed(at.0)?, signed(len_bytes)?);
        match persist(|| Ok(fallocate(&self.file, mode, start, len)?)) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.write_zeros(at, len_bytes)
            }
            other => other,
        }
    }

    fn write_zeros(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let mut done = 0;
        while done < len_bytes {
            let left = usize::try_from(len_bytes - done).unwrap_or(usize::MAX);
            let piece = &ZEROS[..left.min(ZEROS.len())];
            self.write_all_at(piece, at.plus(done))?;
            done += piece.len() as u64;
        }
        Ok(())
    }
}

/// Why a file could not be opened.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum FileError {
    #[error("cannot open {}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{} is not a regular file; images on devices or pipes are not served", path.display())]
    NotAFile { path: PathBuf },
    #[error(
        "{} is in use by another program{}, which holds QEMU-style locks on it; stop that program first",
        path.display(),
        holder.as_ref().map_or_else(String::new, |holder| format!(" ({holder})"))
    )]
    Locked {
        path: PathBuf,
        /// If it can be seen.
        holder: Option<Holder>,
    },
    #[error("cannot lock {}", path.display())]
    Lock { path: PathBuf, source: io::Error },
}
