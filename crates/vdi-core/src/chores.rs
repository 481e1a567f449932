//! Chores: what changes an image but needs syncs, and so is done off the request path,
//! by whoever calls [`Disk::do_chores`].
//!
//! Here W1 (room first), W6 (the first write marks) and the clean close are done; their
//! requests come from [`crate::writer`], which parks whoever has to wait for them.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::task::Waker;

use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::disk::Disk;
use crate::format::RawUuid;
use crate::room::{Counts, Plan, Room};
use crate::visit::Visits;
use crate::writer::{CLOSED, NoRoom, OPEN, State, WriteError, Writer, lock, wake};

/// What is about to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Modified {
    /// What the disk reads as.
    Contents,
    /// Only where it is kept; children stay valid, so `uuid_modify` stays.
    Places,
}

/// How much a clean close moves to make the count exact: it must not take long. `vdi compact`
/// moves the rest.
const MOST_MOVED_BYTES: u64 = 256 << 20;

impl Disk {
    /// Names who is woken when there are chores; it then calls [`Self::do_chores`] on a thread that may block.
    pub fn set_housekeeper(&self, housekeeper: Waker) {
        if let Some(writer) = &self.writer {
            lock(&writer.state).housekeeper = Some(housekeeper);
        }
    }

    /// Does the chores that are due, and says whether there were any. Blocks for file I/O.
    ///
    /// # Errors
    /// If one failed; parked requests learn it on their own.
    pub fn do_chores(&self) -> Result<bool, WriteError> {
        let Some(writer) = &self.writer else {
            return Ok(false);
        };
        let _one_at_a_time = lock(&writer.chores);
        writer.check_status()?;
        let wants_mark = std::mem::take(&mut lock(&writer.state).wants_mark);
        if wants_mark {
            self.mark(writer, Modified::Contents)?;
        }
        let punched = self.punch_released(writer);
        // Whoever waits for room gets it, or an answer, whatever became of the holes.
        let made_room = self.make_room(writer)?;
        Ok(punched? || wants_mark || made_room)
    }

    /// W4: the space returns at once. That a failed punch left old bytes does no harm: the blocks are
    /// punched again before they get a new owner.
    fn punch_released(&self, writer: &Writer) -> Result<bool, WriteError> {
        let ranges = lock(&writer.state).released.take_unpunched();
        let punched = ranges.iter().try_for_each(|range| self.punch(range));
        let any = !ranges.is_empty();
        lock(&writer.state).released.add_punched(ranges);
        punched.map(|()| any)
    }

    fn punch(&self, range: &Range<u32>) -> Result<(), WriteError> {
        let area = self.top().area;
        let (start, end) = (area.end_of(range.start), area.end_of(range.end));
        let punched = self.top().storage.punch(start, end.0 - start.0);
        punched.map_err(|source| WriteError::NoSpace { source })
    }

    /// W6: children notice that their parent changed.
    fn mark(&self, writer: &Writer, modified: Modified) -> Result<(), WriteError> {
        if !writer.marked.load(Ordering::Acquire) {
            self.final_io(writer, || {
                self.bring_home(writer)?;
                let owned_end = self.top().map.owned_end().max(writer.hidden_end);
                // An image whose count is too small has blocks that others would overwrite.
                if self.top().header.blocks_allocated() < owned_end {
                    self.write_count(writer, owned_end)?;
                }
                if modified == Modified::Contents {
                    let uuid = RawUuid::from(Uuid::new_v4());
                    let at = self.top().header.raw().places().uuid_modify;
                    self.top().storage.write_all_at(uuid.as_bytes(), at)?;
                }
                self.top().storage.sync()
            })?;
        }
        let mut state = lock(&writer.state);
        writer.marked.store(true, Ordering::Release);
        wake(&mut state.parked);
        Ok(())
    }

    /// Moves blocks that are away (B1) into the places that others left for a map, before anything changes: a
    /// block released now would make the image one that is not full. Readers may still be at the
    /// old places, which stay as they are.
    fn bring_home(&self, writer: &Writer) -> io::Result<()> {
        let top = self.top();
        let in_image = top.header.blocks_in_image();
        if top.map.owned_end() <= in_image {
            return Ok(());
        }
        // A killed program's last entries must not be lost when their old places get other contents.
        top.storage.sync()?;
        self.fill_holes(u64::MAX)?;
        let counts = Counts {
            in_image,
            allocated: top.header.blocks_allocated(),
        };
        let file_len = top.storage.len_bytes()?;
        lock(&writer.state).room = Room::new(&top.map.owners(), top.area, counts, file_len);
        Ok(())
    }

    /// W1. The blocks of the plan are in nobody's hands meanwhile.
    fn make_room(&self, writer: &Writer) -> Result<bool, WriteError> {
        let (mut plan, wanted) = {
            let mut state = lock(&writer.state);
            let wanted = std::mem::take(&mut state.wants_blocks);
            let wants_more = std::mem::take(&mut state.wants_more);
            if (wanted == 0 || state.room.has(wanted)) && !(wants_more && state.room.is_low()) {
                if wanted > 0 {
                    // Whoever was parked for room finds it now.
                    wake(&mut state.parked);
                }
                return Ok(false);
            }
            let reclaimed = state.released.reclaim(&self.visits);
            state.room.add_stale(reclaimed);
            let Some(plan) = state.room.plan(wanted) else {
                return Ok(state.out_of_room(wanted, &self.visits));
            };
            (plan, wanted)
        };
        let mut done = self.carry_out(writer, &plan);
        if let Err(WriteError::NoSpace { .. }) = done {
            let least = lock(&writer.state).room.least(&plan, wanted);
            if let Some(least) = least {
                done = self.carry_out(writer, &least);
                plan = least;
            }
        }
        let mut state = lock(&writer.state);
        match &done {
            Ok(()) => {
                state.no_room = None;
                state.room.add(plan);
            }
            Err(error) => {
                state.room.abandon(plan);
                if wanted > 0 {
                    state.no_room = Some(NoRoom::Host(error.kind()));
                }
            }
        }
        wake(&mut state.parked);
        done.map(|()| true)
    }

    fn carry_out(&self, writer: &Writer, plan: &Plan) -> Result<(), WriteError> {
        match plan {
            Plan::Recycle(ranges) => self.recycle(writer, ranges),
            Plan::Extend(range) => self.extend(writer, range.end),
        }
    }

    /// Makes blocks without an owner read as zeros and brings them under W1: a header may count blocks
    /// that the file does not hold, and a file hold some that are not counted. The first sync is for the entries that once
    /// named them: none of those may come back.
    fn recycle(&self, writer: &Writer, ranges: &[Range<u32>]) -> Result<(), WriteError> {
        let storage = &self.top().storage;
        self.final_io(writer, || storage.sync())?;
        let highest = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        self.lengthen(writer, highest)?;
        for range in ranges {
            self.punch(range)?;
        }
        self.count(writer, highest)
    }

    fn extend(&self, writer: &Writer, blocks: u32) -> Result<(), WriteError> {
        self.lengthen(writer, blocks)?;
        // W1 asks for length and count, not for the data that guests wrote meanwhile: a sync of those takes longer than
        // the step lasts that is being made.
        self.final_io(writer, || {
            let counted = writer.counted.load(Ordering::Acquire).max(blocks);
            self.write_count_durably(writer, counted)
        })
    }

    /// Makes the file hold the first `blocks`.
    fn lengthen(&self, writer: &Writer, blocks: u32) -> Result<(), WriteError> {
        let end = self.top().area.end_of(blocks).0;
        if self.len_bytes(writer)? < end {
            let lengthened = self.top().storage.set_len(end);
            lengthened.map_err(|source| WriteError::NoSpace { source })?;
            writer.known_len.store(end, Ordering::Release);
        }
        Ok(())
    }

    /// The length of the file, which nobody else may have cut.
    fn len_bytes(&self, writer: &Writer) -> Result<u64, WriteError> {
        let found = self.top().storage.len_bytes();
        let found = found.map_err(|source| WriteError::NoSpace { source })?;
        let known = writer.known_len.load(Ordering::Acquire);
        if found < known {
            writer.fail();
            return Err(WriteError::Shortened { found, known });
        }
        Ok(found)
    }

    /// Makes the header's count cover the first `blocks`, and all that was done durable.
    fn count(&self, writer: &Writer, blocks: u32) -> Result<(), WriteError> {
        self.final_io(writer, || {
            if writer.counted.load(Ordering::Acquire) < blocks {
                self.write_count(writer, blocks)?;
            }
            self.top().storage.sync()
        })
    }

    fn write_count(&self, writer: &Writer, blocks_allocated: u32) -> io::Result<()> {
        writer.counted.store(blocks_allocated, Ordering::Release);
        let at = self.top().header.raw().places().blocks_allocated;
        let bytes = blocks_allocated.to_le_bytes();
        self.top().storage.write_all_at(&bytes, at)
    }

    /// The same, durably, and with it the length of the file; nothing else.
    fn write_count_durably(&self, writer: &Writer, blocks_allocated: u32) -> io::Result<()> {
        writer.counted.store(blocks_allocated, Ordering::Release);
        let at = self.top().header.raw().places().blocks_allocated;
        let bytes = blocks_allocated.to_le_bytes();
        self.top().storage.write_durably(&bytes, at)
    }

    /// Metadata writes and syncs, whose failure is final (W5).
    fn final_io(
        &self,
        writer: &Writer,
        io: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), WriteError> {
        io().map_err(|source| {
            writer.fail();
            WriteError::Metadata { source }
        })
    }

    /// Ends writing: gives unused room back, so that count and length are exact for other
    /// programs, and syncs. All requests must have been answered. A disk that was not
    /// written is left as it was. Closing again does nothing.
    ///
    /// # Errors
    /// If the host fails, or an earlier failure was final.
    pub fn close(&self) -> Result<(), WriteError> {
        self.close_moving(MOST_MOVED_BYTES)
    }

    /// Whether anything was changed since the disk was opened.
    pub fn is_changed(&self) -> bool {
        self.writer
            .as_ref()
            .is_some_and(|writer| writer.marked.load(Ordering::Acquire))
    }

    /// Closes a disk for somebody who let go of it without closing: count and length become exact, the
    /// contents and `uuid_modify` stay.
    ///
    /// # Errors
    /// As [`Disk::close`].
    pub fn close_tidily(&self) -> Result<(), WriteError> {
        self.begin_maintenance(Modified::Places)?;
        self.close()
    }

    /// Begins maintenance: says beforehand what the changes from here on will have modified. Those
    /// that leave the contents as they are do not renew `uuid_modify` (as VirtualBox's compaction and
    /// resize do not).
    pub(crate) fn begin_maintenance(&self, modified: Modified) -> Result<(), WriteError> {
        let writer = self.writer.as_ref().ok_or(WriteError::ReadOnly)?;
        let _one_at_a_time = lock(&writer.chores);
        writer.check_status()?;
        self.mark(writer, modified)
    }

    /// The number behind the highest block used by entries beyond the disk's end.
    pub(crate) fn hidden_end(&self) -> u32 {
        self.writer.as_ref().map_or(0, |writer| writer.hidden_end)
    }

    /// Closes, and moves up to `most_moved_bytes` to make the count exact.
    pub(crate) fn close_moving(&self, most_moved_bytes: u64) -> Result<(), WriteError> {
        let Some(writer) = &self.writer else {
            return Ok(());
        };
        let _one_at_a_time = lock(&writer.chores);
        let before = {
            let mut state = lock(&writer.state);
            let swapped =
                writer
                    .status
                    .compare_exchange(OPEN, CLOSED, Ordering::AcqRel, Ordering::Acquire);
            wake(&mut state.parked);
            swapped.unwrap_or_else(|status| status)
        };
        match before {
            OPEN if writer.marked.load(Ordering::Acquire) => self.trim(writer, most_moved_bytes),
            OPEN if !writer.is_synced() => self.final_io(writer, || self.top().storage.sync()),
            OPEN | CLOSED => Ok(()),
            _ => Err(WriteError::Failed),
        }
    }

    fn trim(&self, writer: &Writer, most_moved_bytes: u64) -> Result<(), WriteError> {
        let storage = &self.top().storage;
        self.len_bytes(writer)?;
        self.final_io(writer, || {
            // Entries of released blocks must be gone for good before those get other contents.
            storage.sync()?;
            let exact = match writer.hidden_end {
                0 => self.fill_holes(most_moved_bytes)?,
                hidden_end => self.top().map.owned_end().max(hidden_end),
            };
            let end = self.top().area.end_of(exact).0;
            self.write_count(writer, exact)?;
            if storage.len_bytes()? > end {
                storage.set_len(end)?;
            }
            storage.sync()
        })
    }
}

impl State {
    /// There is no more room, unless released blocks come back: then who waits is woken to ask
    /// again. Says whether anything was changed.
    fn out_of_room(&mut self, wanted: u32, visits: &Visits) -> bool {
        if wanted == 0 {
            return false;
        }
        if self.released.is_waiting() {
            let parked = self.parked.drain(..).chain(self.housekeeper.clone());
            visits.wake_when_over(parked);
            return false;
        }
        self.no_room = Some(NoRoom::Full);
        wake(&mut self.parked);
        true
    }
}
