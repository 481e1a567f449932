//! The service manager, if one started the daemon: the sockets it hands over, and what it is told in return.
//!
//! Not here: what is served on the sockets (`session`, `control`). The way to the manager is opened before the daemon
//! enters its sandbox, where no socket can be made any more.
//!
//! Sources: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use sd_notify::NotifyState;

use crate::ring;

/// What a socket unit calls the socket for operators' commands (`FileDescriptorName=`). Every other name is a front end's.
const CONTROL: &str = "control";

/// Beats in the time that the manager allows for one.
const BEATS: u32 = 3;

/// The sockets that the daemon was started with.
#[derive(Debug, Default)]
pub(crate) struct Handed {
    /// For front ends.
    pub(crate) door: Option<OwnedFd>,
    /// For operators.
    pub(crate) control: Option<OwnedFd>,
}

/// Why the sockets of a socket unit are not what the daemon needs.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActivationError {
    /// LISTEN_FDS or LISTEN_FDNAMES make no sense, or a descriptor is not open.
    #[error("the service manager's sockets cannot be taken over")]
    Take(#[from] io::Error),
    /// One of them would be served by nobody.
    #[error(
        "the service manager handed over two sockets for {role}; one is served, and one called `{CONTROL}`"
    )]
    TooMany { role: &'static str },
}

impl Handed {
    /// Takes them over. Called first of all, while nothing else can have the descriptors.
    pub(crate) fn take() -> Result<Self, ActivationError> {
        let mut handed = Self::default();
        for (fd, name) in sd_notify::listen_fds_with_names()? {
            let (place, role) = if name == CONTROL {
                (&mut handed.control, "operators")
            } else {
                (&mut handed.door, "front ends")
            };
            if place.replace(ring::inherited(fd)?).is_some() {
                return Err(ActivationError::TooMany { role });
            }
        }
        Ok(handed)
    }
}

/// Who is told how the daemon is; nobody, unless it was started by a service manager.
#[derive(Debug)]
pub(crate) struct Manager {
    socket: Option<UnixDatagram>,
    beat: Option<Duration>,
}

impl Manager {
    /// The one that the environment names.
    pub(crate) fn from_environment() -> io::Result<Self> {
        let socket = std::env::var_os("NOTIFY_SOCKET").map(|address| connect(&address));
        let socket = socket.transpose()?;
        let beat = sd_notify::watchdog_enabled().map(|patience| patience / BEATS);
        Ok(Self {
            beat: beat.filter(|_| socket.is_some()),
            socket,
        })
    }

    /// The daemon serves.
    pub(crate) fn ready(&self, what: &str) {
        self.tell(&[NotifyState::Ready, NotifyState::Status(what)]);
    }

    /// The daemon ends, which takes as long as its last requests.
    pub(crate) fn stopping(&self) {
        self.tell(&[NotifyState::Stopping]);
    }

    /// The thread that serves front ends and operators goes round.
    pub(crate) fn beat(&self) {
        if self.beat.is_some() {
            self.tell(&[NotifyState::Watchdog]);
        }
    }

    /// How long it may be between two beats, if they are counted.
    pub(crate) fn interval(&self) -> Option<Duration> {
        self.beat
    }

    fn tell(&self, states: &[NotifyState<'_>]) {
        let Some(socket) = &self.socket else {
            return;
        };
        let lines: String = states.iter().map(|state| format!("{state}\n")).collect();
        // `write`, since the sandbox has no other way to send.
        if let Err(error) = rustix::io::write(socket, lines.as_bytes()) {
            tracing::debug!("the service manager does not listen: {error}");
        }
    }
}

/// A name that begins with @ is no file's.
fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // Better not told than not served.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_told_anything_without_a_manager() {
        let nobody = Manager {
            socket: None,
            beat: None,
        };
        nobody.ready("x");
        nobody.beat();
        assert_eq!(nobody.interval(), None);
    }

    #[test]
    fn a_manager_hears_states_in_lines() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let manager = Manager {
            socket: Some(ours),
            beat: Some(Duration::from_secs(1)),
        };
        let mut heard = [0; 64];
        manager.ready("serving a.vdi");
        let len = theirs.recv(&mut heard).unwrap();
        assert_eq!(&heard[..len], b"READY=1\nSTATUS=serving a.vdi\n");
        manager.beat();
        let len = theirs.recv(&mut heard).unwrap();
        assert_eq!(&heard[..len], b"WATCHDOG=1\n");
    }

    #[test]
    fn a_manager_is_found_by_a_path_or_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let listener = UnixDatagram::bind(&path).unwrap();
        connect(path.as_os_str()).unwrap().send(b"x").unwrap();
        assert_eq!(listener.recv(&mut [0; 4]).unwrap(), 1);

        let name = format!("vdi-vhost-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        let address = format!("@{name}");
        connect(OsStr::new(&address)).unwrap().send(b"x").unwrap();
        assert_eq!(listener.recv(&mut [0; 4]).unwrap(), 1);
    }
}
