//! How the bytes of a request move: at once, where nothing has to be waited for, or by transfers.

use vdi_core::{FileOffset, Fill, Reservation, SectorRange, Source};

use super::{Change, Context, Key};
use crate::portion::{SMALL, step_sectors};
use crate::request::Request;
use crate::ring::GuestBuffer;
use crate::sharer::Share;
use crate::transfer::{Operation, Transfer};

/// Sectors of a request that go past the page cache in one step: 16 MiB, four times what Linux sends at most by default. Bounds the size of a
/// reservation and the time of a step. What goes through the page cache is copied by the worker, in steps of a turn (`portion`).
const WINDOW_SECTORS: u64 = (16 << 20) / 512;

/// Which way guest data go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moving {
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
pub(super) enum Part {
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
    pub(super) fn of(reservation: &Reservation) -> impl Iterator<Item = Self> {
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
    pub(super) fn start(self, key: Key, change: &mut Change, context: &mut Context<'_>) -> u32 {
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
    pub(super) fn step(&self, rest: SectorRange) -> u64 {
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
    pub(super) fn written(&mut self, key: Key, reservation: Reservation) {
        if reservation.needs_sync() {
            self.desk.unsynced.push((key, reservation));
        } else {
            self.desk.written.push(key);
            self.desk.reservations.push(reservation);
        }
    }

    /// Starts the transfers between all of `buffer` and an image's file at `at`; how many they are.
    pub(super) fn transfer(
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
    pub(super) fn copy(&mut self, key: Key, fill: Fill) -> u32 {
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
