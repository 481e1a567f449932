//! What the control thread tells a worker, and the bell that makes it listen.
//!
//! Every command is acknowledged when it is done, not when it is heard.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Wake;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::dirty::Guest;
use crate::dump::SeatDump;
use crate::queue::{ErrorFd, Mode, Vring};
use crate::ring::owned;
use crate::tracking::Tracker;
use crate::workers::Served;

/// A disk's number at all workers: unique among the disks that live, and small.
pub(crate) type SeatNumber = u32;

/// Wakes a worker: for a command, or because parked requests should be tried again.
#[derive(Debug)]
pub(crate) struct Doorbell {
    eventfd: EventFd,
    /// Whether `retries` has something.
    retry: AtomicBool,
    /// Whose parked requests those are.
    retries: Mutex<Vec<SeatNumber>>,
}

impl Doorbell {
    /// A doorbell for one worker.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            eventfd: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            retry: AtomicBool::new(false),
            retries: Mutex::default(),
        })
    }

    /// What the worker watches.
    pub(crate) fn watched(&self) -> io::Result<OwnedFd> {
        self.eventfd.try_clone().map(owned)
    }

    /// Whose parked requests should be tried again, since this was last asked.
    pub(crate) fn wants_retry(&self) -> Vec<SeatNumber> {
        if !self.retry.load(Ordering::Relaxed) || !self.retry.swap(false, Ordering::AcqRel) {
            return Vec::new();
        }
        std::mem::take(&mut *self.retries.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has the worker look for commands.
    pub(crate) fn ring(&self) {
        // It fails only when 2^64 - 2 rings were not heard.
        let _ = self.eventfd.write(1);
    }

    fn ring_for(&self, seat: SeatNumber) {
        let retries = self.retries.lock();
        retries.unwrap_or_else(PoisonError::into_inner).push(seat);
        self.retry.store(true, Ordering::Release);
        self.ring();
    }
}

/// The doorbell as one seat's requests ring it.
#[derive(Debug)]
pub(crate) struct SeatBell {
    doorbell: Arc<Doorbell>,
    seat: SeatNumber,
    /// Rung, and not heard yet.
    retry: AtomicBool,
}

impl SeatBell {
    /// The bell of a seat.
    pub(crate) fn new(doorbell: Arc<Doorbell>, seat: SeatNumber) -> Self {
        Self {
            doorbell,
            seat,
            retry: AtomicBool::new(false),
        }
    }

    /// Whether parked requests should be tried again, since this was last asked.
    pub(crate) fn wants_retry(&self) -> bool {
        self.retry.load(Ordering::Relaxed) && self.retry.swap(false, Ordering::AcqRel)
    }
}

impl Wake for SeatBell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.retry.swap(true, Ordering::AcqRel) {
            self.doorbell.ring_for(self.seat);
        }
    }
}

/// Says that a command is done.
pub(crate) type Ack = Sender<io::Result<()>>;

/// When a worker takes over new memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Takeover {
    /// At once: the new memory contains the old.
    Now,
    /// When nothing is in flight: something goes away.
    WhenIdle,
}

/// A queue to serve.
pub(crate) struct Setup {
    /// Its number.
    pub(crate) index: u16,
    /// Its ring, set up and valid.
    pub(crate) vring: Vring,
    /// Its err eventfd.
    pub(crate) error_fd: ErrorFd,
    /// Whether chains are taken already.
    pub(crate) mode: Mode,
    /// Where its chains in flight are recorded.
    pub(crate) tracker: Option<Tracker>,
    /// Chains that an earlier daemon left in flight, in their order.
    pub(crate) left_behind: Vec<u16>,
}

/// A command about a disk.
pub(crate) struct Order {
    /// The disk's seat.
    pub(crate) seat: SeatNumber,
    /// What to do.
    pub(crate) command: Command,
    /// Where that is acknowledged.
    pub(crate) ack: Ack,
}

/// What a control thread wants.
pub(crate) enum Command {
    /// Have a seat for a disk, whose syncs go through this descriptor.
    Sit(Box<Served>, Arc<File>),
    /// Serve a queue, which is kicked here or else polled, in this guest.
    Start(Box<Setup>, Option<OwnedFd>, Guest),
    /// Take no more chains, answer what was taken.
    Pause(u16),
    /// Take chains again.
    Resume(u16),
    /// Answer what was taken and forget the queue.
    Stop(u16),
    /// The kicks come from here now, or none come any more.
    Rekick(u16, Option<OwnedFd>),
    /// The guest's memory changed, or where writes to it are marked.
    Guest(Guest, Takeover),
    /// Say how the disk is, at once.
    Dump(Sender<SeatDump>),
    /// Stop all queues of the disk and forget it.
    Leave,
}
