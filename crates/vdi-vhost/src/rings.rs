//! The rings as the control thread has them: what the front end set up, and whether a worker serves it.
//!
//! ```text
//!           kick descriptor                   enable
//! stopped ──────────────────► started ◄──────────────────► enabled: chains are taken
//!    ▲                           │     disable (drains)
//!    └───────────────────────────┘
//!            stop (drains)
//! ```
//!
//! A ring is changed only while it is stopped, and checked when it starts: the worker gets rings that lie in the guest's
//! memory and are aligned. Source: vhost-user protocol, "Ring states".

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryRegion,
};

use crate::command::{Command, Setup, Takeover};
use crate::complaints::Complaints;
use crate::device::Device;
use crate::dirty::{DirtyLog, Guest};
use crate::dump::Witnesses;
use crate::memory::{self, Memory};
use crate::queue::{self, ErrorFd, Mode, Vring};
use crate::tracking::{Limits, Recovered, Tracker, Tracking, TrackingError};
use crate::workers::{Served, Workers};

/// The largest ring: QEMU's limit too. Bounds what a queue can have in flight.
const MAX_QUEUE_SIZE: u16 = 1024;

/// All rings of the device, and the memory they lie in.
pub(crate) struct Rings {
    workers: Workers,
    memory: GuestMemoryAtomic<Memory>,
    /// Where writes to the memory are marked, during a migration.
    log: Option<Arc<DirtyLog>>,
    /// Those that the front end has spoken of, and all below: the others cost nothing.
    rings: Vec<Ring>,
    /// How many there may be.
    count: u16,
    /// Whether rings that nobody has spoken of yet take chains as soon as they start.
    all_enabled: bool,
    /// An operator wants no chains to be taken, whatever front ends enable.
    is_paused: bool,
    /// Where chains in flight are recorded, if the front end wants that.
    tracking: Option<Arc<Tracking>>,
    /// What was said of rings that start.
    said: Arc<Complaints>,
}

struct Ring {
    vring: Vring,
    error_fd: ErrorFd,
    /// As the front end gave them.
    addresses: Option<Addresses>,
    /// Where it is kicked, if the front end gave that.
    kick: Option<File>,
    started: bool,
    /// It was started, and waits for the image.
    suspended: bool,
    /// It has been started before in this session.
    was_started: bool,
}

/// A ring in numbers, as the front end set it up.
#[derive(Debug, Serialize)]
pub(crate) struct RingDump {
    queue: usize,
    size: u16,
    enabled: bool,
    started: bool,
    /// Whether there is somewhere to hear kicks.
    kicked: bool,
}

/// Where a ring's parts are, in the front end's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Addresses {
    /// The descriptor table.
    pub(crate) table: u64,
    /// The available ring.
    pub(crate) available: u64,
    /// The used ring.
    pub(crate) used: u64,
}

/// Why a ring is not as the front end wants it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    /// An index beyond what was offered.
    #[error("there is no queue {index}, only {count}")]
    NoSuchQueue { index: u32, count: u16 },
    /// `virtio-queue` does not want it.
    #[error("no ring can be made")]
    Make(#[source] virtio_queue::Error),
    /// Not a size of a split ring, or too large.
    #[error("queue {index} cannot have {size} entries, only a power of two up to {MAX_QUEUE_SIZE}")]
    Size { index: u32, size: u32 },
    /// Not an index of a split ring.
    #[error("queue {index} cannot begin at {base}, which is no 16-bit index")]
    Base { index: u32, base: u32 },
    /// A part outside of the memory.
    #[error("the {what} of queue {index} at {address:#x} is not in the shared memory")]
    Outside {
        index: u32,
        what: &'static str,
        address: u64,
    },
    /// A part that is not aligned.
    #[error("the rings of queue {index} are misaligned")]
    Misaligned { index: u32 },
    /// Only a stopped ring can be changed.
    #[error("queue {index} is running; stop it before changing its {what}")]
    Running { index: u32, what: &'static str },
    /// It was started before it was set up, or reaches out of the memory.
    #[error("queue {index} was started without rings that lie in the shared memory")]
    NotSetUp { index: u32 },
    /// Writing to a full pipe would block, and a file is always readable.
    #[error("the descriptor for queue {index} is {found}, not an eventfd")]
    NotAnEventFd { index: u32, found: String },
    /// What an earlier daemon left behind cannot be known.
    #[error("the chains in flight of queue {index} cannot be tracked")]
    Tracking {
        index: u32,
        #[source]
        source: TrackingError,
    },
    /// The worker could not do it.
    #[error("the worker of queue {index} failed")]
    Worker {
        index: u32,
        #[source]
        source: io::Error,
    },
    /// The front end took back what it shares.
    #[error("queue {index} cannot start in memory that is gone")]
    Lost { index: u32 },
    /// A worker did not take the memory.
    #[error("the guest's memory could not be changed")]
    Memory(#[source] io::Error),
}

/// What a front end took back while it was in use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    /// A file was cut.
    #[error("{what} of {len} bytes{} lies in a file that was cut to {file_len} bytes while it was in use", At(*.at))]
    Cut {
        what: &'static str,
        at: Option<u64>,
        len: u64,
        file_len: u64,
    },
    /// A file was cut and is whole again or gone, or its memory cannot be had.
    #[error("memory that it shares could not be accessed while it was in use")]
    Gone,
}

/// Where a region is, if that says something.
struct At(Option<u64>);

impl std::fmt::Display for At {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |at| write!(f, " at {at:#x}"))
    }
}

type Result<T> = std::result::Result<T, RingError>;

impl Rings {
    /// `count` stopped rings, to be served by `workers`.
    pub(crate) fn new(count: u16, workers: Workers) -> Self {
        Self {
            workers,
            memory: GuestMemoryAtomic::new(Memory::new()),
            log: None,
            rings: Vec::new(),
            count,
            all_enabled: false,
            is_paused: false,
            tracking: None,
            said: Arc::default(),
        }
    }

    /// The guest's memory as it is now.
    pub(crate) fn memory(&self) -> Arc<Memory> {
        self.memory.memory().clone().into_inner()
    }

    /// The threads that serve them.
    pub(crate) fn witnesses(&self) -> Witnesses {
        self.workers.witnesses()
    }

    /// Those that the front end set up or spoke of, in numbers.
    pub(crate) fn dump(&self) -> Vec<RingDump> {
        let known = |(_, ring): &(usize, &Ring)| ring.started || ring.addresses.is_some();
        let dump = |(queue, ring): (usize, &Ring)| {
            let state = ring.vring.get_ref();
            RingDump {
                queue,
                size: state.get_queue().size(),
                enabled: state.is_enabled(),
                started: ring.started,
                kicked: ring.kick.is_some(),
            }
        };
        let all = self.rings.iter().enumerate();
        all.filter(known).map(dump).collect()
    }

    /// What of the memory, the record of requests in flight and the dirty log lies behind the end of its file.
    pub(crate) fn cut(&self) -> Option<Lost> {
        let memory = self.memory();
        let shared = memory
            .iter()
            .map(|region| ("the memory region", Some(region.start_addr().0), region));
        let tracking = self.tracking.as_ref();
        let tracking = tracking.map(|tracking| ("the in-flight region", None, tracking.region()));
        let log = self.log.as_ref();
        let log = log.map(|log| ("the dirty log", None, log.region()));
        let mut all = shared.chain(tracking).chain(log);
        all.find_map(|(what, at, region)| {
            let (file_len, len) = (region.cut_at()?, region.len());
            Some(Lost::Cut {
                what,
                at,
                len,
                file_len,
            })
        })
    }

    /// Gives the workers something to serve.
    pub(crate) fn employ(&mut self, served: Served) {
        self.workers.employ(served);
    }

    /// Lets go of what is served, if no ring needs it any more; whether that was so.
    pub(crate) fn dismiss_if_idle(&mut self) -> bool {
        let idle = self.rings.iter().all(|ring| !ring.started);
        if idle {
            self.workers.dismiss();
        }
        idle
    }

    /// Lets go of what is served, and of all rings; what is in flight is answered before.
    pub(crate) fn dismiss(&mut self) {
        self.workers.dismiss();
        self.rings.clear();
    }

    /// Lets go of all, and of the workers; nothing is served any more.
    pub(crate) fn disband(&mut self) {
        self.dismiss();
        self.workers.disband();
    }

    /// Gives all workers new memory, and waits until they use it.
    pub(crate) fn set_memory(&mut self, memory: Memory, takeover: Takeover) -> Result<()> {
        let shared = Arc::new(memory);
        let guest = Guest {
            memory: Arc::clone(&shared),
            log: self.log.clone(),
        };
        self.workers
            .set_guest(&guest, takeover)
            .map_err(RingError::Memory)?;
        let memory = Memory::clone(&shared);
        self.memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(memory);
        Ok(())
    }

    /// Has all workers mark what they write, or not any more, and waits until they heed it (D2).
    pub(crate) fn set_log(&mut self, log: Option<Arc<DirtyLog>>) -> Result<()> {
        if self.log.is_none() && log.is_none() {
            return Ok(());
        }
        let guest = Guest {
            memory: self.memory(),
            log: log.clone(),
        };
        self.workers
            .set_guest(&guest, Takeover::WhenIdle)
            .map_err(RingError::Memory)?;
        self.log = log;
        Ok(())
    }

    /// What in-flight tracking may be asked for.
    pub(crate) fn tracking_limits(&self) -> Limits {
        Limits {
            queues: self.count,
            queue_size: MAX_QUEUE_SIZE,
        }
    }

    /// Where chains in flight are recorded, if they are.
    pub(crate) fn tracking(&self) -> Option<&Arc<Tracking>> {
        self.tracking.as_ref()
    }

    /// Has rings that start from now on record there what they have in flight, and go on with what is recorded.
    pub(crate) fn set_tracking(&mut self, tracking: Tracking) -> Result<()> {
        if let Some(index) = self.rings.iter().position(|ring| ring.started) {
            let (index, what) = (u32::try_from(index).unwrap_or(u32::MAX), "in-flight region");
            return Err(RingError::Running { index, what });
        }
        self.tracking = Some(Arc::new(tracking));
        Ok(())
    }

    /// Stops and forgets all rings; what they had in flight is answered.
    pub(crate) fn reset(&mut self) -> Result<()> {
        for index in 0..u32::try_from(self.rings.len()).unwrap_or(u32::MAX) {
            self.stop(index)?;
        }
        (self.tracking, self.all_enabled) = (None, false);
        self.rings.clear();
        self.set_log(None)
    }

    /// Stops a ring when everything it had in flight is answered; the index of the next chain it would have taken.
    pub(crate) fn stop(&mut self, index: u32) -> Result<u16> {
        if self.ring(index)?.started {
            self.tell(index, Command::Stop)?;
            tracing::debug!("queue {index} is stopped");
        }
        let ring = self.ring(index)?;
        (ring.started, ring.suspended) = (false, false);
        ring.vring.set_queue_ready(false);
        ring.kick = None;
        ring.vring.set_kick(None);
        ring.vring.set_call(None);
        Ok(ring.vring.queue_next_avail())
    }

    /// Stops all rings that run when what they had in flight is answered, and lets go of what is served.
    pub(crate) fn suspend(&mut self) -> Result<()> {
        for index in 0..u32::try_from(self.rings.len()).unwrap_or(u32::MAX) {
            if self.ring(index)?.started {
                self.tell(index, Command::Stop)?;
                let ring = self.ring(index)?;
                (ring.started, ring.suspended) = (false, true);
            }
        }
        self.workers.dismiss();
        Ok(())
    }

    /// Has the rings run again that were suspended.
    pub(crate) fn resume(&mut self, device: &Device) -> Result<()> {
        for index in 0..u32::try_from(self.rings.len()).unwrap_or(u32::MAX) {
            if !self.ring(index)?.suspended {
                continue;
            }
            let failed = |source| RingError::Worker { index, source };
            let kick = self.ring(index)?.kick.as_ref().map(File::try_clone);
            let kick = kick.transpose().map_err(failed)?;
            self.start(index, kick.map(OwnedFd::from), device)?;
        }
        Ok(())
    }

    /// Has all rings take no chains until [`Self::unpause`], also those that start meanwhile, and of other front ends; what was taken is
    /// answered when this returns.
    pub(crate) fn pause(&mut self) -> Result<()> {
        self.is_paused = true;
        let paused = self.tell_enabled(Command::Pause);
        if paused.is_err() {
            // The rest goes on as it was.
            let _ = self.unpause();
        }
        paused
    }

    /// Has those rings take chains that front ends want to.
    pub(crate) fn unpause(&mut self) -> Result<()> {
        self.is_paused = false;
        self.tell_enabled(Command::Resume)
    }

    /// Whether an operator wants no chains to be taken.
    pub(crate) const fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Tells the worker of each ring that would take chains, but for a pause. All are told, even if one cannot be.
    fn tell_enabled(&self, command: impl Fn(u16) -> Command) -> Result<()> {
        let runs = |ring: &Ring| ring.started && ring.vring.get_ref().is_enabled();
        let all = (0..).zip(&self.rings).filter(|(_, ring)| runs(ring));
        let told: Vec<_> = all.map(|(index, _)| self.tell(index, &command)).collect();
        told.into_iter().collect()
    }

    /// Has all rings take chains, or as soon as they start.
    pub(crate) fn enable_all(&mut self) -> Result<()> {
        self.all_enabled = true;
        (0..u32::try_from(self.rings.len()).unwrap_or(u32::MAX))
            .try_for_each(|index| self.set_enabled(index, true))
    }

    /// Has a ring take chains or not, now or as soon as it starts. Nothing is in flight on a disabled ring.
    pub(crate) fn set_enabled(&mut self, index: u32, enable: bool) -> Result<()> {
        let ring = self.ring(index)?;
        ring.vring.set_enabled(enable);
        match (ring.started, enable) {
            (false, _) => Ok(()),
            (true, true) if self.is_paused => Ok(()),
            (true, true) => self.tell(index, Command::Resume),
            (true, false) => self.tell(index, Command::Pause),
        }
    }

    /// Sets the number of entries.
    pub(crate) fn set_size(&mut self, index: u32, size: u32) -> Result<()> {
        let ring = self.stopped(index, "size")?;
        let valid = |size: &u16| *size <= MAX_QUEUE_SIZE && size.is_power_of_two();
        let small = u16::try_from(size).ok().filter(valid);
        ring.vring
            .set_queue_size(small.ok_or(RingError::Size { index, size })?);
        Ok(())
    }

    /// Sets where the ring is.
    pub(crate) fn set_addresses(&mut self, index: u32, addresses: Addresses) -> Result<()> {
        let memory = self.memory();
        let ring = self.ring(index)?;
        if ring.started && ring.addresses == Some(addresses) {
            // A front end that begins or ends a migration says again where running rings are.
            return Ok(());
        }
        let translate = |what, address| {
            let found = memory::from_front_end(&memory, address).map(|GuestAddress(at)| at);
            found.ok_or(RingError::Outside {
                index,
                what,
                address,
            })
        };
        let table = translate("descriptor table", addresses.table)?;
        let available = translate("available ring", addresses.available)?;
        let used = translate("used ring", addresses.used)?;
        let ring = self.stopped(index, "addresses")?;
        ring.vring
            .set_queue_info(table, available, used)
            .map_err(|_| RingError::Misaligned { index })?;
        ring.addresses = Some(addresses);
        Ok(())
    }

    /// Sets the index of the next chain to take.
    pub(crate) fn set_base(&mut self, index: u32, base: u32) -> Result<()> {
        let ring = self.stopped(index, "base")?;
        let base = u16::try_from(base).map_err(|_| RingError::Base { index, base })?;
        ring.vring.set_queue_next_avail(base);
        Ok(())
    }

    /// Starts a ring, or has a started one hear its kicks from here. Without a descriptor it is polled.
    pub(crate) fn set_kick(
        &mut self,
        index: u32,
        file: Option<File>,
        device: &Device,
    ) -> Result<()> {
        let failed = |source| RingError::Worker { index, source };
        let mut kick = None;
        if let Some(file) = &file {
            check_eventfd(index, file)?;
            kick = Some(file.try_clone().map_err(failed)?.into());
        }
        let ring = self.ring(index)?;
        ring.kick = file
            .as_ref()
            .map(File::try_clone)
            .transpose()
            .map_err(failed)?;
        ring.vring.set_kick(file);
        if ring.started {
            self.tell(index, |index| Command::Rekick(index, kick))
        } else {
            self.start(index, kick, device)
        }
    }

    /// Sets where the guest is called.
    pub(crate) fn set_call(&mut self, index: u32, file: Option<File>) -> Result<()> {
        file.as_ref()
            .map_or(Ok(()), |file| check_eventfd(index, file))?;
        let ring = self.ring(index)?;
        ring.vring.set_call(file);
        if ring.started {
            // Answers may have been given while the old descriptor was there; one call too many does no harm.
            queue::call_guest(&ring.vring.get_ref());
        }
        Ok(())
    }

    /// Sets where the front end hears of a broken ring.
    pub(crate) fn set_error(&mut self, index: u32, file: Option<File>) -> Result<()> {
        file.as_ref()
            .map_or(Ok(()), |file| check_eventfd(index, file))?;
        *lock(&self.ring(index)?.error_fd) = file;
        Ok(())
    }

    fn start(&mut self, index: u32, kick: Option<OwnedFd>, device: &Device) -> Result<()> {
        let memory = self.memory();
        let small = self.check(index)?;
        let (tracking, log) = (self.tracking.clone(), self.log.clone());
        let (said, is_paused) = (Arc::clone(&self.said), self.is_paused);
        let tracking = tracking.as_ref();
        let ring = self.ring(index)?;
        let ready = ring
            .make_ready(&memory, device.has_event_idx())
            .ok_or(RingError::NotSetUp { index })?;
        let mut knows_guest = ring.was_started;
        let failed = |source| RingError::Tracking { index, source };
        let mut setup = Setup {
            index: small,
            vring: ring.vring.clone(),
            error_fd: Arc::clone(&ring.error_fd),
            mode: if is_paused { Mode::Paused } else { ready.mode },
            tracker: None,
            left_behind: Vec::new(),
        };
        if let Some(tracking) = tracking
            && let Some((tracker, recovered)) =
                Tracker::recover(tracking, small, ready.size, ready.used).map_err(failed)?
        {
            tell_of_recovery(index, &recovered, &said);
            ring.vring.set_queue_next_avail(recovered.next_available);
            setup.tracker = Some(tracker);
            setup.left_behind = recovered.heads;
            knows_guest |= recovered.was_tracked;
        }
        if ready.used != 0 && !knows_guest && device.doubt_writeback() {
            tell_of_doubt(&said);
            if let Some(tracking) = tracking {
                let unknown = device.writeback_choice();
                tracking.set_writeback(unknown).map_err(failed)?;
            }
        }
        if ready.used != 0 {
            // An earlier daemon may have died between the used ring and the call; one too many does no harm.
            queue::call_guest(&ring.vring.get_ref());
        }
        // What was read of either may be zeros in its place.
        if memory::is_lost(&memory) || tracking.is_some_and(|tracking| tracking.region().is_lost())
        {
            return Err(RingError::Lost { index });
        }
        let failed = |source| RingError::Worker { index, source };
        let guest = Guest { memory, log };
        self.workers.start(setup, kick, guest).map_err(failed)?;
        let ring = self.ring(index)?;
        (ring.started, ring.was_started) = (true, true);
        ring.suspended = false;
        tracing::debug!("queue {index} is started, {:?}", ready.mode);
        Ok(())
    }

    fn tell(&self, index: u32, command: impl FnOnce(u16) -> Command) -> Result<()> {
        let small = self.check(index)?;
        let failed = |source| RingError::Worker { index, source };
        self.workers.tell(small, command(small)).map_err(failed)
    }

    fn check(&self, index: u32) -> Result<u16> {
        let count = self.count;
        match u16::try_from(index) {
            Ok(small) if small < count => Ok(small),
            Ok(_) | Err(_) => Err(RingError::NoSuchQueue { index, count }),
        }
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let small = usize::from(self.check(index)?);
        while self.rings.len() <= small {
            let vring = Vring::new(self.memory.clone(), MAX_QUEUE_SIZE).map_err(RingError::Make)?;
            vring.set_enabled(self.all_enabled);
            self.rings.push(Ring {
                vring,
                error_fd: ErrorFd::default(),
                addresses: None,
                kick: None,
                started: false,
                suspended: false,
                was_started: false,
            });
        }
        Ok(&mut self.rings[small])
    }

    /// A ring that may be changed.
    fn stopped(&mut self, index: u32, what: &'static str) -> Result<&mut Ring> {
        let ring = self.ring(index)?;
        if ring.started {
            Err(RingError::Running { index, what })
        } else {
            Ok(ring)
        }
    }
}

impl Ring {
    /// Checks the ring and readies it for a worker; `None` if it cannot begin.
    fn make_ready(&mut self, memory: &Memory, event_idx: bool) -> Option<Ready> {
        self.addresses?;
        let mut state = self.vring.get_mut();
        let enabled = state.is_enabled();
        let queue = state.get_queue_mut();
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            queue.set_ready(false);
            return None;
        }
        // The used index of a split ring is not part of SET_VRING_BASE; the ring itself knows it.
        let used = queue.used_idx(memory, Ordering::Acquire).ok()?;
        queue.set_next_used(used.0);
        queue.set_event_idx(event_idx);
        Some(Ready {
            mode: if enabled { Mode::Running } else { Mode::Paused },
            size: queue.size(),
            used: used.0,
        })
    }
}

/// A ring that can begin.
struct Ready {
    mode: Mode,
    size: u16,
    /// Its used index.
    used: u16,
}

fn tell_of_doubt(said: &Complaints) {
    said.warn(format_args!(
        "the guest used this disk before it came here, and its cache mode is not known: until it is set, every write is \
         made durable before it is answered"
    ));
}

fn tell_of_recovery(index: u32, recovered: &Recovered, said: &Complaints) {
    if recovered.was_stale {
        said.warn(format_args!(
            "queue {index}: the record of requests in flight is about another ring and is ignored"
        ));
    } else if !recovered.heads.is_empty() {
        said.info(format_args!(
            "queue {index}: {} requests were in flight and are started again",
            recovered.heads.len()
        ));
    }
}

fn check_eventfd(index: u32, file: &File) -> Result<()> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    match link {
        Ok(link)
            if !link
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"anon_inode:[eventfd") =>
        {
            let found = link.display().to_string();
            Err(RingError::NotAnEventFd { index, found })
        }
        // Without /proc there is no telling; the worker copes with what cannot be watched.
        Ok(_) | Err(_) => Ok(()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
