//! The servers: how each is started on an image, pinned, watched and ended.

use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::client::PATIENCE;
use crate::cpus;

/// Who serves, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Server {
    /// This project's daemon on a VDI image
    VdiVhost,
    /// Another build of it (`--other`) on the same image
    Other,
    /// QEMU's storage daemon on the same image; its I/O by threads, its default, or by Linux AIO for `O_DIRECT`
    QsdVdi,
    /// The same with `aio=io_uring`
    QsdVdiUring,
    /// QEMU's storage daemon on a raw file
    QsdRaw,
    /// QEMU's storage daemon on a QCOW2 image, where it has no VDI: chains
    QsdQcow2,
    /// No server at all: fio reads and writes a raw file by `io_uring`
    Fio,
}

impl Server {
    /// The format of the image that it serves, by the name that qemu-img has for it.
    pub(crate) fn format(self) -> &'static str {
        match self {
            Self::VdiVhost | Self::Other | Self::QsdVdi | Self::QsdVdiUring => "vdi",
            Self::QsdRaw | Self::Fio => "raw",
            Self::QsdQcow2 => "qcow2",
        }
    }
}

/// Programs and options that are the same for all cells.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    pub(crate) vdi_vhost: PathBuf,
    pub(crate) other: PathBuf,
    pub(crate) vdi: PathBuf,
    /// More arguments for `vdi_vhost`.
    pub(crate) vdi_vhost_args: Vec<String>,
    /// More arguments for `other`.
    pub(crate) other_args: Vec<String>,
}

/// How a server is to serve.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Service<'a> {
    pub(crate) server: Server,
    pub(crate) image: &'a Path,
    pub(crate) direct: bool,
    pub(crate) queues: usize,
    /// On the first CPU alone.
    pub(crate) pinned: bool,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackEndError {
    #[error("{program} cannot be started; is it installed or built?")]
    Start {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("the server's CPU time cannot be read")]
    Clock(#[source] nix::Error),
    #[error("the server ended with {status}; it said: {log}")]
    Ended { status: ExitStatus, log: String },
    #[error("the server does not end {} s after SIGTERM", PATIENCE.as_secs())]
    Stays,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// A server that runs until it is ended, or killed when this is dropped.
#[derive(Debug)]
pub(crate) struct BackEnd {
    child: Child,
    clock: ClockId,
    directory: tempfile::TempDir,
}

impl BackEnd {
    /// Starts a server.
    pub(crate) fn start(programs: &Programs, service: &Service<'_>) -> Result<Self, BackEndError> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("socket");
        let mut command = command(programs, service, &socket);
        let log = fs::File::create(directory.path().join("log"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let start = || command.spawn();
        let child = if service.pinned {
            cpus::on_server_cpu(start)
        } else {
            cpus::on_all_cpus(start)
        };
        Self::started(&command, child, directory)
    }

    /// Starts our daemon for the disks of a configuration, whose sockets are where that says.
    pub(crate) fn of_disks(programs: &Programs, config: &Path) -> Result<Self, BackEndError> {
        let directory = tempfile::tempdir()?;
        let mut command = Command::new(&programs.vdi_vhost);
        command.arg("--config").arg(config);
        command.args(&programs.vdi_vhost_args);
        let log = fs::File::create(directory.path().join("log"))?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = cpus::on_all_cpus(|| command.spawn());
        Self::started(&command, child, directory)
    }

    fn started(
        command: &Command,
        child: io::Result<Child>,
        directory: tempfile::TempDir,
    ) -> Result<Self, BackEndError> {
        let child = child.map_err(|source| BackEndError::Start {
            program: command.get_program().display().to_string(),
            source,
        })?;
        let clock = clock_getcpuclockid(pid_of(&child)).map_err(BackEndError::Clock)?;
        Ok(Self {
            child,
            clock,
            directory,
        })
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// Its process.
    pub(crate) fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    /// The CPU time that all its threads have taken, also those that have ended.
    pub(crate) fn cpu(&self) -> Duration {
        self.clock.now().map_or(Duration::ZERO, Duration::from)
    }

    /// How much memory it has resident, in KiB; the memory of the client that it has mapped counts, too.
    pub(crate) fn resident_kib(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    }

    /// What it said if it has ended.
    pub(crate) fn ended(&mut self) -> Option<BackEndError> {
        let status = self.child.try_wait().ok()??;
        Some(BackEndError::Ended {
            status,
            log: self.log(),
        })
    }

    /// Ends it: the image is closed after that.
    pub(crate) fn end(mut self) -> Result<(), BackEndError> {
        let _gone = kill(self.pid(), Signal::SIGTERM);
        let start = Instant::now();
        while start.elapsed() < PATIENCE * 3 {
            if let Some(status) = self.child.try_wait()? {
                let asked = status.signal() == Some(Signal::SIGTERM as i32);
                return if status.success() || asked {
                    Ok(())
                } else {
                    Err(BackEndError::Ended {
                        status,
                        log: self.log(),
                    })
                };
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(BackEndError::Stays)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        let _may_be_gone = self.child.kill();
        let _status = self.child.wait();
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("Linux has 22-bit process ids"))
}

fn command(programs: &Programs, service: &Service<'_>, socket: &Path) -> Command {
    match service.server {
        Server::VdiVhost => ours(
            &programs.vdi_vhost,
            &programs.vdi_vhost_args,
            service,
            socket,
        ),
        Server::Other => ours(&programs.other, &programs.other_args, service, socket),
        Server::QsdVdi | Server::QsdVdiUring | Server::QsdRaw | Server::QsdQcow2 => {
            storage_daemon(service, socket)
        }
        Server::Fio => unreachable!("fio is no server"),
    }
}

fn ours(program: &Path, more: &[String], service: &Service<'_>, socket: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("--socket-path").arg(socket);
    command.arg("--blk-file").arg(service.image);
    command.args(["--num-queues", &service.queues.to_string()]);
    command.args([
        "--cache",
        if service.direct {
            "direct"
        } else {
            "writeback"
        },
    ]);
    command.args(more);
    command
}

/// Served by its main loop: with an I/O thread QEMU 10.0.2 had half the rate at depth 32, and sometimes died of SIGSEGV.
fn storage_daemon(service: &Service<'_>, socket: &Path) -> Command {
    let format = service.server.format();
    let direct = if service.direct { "on" } else { "off" };
    let aio = match (service.server, service.direct) {
        (Server::QsdVdiUring, _) => "io_uring",
        (_, true) => "native",
        (_, false) => "threads",
    };
    let blockdev = format!(
        "driver={format},node-name=disk,discard=unmap,cache.direct={direct},file.driver=file,file.aio={aio},\
         file.cache.direct={direct},file.discard=unmap,file.filename={}",
        service.image.display()
    );
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={}",
        socket.display(),
        service.queues
    );
    let mut command = Command::new("qemu-storage-daemon");
    command.args(["--blockdev", &blockdev, "--export", &export]);
    command
}
