//! The control socket: what an operator asks of a running daemon.
//!
//! One JSON object in a line, and one in answer, then the connection is closed:
//!
//! ```text
//! {"version": 1, "execute": "info"}
//! {"version": 1, "execute": "resize", "arguments": {"size_bytes": 21474836480}}
//! {"version": 1, "return": {...}}    or    {"version": 1, "error": {"class": "...", "desc": "..."}}
//! ```
//!
//! It is answered on the thread that serves the front end, between two of its messages, so nothing else changes
//! meanwhile. The socket's file is its owner's alone, and whoever connects has [`PATIENCE`] to speak and to listen.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vdi_core::Capacity;

use crate::backend::{Backend, ControlError};
use crate::socket::{SocketError, SocketFile};

/// The version of the messages.
const VERSION: u32 = 1;

/// How long a peer may take to send its line, and to read ours.
const PATIENCE: Duration = Duration::from_secs(1);

/// Bytes of the longest line: commands are short.
const LONGEST_LINE: u64 = 4096;

/// Where operators connect.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: UnixListener,
    image: PathBuf,
    _file: Option<SocketFile>,
}

#[derive(Debug, Deserialize)]
struct Request {
    version: u32,
    #[serde(flatten)]
    command: Command,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "execute", content = "arguments", rename_all = "kebab-case")]
enum Command {
    Info,
    Resize { size_bytes: u64 },
}

#[derive(Debug, Serialize)]
struct Answer {
    version: u32,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Return(Info),
    Error { class: &'static str, desc: String },
}

/// What there is to know of the disk.
#[derive(Debug, Serialize)]
struct Info {
    image: PathBuf,
    size_bytes: u64,
    /// Whether it is open here, or waits for its turn.
    open: bool,
    /// Requests that the host failed, since the daemon was started.
    failed_requests: u64,
    /// Whether a failure ended all writing until the daemon is started again.
    failed: bool,
}

impl ControlSocket {
    /// Listens at `path` for commands about `image`.
    pub(crate) fn listen(path: &Path, image: &Path) -> Result<Self, SocketError> {
        let (file, listener) = SocketFile::listen(path)?;
        Ok(Self {
            _file: Some(file),
            ..Self::on(listener, image)
        })
    }

    /// Listens on a socket that somebody else made.
    pub(crate) fn on(listener: UnixListener, image: &Path) -> Self {
        Self {
            listener,
            image: image.to_owned(),
            _file: None,
        }
    }

    /// Becomes readable when somebody connects.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Answers whoever connected.
    pub(crate) fn answer(&self, backend: &Mutex<Backend>) {
        let answered = self
            .listener
            .accept()
            .and_then(|(peer, _)| self.converse(&peer, backend));
        if let Err(error) = answered {
            tracing::warn!("a command could not be answered: {error}");
        }
    }

    fn converse(&self, mut peer: &UnixStream, backend: &Mutex<Backend>) -> io::Result<()> {
        peer.set_read_timeout(Some(PATIENCE))?;
        peer.set_write_timeout(Some(PATIENCE))?;
        let mut line = String::new();
        BufReader::new(peer)
            .take(LONGEST_LINE)
            .read_line(&mut line)?;
        let outcome = match parse(&line) {
            Ok(command) => {
                let mut backend = backend.lock().unwrap_or_else(PoisonError::into_inner);
                self.execute(&command, &mut backend)
            }
            Err(outcome) => outcome,
        };
        let answer = Answer {
            version: VERSION,
            outcome,
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        peer.write_all(&text)
    }

    fn execute(&self, command: &Command, backend: &mut Backend) -> Outcome {
        match command {
            Command::Info => Outcome::Return(self.info(backend)),
            Command::Resize { size_bytes } => {
                match backend.grow(Capacity::from_bytes_rounded_down(*size_bytes)) {
                    Ok(_) => Outcome::Return(self.info(backend)),
                    Err(error) => {
                        let desc = crate::chain_of(&error);
                        tracing::warn!("the disk was not resized: {desc}");
                        let class = match error {
                            ControlError::Open(_) => "not-open",
                            ControlError::Turn(_) | ControlError::Ring(_) => "broken",
                            ControlError::Grow(_) => "not-possible",
                        };
                        Outcome::Error { class, desc }
                    }
                }
            }
        }
    }

    fn info(&self, backend: &Backend) -> Info {
        Info {
            image: std::path::absolute(&self.image).unwrap_or_else(|_| self.image.clone()),
            size_bytes: backend.capacity().bytes(),
            open: backend.is_open(),
            failed_requests: backend.failed_requests(),
            failed: backend.has_failed(),
        }
    }
}

fn parse(line: &str) -> Result<Command, Outcome> {
    let refuse = |desc| Outcome::Error {
        class: "not-understood",
        desc,
    };
    let request: Request =
        serde_json::from_str(line).map_err(|error| refuse(format!("no command: {error}")))?;
    if request.version != VERSION {
        let desc = format!(
            "version {} of the messages is not spoken here, only {VERSION}",
            request.version
        );
        return Err(refuse(desc));
    }
    Ok(request.command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_command_of_a_version_that_is_known() {
        let info = parse(r#"{"version": 1, "execute": "info"}"#).unwrap();
        assert_eq!(info, Command::Info);
        let line = r#"{"version": 1, "execute": "resize", "arguments": {"size_bytes": 5}}"#;
        assert_eq!(parse(line).unwrap(), Command::Resize { size_bytes: 5 });
        for bad in [
            "",
            "{}",
            r#"{"version": 2, "execute": "info"}"#,
            r#"{"version": 1, "execute": "destroy"}"#,
            r#"{"version": 1, "execute": "resize", "arguments": {"size_bytes": -5}}"#,
            r#"{"version": 1, "execute": "resize"}"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
