//! Doors for fuzzers: the daemon's parts without its process, so that a fuzzer sees all that its bytes bring about.
//!
//! ```text
//! Bench   guest memory, one ring ─► worker, turn by turn on the caller's thread
//! Daemon  a connected socket ─► session ─► backend ─► workers
//! ```
//!
//! Not an interface for anyone else: nothing here is stable, and nothing is done that the daemon does not do. Whoever holds
//! a [`Bench`] takes the part of the control thread and of the housekeeper.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, Once};
use std::task::{Wake, Waker};

use clap::Parser;
use vdi_core::{Access, Disk, HostFile, ModifiedParent, OpenError, Storage, WriteError};
use vhost::vhost_user::message::{VhostUserLog, VhostUserMemoryRegion};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::args::Args;
use crate::backend::Backend;
use crate::berth::{Berth, Door};
use crate::command::{Ack, Command, Doorbell, Order, SeatNumber, Setup, Takeover};
use crate::complaints::{About, Complaints};
use crate::config::DiskOptions;
use crate::crew::{Crew, Staffing};
use crate::device::{DetectZeroes, Device, Discard, Serial, Zeros};
use crate::dirty::{DirtyLog, Guest};
use crate::engine::EngineChoice;
use crate::fault::{self, Account};
use crate::fleet::make_device;
use crate::housekeeper::Housekeepers;
use crate::image_file::ImageFile;
use crate::limits::Group;
use crate::memory::{self, Memory, Region};
use crate::queue::{ErrorFd, Mode, Vring};
use crate::ring::owned;
use crate::sandbox::Sandbox;
use crate::session;
use crate::turn::{Opening, Turn};
use crate::worker::Worker;
use crate::workers::{Served, Workers};

/// The queue of a [`Bench`].
const QUEUE: u16 = 0;

/// Its disk's seat.
const SEAT: SeatNumber = 0;

/// The largest ring.
const MAX_QUEUE_SIZE: u16 = 1024;

/// What a process does once: has all log lines made and shown to nobody, and catches faults, for which a descriptor stays open.
pub fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        fault::catch().expect("a signal is caught");
        crate::ring::calls::prepare();
        let lines = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG);
        // Whoever listens already hears them.
        let _ = lines.with_writer(io::sink).try_init();
    });
}

/// Guest memory, all of it from one file.
#[derive(Debug)]
pub struct GuestMemory<'a> {
    /// The file.
    pub file: &'a File,
    /// Guest address, length and position in the file of each region.
    pub regions: &'a [[u64; 3]],
    /// Where writes are marked, and how many bytes that has.
    pub log: Option<(File, u64)>,
}

/// Where a ring is, in guest addresses.
#[derive(Debug, Clone, Copy)]
pub struct RingPlace {
    /// Descriptors.
    pub size: u16,
    /// The descriptor table.
    pub table: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    /// Index of the next available and used element.
    pub index: u16,
}

/// What the device is.
#[derive(Debug, Clone, Copy)]
pub struct Wishes {
    /// The features that the driver accepted.
    pub features: u64,
    /// Whether the disk can be written.
    pub access: Access,
    /// Whether guests may give space back.
    pub discards: bool,
    /// Whether written zeros are looked for: 0 no, 1 and they keep their space, otherwise they give it back.
    pub detects_zeros: u8,
}

/// A worker with one queue, which does nothing unless it is told to.
pub struct Bench {
    worker: Worker,
    doorbell: Arc<Doorbell>,
    orders: Sender<Order>,
    disk: Arc<Disk>,
    device: Arc<Device>,
    guest: Guest,
    vring: Vring,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    error_fd: ErrorFd,
}

/// A housekeeper that comes anyway.
pub(crate) struct NoBell;

impl Wake for NoBell {
    fn wake(self: Arc<Self>) {}
}

impl Bench {
    /// A worker for the images of these files, the top one's first. Its queue does not run yet.
    ///
    /// # Errors
    /// If the images cannot be opened.
    ///
    /// # Panics
    /// If the host is short of something, or the memory is impossible.
    pub fn new(
        images: &[Arc<HostFile>],
        guest: &GuestMemory<'_>,
        wishes: &Wishes,
    ) -> Result<Self, OpenError> {
        prepare();
        let storage = |file: &Arc<HostFile>| Arc::clone(file) as Arc<dyn Storage>;
        let storages = images.iter().map(storage).collect();
        let disk = Disk::open_chain(storages, wishes.access, ModifiedParent::Allow)?;
        let (disk, doorbell) = (Arc::new(disk), Arc::new(Doorbell::new().expect("eventfds")));
        disk.set_housekeeper(Waker::from(Arc::new(NoBell)));
        let data = |file: &Arc<HostFile>| file.file().try_clone().map(ImageFile::buffered);
        let data: io::Result<Vec<_>> = images.iter().map(data).collect();
        let device = Arc::new(device(&disk, wishes));
        device.ack_features(wishes.features & device.features());
        let served = Served {
            disk: Arc::clone(&disk),
            images: data.expect("descriptors are left").into(),
            device: Arc::clone(&device),
            complaints: Arc::new(Complaints::default()),
            stats: Arc::default(),
            throttle: Arc::default(),
        };
        let (orders, inbox) = mpsc::channel();
        let worker = Worker::new(EngineChoice::Sync, Arc::clone(&doorbell), inbox, None);
        let guest = map(guest);
        let shared = GuestMemoryAtomic::new(Memory::clone(&guest.memory));
        let [kick, call, error] = std::array::from_fn(|_| eventfd());
        let vring = Vring::new(shared, MAX_QUEUE_SIZE).expect("it is a power of two");
        vring.set_call(Some(copy(&call)));
        let mut bench = Self {
            worker: worker.expect("an epoll"),
            doorbell,
            orders,
            disk,
            device,
            guest,
            vring,
            kick,
            call,
            error_fd: Arc::new(Mutex::new(Some(copy(&error)))),
            error,
        };
        let sync_file = served.images[0].file_for_syncs();
        bench.obeyed(Command::Sit(Box::new(served), sync_file), 1);
        Ok(bench)
    }

    /// Starts the queue; false if there can be no such ring.
    pub fn start(&mut self, ring: &RingPlace) -> bool {
        self.vring.set_queue_size(ring.size);
        let placed = self
            .vring
            .set_queue_info(ring.table, ring.available, ring.used);
        {
            let mut state = self.vring.get_mut();
            let queue = state.get_queue_mut();
            queue.set_ready(true);
            if placed.is_err() || !queue.is_valid(&*self.guest.memory) {
                return false;
            }
            queue.set_next_avail(ring.index);
            queue.set_next_used(ring.index);
            queue.set_event_idx(self.device.has_event_idx());
        }
        let setup = Setup {
            index: QUEUE,
            vring: self.vring.clone(),
            error_fd: Arc::clone(&self.error_fd),
            mode: Mode::Running,
            tracker: None,
            left_behind: Vec::new(),
        };
        let kick = copy(&self.kick).into();
        let start = Command::Start(Box::new(setup), Some(kick), self.guest.clone());
        self.obeyed(start, 1);
        true
    }

    /// One turn of the worker, and all chores that are due then.
    pub fn turn(&mut self) {
        // So that the turn does not wait.
        self.doorbell.ring();
        assert!(self.worker.turn(), "nobody told it to exit");
        while matches!(self.disk.do_chores(), Ok(true)) {}
    }

    /// Says that there are chains.
    pub fn kick(&self) {
        self.kick.write(1).expect("it is far from full");
    }

    /// Whether the guest was called since this was last asked.
    #[must_use]
    pub fn has_called(&self) -> bool {
        self.call.read().is_ok()
    }

    /// The available index up to which chains were taken.
    #[must_use]
    pub fn taken(&self) -> u16 {
        self.vring.queue_next_avail()
    }

    /// Whether the worker gave the ring up since this was last asked.
    #[must_use]
    pub fn has_broken(&self) -> bool {
        self.error.read().is_ok()
    }

    /// Has all that was taken answered; false if that takes more turns.
    pub fn settles(&mut self, turns: usize) -> bool {
        self.obeyed(Command::Pause(QUEUE), turns) && self.obeyed(Command::Resume(QUEUE), 1)
    }

    /// Gives the worker the same memory once more; false if that takes more turns.
    pub fn takes_memory(&mut self, turns: usize) -> bool {
        let same = Command::Guest(self.guest.clone(), Takeover::WhenIdle);
        self.obeyed(same, turns)
    }

    /// Stops the queue; false if that takes more turns.
    pub fn stops(&mut self, turns: usize) -> bool {
        let stopped = self.obeyed(Command::Stop(QUEUE), turns);
        self.vring.set_queue_ready(false);
        stopped
    }

    /// The driver's choice of `writeback`.
    pub fn set_writeback(&self, on: bool) {
        let _ = self.device.write_config(32, &[u8::from(on)]);
    }

    /// Ends the worker and closes the image, or forgets it as a kill would.
    ///
    /// # Errors
    /// If it cannot be closed clean.
    pub fn end(self, close: bool) -> Result<(), WriteError> {
        let Self { worker, disk, .. } = self;
        drop(worker);
        if close { disk.close() } else { Ok(()) }
    }

    fn obeyed(&mut self, command: Command, turns: usize) -> bool {
        let (ack, acknowledged): (Ack, Receiver<_>) = mpsc::channel();
        let order = Order {
            seat: SEAT,
            command,
            ack,
        };
        assert!(self.orders.send(order).is_ok(), "the worker is here");
        (0..turns).any(|_| {
            self.turn();
            match acknowledged.try_recv() {
                Ok(done) => {
                    done.expect("the host has what a worker needs");
                    true
                }
                Err(_) => false,
            }
        })
    }
}

pub(crate) fn eventfd() -> EventFd {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).expect("descriptors are left")
}

pub(crate) fn copy(eventfd: &EventFd) -> File {
    File::from(owned(eventfd.try_clone().expect("descriptors are left")))
}

pub(crate) fn device(disk: &Disk, wishes: &Wishes) -> Device {
    let zeros = Zeros {
        discard: if wishes.discards {
            Discard::Unmap
        } else {
            Discard::Ignore
        },
        detect: match wishes.detects_zeros {
            0 => DetectZeroes::Off,
            1 => DetectZeroes::On,
            _ => DetectZeroes::Unmap,
        },
        block_sectors: disk.header().block_size().bytes() / 512,
    };
    let serial = Serial::new("fuzzed").expect("it is short");
    Device::new(disk.capacity(), wishes.access, 1, serial, zeros)
}

pub(crate) fn map(guest: &GuestMemory<'_>) -> Guest {
    let account = Account::default();
    let copy = || guest.file.try_clone().expect("descriptors are left");
    let region = |&[at, len, offset]: &[u64; 3]| {
        let message = VhostUserMemoryRegion::new(at, len, at, offset);
        Arc::new(Region::map(&message, copy(), &account).expect("the region is possible"))
    };
    let regions = guest.regions.iter().map(region).collect();
    let log = guest.log.as_ref().map(|(file, len)| {
        let file = file.try_clone().expect("descriptors are left");
        let log = DirtyLog::map(&VhostUserLog::new(*len, 0), file, &account);
        Arc::new(log.expect("the log is possible"))
    });
    Guest {
        memory: Arc::new(memory::from_regions(regions).expect("the regions are apart")),
        log,
    }
}

/// A daemon that serves one connection after the other, each on the caller's thread.
pub struct Daemon {
    berth: Berth,
}

impl Daemon {
    /// A daemon for this image with four queues, served by one thread with system calls.
    ///
    /// # Panics
    /// If the image cannot be served.
    #[must_use]
    pub fn new(image: &Path) -> Self {
        prepare();
        let words =
            "vdi-vhost --socket-path none --num-queues 4 --engine sync --sandbox off --blk-file";
        let words = words.split(' ').map(Into::into).chain([image.into()]);
        let args = Args::try_parse_from::<_, std::ffi::OsString>(words).expect("they are right");
        let options = DiskOptions::of(&args).expect("there is an image");
        let mut turn = Turn::waiting(Opening::new(options.clone(), Arc::default()));
        let opened = turn.begin().expect("it is an image");
        let device = make_device(&options, &opened.disk, opened.disk.access());
        let sandbox = Sandbox::off();
        let one = Staffing {
            count: 1,
            cpus: None,
        };
        let crew = Crew::start(one, args.engine, &sandbox);
        let workers = Workers::new(&crew.expect("threads are left"));
        let housekeepers = Housekeepers::start(&sandbox).expect("threads are left");
        let about = About::default();
        let mut backend = Backend::new(Arc::new(device), turn, workers, housekeepers, &about);
        backend.serve(opened);
        let door = Door::Connected(Mutex::default());
        let berth = Berth::new(options.name, &about, door, backend);
        Self {
            berth: berth.expect("descriptors are left"),
        }
    }

    /// What the disk did, as JSON.
    ///
    /// # Panics
    /// Never: the numbers can be written.
    #[must_use]
    pub fn stats(&self) -> String {
        let backend = self.berth.lock();
        serde_json::to_string(&backend.stats().snapshot()).expect("numbers can be written")
    }

    /// Limits the disk, and the group that it is alone in; both as JSON.
    ///
    /// # Panics
    /// If these are no limits.
    pub fn limit(&self, own: &str, group: &str) {
        let limits = |json| serde_json::from_str(json).expect("limits");
        let group = Group::new("of one disk".to_owned(), &limits(group));
        let throttle = self.berth.throttle();
        throttle.set_group(Some(Arc::new(group)));
        throttle.set_limits(&limits(own));
    }

    /// Serves a front end until it goes away.
    ///
    /// # Panics
    /// If the daemon would end.
    pub fn converse(&self, stream: UnixStream) {
        session::converse(stream, &self.berth).expect("a front end ends no daemon");
    }

    /// Ends it.
    ///
    /// # Errors
    /// If the image cannot be closed clean.
    pub fn close(self) -> Result<(), WriteError> {
        Arc::new(self.berth).close()
    }
}
