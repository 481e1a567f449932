//! The state of a disk in numbers, for whoever is called at night because something hangs.
//!
//! What hangs may hold what others wait for. So nothing here waits for long: a control plane that is busy and a thread that does not
//! answer in [`PATIENCE`] are said to be so, and the rest is told. Never more than [`OLDEST`] requests of a thread are listed, and
//! never any data or address of the guest.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use vdi_core::Inside;

use crate::backend::Backend;
use crate::berth::Berth;
use crate::command::{Command, SeatNumber};
use crate::cpus::CpuList;
use crate::crew::Crew;
use crate::limits::Limits;
use crate::queue::QueueDump;
use crate::request::Kind;
use crate::rings::RingDump;

/// How long a part may take to say how it is.
const PATIENCE: Duration = Duration::from_millis(500);

/// How often a busy control plane is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// Requests in flight that a thread tells of, the oldest first.
pub(crate) const OLDEST: usize = 32;

/// All there is to tell of a disk.
#[derive(Debug, Serialize)]
pub(crate) struct Dump {
    name: String,
    /// Whether a front end is there.
    connected: bool,
    /// Whether it is being removed.
    closing: bool,
    limits: Limits,
    group: Option<String>,
    group_limits: Option<Limits>,
    /// Seats that wait for a limit.
    held_seats: usize,
    /// None: a command or a message is being carried out, and may be what hangs.
    control: Option<ControlDump>,
    threads: Vec<ThreadDump>,
}

/// The control plane.
#[derive(Debug, Serialize)]
pub(crate) struct ControlDump {
    pub(crate) paused: bool,
    pub(crate) failed: bool,
    pub(crate) failed_requests: u64,
    /// What the front end accepted.
    pub(crate) event_idx: bool,
    pub(crate) write_through: bool,
    pub(crate) memory_regions: usize,
    pub(crate) memory_bytes: u64,
    /// Whether memory of the front end's could not be accessed in this session.
    pub(crate) memory_lost: bool,
    /// Whether requests in flight are recorded for the next daemon.
    pub(crate) tracked: bool,
    /// Whether writes to the guest's memory are marked, for a migration.
    pub(crate) dirty_log: bool,
    pub(crate) rings: Vec<RingDump>,
    /// The open image.
    pub(crate) image: Option<ImageDump>,
}

/// An open image, as `vdi-core` has it.
#[derive(Debug, Serialize)]
pub(crate) struct ImageDump {
    images: usize,
    counted_blocks: u32,
    blocks_in_image: u32,
    fresh_blocks: u32,
    stale_blocks: u32,
    next_file_block: u32,
    blocks_in_transition: usize,
    waiting: usize,
    wanted_blocks: u32,
    has_no_room: bool,
    marked: bool,
    failed: bool,
    synced: bool,
}

/// A thread that may serve queues of the disk.
#[derive(Debug, Serialize)]
struct ThreadDump {
    thread: usize,
    /// Where it may run, if that was said.
    cpus: Option<CpuList>,
    /// It did not answer: it does something that takes its time.
    silent: bool,
    /// What it has of the disk, if it has something.
    seat: Option<SeatDump>,
}

/// A disk at one thread.
#[derive(Debug, Serialize)]
pub(crate) struct SeatDump {
    pub(crate) queues: Vec<QueueDump>,
    /// Reads and writes of files that are not over.
    pub(crate) transfers: usize,
    /// Requests that wait for room or for each other (W7).
    pub(crate) parked: usize,
    /// Those that go on in the next turn.
    pub(crate) continuing: usize,
    /// Those that wait for a sync.
    pub(crate) unsynced: usize,
    /// How long the sync has been going on that is under way.
    pub(crate) sync_age_us: Option<u64>,
    /// How long it is until a limit lets the next request be taken.
    pub(crate) held_for_us: Option<u64>,
    /// What the control plane waits for.
    pub(crate) pending: Option<&'static str>,
    /// Commands behind that.
    pub(crate) commands: usize,
    pub(crate) memory_lost: bool,
    /// The oldest requests; how many there are, each queue says.
    pub(crate) oldest: Vec<RequestDump>,
}

/// A request in flight.
#[derive(Debug, Serialize)]
pub(crate) struct RequestDump {
    pub(crate) queue: u16,
    pub(crate) head: u16,
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    pub(crate) age_us: u64,
    /// What is done for it.
    pub(crate) stage: &'static str,
    /// Its reads and writes of files that are not over.
    pub(crate) transfers: u32,
    /// Something went wrong already.
    pub(crate) failed: bool,
}

/// The threads of a disk, to be asked behind its control plane's back.
#[derive(Debug, Clone)]
pub(crate) struct Witnesses {
    pub(crate) crew: Arc<Crew>,
    pub(crate) number: SeatNumber,
}

impl Dump {
    /// What there is to tell now.
    pub(crate) fn of(berth: &Berth) -> Self {
        let throttle = berth.throttle();
        let group = throttle.group();
        Self {
            name: berth.name().to_owned(),
            connected: berth.is_connected(),
            closing: berth.is_closing(),
            limits: throttle.limits(),
            group: group.as_ref().map(|group| group.name().to_owned()),
            group_limits: group.map(|group| group.limits()),
            held_seats: throttle.held(),
            threads: berth.witnesses().ask(),
            control: look(berth).map(|backend| backend.dump()),
        }
    }
}

impl ImageDump {
    /// What the disk says of itself.
    pub(crate) fn of(images: usize, inside: &Inside) -> Self {
        Self {
            images,
            counted_blocks: inside.counted_blocks,
            blocks_in_image: inside.blocks_in_image,
            fresh_blocks: inside.fresh_blocks,
            stale_blocks: inside.stale_blocks,
            next_file_block: inside.next_file_block,
            blocks_in_transition: inside.blocks_in_transition,
            waiting: inside.waiting,
            wanted_blocks: inside.wanted_blocks,
            has_no_room: inside.has_no_room,
            marked: inside.is_marked,
            failed: inside.is_failed,
            synced: inside.is_synced,
        }
    }
}

impl Witnesses {
    /// Has all threads say what they have of the disk.
    fn ask(&self) -> Vec<ThreadDump> {
        let ask = |thread| {
            let (answer, answers): (Sender<SeatDump>, _) = mpsc::channel();
            let _done = self.crew.send(thread, self.number, Command::Dump(answer));
            answers
        };
        let asked: Vec<_> = (0..self.crew.len()).map(ask).collect();
        let end = Instant::now() + PATIENCE;
        let hear = |(thread, answers): (usize, mpsc::Receiver<SeatDump>)| {
            let left = end.saturating_duration_since(Instant::now());
            let (silent, seat) = match answers.recv_timeout(left) {
                Ok(seat) => (false, Some(seat)),
                // It has no seat for the disk.
                Err(RecvTimeoutError::Disconnected) => (false, None),
                Err(RecvTimeoutError::Timeout) => (true, None),
            };
            ThreadDump {
                thread,
                cpus: self.crew.cpus_of(thread),
                silent,
                seat,
            }
        };
        asked.into_iter().enumerate().map(hear).collect()
    }
}

/// The control plane, if it is not busy for long.
fn look(berth: &Berth) -> Option<MutexGuard<'_, Backend>> {
    let end = Instant::now() + PATIENCE;
    loop {
        match berth.backend().try_lock() {
            Ok(backend) => return Some(backend),
            Err(TryLockError::Poisoned(backend)) => return Some(backend.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= end => return None,
            Err(TryLockError::WouldBlock) => thread::sleep(LOOK),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::backend::tests::two_backends;
    use crate::berth::Door;
    use crate::complaints::About;

    #[test]
    fn a_control_plane_that_is_busy_is_not_waited_for() {
        let [backend, _] = two_backends();
        let (name, door) = ("a".to_owned(), Door::Connected(Mutex::default()));
        let berth = Berth::new(name, &About::default(), door, backend).unwrap();
        assert!(Dump::of(&berth).control.is_some());
        let busy = berth.lock();
        let dump = Dump::of(&berth);
        assert!(dump.control.is_none());
        assert!(dump.threads.iter().all(|thread| !thread.silent));
        drop(busy);
    }
}
