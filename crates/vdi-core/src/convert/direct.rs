//! A file opened a second time, past the page cache.
//!
//! Data that are not in the page cache cost new memory and a copy on their way through it, and the kernel's read-ahead begins anew
//! behind each hole. This is for large pieces of such data, and for what becomes of them.
//!
//! - **D1** What is written here is whole pages of the file that nobody else writes, so no page is written both here and
//!   through the page cache, which would lose one of the writes.
//! - **D2** Nothing depends on it: what is not done here is done through the page cache, and that also says what is wrong.
//!
//! Sources: `open(2)` (O_DIRECT), `statx(2)` (STATX_DIOALIGN), `preadv2(2)` (RWF_NOWAIT).

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use nix::libc;
use rustix::fs::{Advice, AtFlags, StatxFlags, fadvise, statx};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use rustix::param::page_size;

use crate::storage::Access;
use crate::units::FileOffset;

/// Fewer bytes are better off in the page cache, which collects them: here each call waits for the device.
pub(super) const LEAST_BYTES: u64 = 64 << 10;

/// What the kernel may have read around a byte that was looked for, at the beginning of a file.
const LOOKED_BYTES: NonZeroU64 = NonZeroU64::new(64 << 10).expect("not zero");

/// A file opened past the page cache.
#[derive(Debug)]
pub(super) struct Direct {
    file: File,
    /// What positions in the file, and lengths, must be multiples of.
    unit_bytes: u64,
    /// What addresses must be multiples of.
    memory_bytes: usize,
}

impl Direct {
    /// Opens the same file once more, if the file system says what it needs and the host allows it.
    pub(super) fn open(file: &File, access: Access) -> Option<Self> {
        let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        // Zeros where the file system cannot, or where the kernel is too old to say.
        let unit_bytes = u64::from(found.stx_dio_offset_align);
        let memory_bytes = usize::try_from(found.stx_dio_mem_align).ok()?;
        if unit_bytes == 0 || memory_bytes == 0 {
            return None;
        }
        let again = File::options()
            .read(true)
            .write(access == Access::Writable)
            .custom_flags(libc::O_DIRECT)
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Some(Self {
            file: again.ok()?,
            unit_bytes,
            memory_bytes,
        })
    }

    /// Reads `len_bytes` into `buf`, which begins with a page, and says where they are in it: not at its beginning if `at`
    /// is inside a unit. `None` if they could not all be read (D2).
    pub(super) fn read(
        &self,
        at: FileOffset,
        len_bytes: u64,
        buf: &mut [u8],
    ) -> Option<Range<usize>> {
        let skip_bytes = at.0 % self.unit_bytes;
        let start = at.0 - skip_bytes;
        let found =
            usize::try_from(skip_bytes).ok()?..usize::try_from(skip_bytes + len_bytes).ok()?;
        let whole = (skip_bytes + len_bytes).checked_next_multiple_of(self.unit_bytes)?;
        let buf = buf.get_mut(..usize::try_from(whole).ok()?)?;
        let mut done = 0;
        while done < found.end {
            match self.file.read_at(&mut buf[done..], start + done as u64) {
                Ok(0) => return None,
                Ok(bytes) => done += bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
        Some(found)
    }

    /// Writes what can be of a range that nobody else writes, and says which part of `buf` that is (D1).
    ///
    /// # Errors
    /// The host's, but those by which it says that it cannot do that.
    pub(super) fn write(&self, buf: &[u8], at: FileOffset) -> io::Result<Range<usize>> {
        let page = self.unit_bytes.max(page_size() as u64);
        let start = at.0.next_multiple_of(page);
        let end = at.0 + buf.len() as u64;
        let end = end - end % page;
        if end < start + LEAST_BYTES {
            return Ok(0..0);
        }
        let index = |at_file: u64| usize::try_from(at_file - at.0).expect("it is in the buffer");
        let pages = index(start)..index(end);
        let data = &buf[pages.clone()];
        if !data.as_ptr().addr().is_multiple_of(self.memory_bytes) {
            return Ok(0..0);
        }
        match self.file.write_all_at(data, start) {
            Ok(()) => Ok(pages),
            Err(error) if is_refusal(&error) => Ok(0..0),
            Err(error) => Err(error),
        }
    }
}

/// Whether an error is about how something is written, not about what came of it.
fn is_refusal(error: &io::Error) -> bool {
    [Errno::INVAL, Errno::OPNOTSUPP]
        .iter()
        .any(|refusal| error.raw_os_error() == Some(refusal.raw_os_error()))
}

/// Whether a byte of a file is not in the page cache. Where it is not, the kernel begins to read it; see [`forget`].
pub(super) fn is_cold(file: &File, at: FileOffset) -> bool {
    let mut byte = [0];
    let mut bufs = [IoSliceMut::new(&mut byte)];
    let read = preadv2(file, &mut bufs, at.0, ReadWriteFlags::NOWAIT);
    read == Err(Errno::AGAIN)
}

/// Has the kernel drop what [`is_cold`] brought into the page cache: whoever looks next is to see what was there before.
pub(super) fn forget(file: &File, at: FileOffset) {
    // If it stays, the next copy of this file is slower.
    let _ = fadvise(file, at.0, Some(LOOKED_BYTES), Advice::DontNeed);
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use super::*;
    use crate::convert::buffer::Buffer;

    fn contents(len: usize) -> Vec<u8> {
        (0..len)
            .map(|at| u8::try_from((at / 512 + at) % 251).expect("less than 251"))
            .collect()
    }

    /// A file with `bytes`, on stable storage and out of the page cache, and its second door if this file system has some.
    fn cold_file(path: &Path, bytes: &[u8]) -> (File, Option<Direct>) {
        std::fs::write(path, bytes).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        evict(&file);
        let direct = Direct::open(&file, Access::Writable);
        if direct.is_none() {
            eprintln!("nothing is tested: there is no O_DIRECT here");
        }
        (file, direct)
    }

    pub(in crate::convert) fn evict(file: &File) {
        file.sync_all().unwrap();
        fadvise(file, 0, None, Advice::DontNeed).unwrap();
    }

    #[test]
    fn bytes_are_read_wherever_they_begin_and_end() {
        let directory = tempfile::tempdir().unwrap();
        let bytes = contents(300_001);
        let (_file, direct) = cold_file(&directory.path().join("file"), &bytes);
        let Some(mut direct) = direct else { return };
        let mut buf = Buffer::new(400_000);
        // As a device with large sectors would have it.
        for unit_bytes in [direct.unit_bytes, 4096.max(direct.unit_bytes)] {
            direct.unit_bytes = unit_bytes;
            for at in [0, 1, 512, 1536, 4095, 4096, 70_000, 299_999] {
                for len in [1, 511, 4096, 65_536, 300_001 - at] {
                    let len = len.min(300_001 - at);
                    let found = direct.read(FileOffset(at as u64), len as u64, buf.whole());
                    let found = &buf.whole()[found.unwrap()];
                    assert!(found == &bytes[at..at + len], "{len} at {at}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_all_in_the_file_or_in_the_buffer_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let (file, direct) = cold_file(&directory.path().join("file"), &contents(200_000));
        let Some(direct) = direct else { return };
        let mut buf = Buffer::new(1 << 20);
        assert_eq!(direct.read(FileOffset(100_000), 100_001, buf.whole()), None);
        assert_eq!(direct.read(FileOffset(0), 9000, buf.first(8192)), None);
        file.set_len(150_000).unwrap();
        assert_eq!(direct.read(FileOffset(100_000), 100_000, buf.whole()), None);
    }

    #[test]
    fn whole_pages_are_written_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let page = page_size();
        let least = usize::try_from(LEAST_BYTES).unwrap().max(page);
        let len = least + 4 * page;
        let (file, direct) = cold_file(&directory.path().join("file"), &vec![7; len]);
        let Some(direct) = direct else { return };
        let mut buf = Buffer::new(len as u64);
        buf.whole().fill(8);
        let data = &buf.whole()[512..512 + least + 1024];
        // Half a kilobyte before the first whole page, and as much behind the last.
        let written = direct.write(data, FileOffset(page as u64 - 512)).unwrap();
        assert_eq!(written, 512..512 + least);
        let mut found = vec![0; len];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found[..page].iter().all(|&byte| byte == 7));
        assert!(found[page..page + least].iter().all(|&byte| byte == 8));
        assert!(found[page + least..].iter().all(|&byte| byte == 7));
    }

    #[test]
    fn little_is_left_to_the_page_cache() {
        let directory = tempfile::tempdir().unwrap();
        let (_file, direct) = cold_file(&directory.path().join("file"), &[]);
        let Some(direct) = direct else { return };
        let mut buf = Buffer::new(LEAST_BYTES);
        let little = buf.first(LEAST_BYTES - 4096);
        assert_eq!(direct.write(little, FileOffset(0)).unwrap(), 0..0);
    }

    #[test]
    fn a_look_at_the_page_cache_can_be_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let (file, direct) = cold_file(&directory.path().join("file"), &contents(1 << 20));
        let Some(direct) = direct else { return };
        for at in [FileOffset(0), FileOffset(600_000)] {
            assert!(is_cold(&file, at), "nobody has read it");
            direct.read(at, 4096, Buffer::new(8192).whole()).unwrap();
            forget(&file, FileOffset(at.0 - at.0 % 4096));
            assert!(is_cold(&file, at), "the look itself is forgotten");
            file.read_exact_at(&mut [0], at.0).unwrap();
            assert!(!is_cold(&file, at), "it was read");
        }
    }
}
