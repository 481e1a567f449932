//! What is in flight: one [`Active`] per chain that was taken from the guest and not answered yet, and the steps by
//! which it gets there.
//!
//! ```text
//! Read   map ─► transfers ──────────────────────────► answer
//! Write  reserve ─► transfers ─► commit ─► (sync) ──► answer
//!           └ parked ┘                └ write-through
//! Flush  sync ──────────────────────────────────────► answer
//! ```
//!
//! A request may be larger than anything (1024 descriptors of 4 GiB), so it is worked on in windows of
//! [`WINDOW_SECTORS`], with at most [`TRANSFERS_PER_REQUEST`] transfers at a time (R5).
//!
//! Not here: queues and threads (`queue`, `worker`). Rules: W3 (answer after publish), W7 (parked, not blocked), R2.

use std::io;
use std::sync::Arc;
use std::task::Waker;

use vdi_core::{
    Capacity, Disk, FileOffset, Flush, Reservation, Reserve, Sector, SectorRange, Source,
    WriteError,
};

use crate::complaints::Complaints;
use crate::device::Device;
use crate::engine::Engine;
use crate::image_file::ImageFile;
use crate::request::{Reply, Request, Status};
use crate::ring::GuestBuffer;
use crate::transfer::{Operation, Transfer};

/// Sectors of a request that are mapped, reserved or zeroed in one step: 16 MiB, four times what Linux sends at most
/// by default. Bounds the size of a reservation and the time of a step.
const WINDOW_SECTORS: u64 = (16 << 20) / 512;

/// Transfers of one request at a time: enough to keep storage busy, and a bound on what one request can hold.
const TRANSFERS_PER_REQUEST: u32 = 16;

/// A request: its queue and the head of its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    /// The queue.
    pub(crate) queue: u16,
    /// The first descriptor.
    pub(crate) head: u16,
}

impl Key {
    /// As one number, for the engine.
    pub(crate) fn token(self) -> u64 {
        u64::from(self.queue) << 16 | u64::from(self.head)
    }

    /// The request that a token stands for.
    pub(crate) fn from_token(token: u64) -> Self {
        let [head_low, head_high, queue_low, queue_high, ..] = token.to_le_bytes();
        Self {
            queue: u16::from_le_bytes([queue_low, queue_high]),
            head: u16::from_le_bytes([head_low, head_high]),
        }
    }
}

/// What requests need from their worker.
pub(crate) struct Context {
    /// The disk that is served.
    pub(crate) disk: Arc<Disk>,
    /// Its file.
    pub(crate) image: Arc<ImageFile>,
    /// What was negotiated.
    pub(crate) device: Arc<Device>,
    /// Moves the data.
    pub(crate) engine: Engine,
    /// Says what is wrong.
    pub(crate) complaints: Arc<Complaints>,
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
    /// The image refuses the change.
    #[error("cannot change the image")]
    Image(#[source] Arc<WriteError>),
}

/// A request that was taken and not answered yet.
#[derive(Debug)]
pub(crate) struct Active {
    key: Key,
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
    },
    Write {
        rest: SectorRange,
        from: GuestBuffer,
        window: Window,
    },
    Sync(Flush),
    Nothing,
}

/// The part of a write that is being written.
#[derive(Debug)]
enum Window {
    None,
    /// Where it goes, how much it is, and how many of its extents were started.
    Reserved {
        reservation: Reservation,
        sectors: u64,
        started: usize,
    },
    /// Its data are written, its reservation is in the commit batch.
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
        context: &mut Context,
    ) -> (Self, Next) {
        let mut active = Self {
            key,
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
                };
                active.go_on(context)
            }
            Request::Write { range, from } => {
                active.work = Work::Write {
                    rest: range,
                    from,
                    window: Window::None,
                };
                active.go_on(context)
            }
            Request::Flush => active.make_durable(context),
            Request::GetId { into } => {
                let written = into.fill_from(context.device.serial().bytes());
                Next::Answer(Status::Ok, written as u64)
            }
        };
        (active, next)
    }

    /// Starts the next window, or tries again after having been parked.
    pub(crate) fn go_on(&mut self, context: &mut Context) -> Next {
        match &self.work {
            Work::Read { .. } => self.read_window(context),
            Work::Write { .. } => self.reserve_window(context),
            Work::Sync(_) | Work::Nothing => Next::Wait,
        }
    }

    /// A transfer of this request is over.
    pub(crate) fn transferred(&mut self, result: io::Result<()>, context: &mut Context) -> Next {
        self.outstanding -= 1;
        if let Work::Sync(_) = self.work {
            return self.synced(result, context);
        }
        if let Err(error) = result {
            self.failure.get_or_insert(Failure::Data(error));
        }
        if self.outstanding > 0 {
            return Next::Wait;
        }
        if self.failure.is_some() {
            return self.give_up();
        }
        match &self.work {
            Work::Write { .. } => self.write_extents(context),
            Work::Read { .. } | Work::Sync(_) | Work::Nothing => self.read_window(context),
        }
    }

    /// The commit of the window that was written is over.
    pub(crate) fn committed(
        &mut self,
        result: Result<(), &Arc<WriteError>>,
        context: &mut Context,
    ) -> Next {
        if let Err(error) = result {
            self.failure = Some(Failure::Image(Arc::clone(error)));
            return self.give_up();
        }
        let Work::Write { rest, window, .. } = &mut self.work else {
            return Next::Wait;
        };
        if let Window::Written { sectors } = std::mem::replace(window, Window::None) {
            *rest = split(context.device.capacity(), *rest, sectors).1;
        }
        if !rest.is_empty() {
            context.continuing.push(self.key);
            return Next::Wait;
        }
        if context.device.is_write_through() {
            return self.make_durable(context);
        }
        Next::Answer(Status::Ok, 0)
    }

    /// The duty to answer, and what went wrong on our side.
    pub(crate) fn finish(self) -> (Reply, Option<Failure>) {
        (self.reply, self.failure)
    }

    fn read_window(&mut self, context: &mut Context) -> Next {
        let Work::Read {
            rest,
            into,
            total_bytes,
        } = &mut self.work
        else {
            return Next::Wait;
        };
        if rest.is_empty() {
            return Next::Answer(Status::Ok, *total_bytes);
        }
        let capacity = context.device.capacity();
        let (window, _) = split(capacity, *rest, WINDOW_SECTORS);
        let disk = Arc::clone(&context.disk);
        let mut mapped_bytes = 0;
        for extent in disk.map(window) {
            let part = into.split_front(extent.len_bytes);
            mapped_bytes += extent.len_bytes;
            match extent.source {
                Source::Unallocated | Source::Zero => part.fill_with_zeros(),
                Source::Stored { at } => {
                    self.outstanding += transfer(self.key, Operation::Read, at, part, context);
                }
            }
            if self.outstanding >= TRANSFERS_PER_REQUEST {
                break;
            }
        }
        *rest = split(capacity, *rest, mapped_bytes / vdi_core::SECTOR_SIZE).1;
        match (self.outstanding, rest.is_empty()) {
            (0, true) => Next::Answer(Status::Ok, *total_bytes),
            (0, false) => {
                context.continuing.push(self.key);
                Next::Wait
            }
            _ => Next::Wait,
        }
    }

    fn reserve_window(&mut self, context: &mut Context) -> Next {
        let Work::Write { rest, window, .. } = &mut self.work else {
            return Next::Wait;
        };
        if rest.is_empty() {
            return Next::Answer(Status::Ok, 0);
        }
        let (range, _) = split(context.device.capacity(), *rest, WINDOW_SECTORS);
        match context.disk.reserve(range, &context.waker) {
            Ok(Reserve::Ready(reservation)) => {
                let sectors = range.count();
                *window = Window::Reserved {
                    reservation,
                    sectors,
                    started: 0,
                };
                self.write_extents(context)
            }
            Ok(Reserve::Parked) => {
                context.parked.push(self.key);
                Next::Wait
            }
            Err(error) => {
                self.failure = Some(Failure::Image(Arc::new(error)));
                self.give_up()
            }
        }
    }

    /// Starts what can be started of the window; all of it written, it joins the commit batch.
    fn write_extents(&mut self, context: &mut Context) -> Next {
        let Work::Write { from, window, .. } = &mut self.work else {
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
        for extent in reservation.extents().iter().skip(*started) {
            if self.outstanding >= TRANSFERS_PER_REQUEST {
                break;
            }
            let part = from.split_front(extent.len_bytes);
            self.outstanding += transfer(self.key, Operation::Write, extent.at, part, context);
            *started += 1;
        }
        if self.outstanding == 0 {
            let sectors = *sectors;
            if let Window::Reserved { reservation, .. } =
                std::mem::replace(window, Window::Written { sectors })
            {
                context.written.push(self.key);
                context.reservations.push(reservation);
            }
        }
        Next::Wait
    }

    /// What was written so far becomes durable, then the request is answered.
    fn make_durable(&mut self, context: &mut Context) -> Next {
        match context.disk.begin_flush() {
            Ok(None) => Next::Answer(Status::Ok, 0),
            Ok(Some(flush)) => {
                self.work = Work::Sync(flush);
                self.outstanding = 1;
                let sync = Transfer::sync(self.key.token(), context.image.to_sync());
                context.engine.start(sync, false);
                Next::Wait
            }
            Err(error) => {
                self.failure = Some(Failure::Image(Arc::new(error)));
                self.give_up()
            }
        }
    }

    fn synced(&mut self, result: io::Result<()>, context: &mut Context) -> Next {
        let Work::Sync(flush) = std::mem::replace(&mut self.work, Work::Nothing) else {
            return Next::Wait;
        };
        match context.disk.end_flush(flush, result) {
            Ok(()) => Next::Answer(Status::Ok, 0),
            Err(error) => {
                self.failure = Some(Failure::Image(Arc::new(error)));
                self.give_up()
            }
        }
    }

    /// Drops what was reserved, which leaves the disk as it was.
    fn give_up(&mut self) -> Next {
        self.work = Work::Nothing;
        Next::Answer(Status::IoError, 0)
    }
}

/// Starts the transfers between all of `buffer` and the file at `at`; how many they are.
fn transfer(
    key: Key,
    operation: Operation,
    at: FileOffset,
    mut buffer: GuestBuffer,
    context: &mut Context,
) -> u32 {
    let mut at = at;
    let mut count = 0;
    while buffer.len() > 0 {
        let route = context.image.route(at, buffer.len());
        let part = buffer.split_front(route.len_bytes);
        // File systems hand buffered writes from a ring to helper threads, one at a time (ext4); inline they cost half.
        let inline = operation == Operation::Write && route.alignment.is_none();
        let token = key.token();
        let transfer = Transfer::data(token, operation, route.file, at.0, part, route.alignment);
        context.engine.start(transfer, inline);
        at = at.plus(route.len_bytes);
        count += 1;
    }
    count
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
            queue: 255,
            head: 1023,
        };
        assert_eq!(Key::from_token(key.token()), key);
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
