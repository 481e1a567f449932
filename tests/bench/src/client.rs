//! The front end: a connection to a server and its queues, by the `virtio-driver` crate.
//!
//! Not the load: see [`crate::lane`]. Each slot of a queue owns a buffer and has at most one request in flight.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::back_end::{BackEnd, BackEndError};
use crate::contents::{PAGE, filler};
use crate::workload::Waiting;

/// How many descriptors a queue has at least, as guests have them. A request takes three.
pub(crate) const QUEUE_SIZE: u16 = 128;

/// How long a server may take for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Why there is no connection, or none any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("no memory to share with the server")]
    Memory(#[source] io::Error),
    #[error("the server does not listen on its socket within {} s", PATIENCE.as_secs())]
    NotListening,
    #[error(transparent)]
    Ended(#[from] BackEndError),
    #[error("the server refused the connection")]
    Refused(#[source] io::Error),
    #[error("the server refused a queue or memory")]
    Setup(#[source] io::Error),
    #[error("a request cannot be put into the queue")]
    Submit(#[source] io::Error),
    #[error("the server cannot be told of requests or its calls not be counted")]
    Notify(#[source] io::Error),
    #[error("the server does not answer within {} s", PATIENCE.as_secs())]
    Silent,
}

/// A connection to a server. The queues end before it does.
pub(crate) struct Connection {
    pub(crate) queues: Vec<Queue>,
    _transport: Box<VirtioBlkTransport>,
}

/// A front end that has a first answer, and no queue yet.
pub(crate) struct Greeted(Box<VirtioBlkTransport>);

/// Connects as soon as the server listens, and negotiates.
pub(crate) fn greet(server: &mut BackEnd) -> Result<Greeted, ClientError> {
    let socket = server.socket();
    greet_at(server, &socket)
}

/// The same at a socket of one of the server's disks.
pub(crate) fn greet_at(server: &mut BackEnd, socket: &Path) -> Result<Greeted, ClientError> {
    let path = socket
        .to_str()
        .expect("sockets lie in directories that we named");
    let wanted = VirtioFeatureFlags::VERSION_1.bits()
        | VirtioFeatureFlags::RING_EVENT_IDX.bits()
        | (VirtioBlkFeatureFlags::MQ
            | VirtioBlkFeatureFlags::SEG_MAX
            | VirtioBlkFeatureFlags::BLK_SIZE
            | VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::DISCARD)
            .bits();
    let start = Instant::now();
    loop {
        match VhostUser::new(path, wanted) {
            Ok(transport) => return Ok(Greeted(Box::new(transport))),
            Err(error) if is_early(&error) => {}
            Err(error) => return Err(ClientError::Refused(error)),
        }
        if let Some(ended) = server.ended() {
            return Err(ended.into());
        }
        if start.elapsed() > PATIENCE {
            return Err(ClientError::NotListening);
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn is_early(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    )
}

impl Greeted {
    /// Starts queues, each with so many slots of a buffer of so many bytes.
    pub(crate) fn start(
        self,
        queues: usize,
        slots: usize,
        bytes: usize,
        waiting: Waiting,
    ) -> Result<Connection, ClientError> {
        let mut transport = self.0;
        let memory = Arc::new(shared_memory(queues * slots * bytes)?);
        let needed = u16::try_from(slots * 3).expect("a queue has few slots");
        let queue_size = needed.next_power_of_two().max(QUEUE_SIZE);
        let rings = VirtioBlkQueue::setup_queues(&mut *transport, queues, queue_size)
            .map_err(ClientError::Setup)?;
        map(&mut *transport, &memory)?;
        let queues = rings.into_iter().enumerate().map(|(nth, mut ring)| {
            ring.set_used_notif_enabled(waiting == Waiting::Calls);
            Queue {
                ring,
                notifier: transport.get_submission_notifier(nth),
                call: transport.get_completion_fd(nth),
                memory: Arc::clone(&memory),
                first_byte: nth * slots * bytes,
                bytes,
                busy: vec![false; slots],
                calls: 0,
                kicks: 0,
            }
        });
        Ok(Connection {
            queues: queues.collect(),
            _transport: transport,
        })
    }
}

fn shared_memory(bytes: usize) -> Result<MmapRegion, ClientError> {
    let bytes = bytes.next_multiple_of(PAGE);
    let file = File::from(
        memfd_create("bench-memory", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| ClientError::Memory(errno.into()))?,
    );
    file.set_len(bytes as u64).map_err(ClientError::Memory)?;
    let region = MmapRegion::from_file(FileOffset::new(file, 0), bytes)
        .map_err(|error| ClientError::Memory(io::Error::other(error)))?;
    // Present from the beginning, as a guest's memory is.
    region
        .as_volatile_slice()
        .write_slice(&filler(bytes), 0)
        .map_err(|error| ClientError::Memory(io::Error::other(error)))?;
    Ok(region)
}

fn map(transport: &mut VirtioBlkTransport, memory: &MmapRegion) -> Result<(), ClientError> {
    let file = memory.file_offset().expect("it was made from a file");
    transport
        .map_mem_region(
            memory.as_ptr().addr(),
            memory.size(),
            file.file().as_raw_fd(),
            0,
        )
        .map_err(ClientError::Setup)?;
    Ok(())
}

/// One queue and its buffers.
pub(crate) struct Queue {
    ring: VirtioBlkQueue<'static, u16>,
    notifier: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    memory: Arc<MmapRegion>,
    first_byte: usize,
    bytes: usize,
    busy: Vec<bool>,
    /// How often the server called.
    pub(crate) calls: u64,
    /// How often it was kicked.
    pub(crate) kicks: u64,
}

impl Queue {
    /// How many requests may be in flight.
    pub(crate) fn slots(&self) -> usize {
        self.busy.len()
    }

    /// The buffer of a slot, of which requests use the beginning.
    pub(crate) fn buffer(&self, slot: u16) -> VolatileSlice<'_> {
        self.memory
            .get_slice(self.first_byte + usize::from(slot) * self.bytes, self.bytes)
            .expect("there is a buffer for each slot")
    }

    fn take(&mut self, slot: u16) {
        let busy = &mut self.busy[usize::from(slot)];
        assert!(!*busy, "slot {slot} has a request in flight");
        *busy = true;
    }

    /// Reads so many bytes from the disk into the slot's buffer.
    #[expect(unsafe_code, reason = "the driver takes a pointer into shared memory")]
    pub(crate) fn read(&mut self, slot: u16, at: u64, bytes: usize) -> Result<(), ClientError> {
        self.take(slot);
        let buffer = self
            .buffer(slot)
            .subslice(0, bytes)
            .expect("requests fit in buffers");
        let start = buffer.ptr_guard_mut().as_ptr();
        // SAFETY: the buffer lies in shared memory that the queue keeps mapped; no other request uses it (`take`).
        unsafe { self.ring.read_raw(at, start, bytes, slot) }.map_err(ClientError::Submit)
    }

    /// Writes so many bytes of the slot's buffer to the disk.
    #[expect(unsafe_code, reason = "the driver takes a pointer into shared memory")]
    pub(crate) fn write(&mut self, slot: u16, at: u64, bytes: usize) -> Result<(), ClientError> {
        self.take(slot);
        let buffer = self
            .buffer(slot)
            .subslice(0, bytes)
            .expect("requests fit in buffers");
        let start = buffer.ptr_guard().as_ptr();
        // SAFETY: the buffer lies in shared memory that the queue keeps mapped; no other request uses it (`take`).
        unsafe { self.ring.write_raw(at, start, bytes, slot) }.map_err(ClientError::Submit)
    }

    /// Makes all that was answered durable.
    pub(crate) fn flush(&mut self, slot: u16) -> Result<(), ClientError> {
        self.take(slot);
        self.ring.flush(slot).map_err(ClientError::Submit)
    }

    /// Gives a range of the disk back.
    pub(crate) fn discard(&mut self, slot: u16, at: u64, bytes: usize) -> Result<(), ClientError> {
        self.take(slot);
        self.ring
            .discard(at, bytes as u64, slot)
            .map_err(ClientError::Submit)
    }

    /// Tells the server of new requests, if it wants to be told.
    pub(crate) fn kick(&mut self) -> Result<(), ClientError> {
        if self.ring.avail_notif_needed() {
            self.kicks += 1;
            self.notifier.notify().map_err(ClientError::Notify)?;
        }
        Ok(())
    }

    /// Whether there are answers.
    pub(crate) fn is_answered(&mut self) -> bool {
        self.ring.completions().has_next()
    }

    /// Collects the slots that were answered, and 0 or a negative `errno` value for each.
    pub(crate) fn reap(&mut self, answers: &mut Vec<(u16, i32)>) {
        answers.extend(
            self.ring
                .completions()
                .map(|answer| (answer.context, answer.ret)),
        );
        for (slot, _) in answers {
            self.busy[usize::from(*slot)] = false;
        }
    }

    /// Sleeps until the server calls.
    pub(crate) fn wait(&mut self) -> Result<(), ClientError> {
        if !self.is_called(PATIENCE)? {
            return Err(ClientError::Silent);
        }
        self.calls += self.call.read().map_err(ClientError::Notify)?;
        Ok(())
    }

    /// Adds calls that nobody waited for.
    pub(crate) fn count_calls(&mut self) -> Result<(), ClientError> {
        if self.is_called(Duration::ZERO)? {
            self.calls += self.call.read().map_err(ClientError::Notify)?;
        }
        Ok(())
    }

    fn is_called(&self, patience: Duration) -> Result<bool, ClientError> {
        let patience = PollTimeout::try_from(patience).expect("patience is a matter of seconds");
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, patience).map_err(|errno| ClientError::Notify(errno.into()))?;
        Ok(ready > 0)
    }
}
