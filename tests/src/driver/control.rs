//! The connection to the back end: `vhost`'s front end, with a time limit on every message.
//!
//! Not the road for illegal messages, which `vhost` refuses to send: see `raw.rs`.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use thiserror::Error;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};

use super::inflight::Inflight;
use super::queue::{Attachment, PATIENCE, Queue};

/// Why the back end did not do what a message asked for.
#[derive(Debug, Error)]
pub enum ControlError {
    /// No connection.
    #[error("there is no connection to {path}")]
    Connect {
        /// The socket.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No answer; the connection is closed.
    #[error("{message} was not answered within {PATIENCE:?}")]
    TimedOut {
        /// Which message.
        message: &'static str,
    },
    /// An answer that says no, or the end of the connection.
    #[error("{message} failed: {source}")]
    Refused {
        /// Which message.
        message: &'static str,
        /// What `vhost` makes of it.
        #[source]
        source: vhost::Error,
    },
}

/// What a front end negotiates.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    /// Virtio features, of which those that are offered are accepted.
    pub features: u64,
    /// Protocol features, of which those that are offered are accepted.
    pub protocol: VhostUserProtocolFeatures,
}

/// A connection and what was negotiated on it.
pub struct Control {
    front_end: Frontend,
    socket: UnixStream,
    offered: u64,
    features: u64,
    offered_protocol: VhostUserProtocolFeatures,
    protocol: VhostUserProtocolFeatures,
    queues_offered: u64,
}

impl Control {
    /// Connects, retrying while nobody listens, and negotiates.
    ///
    /// # Errors
    /// If there is no connection in time, or the back end refuses a message.
    pub fn connect(path: &Path, wanted: Wanted) -> Result<Self, ControlError> {
        let socket = connect_patiently(path)?;
        Self::negotiate(socket, wanted)
    }

    /// Negotiates on a socket that is connected.
    ///
    /// # Errors
    /// If the back end refuses a message.
    pub fn negotiate(socket: UnixStream, wanted: Wanted) -> Result<Self, ControlError> {
        let own = socket.try_clone().expect("a socket can be duplicated");
        let mut control = Self {
            front_end: Frontend::from_stream(own, 256),
            socket,
            offered: 0,
            features: 0,
            offered_protocol: VhostUserProtocolFeatures::empty(),
            protocol: VhostUserProtocolFeatures::empty(),
            queues_offered: 1,
        };
        control.within("SET_OWNER", |f| f.set_owner())?;
        control.offered = control.within("GET_FEATURES", |f| f.get_features())?;
        control.features = control.offered & wanted.features;
        if control.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            control.negotiate_protocol(wanted.protocol)?;
        }
        let features = control.features;
        control.within("SET_FEATURES", |f| f.set_features(features))?;
        Ok(control)
    }

    fn negotiate_protocol(
        &mut self,
        wanted: VhostUserProtocolFeatures,
    ) -> Result<(), ControlError> {
        self.offered_protocol =
            self.within("GET_PROTOCOL_FEATURES", Frontend::get_protocol_features)?;
        let protocol = self.offered_protocol & wanted;
        self.within("SET_PROTOCOL_FEATURES", |f| {
            f.set_protocol_features(protocol)
        })?;
        self.protocol = protocol;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.front_end
                .set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            self.queues_offered = self.within("GET_QUEUE_NUM", Frontend::get_queue_num)?;
        }
        Ok(())
    }

    /// Virtio features that the back end offers.
    #[must_use]
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Virtio features that were accepted.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Protocol features that the back end offers.
    #[must_use]
    pub fn offered_protocol(&self) -> VhostUserProtocolFeatures {
        self.offered_protocol
    }

    /// Number of queues that the back end has, 1 without MQ.
    #[must_use]
    pub fn queues_offered(&self) -> u64 {
        self.queues_offered
    }

    /// The socket, to vanish or to send garbage.
    #[must_use]
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Sends one message by `vhost`'s front end and waits for its answer.
    ///
    /// # Errors
    /// If the back end refuses, or does not answer in time; then the connection is closed.
    pub fn within<T>(
        &mut self,
        message: &'static str,
        send: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T, ControlError> {
        let (done, waiting) = channel::<()>();
        let socket = &self.socket;
        let front_end = &mut self.front_end;
        std::thread::scope(|scope| {
            let watchdog = scope.spawn(move || {
                let late = waiting.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout);
                if late {
                    let _gone = socket.shutdown(Shutdown::Both);
                }
                late
            });
            let result = send(front_end);
            drop(done);
            match (watchdog.join().expect("it does not panic"), result) {
                (_, Ok(value)) => Ok(value),
                (true, Err(_)) => Err(ControlError::TimedOut { message }),
                (false, Err(source)) => Err(ControlError::Refused { message, source }),
            }
        })
    }

    /// Reads the config space.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn config_bytes(&mut self, offset: u32, len_bytes: u32) -> Result<Vec<u8>, ControlError> {
        let none = vec![0; len_bytes as usize];
        self.within("GET_CONFIG", |f| {
            f.get_config(offset, len_bytes, VhostUserConfigFlags::empty(), &none)
        })
        .map(|(_, bytes)| bytes)
    }

    /// Writes the config space.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn set_config_bytes(&mut self, offset: u32, bytes: &[u8]) -> Result<(), ControlError> {
        self.within("SET_CONFIG", |f| {
            f.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
        })
    }

    /// Replaces the memory table.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn set_memory(
        &mut self,
        regions: &[VhostUserMemoryRegionInfo],
    ) -> Result<(), ControlError> {
        self.within("SET_MEM_TABLE", |f| f.set_mem_table(regions))
            .map(|_| ())
    }

    /// Adds a region to the memory table.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn add_region(&mut self, region: &VhostUserMemoryRegionInfo) -> Result<(), ControlError> {
        self.within("ADD_MEM_REG", |f| f.add_mem_region(region))
            .map(|_| ())
    }

    /// Removes a region from the memory table.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn remove_region(
        &mut self,
        region: &VhostUserMemoryRegionInfo,
    ) -> Result<(), ControlError> {
        self.within("REM_MEM_REG", |f| f.remove_mem_region(region))
    }

    /// Gives the back end a ring and lets it begin at `base`.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn start(&mut self, queue: &Queue, base: u16) -> Result<(), ControlError> {
        self.attach(&queue.attachment(), base)
    }

    /// The same for a ring that somebody else uses meanwhile.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn attach(&mut self, ring: &Attachment, base: u16) -> Result<(), ControlError> {
        self.attach_disabled(ring, base)?;
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            self.enable(ring.index, true)?;
        }
        Ok(())
    }

    /// The same, but the ring is not enabled.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn attach_disabled(&mut self, ring: &Attachment, base: u16) -> Result<(), ControlError> {
        let index = ring.index;
        let size = ring.addresses.queue_size;
        self.within("SET_VRING_NUM", |f| f.set_vring_num(index, size))?;
        self.within("SET_VRING_ADDR", |f| {
            f.set_vring_addr(index, &ring.addresses)
        })?;
        self.within("SET_VRING_BASE", |f| f.set_vring_base(index, base))?;
        self.within("SET_VRING_ERR", |f| f.set_vring_err(index, &ring.error))?;
        self.within("SET_VRING_CALL", |f| f.set_vring_call(index, &ring.call))?;
        self.within("SET_VRING_KICK", |f| f.set_vring_kick(index, &ring.kick))
    }

    /// Whether a protocol feature was negotiated.
    #[must_use]
    pub fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol.contains(feature)
    }

    /// Has the back end mark what it writes in `log` once LOG_ALL is accepted.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn set_log(&mut self, log: &File, len_bytes: u64) -> Result<(), ControlError> {
        let region = VhostUserDirtyLogRegion {
            mmap_size: len_bytes,
            mmap_offset: 0,
            mmap_handle: log.as_raw_fd(),
        };
        self.within("SET_LOG_BASE", |f| f.set_log_base(0, Some(region)))
    }

    /// Opens the channel on which the back end tells of changes.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn open_channel(&mut self) -> Result<UnixStream, ControlError> {
        let (ours, theirs) = UnixStream::pair().expect("sockets can be made");
        self.within("SET_BACKEND_REQ_FD", |f| f.set_backend_request_fd(&theirs))?;
        Ok(ours)
    }

    /// Accepts other features than before, as a front end does that begins or ends a migration.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn accept(&mut self, features: u64) -> Result<(), ControlError> {
        self.features = features;
        self.within("SET_FEATURES", |f| f.set_features(features))
    }

    /// Says again where a ring is.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn set_addresses(&mut self, ring: &Attachment) -> Result<(), ControlError> {
        self.within("SET_VRING_ADDR", |f| {
            f.set_vring_addr(ring.index, &ring.addresses)
        })
    }

    /// Asks for a region in which requests in flight are tracked.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn get_inflight(&mut self, queues: u16, queue_size: u16) -> Result<Inflight, ControlError> {
        let wanted = VhostUserInflight::new(0, 0, queues, queue_size);
        let (message, file) = self.within("GET_INFLIGHT_FD", |f| f.get_inflight_fd(&wanted))?;
        Ok(Inflight { message, file })
    }

    /// Has the back end track requests in flight there.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn set_inflight(&mut self, region: &Inflight) -> Result<(), ControlError> {
        let fd = region.file.as_raw_fd();
        self.within("SET_INFLIGHT_FD", |f| {
            f.set_inflight_fd(&region.message, fd)
        })
    }

    /// Enables or disables a ring.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn enable(&mut self, index: usize, enabled: bool) -> Result<(), ControlError> {
        self.within("SET_VRING_ENABLE", |f| f.set_vring_enable(index, enabled))
    }

    /// Stops a ring; returns the index of the next element it would have taken.
    ///
    /// # Errors
    /// If the back end refuses.
    pub fn stop(&mut self, index: usize) -> Result<u16, ControlError> {
        let base = self.within("GET_VRING_BASE", |f| f.get_vring_base(index))?;
        Ok(u16::try_from(base).expect("the base of a split ring has 16 bits"))
    }
}

/// A ring's addresses as SET_VRING_ADDR wants them.
#[must_use]
pub fn ring_addresses(queue: &Queue) -> VringConfigData {
    let [table, available, used] = queue.ring().addresses();
    let memory = queue.memory();
    VringConfigData {
        queue_max_size: queue.ring().size(),
        queue_size: queue.ring().size(),
        flags: 0,
        desc_table_addr: memory.user_address(table),
        used_ring_addr: memory.user_address(used),
        avail_ring_addr: memory.user_address(available),
        log_addr: None,
    }
}

/// Connects, trying again while nobody listens.
///
/// # Errors
/// If nobody does before [`PATIENCE`] ends.
pub(super) fn connect_patiently(path: &Path) -> Result<UnixStream, ControlError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(source) if Instant::now() > deadline => {
                let path = path.display().to_string();
                return Err(ControlError::Connect { path, source });
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}
