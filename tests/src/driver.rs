//! A vhost-user-blk driver that lives outside the daemon, with any number of queues and any descriptor layout.
//!
//! Not a test: it has no opinion on what the device should answer, but it panics when a rule of the transport is
//! broken (an answer twice, an answer without a call) and never waits longer than [`PATIENCE`].
//!
//! Sources: virtio 1.2 sections 2.7 and 5.2; QEMU `docs/interop/vhost-user.rst`.

mod chain;
mod config;
mod control;
mod inflight;
mod layout;
mod memory;
mod queue;
pub mod raw;
mod request;
mod ring;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures;

pub use config::{Config, feature};
pub use control::{Control, ControlError, Wanted, ring_addresses};
pub use inflight::{Inflight, InflightQueue};
pub use layout::{Cut, Indirect, Layout};
pub use memory::{Buffer, Memory, Region};
pub use queue::{Attachment, Calls, Fate, PATIENCE, Queue, Token};
pub use request::{Answer, Request, Segment, UNTOUCHED};
pub use ring::{Descriptor, INDIRECT, NEXT, Ring, Used, WRITE};

const MIB: u64 = 1 << 20;

/// What a driver wants of a device.
#[derive(Debug, Clone)]
pub struct Options {
    /// Features to accept if they are offered.
    pub wanted: Wanted,
    /// Number of queues to start.
    pub queues: usize,
    /// Descriptors in each queue.
    pub queue_size: u16,
    /// Guest memory.
    pub memory: Vec<Region>,
}

impl Options {
    /// One queue of 128, 256 MiB in one region, and what [`feature::USUAL`] says.
    #[must_use]
    pub fn new() -> Self {
        Self {
            wanted: Wanted {
                features: feature::USUAL,
                protocol: VhostUserProtocolFeatures::MQ
                    | VhostUserProtocolFeatures::CONFIG
                    | VhostUserProtocolFeatures::REPLY_ACK
                    | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
            },
            queues: 1,
            queue_size: 128,
            memory: vec![Region::new(0, 256 * MIB)],
        }
    }

    /// The same with another number of queues.
    #[must_use]
    pub fn queues(mut self, queues: usize) -> Self {
        self.queues = queues;
        self
    }

    /// The same with another number of descriptors.
    #[must_use]
    pub fn queue_size(mut self, size: u16) -> Self {
        self.queue_size = size;
        self
    }

    /// The same with features not accepted.
    #[must_use]
    pub fn without(mut self, features: u64) -> Self {
        self.wanted.features &= !features;
        self
    }

    /// The same with protocol features not accepted.
    #[must_use]
    pub fn without_protocol(mut self, features: VhostUserProtocolFeatures) -> Self {
        self.wanted.protocol &= !features;
        self
    }

    /// The same with requests in flight tracked.
    #[must_use]
    pub fn tracked(mut self) -> Self {
        self.wanted.protocol |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        self
    }

    /// The same with other memory.
    #[must_use]
    pub fn memory(mut self, regions: Vec<Region>) -> Self {
        self.memory = regions;
        self
    }
}

impl Default for Options {
    fn default() -> Self {
        Self::new()
    }
}

/// A driver whose rings run. Its parts are public, so that queues can be used by several threads.
pub struct Driver {
    /// The connection.
    pub control: Control,
    /// The queues, each started and enabled.
    pub queues: Vec<Queue>,
    /// What driver and device share.
    pub memory: Arc<Memory>,
    /// Where requests in flight are tracked, if they are.
    pub inflight: Option<Inflight>,
}

/// What a front end keeps while its back end is gone, to begin again with the next one.
pub struct Kept {
    wanted: Wanted,
    memory: Arc<Memory>,
    queues: Vec<Attachment>,
    inflight: Option<Inflight>,
}

/// Where a front end lets rings begin after a reconnect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// At the used index, as QEMU does; the region of requests in flight goes before the memory table.
    Used,
    /// At the available index, as Cloud Hypervisor does; the region comes after the memory table.
    Available,
}

impl Kept {
    /// Begins again with whoever listens there now. The driver may have gone on submitting.
    ///
    /// # Errors
    /// If there is no connection in time, or the back end refuses a message.
    pub fn reconnect(&self, path: &Path, base: Base) -> Result<Control, ControlError> {
        let control = Control::connect(path, self.wanted)?;
        self.attach(control, base)
    }

    /// Begins again on a socket that is connected.
    ///
    /// # Errors
    /// If the back end refuses a message.
    pub fn reconnect_on(&self, socket: UnixStream, base: Base) -> Result<Control, ControlError> {
        let control = Control::negotiate(socket, self.wanted)?;
        self.attach(control, base)
    }

    fn attach(&self, mut control: Control, base: Base) -> Result<Control, ControlError> {
        if base == Base::Used {
            self.set_inflight(&mut control)?;
        }
        control.set_memory(&self.memory.messages())?;
        if base == Base::Available {
            self.set_inflight(&mut control)?;
        }
        for queue in &self.queues {
            let index = match base {
                Base::Used => queue.used_index(),
                Base::Available => queue.available_index(),
            };
            control.attach(queue, index)?;
        }
        Ok(control)
    }

    /// The region of requests in flight, to write anything into it.
    pub fn inflight_mut(&mut self) -> Option<&mut Inflight> {
        self.inflight.as_mut()
    }

    fn set_inflight(&self, control: &mut Control) -> Result<(), ControlError> {
        self.inflight
            .iter()
            .try_for_each(|region| control.set_inflight(region))
    }
}

impl Driver {
    /// Connects, negotiates and starts the queues.
    ///
    /// # Errors
    /// If there is no connection in time, or the back end refuses a message.
    pub fn connect(path: &Path, options: &Options) -> Result<Self, ControlError> {
        let control = Control::connect(path, options.wanted)?;
        Self::start(control, options)
    }

    /// Negotiates on a connected socket and starts the queues.
    ///
    /// # Errors
    /// If the back end refuses a message.
    pub fn on_socket(socket: UnixStream, options: &Options) -> Result<Self, ControlError> {
        let control = Control::negotiate(socket, options.wanted)?;
        Self::start(control, options)
    }

    fn start(mut control: Control, options: &Options) -> Result<Self, ControlError> {
        let memory = Memory::new(&options.memory);
        let mut inflight = None;
        if control.has(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            let queues = u16::try_from(options.queues).expect("there are few queues");
            let region = control.get_inflight(queues, options.queue_size)?;
            control.set_inflight(&region)?;
            inflight = Some(region);
        }
        control.set_memory(&memory.messages())?;
        let event_index = control.features() & feature::EVENT_IDX != 0;
        let queues: Vec<Queue> = (0..options.queues)
            .map(|index| Queue::new(index, &memory, options.queue_size, event_index))
            .collect();
        for queue in &queues {
            control.start(queue, 0)?;
        }
        Ok(Self {
            control,
            queues,
            memory,
            inflight,
        })
    }

    /// What is needed to begin again with another back end while the queues are used.
    #[must_use]
    pub fn keep(&self, options: &Options) -> Kept {
        Kept {
            wanted: options.wanted,
            memory: Arc::clone(&self.memory),
            queues: self.queues.iter().map(Queue::attachment).collect(),
            inflight: self.inflight.as_ref().map(Inflight::duplicate),
        }
    }

    /// The first queue.
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queues[0]
    }

    /// Reads on the first queue, which must succeed.
    pub fn read(&mut self, sector: u64, len_bytes: u32) -> Vec<u8> {
        self.queue().read(sector, len_bytes)
    }

    /// Writes on the first queue, which must succeed.
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        self.queue().write(sector, data);
    }

    /// Flushes on the first queue, which must succeed.
    pub fn flush(&mut self) {
        self.queue().flush();
    }

    /// The config space as fields.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn config(&mut self) -> Result<Config, ControlError> {
        let bytes = self.control.config_bytes(0, Config::LEN_BYTES)?;
        Ok(Config::from_bytes(&bytes))
    }

    /// Switches the cache mode.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn set_writeback(&mut self, on: bool) -> Result<(), ControlError> {
        self.control
            .set_config_bytes(Config::WRITEBACK_AT, &[u8::from(on)])
    }

    /// Vanishes: the socket is closed whatever is in flight.
    ///
    /// Returns what must stay alive as long as the device may still write into it.
    #[must_use]
    pub fn vanish(self) -> Arc<Memory> {
        self.memory
    }
}
