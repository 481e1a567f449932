//! The socket's file: made for its owner alone, taken over from a dead daemon, left to a living one.

use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::{Mode, umask};
use std::os::fd::AsRawFd;

/// Held while a file is judged, made or removed. A socket that is bound and does not listen yet looks like a dead daemon's; what was judged to be
/// one's own may be another's when it is removed; and the process has one umask.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A listening socket whose file goes away with it.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode, so that nobody else's socket is removed.
    identity: (u64, u64),
    /// Whether the file is another process's to remove.
    is_others: AtomicBool,
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Another daemon answers there.
    #[error("{} is in use by a running program; stop it or choose another path", path.display())]
    InUse { path: PathBuf },
    /// It is not ours to replace.
    #[error("{} exists and is not a socket; choose another path", path.display())]
    NotASocket { path: PathBuf },
    /// The kernel refused.
    #[error("cannot listen on {}", path.display())]
    Listen {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl SocketFile {
    /// Listens at `path`, which only this user may connect to.
    pub(crate) fn listen(path: &Path) -> Result<(Self, UnixListener), SocketError> {
        let failed = |source| SocketError::Listen {
            path: path.to_owned(),
            source,
        };
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        remove_stale(path)?;
        let before = umask(Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(path);
        umask(before);
        let listener = listener.map_err(failed)?;
        let identity = identity(path).map_err(failed)?;
        Ok((
            Self {
                path: path.to_owned(),
                identity,
                is_others: AtomicBool::new(false),
            },
            listener,
        ))
    }

    /// The file of a socket on which another process listens, which is that one's until it is owned. `None` if it is not there.
    pub(crate) fn of_another(path: &Path) -> Option<Self> {
        Some(Self {
            path: path.to_owned(),
            identity: identity(path).ok()?,
            is_others: AtomicBool::new(true),
        })
    }

    /// It is ours from now on.
    pub(crate) fn own(&self) {
        self.is_others.store(false, Ordering::Release);
    }

    /// It is another process's from now on.
    pub(crate) fn disown(&self) {
        self.is_others.store(true, Ordering::Release);
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let is_ours = !self.is_others.load(Ordering::Acquire);
        if is_ours && identity(&self.path).is_ok_and(|found| found == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket at which nobody listens any more.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Listen {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    if is_alive(path).map_err(failed)? {
        return Err(SocketError::InUse {
            path: path.to_owned(),
        });
    }
    std::fs::remove_file(path).map_err(failed)
}

/// Whether someone listens. Non-blocking, since a full backlog would make us wait.
fn is_alive(path: &Path) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) | Err(Errno::EAGAIN) => Ok(true),
        Err(Errno::ECONNREFUSED | Errno::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn a_dead_daemons_socket_is_replaced_and_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (file, listener) = SocketFile::listen(&path).unwrap();
        assert!(matches!(
            SocketFile::listen(&path),
            Err(SocketError::InUse { .. })
        ));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn of_those_who_want_one_path_at_once_one_has_it_and_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..1000 {
            let path = dir.path().join(round.to_string());
            let at_once = Barrier::new(4);
            let listen = || {
                at_once.wait();
                SocketFile::listen(&path).ok()
            };
            let made = std::thread::scope(|scope| {
                let all = [(); 4].map(|()| scope.spawn(listen));
                all.map(|thread| thread.join().unwrap())
            });
            assert_eq!(made.iter().flatten().count(), 1, "round {round}");
            assert!(is_alive(&path).unwrap(), "round {round}");
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "round {round}");
        }
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(
            SocketFile::listen(&path),
            Err(SocketError::NotASocket { .. })
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_socket_that_goes_over_to_another_process_is_removed_by_its_new_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (file, listener) = SocketFile::listen(&path).unwrap();
        let next = SocketFile::of_another(&path).unwrap();
        // It failed before it was handed over.
        drop(next);
        assert!(path.exists());
        let next = SocketFile::of_another(&path).unwrap();
        file.disown();
        next.own();
        drop((file, listener));
        assert!(path.exists());
        drop(next);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_was_replaced_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (file, _listener) = SocketFile::listen(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(file);
        assert!(path.exists());
    }
}
