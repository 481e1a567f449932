//! What of a file the host has in memory only: the bytes that a power loss would take.
//!
//! Not a proof that a disk's own cache was flushed: it sees whether somebody made the kernel write, by whatever
//! system call or ring.
//!
//! Source: Linux `cachestat(2)`, since 6.5.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

/// The same on every architecture, but unknown to the `libc` crate.
const SYS_CACHESTAT: libc::c_long = 451;

/// Number of pages of the file that are newer than what its disk was given.
///
/// # Panics
/// If the kernel cannot say.
#[must_use]
#[expect(unsafe_code, reason = "no safe wrapper of cachestat exists")]
pub fn unwritten_pages(path: &Path) -> u64 {
    let file = File::open(path).expect("the image can be opened");
    let whole: [u64; 2] = [0, 0]; // struct cachestat_range: offset 0, to the end
    let mut counts = [0_u64; 5]; // struct cachestat: cached, dirty, under writeback, evicted, recently evicted
    // SAFETY: both pointers are to live arrays of the sizes that the kernel's structures have.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            whole.as_ptr(),
            counts.as_mut_ptr(),
            0_u32,
        )
    };
    assert_eq!(
        result,
        0,
        "cachestat fails: {}",
        std::io::Error::last_os_error()
    );
    counts[1] + counts[2]
}

/// Whether writes leave more than `few` pages of the file unwritten, at one of several tries: when others write much, the kernel
/// writes any file at any time.
pub fn leave_unwritten(path: &Path, few: u64, mut write: impl FnMut()) -> bool {
    (0..10).any(|_| {
        write();
        unwritten_pages(path) > few
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::{leave_unwritten, unwritten_pages};

    #[test]
    fn a_sync_is_seen() {
        let directory = crate::server::scratch();
        let path = directory.path().join("file");
        let file = std::fs::File::create(&path).unwrap();
        let mut write = || file.write_all_at(&[1; 8192], 0).unwrap();
        assert!(leave_unwritten(&path, 1, &mut write));
        assert!(!leave_unwritten(&path, 2, &mut write));
        file.sync_data().unwrap();
        assert_eq!(unwritten_pages(&path), 0);
    }
}
