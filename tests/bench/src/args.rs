//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::back_end::Server;
use crate::medium::Medium;
use crate::workload::{ALL, Workload};

/// What is to be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Part {
    /// Servers under loads
    Loads,
    /// The same again, shortly, while their system calls are counted
    Syscalls,
    /// How long servers take to start, and how much memory they have then
    Start,
}

/// Measures vdi-vhost, qemu-storage-daemon and fio under the same loads and prints tables.
///
/// Every request must be answered with OK, and what is read is checked by samples. Nothing fails for being slow. The tables are
/// kept in DIRECTORY/results.md and drawn in DIRECTORY/results.svg.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    /// Where images lie
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = Medium::value_variants().to_vec())]
    pub(crate) media: Vec<Medium>,

    /// What is asked of the servers [default: all]
    #[arg(long, value_delimiter = ',', value_parser = workload)]
    pub(crate) workloads: Vec<&'static Workload>,

    /// Who is asked; those that cannot do a workload are left out
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = default_servers())]
    pub(crate) servers: Vec<Server>,

    /// What is measured [default: all, or loads if workloads are chosen]
    #[arg(long, value_delimiter = ',', value_enum)]
    pub(crate) parts: Vec<Part>,

    /// How often each is measured; the servers take turns
    #[arg(long, default_value_t = 5)]
    pub(crate) rounds: u32,

    /// How long each is measured in a round
    #[arg(long, default_value = "0.2", value_parser = seconds)]
    pub(crate) seconds: Duration,

    /// How long the disks are, in MiB; those for allocating writes are sparse and 64 GiB
    #[arg(long, default_value_t = 512)]
    pub(crate) size_mib: u64,

    /// Where images on a disk lie, and the results
    #[arg(long, default_value = "target/bench")]
    pub(crate) directory: PathBuf,

    /// A file to add the measurements to, a line of JSON for each
    #[arg(long)]
    pub(crate) records: Option<PathBuf>,

    /// Measure nothing: make the tables of the records in these files
    #[arg(long, num_args = 1..)]
    pub(crate) report: Vec<PathBuf>,

    /// Measure something else instead: what a disk suffers from disks that are flooded beside it
    #[arg(long)]
    pub(crate) neighbours: bool,

    /// Another build of vdi-vhost, for the server `other` [default: the same]
    #[arg(long)]
    pub(crate) other: Option<PathBuf>,

    /// More arguments for vdi-vhost, separated by blanks
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub(crate) vdi_vhost_args: String,

    /// More arguments for the server `other`, separated by blanks
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    pub(crate) other_args: String,
}

impl Args {
    /// The workloads that were chosen.
    pub(crate) fn workloads(&self) -> Vec<&'static Workload> {
        match &self.workloads[..] {
            [] => ALL.iter().collect(),
            chosen => chosen.to_vec(),
        }
    }

    /// Whether a part is to be measured.
    pub(crate) fn wants(&self, part: Part) -> bool {
        if self.parts.is_empty() {
            self.workloads.is_empty() || part == Part::Loads
        } else {
            self.parts.contains(&part)
        }
    }
}

fn default_servers() -> Vec<Server> {
    let all = Server::value_variants().iter().copied();
    all.filter(|server| *server != Server::Other).collect()
}

fn workload(name: &str) -> Result<&'static Workload, String> {
    let names = || ALL.iter().map(|workload| workload.name).collect::<Vec<_>>();
    Workload::named(name).ok_or_else(|| format!("the workloads are {}", names().join(", ")))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
