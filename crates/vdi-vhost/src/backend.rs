//! The control plane: what a front end's messages do. Runs on one thread; workers are told by acknowledged commands.
//!
//! Our own handler on the `vhost` crate rather than `vhost-user-backend`'s daemon, whose event loop neither drains a
//! queue nor reports its own failures; the ring state is that crate's.
//!
//! Everything a front end says is checked here. An error is answered (if an answer was asked for) and ends the connection:
//! a front end that breaks the protocol cannot be relied on for the rest.
//!
//! ```text
//!           SET_VRING_KICK             SET_VRING_ENABLE 1
//! stopped ────────────────► started ◄────────────────────► enabled: chains are taken
//!    ▲                         │       SET_VRING_ENABLE 0 (drains)
//!    └─────────────────────────┘
//!      GET_VRING_BASE (drains)
//! ```
//!
//! Source: vhost-user protocol ("Ring states", "Front-end message types").

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use vdi_core::Disk;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic};

use crate::device::Device;
use crate::memory::{self, Memory, MemoryError, Region};
use crate::queue::{ErrorFd, Mode, Vring};
use crate::worker::{Command, Setup, Takeover};
use crate::workers::Workers;

/// The largest ring: QEMU's limit too. Bounds what a queue can have in flight.
const MAX_QUEUE_SIZE: u16 = 1024;

/// The device as a front end controls it.
pub(crate) struct Backend {
    device: Arc<Device>,
    disk: Arc<Disk>,
    workers: Workers,
    memory: GuestMemoryAtomic<Memory>,
    rings: Vec<Ring>,
}

/// One ring's state on the control thread.
struct Ring {
    vring: Vring,
    error_fd: ErrorFd,
    /// As the front end gave them: descriptor table, available ring, used ring.
    addresses: Option<[u64; 3]>,
    started: bool,
}

/// What a front end did wrong. `vhost` sees it as an error of the handler.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    /// An index beyond what was offered.
    #[error("there is no queue {index}, only {count}")]
    NoSuchQueue { index: u32, count: usize },
    /// SET_VRING_NUM.
    #[error("queue {index} cannot have {size} entries, only a power of two up to {MAX_QUEUE_SIZE}")]
    QueueSize { index: u32, size: u32 },
    /// SET_VRING_BASE.
    #[error("queue {index} cannot begin at {base}, which is no 16-bit index")]
    Base { index: u32, base: u32 },
    /// A ring outside of the memory.
    #[error("the {what} of queue {index} at {address:#x} is not in the shared memory")]
    RingOutside {
        index: u32,
        what: &'static str,
        address: u64,
    },
    /// A ring that is not aligned.
    #[error("the rings of queue {index} are misaligned")]
    RingMisaligned { index: u32 },
    /// Only a stopped ring can be changed.
    #[error("queue {index} is running; stop it before changing its {what}")]
    Running { index: u32, what: &'static str },
    /// A kick before the addresses.
    #[error("queue {index} was started without valid rings")]
    NotSetUp { index: u32 },
    /// NOFD.
    #[error("queue {index} has no kick descriptor, and polling rings is not supported")]
    NoKick { index: u32 },
    /// Not an eventfd.
    #[error("the descriptor for queue {index} is {found}, not an eventfd")]
    NotAnEventFd { index: u32, found: String },
    /// A feature bit.
    #[error("features {features:#x} were accepted, but only {offered:#x} were offered")]
    Features { features: u64, offered: u64 },
    /// SET_CONFIG.
    #[error(
        "{len} bytes at {offset} of the configuration space cannot be written, only `writeback`"
    )]
    Config { offset: u32, len: usize },
    /// A message of a feature that was not offered.
    #[error("{what} was not offered")]
    NotOffered { what: &'static str },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::ReqHandlerError(io::Error::other(refusal))
    }
}

impl Backend {
    /// The control plane of a device whose queues are served by `workers`.
    pub(crate) fn new(
        device: Arc<Device>,
        disk: Arc<Disk>,
        workers: Workers,
    ) -> std::result::Result<Self, virtio_queue::Error> {
        let memory = GuestMemoryAtomic::new(Memory::new());
        let ring = |_| {
            Ok(Ring {
                vring: Vring::new(memory.clone(), MAX_QUEUE_SIZE)?,
                error_fd: ErrorFd::default(),
                addresses: None,
                started: false,
            })
        };
        let rings = (0..device.num_queues())
            .map(ring)
            .collect::<std::result::Result<_, _>>()?;
        Ok(Self {
            device,
            disk,
            workers,
            memory,
            rings,
        })
    }

    /// The front end is gone: answers what is in flight, then forgets it.
    pub(crate) fn end_session(&mut self) -> Result<()> {
        self.stop_all()?;
        self.set_memory(Memory::new(), Takeover::WhenIdle)?;
        self.device.forget_features();
        Ok(())
    }

    fn stop_all(&mut self) -> Result<()> {
        for index in 0..self.device.num_queues() {
            self.stop(index)?;
            let ring = &mut self.rings[usize::from(index)];
            ring.addresses = None;
            *lock(&ring.error_fd) = None;
            let mut state = ring.vring.get_mut();
            state.set_enabled(false);
            state.get_queue_mut().reset();
        }
        Ok(())
    }

    /// Stops a ring when everything it had in flight is answered.
    fn stop(&mut self, index: u16) -> Result<()> {
        let ring = &mut self.rings[usize::from(index)];
        if ring.started {
            self.workers
                .tell(index, Command::Stop(index))
                .map_err(Error::ReqHandlerError)?;
            ring.started = false;
            tracing::debug!("queue {index} is stopped");
        }
        ring.vring.set_queue_ready(false);
        ring.vring.set_kick(None);
        ring.vring.set_call(None);
        Ok(())
    }

    /// Starts a ring that has everything it needs.
    fn start(&mut self, index: u16, kick: OwnedFd) -> Result<()> {
        let memory = self.memory.memory().clone();
        let ring = &mut self.rings[usize::from(index)];
        let mode = {
            let mut state = ring.vring.get_mut();
            let enabled = state.is_enabled();
            let queue = state.get_queue_mut();
            queue.set_ready(true);
            if ring.addresses.is_none() || !queue.is_valid(&*memory) {
                queue.set_ready(false);
                return Err(Refusal::NotSetUp {
                    index: index.into(),
                }
                .into());
            }
            // The used index of a split ring is not part of SET_VRING_BASE; the ring itself knows it.
            let used = queue
                .used_idx(&*memory, std::sync::atomic::Ordering::Acquire)
                .map_err(|_| Refusal::NotSetUp {
                    index: index.into(),
                })?;
            queue.set_next_used(used.0);
            queue.set_event_idx(self.device.has_event_idx());
            if enabled { Mode::Running } else { Mode::Paused }
        };
        let (vring, error_fd) = (ring.vring.clone(), Arc::clone(&ring.error_fd));
        let setup = Setup {
            index,
            vring,
            kick,
            error_fd,
            mode,
        };
        self.workers
            .start(setup, memory.into_inner())
            .map_err(Error::ReqHandlerError)?;
        ring.started = true;
        tracing::debug!("queue {index} is started, {mode:?}");
        Ok(())
    }

    fn set_enabled(&mut self, index: u16, enable: bool) -> Result<()> {
        let ring = &self.rings[usize::from(index)];
        ring.vring.set_enabled(enable);
        if !ring.started {
            return Ok(());
        }
        let command = if enable {
            Command::Resume(index)
        } else {
            Command::Pause(index)
        };
        self.workers
            .tell(index, command)
            .map_err(Error::ReqHandlerError)
    }

    fn set_memory(&mut self, memory: Memory, takeover: Takeover) -> Result<()> {
        let shared = Arc::new(memory);
        self.workers
            .set_memory(&shared, takeover)
            .map_err(Error::ReqHandlerError)?;
        let memory = Memory::clone(&shared);
        self.memory
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(memory);
        Ok(())
    }

    fn check_index(&self, index: u32) -> std::result::Result<u16, Refusal> {
        let count = self.rings.len();
        match u16::try_from(index) {
            Ok(small) if usize::from(small) < count => Ok(small),
            _ => Err(Refusal::NoSuchQueue { index, count }),
        }
    }

    /// A ring that may be changed because it is stopped.
    fn stopped(
        &mut self,
        index: u32,
        what: &'static str,
    ) -> std::result::Result<&mut Ring, Refusal> {
        let small = self.check_index(index)?;
        let ring = &mut self.rings[usize::from(small)];
        if ring.started {
            Err(Refusal::Running { index, what })
        } else {
            Ok(ring)
        }
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Obsolete; back ends are told to ignore it.
    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all()?;
        self.device.forget_features();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.device.features();
        self.device
            .ack_features(features)
            .ok_or(Refusal::Features { features, offered })?;
        if self.device.rings_start_enabled() {
            for index in 0..self.device.num_queues() {
                self.set_enabled(index, true)?;
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let map = |(region, file)| Region::map(region, file).map(Arc::new);
        let mapped = regions.iter().zip(files).map(map);
        let mapped = mapped
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(Refusal::from)?;
        let memory = memory::from_regions(mapped).map_err(Refusal::from)?;
        self.set_memory(memory, Takeover::WhenIdle)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let ring = self.stopped(index, "size")?;
        let valid = |size: &u16| *size <= MAX_QUEUE_SIZE && size.is_power_of_two();
        let small = u16::try_from(size).ok().filter(valid);
        ring.vring
            .set_queue_size(small.ok_or(Refusal::QueueSize { index, size })?);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = [descriptor, available, used];
        let small = self.check_index(index)?;
        let ring = &mut self.rings[usize::from(small)];
        if ring.started && ring.addresses == Some(addresses) {
            return Ok(()); // A front end repeats itself to change flags.
        }
        let memory = self.memory.memory();
        let translate = |what, address| {
            let found = memory::from_front_end(&memory, address).map(|GuestAddress(at)| at);
            found.ok_or(Refusal::RingOutside {
                index,
                what,
                address,
            })
        };
        let descriptor = translate("descriptor table", descriptor)?;
        let available = translate("available ring", available)?;
        let used = translate("used ring", used)?;
        let ring = self.stopped(index, "addresses")?;
        ring.vring
            .set_queue_info(descriptor, available, used)
            .map_err(|_| Refusal::RingMisaligned { index })?;
        ring.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let ring = self.stopped(index, "base")?;
        let base = u16::try_from(base).map_err(|_| Refusal::Base { index, base })?;
        ring.vring.set_queue_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let small = self.check_index(index)?;
        self.stop(small)?;
        let base = self.rings[usize::from(small)].vring.queue_next_avail();
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let small = self.check_index(index.into())?;
        let file = file.ok_or(Refusal::NoKick {
            index: index.into(),
        })?;
        check_eventfd(index, &file)?;
        let kick = file.try_clone().map_err(Error::ReqHandlerError)?.into();
        let ring = &self.rings[usize::from(small)];
        ring.vring.set_kick(Some(file));
        if ring.started {
            let command = Command::Rekick(small, kick);
            return self
                .workers
                .tell(small, command)
                .map_err(Error::ReqHandlerError);
        }
        self.start(small, kick)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let small = self.check_index(index.into())?;
        if let Some(file) = &file {
            check_eventfd(index, file)?;
        }
        let ring = &self.rings[usize::from(small)];
        let mut_call = file.is_some() && ring.started;
        ring.vring.set_call(file);
        if mut_call {
            // Answers may have been given while the old descriptor was there; one call too many does no harm.
            let _ = ring.vring.signal_used_queue();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let small = self.check_index(index.into())?;
        if let Some(file) = &file {
            check_eventfd(index, file)?;
        }
        *lock(&self.rings[usize::from(small)].error_fd) = file;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(Device::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = Device::protocol_features().bits();
        if features & !offered != 0 {
            return Err(Refusal::Features { features, offered }.into());
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.device.num_queues()))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let index = self.check_index(index)?;
        self.set_enabled(index, enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.device.read_config(offset as usize, size as usize))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        let refusal = Refusal::Config {
            offset,
            len: bytes.len(),
        };
        let writeback = self
            .device
            .write_config(offset as usize, bytes)
            .ok_or(refusal)?;
        if !writeback && let Err(error) = self.disk.flush() {
            // Later writes fail on their own.
            tracing::error!(
                "cannot make earlier writes durable: {}",
                crate::chain_of(&error)
            );
        }
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(memory::MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let region = Region::map(region, file).map_err(Refusal::from)?;
        let memory = memory::with_region(&self.memory.memory(), region).map_err(Refusal::from)?;
        self.set_memory(memory, Takeover::Now)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory =
            memory::without_region(&self.memory.memory(), region).map_err(Refusal::from)?;
        self.set_memory(memory, Takeover::WhenIdle)
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Refusal::NotOffered { what: "a GPU" }.into())
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Refusal::NotOffered {
            what: "SHARED_OBJECT",
        }
        .into())
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Refusal::NotOffered {
            what: "INFLIGHT_SHMFD",
        }
        .into())
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        Err(Refusal::NotOffered {
            what: "INFLIGHT_SHMFD",
        }
        .into())
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Refusal::NotOffered {
            what: "DEVICE_STATE",
        }
        .into())
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Refusal::NotOffered {
            what: "DEVICE_STATE",
        }
        .into())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Refusal::NotOffered { what: "SHMEM" }.into())
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Refusal::NotOffered { what: "LOG_SHMFD" }.into())
    }
}

/// Refuses what is no eventfd: writing to a full pipe would block, and a file is always readable.
fn check_eventfd(index: u8, file: &File) -> std::result::Result<(), Refusal> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    match link {
        Ok(link)
            if !link
                .as_os_str()
                .as_encoded_bytes()
                .starts_with(b"anon_inode:[eventfd") =>
        {
            let found = link.display().to_string();
            Err(Refusal::NotAnEventFd {
                index: index.into(),
                found,
            })
        }
        // Without /proc there is no telling; the worker copes with what cannot be watched.
        Ok(_) | Err(_) => Ok(()),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
