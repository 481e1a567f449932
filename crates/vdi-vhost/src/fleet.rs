//! All disks of this process: they come from the configuration and from operators, and go when they are removed or all ends.
//!
//! What they have in common is here: the crew that serves their queues, the housekeepers, the parents, and what tells the door's
//! thread (`doorman`) that somebody knocks.

mod clone;
mod hand_over;
mod reload;
mod take_over;
mod words;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, Weak};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vdi_core::WriteError;

use crate::backend::{Backend, ControlError};
use crate::berth::{Berth, Door};
use crate::complaints::About;
use crate::config::{Config, DiskError, DiskOptions, DiskTable};
use crate::crew::{Crew, CrewError, Reserve};
use crate::device::{Device, Serial, Zeros};
use crate::groups::{self, GroupError, Groups};
use crate::housekeeper::Housekeepers;
use crate::jobs::Jobs;
use crate::metrics::Handle;
use crate::parents::Parents;
use crate::session::{ServeError, complain_of_door};
use crate::socket::{SocketError, SocketFile};
use crate::turn::{Opened, Opening, Turn, TurnError};
use crate::workers::Workers;

pub(crate) use self::clone::CloneError;
use self::reload::Said;
pub(crate) use self::reload::{ReloadError, Reloaded};
pub(crate) use self::take_over::{TakeOver, TakeOverError, Taken};

/// Most disks: each has a descriptor for its image, one for its socket and some more, and the kernel gives a process a
/// million at most.
const MOST_DISKS: usize = 65_536;

/// The first number of a disk at the door; the others that are waited for have smaller ones (`doorman`).
const FIRST: u64 = 16;

/// All disks.
pub(crate) struct Fleet {
    config: Config,
    staff: Staff,
    parents: Arc<Parents>,
    groups: Groups,
    doors: Epoll,
    next: AtomicU64,
    disks: Mutex<BTreeMap<u64, Arc<Berth>>>,
    /// Disks as the configuration described them when they came from there, by name.
    described: Mutex<BTreeMap<String, DiskOptions>>,
    /// What else it said.
    said: Mutex<Said>,
    /// Held while it is read again.
    reloads: Mutex<()>,
    /// Held by what changes disks; by the hand-over alone, while it lasts.
    changes: RwLock<()>,
    /// Where metrics are, if they are.
    metrics: OnceLock<Weak<Handle>>,
    /// The disks are another daemon's.
    is_handed_over: AtomicBool,
    jobs: Jobs,
    /// Why all has to end, if it has to.
    fatal: Mutex<Option<ServeError>>,
    /// The only connection there would be has ended, or something fatal happened, or an operator wants it.
    end: EventFd,
}

/// The threads that serve disks.
pub(crate) struct Staff {
    /// Those that serve all disks that have none of their own.
    pub(crate) crew: Arc<Crew>,
    /// Those that disks have for their own, or may have.
    pub(crate) reserve: Arc<Reserve>,
    pub(crate) housekeepers: Arc<Housekeepers>,
}

/// A disk whose image and socket are open, and which nobody serves yet.
pub(crate) struct Readied {
    options: DiskOptions,
    turn: Turn,
    opened: Option<Opened>,
    device: Device,
    door: Door,
    is_paused: bool,
}

/// Why there is no such disk, or no more than there were.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FleetError {
    #[error(transparent)]
    Options(#[from] DiskError),
    #[error("a disk called {name} is there already")]
    Exists { name: String },
    #[error("there is no disk called {name}")]
    NoSuchDisk { name: String },
    #[error("there are {count} disks; say which one is meant")]
    WhichDisk { count: usize },
    #[error("the disks are being handed over to another daemon; ask that one")]
    HandingOver,
    #[error(
        "this daemon serves the one disk of its command line and makes no files; serve the disk by --config"
    )]
    OneDisk,
    #[error("there are {MOST_DISKS} disks, the most that are served")]
    TooMany,
    #[error(transparent)]
    Group(#[from] GroupError),
    #[error(transparent)]
    Clone(#[from] CloneError),
    #[error(transparent)]
    Turn(#[from] TurnError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Crew(#[from] CrewError),
    #[error("the disk has no descriptor left, or no memory")]
    Host(#[source] io::Error),
    #[error("the image could not be closed clean")]
    Close(#[from] WriteError),
    #[error("the disk was paused, and cannot be here")]
    Pause(#[source] ControlError),
}

impl Readied {
    /// Opens an image, unless it is to wait, and makes its socket, unless there is one.
    pub(crate) fn new(
        options: DiskOptions,
        parents: &Arc<Parents>,
        door: Option<Door>,
    ) -> Result<Self, FleetError> {
        let opening = Opening::new(options.clone(), Arc::clone(parents));
        let (turn, opened, device) = if options.incoming {
            let device = make_device(&options, &opening.look()?, options.access);
            (Turn::waiting(opening), None, device)
        } else {
            let mut turn = Turn::waiting(opening);
            let opened = turn.begin()?;
            let device = make_device(&options, &opened.disk, opened.disk.access());
            (turn, Some(opened), device)
        };
        let door = match (door, &options.socket) {
            (Some(door), _) => door,
            (None, Some(path)) => {
                let (file, listener) = SocketFile::listen(path)?;
                Door::Listener {
                    listener,
                    file: Some(file),
                }
            }
            (None, None) => return Err(DiskError::NoSocket.into()),
        };
        Ok(Self {
            options,
            turn,
            opened,
            device,
            door,
            is_paused: false,
        })
    }

    /// Looks at an image that another daemon serves until it hands it over.
    pub(crate) fn taken(taken: Taken, parents: &Arc<Parents>) -> Result<Self, FleetError> {
        let options = taken.options;
        let opening = Opening::new(options.clone(), Arc::clone(parents));
        let device = make_device(&options, &opening.look()?, options.access);
        Ok(Self {
            turn: Turn::waiting(opening),
            opened: None,
            device,
            door: Door::Listener {
                listener: taken.listener,
                file: options.socket.as_deref().and_then(SocketFile::of_another),
            },
            is_paused: taken.is_paused,
            options,
        })
    }

    /// How it is to be served.
    pub(crate) const fn options(&self) -> &DiskOptions {
        &self.options
    }

    /// What is about to be served.
    pub(crate) fn describe(&self) -> String {
        format!(
            "serving {} ({} bytes){}",
            self.options.image.display(),
            self.device.capacity().bytes(),
            if self.options.incoming {
                ", when it is our turn"
            } else {
                ""
            }
        )
    }
}

impl Fleet {
    /// No disks yet.
    pub(crate) fn new(
        config: Config,
        staff: Staff,
        parents: Arc<Parents>,
        doors: Epoll,
    ) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let each = config.disks.iter();
        let described = each.map(|disk| (disk.name.clone(), disk.clone())).collect();
        Ok(Self {
            groups: Groups::new(&config.groups),
            said: Mutex::new(Said::of(&config)),
            reloads: Mutex::default(),
            config,
            staff,
            parents,
            doors,
            next: AtomicU64::new(FIRST),
            disks: Mutex::default(),
            described: Mutex::new(described),
            changes: RwLock::default(),
            metrics: OnceLock::new(),
            is_handed_over: AtomicBool::new(false),
            jobs: Jobs::default(),
            fatal: Mutex::default(),
            end: EventFd::from_flags(flags)?,
        })
    }

    /// What tells who knocks. Made before the sandbox is sealed.
    pub(crate) fn doors() -> io::Result<Epoll> {
        Ok(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?)
    }

    /// What is waited for at the doors.
    pub(crate) const fn knocks(&self) -> &Epoll {
        &self.doors
    }

    /// What operators began.
    pub(crate) const fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// What becomes readable when all is to end.
    pub(crate) const fn ending(&self) -> &EventFd {
        &self.end
    }

    /// Has all end.
    pub(crate) fn end(&self) {
        let _ = self.end.write(1);
    }

    /// Says where metrics are, for the next daemon.
    pub(crate) fn has_metrics_at(&self, place: &Arc<Handle>) {
        let _ = self.metrics.set(Arc::downgrade(place));
    }

    /// Opens a disk that an operator describes, and serves it.
    pub(crate) fn add(self: &Arc<Self>, table: DiskTable) -> Result<Arc<Berth>, FleetError> {
        let _change = self.change_files()?;
        let options = self.options_of(table)?;
        self.add_new(options)
    }

    /// What an operator describes, if there may be such a disk.
    fn options_of(&self, table: DiskTable) -> Result<DiskOptions, FleetError> {
        table.refuse_relative()?;
        let dir = self.config.socket_dir.as_deref();
        let options = table.resolve(&self.said().defaults, dir)?;
        self.refuse_twin(&options)?;
        if let Some(group) = &options.group {
            self.groups.find(group)?;
        }
        Ok(options)
    }

    fn add_new(self: &Arc<Self>, options: DiskOptions) -> Result<Arc<Berth>, FleetError> {
        let readied = Readied::new(options, &self.parents, None)?;
        tracing::info!("{}: {}", readied.options.name, readied.describe());
        self.serve(readied)
    }

    /// Serves a disk from now on.
    pub(crate) fn serve(self: &Arc<Self>, readied: Readied) -> Result<Arc<Berth>, FleetError> {
        let about = if self.config.socket_dir.is_some() || self.config.disks.len() > 1 {
            About::disk(&readied.options.name)
        } else {
            About::default()
        };
        let is_paused = readied.is_paused;
        let workers = match readied.options.own_workers.clone() {
            Some(own) => Workers::new(&Crew::own(&self.staff.reserve, own)?),
            None => Workers::new(&self.staff.crew),
        };
        let housekeepers = Arc::clone(&self.staff.housekeepers);
        let device = Arc::new(readied.device);
        let mut backend = Backend::new(device, readied.turn, workers, housekeepers, &about);
        if let Some(opened) = readied.opened {
            backend.serve(opened);
        }
        let DiskOptions {
            name,
            limits,
            group,
            ..
        } = readied.options;
        let berth = Berth::new(name, &about, readied.door, backend).map_err(FleetError::Host)?;
        let berth = Arc::new(berth);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        berth.throttle().set_limits(&limits);
        if is_paused {
            berth.lock().pause().map_err(FleetError::Pause)?;
        }
        {
            let groups = self.groups.lock();
            let group = group.map(|name| groups::find(&groups, &name)).transpose()?;
            berth.throttle().set_group(group);
            let mut disks = self.disks();
            // Two operators may have asked for the same at once.
            if disks.values().any(|other| other.name() == berth.name()) {
                let name = berth.name().to_owned();
                return Err(FleetError::Exists { name });
            }
            disks.insert(number, Arc::clone(&berth));
        }
        let opened = self.open_door(number, &berth);
        opened.inspect_err(|_| drop(self.disks().remove(&number)))?;
        Ok(berth)
    }

    fn open_door(self: &Arc<Self>, number: u64, berth: &Arc<Berth>) -> Result<(), FleetError> {
        let Some(listener) = berth.listener() else {
            // The one who is there already.
            return self.knocked(number).map(|_| ()).map_err(FleetError::Host);
        };
        let added = self.doors.add(listener, knock(number));
        added.map_err(|errno| FleetError::Host(errno.into()))
    }

    /// What is held while a disk is changed.
    pub(crate) fn change(&self) -> Result<RwLockReadGuard<'_, ()>, FleetError> {
        self.changes.try_read().map_err(|_| FleetError::HandingOver)
    }

    /// The same, for what makes files, which the sandbox lets only a daemon do whose disks come and go.
    pub(crate) fn change_files(&self) -> Result<RwLockReadGuard<'_, ()>, FleetError> {
        if self.config.file.is_none() {
            return Err(FleetError::OneDisk);
        }
        self.change()
    }

    /// Lets in who waits at a disk's door; false if that is to be tried again.
    pub(crate) fn knocked(self: &Arc<Self>, number: u64) -> io::Result<bool> {
        let Some(berth) = self.disks().get(&number).cloned() else {
            return Ok(true);
        };
        let fleet = Arc::clone(self);
        let afterwards = move |berth: &Arc<Berth>, served| fleet.over(number, berth, served);
        match berth.let_in(Box::new(afterwards)) {
            Ok(true) => {}
            Ok(false) => self.wait_for_next(number, &berth),
            // There will be no other connection.
            Err(error) if berth.listener().is_none() => return Err(error),
            Err(error) => {
                complain_of_door(&berth, &error);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What a session's thread does last.
    fn over(&self, number: u64, berth: &Berth, served: Result<(), ServeError>) {
        if let Err(error) = served {
            *self.fatal.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            self.end();
        } else if berth.listener().is_none() {
            self.end();
        } else {
            self.wait_for_next(number, berth);
        }
    }

    /// Listens again at a disk's door where nobody could be let in.
    pub(crate) fn listen_again(&self, number: u64) {
        let berth = self.disks().get(&number).cloned();
        if let Some(berth) = berth {
            self.wait_for_next(number, &berth);
        }
    }

    fn wait_for_next(&self, number: u64, berth: &Berth) {
        if let Some(listener) = berth.listener() {
            // One that was removed meanwhile is no longer waited for.
            let _ = self.doors.modify(listener, &mut knock(number));
        }
    }

    /// Has all sessions look up: memory that one of them shares was cut, perhaps.
    pub(crate) fn poke_all(&self) {
        self.disks().values().for_each(|berth| berth.poke());
    }

    /// All disks, by name.
    pub(crate) fn list(&self) -> Vec<Arc<Berth>> {
        let mut all: Vec<_> = self.disks().values().cloned().collect();
        all.sort_by(|one, other| one.name().cmp(other.name()));
        all
    }

    /// The disk of this name; the only one, if none is said.
    pub(crate) fn find(&self, name: Option<&str>) -> Result<Arc<Berth>, FleetError> {
        let disks = self.disks();
        let found = match name {
            Some(name) => disks.values().find(|berth| berth.name() == name),
            None if disks.len() == 1 => disks.values().next(),
            None => return Err(FleetError::WhichDisk { count: disks.len() }),
        };
        let missing = || FleetError::NoSuchDisk {
            name: name.unwrap_or_default().to_owned(),
        };
        found.cloned().ok_or_else(missing)
    }

    /// Disks that share limits.
    pub(crate) const fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Has a disk share the limits of a group, or of none.
    pub(crate) fn join(&self, disk: &Berth, group: Option<&str>) -> Result<(), FleetError> {
        let _change = self.change()?;
        let groups = self.groups.lock();
        let group = group.map(|name| groups::find(&groups, name)).transpose()?;
        disk.throttle().set_group(group);
        Ok(())
    }

    /// Forgets a group that no disk is in.
    pub(crate) fn remove_group(&self, name: &str) -> Result<(), FleetError> {
        let _change = self.change()?;
        let mut groups = self.groups.lock();
        let group = groups::find(&groups, name)?;
        let is_in = |disk: &&Arc<Berth>| {
            let its = disk.throttle().group();
            its.is_some_and(|its| Arc::ptr_eq(&its, &group))
        };
        if let Some(disk) = self.disks().values().find(is_in) {
            let (name, disk) = (name.to_owned(), disk.name().to_owned());
            return Err(GroupError::InUse { name, disk }.into());
        }
        groups.remove(name);
        Ok(())
    }

    /// Ends the service of a disk: what is in flight is answered, its front end is disconnected, its image closed.
    pub(crate) fn remove(&self, name: &str) -> Result<(), FleetError> {
        let _change = self.change()?;
        self.take_out(name)
    }

    fn take_out(&self, name: &str) -> Result<(), FleetError> {
        let berth = {
            let mut disks = self.disks();
            let found = disks.iter().find(|(_, berth)| berth.name() == name);
            let number = found.map(|(number, _)| *number);
            number.and_then(|number| disks.remove(&number))
        };
        let berth = berth.ok_or_else(|| FleetError::NoSuchDisk {
            name: name.to_owned(),
        })?;
        self.described().remove(name);
        Ok(self.take_leave(berth)?)
    }

    /// Ends the service of all disks, unless they are another daemon's.
    pub(crate) fn close(&self) -> Result<(), WriteError> {
        if self.is_handed_over() {
            tracing::info!("another daemon has the disks now");
            return Ok(());
        }
        let all = std::mem::take(&mut *self.disks());
        let closed: Vec<_> = all
            .into_values()
            .map(|berth| self.take_leave(berth))
            .collect();
        closed.into_iter().collect::<Result<(), _>>()?;
        tracing::info!("the image is closed");
        Ok(())
    }

    /// Why all has to end, if it was not wanted.
    pub(crate) fn fatal(&self) -> Option<ServeError> {
        self.fatal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    fn take_leave(&self, berth: Arc<Berth>) -> Result<(), WriteError> {
        self.close_door(&berth);
        berth.close()
    }

    /// No longer hears who knocks.
    fn close_door(&self, berth: &Berth) {
        if let Some(listener) = berth.listener() {
            match self.doors.delete(listener) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(errno) => tracing::debug!("a door stays in the list: {errno}"),
            }
        }
    }

    fn refuse_twin(&self, options: &DiskOptions) -> Result<(), FleetError> {
        let disks = self.disks();
        if disks.len() >= MOST_DISKS {
            return Err(FleetError::TooMany);
        }
        if disks.values().any(|berth| berth.name() == options.name) {
            let name = options.name.clone();
            return Err(FleetError::Exists { name });
        }
        Ok(())
    }

    fn described(&self) -> MutexGuard<'_, BTreeMap<String, DiskOptions>> {
        self.described
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn disks(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Berth>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a line to the control socket comes from a daemon that wants to take over.
pub(crate) fn asks_to_hand_over(line: &str) -> bool {
    matches!(words::step(line), Ok(words::Step::HandOver))
}

/// Told once, until it is waited for again.
pub(crate) fn knock(number: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, number)
}

/// The device that guests see of a disk.
pub(crate) fn make_device(
    options: &DiskOptions,
    disk: &vdi_core::Disk,
    access: vdi_core::Access,
) -> Device {
    let uuid = || Serial::from_image_uuid(disk.header().uuid_image().into_bytes());
    let zeros = Zeros {
        discard: options.discard,
        detect: options.detect_zeroes,
        block_sectors: disk.header().block_size().bytes() / 512,
    };
    Device::new(
        disk.capacity(),
        access,
        options.num_queues,
        options.serial.clone().unwrap_or_else(uuid),
        zeros,
    )
}
