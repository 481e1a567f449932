//! `vdi-vhost`: a vhost-user-blk back end that serves VirtualBox VDI images.
//!
//! ```text
//! doorman ─► fleet ─► berth ─► session ─► backend ─► rings ─► workers ─► crew ─► worker ─► seat ─► queue ─► chain ─► request
//!    │                 (a disk)   (a thread while               (a disk's way   (threads)   (a disk's                      │
//!    └► control               its front end is there)             to them)                  place there)                   │
//!                                                                                    inflight ◄────────────────────────────┘
//!                                                                                       │ image_file
//!                                                                                       ▼
//!                                                                                    engine ─► transfer, ring
//! ```
//!
//! This file opens the images, puts the parts together and takes them apart again in order: queues are drained, then the
//! images are closed, then the sockets go away. Or another daemon takes them over (`fleet::hand_over`, `fleet::take_over`, by lines with
//! descriptors: `passing`).

mod access;
mod args;
mod backend;
mod berth;
mod bucket;
mod chain;
mod channel;
mod child;
mod clock;
mod command;
mod complaints;
mod config;
mod control;
mod cpus;
mod crew;
mod device;
mod device_state;
mod dirty;
mod doorman;
mod dump;
mod engine;
mod fault;
mod fleet;
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod groups;
mod housekeeper;
mod image_file;
mod inflight;
mod jobs;
mod limits;
mod log;
mod lone;
mod memory;
mod metrics;
mod parents;
mod passing;
mod patience;
mod portion;
mod promptness;
mod queue;
mod request;
mod ring;
mod rings;
mod sandbox;
mod seat;
mod service;
mod session;
mod sharer;
mod socket;
mod stats;
mod tracking;
mod transfer;
mod turn;
mod worker;
mod workers;

use std::error::Error;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{getsockopt, sockopt};
use vdi_core::WriteError;

use crate::args::{Args, Asked, Sandboxing};
use crate::berth::Door;
use crate::config::{Config, ConfigError, Threads};
use crate::control::ControlSocket;
use crate::cpus::CpuList;
use crate::crew::{Crew, MOST_SPARE, Reserve, Staffing};
use crate::doorman::Ears;
use crate::fleet::{Fleet, FleetError, Readied, Staff, TakeOver, TakeOverError};
use crate::housekeeper::Housekeepers;
use crate::metrics::{Metrics, MetricsError, Place};
use crate::parents::Parents;
use crate::sandbox::{Reach, Sandbox, SandboxError};
use crate::service::{ActivationError, Handed, Manager};
use crate::session::ServeError;
use crate::socket::SocketError;
use crate::turn::{Opening, TurnError};

/// Why the daemon ends with exit code 1.
#[derive(Debug, thiserror::Error)]
enum Fatal {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Turn(#[from] TurnError),
    #[error(transparent)]
    Disk(#[from] FleetError),
    #[error(transparent)]
    TakeOver(#[from] TakeOverError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Activation(#[from] ActivationError),
    #[error("{which} is no socket to serve")]
    Inherited {
        which: String,
        #[source]
        source: io::Error,
    },
    #[error(
        "there is nothing to serve on; give --socket-path PATH or --fd FDNUM, or start it by a socket unit"
    )]
    NoDoor,
    #[error("the service manager cannot be told anything (NOTIFY_SOCKET)")]
    Notify(#[source] io::Error),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    #[error("cannot catch faults in the guest's memory")]
    Faults(#[source] io::Error),
    #[error("cannot wait for front ends")]
    Doors(#[source] io::Error),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error("cannot start the threads that serve queues")]
    Crew(#[source] io::Error),
    #[error(
        "{found} workers are wanted for single disks, those that are spare counted; there can be {MOST_SPARE}"
    )]
    TooManyOwn { found: usize },
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("the image could not be closed clean")]
    Close(#[from] WriteError),
}

/// The daemon, from its command line to its exit code.
pub fn main() -> ExitCode {
    if args::asks_for_capabilities(std::env::args_os()) {
        println!("{}", args::CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    let args = match args::parse() {
        Asked::Serve(args) => args,
        Asked::Print(page) => {
            // Where there is no one to read it, there is nothing to do about it.
            let _ = io::stdout().write_all(&page);
            return ExitCode::SUCCESS;
        }
    };
    log::begin(args.log_format);
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain_of(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Fatal> {
    // First of all, while nothing else can have the descriptors.
    let handed = match args.fd {
        Some(_) => Handed::default(),
        None => Handed::take()?,
    };
    let inherited = args.fd.map(take_fd).transpose()?;
    let mut config = match &args.config {
        Some(path) => Config::read(path)?,
        None => Config::of(args),
    };
    let manager = Manager::from_environment().map_err(Fatal::Notify)?;
    let signals = catch(&[libc::SIGTERM, libc::SIGINT]).map_err(Fatal::Signals)?;
    let hangups = args.config.as_ref();
    let hangups = hangups.map(|_| catch(&[libc::SIGHUP])).transpose();
    let hangups = hangups.map_err(Fatal::Signals)?;
    let faults = fault::catch().map_err(Fatal::Faults)?;
    ring::calls::prepare();
    allow_many_descriptors();
    let parents = Arc::<Parents>::default();
    let from = args.take_over.as_deref().map(TakeOver::ask).transpose()?;
    let (readied, control, mut handing) = match from.flatten() {
        Some(offer) => taken(offer, &mut config, &parents)?,
        None => {
            let door = door(args, inherited, handed.door)?;
            let readied = opened(&config, &parents, door)?;
            (readied, open_control(&config, handed.control)?, None)
        }
    };
    let control = control.map(Arc::new);
    let metrics = open_metrics(&config, handing.as_mut())?;
    let what = match &readied[..] {
        [only] => only.describe(),
        all => format!("serving {} disks", all.len()),
    };
    tracing::info!("{what}");
    let doors = Fleet::doors().map_err(Fatal::Doors)?;
    let reach = reach(&config, &readied, &parents)?;
    let staffing = (
        shared_workers(args, &config.threads),
        own_workers(&config, &readied)?,
    );
    let (sandbox, staff) = confine(args, &reach, staffing)?;
    let fleet = Fleet::new(config, staff, parents, doors).map_err(Fatal::Doors)?;
    let fleet = Arc::new(fleet);
    for disk in readied {
        fleet.serve(disk)?;
    }
    let metrics = metrics.map(|place| Metrics::start(place, &fleet, &sandbox));
    let metrics = metrics.transpose()?;
    if let Some(handing) = handing {
        handing.complete(&fleet)?;
        control.iter().for_each(|control| control.own());
        metrics.iter().for_each(Metrics::own);
    }
    let ears = Ears {
        signals: &signals,
        hangups: hangups.as_ref(),
        faults,
        control: control.as_ref(),
        manager: &manager,
    };
    manager.ready(&what);
    let served = doorman::serve(&fleet, &ears);
    manager.stopping();
    // It looks at disks, which go now.
    drop((control, metrics));
    let closed = fleet.close();
    served?;
    closed?;
    Ok(())
}

/// The sandbox, and the threads that serve all disks. Before there are other threads, and anything to hear.
fn confine(
    args: &Args,
    reach: &Reach,
    (shared, own): (Staffing, Vec<Option<CpuList>>),
) -> Result<(Sandbox, Staff), Fatal> {
    let sandbox = match args.sandbox {
        Sandboxing::Off => Sandbox::off(),
        Sandboxing::On => Sandbox::enter(reach, args.engine)?,
    };
    let staff = Staff {
        crew: Crew::start(shared, args.engine, &sandbox).map_err(Fatal::Crew)?,
        reserve: Reserve::start(&own, args.engine, &sandbox).map_err(Fatal::Crew)?,
        housekeepers: Housekeepers::start(&sandbox).map_err(Fatal::Crew)?,
    };
    sandbox.seal(staff.reserve.threads())?;
    Ok((sandbox, staff))
}

/// The disks of the configuration, open; the one without a path for a socket at this door.
fn opened(
    config: &Config,
    parents: &Arc<Parents>,
    mut door: Option<Door>,
) -> Result<Vec<Readied>, FleetError> {
    let disks = config.disks.iter();
    disks
        .map(|disk| Readied::new(disk.clone(), parents, door.take()))
        .collect()
}

/// What there is to serve, and the hand-over that is to be completed when all is ready.
type Start = (Vec<Readied>, Option<ControlSocket>, Option<TakeOver>);

/// The disks of another daemon, in the place of those that the configuration describes.
fn taken(mut from: TakeOver, config: &mut Config, parents: &Arc<Parents>) -> Result<Start, Fatal> {
    let (listener, path) = from.control_socket(config.control_socket.as_deref())?;
    let control = ControlSocket::of_another(listener, path);
    config.groups = from.take_groups();
    let disks = from.take_disks();
    config.disks = disks
        .iter()
        .filter_map(|disk| disk.described.clone())
        .collect();
    let readied = disks.into_iter().map(|disk| Readied::taken(disk, parents));
    let readied = readied.collect::<Result<_, _>>()?;
    Ok((readied, Some(control), Some(from)))
}

/// What the daemon may have to open again, make or remove while it serves.
fn reach(config: &Config, readied: &[Readied], parents: &Arc<Parents>) -> Result<Reach, Fatal> {
    let mut reach = Reach {
        images: Vec::new(),
        parents: Vec::new(),
        directories: Vec::new(),
        image_dirs: config.image_dirs.clone(),
        sockets: Vec::new(),
        socket_dir: config.socket_dir.clone(),
        grows: config.file.is_some(),
    };
    // It is read again, and an editor puts another file in its place.
    let beside = config.file.as_deref().map(sandbox::directory_of);
    reach.directories.extend(beside.map(Path::to_owned));
    reach.sockets.extend(config.control_socket.clone());
    let metrics = config.metrics.as_ref().and_then(|(place, _)| place.file());
    reach.sockets.extend(metrics.cloned());
    let defaults = config.defaults.parent_files();
    reach.parents.extend(defaults.iter().cloned());
    for disk in readied.iter().map(Readied::options) {
        let opening = Opening::new(disk.clone(), Arc::clone(parents));
        let parents = opening.parents()?;
        if !parents.is_empty() {
            reach
                .directories
                .push(sandbox::directory_of(&disk.image).to_owned());
            reach.directories.extend_from_slice(&disk.image_dirs);
        }
        reach.images.push((disk.image.clone(), disk.access));
        reach.parents.extend(parents);
        reach.sockets.extend(disk.socket.clone());
    }
    reach.tidy();
    Ok(reach)
}

/// Where front ends are served, unless that is a path.
fn door(
    args: &Args,
    inherited: Option<Door>,
    handed: Option<OwnedFd>,
) -> Result<Option<Door>, Fatal> {
    if args.socket_path.is_some() || args.config.is_some() {
        return Ok(None);
    }
    let handed = || handed.map(|socket| take_socket(socket, "the service manager's socket"));
    match inherited.map(Ok).or_else(handed) {
        Some(door) => Ok(Some(door?)),
        None => Err(Fatal::NoDoor),
    }
}

/// Where operators are heard, if anywhere.
fn open_control(config: &Config, handed: Option<OwnedFd>) -> Result<Option<ControlSocket>, Fatal> {
    if let Some(path) = &config.control_socket {
        return Ok(Some(ControlSocket::listen(path)?));
    }
    Ok(handed.map(|socket| ControlSocket::on(UnixListener::from(socket))))
}

/// Where scrapers connect, if anywhere: another daemon's socket, if that is at the same place.
fn open_metrics(
    config: &Config,
    handing: Option<&mut TakeOver>,
) -> Result<Option<Place>, MetricsError> {
    let Some((endpoint, audience)) = &config.metrics else {
        return Ok(None);
    };
    let theirs = handing.and_then(|from| from.take_metrics(&endpoint.to_string()));
    let place = match theirs {
        Some(socket) => endpoint.adopt(socket, *audience),
        None => endpoint.listen(*audience),
    };
    place.map(Some)
}

/// The socket that this process was started with.
fn take_fd(fd: i32) -> Result<Door, Fatal> {
    let which = format!("descriptor {fd}");
    let socket = ring::inherited(fd).map_err(|source| Fatal::Inherited {
        which: which.clone(),
        source,
    })?;
    take_socket(socket, &which)
}

fn take_socket(socket: OwnedFd, which: &str) -> Result<Door, Fatal> {
    let listens = getsockopt(&socket, sockopt::AcceptConn).map_err(|errno| Fatal::Inherited {
        which: which.to_owned(),
        source: errno.into(),
    })?;
    Ok(if listens {
        Door::Listener {
            listener: UnixListener::from(socket),
            file: None,
        }
    } else {
        Door::Connected(Mutex::new(Some(UnixStream::from(socket))))
    })
}

/// A stream that becomes readable when one of these signals comes.
fn catch(signals: &[i32]) -> io::Result<UnixStream> {
    let (heard, said) = UnixStream::pair()?;
    for signal in signals {
        signal_hook::low_level::pipe::register(*signal, said.try_clone()?)?;
    }
    Ok(heard)
}

/// Raises the soft limit of open files, often 1024, to the hard one: every memory region and queue of a front end needs
/// some. If that fails, a front end that needs many is refused.
fn allow_many_descriptors() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// The threads that serve all disks: as the command line says, or else the file.
fn shared_workers(args: &Args, file: &Threads) -> Staffing {
    let cpus = args.worker_cpus.as_ref().or(file.cpus.as_ref());
    let cores = || std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let said = args.workers.or(file.shared).map(usize::from);
    let count = said.unwrap_or_else(|| cpus.map_or_else(cores, CpuList::len));
    Staffing {
        count: count.min(usize::from(args.num_queues)),
        cpus: cpus.cloned(),
    }
}

/// The threads that there must be to serve one disk each, by where they run: those of the disks, in their order, and the spare ones.
fn own_workers(config: &Config, readied: &[Readied]) -> Result<Vec<Option<CpuList>>, Fatal> {
    let disks = readied.iter();
    let own = disks.filter_map(|disk| disk.options().own_workers.as_ref());
    let spare = std::iter::repeat_n(None, usize::from(config.threads.spare));
    let places: Vec<_> = own.flat_map(Staffing::places).chain(spare).collect();
    let found = places.len();
    if found > usize::from(MOST_SPARE) {
        return Err(Fatal::TooManyOwn { found });
    }
    Ok(places)
}

/// An error and its causes in one line.
pub(crate) fn chain_of(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
