//! A disk's seat at a worker: the queues of one disk that one thread serves, and all that is between a chain and its answer.
//!
//! The thread and its engine are the worker's and serve other seats too (`worker`); nothing of one seat is another's. What a seat
//! does in a turn:
//!
//! ```text
//! obey ─► (reap) ─► retry ─► take, parse, start ─► (reap) ─► commit ─► publish, call ─► acknowledge ─► sync
//! ```
//!
//! - All written reservations of a turn go into one commit, and a queue's guest is called once per turn at most, or both twice if the seat is settled
//!   before others move much (`worker`). But several writes that change no entry are committed, and several answers shown, while the rest of the turn's
//!   results is dealt with: a guest that looks for them has the next requests ready sooner.
//! - Every command is acknowledged when it is done: queues stop and memory changes only with nothing in flight, so
//!   that afterwards no transfer reaches the old memory (R1). Another queue's requests go on meanwhile, and other seats' in any case.
//!   What an earlier daemon left in flight counts, whether it was started again or not: a front end that stops a queue may forget
//!   the record of it. Only a queue that was never enabled here leaves it there.
//! - **F2** As soon as memory of the front end's is gone, no more chains are taken, no data become visible in the image and no answers
//!   are given: the control thread is about to end the session.
//! - Requests never wait for each other while holding something (W7), so draining always ends.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;

use smallvec::SmallVec;
use vdi_core::{Flush, Reservation};

use crate::clock::Moment;
use crate::command::{Ack, Command, Doorbell, SeatBell, SeatNumber, Setup, Takeover};
use crate::complaints::Complaints;
use crate::dirty::Guest;
use crate::dump::{OLDEST, SeatDump};
use crate::gate::Gate;
use crate::inflight::{Active, Context, Desk, Key, Next, Tools};
use crate::lone::Lone;
use crate::memory;
use crate::portion::{Portion, REQUEST_BYTES};
use crate::promptness::Promptness;
use crate::queue::{BURST, Broken, Mode, Queue, SEVERAL};
use crate::request::{self, Refused, Request, Status};
use crate::ring::Fired;
use crate::sharer::Shared;
use crate::transfer::{Finished, Transfer};
use crate::workers::Served;

/// A command that waits for something in flight.
enum Pending {
    Pause(u16),
    Stop(u16),
    Guest(Guest),
    Leave,
}

impl Pending {
    /// Whether it waits for this queue, which then takes nothing new.
    fn is_about(&self, index: u16) -> bool {
        match self {
            Self::Pause(paused) => *paused == index,
            Self::Stop(stopped) => *stopped == index,
            Self::Guest(_) | Self::Leave => true,
        }
    }

    /// What it is called in a dump.
    fn name(&self) -> &'static str {
        match self {
            Self::Pause(_) => "pause",
            Self::Stop(_) => "stop",
            Self::Guest(_) => "memory",
            Self::Leave => "leave",
        }
    }
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
    began: Moment,
}

/// Who waits for a sync that is done on the worker's time, but for those who want it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Others {
    /// Requests at some seat of the worker.
    Wait,
    /// As far as the worker can see, nobody.
    NoneKnown,
}

/// One disk at one thread.
pub(crate) struct Seat {
    number: SeatNumber,
    desk: Desk,
    queues: BTreeMap<u16, Queue>,
    guest: Guest,
    bell: Arc<SeatBell>,
    /// Syncs go through a descriptor of the seat's own, one at a time: the kernel tells of a lost write once per
    /// descriptor, to whoever syncs first.
    sync_file: Arc<File>,
    /// The sync that is under way.
    syncing: Option<Sync>,
    promptness: Promptness,
    /// Commands that were not looked at.
    inbox: VecDeque<(Command, Ack)>,
    /// One at a time: the control thread waits for it.
    pending: Option<(Pending, Ack)>,
    /// The queue that is the first to take chains: the one that could not, since there was too much in flight.
    first: u16,
    gate: Gate,
    /// Since when, as far as that is counted, and until when chains wait for a limit.
    held: Option<(Moment, Moment)>,
    /// Whether the worker looks at this seat in every turn.
    pub(crate) is_active: bool,
    /// Whether the worker counts it among those that have queues.
    pub(crate) is_counted: bool,
    /// Whether it goes before others in this turn.
    pub(crate) goes_first: bool,
    /// Whether others had all of this turn's bytes before it was asked.
    pub(crate) came_late: bool,
}

impl Seat {
    /// A seat for a disk, without queues.
    pub(crate) fn new(
        number: SeatNumber,
        served: Served,
        sync_file: Arc<File>,
        doorbell: &Arc<Doorbell>,
    ) -> Self {
        let bell = Arc::new(SeatBell::new(Arc::clone(doorbell), number));
        let desk = Desk {
            lane: served.disk.lane(),
            disk: served.disk,
            images: served.images,
            device: served.device,
            complaints: served.complaints,
            waker: Waker::from(Arc::clone(&bell)),
            transfers: 0,
            lone: Lone::default(),
            portion: Portion::default(),
            tally: served.stats.sit(),
            parked: Vec::new(),
            continuing: Vec::new(),
            written: Vec::new(),
            reservations: Vec::new(),
            unsynced: Vec::new(),
            unflushed: Vec::new(),
        };
        Self {
            number,
            desk,
            queues: BTreeMap::new(),
            guest: Guest::none(),
            bell,
            sync_file,
            syncing: None,
            promptness: Promptness::default(),
            inbox: VecDeque::new(),
            pending: None,
            first: 0,
            gate: Gate::new(served.throttle),
            held: None,
            is_active: false,
            is_counted: false,
            goes_first: false,
            came_late: false,
        }
    }

    /// Its number.
    pub(crate) fn number(&self) -> SeatNumber {
        self.number
    }

    /// Whether its requests were small and few of late.
    pub(crate) fn is_light(&self) -> bool {
        self.desk.portion.is_light()
    }

    /// Does what is due, and takes chains.
    pub(crate) fn begin(&mut self, tools: &mut Tools) {
        self.obey(tools);
        self.retry(tools);
        self.take(tools);
    }

    /// Whether it has queues, and so may have transfers.
    pub(crate) fn has_queues(&self) -> bool {
        !self.queues.is_empty()
    }

    /// Whether there is something to do in the next turn, whatever is heard till then.
    pub(crate) fn is_due(&self) -> bool {
        !self.desk.continuing.is_empty() || (self.pending.is_none() && !self.inbox.is_empty())
    }

    /// Whether there may be chains to take.
    pub(crate) fn is_awake(&self) -> bool {
        let mut queues = self.queues.iter();
        queues.any(|(index, queue)| self.may_take(*index, queue))
    }

    /// Whether there may be chains to take from a queue, and it may take them.
    fn may_take(&self, index: u16, queue: &Queue) -> bool {
        queue.is_awake() && (queue.is_recovering() || !self.is_ending(index))
    }

    /// Whether a queue takes nothing but what an earlier daemon left in flight.
    fn is_ending(&self, index: u16) -> bool {
        let pending = self.pending.as_ref();
        pending.is_some_and(|(pending, _)| pending.is_about(index))
    }

    /// Whether queues may take chains now.
    pub(crate) fn is_open(&self, tools: &Tools) -> bool {
        let is_recovering = |queue: &Queue| queue.is_awake() && queue.is_recovering();
        let is_held = self.held.is_some_and(|(_, until)| tools.now < until)
            && !self.queues.values().any(is_recovering);
        !self.is_closed() && self.desk.transfers < tools.share && !is_held
    }

    /// Until when chains wait for a limit, if they do. Queues stay awake meanwhile: there is nothing to hear of them.
    pub(crate) fn held_until(&self) -> Option<Moment> {
        self.held.map(|(_, until)| until)
    }

    /// Whether there are chains to take.
    pub(crate) fn has_chains(&self) -> bool {
        let mut queues = self.queues.iter();
        queues.any(|(index, queue)| {
            self.may_take(*index, queue) && queue.has_chains(&self.guest.memory)
        })
    }

    /// Whether nobody will say that there are chains to take.
    pub(crate) fn is_polled(&self) -> bool {
        self.queues.values().any(Queue::is_polled)
    }

    /// Asks the guest to kick; true if nothing came in meanwhile.
    pub(crate) fn sleep(&mut self) -> bool {
        let (mut sleep, pending) = (true, &self.pending);
        for (index, queue) in &mut self.queues {
            let is_ending = pending
                .as_ref()
                .is_some_and(|(pending, _)| pending.is_about(*index));
            if queue.is_awake() && !is_ending {
                match queue.sleep(&self.guest) {
                    Ok(asleep) => sleep &= asleep,
                    Err(why) => {
                        break_ring(*index, queue, &self.guest, &why, &self.desk.complaints);
                    }
                }
            }
        }
        sleep
    }

    /// Hears a kick.
    pub(crate) fn hear(&mut self, index: u16, fired: Fired) {
        let Some(queue) = self.queues.get_mut(&index) else {
            return;
        };
        match fired {
            Fired::Ready => queue.wake(&self.guest),
            Fired::Dead => queue.break_ring(index, &Broken::Kick, &self.desk.complaints),
        }
    }

    /// Takes a command, to be obeyed by [`Seat::obey`].
    pub(crate) fn receive(&mut self, command: Command, ack: Ack) {
        self.inbox.push_back((command, ack));
    }

    /// Does what it was told, as far as that needs no waiting.
    fn obey(&mut self, tools: &mut Tools) {
        while self.pending.is_none()
            && let Some((command, ack)) = self.inbox.pop_front()
        {
            self.do_command(command, ack, tools);
        }
    }

    fn do_command(&mut self, command: Command, ack: Ack, tools: &mut Tools) {
        let mut result = Ok(());
        match command {
            // It has one, and the worker tells how it is.
            Command::Sit(..) | Command::Dump(_) => {}
            Command::Start(setup, kick, guest) => result = self.start(*setup, kick, guest, tools),
            Command::Rekick(index, kick) => result = self.rekick(index, kick, tools),
            Command::Guest(guest, Takeover::Now) => self.guest = guest,
            Command::Resume(index) => {
                if let Some(queue) = self.queues.get_mut(&index) {
                    queue.resume();
                }
            }
            Command::Pause(index) => return self.pending = Some((Pending::Pause(index), ack)),
            Command::Stop(index) => return self.pending = Some((Pending::Stop(index), ack)),
            Command::Guest(guest, Takeover::WhenIdle) => {
                return self.pending = Some((Pending::Guest(guest), ack));
            }
            Command::Leave => return self.pending = Some((Pending::Leave, ack)),
        }
        // The control thread waits for it, or has died, and then nobody does.
        let _ = ack.send(result);
    }

    fn start(
        &mut self,
        setup: Setup,
        kick: Option<OwnedFd>,
        guest: Guest,
        tools: &mut Tools,
    ) -> io::Result<()> {
        let whose = (self.number, setup.index);
        let watch = kick.map(|kick| tools.watch(whose, kick)).transpose()?;
        self.guest = guest;
        self.desk.tally.restarted(setup.left_behind.len());
        self.queues.insert(setup.index, Queue::new(setup, watch));
        Ok(())
    }

    fn rekick(&mut self, index: u16, kick: Option<OwnedFd>, tools: &mut Tools) -> io::Result<()> {
        let whose = (self.number, index);
        let watch = kick.map(|kick| tools.watch(whose, kick)).transpose()?;
        if let Some(queue) = self.queues.get_mut(&index) {
            if let Some(before) = std::mem::replace(&mut queue.watch, watch) {
                tools.unwatch(before);
            }
            queue.wake(&self.guest);
        }
        Ok(())
    }

    /// Whether no queue may take chains, because the memory is gone, or the disk about to.
    fn is_closed(&self) -> bool {
        self.is_lost() || matches!(self.pending, Some((Pending::Leave, _)))
    }

    /// Whether the front end took back memory that is in use (F2).
    fn is_lost(&self) -> bool {
        memory::is_lost(&self.guest.memory)
    }

    /// Takes the result of a transfer to its request.
    pub(crate) fn finished(&mut self, key: Key, finished: Finished, tools: &mut Tools) {
        self.desk.transfers -= 1;
        self.desk.lone.finished(&finished);
        if finished.result.as_ref().is_err_and(memory::is_missing) {
            memory::suspect(&self.guest.memory);
        }
        if key.is_sync() {
            self.synced(finished.result, tools);
        } else {
            self.step(key, tools, |active, context| {
                active.transferred(finished.result, context)
            });
            self.show_several(key.queue, tools);
        }
    }

    /// Has the guest see what was answered, if that is several and costs no write to the image.
    fn show_several(&mut self, index: u16, tools: &mut Tools) {
        let changes =
            |reservations: &[Reservation]| reservations.iter().any(Reservation::changes_entries);
        if self.desk.written.len() >= SEVERAL && !changes(&self.desk.reservations) {
            self.commit(tools);
        }
        if self.is_lost() {
            return;
        }
        if let Some(queue) = self.queues.get_mut(&index)
            && let Err(why) = queue.show_several(&self.guest)
        {
            break_ring(index, queue, &self.guest, &why, &self.desk.complaints);
        }
    }

    /// Takes the result of extents that were to be shared to its request.
    pub(crate) fn shared(&mut self, shared: Shared, tools: &mut Tools) {
        self.desk.transfers -= 1;
        self.step(shared.key, tools, |active, context| {
            active.shared(shared, context)
        });
    }

    /// Goes on with large requests, and tries parked ones again if something changed for them.
    fn retry(&mut self, tools: &mut Tools) {
        for key in std::mem::take(&mut self.desk.continuing) {
            self.step(key, tools, Active::go_on);
        }
        if self.bell.wants_retry() {
            for key in std::mem::take(&mut self.desk.parked) {
                self.step(key, tools, Active::go_on);
            }
        }
    }

    /// Does one step of a request and answers it if that was the last.
    fn step(
        &mut self,
        key: Key,
        tools: &mut Tools,
        step: impl FnOnce(&mut Active, &mut Context<'_>) -> Next,
    ) {
        let Some(queue) = self.queues.get_mut(&key.queue) else {
            return;
        };
        let Some(active) = queue.active(key.head) else {
            return;
        };
        let desk = &mut self.desk;
        let mut context = Context { desk, tools };
        if let Next::Answer(status, data_bytes) = step(active, &mut context)
            && let Some(active) = queue.release(key.head)
        {
            let answer = (status, data_bytes);
            send_answer(queue, &self.guest, active, answer, &mut self.desk);
        }
    }

    /// Takes chains from all queues that may have some, and starts their requests.
    fn take(&mut self, tools: &mut Tools) {
        let held = self.held.take();
        if !self.is_closed() {
            self.take_from_all(tools, held.is_some());
            self.desk.portion.end_turn();
        }
        if let Some((since, _)) = held {
            self.desk.tally.was_held(tools.now.since(since));
        }
        if held.is_some() != self.held.is_some() {
            self.gate.set_held(self.held.is_some());
        }
    }

    fn take_from_all(&mut self, tools: &mut Tools, was_held: bool) {
        let is_limited = self.gate.is_limited();
        let awake = self.queues.iter();
        let awake = awake.filter(|(index, queue)| self.may_take(**index, queue));
        let mut awake: SmallVec<[u16; 8]> = awake.map(|(index, _)| *index).collect();
        let first = std::mem::take(&mut self.first);
        let before = awake.partition_point(|index| *index < first);
        awake.rotate_left(before);
        for index in awake {
            let most = self.desk.portion.chains(tools.turn_left);
            if tools.is_full() || self.desk.transfers >= tools.share || most == 0 {
                self.first = index;
                return;
            }
            let is_ending = self.is_ending(index);
            let Some(queue) = self.queues.get_mut(&index) else {
                continue;
            };
            let desk = &mut self.desk;
            let mut context = Context { desk, tools };
            let whose = (self.number, index);
            // Of a queue that is ending, one burst is all from before.
            let taken = if is_limited && !is_ending {
                let gate = (&mut self.gate, was_held);
                take_as_limited(whose, queue, &self.guest, most, gate, &mut context)
            } else {
                take_from(whose, queue, &self.guest, most, &mut context).map(|_| None)
            };
            self.desk.portion.end();
            match taken {
                Ok(None) => {}
                Ok(Some(until)) => {
                    // Others may have chains that are not held.
                    if self.held.is_none() {
                        self.first = index;
                    }
                    self.held = Some((tools.now, until));
                }
                Err(why) => break_ring(index, queue, &self.guest, &why, &self.desk.complaints),
            }
        }
    }

    /// How it is.
    pub(crate) fn dump(&self, tools: &Tools) -> SeatDump {
        let (now, desk) = (tools.now, &self.desk);
        let us = |until: Moment, since: Moment| until.since(since) / 1000;
        let queues = self.queues.iter();
        let mut oldest: Vec<_> = queues
            .clone()
            .flat_map(|(_, queue)| queue.requests())
            .map(|active| active.dump(now))
            .collect();
        oldest.sort_by_key(|request| std::cmp::Reverse(request.age_us));
        oldest.truncate(OLDEST);
        SeatDump {
            queues: queues
                .map(|(index, queue)| queue.dump(*index, &self.guest.memory))
                .collect(),
            transfers: desk.transfers,
            parked: desk.parked.len(),
            continuing: desk.continuing.len(),
            unsynced: desk.unsynced.len() + desk.unflushed.len(),
            sync_age_us: self.syncing.as_ref().map(|sync| us(now, sync.began)),
            held_for_us: self.held.map(|(_, until)| us(until, tools.now)),
            pending: self.pending.as_ref().map(|(pending, _)| pending.name()),
            commands: self.inbox.len(),
            memory_lost: self.is_lost(),
            oldest,
        }
    }

    /// Ends the turn: what was written becomes visible, what is over is answered. Syncs are begun after that.
    pub(crate) fn settle(&mut self, tools: &mut Tools) {
        self.commit(tools);
        self.publish();
    }

    /// Whether somebody waits for a sync that can begin.
    pub(crate) fn wants_sync(&self) -> bool {
        let somebody = !self.desk.unsynced.is_empty() || !self.desk.unflushed.is_empty();
        somebody && self.syncing.is_none()
    }

    /// How many waits of the thread's the seat wants at most: for a sync, and for a write that may be alone.
    pub(crate) fn wants_waits(&self) -> u32 {
        u32::from(self.wants_sync()) + u32::from(self.desk.lone.is_waiting())
    }

    /// Starts the write that was kept until the end of the turn. `others` says who else would wait for it.
    pub(crate) fn start_lone(&mut self, tools: &mut Tools, others: Others) {
        self.desk.lone.start(&mut tools.engine, others);
    }

    /// Starts one sync for all who wait for one, if it can begin. `others` says who else would wait for it.
    pub(crate) fn sync(&mut self, tools: &mut Tools, others: Others) {
        if !self.wants_sync() {
            return;
        }
        let flush = self.desk.disk.begin_data_sync();
        let inline = self.may_sync_inline(&flush, others);
        let desk = &mut self.desk;
        let (data, reservations) = desk.unsynced.drain(..).unzip();
        self.syncing = Some(Sync {
            flush,
            data,
            reservations,
            flushes: std::mem::take(&mut desk.unflushed),
            began: Moment::now(),
        });
        let token = Key::sync(self.number).token();
        let sync = Transfer::sync(token, Arc::clone(&self.sync_file));
        Context { desk, tools }.start(sync, inline);
    }

    /// Whether the next sync is done on the worker's time: a ring hands it to a helper thread of the kernel, which costs two
    /// switches. Not if anybody is known who would wait for it, or if it may take long.
    fn may_sync_inline(&self, flush: &Flush, others: Others) -> bool {
        if self.desk.images[0].syncs_are_free() {
            return true;
        }
        others == Others::NoneKnown
            && self.desk.unsynced.is_empty()
            && self.promptness.expects(flush.unsynced_bytes())
    }

    /// Answers who waited for the sync; data that did go into the turn's commit (W2).
    fn synced(&mut self, result: io::Result<()>, tools: &mut Tools) {
        let Some(mut sync) = self.syncing.take() else {
            return;
        };
        let nanos = Moment::now().since(sync.began);
        self.promptness.took(Duration::from_nanos(nanos));
        self.desk.tally.synced(nanos, result.is_ok());
        let disk = &self.desk.disk;
        let result = disk.end_data_sync(sync.flush, result, &mut sync.reservations);
        let result = result.map_err(Arc::new);
        let result = result.as_ref().copied();
        for key in sync.flushes {
            self.step(key, tools, |active, _| active.durable(result));
        }
        if result.is_ok() {
            self.desk.written.append(&mut sync.data);
            self.desk.reservations.append(&mut sync.reservations);
            return;
        }
        drop(sync.reservations);
        for key in sync.data {
            self.step(key, tools, |active, context| {
                active.committed(result, context)
            });
        }
    }

    /// Makes the turn's writes visible (W3), all in one.
    fn commit(&mut self, tools: &mut Tools) {
        if self.desk.written.is_empty() {
            return;
        }
        let written = std::mem::take(&mut self.desk.written);
        if self.is_lost() {
            self.desk.reservations.clear();
            for key in written {
                self.step(key, tools, |active, _| active.abandon());
            }
            return;
        }
        let reservations = &mut self.desk.reservations;
        let result = self.desk.disk.commit(reservations).map_err(Arc::new);
        self.desk.reservations.clear();
        for key in written {
            self.step(key, tools, |active, context| {
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
                break_ring(*index, queue, &self.guest, &why, &self.desk.complaints);
            }
        }
    }

    /// Counts what this turn brought about; its answers are published.
    pub(crate) fn account(&mut self, began: Moment, ended: Moment) {
        let in_flight = self.queues.values().map(Queue::in_flight).sum();
        self.desk.tally.turn_is_over(began, ended, in_flight);
    }

    /// Acknowledges the pending command if what it waits for has happened; what to acknowledge when the seat is gone.
    pub(crate) fn acknowledge(&mut self, tools: &mut Tools) -> Option<Ack> {
        let is_lost = self.is_lost();
        let has_left = |queue: &Queue| queue.mode == Mode::Running && queue.is_recovering();
        let busy = |queue: &Queue| queue.in_flight() > 0 || (has_left(queue) && !is_lost);
        let wait = match &self.pending {
            None => return None,
            Some((Pending::Pause(index) | Pending::Stop(index), _)) => {
                self.queues.get(index).is_some_and(busy)
            }
            Some((Pending::Guest(_), _)) => self.queues.values().any(busy),
            // What is left is recorded, and for the next one.
            Some((Pending::Leave, _)) => self.queues.values().any(|queue| queue.in_flight() > 0),
        };
        if wait {
            return None;
        }
        let (pending, ack) = self.pending.take()?;
        match pending {
            Pending::Pause(index) => {
                if let Some(queue) = self.queues.get_mut(&index) {
                    queue.pause();
                }
            }
            Pending::Stop(index) => {
                if let Some(watch) = self.queues.remove(&index).and_then(|queue| queue.watch) {
                    tools.unwatch(watch);
                }
            }
            Pending::Guest(guest) => self.guest = guest,
            Pending::Leave => {
                for queue in std::mem::take(&mut self.queues).into_values() {
                    queue
                        .watch
                        .into_iter()
                        .for_each(|watch| tools.unwatch(watch));
                }
                assert_eq!(self.desk.transfers, 0, "R1: what is in flight has an owner");
                return Some(ack);
            }
        }
        let _ = ack.send(Ok(()));
        None
    }
}

/// Takes up to `most` chains from a queue, as far as limits let it; until when the next one is held.
fn take_as_limited(
    whose: (SeatNumber, u16),
    queue: &mut Queue,
    guest: &Guest,
    most: u16,
    (gate, was_held): (&mut Gate, bool),
    context: &mut Context<'_>,
) -> Result<Option<Moment>, Broken> {
    let now = context.tools.now;
    for _ in 0..most {
        if !queue.is_awake() {
            break;
        }
        if queue.is_recovering() {
            take_from(whose, queue, guest, 1, context)?;
            continue;
        }
        if !queue.has_chains(&guest.memory) {
            break;
        }
        if let Err(until) = gate.admit(now) {
            return Ok(Some(until));
        }
        let moved = take_from(whose, queue, guest, 1, context)?;
        gate.charge(now, moved);
        context.desk.tally.throttled(u64::from(was_held));
    }
    Ok(None)
}

/// Takes up to `most` chains from a queue; how many bytes they move.
fn take_from(
    (seat, index): (SeatNumber, u16),
    queue: &mut Queue,
    guest: &Guest,
    most: u16,
    context: &mut Context<'_>,
) -> Result<u64, Broken> {
    let memory = &guest.memory;
    let mut moved = 0;
    let is_new = !queue.is_recovering();
    let heads = queue.take_heads(memory, most)?;
    debug_assert!(heads.len() <= usize::from(BURST));
    for (nth, &head) in heads.iter().enumerate() {
        if is_new && queue.is_full() {
            queue.put_back(&heads[nth..])?;
            break;
        }
        let chain = queue.walk(memory, head);
        let device = &context.desk.device;
        let parsed = chain.map(|chain| request::parse(guest, chain, head, device));
        if memory::is_lost(memory) {
            return Ok(moved); // F2
        }
        match parsed? {
            Ok((reply, request)) => {
                let data_bytes = match &request {
                    Request::Read { into: data, .. } | Request::Write { from: data, .. } => {
                        data.len()
                    }
                    Request::Zero { .. } | Request::Flush | Request::GetId { .. } => 0,
                };
                moved += data_bytes;
                context.desk.portion.add(data_bytes);
                context
                    .tools
                    .moves(REQUEST_BYTES.saturating_sub(data_bytes));
                if let Some(bytes) = context.at_once(&request) {
                    if memory::is_lost(memory) {
                        return Ok(moved); // F2
                    }
                    let tally = &mut context.desk.tally;
                    tally.at_once(request.kind(), request.bytes());
                    queue.give_back(reply.send(memory, Status::Ok, bytes));
                    continue;
                }
                let key = Key {
                    seat,
                    queue: index,
                    head,
                };
                let (active, next) = Active::start(key, reply, request, context);
                match next {
                    Next::Wait => queue.keep(head, active),
                    Next::Answer(status, bytes) => {
                        send_answer(queue, guest, active, (status, bytes), context.desk);
                    }
                }
            }
            Err(Refused::WithStatus(reply, status)) => {
                context.desk.tally.refused();
                if status == Status::IoError {
                    let line = format_args!("queue {index}: the guest sent an impossible request");
                    context.desk.complaints.warn(line);
                }
                queue.give_back(reply.send(memory, status, 0));
            }
            Err(Refused::Unanswerable) => return Err(Broken::Unanswerable { head }),
        }
    }
    Ok(moved)
}

/// Leaves a ring alone that the guest broke, unless it was the front end that took it away.
fn break_ring(index: u16, queue: &mut Queue, guest: &Guest, why: &Broken, complaints: &Complaints) {
    if !memory::is_lost(&guest.memory) {
        queue.break_ring(index, why, complaints);
    }
}

/// Answers a request that is over (R2), with a status and the bytes of data that were written to its buffers.
fn send_answer(
    queue: &mut Queue,
    guest: &Guest,
    active: Active,
    (status, data_bytes): (Status, u64),
    desk: &mut Desk,
) {
    let (reply, failure, ticket) = active.finish();
    let memory = &guest.memory;
    if memory::is_lost(memory) {
        return; // F2: the front end is about to hear that the session is over.
    }
    if let Some(failure) = failure {
        failure.tell(&desk.complaints);
    }
    desk.tally.over(ticket, status);
    queue.give_back(reply.send(memory, status, data_bytes));
}
