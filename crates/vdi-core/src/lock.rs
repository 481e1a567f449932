//! The locks by which programs that open one image see each other.
//!
//! They are QEMU's: open-file-description locks on single bytes of the image, at 100 + n
//! for a permission that the holder has, at 200 + n for one that it shares with
//! nobody. All are read locks, so holders of the same one do not meet; a conflict is
//! found by asking who holds the byte opposite.
//!
//! Source: QEMU `block/file-posix.c`, `RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE`;
//! `include/block/block-common.h`, `BLK_PERM_*`. Facts only.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::storage::Access;

/// `RAW_LOCK_PERM_BASE`: byte of the first permission held.
const HELD_BASE: i64 = 100;
/// `RAW_LOCK_SHARED_BASE`: byte of the first permission not shared.
const UNSHARED_BASE: i64 = 200;

/// `BLK_PERM_*` by bit number.
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What nobody else may do meanwhile, whether we read or write.
const UNSHARED: [i64; 2] = [WRITE, RESIZE];

/// How long a conflict is looked at again: the locks of a process that was just killed go when the
/// kernel has ended its last I/O. A writer waits for what slow storage has in its queue, since it
/// may be the killed one's successor.
const READERS_PATIENCE: Duration = Duration::from_millis(100);
const WRITERS_PATIENCE: Duration = Duration::from_secs(1);
const ATTEMPT_PAUSE: Duration = Duration::from_millis(2);

/// Whether the locks were had.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Held,
    /// Another program has the image open in a way that excludes us.
    Conflict,
}

/// Takes the locks for `access` and keeps them until `file` is closed.
pub(crate) fn acquire(file: &File, access: Access) -> io::Result<Outcome> {
    // First take, then look: of two that come at once at least one sees the other.
    hold(file, access)?;
    let patience = match access {
        Access::ReadOnly => READERS_PATIENCE,
        Access::Writable => WRITERS_PATIENCE,
    };
    let deadline = Instant::now() + patience;
    while conflicts(file, held(access))? {
        if Instant::now() >= deadline {
            return Ok(Outcome::Conflict);
        }
        std::thread::sleep(ATTEMPT_PAUSE);
    }
    Ok(Outcome::Held)
}

/// Has a reader hold what a writer holds, if there is nobody else; otherwise it stays a reader.
pub(crate) fn begin_writing(file: &File) -> io::Result<Outcome> {
    let outcome = acquire(file, Access::Writable);
    if !matches!(outcome, Ok(Outcome::Held)) {
        keep_reading(file)?;
    }
    outcome
}

/// Takes the locks for `access` without a look at who else has some.
pub(crate) fn hold(file: &File, access: Access) -> io::Result<()> {
    for byte in bytes(held(access), HELD_BASE).chain(bytes(&UNSHARED, UNSHARED_BASE)) {
        fcntl(file, FcntlArg::F_OFD_SETLK(&one_byte(byte, libc::F_RDLCK)))?;
    }
    Ok(())
}

/// Keeps of a writer's locks what a reader has: others may read from now on, and nobody came in between who writes.
pub(crate) fn keep_reading(file: &File) -> io::Result<()> {
    for byte in bytes(&[WRITE, RESIZE], HELD_BASE) {
        fcntl(file, FcntlArg::F_OFD_SETLK(&one_byte(byte, libc::F_UNLCK)))?;
    }
    Ok(())
}

fn held(access: Access) -> &'static [i64] {
    match access {
        Access::ReadOnly => &[CONSISTENT_READ],
        Access::Writable => &[CONSISTENT_READ, WRITE, RESIZE],
    }
}

fn conflicts(file: &File, held: &[i64]) -> io::Result<bool> {
    for byte in bytes(held, UNSHARED_BASE).chain(bytes(&UNSHARED, HELD_BASE)) {
        let mut lock = one_byte(byte, libc::F_WRLCK);
        match fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)) {
            Ok(_) if i32::from(lock.l_type) == libc::F_UNLCK => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(false)
}

fn bytes(permissions: &[i64], base: i64) -> impl Iterator<Item = i64> {
    permissions.iter().map(move |permission| base + permission)
}

fn one_byte(at: i64, kind: i32) -> libc::flock {
    let short = |value: i32| i16::try_from(value).expect("lock constants are small");
    libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(file: &tempfile::NamedTempFile) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(file.path())
            .unwrap()
    }

    #[test]
    fn readers_share_and_a_writer_excludes_everybody() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b, c) = (open(&file), open(&file), open(&file));
        assert_eq!(acquire(&a, Access::ReadOnly).unwrap(), Outcome::Held);
        assert_eq!(acquire(&b, Access::ReadOnly).unwrap(), Outcome::Held);
        assert_eq!(acquire(&c, Access::Writable).unwrap(), Outcome::Conflict);
        drop((a, b, c));
        let (a, b) = (open(&file), open(&file));
        assert_eq!(acquire(&a, Access::Writable).unwrap(), Outcome::Held);
        assert_eq!(acquire(&b, Access::ReadOnly).unwrap(), Outcome::Conflict);
        drop(b);
        assert_eq!(
            acquire(&open(&file), Access::Writable).unwrap(),
            Outcome::Conflict
        );
    }

    #[test]
    fn a_writer_that_goes_on_as_a_reader_lets_readers_in_and_no_writer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, reader, writer) = (open(&file), open(&file), open(&file));
        assert_eq!(acquire(&first, Access::Writable).unwrap(), Outcome::Held);
        keep_reading(&first).unwrap();
        assert_eq!(acquire(&reader, Access::ReadOnly).unwrap(), Outcome::Held);
        let outcome = acquire(&writer, Access::Writable).unwrap();
        assert_eq!(outcome, Outcome::Conflict);
        drop(writer);
        assert_eq!(begin_writing(&first).unwrap(), Outcome::Conflict);
        drop(reader);
        let reader = open(&file);
        assert_eq!(begin_writing(&first).unwrap(), Outcome::Held);
        let outcome = acquire(&reader, Access::ReadOnly).unwrap();
        assert_eq!(outcome, Outcome::Conflict);
    }

    #[test]
    fn whoever_holds_too_keeps_others_out_when_the_first_is_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, too) = (open(&file), open(&file));
        assert_eq!(acquire(&first, Access::Writable).unwrap(), Outcome::Held);
        hold(&too, Access::Writable).unwrap();
        drop(first);
        let next = open(&file);
        assert_eq!(acquire(&next, Access::Writable).unwrap(), Outcome::Conflict);
        drop(too);
        assert_eq!(acquire(&next, Access::Writable).unwrap(), Outcome::Held);
    }
}
