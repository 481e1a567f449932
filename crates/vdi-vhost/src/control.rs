//! The control socket: what operators ask of a running daemon.
//!
//! One JSON object in a line, and one in answer; a connection can be used for many:
//!
//! ```text
//! {"version": 1, "execute": "list"}
//! {"version": 1, "execute": "info", "arguments": {"disk": "web-1"}}
//! {"version": 1, "execute": "add", "arguments": {"name": "web-2", "image": "/var/lib/vdi-vhost/web-2.vdi"}}
//! {"version": 1, "execute": "clone", "arguments": {"of": "/srv/golden.vdi", "add": {"name": "web-3", "image": "/var/lib/vdi-vhost/web-3.vdi"}}}
//! {"version": 1, "execute": "remove", "arguments": {"disk": "web-2"}}
//! {"version": 1, "execute": "resize", "arguments": {"disk": "web-1", "size_bytes": 21474836480}}
//! {"version": 1, "execute": "snapshot", "arguments": {"disk": "web-1", "to": "/var/lib/vdi-vhost/web-1-monday.vdi"}}
//! {"version": 1, "execute": "commit", "arguments": {"disk": "web-1", "keep": true}}
//! {"version": 1, "execute": "jobs"}
//! {"version": 1, "execute": "cancel", "arguments": {"disk": "web-1"}}
//! {"version": 1, "execute": "stats", "arguments": {"disk": "web-1"}}
//! {"version": 1, "execute": "stats-of-all"}
//! {"version": 1, "execute": "set-limits", "arguments": {"disk": "web-1", "limits": {"iops_total": 1000, "bps_total": 104857600}}}
//! {"version": 1, "execute": "set-limits", "arguments": {"group": "tenant-1", "limits": {"iops_total": 10000}}}
//! {"version": 1, "execute": "add-group", "arguments": {"name": "tenant-1", "limits": {"iops_total": 10000}}}
//! {"version": 1, "execute": "remove-group", "arguments": {"group": "tenant-1"}}
//! {"version": 1, "execute": "join-group", "arguments": {"disk": "web-1", "group": "tenant-1"}}
//! {"version": 1, "execute": "leave-group", "arguments": {"disk": "web-1"}}
//! {"version": 1, "execute": "pause", "arguments": {"disk": "web-1"}}
//! {"version": 1, "execute": "resume", "arguments": {"disk": "web-1"}}
//! {"version": 1, "execute": "log-level", "arguments": {"level": "debug"}}
//! {"version": 1, "execute": "dump", "arguments": {"disk": "web-1"}}
//! {"version": 1, "execute": "reload"}       the configuration file is read again, as by SIGHUP
//! {"version": 1, "execute": "hand-over"}    what the next daemon asks (--take-over); the rest is between the two
//! {"version": 1, "execute": "shutdown"}
//! {"version": 1, "return": {...}}    or    {"version": 1, "error": {"class": "...", "desc": "..."}}
//! ```
//!
//! `add` is told what `[[disk]]` has in the configuration; so is `clone`, which makes the image, as a child of the one that it names.
//! With `block_size_bytes`, a power of two from 128 KiB to 128 MiB, `clone` and `snapshot` make children of other blocks than the parent's.
//! `commit` is answered when it has begun, and `cancel` when it has ended (or after a minute, with the state `running`).
//! `disk` may be left out where there is one. What an error leaves is what was there before.
//!
//! | class | |
//! | --- | --- |
//! | `not-understood` | no command, or not of this version, or with arguments that make no sense |
//! | `no-such-disk` | none of this name; or none was named and there is not one |
//! | `no-such-group` | none of this name |
//! | `exists` | a disk or group of this name is there, or a file where a clone is to be |
//! | `in-use` | the group has disks |
//! | `not-open` | the image cannot be opened: another program has it, it is damaged, or the sandbox forbids it |
//! | `not-possible` | the format, the host or the way the disk is served says no; or the disks are being handed over |
//! | `broken` | the image did not come back, or a part of the daemon failed: the guest's requests wait until a `resize` (to the size it has) or another front end finds it whole again, or the daemon is started anew |
//!
//! Each connection has a thread, so that a command that takes its time holds up nobody else. Whoever connects has [`PATIENCE`] for
//! each line. The socket's file is its owner's alone.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vdi_core::Capacity;

use crate::backend::ControlError;
use crate::berth::Berth;
use crate::complaints::Complaints;
use crate::config::DiskTable;
use crate::cpus::CpuList;
use crate::dump::Dump;
use crate::fleet::{self, CloneError, Fleet, FleetError, ReloadError, Reloaded};
use crate::groups::{GroupError, GroupTable};
use crate::jobs::{self, JobError, JobInfo};
use crate::limits::Limits;
use crate::log::{self, Filter, LevelError};
use crate::socket::{SocketError, SocketFile};
use crate::stats::{StatsSnapshot, Usage};
use crate::turn::kept::Spent;

/// The version of the messages.
const VERSION: u32 = 1;

/// How long a peer may take to send its next line, and to read ours.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of the longest line: commands are short.
const LONGEST_LINE: u64 = 64 << 10;

/// Most operators at once: each has a thread. More are turned away.
const MOST_OPERATORS: usize = 16;

/// Where operators connect.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: UnixListener,
    operators: Arc<AtomicUsize>,
    file: Option<SocketFile>,
    path: Option<PathBuf>,
    said: Complaints,
}

#[derive(Debug, Deserialize)]
struct Request {
    version: u32,
    #[serde(flatten)]
    command: Command,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "execute", content = "arguments", rename_all = "kebab-case")]
enum Command {
    List,
    Info(Option<Which>),
    Add(Box<DiskTable>),
    Clone {
        of: PathBuf,
        block_size_bytes: Option<u32>,
        add: Box<DiskTable>,
    },
    Remove {
        disk: String,
    },
    Resize {
        disk: Option<String>,
        size_bytes: u64,
    },
    Snapshot(Frozen),
    Commit(Option<Merged>),
    Jobs,
    Cancel(Option<Which>),
    Stats(Option<Which>),
    StatsOfAll,
    SetLimits {
        disk: Option<String>,
        group: Option<String>,
        limits: Limits,
    },
    AddGroup(GroupTable),
    RemoveGroup {
        group: String,
    },
    JoinGroup {
        disk: Option<String>,
        group: String,
    },
    LeaveGroup(Option<Which>),
    Pause(Option<Which>),
    Resume(Option<Which>),
    LogLevel(Option<Level>),
    Dump(Option<Which>),
    Reload,
    Shutdown,
}

/// Which disk is meant; the only one, if that is not said.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
struct Which {
    disk: Option<String>,
}

/// What a snapshot is to be.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Frozen {
    disk: Option<String>,
    to: PathBuf,
    /// Of the child.
    block_size_bytes: Option<u32>,
}

/// What is to be merged; without a word about it the image goes then.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
struct Merged {
    disk: Option<String>,
    #[serde(default)]
    keep: bool,
}

/// What is to be logged from now on; if that is not said, what is logged is only told.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Level {
    level: Option<Filter>,
}

#[derive(Debug, Serialize)]
struct Answer {
    version: u32,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    Return(Returned),
    Error { class: &'static str, desc: String },
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Returned {
    Info(Box<Info>),
    List {
        disks: Vec<Info>,
        groups: Vec<GroupTable>,
    },
    Group(GroupTable),
    Level {
        level: String,
        before: String,
    },
    Dump(Box<Dump>),
    Stats(Box<NamedStats>),
    StatsOfAll {
        disks: Vec<NamedStats>,
    },
    Reloaded(Reloaded),
    Job(JobInfo),
    Jobs {
        jobs: Vec<JobInfo>,
    },
    Nothing {},
}

/// What there is to know of a disk.
#[derive(Debug, Serialize)]
struct Info {
    name: String,
    image: PathBuf,
    /// Where front ends connect, if that is a path of ours.
    socket: Option<PathBuf>,
    size_bytes: u64,
    /// Whether a front end is connected.
    connected: bool,
    /// Whether it is open here, or waits for its turn.
    open: bool,
    /// Whether requests wait because an operator wants them to.
    paused: bool,
    /// Requests that the host failed, since the daemon was started.
    failed_requests: u64,
    /// Whether a failure ended all writing until the daemon is started again.
    failed: bool,
    /// What it may do.
    limits: Limits,
    /// Whom it shares limits with.
    group: Option<String>,
    /// How many threads serve it.
    workers: usize,
    /// Whether those serve no other disk.
    own_workers: bool,
    /// Where they may run, if that was said.
    worker_cpus: Option<CpuList>,
}

/// What a disk did and takes, with its name.
#[derive(Debug, Serialize)]
struct NamedStats {
    name: String,
    #[serde(flatten)]
    usage: Usage,
    #[serde(flatten)]
    stats: StatsSnapshot,
}

impl ControlSocket {
    /// Listens at `path` for commands.
    pub(crate) fn listen(path: &Path) -> Result<Self, SocketError> {
        let (file, listener) = SocketFile::listen(path)?;
        Ok(Self {
            file: Some(file),
            path: Some(path.to_owned()),
            ..Self::on(listener)
        })
    }

    /// Listens where another daemon does, whose socket it is until it is owned.
    pub(crate) fn of_another(listener: UnixListener, path: Option<PathBuf>) -> Self {
        Self {
            file: path.as_deref().and_then(SocketFile::of_another),
            path,
            ..Self::on(listener)
        }
    }

    /// The socket's path, if its file is ours.
    pub(crate) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The socket's file is this process's to remove.
    pub(crate) fn own(&self) {
        self.file.iter().for_each(SocketFile::own);
    }

    /// The socket's file is another process's.
    pub(crate) fn disown(&self) {
        self.file.iter().for_each(SocketFile::disown);
    }

    /// Listens on a socket that somebody else made.
    pub(crate) fn on(listener: UnixListener) -> Self {
        Self {
            listener,
            operators: Arc::default(),
            file: None,
            path: None,
            said: Complaints::default(),
        }
    }

    /// Becomes readable when somebody connects.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Serves whoever connected, on a thread of its own; false if that is better tried again a little later.
    pub(crate) fn let_in(self: &Arc<Self>, fleet: &Arc<Fleet>) -> bool {
        if fleet.is_handed_over() {
            return false; // The one who has the disks will.
        }
        let begun = self.listener.accept().and_then(|(peer, _)| {
            peer.set_nonblocking(false)?;
            peer.set_read_timeout(Some(PATIENCE))?;
            peer.set_write_timeout(Some(PATIENCE))?;
            let seat = Seat::take(&self.operators)?;
            let fleet = Arc::clone(fleet);
            // The socket's file goes away when this process wants it, whoever is being heard.
            let control = Arc::downgrade(self);
            let thread = thread::Builder::new().name("operator".to_owned());
            thread.spawn(move || {
                let _seat = seat;
                if let Err(error) = converse(&peer, &fleet, &control) {
                    tracing::warn!("a command could not be answered: {error}");
                }
            })
        });
        if let Err(error) = &begun {
            self.said
                .warn(format_args!("an operator could not be heard: {error}"));
        }
        begun.is_ok()
    }
}

/// One of the operators that are heard.
struct Seat(Arc<AtomicUsize>);

impl Seat {
    fn take(taken: &Arc<AtomicUsize>) -> io::Result<Self> {
        let more = |count: usize| (count < MOST_OPERATORS).then_some(count + 1);
        let taken_now = taken.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        let full = || io::Error::other(format!("{MOST_OPERATORS} others are being served"));
        taken_now
            .map(|_| Self(Arc::clone(taken)))
            .map_err(|_| full())
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Answers one line after the other.
fn converse(
    mut peer: &UnixStream,
    fleet: &Arc<Fleet>,
    control: &Weak<ControlSocket>,
) -> io::Result<()> {
    let mut lines = BufReader::new(peer);
    loop {
        let mut line = String::new();
        match lines.by_ref().take(LONGEST_LINE).read_line(&mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // One that said nothing at all is no command that could not be answered.
            Err(error) if line.is_empty() && error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        // The next daemon's: what follows is between the two.
        if fleet::asks_to_hand_over(&line) {
            let control = control.upgrade();
            return control.map_or(Ok(()), |to| fleet.hand_over(peer, &mut lines, &to));
        }
        let outcome = match parse(&line) {
            Ok(command) => execute(command, fleet).unwrap_or_else(Outcome::from),
            Err(outcome) => outcome,
        };
        let answer = Answer {
            version: VERSION,
            outcome,
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        peer.write_all(&text)?;
    }
}

fn execute(command: Command, fleet: &Arc<Fleet>) -> Result<Outcome, Failed> {
    let returned = match command {
        Command::List => Returned::List {
            disks: fleet.list().iter().map(|berth| Info::of(berth)).collect(),
            groups: fleet.groups().list(),
        },
        Command::Info(which) => Returned::info(&*one(which, fleet)?),
        Command::Add(table) => Returned::info(&*fleet.add(*table)?),
        Command::Clone {
            of,
            block_size_bytes,
            add,
        } => Returned::info(&*fleet.add_clone(&of, block_size_bytes, *add)?),
        Command::Remove { disk } => {
            fleet.remove(&disk)?;
            tracing::info!("{disk}: removed");
            Returned::Nothing {}
        }
        Command::Resize { disk, size_bytes } => resize(disk.as_deref(), size_bytes, fleet)?,
        Command::Snapshot(frozen) => snapshot(&frozen, fleet)?,
        Command::Commit(what) => commit(what.unwrap_or_default(), fleet)?,
        Command::Jobs => Returned::Jobs {
            jobs: fleet.jobs().list(),
        },
        Command::Cancel(which) => {
            let disk = which.and_then(|which| which.disk);
            Returned::Job(jobs::cancel(fleet, disk.as_deref())?)
        }
        Command::Stats(which) => Returned::Stats(Box::new(NamedStats::of(&*one(which, fleet)?))),
        Command::StatsOfAll => Returned::StatsOfAll {
            disks: fleet
                .list()
                .iter()
                .map(|berth| NamedStats::of(berth))
                .collect(),
        },
        Command::SetLimits {
            disk,
            group,
            limits,
        } => set_limits(disk.as_deref(), group.as_deref(), &limits, fleet)?,
        Command::AddGroup(table) => add_group(table, fleet)?,
        Command::RemoveGroup { group } => {
            fleet.remove_group(&group)?;
            Returned::Nothing {}
        }
        Command::JoinGroup { disk, group } => {
            let berth = fleet.find(disk.as_deref())?;
            fleet.join(&berth, Some(&group))?;
            Returned::info(&berth)
        }
        Command::LeaveGroup(which) => {
            let berth = one(which, fleet)?;
            fleet.join(&berth, None)?;
            Returned::info(&berth)
        }
        Command::Pause(which) => pause(&*one(which, fleet)?, fleet)?,
        Command::Resume(which) => resume(&*one(which, fleet)?, fleet)?,
        Command::LogLevel(level) => log_level(level.and_then(|level| level.level).as_ref())?,
        Command::Dump(which) => Returned::Dump(Box::new(Dump::of(&*one(which, fleet)?))),
        Command::Reload => Returned::Reloaded(fleet.reload()?),
        Command::Shutdown => {
            let _change = fleet.change()?;
            fleet.end();
            Returned::Nothing {}
        }
    };
    Ok(Outcome::Return(returned))
}

impl NamedStats {
    fn of(berth: &Berth) -> Self {
        Self {
            name: berth.name().to_owned(),
            usage: berth.usage(),
            stats: berth.stats(),
        }
    }
}

/// The disk that is meant.
fn one(which: Option<Which>, fleet: &Fleet) -> Result<Arc<Berth>, Failed> {
    let disk = which.and_then(|which| which.disk);
    Ok(fleet.find(disk.as_deref())?)
}

fn resize(disk: Option<&str>, size_bytes: u64, fleet: &Fleet) -> Result<Returned, Failed> {
    let berth = fleet.find(disk)?;
    let to = Capacity::from_bytes_rounded_down(size_bytes);
    let _change = fleet.change()?;
    berth.lock().grow(to)?;
    Ok(Returned::info(&berth))
}

fn snapshot(frozen: &Frozen, fleet: &Fleet) -> Result<Returned, Failed> {
    let berth = fleet.find(frozen.disk.as_deref())?;
    let _change = fleet.change_files()?;
    berth.lock().snapshot(&frozen.to, frozen.block_size_bytes)?;
    Ok(Returned::info(&berth))
}

fn commit(Merged { disk, keep }: Merged, fleet: &Arc<Fleet>) -> Result<Returned, Failed> {
    let spent = if keep { Spent::Keep } else { Spent::Remove };
    let _change = fleet.change_files()?;
    let begun = jobs::commit(fleet, disk.as_deref(), spent)?;
    Ok(Returned::Job(begun))
}

fn add_group(table: GroupTable, fleet: &Fleet) -> Result<Returned, Failed> {
    let _change = fleet.change()?;
    let added = fleet.groups().add(table).map_err(FleetError::from)?;
    Ok(Returned::Group(GroupTable::of(&added)))
}

fn pause(berth: &Berth, fleet: &Fleet) -> Result<Returned, Failed> {
    let _change = fleet.change()?;
    berth.lock().pause()?;
    tracing::info!("{}: paused", berth.name());
    Ok(Returned::info(berth))
}

fn resume(berth: &Berth, fleet: &Fleet) -> Result<Returned, Failed> {
    let _change = fleet.change()?;
    berth.lock().resume()?;
    tracing::info!("{}: resumed", berth.name());
    Ok(Returned::info(berth))
}

/// Limits a disk, or a group.
fn set_limits(
    disk: Option<&str>,
    group: Option<&str>,
    limits: &Limits,
    fleet: &Fleet,
) -> Result<Returned, Failed> {
    let _change = fleet.change()?;
    match (disk, group) {
        (Some(_), Some(_)) => Err(Failed::TwoMeant),
        (None, Some(group)) => {
            let group = fleet.groups().find(group).map_err(FleetError::from)?;
            group.set_limits(limits);
            Ok(Returned::Group(GroupTable::of(&group)))
        }
        (disk, None) => {
            let berth = fleet.find(disk)?;
            berth.throttle().set_limits(limits);
            Ok(Returned::info(&berth))
        }
    }
}

/// Says what is logged, and has something else logged from now on if that is wanted.
fn log_level(level: Option<&Filter>) -> Result<Returned, Failed> {
    let before = log::filter()?;
    if let Some(level) = level {
        log::set_filter(level)?;
        tracing::info!("logged is {} now, and was {before}", log::filter()?);
    }
    Ok(Returned::Level {
        level: log::filter()?,
        before,
    })
}

impl Returned {
    fn info(berth: &Berth) -> Self {
        Self::Info(Box::new(Info::of(berth)))
    }
}

impl Info {
    fn of(berth: &Berth) -> Self {
        let connected = berth.is_connected();
        let backend = berth.lock();
        let options = backend.options();
        let crew = &berth.witnesses().crew;
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        Self {
            name: berth.name().to_owned(),
            image: absolute(&options.image),
            socket: options.socket.as_ref().map(absolute),
            size_bytes: backend.capacity().bytes(),
            connected,
            open: backend.is_open(),
            paused: backend.is_paused(),
            failed_requests: backend.failed_requests(),
            failed: backend.has_failed(),
            limits: berth.throttle().limits(),
            group: berth
                .throttle()
                .group()
                .map(|group| group.name().to_owned()),
            workers: crew.len(),
            own_workers: crew.is_own(),
            worker_cpus: crew.cpus().cloned(),
        }
    }
}

/// Why a command was not carried out.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Fleet(#[from] FleetError),
    #[error(transparent)]
    Disk(#[from] ControlError),
    #[error(transparent)]
    Level(#[from] LevelError),
    #[error("limits are a disk's or a group's; name one of them")]
    TwoMeant,
    #[error(transparent)]
    Job(JobError),
    #[error(transparent)]
    Reload(#[from] ReloadError),
}

impl From<JobError> for Failed {
    fn from(error: JobError) -> Self {
        match error {
            JobError::Fleet(error) => error.into(),
            JobError::Disk(error) => error.into(),
            other => Self::Job(other),
        }
    }
}

impl From<Failed> for Outcome {
    fn from(failed: Failed) -> Self {
        let desc = crate::chain_of(&failed);
        tracing::warn!("a command was not carried out: {desc}");
        let class = match failed {
            Failed::Fleet(FleetError::NoSuchDisk { .. } | FleetError::WhichDisk { .. }) => {
                "no-such-disk"
            }
            Failed::Fleet(FleetError::Group(GroupError::NoSuchGroup { .. })) => "no-such-group",
            Failed::Fleet(
                FleetError::Exists { .. }
                | FleetError::Group(GroupError::Exists { .. })
                | FleetError::Clone(CloneError::Exists { .. }),
            ) => "exists",
            Failed::Fleet(FleetError::Group(GroupError::InUse { .. })) => "in-use",
            Failed::TwoMeant => "not-understood",
            Failed::Fleet(
                FleetError::Turn(_)
                | FleetError::Clone(CloneError::File(_) | CloneError::Parent { .. }),
            )
            | Failed::Disk(ControlError::Open(_)) => "not-open",
            Failed::Fleet(
                FleetError::Options(_)
                | FleetError::Group(GroupError::Name { .. })
                | FleetError::Clone(CloneError::Create { .. } | CloneError::Name { .. })
                | FleetError::OneDisk
                | FleetError::TooMany
                | FleetError::HandingOver
                | FleetError::Socket(_)
                | FleetError::Crew(_)
                | FleetError::Host(_),
            )
            | Failed::Disk(
                ControlError::Grow(_) | ControlError::Snapshot(_) | ControlError::Merge(_),
            )
            | Failed::Job(_)
            | Failed::Reload(_) => "not-possible",
            Failed::Fleet(FleetError::Close(_) | FleetError::Pause(_))
            | Failed::Disk(ControlError::Turn(_) | ControlError::Ring(_))
            | Failed::Level(_) => "broken",
        };
        Self::Error { class, desc }
    }
}

fn parse(line: &str) -> Result<Command, Outcome> {
    let refuse = |desc| Outcome::Error {
        class: "not-understood",
        desc,
    };
    let request: Request =
        serde_json::from_str(line).map_err(|error| refuse(format!("no command: {error}")))?;
    if request.version != VERSION {
        let desc = format!(
            "version {} of the messages is not spoken here, only {VERSION}",
            request.version
        );
        return Err(refuse(desc));
    }
    Ok(request.command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_command_of_a_version_that_is_known() {
        let info = parse(r#"{"version": 1, "execute": "info"}"#).unwrap();
        assert_eq!(info, Command::Info(None));
        let line = r#"{"version": 1, "execute": "resize", "arguments": {"size_bytes": 5}}"#;
        assert_eq!(
            parse(line).unwrap(),
            Command::Resize {
                disk: None,
                size_bytes: 5
            }
        );
        for bad in [
            "",
            "{}",
            r#"{"version": 2, "execute": "info"}"#,
            r#"{"version": 1, "execute": "destroy"}"#,
            r#"{"version": 1, "execute": "resize", "arguments": {"size_bytes": -5}}"#,
            r#"{"version": 1, "execute": "resize"}"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
