//! Measures `vdi-vhost` beside QEMU's storage daemon and fio.
//!
//! Not a test: nothing here fails for being slow. But every request must be answered with OK and reads are checked by
//! samples, so that nothing is fast because it is wrong.

mod args;
mod back_end;
mod cell;
mod client;
mod contents;
mod cpus;
mod fio;
mod images;
mod lane;
mod latency;
mod medium;
mod record;
mod report;
mod workload;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use args::Args;
use back_end::Programs;
use cell::{Cell, CellError};
use images::{ImageError, Images};
use medium::Medium;
use record::{Record, RecordError};
use workload::{ALL, Workload};

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{workload} by {server:?} on {medium:?}")]
    Cell {
        workload: &'static str,
        server: back_end::Server,
        medium: Medium,
        #[source]
        source: CellError,
    },
    #[error(transparent)]
    Record(#[from] RecordError),
}

fn main() -> ExitCode {
    let args = Args::parse();
    match bench(&args) {
        Ok(table) => {
            print!("{table}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vdi-bench: {}", with_causes(&error));
            ExitCode::FAILURE
        }
    }
}

fn with_causes(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source());
    let texts = std::iter::once(error.to_string()).chain(causes.map(ToString::to_string));
    texts.collect::<Vec<_>>().join(": ")
}

fn bench(args: &Args) -> Result<String, BenchError> {
    if let Some(path) = &args.report {
        return Ok(report::tables(&record::load(path)?));
    }
    let programs = programs(args);
    let mut records = Vec::new();
    for medium in &args.media {
        measure(args, &programs, *medium, &mut records)?;
    }
    Ok(report::tables(&records))
}

fn programs(args: &Args) -> Programs {
    let beside = |name: &str| {
        let own = std::env::current_exe().expect("Linux knows the path of a program");
        own.with_file_name(name)
    };
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect();
    let vdi_vhost: PathBuf = beside("vdi-vhost");
    Programs {
        other: args.other.clone().unwrap_or_else(|| vdi_vhost.clone()),
        vdi_vhost,
        vdi: beside("vdi"),
        vdi_vhost_args: words(&args.vdi_vhost_args),
        other_args: words(&args.other_args),
    }
}

/// Measures everything on one medium, the servers in turns.
fn measure(
    args: &Args,
    programs: &Programs,
    medium: Medium,
    records: &mut Vec<Record>,
) -> Result<(), BenchError> {
    let mut images = Images::on(medium, &args.directory, programs, args.size_mib << 20)?;
    let workloads: Vec<&Workload> = match &args.workloads[..] {
        [] => ALL.iter().collect(),
        chosen => chosen.to_vec(),
    };
    for workload in workloads {
        for round in 0..args.rounds {
            for server in args
                .servers
                .iter()
                .filter(|server| workload.suits(**server))
            {
                let cell = Cell {
                    medium,
                    workload,
                    server: *server,
                    round,
                    measured: args.seconds,
                };
                let record =
                    cell.run(&mut images, programs)
                        .map_err(|source| BenchError::Cell {
                            workload: workload.name,
                            server: *server,
                            medium,
                            source,
                        })?;
                if let Some(path) = &args.records {
                    record::append(path, &record)?;
                }
                eprintln!(
                    "{medium:?} {} {server:?} {round}: {:.0} a second",
                    workload.name, record.iops
                );
                records.push(record);
            }
        }
    }
    Ok(())
}
