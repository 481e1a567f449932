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

mod desk;
mod moves;

use std::io;
use std::sync::Arc;

use vdi_core::{Capacity, Reservation, Reserve, Sector, SectorRange, Source, Visit, WriteError};

pub(crate) use self::desk::{Context, Desk, Key, MAX_TRANSFERS, Tools};
use self::moves::{Moving, Part};
use crate::clock::Moment;
use crate::complaints::Complaints;
use crate::dump::RequestDump;
use crate::memory;
use crate::request::{Reply, Request, Segments, Status};
use crate::ring::GuestBuffer;
use crate::sharer::Shared;
use crate::stats::Ticket;

/// Sectors of zeros, which move no data, in one step: 1 GiB, 8192 of the smallest blocks.
const ZEROS_WINDOW_SECTORS: u64 = (1 << 30) / 512;

/// Transfers of one request at a time: enough to keep storage busy, and a bound on what one request can hold.
const TRANSFERS_PER_REQUEST: u32 = 16;

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
    fn a_range_is_split_without_loss() {
        let capacity = Capacity::from_bytes_rounded_down(1 << 20);
        let range = capacity.range(Sector(100), 50).expect("on the disk");
        let (front, rest) = split(capacity, range, 20);
        assert_eq!((front.start(), front.count()), (Sector(100), 20));
        assert_eq!((rest.start(), rest.count()), (Sector(120), 30));
        assert!(split(capacity, range, 60).1.is_empty());
    }
}
