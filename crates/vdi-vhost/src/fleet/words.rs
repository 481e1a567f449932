//! What two daemons say to each other while the disks of one go over to the other, on the old one's control socket.
//!
//! ```text
//! new                          old
//! hand-over ─────────────────►
//!           ◄───────────────── what there is, and each disk; each line with the descriptor of its listening socket
//! (looks at all images, and is ready to serve)
//! release ───────────────────► (answers what is in flight, disconnects front ends, lets go of the images)
//!           ◄───────────────── which images it changed
//! (opens and locks the images)
//! finish ────────────────────► from here on the old one never takes anything back
//!           ◄───────────────── {}
//! (serves)                     (ends)
//! ```
//!
//! Until it is told to finish, the old one takes everything back if the new one dies, refuses or is late. The new one serves only what it
//! was told that it has: if the old one dies instead, it ends too, and whoever watches them starts one again. Nobody else can be
//! at an image meanwhile but by its lock.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::config::DiskTable;
use crate::groups::GroupTable;

/// The version of the messages: the control socket's.
pub(crate) const VERSION: u32 = 1;

/// What the new one wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Step {
    HandOver,
    Release,
    Finish,
}

/// A step as it is sent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Asked {
    version: u32,
    execute: Step,
}

/// What there is.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Offer {
    /// Where operators connect, if that is a path of the daemon's.
    pub(crate) control_socket: Option<PathBuf>,
    /// Where metrics are, if they are; a line without words follows, with the descriptor of that socket.
    pub(crate) metrics: Option<String>,
    /// Of disks that share limits, as they are.
    pub(crate) groups: Vec<GroupTable>,
    /// Those that the configuration described, as it did; the first daemons did not say it.
    #[serde(default)]
    pub(crate) described_groups: Vec<GroupTable>,
    /// How many lines about disks follow.
    pub(crate) disks: usize,
}

/// One disk. A field that the new one does not know is refused: it could not serve the disk as it is served.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct OfferedDisk {
    /// As it is served.
    pub(crate) disk: DiskTable,
    /// As the configuration described it, if it comes from there.
    pub(crate) described: Option<DiskTable>,
    /// Whether it takes no requests for the time being.
    pub(crate) paused: bool,
    /// Whether it is open, or waits for its turn.
    pub(crate) open: bool,
}

/// What the old one let go of.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Released {
    /// Disks whose images are not exact about count and length, for they were changed.
    pub(crate) changed: BTreeSet<String>,
}

/// The last answer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Done {}

#[derive(Debug, Serialize, Deserialize)]
struct Answer<T> {
    version: u32,
    #[serde(flatten)]
    outcome: Outcome<T>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome<T> {
    Return(T),
    Error { class: String, desc: String },
}

/// Why an answer is none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error("the other daemon says: {desc}")]
    Refused { desc: String },
    #[error("the other daemon cannot be understood")]
    NotUnderstood(#[from] serde_json::Error),
    #[error("the other daemon speaks version {found}, not {VERSION}")]
    Version { found: u32 },
}

/// A step, as a line.
pub(crate) fn ask(execute: Step) -> io::Result<String> {
    let version = VERSION;
    line(&Asked { version, execute })
}

/// The step that a line asks for.
pub(crate) fn step(text: &str) -> Result<Step, AnswerError> {
    let asked: Asked = serde_json::from_str(text)?;
    match asked.version {
        VERSION => Ok(asked.execute),
        found => Err(AnswerError::Version { found }),
    }
}

/// An answer, as a line.
pub(crate) fn answer<T: Serialize>(returned: &T) -> io::Result<String> {
    line(&Answer {
        version: VERSION,
        outcome: Outcome::Return(returned),
    })
}

/// That a step was not carried out, as a line.
pub(crate) fn refusal(desc: String) -> io::Result<String> {
    line(&Answer {
        version: VERSION,
        outcome: Outcome::<Done>::Error {
            class: "not-possible".to_owned(),
            desc,
        },
    })
}

/// What is sent without being an answer, as a line.
pub(crate) fn line<T: Serialize>(words: &T) -> io::Result<String> {
    Ok(serde_json::to_string(words)? + "\n")
}

/// What an answer returns.
pub(crate) fn returned<T: DeserializeOwned>(text: &[u8]) -> Result<T, AnswerError> {
    let answer: Answer<T> = serde_json::from_slice(text)?;
    match (answer.version, answer.outcome) {
        (VERSION, Outcome::Return(returned)) => Ok(returned),
        (VERSION, Outcome::Error { desc, .. }) => Err(AnswerError::Refused { desc }),
        (found, _) => Err(AnswerError::Version { found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_understood() {
        assert_eq!(step(&ask(Step::HandOver).unwrap()).unwrap(), Step::HandOver);
        let offer = Offer {
            control_socket: Some("/run/control".into()),
            metrics: None,
            groups: Vec::new(),
            described_groups: Vec::new(),
            disks: 3,
        };
        let said = answer(&offer).unwrap();
        assert_eq!(returned::<Offer>(said.as_bytes()).unwrap(), offer);
        let refused = refusal("no".to_owned()).unwrap();
        assert!(matches!(
            returned::<Offer>(refused.as_bytes()),
            Err(AnswerError::Refused { desc }) if desc == "no"
        ));
    }

    #[test]
    fn a_disk_with_what_is_not_known_is_refused() {
        let known = r#"{"disk": {"name": "a"}, "described": null, "paused": false, "open": true}"#;
        assert!(serde_json::from_str::<OfferedDisk>(known).is_ok());
        for more in [r#""disk": {"colour": "red","#, r#""shape": 1, "disk": {"#] {
            let text = known.replacen(r#""disk": {"#, more, 1);
            assert!(
                serde_json::from_str::<OfferedDisk>(&text).is_err(),
                "{text}"
            );
        }
    }
}
