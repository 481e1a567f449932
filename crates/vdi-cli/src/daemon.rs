//! A running daemon, by its control socket: one JSON object in a line, one in answer.
//!
//! Source: `crates/vdi-vhost/src/control.rs`.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

/// How long the daemon may take: as long as blocks make way for a larger map.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a daemon says of its disk.
#[derive(Debug, Deserialize)]
pub(crate) struct Info {
    /// The image's file.
    pub(crate) image: PathBuf,
    /// The size of the disk.
    pub(crate) size_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Return(Info),
    Error { desc: String },
}

/// Why a daemon did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    #[error("cannot speak to a daemon at {}; it must be started with --control-socket", socket.display())]
    Speak { socket: PathBuf, source: io::Error },
    #[error("the daemon at {} gives no answer that can be understood", socket.display())]
    Answer {
        socket: PathBuf,
        source: serde_json::Error,
    },
    #[error("the daemon at {} refuses: {desc}", socket.display())]
    Refused { socket: PathBuf, desc: String },
}

/// Asks what it serves.
pub(crate) fn info(socket: &Path) -> Result<Info, DaemonError> {
    ask(socket, &json!({"version": 1, "execute": "info"}))
}

/// Has the disk grow to this size.
pub(crate) fn resize(socket: &Path, size_bytes: u64) -> Result<Info, DaemonError> {
    let arguments = json!({"size_bytes": size_bytes});
    ask(
        socket,
        &json!({"version": 1, "execute": "resize", "arguments": arguments}),
    )
}

fn ask(socket: &Path, command: &Value) -> Result<Info, DaemonError> {
    let line = converse(socket, command).map_err(|source| DaemonError::Speak {
        socket: socket.to_owned(),
        source,
    })?;
    match serde_json::from_str::<Answer>(&line).map(|answer| answer.outcome) {
        Ok(Outcome::Return(info)) => Ok(info),
        Ok(Outcome::Error { desc }) => Err(DaemonError::Refused {
            socket: socket.to_owned(),
            desc,
        }),
        Err(source) => Err(DaemonError::Answer {
            socket: socket.to_owned(),
            source,
        }),
    }
}

fn converse(socket: &Path, command: &Value) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{command}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line)
}
