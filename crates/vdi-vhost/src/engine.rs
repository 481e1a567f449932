//! How a worker waits and moves data: io_uring, or plain system calls where the host forbids it.
//!
//! One interface for both, so that the worker does not know which it has. The synchronous engine does every transfer
//! at once and waits with an edge-triggered epoll, which like the ring never reads an eventfd.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Once;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::ring::{Fired, Ring, WatchKey};
use crate::transfer::{Finished, Transfer};

/// Events taken from one wait; more are found by the next.
const EVENTS: usize = 64;

/// Said once, not by every worker.
static FALLBACK: Once = Once::new();

/// Which engine the user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum EngineChoice {
    /// io_uring, or system calls where the host forbids it.
    Auto,
    /// io_uring, or nothing.
    IoUring,
    /// One system call after the other.
    Sync,
}

/// How long a turn may wait until there is something to report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Not at all.
    No,
    /// For ever.
    Forever,
    /// Not much longer than this: something has to be looked at that nobody reports.
    AtMost(Duration),
}

/// Moves data and waits, for one worker.
#[expect(clippy::large_enum_variant, reason = "one per worker thread")]
pub(crate) enum Engine {
    /// io_uring.
    Ring(Ring),
    /// System calls.
    Sync(SyncEngine),
}

impl Engine {
    /// An engine for this thread.
    pub(crate) fn new(choice: EngineChoice) -> io::Result<Self> {
        match choice {
            EngineChoice::Sync => SyncEngine::new().map(Self::Sync),
            EngineChoice::IoUring => Ring::new().map(Self::Ring),
            EngineChoice::Auto => Ring::new().map(Self::Ring).or_else(|error| {
                FALLBACK.call_once(|| {
                    tracing::warn!("io_uring cannot be used here ({error}), using system calls");
                });
                SyncEngine::new().map(Self::Sync)
            }),
        }
    }

    /// Reports under `key` whenever someone writes to the eventfd `fd`.
    pub(crate) fn watch(&mut self, key: WatchKey, fd: OwnedFd) -> io::Result<()> {
        match self {
            Self::Ring(ring) => {
                ring.watch(key, fd);
                Ok(())
            }
            Self::Sync(sync) => sync.watch(key, fd),
        }
    }

    /// Ends a watch.
    pub(crate) fn unwatch(&mut self, key: WatchKey) {
        match self {
            Self::Ring(ring) => ring.unwatch(key),
            Self::Sync(sync) => sync.unwatch(key),
        }
    }

    /// Starts a transfer, on this thread's own time if `inline`.
    pub(crate) fn start(&mut self, transfer: Transfer, inline: bool) {
        match self {
            Self::Ring(ring) if inline => ring.run(transfer),
            Self::Ring(ring) => ring.start(transfer),
            Self::Sync(sync) => sync.finished.push_back(transfer.run()),
        }
    }

    /// Submits and collects, and waits as it is told until there is something to report.
    pub(crate) fn turn(&mut self, wait: Wait) {
        match self {
            Self::Ring(ring) => ring.turn(wait),
            Self::Sync(sync) => sync.turn(wait),
        }
    }

    /// Whether a turn would have something to report without waiting, as far as that can be seen without a system call.
    pub(crate) fn has_news(&mut self) -> bool {
        match self {
            Self::Ring(ring) => ring.has_news(),
            Self::Sync(sync) => !sync.finished.is_empty() || !sync.fired.is_empty(),
        }
    }

    /// Whether only one transfer is in flight, and such a one as takes storage little time.
    pub(crate) fn is_soon_over(&self) -> bool {
        match self {
            Self::Ring(ring) => ring.is_soon_over(),
            Self::Sync(_) => false,
        }
    }

    /// Submits what was started.
    pub(crate) fn submit(&mut self) {
        match self {
            Self::Ring(ring) => ring.hand_over(),
            Self::Sync(_) => {}
        }
    }

    /// Whether something was started that the next turn submits.
    pub(crate) fn has_unsubmitted(&mut self) -> bool {
        match self {
            Self::Ring(ring) => ring.has_unsubmitted(),
            Self::Sync(_) => false,
        }
    }

    /// The next transfer that is over.
    pub(crate) fn next_finished(&mut self) -> Option<Finished> {
        match self {
            Self::Ring(ring) => ring.next_finished(),
            Self::Sync(sync) => sync.finished.pop_front(),
        }
    }

    /// The next watch that has something to tell.
    pub(crate) fn next_fired(&mut self) -> Option<(WatchKey, Fired)> {
        match self {
            Self::Ring(ring) => ring.next_fired(),
            Self::Sync(sync) => sync.fired.pop_front(),
        }
    }

    /// Transfers that are not over.
    pub(crate) fn in_flight(&self) -> usize {
        match self {
            Self::Ring(ring) => ring.in_flight(),
            Self::Sync(_) => 0,
        }
    }
}

/// The engine for hosts that forbid io_uring.
pub(crate) struct SyncEngine {
    epoll: Epoll,
    watches: BTreeMap<WatchKey, OwnedFd>,
    finished: VecDeque<Finished>,
    fired: VecDeque<(WatchKey, Fired)>,
}

impl SyncEngine {
    fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            watches: BTreeMap::new(),
            finished: VecDeque::new(),
            fired: VecDeque::new(),
        })
    }

    fn watch(&mut self, key: WatchKey, fd: OwnedFd) -> io::Result<()> {
        let events = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        self.epoll
            .add(&fd, EpollEvent::new(events, u64::from(key.0)))?;
        self.watches.insert(key, fd);
        Ok(())
    }

    fn unwatch(&mut self, key: WatchKey) {
        if let Some(fd) = self.watches.remove(&key) {
            self.epoll.delete(&fd).expect("it was added");
        }
    }

    fn turn(&mut self, wait: Wait) {
        let idle = self.finished.is_empty() && self.fired.is_empty();
        let timeout = match wait {
            Wait::Forever if idle => EpollTimeout::NONE,
            // It counts in milliseconds; none would be spinning.
            Wait::AtMost(time) if idle => {
                EpollTimeout::from(u8::try_from(time.as_millis().max(1)).unwrap_or(u8::MAX))
            }
            Wait::No | Wait::Forever | Wait::AtMost(_) => EpollTimeout::ZERO,
        };
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = match self.epoll.wait(&mut events, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => panic!("epoll_wait failed: {error}"),
        };
        for event in &events[..count] {
            let key = WatchKey(u32::try_from(event.data()).unwrap_or(u32::MAX));
            let bad = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
            let fired = if event.events().intersects(bad) {
                Fired::Dead
            } else {
                Fired::Ready
            };
            self.fired.push_back((key, fired));
        }
    }
}
