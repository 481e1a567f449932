//! One virtqueue as its driver uses it: requests go in, answers come out, and every wait ends.
//!
//! - A chain that the device answers twice, or never got, is a panic: R2 is checked by every test.
//! - Memory that the device may write is filled with [`super::UNTOUCHED`] first, so what it did not write shows.
//! - A wait that outlives [`PATIENCE`] is a panic that names the queue and what it waited for.

mod offer;

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EfdFlags;
use vhost::VringConfigData;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::chain::Chain;
use super::layout::{Indirect, Layout};
use super::memory::{Buffer, Memory};
use super::request::{Answer, Request};
use super::ring::{Descriptor, NEXT, Ring, Used, passed};

pub use offer::Fate;

/// How long anything may take before a test gives up: longer than a disk that others write to keeps a sync waiting.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long after a device gave a ring up the last answers may come; less than [`PATIENCE`], so that a request that waits
/// says why it has no answer.
const LAST_ANSWERS: Duration = Duration::from_secs(29);

/// Names a request until its answer is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u64);

/// Whether the driver wants to be called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calls {
    /// It sleeps until it is.
    Wanted,
    /// It looks at the used ring again and again.
    Unwanted,
}

#[derive(Debug)]
struct InFlight {
    token: Token,
    indexes: Vec<u16>,
    writable: Vec<(u64, u32)>,
    /// Held so that nobody else gets this memory while the device may use it.
    _buffers: Vec<Buffer>,
}

/// A queue as its front end knows it, while a driver uses it.
pub struct Attachment {
    /// Which queue of the device it is.
    pub index: usize,
    /// Its ring, in this process's addresses.
    pub addresses: VringConfigData,
    /// Where the driver kicks.
    pub kick: EventFd,
    /// Where it is called.
    pub call: EventFd,
    /// Where it hears of a broken ring.
    pub error: EventFd,
    memory: Arc<Memory>,
    indexes_at: [u64; 2],
}

impl Attachment {
    /// Index of the next available element, as the ring says now: what Cloud Hypervisor lets a ring begin at.
    #[must_use]
    pub fn available_index(&self) -> u16 {
        self.memory.load_u16(self.indexes_at[0])
    }

    /// Index of the next used element, as the ring says now: what QEMU lets a ring begin at.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.memory.load_u16(self.indexes_at[1])
    }
}

/// A virtqueue.
#[derive(Debug)]
pub struct Queue {
    index: usize,
    memory: Arc<Memory>,
    ring: Ring,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    pub(super) error: EventFd,
    epoll: Epoll,
    event_index: bool,
    calls: Calls,
    free: Vec<u16>,
    available: u16,
    used: u16,
    in_flight: HashMap<u16, InFlight>,
    answers: BTreeMap<Token, Answer>,
    next_token: u64,
    offered: Vec<u16>,
    returned: Vec<Used>,
    kicks: u64,
    /// When the device said that it gave the ring up, if nobody has been told yet.
    broken_since: Option<Instant>,
}

impl Queue {
    /// A queue of `size` descriptors.
    #[must_use]
    pub fn new(index: usize, memory: &Arc<Memory>, size: u16, event_index: bool) -> Self {
        let (call, error) = (event_fd(), event_fd());
        Self {
            index,
            memory: Arc::clone(memory),
            ring: Ring::new(memory, size),
            kick: event_fd(),
            epoll: epoll(&call, &error),
            call,
            error,
            event_index,
            calls: Calls::Wanted,
            free: (0..size).rev().collect(),
            available: 0,
            used: 0,
            in_flight: HashMap::new(),
            answers: BTreeMap::new(),
            next_token: 0,
            offered: Vec::new(),
            returned: Vec::new(),
            kicks: 0,
            broken_since: None,
        }
    }

    /// Which queue of the device this is.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// The ring, to write anything into.
    #[must_use]
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The memory that the ring and all buffers lie in.
    #[must_use]
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// What a back end needs to serve this queue.
    #[must_use]
    pub fn attachment(&self) -> Attachment {
        let clone = |fd: &EventFd| fd.try_clone().expect("an eventfd can be duplicated");
        Attachment {
            index: self.index,
            addresses: super::control::ring_addresses(self),
            kick: clone(&self.kick),
            call: clone(&self.call),
            error: clone(&self.error),
            memory: Arc::clone(&self.memory),
            indexes_at: [self.ring.addresses()[1] + 2, self.ring.addresses()[2] + 2],
        }
    }

    /// Index of the next available element.
    #[must_use]
    pub fn available_index(&self) -> u16 {
        self.available
    }

    /// Index of the next used element to look at.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.used
    }

    /// Number of requests without an answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// How often the device was kicked.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// How often the device called since this was last asked, or since the driver last woke up.
    #[must_use]
    pub fn take_calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    /// Goes on as if `index` elements had been used already. The ring must be stopped, nothing in flight.
    pub fn continue_at(&mut self, index: u16) {
        assert!(self.in_flight.is_empty(), "requests are in flight");
        (self.available, self.used) = (index, index);
        self.ring.set_indexes(index);
    }

    /// Says whether calls are wanted from now on.
    pub fn set_calls(&mut self, calls: Calls) {
        self.calls = calls;
        match (calls, self.event_index) {
            (Calls::Wanted, true) => self.ring.set_used_event(self.used),
            (Calls::Wanted, false) => self.ring.set_available_flags(0),
            // Farther ahead than the ring is long, so it is not passed before it is set anew.
            (Calls::Unwanted, true) => self.ring.set_used_event(self.used.wrapping_sub(1)),
            (Calls::Unwanted, false) => self.ring.set_available_flags(1),
        }
    }

    /// Puts a request into the ring.
    ///
    /// # Panics
    /// If the ring or guest memory is full.
    pub fn submit(&mut self, request: &Request, layout: &Layout) -> Token {
        let (token, head) = self.prepare(request, layout);
        self.publish(&[head]);
        token
    }

    /// Puts requests into the ring and shows them all at once.
    pub fn submit_all<'a>(
        &mut self,
        requests: impl IntoIterator<Item = (&'a Request, &'a Layout)>,
    ) -> Vec<Token> {
        let (tokens, heads): (Vec<_>, Vec<_>) = requests
            .into_iter()
            .map(|(request, layout)| self.prepare(request, layout))
            .unzip();
        self.publish(&heads);
        tokens
    }

    /// Waits for the answer to one request.
    ///
    /// # Panics
    /// If it does not come.
    pub fn wait(&mut self, token: Token) -> Answer {
        self.wait_within(token, PATIENCE).unwrap_or_else(|| {
            panic!(
                "queue {}: no answer to request {} within {PATIENCE:?}, {} in flight",
                self.index,
                token.0,
                self.in_flight.len()
            )
        })
    }

    /// Waits for the answer to one request for a limited time.
    pub fn wait_within(&mut self, token: Token, time: Duration) -> Option<Answer> {
        let deadline = Instant::now() + time;
        loop {
            self.reap();
            if let Some(answer) = self.answers.remove(&token) {
                return Some(answer);
            }
            if !self.sleep_unless_broken(deadline) {
                return None;
            }
        }
    }

    /// Waits for any answer.
    ///
    /// # Panics
    /// If none comes.
    pub fn wait_any(&mut self) -> (Token, Answer) {
        self.wait_any_within(PATIENCE).unwrap_or_else(|| {
            panic!(
                "queue {}: no answer within {PATIENCE:?}, {} in flight",
                self.index,
                self.in_flight.len()
            )
        })
    }

    /// Waits for any answer for a limited time.
    pub fn wait_any_within(&mut self, time: Duration) -> Option<(Token, Answer)> {
        let deadline = Instant::now() + time;
        loop {
            self.reap();
            if let Some(first) = self.answers.pop_first() {
                return Some(first);
            }
            if !self.sleep_unless_broken(deadline) {
                return None;
            }
        }
    }

    /// Takes what was answered without waiting.
    pub fn answered(&mut self) -> Vec<(Token, Answer)> {
        self.reap();
        std::mem::take(&mut self.answers).into_iter().collect()
    }

    /// Submits a request and waits for its answer.
    pub fn run(&mut self, request: &Request, layout: &Layout) -> Answer {
        let token = self.submit(request, layout);
        self.wait(token)
    }

    /// Reads, which must succeed.
    pub fn read(&mut self, sector: u64, len_bytes: u32) -> Vec<u8> {
        self.run(&Request::read(sector, len_bytes), &Layout::framed())
            .expect_ok()
    }

    /// Writes, which must succeed.
    pub fn write(&mut self, sector: u64, data: &[u8]) {
        let request = Request::write(sector, data.to_vec());
        let _empty = self.run(&request, &Layout::framed()).expect_ok();
    }

    /// Flushes, which must succeed.
    pub fn flush(&mut self) {
        let _empty = self.run(&Request::flush(), &Layout::framed()).expect_ok();
    }

    /// The serial number as it came, 20 bytes.
    pub fn get_id(&mut self) -> Vec<u8> {
        self.run(&Request::get_id(), &Layout::framed()).expect_ok()
    }

    fn prepare(&mut self, request: &Request, layout: &Layout) -> (Token, u16) {
        let token = Token(self.next_token);
        self.next_token += 1;
        let mut chain = Chain::new(&self.memory, request, layout);
        let mut direct = chain.descriptors.clone();
        if let Indirect::After(count) = layout.indirect {
            direct = chain.move_into_table(&self.memory, count, layout.writable_table);
        }
        assert!(
            direct.len() <= self.free.len(),
            "queue {}: {} descriptors are needed, {} are free",
            self.index,
            direct.len(),
            self.free.len()
        );
        let indexes = self.free.split_off(self.free.len() - direct.len());
        for (at, descriptor) in direct.iter().enumerate() {
            let (flags, next) = match indexes.get(at + 1) {
                Some(&next) => (descriptor.flags | NEXT, next),
                None => (descriptor.flags, 0),
            };
            let linked = Descriptor {
                flags,
                next,
                ..*descriptor
            };
            self.ring.set_descriptor(indexes[at], linked);
        }
        let head = indexes[0];
        let in_flight = InFlight {
            token,
            indexes,
            writable: chain.writable,
            _buffers: chain.buffers,
        };
        assert!(self.in_flight.insert(head, in_flight).is_none());
        (token, head)
    }

    fn publish(&mut self, heads: &[u16]) {
        let old = self.available;
        for &head in heads {
            self.ring.set_available(self.available, head);
            self.available = self.available.wrapping_add(1);
        }
        self.ring.set_available_index(self.available);
        let wanted = if self.event_index {
            passed(self.ring.available_event(), self.available, old)
        } else {
            self.ring.used_flags() & 1 == 0
        };
        if wanted {
            self.kick();
        }
    }

    fn reap(&mut self) {
        while self.ring.used_index() != self.used {
            let used = self.ring.used(self.used);
            self.used = self.used.wrapping_add(1);
            let head = u16::try_from(used.head).expect("used.id is a head");
            if let Some(in_flight) = self.in_flight.remove(&head) {
                let answer = self.answer(&in_flight, used.len_bytes);
                self.answers.insert(in_flight.token, answer);
                self.free.extend(in_flight.indexes);
            } else if let Some(at) = self.offered.iter().position(|&offered| offered == head) {
                self.offered.swap_remove(at);
                self.returned.push(used);
            } else {
                panic!(
                    "queue {}: the device answered head {head}, which is not in flight",
                    self.index
                );
            }
        }
    }

    fn answer(&self, in_flight: &InFlight, used_bytes: u32) -> Answer {
        let mut data = Vec::new();
        for &(at, len) in &in_flight.writable {
            data.extend_from_slice(&self.memory.read(at, len as usize));
        }
        let status = data.pop().expect("every layout has a status byte");
        Answer {
            status,
            used_bytes,
            data,
        }
    }

    /// Sleeps for an answer, which does not come for long from a ring that the device gave up.
    fn sleep_unless_broken(&mut self, deadline: Instant) -> bool {
        let Some(since) = self.broken_since else {
            return self.sleep_until(deadline);
        };
        let last = deadline.min(since + LAST_ANSWERS);
        assert!(
            self.sleep_until(last) || last == deadline,
            "queue {}: the device gave the ring up with {} in flight",
            self.index,
            self.in_flight.len()
        );
        Instant::now() < deadline
    }

    /// Sleeps until the device has perhaps answered or given the ring up; false when the deadline has passed.
    fn sleep_until(&mut self, deadline: Instant) -> bool {
        let slept = self.sleep_until_called(deadline);
        if self.error.read().is_ok() {
            self.broken_since = Some(Instant::now());
        }
        slept
    }

    fn sleep_until_called(&mut self, deadline: Instant) -> bool {
        if self.calls == Calls::Unwanted {
            std::thread::sleep(Duration::from_micros(50));
            return Instant::now() < deadline;
        }
        self.set_calls(Calls::Wanted);
        if self.ring.used_index() != self.used {
            return true;
        }
        if !readable_by(&self.epoll, deadline) {
            if self.ring.used_index() == self.used {
                return false;
            }
            // The answer came in the last moment; its call may still be under way.
            assert!(
                readable_by(&self.epoll, Instant::now() + PATIENCE),
                "queue {}: the device answered and did not call",
                self.index
            );
        }
        let _count = self.take_calls();
        true
    }
}

fn event_fd() -> EventFd {
    let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
    EventFd::new(flags.bits()).expect("an eventfd can be made")
}

/// What a sleeping driver listens to.
fn epoll(call: &EventFd, error: &EventFd) -> Epoll {
    let epoll = Epoll::new().expect("an epoll can be made");
    for fd in [call, error] {
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, fd.as_raw_fd(), event)
            .expect("an eventfd can be polled");
    }
    epoll
}

/// Waits until something is readable; false when the deadline passed.
fn readable_by(epoll: &Epoll, deadline: Instant) -> bool {
    let mut events = [EpollEvent::default(); 2];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let rounded_up = left.as_micros().div_ceil(1000);
        let timeout = i32::try_from(rounded_up).expect("deadlines are near");
        match epoll.wait(timeout, &mut events) {
            Ok(count) => return count > 0,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("epoll_wait fails: {error}"),
        }
    }
}
