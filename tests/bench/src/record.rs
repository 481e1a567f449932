//! One measurement as a line of JSON, so that parts measured at different times make one table.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::back_end::Server;
use crate::machine::Machine;
use crate::medium::Medium;

/// Something that was measured, or where.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(crate) enum Record {
    /// Where what follows was measured.
    Machine(Machine),
    /// A server under a load.
    Load(Load),
    /// The same while its system calls were counted, which slows it down: only [`Load::syscalls`] counts.
    Counted(Load),
    /// A server that starts.
    Start(Start),
}

/// What one run of one server under one workload gave.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Load {
    pub(crate) medium: Medium,
    pub(crate) workload: String,
    pub(crate) server: Server,
    pub(crate) round: u32,
    pub(crate) requests: u64,
    pub(crate) iops: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// The server's CPU time for each request.
    pub(crate) cpu_us: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) calls: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kicks: Option<f64>,
    /// The server's system calls for each request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) syscalls: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) resident_kib: Option<u64>,
}

/// What one start of one server on an empty image gave.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Start {
    pub(crate) server: Server,
    pub(crate) disk_bytes: u64,
    pub(crate) round: u32,
    /// From the start of the process to the first answer to a front end.
    pub(crate) first_reply_ms: f64,
    /// Its memory when it has a queue and has answered one read.
    pub(crate) idle_kib: u64,
}

/// Why records cannot be kept or found.
#[derive(Debug, thiserror::Error)]
#[error("{} holds no records or takes none", .path.display())]
pub(crate) struct RecordError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Adds a record to a file.
pub(crate) fn append(path: &Path, record: &Record) -> Result<(), RecordError> {
    let line = serde_json::to_string(record).expect("records are plain data");
    let mut open = OpenOptions::new();
    let opened = open.create(true).append(true).open(path);
    opened
        .and_then(|mut file| writeln!(file, "{line}"))
        .map_err(|source| RecordError {
            path: path.to_owned(),
            source,
        })
}

/// All records of a file.
pub(crate) fn load(path: &Path) -> Result<Vec<Record>, RecordError> {
    let read = || {
        let lines = BufReader::new(File::open(path)?).lines();
        lines
            .map(|line| serde_json::from_str(&line?).map_err(io::Error::other))
            .collect::<io::Result<Vec<Record>>>()
    };
    read().map_err(|source| RecordError {
        path: path.to_owned(),
        source,
    })
}
