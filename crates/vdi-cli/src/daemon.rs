//! A running daemon, by its control socket: one JSON object in a line, one in answer.
//!
//! Source: `crates/vdi-vhost/src/control.rs`.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// How long the daemon may take: as long as blocks make way for a larger map.
const PATIENCE: Duration = Duration::from_secs(600);

/// The version of the messages.
const VERSION: u32 = 1;

/// A connection to a daemon, which hangs up when nothing is said for five seconds.
#[derive(Debug)]
pub(crate) struct Daemon {
    socket: PathBuf,
    lines: BufReader<UnixStream>,
}

/// What a daemon says of a disk.
#[derive(Debug, Deserialize)]
pub(crate) struct Info {
    /// What operators call it.
    #[serde(default)]
    pub(crate) name: String,
    /// The image's file.
    pub(crate) image: PathBuf,
    /// Where front ends connect, if that is a path of the daemon's.
    pub(crate) socket: Option<PathBuf>,
    /// The size of the disk.
    pub(crate) size_bytes: u64,
    /// Whether a front end is connected.
    #[serde(default)]
    pub(crate) connected: bool,
    /// Whether the image is open in the daemon.
    #[serde(default)]
    pub(crate) open: bool,
    /// Whether its requests wait because an operator wants them to.
    #[serde(default)]
    pub(crate) paused: bool,
    /// Whether a failure ended all writing.
    #[serde(default)]
    pub(crate) failed: bool,
    /// Whom it shares limits with.
    #[serde(default)]
    pub(crate) group: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Return(Value),
    Error { class: String, desc: String },
}

/// Why a daemon did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    #[error("cannot speak to a daemon at {}; it must be started with --control-socket", socket.display())]
    Speak { socket: PathBuf, source: io::Error },
    #[error(
        "the daemon at {} hung up without an answer; it may be ending, or have more operators than it hears at once",
        socket.display()
    )]
    HungUp { socket: PathBuf },
    #[error("the daemon at {} gives no answer that can be understood", socket.display())]
    Answer {
        socket: PathBuf,
        source: serde_json::Error,
    },
    #[error("the daemon at {} refuses ({class}): {desc}{}", socket.display(), advice(class))]
    Refused {
        socket: PathBuf,
        class: String,
        desc: String,
    },
}

impl DaemonError {
    /// Whether nobody said anything that makes sense.
    pub(crate) const fn is_silence(&self) -> bool {
        match self {
            Self::Speak { .. } | Self::HungUp { .. } | Self::Answer { .. } => true,
            Self::Refused { .. } => false,
        }
    }
}

impl Daemon {
    /// Connects.
    pub(crate) fn at(socket: &Path) -> Result<Self, DaemonError> {
        let connect = || {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        };
        let stream = connect().map_err(|source| DaemonError::Speak {
            socket: socket.to_owned(),
            source,
        })?;
        Ok(Self {
            socket: socket.to_owned(),
            lines: BufReader::new(stream),
        })
    }

    /// Has it carry out a command; what it returns.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value, DaemonError> {
        let mut message = json!({"version": VERSION, "execute": command});
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let line = self.say(&message)?;
        let answer: Answer =
            serde_json::from_str(&line).map_err(|source| self.misunderstood(source))?;
        match answer.outcome {
            Outcome::Return(returned) => Ok(returned),
            Outcome::Error { class, desc } => Err(DaemonError::Refused {
                socket: self.socket.clone(),
                class,
                desc,
            }),
        }
    }

    /// The same, of which the answer's form is known.
    pub(crate) fn ask_for<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<T, DaemonError> {
        let returned = self.ask(command, arguments)?;
        serde_json::from_value(returned).map_err(|source| self.misunderstood(source))
    }

    /// Sends a message as it is; what comes back.
    pub(crate) fn say(&mut self, message: &Value) -> Result<String, DaemonError> {
        let mut converse = || {
            let line = format!("{message}\n");
            self.lines.get_mut().write_all(line.as_bytes())?;
            let mut answer = String::new();
            self.lines.read_line(&mut answer)?;
            Ok(answer)
        };
        match converse() {
            Ok(answer) if !answer.is_empty() => Ok(answer),
            Err(source) if !is_hang_up(&source) => Err(DaemonError::Speak {
                socket: self.socket.clone(),
                source,
            }),
            Ok(_) | Err(_) => Err(DaemonError::HungUp {
                socket: self.socket.clone(),
            }),
        }
    }

    fn misunderstood(&self, source: serde_json::Error) -> DaemonError {
        DaemonError::Answer {
            socket: self.socket.clone(),
            source,
        }
    }
}

/// Asks a daemon with one disk what it serves.
pub(crate) fn info(socket: &Path) -> Result<Info, DaemonError> {
    Daemon::at(socket)?.ask_for("info", Value::Null)
}

/// Has its disk grow to this size.
pub(crate) fn resize(socket: &Path, size_bytes: u64) -> Result<Info, DaemonError> {
    Daemon::at(socket)?.ask_for("resize", json!({"size_bytes": size_bytes}))
}

fn is_hang_up(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// What can be done about an error of this class, where the error itself does not say.
fn advice(class: &str) -> &'static str {
    match class {
        "not-understood" => "; this `vdi` and that daemon may be of different versions",
        "no-such-disk" | "no-such-group" => "; `vdi ctl list` shows which there are",
        "in-use" => "; `vdi ctl leave-group` takes a disk out of its group",
        "exists" => "; take another name, or remove that one first",
        "not-open" => {
            "; the image must be sound, nobody else's, and in one of the daemon's image-dirs"
        }
        "broken" => "; restart the daemon, which takes up its guests' requests again",
        _ => "",
    }
}
