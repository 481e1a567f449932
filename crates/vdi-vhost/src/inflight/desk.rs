//! What requests need: what is their worker's ([`Tools`]), and what is their seat's ([`Desk`]).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::task::Waker;

use vdi_core::{Disk, Lane, Reservation};

use crate::clock::Moment;
use crate::command::SeatNumber;
use crate::complaints::Complaints;
use crate::device::Device;
use crate::engine::Engine;
use crate::image_file::ImageFile;
use crate::lone::Lone;
use crate::portion::{Portion, SMALL, TURN_BYTES};
use crate::ring::WatchKey;
use crate::sharer::{Shared, Sharer};
use crate::stats::Tally;
use crate::worker::DOORBELL;

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
    pub(super) sharer: Option<Sharer>,
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
    pub(super) fn may_move(&self, bytes: u64) -> bool {
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
}
