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
use crate::format::{AT_BLOCKS_ALLOCATED, AT_UUID_MODIFY, RawUuid};
use crate::room::Plan;
use crate::writer::{CLOSED, NoRoom, OPEN, WriteError, Writer, lock, wake};

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
            self.mark(writer)?;
        }
        let made_room = self.make_room(writer)?;
        Ok(wants_mark || made_room)
    }

    /// W6: children notice that their parent changed.
    fn mark(&self, writer: &Writer) -> Result<(), WriteError> {
        if !writer.marked.load(Ordering::Acquire) {
            let owned_end = self.image.map.owned_end().max(writer.hidden_end);
            self.final_io(writer, || {
                // An image whose count is too small has blocks that others would overwrite.
                if self.image.header.blocks_allocated() < owned_end {
                    self.write_count(writer, owned_end)?;
                }
                let uuid = RawUuid::from(Uuid::new_v4());
                self.image
                    .storage
                    .write_all_at(uuid.as_bytes(), AT_UUID_MODIFY)?;
                self.image.storage.sync()
            })?;
        }
        let mut state = lock(&writer.state);
        writer.marked.store(true, Ordering::Release);
        wake(&mut state.parked);
        Ok(())
    }

    /// W1. The blocks of the plan are in nobody's hands meanwhile.
    fn make_room(&self, writer: &Writer) -> Result<bool, WriteError> {
        let (plan, wanted) = {
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
            let Some(plan) = state.room.plan(wanted) else {
                state.no_room = (wanted > 0).then_some(NoRoom::Full);
                wake(&mut state.parked);
                return Ok(true);
            };
            (plan, wanted)
        };
        let done = match &plan {
            Plan::Recycle(ranges) => self.recycle(writer, ranges),
            Plan::Extend(range) => self.extend(writer, range.end),
        };
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

    /// Makes blocks without an owner read as zeros and brings them under W1: a header may count blocks
    /// that the file does not hold, and a file hold some that are not counted. The first sync is for the entries that once
    /// named them: none of those may come back.
    fn recycle(&self, writer: &Writer, ranges: &[Range<u32>]) -> Result<(), WriteError> {
        let storage = &self.image.storage;
        self.final_io(writer, || storage.sync())?;
        let highest = ranges.iter().map(|range| range.end).max().unwrap_or(0);
        self.lengthen(highest)?;
        for range in ranges {
            let (start, end) = (
                self.image.area.end_of(range.start),
                self.image.area.end_of(range.end),
            );
            storage
                .punch(start, end.0 - start.0)
                .map_err(|source| WriteError::NoSpace { source })?;
        }
        self.count(writer, highest)
    }

    fn extend(&self, writer: &Writer, blocks: u32) -> Result<(), WriteError> {
        self.lengthen(blocks)?;
        self.count(writer, blocks)
    }

    /// Makes the file hold the first `blocks`.
    fn lengthen(&self, blocks: u32) -> Result<(), WriteError> {
        let storage = &self.image.storage;
        let end = self.image.area.end_of(blocks).0;
        let lengthen = || {
            if storage.len_bytes()? < end {
                storage.set_len(end)
            } else {
                Ok(())
            }
        };
        lengthen().map_err(|source| WriteError::NoSpace { source })
    }

    /// Makes the header's count cover the first `blocks`, and all that was done durable.
    fn count(&self, writer: &Writer, blocks: u32) -> Result<(), WriteError> {
        self.final_io(writer, || {
            if writer.counted.load(Ordering::Acquire) < blocks {
                self.write_count(writer, blocks)?;
            }
            self.image.storage.sync()
        })
    }

    fn write_count(&self, writer: &Writer, blocks_allocated: u32) -> io::Result<()> {
        writer.counted.store(blocks_allocated, Ordering::Release);
        self.image
            .storage
            .write_all_at(&blocks_allocated.to_le_bytes(), AT_BLOCKS_ALLOCATED)
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
            OPEN if writer.marked.load(Ordering::Acquire) => self.trim(writer),
            OPEN if !writer.is_synced() => self.final_io(writer, || self.image.storage.sync()),
            OPEN | CLOSED => Ok(()),
            _ => Err(WriteError::Failed),
        }
    }

    fn trim(&self, writer: &Writer) -> Result<(), WriteError> {
        let exact = self.image.map.owned_end().max(writer.hidden_end);
        let end = self.image.area.end_of(exact).0;
        let storage = &self.image.storage;
        self.final_io(writer, || {
            storage.sync()?;
            self.write_count(writer, exact)?;
            if storage.len_bytes()? > end {
                storage.set_len(end)?;
            }
            storage.sync()
        })
    }
}
