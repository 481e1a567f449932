//! A worker: one thread, one engine, the seats of the disks whose queues it serves. One loop that a reader can hold in mind:
//!
//! ```text
//! wait ─► hear kicks and commands ─► reap ─► each seat begins ─► reap ─► each seat settles ─► syncs, lone writes
//! ```
//!
//! - Only seats that have something are looked at (`active`): one that was kicked, told something, has a result, a retry, or a queue
//!   whose guest was not asked to kick. So idle disks cost a turn nothing, however many they are.
//! - While there is work, kicks stay suppressed; nothing ticks, and before it sleeps a worker looks for more work for a moment
//!   at most, and only where that is worth it (`patience`). But a ring without a kick descriptor is looked at every
//!   [`SHORTEST_NAP`] to [`LONGEST_NAP`] while nothing else happens.
//! - No seat has more than its share of the transfers ([`MAX_TRANSFERS`]), but for the burst that goes over it; every turn begins with another
//!   seat. Seats whose requests are small and few go before the others and answer what they can before those begin with theirs (`portion`).
//! - Answers are published before a sync or a write into fresh room is begun: one that is done on this thread's time holds up all its
//!   seats, so it is only if there is nothing else to do at any of them (`promptness`, `lone`).
//!
//! Not here: what a seat does (`seat`).

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use crate::clock::{self, Moment};
use crate::command::{Command, Doorbell, Order, SeatNumber};
use crate::engine::{Engine, EngineChoice, Wait};
use crate::inflight::{Key, MAX_TRANSFERS, Tools};
use crate::patience::{LOOK, LOOK_FOR_TRANSFER, Offer, Patience, Waits, offer_processor};
use crate::ring::WatchKey;
use crate::seat::{Others, Seat};
use crate::sharer::Sharer;

/// A seat's share of the transfers, however many seats there are: what makes progress worth while.
const LEAST_SHARE: usize = 64;

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
pub(crate) const DOORBELL: WatchKey = WatchKey(0);

/// The state of the thread.
pub(crate) struct Worker {
    /// Ends first: what is in flight is drained while its seats are there.
    tools: Tools,
    doorbell: Arc<Doorbell>,
    orders: Receiver<Order>,
    seats: Seats,
    /// How long to sleep next while a ring is polled.
    nap: Duration,
    patience: Patience,
    /// With a transfer that is in flight alone.
    patience_with_transfer: Patience,
    is_over: bool,
}

/// The seats by their numbers, which are small.
#[derive(Default)]
struct Seats {
    all: Vec<Option<Box<Seat>>>,
    /// Those to look at, the first one first.
    active: Vec<SeatNumber>,
    /// How many have queues.
    with_queues: usize,
}

impl Seats {
    fn get(&self, number: SeatNumber) -> Option<&Seat> {
        self.all.get(number as usize)?.as_deref()
    }

    /// A seat that is to be looked at from now on.
    fn activate(&mut self, number: SeatNumber) -> Option<&mut Seat> {
        let seat = self.all.get_mut(number as usize)?.as_mut()?;
        if !seat.is_active {
            seat.is_active = true;
            self.active.push(number);
        }
        Some(seat)
    }

    fn insert(&mut self, number: SeatNumber, seat: Seat) {
        let place = number as usize;
        if self.all.len() <= place {
            self.all.resize_with(place + 1, || None);
        }
        assert!(self.all[place].is_none(), "a seat has one disk");
        self.all[place] = Some(Box::new(seat));
    }

    fn for_each_active(&mut self, mut what: impl FnMut(&mut Seat)) {
        for number in &self.active {
            if let Some(Some(seat)) = self.all.get_mut(*number as usize) {
                what(seat);
            }
        }
    }

    fn any_active(&self, mut what: impl FnMut(&Seat) -> bool) -> bool {
        let seat = |number: &SeatNumber| self.all.get(*number as usize)?.as_deref();
        self.active.iter().filter_map(seat).any(&mut what)
    }

    /// Has another one be the first: the one that others left nothing of the last turn, if there is one.
    fn rotate(&mut self) {
        if self.active.len() > 1 {
            let came_late =
                |number: &SeatNumber| self.get(*number).is_some_and(|seat| seat.came_late);
            let first = self.active.iter().position(came_late);
            self.active.rotate_left(first.unwrap_or(1));
        }
        self.for_each_active(|seat| seat.came_late = false);
    }

    /// Looks no more at those that have nothing to do.
    fn let_idle_go(&mut self) {
        let all = &mut self.all;
        self.active.retain(|number| {
            let Some(Some(seat)) = all.get_mut(*number as usize) else {
                return false;
            };
            seat.is_active = seat.is_awake() || seat.is_due();
            seat.is_active
        });
    }
}

impl Worker {
    /// A worker of this thread, without seats, and with somebody who has files share extents for it.
    pub(crate) fn new(
        engine: EngineChoice,
        doorbell: Arc<Doorbell>,
        orders: Receiver<Order>,
        sharer: Option<Sharer>,
    ) -> io::Result<Self> {
        let mut engine = Engine::new(engine)?;
        engine.watch(DOORBELL, doorbell.watched()?)?;
        Ok(Self {
            tools: Tools::new(engine, sharer),
            doorbell,
            orders,
            seats: Seats::default(),
            nap: SHORTEST_NAP,
            patience: Patience::new(Waits::ForChains),
            patience_with_transfer: Patience::new(Waits::ForTransfer),
            is_over: false,
        })
    }

    /// Serves until nobody can tell it anything any more.
    pub(crate) fn run(mut self) {
        while self.turn() {}
    }

    /// Does what there is to do, or waits for it first; false if that was the last.
    pub(crate) fn turn(&mut self) -> bool {
        let wait = self.may_wait();
        self.tools.engine.turn(wait);
        if wait != Wait::No {
            self.tools.set_clock(Moment::now());
        }
        self.tools.begin_turn();
        self.hear();
        self.reap();
        self.begin();
        self.reap();
        self.settle();
        self.sync();
        !self.is_over
    }

    /// How long there is nothing to do but wait. Asks all guests to kick before it says so.
    fn may_wait(&mut self) -> Wait {
        self.seats.let_idle_go();
        if self.seats.any_active(Seat::is_due) {
            return Wait::No;
        }
        if self.tools.is_full() {
            return Wait::Forever;
        }
        if self.finds_more() {
            self.nap = SHORTEST_NAP;
            return Wait::No;
        }
        let (mut sleep, mut polled) = (true, false);
        let tools = &self.tools;
        self.seats.for_each_active(|seat| {
            if seat.is_open(tools) {
                sleep &= seat.sleep();
                polled |= seat.is_polled();
            }
        });
        if !sleep {
            self.nap = SHORTEST_NAP;
            return Wait::No;
        }
        let nap = polled.then_some(self.nap);
        if polled {
            self.nap = (self.nap + self.nap / NAP_GROWTH).min(LONGEST_NAP);
        }
        let wait = nap.into_iter().chain(self.hold()).min();
        wait.map_or(Wait::Forever, Wait::AtMost)
    }

    /// How long until limits let the first of those go on that wait for them.
    fn hold(&mut self) -> Option<Duration> {
        let (now, mut first) = (self.tools.now, None);
        self.seats.for_each_active(|seat| {
            let until = seat.held_until();
            first = [first, until].into_iter().flatten().min();
        });
        first.map(|until| Duration::from_nanos(until.since(now)))
    }

    /// Whether there is more to do before guests are asked to kick. Looks for a while if that was worth it lately.
    fn finds_more(&mut self) -> bool {
        let tools = &self.tools;
        let may_have = |seat: &Seat| seat.is_open(tools) && seat.is_awake();
        if !self.seats.any_active(may_have) {
            return false;
        }
        if self.has_more() {
            return true;
        }
        if self.tools.engine.is_soon_over() {
            return self.patience_with_transfer.looks() && self.awaits_transfer();
        }
        // What was started goes to the kernel by the call that waits.
        if self.tools.engine.has_unsubmitted() || !self.patience.looks() {
            return false;
        }
        let mut now = Moment::now();
        let end = now.plus(clock::nanos(LOOK));
        while now < end {
            if self.finds_within_looks(now) {
                self.patience.found();
                return true;
            }
            now = Moment::now();
        }
        self.patience.missed();
        false
    }

    /// Looks for the end of the only transfer that is in flight, as long as nobody else wants the processor.
    fn awaits_transfer(&mut self) -> bool {
        self.tools.engine.submit();
        let mut now = Moment::now();
        let end = now.plus(clock::nanos(LOOK_FOR_TRANSFER));
        while now < end {
            if self.finds_within_looks(now) {
                self.patience_with_transfer.found();
                return true;
            }
            let offer;
            (now, offer) = offer_processor();
            match offer {
                Offer::Declined => {}
                Offer::Taken => break,
                Offer::Kept => {
                    self.patience_with_transfer.is_in_the_way();
                    return false;
                }
            }
        }
        self.patience_with_transfer.missed();
        false
    }

    /// Whether some looks find something. It is `now`.
    fn finds_within_looks(&mut self, now: Moment) -> bool {
        for _ in 0..LOOKS_PER_CLOCK {
            if self.has_more() {
                self.tools.set_clock(now);
                return true;
            }
            std::hint::spin_loop();
        }
        false
    }

    fn has_more(&mut self) -> bool {
        let tools = &self.tools;
        let has_chains = |seat: &Seat| seat.is_open(tools) && seat.has_chains();
        self.seats.any_active(has_chains) || self.tools.engine.has_news()
    }

    /// Hears kicks, commands, and whose parked requests should be tried again.
    fn hear(&mut self) {
        while let Some((key, fired)) = self.tools.engine.next_fired() {
            if let Some((number, queue)) = self.tools.watched(key)
                && let Some(seat) = self.seats.activate(number)
            {
                seat.hear(queue, fired);
            }
        }
        loop {
            match self.orders.try_recv() {
                Ok(order) => self.take_order(order),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.is_over = true;
                    return;
                }
            }
        }
    }

    fn take_order(&mut self, order: Order) {
        let Order { seat, command, ack } = order;
        if let Command::Sit(served, sync_file) = command {
            let new = Seat::new(seat, *served, sync_file, &self.doorbell);
            self.seats.insert(seat, new);
            let _ = ack.send(Ok(()));
        } else if let Command::Dump(to) = command {
            // Whatever the seat waits for; nobody may be there any more to hear it.
            if let Some(seat) = self.seats.get(seat) {
                let _ = to.send(seat.dump(&self.tools));
            }
        } else if let Some(seat) = self.seats.activate(seat) {
            seat.receive(command, ack);
        } else {
            let _ = ack.send(Err(io::Error::other("the disk has no seat at this worker")));
        }
    }

    /// Takes the results of transfers to their requests.
    fn reap(&mut self) {
        while let Some(finished) = self.tools.engine.next_finished() {
            let key = Key::from_token(finished.token);
            let seat = self.seats.activate(key.seat);
            let seat = seat.expect("R1: a seat stays until nothing of it is in flight");
            seat.finished(key, finished, &mut self.tools);
        }
        while let Some(shared) = self.tools.next_shared() {
            let seat = self.seats.activate(shared.key.seat);
            let seat = seat.expect("a seat stays until nothing of it is in flight");
            seat.shared(shared, &mut self.tools);
        }
    }

    /// Has seats do what is due and take chains, another one first each time.
    fn begin(&mut self) {
        for number in self.doorbell.wants_retry() {
            self.seats.activate(number);
        }
        self.seats.rotate();
        let (tools, mut light, mut heavy) = (&mut self.tools, 0, 0);
        self.seats.for_each_active(|seat| {
            seat.goes_first = seat.is_light();
            *(if seat.goes_first {
                &mut light
            } else {
                &mut heavy
            }) += 1;
        });
        let is_mixed = light > 0 && heavy > 0;
        self.seats.for_each_active(|seat| {
            if seat.goes_first {
                seat.begin(tools);
                if is_mixed {
                    let began = tools.now;
                    seat.settle(tools);
                    seat.account(began, tools.time());
                }
            }
        });
        tools.begin_with_the_others();
        self.seats.for_each_active(|seat| {
            if !seat.goes_first {
                seat.came_late = tools.turn_left == 0;
                seat.begin(tools);
            }
        });
    }

    /// Has all seats count what this turn brought about. What comes now begins when it ended.
    fn account(&mut self) {
        let began = self.tools.now;
        self.tools.set_clock(Moment::now());
        let ended = self.tools.now;
        self.seats
            .for_each_active(|seat| seat.account(began, ended));
    }

    /// Ends the turn of all seats, and those that are told to leave.
    fn settle(&mut self) {
        let tools = &mut self.tools;
        self.seats.for_each_active(|seat| seat.settle(tools));
        // Who is told that all is answered finds it counted.
        self.account();
        let (tools, mut leaving) = (&mut self.tools, Vec::new());
        let mut with_queues = self.seats.with_queues;
        self.seats.for_each_active(|seat| {
            if let Some(ack) = seat.acknowledge(tools) {
                leaving.push((seat.number(), ack));
            }
            let (had, has) = (seat.is_counted, seat.has_queues());
            with_queues = with_queues + usize::from(has) - usize::from(had);
            seat.is_counted = has;
        });
        if with_queues != self.seats.with_queues {
            self.seats.with_queues = with_queues;
            self.tools.share = (MAX_TRANSFERS / with_queues.max(1)).max(LEAST_SHARE);
        }
        for (number, ack) in leaving {
            if let Some(place) = self.seats.all.get_mut(number as usize) {
                *place = None;
            }
            let _ = ack.send(Ok(()));
        }
    }

    /// Begins what may hold the thread up: the syncs that are waited for, and writes that were kept until now.
    fn sync(&mut self) {
        if !self.seats.any_active(|seat| seat.wants_waits() > 0) {
            return;
        }
        let others = self.others();
        let tools = &mut self.tools;
        self.seats.for_each_active(|seat| {
            seat.start_lone(tools, others);
            seat.sync(tools, others);
        });
    }

    /// Who would wait for what is done on this thread's time: what is in flight or due, chains, and others that want the same.
    fn others(&mut self) -> Others {
        let mut waits = 0;
        self.seats
            .for_each_active(|seat| waits += seat.wants_waits());
        let wait = waits > 1
            || self.tools.in_flight() > 0
            || self.seats.any_active(Seat::is_due)
            || self.has_more();
        if wait {
            Others::Wait
        } else {
            Others::NoneKnown
        }
    }
}

#[cfg(test)]
mod tests;
