//! The image's file as data goes through it: by the page cache, or past it (`--cache direct`).
//!
//! Not here: where the data is (`vdi-core`), and the file's metadata, which the core always writes through the page
//! cache. So that the two never hold different versions of one page, data that shares a page with metadata goes
//! through the page cache too, and all that lies behind goes through O_DIRECT:
//!
//! ```text
//! 0          data_start   floor = data_start rounded up to a page
//! | header, map | data .. | data ...........................
//! |<--- page cache ------>|<--- O_DIRECT -------------------
//! ```
//!
//! Sources: open(2), section on O_DIRECT ("applications should avoid mixing"); preadv2(2) (RWF_NOWAIT).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use vdi_core::units::DataArea;
use vdi_core::{Access, FileOffset, Fill, HostFile, share};

use crate::ring::{
    DirectAlignment, GuestBuffer, can_read_cached, direct_alignment, read_now, write_now,
};

/// The page cache's unit.
const PAGE: u64 = 4096;

/// The largest offset alignment that guests can meet, who write in sectors.
const SECTOR: u64 = 512;

/// How bytes that lie in the host's memory are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reads {
    /// At once: the file system has no other place for them (tmpfs).
    Now,
    /// At once if the page cache has them, which the kernel tells (RWF_NOWAIT).
    IfCached,
    /// Like all others: past the page cache, or the file system cannot tell.
    Queued,
}

/// The open image, as data is read and written.
#[derive(Clone, Debug)]
pub(crate) struct ImageFile {
    buffered: Arc<File>,
    reads: Reads,
    /// It lies in the host's memory and nowhere else.
    in_memory: bool,
    direct: Option<Direct>,
    /// How the file that is written shares this one's extents.
    lends: Option<Arc<Lends>>,
}

/// What a parent lends.
#[derive(Debug)]
struct Lends {
    /// In what units.
    unit: u64,
    /// The host said no.
    is_over: AtomicBool,
}

#[derive(Clone, Debug)]
struct Direct {
    file: Arc<File>,
    floor: u64,
    memory_alignment: usize,
}

/// How a stretch of the file is reached.
#[derive(Debug)]
pub(crate) struct Route {
    /// Through which descriptor.
    pub(crate) file: Arc<File>,
    /// For how many bytes this holds.
    pub(crate) len_bytes: u64,
    /// What O_DIRECT asks of buffers; `None` for the page cache.
    pub(crate) alignment: Option<usize>,
}

/// Why `--cache direct` cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectError {
    /// The file system has no O_DIRECT, or the descriptor cannot be opened again.
    #[error("cannot open the image for direct I/O; use --cache writeback")]
    Open(#[source] io::Error),
    /// The file system knows no locks.
    #[error("cannot lock the image for direct I/O")]
    Lock(#[source] io::Error),
    /// statx failed.
    #[error("cannot learn what direct I/O asks for; use --cache writeback")]
    Alignment(#[source] io::Error),
    /// 4Kn storage.
    #[error(
        "direct I/O on this storage works in units of {offset_alignment} bytes, \
         but guests write sectors of 512 bytes; use --cache writeback"
    )]
    CoarseStorage { offset_alignment: u64 },
    /// The blocks of the image lie askew.
    #[error(
        "the image's data begin at byte {data_start} in blocks of {block_bytes} bytes, which is no multiple of the \
         {offset_alignment} bytes that direct I/O works in; use --cache writeback or convert the image"
    )]
    Misaligned {
        data_start: u64,
        block_bytes: u64,
        offset_alignment: u64,
    },
}

impl ImageFile {
    /// All I/O goes through the page cache.
    pub(crate) fn buffered(file: File) -> Self {
        Self {
            reads: reads_of(&file),
            in_memory: is_in_memory(&file),
            buffered: Arc::new(file),
            direct: None,
            lends: None,
        }
    }

    /// Data go past the page cache, as far as they share no page with metadata. `block_bytes` is the distance of
    /// blocks in the file.
    pub(crate) fn direct(file: File, access: Access, area: DataArea) -> Result<Self, DirectError> {
        let (data_start, block_bytes) = (area.start(), area.stride_bytes());
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let direct = File::options()
            .read(true)
            .write(access == Access::Writable)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .map_err(DirectError::Open)?;
        // A write that is on its way to the storage when this process is killed may not land in the next one's time.
        if access == Access::Writable {
            HostFile::lock_too(&direct, access).map_err(DirectError::Lock)?;
        }
        let alignment = direct_alignment(&direct).map_err(DirectError::Alignment)?;
        check_layout(alignment, data_start.0, block_bytes)?;
        // Read-ahead would bring pages with metadata and data into the cache as one folio. Advice only.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
        let direct = Direct {
            file: Arc::new(direct),
            floor: data_start.0.next_multiple_of(PAGE),
            memory_alignment: alignment.memory,
        };
        Ok(Self {
            reads: Reads::Queued,
            in_memory: is_in_memory(&file),
            buffered: Arc::new(file),
            direct: Some(direct),
            lends: None,
        })
    }

    /// The same, as a parent whose extents the file of `top` may share.
    pub(crate) fn lending_to(self, top: &Self) -> Self {
        let unit = share::unit_of(&top.buffered);
        let is_over = AtomicBool::new(false);
        let lends = unit.map(|unit| Arc::new(Lends { unit, is_over }));
        Self { lends, ..self }
    }

    /// The bytes of a fill from this parent that may be shared, counted from its first one.
    pub(crate) fn shareable(&self, fill: &Fill) -> Option<Range<u64>> {
        let lends = self.lends.as_ref()?;
        let goes_on = !lends.is_over.load(Ordering::Relaxed);
        share::shareable(fill, lends.unit).filter(|_| goes_on)
    }

    /// The host let the top image share nothing of this parent: it is not asked again, unless all it lacked was space or memory.
    pub(crate) fn refused(&self, error: &io::Error) {
        let lacking = [libc::ENOSPC, libc::EDQUOT, libc::ENOMEM, libc::EINTR];
        let is_for_now = error
            .raw_os_error()
            .is_some_and(|errno| lacking.contains(&errno));
        if let (Some(lends), false) = (&self.lends, is_for_now)
            && !lends.is_over.swap(true, Ordering::Relaxed)
        {
            tracing::debug!("a parent's extents cannot be shared ({error}): they are copied");
        }
    }

    /// How the first of `len_bytes` bytes at `at` are reached.
    pub(crate) fn route(&self, at: FileOffset, len_bytes: u64) -> Route {
        match &self.direct {
            None => Route {
                file: Arc::clone(&self.buffered),
                len_bytes,
                alignment: None,
            },
            Some(direct) if at.0 >= direct.floor => Route {
                file: Arc::clone(&direct.file),
                len_bytes,
                alignment: Some(direct.memory_alignment),
            },
            Some(direct) => Route {
                file: Arc::clone(&self.buffered),
                len_bytes: len_bytes.min(direct.floor - at.0),
                alignment: None,
            },
        }
    }

    /// Fills `into` from `at` on if the bytes can be had without waiting for storage; false if not.
    pub(crate) fn read_now(&self, at: FileOffset, into: &GuestBuffer) -> bool {
        read_now(&self.buffered, self.reads, at.0, into)
    }

    /// Writes all of `from` to the page cache; false if it goes another way, or did not go well.
    pub(crate) fn write_now(&self, at: FileOffset, from: &GuestBuffer) -> bool {
        self.direct.is_none() && write_now(&self.buffered, at.0, from)
    }

    /// Whether data go past the page cache.
    pub(crate) const fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// The descriptor for what is not data: clearing ranges.
    pub(crate) fn buffered_file(&self) -> Arc<File> {
        Arc::clone(&self.buffered)
    }

    /// Whether there is nothing that a sync would have to do.
    pub(crate) fn syncs_are_free(&self) -> bool {
        self.in_memory
    }

    /// A descriptor of the file for one who syncs: one file, so it covers both ways. Where it cannot be opened again, the
    /// shared one must do.
    pub(crate) fn file_for_syncs(&self) -> Arc<File> {
        let path = format!("/proc/self/fd/{}", self.buffered.as_raw_fd());
        File::open(path).map_or_else(|_| Arc::clone(&self.buffered), Arc::new)
    }
}

/// How the bytes of a file that the page cache has are read.
fn reads_of(file: &File) -> Reads {
    match is_in_memory(file) {
        true => Reads::Now,
        false if can_read_cached(file) => Reads::IfCached,
        false => Reads::Queued,
    }
}

fn is_in_memory(file: &File) -> bool {
    fstatfs(file).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC)
}

fn check_layout(
    alignment: DirectAlignment,
    data_start: u64,
    block_bytes: u64,
) -> Result<(), DirectError> {
    let offset_alignment = alignment.offset;
    if offset_alignment > SECTOR {
        return Err(DirectError::CoarseStorage { offset_alignment });
    }
    if [data_start, block_bytes]
        .iter()
        .any(|at| !at.is_multiple_of(offset_alignment))
    {
        return Err(DirectError::Misaligned {
            data_start,
            block_bytes,
            offset_alignment,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_io_is_refused_where_sectors_would_lie_askew() {
        let alignment = |offset| DirectAlignment {
            memory: 512,
            offset,
        };
        assert!(check_layout(alignment(512), 0x1200, 1 << 20).is_ok());
        let coarse = check_layout(alignment(4096), 0x2000, 1 << 20);
        assert!(matches!(coarse, Err(DirectError::CoarseStorage { .. })));
        let start = check_layout(alignment(512), 0x1201, 1 << 20);
        assert!(matches!(start, Err(DirectError::Misaligned { .. })));
        let stride = check_layout(alignment(512), 0x1200, (1 << 20) + 256);
        assert!(matches!(stride, Err(DirectError::Misaligned { .. })));
    }

    #[test]
    fn data_in_the_last_page_of_metadata_goes_through_the_page_cache() {
        let file = || Arc::new(tempfile::tempfile().unwrap());
        let direct = Direct {
            file: file(),
            floor: 0x2000,
            memory_alignment: 512,
        };
        let image = ImageFile {
            buffered: file(),
            reads: Reads::Queued,
            in_memory: false,
            direct: Some(direct),
            lends: None,
        };
        let below = image.route(FileOffset(0x1200), 0x10000);
        assert_eq!((below.len_bytes, below.alignment), (0xe00, None));
        let above = image.route(FileOffset(0x2000), 0xf200);
        assert_eq!((above.len_bytes, above.alignment), (0xf200, Some(512)));
    }
}
