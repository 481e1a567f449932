//! Measures `vdi-vhost` beside QEMU's storage daemon and fio.
//!
//! Not a test: nothing here fails for being slow. But every request must be answered with OK and reads are checked by
//! samples, so that nothing is fast because it is wrong.

mod args;
mod back_end;
mod cell;
mod chart;
mod client;
mod contents;
mod cpus;
mod fio;
mod images;
mod lane;
mod latency;
mod machine;
mod medium;
mod neighbours;
mod plan;
mod record;
mod report;
mod results;
mod start;
mod syscalls;
mod targets;
mod workload;

use std::error::Error;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use args::{Args, Part};
use back_end::{Programs, Server};
use cell::{Cell, CellError};
use images::{ImageError, Images};
use machine::Machine;
use medium::Medium;
use neighbours::Neighbours;
use record::{Record, RecordError};
use results::Results;

/// Why there is no table.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("{workload} by {server:?} on {medium:?}")]
    Cell {
        workload: &'static str,
        server: Server,
        medium: Medium,
        #[source]
        source: CellError,
    },
    #[error("starting {server:?} with a disk of {disk}")]
    Start {
        server: Server,
        disk: &'static str,
        #[source]
        source: CellError,
    },
    #[error("a disk beside flooded ones")]
    Neighbours(#[from] CellError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("{} cannot be written", .path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    match bench(&args) {
        Ok(tables) => {
            print!("{tables}");
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
    write_to(args, "", None)?;
    if args.neighbours {
        return neighbours(args);
    }
    let results = if args.report.is_empty() {
        measured(args)?
    } else {
        let mut records = Vec::new();
        for path in &args.report {
            records.extend(record::load(path)?);
        }
        Results(records)
    };
    let tables = report::whole(&results);
    write_to(args, "results.md", Some(&tables))?;
    write_to(args, "results.svg", Some(&chart::draw(&results)))?;
    Ok(tables)
}

/// How a calm disk fares beside flooded ones, as a table, which is not kept.
fn neighbours(args: &Args) -> Result<String, BenchError> {
    let (programs, bytes) = (programs(args), args.size_mib << 20);
    let mut images = Images::on(Medium::Buffered, &args.directory, &programs, bytes)?;
    let how = (args.seconds, args.rounds);
    let neighbours = Neighbours::new(&mut images, &programs, bytes, how)?;
    let table = neighbours.table()?;
    let machine = Machine::here(&args.directory, args.rounds, args.seconds.as_secs_f64());
    Ok(format!("{}\n\n{table}", machine.sentence()))
}

/// Makes the directory of the results, or writes one of them.
fn write_to(args: &Args, name: &str, text: Option<&str>) -> Result<(), BenchError> {
    let path = args.directory.join(name);
    let written = match text {
        None => fs::create_dir_all(&path),
        Some(text) => fs::write(&path, text),
    };
    written.map_err(|source| BenchError::Write { path, source })
}

fn measured(args: &Args) -> Result<Results, BenchError> {
    let mut bench = Bench {
        args,
        programs: programs(args),
        records: Vec::new(),
    };
    let machine = Machine::here(&args.directory, args.rounds, args.seconds.as_secs_f64());
    bench.keep(Record::Machine(machine))?;
    for medium in &args.media {
        bench.loads(*medium)?;
    }
    if args.wants(Part::Start) {
        bench.starts()?;
    }
    Ok(Results(bench.records))
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

/// Measurements under way.
struct Bench<'a> {
    args: &'a Args,
    programs: Programs,
    records: Vec<Record>,
}

impl Bench<'_> {
    fn keep(&mut self, record: Record) -> Result<(), BenchError> {
        if let Some(path) = &self.args.records {
            record::append(path, &record)?;
        }
        self.records.push(record);
        Ok(())
    }

    /// All loads on one medium, the servers in turns.
    fn loads(&mut self, medium: Medium) -> Result<(), BenchError> {
        let programs = self.programs.clone();
        let args = self.args;
        let mut images = Images::on(medium, &args.directory, &programs, args.size_mib << 20)?;
        for workload in args.workloads() {
            let servers = args.servers.iter().copied();
            let servers: Vec<_> = servers.filter(|server| workload.suits(*server)).collect();
            let mut cell = Cell {
                medium,
                workload,
                server: Server::VdiVhost,
                round: 0,
                measured: args.seconds,
                counted: false,
            };
            let rounds = if args.wants(Part::Loads) {
                args.rounds
            } else {
                0
            };
            for (round, server) in
                (0..rounds).flat_map(|round| servers.iter().map(move |server| (round, *server)))
            {
                cell = Cell {
                    round,
                    server,
                    ..cell
                };
                let load = run(&cell, &mut images, &programs)?;
                eprintln!(
                    "{medium:?} {} {server:?} {round}: {:.0} a second",
                    workload.name, load.iops
                );
                self.keep(Record::Load(load))?;
            }
            let counted = |server: &&Server| {
                matches!(
                    server,
                    Server::VdiVhost | Server::Other | Server::QsdVdi | Server::QsdQcow2
                )
            };
            for server in servers
                .iter()
                .filter(counted)
                .filter(|_| args.wants(Part::Syscalls))
            {
                let cell = Cell {
                    server: *server,
                    counted: true,
                    ..cell
                };
                let load = run(&cell, &mut images, &programs)?;
                self.keep(Record::Counted(load))?;
            }
        }
        Ok(())
    }

    /// Starts on the disk, through the page cache.
    fn starts(&mut self) -> Result<(), BenchError> {
        let programs = self.programs.clone();
        let images = Images::on(Medium::Buffered, &self.args.directory, &programs, 0)?;
        for (bytes, disk) in start::DISKS {
            let image = images.directory().join("start.vdi");
            start::make_image(&programs, &image, bytes)?;
            let servers = self.args.servers.iter().copied();
            let servers: Vec<_> = servers
                .filter(|server| {
                    matches!(server, Server::VdiVhost | Server::Other | Server::QsdVdi)
                })
                .collect();
            for round in 0..self.args.rounds {
                for server in &servers {
                    let start = start::measure(&programs, *server, &image, bytes, round);
                    let start = start.map_err(|source| BenchError::Start {
                        server: *server,
                        disk,
                        source,
                    })?;
                    self.keep(Record::Start(start))?;
                }
            }
            images::remove(&image)?;
        }
        Ok(())
    }
}

fn run(
    cell: &Cell<'_>,
    images: &mut Images<'_>,
    programs: &Programs,
) -> Result<record::Load, BenchError> {
    cell.run(images, programs)
        .map_err(|source| BenchError::Cell {
            workload: cell.workload.name,
            server: cell.server,
            medium: cell.medium,
            source,
        })
}
