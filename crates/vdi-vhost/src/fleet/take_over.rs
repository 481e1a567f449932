//! The new daemon's side of an upgrade: it takes over what another one serves.
//!
//! Not here: what is said (`words`), the old one's side (`hand_over`).
//!
//! Before the old one is asked to let go, all that can fail without the images' locks has succeeded: their files were looked at, the sandbox
//! is entered, the threads run. The sockets' files become this daemon's when all is done, not before: if it fails they are the old one's.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt};
use serde::de::DeserializeOwned;

use super::Fleet;
use super::words::{self, AnswerError, Done, Offer, OfferedDisk, Released, Step};
use crate::backend::ControlError;
use crate::config::{DiskError, DiskOptions, DiskTable};
use crate::groups::GroupTable;
use crate::passing::Lines;

/// How long the old daemon may take for a step: its slowest request must be answered.
const STEP_TIME: Duration = Duration::from_secs(60);

/// What another daemon offers.
#[derive(Debug)]
pub(crate) struct TakeOver {
    lines: Lines,
    control: Option<(UnixListener, Option<PathBuf>)>,
    /// What its metrics' place is called, and the socket.
    metrics: Option<(String, OwnedFd)>,
    groups: Vec<GroupTable>,
    /// As its configuration described them.
    described_groups: Vec<GroupTable>,
    disks: Vec<Taken>,
    /// The names of those that are open there.
    open: BTreeSet<String>,
}

/// One disk of another daemon.
#[derive(Debug)]
pub(crate) struct Taken {
    /// As it is served there.
    pub(crate) options: DiskOptions,
    /// As its configuration described it, if it comes from there.
    pub(crate) described: Option<DiskOptions>,
    /// Whether it takes no requests for the time being.
    pub(crate) is_paused: bool,
    /// Where its front ends connect.
    pub(crate) listener: UnixListener,
}

/// Why nothing was taken over; the other daemon serves on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeOverError {
    #[error("cannot speak to the daemon at {}", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the other daemon is gone, or was late")]
    Gone(#[source] io::Error),
    #[error("the disks were not handed over")]
    Answer(#[from] AnswerError),
    #[error("a disk that the other daemon serves cannot be served here")]
    Disk(#[from] DiskError),
    #[error("what came with a disk is no socket that front ends can connect to")]
    NoListener,
    #[error(
        "the configuration says control-socket = {}, but the other daemon has {}; a take-over cannot move it",
        Shown(ours),
        Shown(theirs)
    )]
    ControlSocket {
        ours: Option<PathBuf>,
        theirs: Option<PathBuf>,
    },
    #[error("{name} cannot be taken over")]
    Open {
        name: String,
        #[source]
        source: ControlError,
    },
}

/// A path that may be missing.
struct Shown<'a>(&'a Option<PathBuf>);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(path) => write!(f, "{}", path.display()),
            None => f.write_str("none of its own"),
        }
    }
}

impl TakeOver {
    /// Asks the daemon whose control socket this is; nobody may be there.
    pub(crate) fn ask(path: &Path) -> Result<Option<Self>, TakeOverError> {
        let failed = |source| TakeOverError::Connect {
            path: path.to_owned(),
            source,
        };
        let socket = match UnixStream::connect(path) {
            Ok(socket) => socket,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(failed(error)),
        };
        socket.set_read_timeout(Some(STEP_TIME)).map_err(failed)?;
        socket.set_write_timeout(Some(STEP_TIME)).map_err(failed)?;
        let mut offered = Self {
            lines: Lines::of(socket),
            control: None,
            metrics: None,
            groups: Vec::new(),
            described_groups: Vec::new(),
            disks: Vec::new(),
            open: BTreeSet::new(),
        };
        let offer: Offer = offered.step(Step::HandOver)?;
        offered.control = Some((offered.listener()?, offer.control_socket));
        offered.groups = offer.groups;
        offered.described_groups = offer.described_groups;
        if let Some(name) = offer.metrics {
            offered.lines.next().map_err(TakeOverError::Gone)?;
            let socket = offered.lines.take_descriptor();
            offered.metrics = Some((name, socket.map_err(TakeOverError::Gone)?));
        }
        for _ in 0..offer.disks {
            let disk = offered.disk()?;
            offered.disks.push(disk);
        }
        Ok(Some(offered))
    }

    fn disk(&mut self) -> Result<Taken, TakeOverError> {
        let line = self.lines.next().map_err(TakeOverError::Gone)?;
        let offered: OfferedDisk = serde_json::from_slice(&line).map_err(AnswerError::from)?;
        let resolve = |table: DiskTable| table.resolve(&DiskTable::default(), None);
        let options = resolve(offered.disk)?;
        if offered.open {
            self.open.insert(options.name.clone());
        }
        Ok(Taken {
            options,
            described: offered.described.map(resolve).transpose()?,
            is_paused: offered.paused,
            listener: self.listener()?,
        })
    }

    /// The socket that came with the last line.
    fn listener(&mut self) -> Result<UnixListener, TakeOverError> {
        let socket = self.lines.take_descriptor().map_err(TakeOverError::Gone)?;
        match getsockopt(&socket, sockopt::AcceptConn) {
            Ok(true) => Ok(UnixListener::from(socket)),
            Ok(false) | Err(_) => Err(TakeOverError::NoListener),
        }
    }

    /// The control socket, and its path if that is the daemon's to remove. The configuration must mean the same.
    pub(crate) fn control_socket(
        &mut self,
        configured: Option<&Path>,
    ) -> Result<(UnixListener, Option<PathBuf>), TakeOverError> {
        let (listener, theirs) = self.control.take().ok_or(TakeOverError::NoListener)?;
        let ours = configured.map(crate::config::absolute);
        if ours != theirs {
            return Err(TakeOverError::ControlSocket { ours, theirs });
        }
        Ok((listener, theirs))
    }

    /// The socket for metrics, if it is at the place of this name.
    pub(crate) fn take_metrics(&mut self, name: &str) -> Option<OwnedFd> {
        let theirs = self.metrics.take_if(|(theirs, _)| theirs == name);
        theirs.map(|(_, socket)| socket)
    }

    /// The groups.
    pub(crate) fn take_groups(&mut self) -> Vec<GroupTable> {
        std::mem::take(&mut self.groups)
    }

    /// The disks.
    pub(crate) fn take_disks(&mut self) -> Vec<Taken> {
        std::mem::take(&mut self.disks)
    }

    /// Has the other daemon let go, and opens what it had open. From then on they are served here alone.
    pub(crate) fn complete(mut self, fleet: &Fleet) -> Result<(), TakeOverError> {
        let released: Released = self.step(Step::Release)?;
        let all = fleet.list();
        for berth in all.iter().filter(|berth| self.open.contains(berth.name())) {
            let taken = berth.lock().take_turn();
            taken.map_err(|source| TakeOverError::Open {
                name: berth.name().to_owned(),
                source,
            })?;
        }
        // So that a reload changes those alone of which the file says something else than it did there.
        fleet.said().groups = std::mem::take(&mut self.described_groups);
        let Done {} = self.step(Step::Finish)?;
        for berth in all {
            berth.own();
            if released.changed.contains(berth.name()) {
                berth.lock().inherit_changes();
            }
        }
        Ok(())
    }

    fn step<T: DeserializeOwned>(&mut self, step: Step) -> Result<T, TakeOverError> {
        let asked =
            words::ask(step).and_then(|line| self.lines.socket().write_all(line.as_bytes()));
        asked.map_err(TakeOverError::Gone)?;
        let line = self.lines.next().map_err(TakeOverError::Gone)?;
        Ok(words::returned(&line)?)
    }
}
