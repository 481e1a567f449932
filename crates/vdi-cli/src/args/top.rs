//! `vdi top`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::ctl::SOCKET;
use crate::top::SortKey;

/// Watch all disks of a running daemon
///
/// Each line is a disk: requests and bytes per second, latency (from when a request was taken until the guest had its answer) of the last
/// interval, requests in flight, storage in the top image, and how much of the time limits held requests back.
#[derive(Debug, Args)]
#[command(after_help = "\
Keys: q ends it, left and right choose what is sorted by, r reverses, arrows and pages scroll, / filters by a part of
the name, b shows only busy disks, p pauses.

Examples:
  vdi top
  vdi top --sort p99 --filter web-
  vdi top --once | head")]
pub(crate) struct TopArgs {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    pub(crate) socket: PathBuf,
    /// How often to look, in seconds
    #[arg(short = 'd', long = "interval", value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    /// What to sort by
    #[arg(long, value_name = "COLUMN", default_value = "iops")]
    pub(crate) sort: SortKey,
    /// Show only disks with this in their names
    #[arg(long, value_name = "TEXT")]
    pub(crate) filter: Option<String>,
    /// Print tables as text, one after each interval
    #[arg(short, long)]
    pub(crate) batch: bool,
    /// How many tables to print [default: no end of them]
    #[arg(short = 'n', long, value_name = "N", requires = "batch")]
    pub(crate) count: Option<u64>,
    /// Print one table: the same as --batch --count 1
    #[arg(long, conflicts_with = "batch")]
    pub(crate) once: bool,
}

impl TopArgs {
    pub(crate) const fn interval(&self) -> Duration {
        self.interval
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds")?;
    (0.1..=3600.0)
        .contains(&seconds)
        .then(|| Duration::from_secs_f64(seconds))
        .ok_or_else(|| "from 0.1 to 3600 seconds".to_owned())
}
