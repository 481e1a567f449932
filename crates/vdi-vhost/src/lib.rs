//! `vdi-vhost`: a vhost-user-blk back end that serves VirtualBox VDI images.
//!
//! ```text
//! session ─► backend ─► rings ─► workers ─► crew ─► worker ─► seat ─► queue ─► chain ─► request
//!  (one control thread)                           (a thread each)                         │
//!                                  inflight ◄──────────────────────────────┘
//!                                     │ image_file
//!                                     ▼
//!                                  engine ─► transfer, ring
//! ```
//!
//! This file opens the image, puts the parts together and takes them apart again in order: queues are drained, then the
//! image is closed, then the socket goes away.

mod access;
mod args;
mod backend;
mod chain;
mod channel;
mod clock;
mod command;
mod complaints;
mod control;
mod crew;
mod device;
mod device_state;
mod dirty;
mod engine;
mod fault;
#[doc(hidden)]
pub mod fuzzing;
mod housekeeper;
mod image_file;
mod inflight;
mod limits;
mod log;
mod memory;
mod patience;
mod queue;
mod request;
mod ring;
mod rings;
mod sandbox;
mod seat;
mod service;
mod session;
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
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{getsockopt, sockopt};
use vdi_core::{Access, Disk, WriteError};

use crate::args::{Args, Asked, Sandboxing};
use crate::backend::Backend;
use crate::control::ControlSocket;
use crate::crew::Crew;
use crate::device::{Device, Serial, Zeros};
use crate::housekeeper::Housekeepers;
use crate::sandbox::{Reach, Sandbox, SandboxError};
use crate::service::{ActivationError, Handed, Manager};
use crate::session::{Door, Ears, ServeError};
use crate::socket::{SocketError, SocketFile};
use crate::turn::{Opening, Turn, TurnError};
use crate::workers::Workers;

/// Why the daemon ends with exit code 1.
#[derive(Debug, thiserror::Error)]
enum Fatal {
    #[error(transparent)]
    Turn(#[from] TurnError),
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
    #[error("cannot start the threads that serve queues")]
    Crew(#[source] io::Error),
    #[error("cannot make queues")]
    Queues(#[from] virtio_queue::Error),
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
    let manager = Manager::from_environment().map_err(Fatal::Notify)?;
    let signals = catch_signals().map_err(Fatal::Signals)?;
    let faults = fault::catch().map_err(Fatal::Faults)?;
    allow_many_descriptors();
    let mut turn = Turn::waiting(Opening::new(args));
    let opened = if args.incoming {
        None
    } else {
        Some(turn.begin()?)
    };
    let device = match &opened {
        Some(opened) => make_device(args, &opened.disk, opened.disk.access()),
        None => {
            let opening = Opening::new(args);
            make_device(args, &opening.look()?, opening.access())
        }
    };
    let device = Arc::new(device);
    let control = open_control(args, handed.control)?;
    let (socket_file, door) = open_door(args, inherited, handed.door)?;
    let what = format!(
        "serving {} ({} bytes){}",
        args.blk_file.display(),
        device.capacity().bytes(),
        if args.incoming {
            ", when it is our turn"
        } else {
            ""
        }
    );
    tracing::info!("{what}");
    // Before there are other threads, and anything to hear.
    let sandbox = match args.sandbox {
        Sandboxing::Off => Sandbox::off(),
        Sandboxing::On => Sandbox::enter(&reach(args)?, args.engine)?,
    };
    let crew = Crew::start(worker_count(args), args.engine, &sandbox).map_err(Fatal::Crew)?;
    let housekeepers = Housekeepers::start(&sandbox).map_err(Fatal::Crew)?;
    sandbox.seal()?;
    let workers = Workers::new(&crew);
    let mut backend = Backend::new(Arc::clone(&device), turn, workers, housekeepers)?;
    if let Some(opened) = opened {
        backend.serve(opened);
    }
    let backend = Arc::new(Mutex::new(backend));
    let ears = Ears {
        signals: &signals,
        faults,
        control: control.as_ref(),
        manager: &manager,
        backend: &backend,
    };
    manager.ready(&what);
    let served = session::serve(door, &ears);
    manager.stopping();
    drop(control);
    drop(socket_file);
    let backend = Arc::into_inner(backend).expect("sessions have ended");
    let backend = backend.into_inner().unwrap_or_else(PoisonError::into_inner);
    let closed = backend.close();
    served?;
    closed?;
    tracing::info!("the image is closed");
    Ok(())
}

/// The device that guests see of a disk.
fn make_device(args: &Args, disk: &Disk, access: Access) -> Device {
    let uuid = || Serial::from_image_uuid(disk.header().uuid_image().into_bytes());
    let zeros = Zeros {
        discard: args.discard,
        detect: args.detect_zeroes,
        block_sectors: disk.header().block_size().bytes() / 512,
    };
    Device::new(
        disk.capacity(),
        access,
        args.num_queues,
        args.serial.clone().unwrap_or_else(uuid),
        zeros,
    )
}

/// What the daemon may have to open again, or remove, while it serves.
fn reach(args: &Args) -> Result<Reach, Fatal> {
    let opening = Opening::new(args);
    let parents = opening.parents()?;
    let mut directories = Vec::new();
    if !parents.is_empty() {
        directories.push(sandbox::directory_of(&args.blk_file).to_owned());
        directories.extend_from_slice(&args.image_dirs);
    }
    Ok(Reach {
        image: (args.blk_file.clone(), opening.access()),
        parents,
        directories,
        sockets: [&args.socket_path, &args.control_socket]
            .into_iter()
            .flatten()
            .cloned()
            .collect(),
    })
}

/// Where front ends are served: what the command line says, else what the service manager handed over.
fn open_door(
    args: &Args,
    inherited: Option<Door>,
    handed: Option<OwnedFd>,
) -> Result<(Option<SocketFile>, Door), Fatal> {
    if let Some(path) = &args.socket_path {
        let (file, listener) = SocketFile::listen(path)?;
        return Ok((Some(file), Door::Listener(listener)));
    }
    let handed = || handed.map(|socket| take_socket(socket, "the service manager's socket"));
    match inherited.map(Ok).or_else(handed) {
        Some(door) => Ok((None, door?)),
        None => Err(Fatal::NoDoor),
    }
}

/// Where operators are heard, if anywhere.
fn open_control(args: &Args, handed: Option<OwnedFd>) -> Result<Option<ControlSocket>, Fatal> {
    if let Some(path) = &args.control_socket {
        return Ok(Some(ControlSocket::listen(path, &args.blk_file)?));
    }
    Ok(handed.map(|socket| ControlSocket::on(UnixListener::from(socket), &args.blk_file)))
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
        Door::Listener(UnixListener::from(socket))
    } else {
        Door::Connected(UnixStream::from(socket))
    })
}

/// A stream that becomes readable when the daemon should end.
fn catch_signals() -> io::Result<UnixStream> {
    let (heard, said) = UnixStream::pair()?;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        signal_hook::low_level::pipe::register(signal, said.try_clone()?)?;
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

fn worker_count(args: &Args) -> usize {
    let queues = usize::from(args.num_queues);
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    args.workers.map_or(cores, usize::from).min(queues)
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
