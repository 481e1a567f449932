//! `vdi-vhost`: a vhost-user-blk back end that serves VirtualBox VDI images.
//!
//! ```text
//! session ─► backend ─► rings ─► workers ─► worker ─► queue ─► chain ─► request
//!  (one control thread)                    (a thread each)                 │
//!                                  inflight ◄──────────────────────────────┘
//!                                     │ image_file
//!                                     ▼
//!                                  engine ─► transfer, ring
//! ```
//!
//! This file opens the image, puts the parts together and takes them apart again in order: queues are drained, then the
//! image is closed, then the socket goes away.

mod args;
mod backend;
mod chain;
mod channel;
mod command;
mod complaints;
mod control;
mod device;
mod device_state;
mod dirty;
mod engine;
#[doc(hidden)]
pub mod fuzzing;
mod housekeeper;
mod image_file;
mod inflight;
mod memory;
mod queue;
mod request;
mod ring;
mod rings;
mod sandbox;
mod session;
mod socket;
mod tracking;
mod transfer;
mod turn;
mod worker;
mod workers;

use std::error::Error;
use std::io::{self, IsTerminal};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{getsockopt, sockopt};
use tracing_subscriber::EnvFilter;
use vdi_core::{Access, Disk, WriteError};

use crate::args::{Args, Sandboxing};
use crate::backend::Backend;
use crate::control::ControlSocket;
use crate::device::{Device, Serial, Zeros};
use crate::sandbox::{Reach, Sandbox, SandboxError};
use crate::session::{Door, Ears, ServeError};
use crate::socket::{SocketError, SocketFile};
use crate::turn::{Opening, Turn, TurnError};
use crate::workers::Workers;

/// What is logged unless RUST_LOG says otherwise. `virtio_queue` logs whatever a guest does wrong, without limit.
const LOG_FILTER: &str = "info,virtio_queue=off";

/// Why the daemon ends with exit code 1.
#[derive(Debug, thiserror::Error)]
enum Fatal {
    #[error(transparent)]
    Turn(#[from] TurnError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("descriptor {fd} is no socket to serve")]
    Inherited {
        fd: i32,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
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
    let args = Args::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOG_FILTER));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain_of(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Fatal> {
    // First of all, while nothing else can have the descriptor.
    let inherited = args.fd.map(take_door).transpose()?;
    let signals = catch_signals().map_err(Fatal::Signals)?;
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
    let workers = Workers::new(worker_count(args));
    let control = args.control_socket.as_deref();
    let control = control.map(|path| ControlSocket::listen(path, &args.blk_file));
    let control = control.transpose()?;
    let (socket_file, door) = match (inherited, &args.socket_path) {
        (Some(door), _) => (None, door),
        (None, path) => {
            let path = path.as_deref().unwrap_or(Path::new(""));
            let (file, listener) = SocketFile::listen(path)?;
            (Some(file), Door::Listener(listener))
        }
    };
    tracing::info!(
        "serving {} ({} bytes){}",
        args.blk_file.display(),
        device.capacity().bytes(),
        if args.incoming {
            ", when it is our turn"
        } else {
            ""
        }
    );
    // Before there are other threads, and anything to hear.
    let sandbox = match args.sandbox {
        Sandboxing::Off => Sandbox::off(),
        Sandboxing::On => Sandbox::enter(&reach(args)?, args.engine)?,
    };
    let mut backend = Backend::new(Arc::clone(&device), turn, args.engine, workers, sandbox)?;
    if let Some(opened) = opened {
        backend.serve(opened)?;
    }
    let backend = Arc::new(Mutex::new(backend));
    let ears = Ears {
        signals: &signals,
        control: control.as_ref(),
        backend: &backend,
    };
    let served = session::serve(door, &ears);
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

/// The socket that this process was started with.
fn take_door(fd: i32) -> Result<Door, Fatal> {
    let failed = |source| Fatal::Inherited { fd, source };
    let socket = ring::inherited(fd).map_err(failed)?;
    let listens = getsockopt(&socket, sockopt::AcceptConn).map_err(|errno| failed(errno.into()))?;
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
