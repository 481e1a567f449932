//! What is in flight: one [`Active`] per chain that was taken from the guest and not answered yet, and the steps by
//! which it gets there.
//!
//! ```text
//! Read    map ─► transfers ────────────────────────────────────────► answer
//! Change  reserve ─► transfers ─► (data sync) ─► commit ─► (sync) ─► answer
//!            └ parked ┘           over a parent's data      └ write-through
//! Flush   sync ────────────────────────────────────────────────────► answer
//! ```
//!
//! A change is a write, a discard or a write-zeroes. A request may be larger than anything (1024 descriptors of 4 GiB),
//! so it is worked on in windows, with at most [`TRANSFERS_PER_REQUEST`] transfers at a time (R5).
//!
//! Not here: queues, seats and threads (`queue`, `seat`, `worker`). Rules: W2 and W3 (when an entry may be written, and an answer
//! given), W4 (visits), W7 (parked, not blocked), R2.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;

use vdi_core::{
    Capacity, Disk, FileOffset, Fill, Lane, Reservation, Reserve, Sector, SectorRange, Source,
    Visit, WriteError,
};

use crate::clock::Moment;
use crate::command::SeatNumber;
use crate::complaints::Complaints;
use crate::device::Device;
use crate::dump::RequestDump;
use crate::engine::Engine;
use crate::image_file::ImageFile;
use crate::lone::Lone;
use crate::memory;
use crate::portion::{Portion, SMALL, TURN_BYTES, step_sectors};
use crate::request::{Reply, Request, Segments, Status};
use crate::ring::{GuestBuffer, WatchKey};
use crate::sharer::{Share, Shared, Sharer};
use crate::stats::{Tally, Ticket};
use crate::transfer::{Operation, Transfer};
use crate::worker::DOORBELL;

/// Sectors of a request that go past the page cache in one step: 16 MiB, four times what Linux sends at most by default. Bounds the size of a
/// reservation and the time of a step. What goes through the page cache is copied by the worker, in steps of a turn (`portion`).
const WINDOW_SECTORS: u64 = (16 << 20) / 512;

/// The same for zeros, which move no data: 1 GiB, 8192 of the smallest blocks.
const ZEROS_WINDOW_SECTORS: u64 = (1 << 30) / 512;

/// Transfers of one request at a time: enough to keep storage busy, and a bound on what one request can hold.
const TRANSFERS_PER_REQUEST: u32 = 16;

/// Bytes that are moved at once in one turn, so that no answer waits long for the copying of others: a tenth of a
/// millisecond or two.
const INLINE_BYTES: u64 = 1 << 20;

/// Transfers of one worker beyond which it takes no more chains: far more than storage profits from, and a bound on
/// the kernel memory that guests can bind.
pub(crate) const MAX_TRANSFERS: usize = 4096;

/// A request: its disk's seat, its queue and the head of its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    /// The disk's seat.
    pub(crate) seat: SeatNumber,
    /// The queue.
    pub(crate) queue: u16,
    /// The first descriptor.
    pub(crate) head: u16,
}

impl Key {
    /// The sync of a seat, which is no request's: there are no such queues and heads.
    pub(crate) fn sync(seat: SeatNumber) -> Self {
        let (queue, head) = (u16::MAX, u16::MAX);
        Self { seat, queue, head }
    }

    /// Whether it is a seat's sync.
    pub(crate) fn is_sync(self) -> bool {
        self.queue == u16::MAX
    }

    /// As one number, for the engine.
    pub(crate) fn token(self) -> u64 {
        u64::from(self.seat) << 32 | u64::from(self.queue) << 16 | u64::from(self.head)
    }

    /// The request that a token stands for.
    pub(crate) fn from_token(token: u64) -> Self {
        let [h0, h1, q0, q1, s0, s1, s2, s3] = token.to_le_bytes();
        Self {
            seat: SeatNumber::from_le_bytes([s0, s1, s2, s3]),
            queue: u16::from_le_bytes([q0, q1]),
            head: u16::from_le_bytes([h0, h1]),
        }
    }
}

/// What a worker has for all its seats.
pub(crate) struct Tools {
    /// Moves the data.
    pub(crate) engine: Engine,
    /// Has files share extents; if there is nobody to do so, all is copied.
    sharer: Option<Sharer>,
    /// Bytes that may still be moved at once in this turn.
    pub(crate) inline_left: u64,
    /// Bytes that may still be begun with in this turn.
    pub(crate) turn_left: u64,
    /// Transfers of one seat beyond which it takes no more chains.
    pub(crate) share: usize,
    /// When this turn began.
    pub(crate) now: Moment,
    /// A test moves the time.
    #[cfg(test)]
    pub(crate) is_stopped: bool,
    /// Whose kicks are watched.
    watches: BTreeMap<WatchKey, (SeatNumber, u16)>,
    last_watch: u32,
}

impl Tools {
    /// Those of a worker that has no seats.
    pub(crate) fn new(engine: Engine, sharer: Option<Sharer>) -> Self {
        Self {
            engine,
            sharer,
            inline_left: INLINE_BYTES,
            turn_left: TURN_BYTES,
            share: MAX_TRANSFERS,
            now: Moment::now(),
            #[cfg(test)]
            is_stopped: false,
            watches: BTreeMap::new(),
            last_watch: DOORBELL.0,
        }
    }

    /// Sets the clock, unless a test did.
    pub(crate) fn set_clock(&mut self, now: Moment) {
        #[cfg(test)]
        if self.is_stopped {
            return;
        }
        self.now = now;
    }

    /// Has what a turn may do be there again.
    pub(crate) fn begin_turn(&mut self) {
        (self.inline_left, self.turn_left) = (INLINE_BYTES, TURN_BYTES);
    }

    /// Has those that go after others have all of what a turn may do.
    pub(crate) fn begin_with_the_others(&mut self) {
        self.turn_left = TURN_BYTES;
    }

    /// What time it is, unless a test stopped it.
    pub(crate) fn time(&self) -> Moment {
        #[cfg(test)]
        if self.is_stopped {
            return self.now;
        }
        Moment::now()
    }

    /// Whether a request of which so many bytes are left may go on in this turn.
    fn may_move(&self, bytes: u64) -> bool {
        bytes <= SMALL || self.turn_left > 0
    }

    /// So many bytes are moved in this turn, or what costs as much is done.
    pub(crate) fn moves(&mut self, bytes: u64) {
        self.turn_left = self.turn_left.saturating_sub(bytes);
    }

    /// Whether so much is in flight that no more chains are taken.
    pub(crate) fn is_full(&self) -> bool {
        self.in_flight() >= MAX_TRANSFERS
    }

    /// What is under way somewhere else than on this thread.
    pub(crate) fn in_flight(&self) -> usize {
        let shares = self.sharer.as_ref().map_or(0, Sharer::in_flight);
        self.engine.in_flight() + shares
    }

    /// Whether a turn would have something to report without waiting.
    pub(crate) fn has_news(&mut self) -> bool {
        self.engine.has_news() || self.sharer.as_ref().is_some_and(Sharer::has_news)
    }

    /// What became of the next extents that were to be shared.
    pub(crate) fn next_shared(&mut self) -> Option<Shared> {
        self.sharer.as_mut()?.next_shared()
    }

    /// Hears the kicks of a seat's queue.
    pub(crate) fn watch(
        &mut self,
        whose: (SeatNumber, u16),
        kick: OwnedFd,
    ) -> io::Result<WatchKey> {
        // Not one that was used lately: the kernel may still have something to tell of it.
        let free = |key: &WatchKey| *key != DOORBELL && !self.watches.contains_key(key);
        let after = (1..=u32::MAX).map(|step| WatchKey(self.last_watch.wrapping_add(step)));
        let key = after
            .into_iter()
            .find(free)
            .expect("there are fewer descriptors than keys");
        self.engine.watch(key, kick)?;
        self.last_watch = key.0;
        self.watches.insert(key, whose);
        Ok(key)
    }

    /// Ends that.
    pub(crate) fn unwatch(&mut self, key: WatchKey) {
        self.watches.remove(&key);
        self.engine.unwatch(key);
    }

    /// Whose kicks a watch hears.
    pub(crate) fn watched(&self, key: WatchKey) -> Option<(SeatNumber, u16)> {
        self.watches.get(&key).copied()
    }
}

/// What requests need: what is their seat's, and what is their worker's.
pub(crate) struct Context<'a> {
    /// The seat's.
    pub(crate) desk: &'a mut Desk,
    /// The worker's.
    pub(crate) tools: &'a mut Tools,
}

/// What requests need from their seat.
pub(crate) struct Desk {
    /// The disk that is served.
    pub(crate) disk: Arc<Disk>,
    /// The seat's way into it.
    pub(crate) lane: Lane,
    /// The files of its images, the top one's first.
    pub(crate) images: Arc<[ImageFile]>,
    /// What was negotiated.
    pub(crate) device: Arc<Device>,
    /// Transfers that are not over.
    pub(crate) transfers: usize,
    /// A write that may be alone.
    pub(crate) lone: Lone,
    /// How large its requests are.
    pub(crate) portion: Portion,
    /// Says what is wrong.
    pub(crate) complaints: Arc<Complaints>,
    /// Counts what is done.
    pub(crate) tally: Tally,
    /// Wakes the worker when parked requests should be tried again.
    pub(crate) waker: Waker,
    /// Requests that wait for room or for another request (W7).
    pub(crate) parked: Vec<Key>,
    /// Requests whose next window is due in the next turn.
    pub(crate) continuing: Vec<Key>,
    /// Requests whose data are written, in step with `reservations`.
    pub(crate) written: Vec<Key>,
    /// What makes the data of `written` visible.
    pub(crate) reservations: Vec<Reservation>,
    /// Data over a parent's that must be synced before they may be made visible (W2).
    pub(crate) unsynced: Vec<(Key, Reservation)>,
    /// Requests that are answered after a sync.
    pub(crate) unflushed: Vec<Key>,
}

/// What is to be done with a request after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing: it will be heard of again.
    Wait,
    /// It is over, and so many bytes of data were written to its buffers.
    Answer(Status, u64),
}

/// Why a request failed on our side; guests learn only that it did.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Data could not be moved.
    #[error("cannot read or write the image's data")]
    Data(#[source] io::Error),
    /// There is no memory (any more) to move them from or to.
    #[error("cannot access the guest's memory")]
    Memory(#[source] io::Error),
    /// The image refuses the change.
    #[error("cannot change the image")]
    Image(#[source] Arc<WriteError>),
}

impl Failure {
    fn of_transfer(error: io::Error) -> Self {
        if memory::is_missing(&error) {
            Self::Memory(error)
        } else {
            Self::Data(error)
        }
    }

    /// Says it, as the host's doing or the front end's.
    pub(crate) fn tell(&self, complaints: &Complaints) {
        let why = crate::chain_of(self);
        match self {
            Self::Data(_) | Self::Image(_) => {
                complaints.error(format_args!("a request failed: {why}"));
            }
            Self::Memory(_) => complaints.warn(format_args!("a request failed: {why}")),
        }
    }
}

/// A request that was taken and not answered yet.
#[derive(Debug)]
pub(crate) struct Active {
    key: Key,
    ticket: Ticket,
    reply: Reply,
    work: Work,
    /// Transfers that are not over.
    outstanding: u32,
    /// The first thing that went wrong.
    failure: Option<Failure>,
}

#[derive(Debug)]
enum Work {
    Read {
        rest: SectorRange,
        into: GuestBuffer,
        total_bytes: u64,
        /// From the map's answer until its transfers are over (W4).
        visit: Option<Visit>,
    },
    Change {
        change: Change,
        window: Window,
    },
    /// Waits for the seat's next sync.
    Sync,
    Nothing,
}

/// What a request wants to be changed.
#[derive(Debug)]
enum Change {
    Data {
        rest: SectorRange,
        from: GuestBuffer,
    },
    /// The segments that are left, the next one last.
    Zeros { rest: Segments },
}

impl Change {
    /// The part to change next.
    fn window(&self, capacity: Capacity, context: &Context<'_>) -> Option<SectorRange> {
        let (rest, most) = match self {
            Self::Data { rest, .. } => (*rest, context.step(*rest)),
            Self::Zeros { rest } => (rest.last()?.range, ZEROS_WINDOW_SECTORS),
        };
        Some(split(capacity, rest, most).0).filter(|window| !window.is_empty())
    }

    /// Goes on behind the first `sectors`; whether there is more.
    fn advance(&mut self, capacity: Capacity, sectors: u64) -> bool {
        match self {
            Self::Data { rest, .. } => {
                *rest = split(capacity, *rest, sectors).1;
                !rest.is_empty()
            }
            Self::Zeros { rest } => {
                if let Some(segment) = rest.last_mut() {
                    segment.range = split(capacity, segment.range, sectors).1;
                }
                while rest.last().is_some_and(|segment| segment.range.is_empty()) {
                    rest.pop();
                }
                !rest.is_empty()
            }
        }
    }
}

/// The part of a change that is being made.
#[derive(Debug)]
enum Window {
    None,
    /// Where it goes, how much it is, and how many of its parts were started.
    Reserved {
        reservation: Reservation,
        sectors: u64,
        started: usize,
    },
    /// Its data are written, its reservation is on the way to a commit.
    Written {
        sectors: u64,
    },
}

impl Active {
    /// Starts a request.
    pub(crate) fn start(
        key: Key,
        reply: Reply,
        request: Request,
        context: &mut Context<'_>,
    ) -> (Self, Next) {
        let ticket = Ticket {
            kind: request.kind(),
            bytes: request.bytes(),
            taken: context.tools.now,
        };
        let mut active = Self {
            key,
            ticket,
            reply,
            work: Work::Nothing,
            outstanding: 0,
            failure: None,
        };
        let next = match request {
            Request::Read { range, into } => {
                let total_bytes = into.len();
                active.work = Work::Read {
                    rest: range,
                    into,
                    total_bytes,
                    visit: None,
                };
                active.go_on(context)
            }
            Request::Write { range, from } => {
                active.begin(Change::Data { rest: range, from }, context)
            }
            Request::Zero { segments } => active.begin(Change::Zeros { rest: segments }, context),
            Request::Flush => active.make_durable(context),
            Request::GetId { into } => {
                let written = into.fill_from(context.desk.device.serial().bytes());
                Next::Answer(Status::Ok, written as u64)
            }
        };
        (active, next)
    }

    /// Bytes that it was about when it was taken.
    pub(crate) fn bytes(&self) -> u64 {
        self.ticket.bytes
    }

    /// How it is.
    pub(crate) fn dump(&self, now: Moment) -> RequestDump {
        let stage = match &self.work {
            Work::Read { .. } => "read",
            Work::Change { window, .. } => match window {
                Window::None => "room",
                Window::Reserved { .. } => "write",
                Window::Written { .. } => "commit",
            },
            Work::Sync => "sync",
            Work::Nothing => "answer",
        };
        RequestDump {
            queue: self.key.queue,
            head: self.key.head,
            kind: self.ticket.kind,
            bytes: self.ticket.bytes,
            age_us: now.since(self.ticket.taken) / 1000,
            stage,
            transfers: self.outstanding,
            failed: self.failure.is_some(),
        }
    }

    fn begin(&mut self, mut change: Change, context: &mut Context<'_>) -> Next {
        // Skips segments of nothing.
        change.advance(context.desk.device.capacity(), 0);
        let window = Window::None;
        self.work = Work::Change { change, window };
        self.go_on(context)
    }

    /// Starts the next window, or tries again after having been parked. Waits for the next turn if others had all of this one.
    pub(crate) fn go_on(&mut self, context: &mut Context<'_>) -> Next {
        let left = match &self.work {
            Work::Read { rest, .. }
            | Work::Change {
                change: Change::Data { rest, .. },
                ..
            } => rest.count() * vdi_core::SECTOR_SIZE,
            Work::Change { .. } | Work::Sync | Work::Nothing => 0,
        };
        if !context.tools.may_move(left) {
            context.desk.continuing.push(self.key);
            return Next::Wait;
        }
        match &self.work {
            Work::Read { .. } => self.read_window(context),
            Work::Change { .. } => self.reserve_window(context),
            Work::Sync | Work::Nothing => Next::Wait,
        }
    }

    /// A transfer of this request is over.
    pub(crate) fn transferred(
        &mut self,
        result: io::Result<()>,
        context: &mut Context<'_>,
    ) -> Next {
        self.outstanding -= 1;
        if let Err(error) = result {
            self.failure.get_or_insert(Failure::of_transfer(error));
        }
        if self.outstanding > 0 {
            return Next::Wait;
        }
        if self.failure.is_some() {
            return self.give_up();
        }
        match &self.work {
            Work::Change { .. } => self.start_parts(context),
            Work::Read { .. } => self.go_on(context),
            Work::Sync | Work::Nothing => Next::Wait,
        }
    }

    /// Files share what a fill is about, or it has to be copied.
    pub(crate) fn shared(&mut self, shared: Shared, context: &mut Context<'_>) -> Next {
        let Shared { fill, result, .. } = shared;
        if let Err(error) = result {
            context.desk.images[fill.depth].refused(&error);
            self.outstanding += context.copy(self.key, fill);
        }
        self.transferred(Ok(()), context)
    }

    /// The commit of the window that was written is over.
    pub(crate) fn committed(
        &mut self,
        result: Result<(), &Arc<WriteError>>,
        context: &mut Context<'_>,
    ) -> Next {
        if let Err(error) = result {
            self.failure = Some(Failure::Image(Arc::clone(error)));
            return self.give_up();
        }
        let Work::Change { change, window } = &mut self.work else {
            return Next::Wait;
        };
        if let Window::Written { sectors } = std::mem::replace(window, Window::None)
            && change.advance(context.desk.device.capacity(), sectors)
        {
            context.desk.continuing.push(self.key);
            return Next::Wait;
        }
        if context.desk.device.is_write_through() {
            return self.make_durable(context);
        }
        Next::Answer(Status::Ok, 0)
    }

    /// Lets go of what was reserved for data that are not the guest's.
    pub(crate) fn abandon(&mut self) -> Next {
        self.give_up()
    }

    /// The duty to answer, what went wrong on our side, and how it is counted.
    pub(crate) fn finish(self) -> (Reply, Option<Failure>, Ticket) {
        (self.reply, self.failure, self.ticket)
    }

    fn read_window(&mut self, context: &mut Context<'_>) -> Next {
        let Work::Read {
            rest,
            into,
            total_bytes,
            visit,
        } = &mut self.work
        else {
            return Next::Wait;
        };
        if rest.is_empty() {
            return Next::Answer(Status::Ok, *total_bytes);
        }
        // Transfers of the window before are over.
        self.reply.wrote(*total_bytes - into.len());
        let capacity = context.desk.device.capacity();
        let (window, _) = split(capacity, *rest, context.step(*rest));
        let disk = Arc::clone(&context.desk.disk);
        let visit = visit.insert(context.desk.lane.enter());
        let mut mapped_bytes = 0;
        for extent in disk.map(window, visit) {
            let part = into.split_front(extent.len_bytes);
            mapped_bytes += extent.len_bytes;
            match extent.source {
                Source::Unallocated | Source::Zero { .. } => part.fill_with_zeros(),
                Source::Stored { depth, at } => {
                    self.outstanding += context.transfer(self.key, Moving::Out, depth, at, part);
                }
            }
            if self.outstanding >= TRANSFERS_PER_REQUEST {
                break;
            }
        }
        context.tools.moves(mapped_bytes);
        *rest = split(capacity, *rest, mapped_bytes / vdi_core::SECTOR_SIZE).1;
        match (self.outstanding, rest.is_empty()) {
            (0, true) => Next::Answer(Status::Ok, *total_bytes),
            (0, false) => {
                context.desk.continuing.push(self.key);
                Next::Wait
            }
            _ => Next::Wait,
        }
    }

    fn reserve_window(&mut self, context: &mut Context<'_>) -> Next {
        let Work::Change { change, window } = &mut self.work else {
            return Next::Wait;
        };
        let Some(range) = change.window(context.desk.device.capacity(), context) else {
            return Next::Answer(Status::Ok, 0);
        };
        let zeroing = match change {
            Change::Data { from, .. } => {
                let len_bytes = range.count() * vdi_core::SECTOR_SIZE;
                context.tools.moves(len_bytes);
                let zeroing = context.desk.device.zeroing_of(from, len_bytes);
                if from.is_lost() {
                    return self.give_up(); // F2
                }
                zeroing
            }
            Change::Zeros { rest } => rest.last().map(|segment| segment.how),
        };
        let (disk, lane, waker) = (&context.desk.disk, &context.desk.lane, &context.desk.waker);
        let reserved = match zeroing {
            None => disk.reserve(range, lane, waker),
            Some(how) => disk.reserve_zeros(range, how, lane, waker),
        };
        match reserved {
            Ok(Reserve::Ready(reservation)) => {
                if let (Some(_), Change::Data { from, .. }) = (zeroing, change) {
                    from.consume(range.count() * vdi_core::SECTOR_SIZE);
                }
                *window = Window::Reserved {
                    reservation,
                    sectors: range.count(),
                    started: 0,
                };
                self.start_parts(context)
            }
            Ok(Reserve::Parked) => {
                context.desk.parked.push(self.key);
                Next::Wait
            }
            Err(error) => {
                self.failure = Some(Failure::Image(Arc::new(error)));
                self.give_up()
            }
        }
    }

    /// Starts what can be started of the window; all of it done, it goes on to the sync or the commit.
    fn start_parts(&mut self, context: &mut Context<'_>) -> Next {
        let Work::Change { change, window } = &mut self.work else {
            return Next::Wait;
        };
        let Window::Reserved {
            reservation,
            sectors,
            started,
        } = window
        else {
            return Next::Wait;
        };
        for part in Part::of(reservation).skip(*started) {
            if self.outstanding >= TRANSFERS_PER_REQUEST {
                break;
            }
            self.outstanding += part.start(self.key, change, context);
            *started += 1;
        }
        if self.outstanding == 0 {
            let sectors = *sectors;
            let written = Window::Written { sectors };
            if let Window::Reserved { reservation, .. } = std::mem::replace(window, written) {
                context.written(self.key, reservation);
            }
        }
        Next::Wait
    }

    /// What was written so far becomes durable, then the request is answered.
    fn make_durable(&mut self, context: &mut Context<'_>) -> Next {
        match context.desk.disk.begin_flush() {
            Ok(None) => Next::Answer(Status::Ok, 0),
            Ok(Some(_)) => {
                self.work = Work::Sync;
                context.desk.unflushed.push(self.key);
                Next::Wait
            }
            Err(error) => {
                self.failure = Some(Failure::Image(Arc::new(error)));
                self.give_up()
            }
        }
    }

    /// The sync that this request waited for is over.
    pub(crate) fn durable(&mut self, result: Result<(), &Arc<WriteError>>) -> Next {
        match result {
            Ok(()) => Next::Answer(Status::Ok, 0),
            Err(error) => {
                self.failure = Some(Failure::Image(Arc::clone(error)));
                self.give_up()
            }
        }
    }

    /// Drops what was reserved, which leaves the disk as it was.
    fn give_up(&mut self) -> Next {
        if let Work::Read {
            into, total_bytes, ..
        } = &self.work
        {
            self.reply.wrote(*total_bytes - into.len());
        }
        self.work = Work::Nothing;
        Next::Answer(Status::IoError, 0)
    }
}

/// Which way guest data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moving {
    /// To the guest.
    Out,
    /// Over others.
    Over,
    /// To where nothing was.
    Fresh,
}

impl Moving {
    fn operation(self) -> Operation {
        match self {
            Self::Out => Operation::Read,
            Self::Over | Self::Fresh => Operation::Write,
        }
    }
}

/// One part of a window's work.
#[derive(Clone, Copy, Debug)]
enum Part {
    /// Guest data go there.
    Data {
        at: FileOffset,
        len_bytes: u64,
        moving: Moving,
    },
    /// Zeros go there, with or without the space.
    Clear {
        at: FileOffset,
        len_bytes: u64,
        operation: Operation,
    },
    /// A parent's bytes are copied (copy-on-write).
    Fill(Fill),
}

impl Part {
    fn of(reservation: &Reservation) -> impl Iterator<Item = Self> {
        let operation = if reservation.keeps_space() {
            Operation::Zero
        } else {
            Operation::Punch
        };
        let moving = match reservation.allocates() {
            true => Moving::Fresh,
            false => Moving::Over,
        };
        let data = reservation.extents().iter().map(move |extent| Self::Data {
            at: extent.at,
            len_bytes: extent.len_bytes,
            moving,
        });
        let zeros = reservation.zeros().iter().map(move |extent| Self::Clear {
            at: extent.at,
            len_bytes: extent.len_bytes,
            operation,
        });
        let fills = reservation.fills().iter().copied().map(Self::Fill);
        data.chain(zeros).chain(fills)
    }

    /// Starts its transfers; how many they are.
    fn start(self, key: Key, change: &mut Change, context: &mut Context<'_>) -> u32 {
        match (self, change) {
            (
                Self::Data {
                    at,
                    len_bytes,
                    moving,
                },
                Change::Data { from, .. },
            ) => {
                let part = from.split_front(len_bytes);
                context.transfer(key, moving, 0, at, part)
            }
            (
                Self::Clear {
                    at,
                    len_bytes,
                    operation,
                },
                _,
            ) => {
                // The file's pages are cleared whichever way its data go.
                let file = context.desk.images[0].buffered_file();
                let clear = Transfer::clear(key.token(), operation, file, at.0, len_bytes);
                context.start(clear, false);
                1
            }
            (Self::Fill(fill), _) => context.fill(key, fill),
            (Self::Data { .. }, Change::Zeros { .. }) => 0,
        }
    }
}

impl Context<'_> {
    /// How many sectors of a request's rest move in one step.
    fn step(&self, rest: SectorRange) -> u64 {
        if self.desk.images[0].is_direct() {
            return WINDOW_SECTORS;
        }
        let block = u64::from(self.desk.disk.header().block_size().bytes());
        step_sectors(rest.start().0, rest.count(), block / vdi_core::SECTOR_SIZE)
    }

    /// Does all of a request if that takes no waiting: bytes that the host has in memory, and writes in place. How many
    /// bytes of data were written to its buffers; `None` if it has to go the long way, from its beginning.
    pub(crate) fn at_once(&mut self, request: &Request) -> Option<u64> {
        match request {
            Request::Read { range, into } => self.read_at_once(*range, into).then_some(into.len()),
            Request::Write { range, from } => self.write_at_once(*range, from).then_some(0),
            Request::Zero { .. } | Request::Flush | Request::GetId { .. } => None,
        }
    }

    /// Whether so many bytes may be moved at once. Small requests need not wait for what others moved.
    fn may_be_at_once(&self, bytes: u64) -> bool {
        bytes <= SMALL || (bytes <= self.tools.inline_left && self.tools.may_move(bytes))
    }

    fn was_at_once(&mut self, bytes: u64) {
        self.tools.inline_left = self.tools.inline_left.saturating_sub(bytes);
        self.tools.moves(bytes);
    }

    fn read_at_once(&mut self, range: SectorRange, into: &GuestBuffer) -> bool {
        let len = into.len();
        if !self.may_be_at_once(len) {
            return false;
        }
        let visit = self.desk.lane.enter();
        let mut extents = self.desk.disk.map(range, &visit);
        let (Some(extent), None) = (extents.next(), extents.next()) else {
            return false;
        };
        match extent.source {
            Source::Unallocated | Source::Zero { .. } => into.fill_with_zeros(),
            Source::Stored { depth, at } if self.desk.images[depth].read_now(at, into) => {}
            Source::Stored { .. } => return false,
        }
        self.was_at_once(len);
        true
    }

    fn write_at_once(&mut self, range: SectorRange, from: &GuestBuffer) -> bool {
        let len = from.len();
        let is_plain = self.may_be_at_once(len)
            && !self.desk.device.is_write_through()
            && self.desk.device.zeroing_of(from, len).is_none()
            && !from.is_lost(); // F2
        let in_place = is_plain.then(|| self.desk.disk.reserve_in_place(range, &self.desk.lane));
        let Some(Some(in_place)) = in_place else {
            return false;
        };
        let [extent] = in_place.extents() else {
            return false;
        };
        let done = self.desk.images[0].write_now(extent.at, from)
            && self.desk.disk.commit_in_place(in_place).is_ok();
        if done {
            self.was_at_once(len);
        }
        done
    }

    /// Starts a transfer, on this thread's own time if `inline`.
    pub(crate) fn start(&mut self, transfer: Transfer, inline: bool) {
        self.desk.transfers += 1;
        self.tools.engine.start(transfer, inline);
    }

    /// Starts a write at the end of the turn, if it is alone till then.
    fn start_with_turn(&mut self, write: Transfer) {
        if self.tools.engine.in_flight() > 0 {
            return self.start(write, false);
        }
        match self.desk.lone.keep(write) {
            None => self.desk.transfers += 1,
            Some([first, second]) => {
                self.tools.engine.start(first, false);
                self.start(second, false);
            }
        }
    }

    /// The data of a window are written: it can be committed, or synced before.
    fn written(&mut self, key: Key, reservation: Reservation) {
        if reservation.needs_sync() {
            self.desk.unsynced.push((key, reservation));
        } else {
            self.desk.written.push(key);
            self.desk.reservations.push(reservation);
        }
    }

    /// Starts the transfers between all of `buffer` and an image's file at `at`; how many they are.
    fn transfer(
        &mut self,
        key: Key,
        moving: Moving,
        depth: usize,
        mut at: FileOffset,
        mut buffer: GuestBuffer,
    ) -> u32 {
        let mut count = 0;
        while buffer.len() > 0 {
            let route = self.desk.images[depth].route(at, buffer.len());
            let part = buffer.split_front(route.len_bytes);
            let start = at;
            at = at.plus(route.len_bytes);
            if moving == Moving::Out
                && part.len() <= self.tools.inline_left.max(SMALL)
                && self.desk.images[depth].read_now(start, &part)
            {
                let left = self.tools.inline_left;
                self.tools.inline_left = left.saturating_sub(part.len());
                continue;
            }
            let (token, align) = (key.token(), route.alignment);
            let operation = moving.operation();
            let transfer = Transfer::data(token, operation, route.file, start.0, part, align);
            // File systems hand buffered writes from a ring to helper threads, one at a time (ext4); inline they cost
            // half.
            match (moving, align) {
                (Moving::Over | Moving::Fresh, None) => self.start(transfer, true),
                (Moving::Fresh, Some(_)) => self.start_with_turn(transfer),
                (Moving::Out, _) | (Moving::Over, Some(_)) => self.start(transfer, false),
            }
            count += 1;
        }
        count
    }

    /// Starts what brings a parent's bytes into the top image: they are shared as far as that can be, and copied. How many transfers.
    fn fill(&mut self, key: Key, fill: Fill) -> u32 {
        let shareable = self.desk.images[fill.depth].shareable(&fill);
        let (Some(shared), Some(sharer)) = (shareable, &mut self.tools.sharer) else {
            return self.copy(key, fill);
        };
        sharer.ask(Share {
            key,
            fill: fill.part(&shared),
            from: self.desk.images[fill.depth].buffered_file(),
            to: self.desk.images[0].buffered_file(),
        });
        self.desk.transfers += 1;
        let around = [0..shared.start, shared.end..fill.len_bytes];
        let copies = around.map(|part| self.copy(key, fill.part(&part)));
        copies.iter().sum::<u32>() + 1
    }

    /// Starts the transfers that copy from a parent; how many they are.
    fn copy(&mut self, key: Key, fill: Fill) -> u32 {
        let (mut done, mut count) = (0, 0);
        while done < fill.len_bytes {
            let (from, to) = (fill.from.plus(done), fill.to.plus(done));
            let source = self.desk.images[fill.depth].route(from, fill.len_bytes - done);
            let target = self.desk.images[0].route(to, source.len_bytes);
            let len = target.len_bytes;
            let (source, target) = ((source.file, from.0), (target.file, to.0));
            self.start(Transfer::copy(key.token(), source, target, len), false);
            done += len;
            count += 1;
        }
        count
    }
}

/// The first `sectors` of a range, and the rest.
fn split(capacity: Capacity, range: SectorRange, sectors: u64) -> (SectorRange, SectorRange) {
    let sectors = sectors.min(range.count());
    let part = |skip: u64, count| {
        let start = Sector(range.start().0 + skip);
        capacity
            .range(start, count)
            .expect("a part of a range on the disk")
    };
    (part(0, sectors), part(sectors, range.count() - sectors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_as_a_token() {
        let key = Key {
            seat: 0x8765_4321,
            queue: 255,
            head: 1023,
        };
        assert_eq!(Key::from_token(key.token()), key);
        let sync = Key::sync(7);
        assert!(Key::from_token(sync.token()).is_sync() && !key.is_sync());
    }

    #[test]
    fn a_range_is_split_without_loss() {
        let capacity = Capacity::from_bytes_rounded_down(1 << 20);
        let range = capacity.range(Sector(100), 50).expect("on the disk");
        let (front, rest) = split(capacity, range, 20);
        assert_eq!((front.start(), front.count()), (Sector(100), 20));
        assert_eq!((rest.start(), rest.count()), (Sector(120), 30));
        assert!(split(capacity, range, 60).1.is_empty());
    }
}
