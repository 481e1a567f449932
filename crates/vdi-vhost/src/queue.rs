//! One virtqueue as its worker sees it: heads come out, used entries go in, and nobody is notified in vain.
//!
//! Indices, layout and the guest's kicks are `virtio-queue`'s. Elements are read and written here, because it looks for each
//! of them in the memory's regions, and shows the used index again for each.
//!
//! Not here: what the chains mean (`chain`, `request`) and what becomes of them (`inflight`, `worker`).
//!
//! - **R2** A slot per head: a chain is in flight at most once, and leaves its slot only when it is answered.
//! - A ring that the guest broke is left alone (virtio 1.2 section 2.7.13 has no other word for it): its err eventfd is
//!   written, other rings go on.
//! - What a front end does with its eventfds never blocks us, not even between two of our steps (`ring::calls`).
//! - Notifications are switched on only before the worker sleeps, and the available index is looked at again after
//!   that (virtio 1.2 section 2.7.10), so no kick is lost.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use smallvec::SmallVec;
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};

use crate::access;
use crate::chain::{self, Chain, ChainError};
use crate::command::Setup;
use crate::complaints::Complaints;
use crate::dirty::{DirtyLog, Guest};
use crate::inflight::Active;
use crate::memory::Memory;
use crate::request::Used;
use crate::ring::{WatchKey, calls};
use crate::tracking::{Tracker, TrackingError};

/// A ring's state, shared by the control thread and its worker.
pub(crate) type Vring = VringMutex<GuestMemoryAtomic<Memory>>;

/// The err eventfd of a ring, if the front end gave one. (`VringState` keeps its own without a way to it.)
pub(crate) type ErrorFd = Arc<Mutex<Option<std::fs::File>>>;

/// Bytes of a ring before its elements: flags and index.
const AVAILABLE_HEADER_BYTES: u64 = 4;

/// The same of the used ring.
const USED_HEADER_BYTES: u64 = 4;

/// Bytes of an element of the used ring: the chain's head and the bytes written, 32 bits each.
const USED_ELEMENT_BYTES: u64 = 8;

/// Chains taken in one go, so that answers to the first do not wait for the last.
pub(crate) const BURST: u16 = 32;

/// Answers that the guest sees before the turn is over.
pub(crate) const SEVERAL: usize = 4;

/// Bytes that the requests in flight of a queue are about, beyond which it takes no more chains: one of the largest discards that Linux sends, and
/// more data than a ring of 1024 of its largest reads asks for. A few bytes in the ring can ask for terabytes (a segment of a discard; a table that
/// names the same memory a thousand times), and whoever stops the queue waits for what it took.
const MOST_BYTES: u64 = 4 << 30;

/// What the worker does with a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// Takes chains.
    Running,
    /// Takes none: disabled by the front end.
    Paused,
    /// Takes none any more: the guest broke the ring.
    Broken,
}

/// One started virtqueue.
pub(crate) struct Queue {
    vring: Vring,
    error_fd: ErrorFd,
    /// Where its kicks are heard; a queue that nobody kicks is looked at again and again.
    pub(crate) watch: Option<WatchKey>,
    /// Whether chains are taken.
    pub(crate) mode: Mode,
    /// Whether the ring is looked at without having been kicked.
    awake: bool,
    /// What is in flight, by head.
    slots: Vec<Option<Active>>,
    in_flight: usize,
    /// Bytes that those in flight are about.
    bytes: u64,
    /// Answered in this turn, and not shown to the guest yet.
    used: Vec<Used>,
    /// The used index before those that were shown in this turn.
    shown_since: Option<u16>,
    size: u16,
    table: GuestAddress,
    tracker: Option<Tracker>,
    /// What an earlier daemon had in flight. It comes before anything new.
    left_behind: Vec<u16>,
}

/// A queue in numbers.
#[derive(Debug, Serialize)]
pub(crate) struct QueueDump {
    queue: u16,
    mode: Mode,
    size: u16,
    /// Whether it is looked at without being kicked.
    awake: bool,
    /// Whether nobody kicks it.
    polled: bool,
    in_flight: usize,
    /// Requests of an earlier daemon that are not started yet.
    left_behind: usize,
    /// The index of the next chain to take, and the guest's of the next to offer: the difference waits.
    next_available: u16,
    available: Option<u16>,
    /// The index of the next chain to give back.
    next_used: u16,
}

/// How a guest broke a ring.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// The rings cannot be read or written, or the available index jumped.
    #[error("the ring cannot be used")]
    Ring(#[from] virtio_queue::Error),
    /// An available entry that names no descriptor.
    #[error("the available ring names descriptor {head} of a queue of {size}")]
    BadHead { head: u16, size: u16 },
    /// R2.
    #[error("the chain at descriptor {head} was made available again before it was used")]
    HeadInFlight { head: u16 },
    /// It cannot be followed to its end.
    #[error("the chain at descriptor {head} is broken")]
    Chain {
        head: u16,
        #[source]
        source: ChainError,
    },
    /// There is no byte for a status.
    #[error("the chain at descriptor {head} has no writable byte for a status")]
    Unanswerable { head: u16 },
    /// The front end took the region away.
    #[error("in-flight tracking does not work")]
    Tracking(#[from] TrackingError),
    /// The kick descriptor is gone.
    #[error("the kick descriptor cannot be watched")]
    Kick,
}

/// Heads that were taken.
pub(crate) type Heads = SmallVec<[u16; BURST as usize]>;

impl Queue {
    /// A queue whose kicks are heard by `watch`, if there are any.
    pub(crate) fn new(setup: Setup, watch: Option<WatchKey>) -> Self {
        let Setup {
            index: _,
            vring,
            error_fd,
            mode,
            tracker,
            left_behind,
        } = setup;
        let (size, table) = {
            let state = vring.get_ref();
            let queue = state.get_queue();
            (queue.size(), GuestAddress(queue.desc_table()))
        };
        Self {
            vring,
            error_fd,
            watch,
            mode,
            awake: true,
            slots: std::iter::repeat_with(|| None)
                .take(usize::from(size))
                .collect(),
            in_flight: 0,
            bytes: 0,
            used: Vec::new(),
            shown_since: None,
            size,
            table,
            tracker,
            left_behind,
        }
    }

    /// Chains that were taken and not answered yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether there may be chains to take, and they may be taken.
    pub(crate) fn is_awake(&self) -> bool {
        self.awake && self.mode == Mode::Running && !self.is_full()
    }

    /// Whether what is in flight is so much that no more chains are taken.
    pub(crate) fn is_full(&self) -> bool {
        self.bytes >= MOST_BYTES
    }

    /// Whether nobody will say that there are chains to take.
    pub(crate) fn is_polled(&self) -> bool {
        self.watch.is_none() && self.mode == Mode::Running
    }

    /// The ring was kicked, or should be looked at for another reason.
    pub(crate) fn wake(&mut self, guest: &Guest) {
        if self.awake || self.mode != Mode::Running {
            return;
        }
        self.awake = true;
        let mut state = self.vring.get_mut();
        // Only a hint for the guest: a failure here shows when chains are taken.
        let _ = state.get_queue_mut().disable_notification(&*guest.memory);
        if let Some(log) = &guest.log {
            mark_used_ring(log, state.get_queue());
        }
    }

    /// Takes no chains from now on.
    pub(crate) fn pause(&mut self) {
        if self.mode == Mode::Running {
            self.mode = Mode::Paused;
        }
    }

    /// Takes chains as long as it is kicked, from now on.
    pub(crate) fn resume(&mut self) {
        if self.mode == Mode::Paused {
            self.mode = Mode::Running;
            self.awake = true;
        }
    }

    /// Asks the guest to kick; true if nothing came in meanwhile, so that the worker may sleep.
    pub(crate) fn sleep(&mut self, guest: &Guest) -> Result<bool, Broken> {
        let mut state = self.vring.get_mut();
        if self.watch.is_none() {
            let queue = state.get_queue();
            let available = queue.avail_idx(&*guest.memory, Ordering::Acquire)?;
            return Ok(available == Wrapping(queue.next_avail()) && self.left_behind.is_empty());
        }
        let more = state.get_queue_mut().enable_notification(&*guest.memory)?;
        if let Some(log) = &guest.log {
            mark_used_ring(log, state.get_queue());
        }
        self.awake = more || !self.left_behind.is_empty();
        Ok(!self.awake)
    }

    /// Whether there are chains to take. A ring that cannot be read counts: taking from it says why.
    pub(crate) fn has_chains(&self, memory: &Memory) -> bool {
        let state = self.vring.get_ref();
        let queue = state.get_queue();
        !self.left_behind.is_empty() || offered(queue, memory) != Some(queue.next_avail())
    }

    /// What is in flight.
    pub(crate) fn requests(&self) -> impl Iterator<Item = &Active> {
        self.slots.iter().flatten()
    }

    /// How it is.
    pub(crate) fn dump(&self, index: u16, memory: &Memory) -> QueueDump {
        let state = self.vring.get_ref();
        let queue = state.get_queue();
        QueueDump {
            queue: index,
            mode: self.mode,
            size: self.size,
            awake: self.awake,
            polled: self.is_polled(),
            in_flight: self.in_flight,
            left_behind: self.left_behind.len(),
            next_available: queue.next_avail(),
            available: offered(queue, memory),
            next_used: queue.next_used(),
        }
    }

    /// Whether the next chains are those that an earlier daemon had in flight.
    pub(crate) fn is_recovering(&self) -> bool {
        !self.left_behind.is_empty()
    }

    /// Takes up to `most` heads; none are left if there are fewer.
    pub(crate) fn take_heads(&mut self, memory: &Memory, most: u16) -> Result<Heads, Broken> {
        if !self.left_behind.is_empty() {
            let count = self.left_behind.len().min(usize::from(most));
            return Ok(self.left_behind.drain(..count).collect());
        }
        let heads = available_heads(self.vring.get_mut().get_queue_mut(), memory, most)?;
        if let Some(tracker) = &mut self.tracker {
            // T1; a head that no descriptor has breaks the ring as soon as it is followed.
            for head in heads.iter().filter(|head| **head < self.size) {
                tracker.taken(*head)?;
            }
        }
        Ok(heads)
    }

    /// Has the last heads that were taken from the ring be the next ones to take. They were not started.
    pub(crate) fn put_back(&mut self, heads: &[u16]) -> Result<(), Broken> {
        if let Some(tracker) = &self.tracker {
            // The last one first: what is recorded is without a gap (T1).
            for head in heads.iter().rev().filter(|head| **head < self.size) {
                tracker.put_back(*head)?;
            }
        }
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        let count = u16::try_from(heads.len()).expect("a burst is short");
        queue.set_next_avail(queue.next_avail().wrapping_sub(count));
        Ok(())
    }

    /// Follows the chain of a head that was taken.
    pub(crate) fn walk(&self, memory: &Memory, head: u16) -> Result<Chain, Broken> {
        let size = self.size;
        match self.slots.get(usize::from(head)) {
            None => Err(Broken::BadHead { head, size }),
            Some(Some(_)) => Err(Broken::HeadInFlight { head }),
            Some(None) => chain::walk(memory, self.table, size, head)
                .map_err(|source| Broken::Chain { head, source }),
        }
    }

    /// Keeps a request until it is answered.
    pub(crate) fn keep(&mut self, head: u16, active: Active) {
        self.bytes += active.bytes();
        self.slots[usize::from(head)] = Some(active);
        self.in_flight += 1;
    }

    /// The request of a head.
    pub(crate) fn active(&mut self, head: u16) -> Option<&mut Active> {
        self.slots.get_mut(usize::from(head))?.as_mut()
    }

    /// Ends keeping it, because it is about to be answered.
    pub(crate) fn release(&mut self, head: u16) -> Option<Active> {
        let active = self.slots.get_mut(usize::from(head))?.take();
        if let Some(active) = &active {
            self.in_flight -= 1;
            self.bytes -= active.bytes();
        }
        active
    }

    /// Gives an answered chain back with the next [`Queue::publish`].
    pub(crate) fn give_back(&mut self, used: Used) {
        self.used.push(used);
    }

    /// Gives no answer to what was answered since the last [`Queue::publish`].
    pub(crate) fn withhold(&mut self) {
        self.used.clear();
        self.shown_since = None;
    }

    /// Puts what was answered into the used ring and calls the guest, once for all of the turn and if it wants it.
    pub(crate) fn publish(&mut self, guest: &Guest) -> Result<(), Broken> {
        self.show(guest)?;
        let Some(before) = self.shown_since.take() else {
            return Ok(());
        };
        let state = self.vring.get_ref();
        if wants_call(state.get_queue(), &guest.memory, before)? {
            call_guest(&state);
        }
        Ok(())
    }

    /// Puts answers into the used ring if there are several: a guest that looks for them goes on while others are dealt with.
    pub(crate) fn show_several(&mut self, guest: &Guest) -> Result<(), Broken> {
        if self.used.len() < SEVERAL {
            return Ok(());
        }
        self.show(guest)
    }

    fn show(&mut self, guest: &Guest) -> Result<(), Broken> {
        if self.used.is_empty() {
            return Ok(());
        }
        let memory = &*guest.memory;
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        self.shown_since.get_or_insert(queue.next_used());
        for used in self.used.drain(..) {
            let Some(tracker) = &mut self.tracker else {
                add_used(queue, memory, used)?;
                continue;
            };
            tracker.giving_back(used.head)?;
            add_used(queue, memory, used)?;
            show_used(queue, memory)?;
            tracker.given_back(used.head, queue.next_used())?;
        }
        if self.tracker.is_none() {
            show_used(queue, memory)?;
        }
        if let Some(log) = &guest.log {
            mark_used_ring(log, queue);
        }
        Ok(())
    }

    /// Leaves the ring alone from now on and tells the front end.
    pub(crate) fn break_ring(&mut self, index: u16, why: &Broken, complaints: &Complaints) {
        if self.mode == Mode::Broken {
            return;
        }
        self.mode = Mode::Broken;
        complaints.warn(format_args!(
            "queue {index} is stopped: {}",
            crate::chain_of(why)
        ));
        let error_fd = self.error_fd.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fd) = error_fd.as_ref() {
            calls::call(fd);
        }
    }
}

/// The guest's index of the next chain that it will offer.
fn offered(queue: &virtio_queue::Queue, memory: &Memory) -> Option<u16> {
    let at = part_of(queue.avail_ring(), 2).ok()?;
    let index = memory.load::<u16>(at, Ordering::Acquire).ok();
    index.map(u16::from_le)
}

/// Takes up to `most` heads from the available ring.
fn available_heads(
    queue: &mut virtio_queue::Queue,
    memory: &Memory,
    most: u16,
) -> Result<Heads, Error> {
    let (first, size) = (queue.next_avail(), queue.size());
    let available = queue.avail_idx(memory, Ordering::Acquire)? - Wrapping(first);
    if available.0 > size {
        return Err(Error::InvalidAvailRingIndex);
    }
    let mut heads = Heads::new();
    let count = available.0.min(most);
    for nth in 0..count {
        let element = u64::from(first.wrapping_add(nth) % size);
        let at = part_of(queue.avail_ring(), AVAILABLE_HEADER_BYTES + 2 * element)?;
        let head = access::read(memory, at).map_err(Error::GuestMemory)?;
        heads.push(u16::from_le(head));
    }
    queue.set_next_avail(first.wrapping_add(count));
    Ok(heads)
}

/// Puts an element into the used ring, where the guest does not see it yet.
fn add_used(queue: &mut virtio_queue::Queue, memory: &Memory, used: Used) -> Result<(), Error> {
    let element = u64::from(queue.next_used() % queue.size());
    let at = part_of(
        queue.used_ring(),
        USED_HEADER_BYTES + USED_ELEMENT_BYTES * element,
    )?;
    let id_and_len = u64::from(used.len) << 32 | u64::from(used.head);
    access::write(memory, at, id_and_len.to_le()).map_err(Error::GuestMemory)?;
    queue.set_next_used(queue.next_used().wrapping_add(1));
    Ok(())
}

/// Lets the guest see all elements of the used ring.
fn show_used(queue: &virtio_queue::Queue, memory: &Memory) -> Result<(), Error> {
    let at = part_of(queue.used_ring(), 2)?;
    let index = queue.next_used().to_le();
    memory
        .store(index, at, Ordering::Release)
        .map_err(Error::GuestMemory)
}

/// Whether the guest wants to be called for what it sees in the used ring since `before` (virtio 1.2 section 2.7.7.2).
fn wants_call(queue: &virtio_queue::Queue, memory: &Memory, before: u16) -> Result<bool, Error> {
    // It must see the elements before its wish is read.
    fence(Ordering::SeqCst);
    let read = |offset| {
        let at = part_of(queue.avail_ring(), offset)?;
        access::read::<u16>(memory, at).map_err(Error::GuestMemory)
    };
    if !queue.event_idx_enabled() {
        let flags = read(0)?;
        return Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0);
    }
    let used_event = read(AVAILABLE_HEADER_BYTES + 2 * u64::from(queue.size()))?;
    let (used_event, now) = (u16::from_le(used_event), queue.next_used());
    Ok(now.wrapping_sub(used_event).wrapping_sub(1) < now.wrapping_sub(before))
}

/// An address within a ring.
fn part_of(ring: u64, offset: u64) -> Result<GuestAddress, Error> {
    let at = ring.checked_add(offset).map(GuestAddress);
    at.ok_or(Error::AddressOverflow)
}

/// Calls the guest, if the front end gave a descriptor for it.
pub(crate) fn call_guest(ring: &VringState<GuestMemoryAtomic<Memory>>) {
    if let Some(call) = ring.get_call() {
        calls::call(call);
    }
}

/// Marks all that a device writes of a split ring: flags, index, elements and `avail_event` (virtio 1.2 section 2.7.8).
fn mark_used_ring(log: &DirtyLog, queue: &virtio_queue::Queue) {
    log.mark(queue.used_ring(), 6 + 8 * u64::from(queue.size()));
}

#[cfg(test)]
mod tests;
