//! How an image changes: the rules that keep every crash harmless.
//!
//! - **W1** Room first: blocks come from [`Room`], whose blocks are durable before they
//!   are handed out. Making room is a chore, off the request path.
//! - **W2** Publish when it reads right: all blocks handed out read as zeros, as the disk did,
//!   so an entry may be written as soon as its data are, without a sync.
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
use crate::disk::Disk;
use crate::image::{Image, Place};
use crate::room::{Counts, Room};
use crate::units::{DiskBlock, FileBlock, FileOffset, SectorRange};

/// What a writable disk has beyond its image.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) state: Mutex<State>,
    /// Held over the file I/O of chores and of closing: one at a time.
    pub(crate) chores: Mutex<()>,
    pub(crate) status: AtomicU8,
    /// W6: `uuid_modify` is renewed.
    pub(crate) marked: AtomicBool,
    /// Batches of writes that were completed, and how many of them a sync covers.
    written: AtomicU64,
    synced: AtomicU64,
    /// The number behind the highest block used by entries beyond the disk's end.
    pub(crate) hidden_end: u32,
    /// `blocks_allocated` as the file has it; chores alone change it.
    pub(crate) counted: AtomicU32,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) room: Room,
    in_transition: HashSet<DiskBlock>,
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
}

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
    pub(crate) fn new(image: &Image, owners: &Owners, file_len: u64) -> Self {
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
        };
        Self {
            state: Mutex::new(state),
            chores: Mutex::new(()),
            status: AtomicU8::new(OPEN),
            marked: AtomicBool::new(false),
            // A program that was killed may have written what no sync covers yet (P1, P2).
            written: AtomicU64::new(1),
            synced: AtomicU64::new(0),
            hidden_end: owners.hidden_end(),
            counted: AtomicU32::new(counts.allocated),
        }
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
    fn park(&mut self, waker: &Waker) -> Reserve {
        if !self.parked.iter().any(|known| known.will_wake(waker)) {
            self.parked.push(waker.clone());
        }
        Reserve::Parked
    }

    fn call_housekeeper(&self) {
        if let Some(housekeeper) = &self.housekeeper {
            housekeeper.wake_by_ref();
        }
    }
}

type NewBlocks = SmallVec<[(DiskBlock, FileBlock); 2]>;
type WriteExtents = SmallVec<[WriteExtent; 2]>;

/// Places for the data of one write, kept for it until [`Disk::commit`].
///
/// Dropping it gives all back and leaves the disk as it was.
#[derive(Debug)]
#[must_use = "a reservation that is dropped undoes the write"]
pub struct Reservation {
    extents: WriteExtents,
    new: Option<(Arc<Disk>, NewBlocks)>,
}

impl Reservation {
    /// Where the data go, in the order of the disk, neighbours merged.
    pub fn extents(&self) -> &[WriteExtent] {
        &self.extents
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some((disk, blocks)) = self.new.take() else {
            return;
        };
        let Some(writer) = &disk.writer else { return };
        let mut state = lock(&writer.state);
        for (disk_block, file_block) in blocks {
            state.in_transition.remove(&disk_block);
            state.room.give_back(file_block);
        }
        wake(&mut state.parked);
    }
}

/// A run of bytes to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteExtent {
    /// The first byte in the image's file.
    pub at: FileOffset,
    /// How many.
    pub len_bytes: u64,
}

/// What came of [`Disk::reserve`].
#[derive(Debug)]
#[must_use = "a reservation that is dropped undoes the write"]
pub enum Reserve {
    /// Write the data now.
    Ready(Reservation),
    /// Call again when the waker was woken; nothing is held until then.
    Parked,
}

/// The duty to sync the image's file and to tell [`Disk::end_flush`].
#[derive(Debug)]
#[must_use = "without `end_flush` the same is synced again by the next flush"]
pub struct Flush {
    covers: u64,
}

impl Disk {
    /// Finds places for the data of one write.
    ///
    /// # Errors
    /// If the disk takes no writes (any more), or has no room.
    pub fn reserve(
        self: &Arc<Self>,
        range: SectorRange,
        waker: &Waker,
    ) -> Result<Reserve, WriteError> {
        let writer = self.writer.as_ref().ok_or(WriteError::ReadOnly)?;
        writer.check_status()?;
        if !writer.marked.load(Ordering::Acquire) {
            return Ok(self.park_until_marked(writer, waker));
        }
        match self.extents_in_place(range) {
            Some(extents) => Ok(Reserve::Ready(Reservation { extents, new: None })),
            None => self.reserve_blocks(writer, range, waker),
        }
    }

    fn park_until_marked(&self, writer: &Writer, waker: &Waker) -> Reserve {
        let mut state = lock(&writer.state);
        let parked = state.park(waker);
        // What was true without the lock may have changed; then nobody would wake it.
        if writer.marked.load(Ordering::Acquire) || writer.check_status().is_err() {
            wake(&mut state.parked);
        } else {
            state.wants_mark = true;
            state.call_housekeeper();
        }
        parked
    }

    /// The extents of a range of which every block is allocated.
    fn extents_in_place(&self, range: SectorRange) -> Option<WriteExtents> {
        let mut extents = WriteExtents::new();
        for span in range.spans(self.image.header.block_size()) {
            match self.image.locate(span) {
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
        waker: &Waker,
    ) -> Result<Reserve, WriteError> {
        let mut state = lock(&writer.state);
        writer.check_status()?;
        let spans = || range.spans(self.image.header.block_size());
        let mut missing = 0;
        for span in spans() {
            // Entries change only under this lock, so what is seen here stays true.
            if matches!(self.image.locate(span), Place::Stored(_)) {
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
        let (mut extents, mut new) = (WriteExtents::new(), NewBlocks::new());
        for span in spans() {
            let at = match self.image.locate(span) {
                Place::Stored(at) => at,
                Place::Unallocated | Place::Zero => {
                    let file_block = state.room.take().expect("the room was counted");
                    state.in_transition.insert(span.block);
                    new.push((span.block, file_block));
                    self.image
                        .area
                        .contents_of(file_block)
                        .plus(span.skip_bytes)
                }
            };
            push_merged(
                &mut extents,
                WriteExtent {
                    at,
                    len_bytes: span.len_bytes,
                },
            );
        }
        if state.room.is_low() && !state.wants_more {
            state.wants_more = true;
            state.call_housekeeper();
        }
        let new = (!new.is_empty()).then(|| (Arc::clone(self), new));
        Ok(Reserve::Ready(Reservation { extents, new }))
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
        // W5; and after a close the header's count does not cover them.
        writer.check_status()?;
        let mut new: NewBlocks = written
            .iter()
            .filter_map(|one| one.new.as_ref())
            .flat_map(|(_, new)| new.iter().copied())
            .collect();
        if !new.is_empty() {
            new.sort_unstable();
            self.write_entries(&new).map_err(|source| {
                writer.fail();
                WriteError::Metadata { source }
            })?;
            let mut state = lock(&writer.state);
            for &(disk_block, file_block) in &new {
                self.image
                    .map
                    .publish(disk_block, BlockMapEntry::Allocated(file_block));
                state.in_transition.remove(&disk_block);
            }
            wake(&mut state.parked);
        }
        for reservation in &mut written {
            reservation.new = None;
        }
        writer.written.fetch_add(1, Ordering::AcqRel);
        writer.check_status()
    }

    /// Writes the entries of sorted blocks, neighbours in one go.
    fn write_entries(&self, new: &[(DiskBlock, FileBlock)]) -> io::Result<()> {
        for run in new.chunk_by(|(a, _), (b, _)| a.is_before(*b)) {
            let bytes: SmallVec<[u8; 64]> = run
                .iter()
                .flat_map(|(_, file_block)| file_block.get().to_le_bytes())
                .collect();
            self.image
                .storage
                .write_all_at(&bytes, self.image.map.entry_at(run[0].0))?;
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
        let covers = writer.written.load(Ordering::Acquire);
        Ok((!writer.is_synced()).then_some(Flush { covers }))
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

fn push_merged(extents: &mut WriteExtents, next: WriteExtent) {
    match extents.last_mut() {
        Some(last) if last.at.plus(last.len_bytes) == next.at => last.len_bytes += next.len_bytes,
        _ => extents.push(next),
    }
}

impl State {
    /// Parks a request that wants room, or tells it that there is none.
    fn ask_for_room(&mut self, missing: u32, waker: &Waker) -> Result<Reserve, WriteError> {
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
            Self::ReadOnly | Self::Closed | Self::Failed | Self::Full => io::ErrorKind::Other,
            Self::NoSpace { source }
            | Self::Data { source }
            | Self::Metadata { source }
            | Self::Sync { source } => source.kind(),
        }
    }
}
