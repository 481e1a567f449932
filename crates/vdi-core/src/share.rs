//! Extents that two files share: a copy that moves no bytes and takes no space.
//!
//! Only btrfs and XFS are asked for it. Both share whole blocks of the file system, at places that are multiples of
//! them in both files.
//!
//! - A copy between files ([`crate::convert`]) asks by `copy_file_range`, which shares where the file system can, and copies in the kernel
//!   elsewhere. A copy in the kernel sees no zeros; XFS that was made without `reflink` does so, and then the destination takes what the
//!   source does.
//! - A write to a child, which leaves the rest of a block to its parents ([`Fill`]), is for whoever serves a guest, who asks in the way that
//!   shares or fails (`FICLONERANGE`).
//!
//! Sources: `copy_file_range(2)`, `ioctl_ficlonerange(2)`.

use std::fs::File;
use std::ops::Range;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC, fstatfs};

use crate::reservation::Fill;
use crate::units::FileOffset;

/// Fewer bytes are copied sooner than shared, and stay together with what is written beside them.
const LEAST_SHARED_BYTES: u64 = 32 << 10;

/// In what units a file shares extents with others of its file system; `None` if it cannot.
pub fn unit_of(file: &File) -> Option<u64> {
    let found = fstatfs(file).ok()?;
    let shares = [BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC].contains(&found.filesystem_type());
    let unit = u64::try_from(found.block_size()).ok()?;
    (shares && unit.is_power_of_two()).then_some(unit)
}

/// In what units `from` can share extents with `to`; `None` if it cannot.
pub(crate) fn unit_bytes(from: &File, to: &File) -> Option<u64> {
    // Nothing is copied, but it is looked whether it could be: not between two file systems.
    let can = || copy_file_range(from, Some(&mut 0), to, Some(&mut 0), 0) == Ok(0);
    unit_of(to).filter(|_| can())
}

/// The bytes of a fill that can be shared in such units, counted from its first one: `None` if they lie differently in the two files, or
/// are too few to be worth it.
pub fn shareable(fill: &Fill, unit: u64) -> Option<Range<u64>> {
    let skipped = fill.to.0.next_multiple_of(unit) - fill.to.0;
    let whole = fill.len_bytes.checked_sub(skipped)? / unit * unit;
    let lie_alike = fill.from.0 % unit == fill.to.0 % unit;
    (lie_alike && whole >= LEAST_SHARED_BYTES).then_some(skipped..skipped + whole)
}

/// Lets `to` share a range of `from`, and says how many bytes of it: the rest has to be copied.
pub(crate) fn share(
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

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 4096;

    fn of(from: u64, to: u64, len_bytes: u64) -> Option<Range<u64>> {
        let fill = Fill {
            depth: 1,
            from: FileOffset(from),
            to: FileOffset(to),
            len_bytes,
        };
        shareable(&fill, UNIT)
    }

    #[test]
    fn whole_units_are_shared_where_they_lie_alike_in_both_files() {
        let (least, long) = (LEAST_SHARED_BYTES, 1 << 20);
        assert_eq!(of(0x20_0000, 0x10_0000, long), Some(0..long));
        assert_eq!(of(0x20_0200, 0x10_0200, long), Some(0xE00..long - 0x200));
        assert_eq!(of(0x20_0200, 0x10_0000, long), None);
        assert_eq!(of(0x20_0000, 0x10_0000, least), Some(0..least));
        assert_eq!(of(0x20_0000, 0x10_0000, least + 511), Some(0..least));
        assert_eq!(of(0x20_0000, 0x10_0000, least - 1), None);
        assert_eq!(of(0x20_0001, 0x10_0001, 1), None);
    }
}
