//! How an image changes: the rules that keep every crash harmless.
//!
//! - **W1** Room first: blocks come from [`Room`], whose blocks are durable before they
//!   are handed out. Making room is a chore, off the request path.
//! - **W2** Publish when it reads right: all blocks handed out read as zeros. Where the disk did too,
//!   an entry may be written as soon as its data are, without a sync. Where a parent's data
//!   showed through, data and copies of the rest (fills) are synced first; many share one sync.
//! - **W3** Answer after publish: [`Disk::commit`] has written the entries to the file
//!   when it returns; neighbours go in one write. A flush is one sync, or none if
//!   nothing was written since the last.
//! - **W5** Failure is final: after a failed sync or metadata write nothing is written any more.
//!   A failed data write leaves the map as it was.
//! - **W6** First write marks: before the first change `uuid_modify` is renewed, durably.
//! - **W7** One writer per block in transition: a request that meets one is parked, and
//!   takes nothing meanwhile, so that parked requests cannot wait for each other.
//!
//! The state's mutex is held for look-ups only, never over file I/O; requests whose blocks
//! are all allocated do not take it.

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use smallvec::SmallVec;

use crate::block_map::{BlockMapEntry, Owners};
use crate::disk::{Disk, Source};
use crate::image::{Image, OpenError, Place};
use crate::release::Released;
use crate::reservation::{
    Changes, Fill, Flush, InPlace, Publish, Reservation, Reserve, WriteExtent, WriteExtents,
    bytes_of, push_merged,
};
use crate::room::{Counts, Room};
use crate::units::{DiskBlock, FileOffset, SectorRange, Span};
use crate::visit::{Lane, Visit};

/// What a writable disk has beyond its image.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) state: Mutex<State>,
    /// Held over the file I/O of chores and of closing: one at a time.
    pub(crate) chores: Mutex<()>,
    pub(crate) status: AtomicU8,
    /// W6: `uuid_modify` is renewed.
    pub(crate) marked: AtomicBool,
    /// Bytes of writes that were completed, at least one for each batch of them, and how many of them syncs cover.
    written: AtomicU64,
    synced: AtomicU64,
    /// The number behind the highest block used by entries beyond the disk's end.
    pub(crate) hidden_end: u32,
    /// `blocks_allocated` as the file has it; chores alone change it.
    pub(crate) counted: AtomicU32,
    /// The file is at least so long, unless somebody else has cut it; chores alone change it.
    pub(crate) known_len: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) room: Room,
    pub(crate) in_transition: HashSet<DiskBlock>,
    /// Woken at every change that a parked request may wait for.
    pub(crate) parked: Vec<Waker>,
    pub(crate) wants_mark: bool,
    /// Blocks that a parked request wants; 0 if none does.
    pub(crate) wants_blocks: u32,
    /// More room is wanted ahead of need.
    pub(crate) wants_more: bool,
    /// The last attempt to make room failed so; told to one request that wants it.
    pub(crate) no_room: Option<NoRoom>,
    pub(crate) housekeeper: Option<Waker>,
    pub(crate) released: Released,
}

/// What a program that was killed may have written: nobody knows, so it counts as much.
const BEFORE_OPEN: u64 = 1 << 40;

/// `Writer::status`.
pub(crate) const OPEN: u8 = 0;
const FAILED: u8 = 1;
pub(crate) const CLOSED: u8 = 2;

#[derive(Clone, Copy, Debug)]
pub(crate) enum NoRoom {
    Host(io::ErrorKind),
    Full,
}

impl Writer {
    pub(crate) fn new(image: &Image, owners: &Owners) -> Result<Self, OpenError> {
        let file_len = image
            .storage
            .len_bytes()
            .map_err(|source| OpenError::Read { source })?;
        let counts = Counts {
            in_image: image.header.blocks_in_image(),
            allocated: image.header.blocks_allocated(),
        };
        let state = State {
            room: Room::new(owners, image.area, counts, file_len),
            in_transition: HashSet::new(),
            parked: Vec::new(),
            wants_mark: false,
            wants_blocks: 0,
            wants_more: false,
            no_room: None,
            housekeeper: None,
            released: Released::default(),
        };
        Ok(Self {
            state: Mutex::new(state),
            chores: Mutex::new(()),
            status: AtomicU8::new(OPEN),
            marked: AtomicBool::new(false),
            // A program that was killed may have written what no sync covers yet (P1, P2).
            written: AtomicU64::new(BEFORE_OPEN),
            synced: AtomicU64::new(0),
            hidden_end: owners.hidden_end(),
            counted: AtomicU32::new(counts.allocated),
            known_len: AtomicU64::new(file_len),
        })
    }

    pub(crate) fn check_status(&self) -> Result<(), WriteError> {
        match self.status.load(Ordering::Acquire) {
            OPEN => Ok(()),
            CLOSED => Err(WriteError::Closed),
            _ => Err(WriteError::Failed),
        }
    }

    /// Whether all that was committed is durable.
    pub(crate) fn is_synced(&self) -> bool {
        self.written.load(Ordering::Acquire) <= self.synced.load(Ordering::Acquire)
    }

    /// `bytes` more were written and are not synced.
    fn add_written(&self, bytes: u64) {
        self.written.fetch_add(bytes.max(1), Ordering::AcqRel);
    }

    /// A sync that begins now.
    fn begin_sync(&self) -> Flush {
        let covers = self.written.load(Ordering::Acquire);
        let synced = self.synced.load(Ordering::Acquire);
        Flush {
            covers,
            unsynced_bytes: covers.saturating_sub(synced),
        }
    }

    /// W5: from now on nothing is written.
    pub(crate) fn fail(&self) {
        self.status.store(FAILED, Ordering::Release);
        wake(&mut lock(&self.state).parked);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn wake(parked: &mut Vec<Waker>) {
    for waker in parked.drain(..) {
        waker.wake();
    }
}

impl State {
    pub(crate) fn park(&mut self, waker: &Waker) -> Reserve {
        if !self.parked.iter().any(|known| known.will_wake(waker)) {
            self.parked.push(waker.clone());
        }
        Reserve::Parked
    }

    /// W6. Parks the first writers until the image is marked.
    pub(crate) fn park_until_marked(&mut self, writer: &Writer, waker: &Waker) -> Reserve {
        let parked = self.park(waker);
        // What was true without the lock may have changed; then nobody would wake it.
        if writer.marked.load(Ordering::Acquire) || writer.check_status().is_err() {
            wake(&mut self.parked);
        } else {
            self.wants_mark = true;
            self.call_housekeeper();
        }
        parked
    }

    pub(crate) fn call_housekeeper(&self) {
        if let Some(housekeeper) = &self.housekeeper {
            housekeeper.wake_by_ref();
        }
    }
}

impl Disk {
    /// Finds places for the data of one write.
    ///
    /// # Errors
    /// If the disk takes no writes (any more), or has no room.
    pub fn reserve(
        self: &Arc<Self>,
        range: SectorRange,
        lane: &Lane,
        waker: &Waker,
    ) -> Result<Reserve, WriteError> {
        let writer = self.writer.as_ref().ok_or(WriteError::ReadOnly)?;
        writer.check_status()?;
        if range.is_empty() {
            return Ok(Reserve::Ready(Reservation::empty(lane.enter())));
        }
        if !writer.marked.load(Ordering::Acquire) {
            let mut state = lock(&writer.state);
            return Ok(state.park_until_marked(writer, waker));
        }
        let visit = lane.enter();
        match self.extents_in_place(range) {
            Some(extents) => {
                let mut reservation = Reservation::empty(visit);
                reservation.extents = extents;
                Ok(Reserve::Ready(reservation))
            }
            None => self.reserve_blocks(writer, range, visit, waker),
        }
    }

    /// Places for a write that changes no entry, because each of its blocks is allocated. `None` if anything else has to be
    /// thought of first: then [`Disk::reserve`] is to be asked.
    pub fn reserve_in_place(&self, range: SectorRange, lane: &Lane) -> Option<InPlace> {
        let writer = self.writer.as_ref()?;
        if writer.check_status().is_err() || !writer.marked.load(Ordering::Acquire) {
            return None;
        }
        let visit = lane.enter();
        let extents = self.extents_in_place(range)?;
        Some(InPlace {
            extents,
            _visit: visit,
        })
    }

    /// What [`Disk::commit`] is for a write in place whose data are written.
    ///
    /// # Errors
    /// If writing has ended meanwhile (W5).
    pub fn commit_in_place(&self, written: InPlace) -> Result<(), WriteError> {
        let writer = self.writer.as_ref().ok_or(WriteError::ReadOnly)?;
        writer.add_written(bytes_of(written.extents()));
        drop(written);
        writer.check_status()
    }

    /// The extents of a range of which every block is allocated.
    fn extents_in_place(&self, range: SectorRange) -> Option<WriteExtents> {
        let mut extents = WriteExtents::new();
        for span in range.spans(self.top().header.block_size()) {
            match self.top().locate(span) {
                Place::Stored(at) => push_merged(
                    &mut extents,
                    WriteExtent {
                        at,
                        len_bytes: span.len_bytes,
                    },
                ),
                Place::Unallocated | Place::Zero => return None,
            }
        }
        Some(extents)
    }

    fn reserve_blocks(
        self: &Arc<Self>,
        writer: &Writer,
        range: SectorRange,
        visit: Visit,
        waker: &Waker,
    ) -> Result<Reserve, WriteError> {
        let mut state = lock(&writer.state);
        writer.check_status()?;
        let spans = || range.spans(self.top().header.block_size());
        let mut missing = 0;
        for span in spans() {
            // Entries change only under this lock, so what is seen here stays true.
            if matches!(self.top().locate(span), Place::Stored(_)) {
                continue;
            }
            if state.in_transition.contains(&span.block) {
                return Ok(state.park(waker)); // W7
            }
            missing += 1;
        }
        if !state.room.has(missing) {
            return state.ask_for_room(missing, waker);
        }
        let mut reservation = Reservation::empty(visit);
        for span in spans() {
            let at = match self.top().locate(span) {
                Place::Stored(at) => at,
                place @ (Place::Unallocated | Place::Zero) => {
                    self.take_block(&mut state, span, place, &mut reservation)
                }
            };
            let len_bytes = span.len_bytes;
            push_merged(&mut reservation.extents, WriteExtent { at, len_bytes });
        }
        state.call_if_low();
        Ok(Reserve::Ready(reservation))
    }

    /// Takes a block for `span`, which has none and is at `place`; gives the place of its data. There is
    /// room for it, and it is not in transition.
    pub(crate) fn take_block(
        self: &Arc<Self>,
        state: &mut State,
        span: Span,
        place: Place,
        reservation: &mut Reservation,
    ) -> FileOffset {
        let file_block = state.room.take().expect("the room was counted");
        state.forget_that_it_is_full();
        state.in_transition.insert(span.block);
        let change = (span.block, BlockMapEntry::Allocated(file_block));
        reservation.changes.push(change);
        reservation.disk.get_or_insert_with(|| Arc::clone(self));
        let contents = self.top().area.contents_of(file_block);
        let over_data =
            place == Place::Unallocated && self.fill_around(span, contents, &mut reservation.fills);
        if over_data {
            reservation.publish = Publish::WhenSynced;
        }
        contents.plus(span.skip_bytes)
    }

    /// Adds what the parents have of `span`'s block outside of `span`. Says whether they have
    /// anything of that block at all.
    fn fill_around(&self, span: Span, contents: FileOffset, fills: &mut Vec<Fill>) -> bool {
        let mut has_data = false;
        let mut at = 0;
        for extent in self.parents_of(span.block) {
            let (start, end) = (at, at + extent.len_bytes);
            at = end;
            let Source::Stored { depth, at: from } = extent.source else {
                continue;
            };
            has_data = true;
            let before = (start, end.min(span.skip_bytes));
            let behind = (start.max(span.skip_bytes + span.len_bytes), end);
            for (first, last) in [before, behind] {
                if first < last {
                    fills.push(Fill {
                        depth: depth + 1,
                        from: from.plus(first - start),
                        to: contents.plus(first),
                        len_bytes: last - first,
                    });
                }
            }
        }
        has_data
    }

    /// Makes writes visible whose data are written: their entries go to the file, then to
    /// the map. After it they may be answered. Takes all reservations out of `written`.
    ///
    /// # Errors
    /// If an entry cannot be written; then none of the writes may be answered as done (W5).
    pub fn commit(&self, written: &mut Vec<Reservation>) -> Result<(), WriteError> {
        let writer = self.writer.as_ref().ok_or(WriteError::ReadOnly)?;
        // Dropped at the end, so on failure the blocks are given back.
        let mut written = std::mem::take(written);
        let early = written.iter().any(Reservation::needs_sync);
        assert!(
            !early,
            "W2: blocks over a parent's data are synced before they are published"
        );
        // W5; and after a close the header's count does not cover them.
        writer.check_status()?;
        let mut changes: Changes = written
            .iter()
            .flat_map(|one| one.changes.iter().copied())
            .collect();
        if !changes.is_empty() {
            changes.sort_unstable_by_key(|&(disk_block, _)| disk_block);
            self.write_entries(&changes).map_err(|source| {
                writer.fail();
                WriteError::Metadata { source }
            })?;
            self.publish(writer, &changes);
        }
        let mut bytes = 0;
        for reservation in &mut written {
            reservation.disk = None;
            bytes += reservation.bytes();
        }
        writer.add_written(bytes);
        writer.check_status()
    }

    /// Writes the entries of sorted blocks, neighbours in one go.
    fn write_entries(&self, changes: &[(DiskBlock, BlockMapEntry)]) -> io::Result<()> {
        for run in changes.chunk_by(|(a, _), (b, _)| a.is_before(*b)) {
            let entries = run.iter().map(|(_, entry)| entry.to_raw().to_le_bytes());
            let bytes: SmallVec<[u8; 64]> = entries.flatten().collect();
            let at = self.top().map.entry_at(run[0].0);
            self.top().storage.write_all_at(&bytes, at)?;
        }
        Ok(())
    }

    /// Lets all see what the file has already.
    fn publish(&self, writer: &Writer, changes: &[(DiskBlock, BlockMapEntry)]) {
        let mut state = lock(&writer.state);
        for &(disk_block, entry) in changes {
            let before = self.top().map.get(disk_block);
            self.top().map.publish(disk_block, entry);
            state.in_transition.remove(&disk_block);
            if let BlockMapEntry::Allocated(file_block) = before {
                state.released.add(file_block);
                state.forget_that_it_is_full();
            }
        }
        if state.released.is_punch_due() {
            state.call_housekeeper();
        }
        wake(&mut state.parked);
    }

    /// Begins the sync that reservations need whose [`Reservation::needs_sync`] says so: the caller
    /// syncs the top image's file after their data and fills are written. One serves many.
    pub fn begin_data_sync(&self) -> Flush {
        let nothing = Flush {
            covers: 0,
            unsynced_bytes: 0,
        };
        self.writer.as_ref().map_or(nothing, Writer::begin_sync)
    }

    /// Ends it with what the sync returned; then the reservations may be committed.
    ///
    /// # Errors
    /// If the sync failed.
    pub fn end_data_sync(
        &self,
        flush: Flush,
        result: io::Result<()>,
        reservations: &mut [Reservation],
    ) -> Result<(), WriteError> {
        self.end_flush(flush, result)?;
        for reservation in reservations {
            reservation.publish = Publish::WhenWritten;
        }
        Ok(())
    }

    /// Begins a flush: `None` if all that was committed before is durable already. The first
    /// one since open syncs in any case: it covers also what was committed before a `kill -9`.
    ///
    /// # Errors
    /// If an earlier sync failed: then nothing can be promised (W5).
    pub fn begin_flush(&self) -> Result<Option<Flush>, WriteError> {
        let Some(writer) = &self.writer else {
            return Ok(None);
        };
        if writer.status.load(Ordering::Acquire) == FAILED {
            return Err(WriteError::Failed);
        }
        Ok((!writer.is_synced()).then(|| writer.begin_sync()))
    }

    /// Ends a flush with what the sync of the file returned.
    ///
    /// # Errors
    /// If the sync failed, or another one meanwhile.
    #[expect(clippy::needless_pass_by_value, reason = "a flush ends once")]
    pub fn end_flush(&self, flush: Flush, result: io::Result<()>) -> Result<(), WriteError> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        match result {
            // The kernel tells a lost write to one of the syncs that run at the same time.
            Ok(()) if self.is_failed() => Err(WriteError::Failed),
            Ok(()) => {
                writer.synced.fetch_max(flush.covers, Ordering::AcqRel);
                Ok(())
            }
            Err(source) => {
                writer.fail();
                Err(WriteError::Sync { source })
            }
        }
    }

    /// Whether an earlier failure ended all writing (W5).
    pub fn is_failed(&self) -> bool {
        self.writer
            .as_ref()
            .is_some_and(|writer| writer.status.load(Ordering::Acquire) == FAILED)
    }
}

impl State {
    /// Has room made ahead of need.
    pub(crate) fn call_if_low(&mut self) {
        if self.room.is_low() && !self.wants_more {
            self.wants_more = true;
            self.call_housekeeper();
        }
    }

    /// There was no room for somebody who has not asked again yet. Since then a block was taken, maybe by just that request, or came
    /// back, so whoever asks next is to be looked at anew.
    pub(crate) fn forget_that_it_is_full(&mut self) {
        if matches!(self.no_room, Some(NoRoom::Full)) {
            self.no_room = None;
        }
    }

    /// Parks a request that wants room, or tells it that there is none.
    pub(crate) fn ask_for_room(
        &mut self,
        missing: u32,
        waker: &Waker,
    ) -> Result<Reserve, WriteError> {
        match self.no_room.take() {
            Some(NoRoom::Host(kind)) => {
                return Err(WriteError::NoSpace {
                    source: kind.into(),
                });
            }
            Some(NoRoom::Full) => return Err(WriteError::Full),
            None => {}
        }
        self.wants_blocks = self.wants_blocks.max(missing);
        self.call_housekeeper();
        Ok(self.park(waker))
    }
}

/// Why a write was not done.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The disk was opened read-only.
    #[error("the disk is open read-only")]
    ReadOnly,
    /// The disk was closed.
    #[error("the disk is closed")]
    Closed,
    /// W5.
    #[error(
        "writing ended when a sync or a metadata write failed; run `vdi check` and open the image again"
    )]
    Failed,
    /// The map has an entry for every block that `blocks_in_image` allows.
    #[error(
        "the image has no block left, although its disk has blocks without one; run `vdi check`"
    )]
    Full,
    /// The host has no room for more blocks, or will not give it. The map is as it was.
    #[error("cannot make room for new blocks in the image's file")]
    NoSpace {
        /// The host's error.
        source: io::Error,
    },
    /// Lengthening it again would turn what is missing into zeros.
    #[error(
        "the image's file has {found} bytes and is shorter than it was ({known}): something else has cut it; \
         the disk takes no more writes"
    )]
    Shortened {
        /// Its length now.
        found: u64,
        /// Its length before.
        known: u64,
    },
    /// The data could not be written. The map is as it was.
    #[error("cannot write data to the image's file")]
    Data {
        /// The host's error.
        source: io::Error,
    },
    /// Header or map could not be written; the disk takes no more writes.
    #[error("cannot write the image's header or map; the disk takes no more writes")]
    Metadata {
        /// The host's error.
        source: io::Error,
    },
    /// What was written may be lost; the disk takes no more writes.
    #[error("cannot sync the image's file; the disk takes no more writes")]
    Sync {
        /// The host's error.
        source: io::Error,
    },
}

impl WriteError {
    /// The kind of the host's error behind it.
    pub(crate) fn kind(&self) -> io::ErrorKind {
        match self {
            Self::ReadOnly | Self::Closed | Self::Failed | Self::Full | Self::Shortened { .. } => {
                io::ErrorKind::Other
            }
            Self::NoSpace { source }
            | Self::Data { source }
            | Self::Metadata { source }
            | Self::Sync { source } => source.kind(),
        }
    }
}
