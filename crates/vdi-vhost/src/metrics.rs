//! What Prometheus sees: all disks' counters, over HTTP.
//!
//! ```text
//! doorman, sessions, workers ─► Stats, Backend ─► Seen ─► page ─► http ─► a scraper
//! ```
//!
//! One thread makes the page and serves it. It reads counters that others keep anyway, and waits for none of them: what is behind a
//! disk's lock is as it was when the lock could last be had. The thread may do almost nothing (`sandbox::filters`), for whoever
//! connects may be anyone on this machine.
//!
//! Source: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

mod http;
mod page;

use std::fmt::{self, Display, Formatter};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};

use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::Deserialize;

use self::http::{Listener, Server};
use self::page::{Seen, page};
use crate::fleet::Fleet;
use crate::sandbox::{Role, Sandbox};
use crate::socket::{SocketError, SocketFile};

/// Where scrapers connect.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) enum Endpoint {
    /// `127.0.0.1:9187`
    Tcp(SocketAddr),
    /// `unix:/run/vdi-vhost/metrics.sock`
    Unix(PathBuf),
}

/// Who may be let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// This machine.
    Local,
    /// Any that reaches the address.
    Anyone,
}

/// A text that says nothing about where scrapers connect.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no place for metrics; write an address such as 127.0.0.1:9187, or unix:PATH")]
pub(crate) struct EndpointError {
    text: String,
}

/// Why there are no metrics.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MetricsError {
    /// Whoever reaches it sees the names of disks and what they do.
    #[error(
        "metrics at {address} could be read from other machines; take a loopback address such as 127.0.0.1:{port}, or unix:PATH, \
         or give --metrics-public (`metrics-public = true`)",
        port = address.port()
    )]
    Public { address: SocketAddr },
    #[error("cannot listen at {address} for metrics")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("cannot duplicate the socket for metrics")]
    Duplicate(#[source] io::Error),
    #[error("cannot start the thread that serves metrics")]
    Thread(#[source] io::Error),
}

/// The place where scrapers connect, before anybody is served.
#[derive(Debug)]
pub(crate) struct Place {
    listener: Listener,
    handle: Arc<Handle>,
}

/// A place as the next daemon gets it.
#[derive(Debug)]
pub(crate) struct Handle {
    endpoint: Endpoint,
    socket: OwnedFd,
    file: Option<SocketFile>,
}

/// The thread that serves them; dropping it ends and joins it.
#[derive(Debug)]
pub(crate) struct Metrics {
    end: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    /// Its file goes away with it.
    handle: Arc<Handle>,
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let wrong = |_| EndpointError {
            text: text.to_owned(),
        };
        text.parse().map(Self::Tcp).map_err(wrong)
    }
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;

    fn try_from(text: String) -> Result<Self, EndpointError> {
        text.parse()
    }
}

impl Display for Endpoint {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}/metrics"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Endpoint {
    /// The same, with a relative path beginning at `dir`.
    pub(crate) fn anchored(self, dir: &Path) -> Self {
        match self {
            Self::Tcp(address) => Self::Tcp(address),
            Self::Unix(path) => Self::Unix(dir.join(path)),
        }
    }

    /// Its file, if it has one.
    pub(crate) fn file(&self) -> Option<&PathBuf> {
        match self {
            Self::Tcp(_) => None,
            Self::Unix(path) => Some(path),
        }
    }

    /// Listens there. Before the sandbox, in which no socket can be made.
    pub(crate) fn listen(&self, audience: Audience) -> Result<Place, MetricsError> {
        match self {
            Self::Tcp(address) => {
                refuse_strangers(*address, audience)?;
                let failed = |source| MetricsError::Listen {
                    address: *address,
                    source,
                };
                let listener = TcpListener::bind(address).map_err(failed)?;
                let found = listener.local_addr().map_err(failed)?;
                tracing::info!("metrics are at {}", Self::Tcp(found));
                self.place(Listener::Tcp(listener), None)
            }
            Self::Unix(path) => {
                let (file, listener) = SocketFile::listen(path)?;
                tracing::info!("metrics are at {self}");
                self.place(Listener::Unix(listener), Some(file))
            }
        }
    }

    /// Listens on the socket that another daemon has there.
    pub(crate) fn adopt(&self, socket: OwnedFd, audience: Audience) -> Result<Place, MetricsError> {
        match self {
            Self::Tcp(address) => {
                refuse_strangers(*address, audience)?;
                self.place(Listener::Tcp(TcpListener::from(socket)), None)
            }
            Self::Unix(path) => {
                let listener = Listener::Unix(UnixListener::from(socket));
                self.place(listener, SocketFile::of_another(path))
            }
        }
    }

    fn place(&self, listener: Listener, file: Option<SocketFile>) -> Result<Place, MetricsError> {
        let socket = match &listener {
            Listener::Tcp(listener) => listener.try_clone().map(OwnedFd::from),
            Listener::Unix(listener) => listener.try_clone().map(OwnedFd::from),
        };
        let handle = Handle {
            endpoint: self.clone(),
            socket: socket.map_err(MetricsError::Duplicate)?,
            file,
        };
        let handle = Arc::new(handle);
        Ok(Place { listener, handle })
    }
}

/// Metrics are not for other machines unless that was said.
fn refuse_strangers(address: SocketAddr, audience: Audience) -> Result<(), MetricsError> {
    if audience == Audience::Local && !address.ip().is_loopback() {
        return Err(MetricsError::Public { address });
    }
    Ok(())
}

impl Handle {
    /// What the place is called.
    pub(crate) fn name(&self) -> String {
        self.endpoint.to_string()
    }

    /// The socket.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn own(&self) {
        self.file.iter().for_each(SocketFile::own);
    }

    /// The socket's file is another process's.
    pub(crate) fn disown(&self) {
        self.file.iter().for_each(SocketFile::disown);
    }
}

impl Metrics {
    /// Serves what is to be seen of the disks from now on.
    pub(crate) fn start(
        place: Place,
        fleet: &Arc<Fleet>,
        sandbox: &Sandbox,
    ) -> Result<Self, MetricsError> {
        let failed = MetricsError::Thread;
        fleet.has_metrics_at(&place.handle);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let end = EventFd::from_flags(flags).map_err(|errno| failed(errno.into()))?;
        let end = Arc::new(end);
        let mut server = Server::new(place.listener, Arc::clone(&end)).map_err(failed)?;
        let (fleet, sandbox) = (Arc::clone(fleet), sandbox.clone());
        let (started, ready) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("metrics".to_owned())
            .spawn(move || {
                let confined = sandbox.confine(Role::Metrics);
                let serves = confined.is_ok();
                let _ = started.send(confined);
                if serves {
                    server.serve(|| page(Seen::all(&fleet)));
                }
            })
            .map_err(failed)?;
        let metrics = Self {
            end,
            thread: Some(thread),
            handle: place.handle,
        };
        let ready = ready.recv().map_err(io::Error::other).and_then(|it| it);
        ready.map_err(failed)?;
        Ok(metrics)
    }

    /// The socket's file is this process's to remove.
    pub(crate) fn own(&self) {
        self.handle.own();
    }
}

impl Drop for Metrics {
    fn drop(&mut self) {
        let _ = self.end.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_sees_metrics_unless_more_is_asked_for() {
        let endpoint = |text: &str| text.parse::<Endpoint>();
        for text in ["127.0.0.1:0", "127.9.9.9:0", "[::1]:0"] {
            // A machine may have no IPv6.
            let listened = endpoint(text).unwrap().listen(Audience::Local);
            assert!(
                !matches!(listened, Err(MetricsError::Public { .. })),
                "{text}"
            );
        }
        for text in ["0.0.0.0:0", "[::]:0", "192.0.2.1:9187"] {
            let listened = endpoint(text).unwrap().listen(Audience::Local);
            assert!(
                matches!(listened, Err(MetricsError::Public { .. })),
                "{text}"
            );
        }
        let anyone = endpoint("0.0.0.0:0").unwrap().listen(Audience::Anyone);
        assert!(anyone.is_ok());
        for text in ["", "9187", ":9187", "localhost:9187", "unix:", "/run/m"] {
            assert!(endpoint(text).is_err(), "{text}");
        }
        let path = Endpoint::Unix("/run/m".into());
        assert_eq!(endpoint("unix:/run/m"), Ok(path));
    }
}
