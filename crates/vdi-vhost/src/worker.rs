//! A worker: one thread, one engine, the queues it serves. One loop that a reader can hold in mind:
//!
//! ```text
//! wait ─► hear kicks and commands ─► reap ─► retry ─► take, parse, start ─► commit ─► sync ─► publish, call ─► acknowledge
//! ```
//!
//! - All written reservations of a turn go into one commit, and a queue's guest is called at most once per turn.
//! - While there is work, kicks stay suppressed; nothing ticks, and before it sleeps a worker looks for more work for a moment
//!   at most, and only where that is worth it (`patience`). But a ring without a kick descriptor is looked at every
//!   [`SHORTEST_NAP`] to [`LONGEST_NAP`] while nothing else happens.
//! - Every command is acknowledged when it is done: queues stop and memory changes only with nothing in flight, so
//!   that afterwards no transfer reaches the old memory (R1). Another queue's requests go on meanwhile.
//! - **F2** As soon as memory of the front end's is gone, no more chains are taken, no data become visible in the image and no answers
//!   are given: the control thread is about to end the session.
//! - Requests never wait for each other while holding something (W7), so draining always ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::task::Waker;
use std::time::{Duration, Instant};

use vdi_core::{Flush, Reservation};

use crate::command::{Ack, Command, Doorbell, Setup, Takeover};
use crate::complaints::Complaints;
use crate::dirty::Guest;
use crate::engine::{Engine, Wait};
use crate::inflight::{Active, Context, INLINE_BYTES, Key, Next};
use crate::memory::{self, Memory};
use crate::patience::{LOOK, Patience};
use crate::queue::{BURST, Broken, Mode, Queue};
use crate::request::{self, Refused, Status};
use crate::ring::{Fired, WatchKey};
use crate::transfer::Transfer;
use crate::workers::Served;

/// Transfers of one worker beyond which it takes no more chains: far more than storage profits from, and a bound on
/// the kernel memory that guests can bind.
const MAX_TRANSFERS: usize = 4096;

/// The token of syncs; requests have smaller ones.
const SYNC: u64 = u64::MAX;

/// How soon a ring that nobody kicks is looked at again after chains were found: about what a kick takes.
const SHORTEST_NAP: Duration = Duration::from_micros(50);

/// How late such a ring is looked at after a long time without chains: what a guest may wait for an idle disk. A worker that has
/// nothing else to do then takes 0.9 % of a processor in a debug build (83 looks a second; 2.8 % when this was 1 ms).
const LONGEST_NAP: Duration = Duration::from_millis(10);

/// A nap is longer than the last one by one part in so many: a request that comes after a pause waits about that part of the pause.
const NAP_GROWTH: u32 = 8;

/// Looks for more work between two at the clock.
const LOOKS_PER_CLOCK: u32 = 16;

/// The watch of the doorbell; queues have higher keys.
const DOORBELL: WatchKey = WatchKey(0);

/// A command that waits for something in flight.
enum Pending {
    Pause(u16),
    Stop(u16),
    Guest(Guest),
    Exit,
}

/// One sync for all who wait for one.
struct Sync {
    flush: Flush,
    /// Requests that are committed after it (W2).
    data: Vec<Key>,
    /// What makes their data visible.
    reservations: Vec<Reservation>,
    /// Requests that are answered after it.
    flushes: Vec<Key>,
}

/// The state of the thread.
pub(crate) struct Worker {
    context: Context,
    queues: BTreeMap<u16, Queue>,
    guest: Guest,
    doorbell: Arc<Doorbell>,
    commands: Receiver<(Command, Ack)>,
    /// Syncs go through a descriptor of the worker's own, one at a time: the kernel tells of a lost write once per
    /// descriptor, to whoever syncs first.
    sync_file: Arc<File>,
    /// The sync that is under way.
    syncing: Option<Sync>,
    /// One at a time: the control thread waits for it.
    pending: Option<(Pending, Ack)>,
    next_watch: u32,
    /// How long to sleep next while a ring is polled.
    nap: Duration,
    patience: Patience,
}

impl Worker {
    /// A worker of this thread.
    pub(crate) fn new(
        served: &Served,
        doorbell: Arc<Doorbell>,
        commands: Receiver<(Command, Ack)>,
    ) -> io::Result<Self> {
        let mut engine = Engine::new(served.engine)?;
        engine.watch(DOORBELL, doorbell.watched()?)?;
        let context = Context {
            disk: Arc::clone(&served.disk),
            lane: served.disk.lane(),
            images: Arc::clone(&served.images),
            device: Arc::clone(&served.device),
            engine,
            inline_left: INLINE_BYTES,
            waker: Waker::from(Arc::clone(&doorbell)),
            parked: Vec::new(),
            continuing: Vec::new(),
            complaints: Arc::clone(&served.complaints),
            written: Vec::new(),
            reservations: Vec::new(),
            unsynced: Vec::new(),
            unflushed: Vec::new(),
        };
        let sync_file = served.images[0].file_for_syncs();
        let (queues, next_watch) = (BTreeMap::new(), DOORBELL.0 + 1);
        Ok(Self {
            context,
            queues,
            guest: Guest::none(),
            doorbell,
            commands,
            sync_file,
            syncing: None,
            pending: None,
            next_watch,
            nap: SHORTEST_NAP,
            patience: Patience::default(),
        })
    }

    /// Serves until told to exit.
    pub(crate) fn run(mut self) {
        while self.turn() {}
    }

    /// Does what there is to do, or waits for it first; false if that was the last.
    pub(crate) fn turn(&mut self) -> bool {
        let wait = self.may_wait();
        self.context.engine.turn(wait);
        self.context.inline_left = INLINE_BYTES;
        self.hear();
        self.reap();
        self.retry();
        self.take();
        self.reap();
        self.commit();
        self.sync();
        self.publish();
        !self.acknowledge()
    }

    /// How long there is nothing to do but wait. Asks all guests to kick before it says so.
    fn may_wait(&mut self) -> Wait {
        if !self.context.continuing.is_empty() {
            return Wait::No;
        }
        if self.is_full() || self.is_closed() {
            return Wait::Forever;
        }
        if self.finds_more() {
            self.nap = SHORTEST_NAP;
            return Wait::No;
        }
        let mut sleep = true;
        for (index, queue) in &mut self.queues {
            if queue.is_awake() {
                match queue.sleep(&self.guest) {
                    Ok(asleep) => sleep &= asleep,
                    Err(why) => break_ring(*index, queue, &self.guest, &why, &self.context),
                }
            }
        }
        match sleep {
            false => {
                self.nap = SHORTEST_NAP;
                Wait::No
            }
            true if self.queues.values().any(Queue::is_polled) => {
                let nap = self.nap;
                self.nap = (nap + nap / NAP_GROWTH).min(LONGEST_NAP);
                Wait::AtMost(nap)
            }
            true => Wait::Forever,
        }
    }

    /// Whether there is more to do before guests are asked to kick. Looks for a while if that was worth it lately.
    fn finds_more(&mut self) -> bool {
        if !self.queues.values().any(Queue::is_awake) {
            return false;
        }
        if self.has_more() {
            return true;
        }
        // What was started goes to the kernel by the call that waits.
        if self.context.engine.has_unsubmitted() || !self.patience.looks() {
            return false;
        }
        let start = Instant::now();
        while start.elapsed() < LOOK {
            for _ in 0..LOOKS_PER_CLOCK {
                if self.has_more() {
                    self.patience.found();
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        self.patience.missed();
        false
    }

    fn has_more(&mut self) -> bool {
        let has_chains = |queue: &Queue| queue.is_awake() && queue.has_chains(&self.guest.memory);
        self.queues.values().any(has_chains) || self.context.engine.has_news()
    }

    /// Whether so much is in flight that no more chains are taken.
    fn is_full(&self) -> bool {
        self.context.engine.in_flight() >= MAX_TRANSFERS
    }

    /// Whether no queue may take chains, because the memory is about to change, or gone.
    fn is_closed(&self) -> bool {
        self.is_lost() || matches!(self.pending, Some((Pending::Guest(_) | Pending::Exit, _)))
    }

    /// Whether the front end took back memory that is in use (F2).
    fn is_lost(&self) -> bool {
        memory::is_lost(&self.guest.memory)
    }

    /// Hears kicks and takes the next command.
    fn hear(&mut self) {
        while let Some((key, fired)) = self.context.engine.next_fired() {
            let Some((index, queue)) = self
                .queues
                .iter_mut()
                .find(|(_, queue)| queue.watch == Some(key))
            else {
                continue;
            };
            match fired {
                Fired::Ready => queue.wake(&self.guest),
                Fired::Dead => queue.break_ring(*index, &Broken::Kick, &self.context.complaints),
            }
        }
        while self.pending.is_none() {
            let Ok((command, ack)) = self.commands.try_recv() else {
                return;
            };
            self.obey(command, ack);
        }
    }

    fn obey(&mut self, command: Command, ack: Ack) {
        let mut result = Ok(());
        match command {
            Command::Start(setup, kick, guest) => result = self.start(*setup, kick, guest),
            Command::Rekick(index, kick) => result = self.rekick(index, kick),
            Command::Guest(guest, Takeover::Now) => self.guest = guest,
            Command::Resume(index) => {
                if let Some(queue) = self.queues.get_mut(&index) {
                    queue.resume();
                }
            }
            Command::Pause(index) => return self.pause(index, Pending::Pause(index), ack),
            Command::Stop(index) => return self.pause(index, Pending::Stop(index), ack),
            Command::Guest(guest, Takeover::WhenIdle) => {
                self.pending = Some((Pending::Guest(guest), ack));
                return;
            }
            Command::Exit => {
                self.pending = Some((Pending::Exit, ack));
                return;
            }
        }
        // The control thread waits for it, or has died, and then nobody does.
        let _ = ack.send(result);
    }

    fn start(&mut self, setup: Setup, kick: Option<OwnedFd>, guest: Guest) -> io::Result<()> {
        let watch = kick.map(|kick| self.watch(kick)).transpose()?;
        self.guest = guest;
        self.queues.insert(setup.index, Queue::new(setup, watch));
        Ok(())
    }

    fn rekick(&mut self, index: u16, kick: Option<OwnedFd>) -> io::Result<()> {
        let watch = kick.map(|kick| self.watch(kick)).transpose()?;
        if let Some(queue) = self.queues.get_mut(&index) {
            if let Some(before) = std::mem::replace(&mut queue.watch, watch) {
                self.context.engine.unwatch(before);
            }
            queue.wake(&self.guest);
        }
        Ok(())
    }

    fn watch(&mut self, kick: OwnedFd) -> io::Result<WatchKey> {
        let key = WatchKey(self.next_watch);
        self.next_watch = self.next_watch.checked_add(1).unwrap_or(DOORBELL.0 + 1);
        self.context.engine.watch(key, kick)?;
        Ok(key)
    }

    fn pause(&mut self, index: u16, then: Pending, ack: Ack) {
        if let Some(queue) = self.queues.get_mut(&index)
            && queue.mode == Mode::Running
        {
            queue.mode = Mode::Paused;
        }
        self.pending = Some((then, ack));
    }

    /// Takes the results of transfers to their requests.
    fn reap(&mut self) {
        while let Some(finished) = self.context.engine.next_finished() {
            if finished.token == SYNC {
                self.synced(finished.result);
                continue;
            }
            let key = Key::from_token(finished.token);
            self.step(key, |active, context| {
                active.transferred(finished.result, context)
            });
        }
    }

    /// Goes on with large requests, and tries parked ones again if something changed for them.
    fn retry(&mut self) {
        for key in std::mem::take(&mut self.context.continuing) {
            self.step(key, Active::go_on);
        }
        if self.doorbell.wants_retry() {
            for key in std::mem::take(&mut self.context.parked) {
                self.step(key, Active::go_on);
            }
        }
    }

    /// Does one step of a request and answers it if that was the last.
    fn step(&mut self, key: Key, step: impl FnOnce(&mut Active, &mut Context) -> Next) {
        let Some(queue) = self.queues.get_mut(&key.queue) else {
            return;
        };
        let Some(active) = queue.active(key.head) else {
            return;
        };
        if let Next::Answer(status, data_bytes) = step(active, &mut self.context)
            && let Some(active) = queue.release(key.head)
        {
            answer(
                queue,
                &self.guest.memory,
                active,
                status,
                data_bytes,
                &self.context.complaints,
            );
        }
    }

    /// Takes chains from all queues that may have some, and starts their requests.
    fn take(&mut self) {
        if self.is_closed() {
            return;
        }
        let indexes = self.queues.iter().filter(|(_, queue)| queue.is_awake());
        for index in indexes
            .map(|(index, _)| *index)
            .collect::<smallvec::SmallVec<[u16; 8]>>()
        {
            if self.is_full() {
                return;
            }
            let Some(queue) = self.queues.get_mut(&index) else {
                continue;
            };
            if let Err(why) = take_from(index, queue, &self.guest, &mut self.context) {
                break_ring(index, queue, &self.guest, &why, &self.context);
            }
        }
    }

    /// Starts one sync for all who wait for one, unless one is under way.
    fn sync(&mut self) {
        let context = &mut self.context;
        let nobody = context.unsynced.is_empty() && context.unflushed.is_empty();
        if nobody || self.syncing.is_some() {
            return;
        }
        let (data, reservations) = context.unsynced.drain(..).unzip();
        self.syncing = Some(Sync {
            flush: context.disk.begin_data_sync(),
            data,
            reservations,
            flushes: std::mem::take(&mut context.unflushed),
        });
        let sync = Transfer::sync(SYNC, Arc::clone(&self.sync_file));
        context.engine.start(sync, false);
    }

    /// Answers who waited for the sync; data that did go into the turn's commit (W2).
    fn synced(&mut self, result: io::Result<()>) {
        let Some(mut sync) = self.syncing.take() else {
            return;
        };
        let disk = &self.context.disk;
        let result = disk.end_data_sync(sync.flush, result, &mut sync.reservations);
        let result = result.map_err(Arc::new);
        let result = result.as_ref().copied();
        for key in sync.flushes {
            self.step(key, |active, _| active.durable(result));
        }
        if result.is_ok() {
            self.context.written.append(&mut sync.data);
            self.context.reservations.append(&mut sync.reservations);
            return;
        }
        drop(sync.reservations);
        for key in sync.data {
            self.step(key, |active, context| active.committed(result, context));
        }
    }

    /// Makes the turn's writes visible (W3), all in one.
    fn commit(&mut self) {
        if self.context.written.is_empty() {
            return;
        }
        let written = std::mem::take(&mut self.context.written);
        if self.is_lost() {
            self.context.reservations.clear();
            for key in written {
                self.step(key, |active, _| active.abandon());
            }
            return;
        }
        let result = self
            .context
            .disk
            .commit(&mut self.context.reservations)
            .map_err(Arc::new);
        self.context.reservations.clear();
        for key in written {
            self.step(key, |active, context| {
                active.committed(result.as_ref().copied(), context)
            });
        }
    }

    fn publish(&mut self) {
        // All that was written of the guest's memory for these answers is written.
        if self.is_lost() {
            self.queues.values_mut().for_each(Queue::withhold);
            return;
        }
        for (index, queue) in &mut self.queues {
            if let Err(why) = queue.publish(&self.guest) {
                break_ring(*index, queue, &self.guest, &why, &self.context);
            }
        }
    }

    /// Acknowledges the pending command if what it waits for has happened; true if that was the last.
    fn acknowledge(&mut self) -> bool {
        let busy = |queue: &Queue| queue.in_flight() > 0;
        let wait = match &self.pending {
            None => return false,
            Some((Pending::Pause(index) | Pending::Stop(index), _)) => {
                self.queues.get(index).is_some_and(busy)
            }
            Some((Pending::Guest(_) | Pending::Exit, _)) => self.queues.values().any(busy),
        };
        let (false, Some((pending, ack))) = (wait, self.pending.take_if(|_| !wait)) else {
            return false;
        };
        match pending {
            Pending::Pause(_) => {}
            Pending::Stop(index) => {
                if let Some(watch) = self.queues.remove(&index).and_then(|queue| queue.watch) {
                    self.context.engine.unwatch(watch);
                }
            }
            Pending::Guest(guest) => self.guest = guest,
            Pending::Exit => {
                let _ = ack.send(Ok(()));
                return true;
            }
        }
        let _ = ack.send(Ok(()));
        // The next command may have come while this one waited.
        self.doorbell.ring();
        false
    }
}

/// Takes one burst of chains from a queue.
fn take_from(
    index: u16,
    queue: &mut Queue,
    guest: &Guest,
    context: &mut Context,
) -> Result<(), Broken> {
    let memory = &guest.memory;
    let heads = queue.take_heads(memory)?;
    debug_assert!(heads.len() <= usize::from(BURST));
    for head in heads {
        let chain = queue.walk(memory, head);
        let parsed = chain.map(|chain| request::parse(guest, chain, head, &context.device));
        if memory::is_lost(memory) {
            return Ok(()); // F2
        }
        match parsed? {
            Ok((reply, request)) => {
                if let Some(bytes) = context.at_once(&request) {
                    if memory::is_lost(memory) {
                        return Ok(()); // F2
                    }
                    queue.give_back(reply.send(memory, Status::Ok, bytes));
                    continue;
                }
                let key = Key { queue: index, head };
                let (active, next) = Active::start(key, reply, request, context);
                match next {
                    Next::Wait => queue.keep(head, active),
                    Next::Answer(status, bytes) => {
                        answer(queue, memory, active, status, bytes, &context.complaints);
                    }
                }
            }
            Err(Refused::WithStatus(reply, status)) => {
                if status == Status::IoError {
                    let line = format_args!("queue {index}: the guest sent an impossible request");
                    context.complaints.warn(line);
                }
                queue.give_back(reply.send(memory, status, 0));
            }
            Err(Refused::Unanswerable) => return Err(Broken::Unanswerable { head }),
        }
    }
    Ok(())
}

/// Leaves a ring alone that the guest broke, unless it was the front end that took it away.
fn break_ring(index: u16, queue: &mut Queue, guest: &Guest, why: &Broken, context: &Context) {
    if !memory::is_lost(&guest.memory) {
        queue.break_ring(index, why, &context.complaints);
    }
}

/// Answers a request that is over (R2).
fn answer(
    queue: &mut Queue,
    memory: &Memory,
    active: Active,
    status: Status,
    data_bytes: u64,
    complaints: &Complaints,
) {
    let (reply, failure) = active.finish();
    if memory::is_lost(memory) {
        return; // F2: the front end is about to hear that the session is over.
    }
    if let Some(failure) = failure {
        failure.tell(complaints);
    }
    queue.give_back(reply.send(memory, status, data_bytes));
}
