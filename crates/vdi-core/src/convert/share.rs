//! Extents that two files share: a copy that moves no bytes and takes no space.
//!
//! `copy_file_range` shares where the file system can, and copies in the kernel elsewhere. A copy in the
//! kernel sees no zeros, so it is asked for only on file systems that share: btrfs, and XFS (which
//! shares unless it was made without `reflink`; then the destination takes what the source does).
//! Both share whole blocks of the file system only.
//!
//! Sources: `copy_file_range(2)`, `ioctl_ficlonerange(2)`.

use std::fs::File;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};

use crate::units::FileOffset;

/// In what units `from` can share extents with `to`; `None` if it cannot.
pub(super) fn unit_bytes(from: &File, to: &File) -> Option<u64> {
    let found = fstatfs(to).ok()?;
    let shares = [BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC].contains(&found.filesystem_type());
    let unit = u64::try_from(found.block_size()).ok()?;
    // Nothing is copied, but it is looked whether it could be: not between two file systems.
    let can = || copy_file_range(from, Some(&mut 0), to, Some(&mut 0), 0) == Ok(0);
    (shares && unit.is_power_of_two() && can()).then_some(unit)
}

/// Lets `to` share a range of `from`, and says how many bytes of it: the rest has to be copied.
pub(super) fn share(
    from: &File,
    from_at: FileOffset,
    to: &File,
    to_at: FileOffset,
    len_bytes: u64,
) -> nix::Result<u64> {
    let signed = |at: FileOffset| i64::try_from(at.0).map_err(|_| Errno::EOVERFLOW);
    let (mut from_at, mut to_at) = (signed(from_at)?, signed(to_at)?);
    let mut done = 0;
    while done < len_bytes {
        let left = usize::try_from(len_bytes - done).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), left) {
            Ok(0) | Err(Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS) => break,
            Ok(bytes) => done += bytes as u64,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
