//! Zeros and releases: discard, write-zeroes, and what becomes of a block that is let go (W4).
//!
//! ```text
//! entry ZERO in the file ─► published ─► punched ─► no old visits ─► stale ─► synced, punched, synced ─► fresh
//!                           (commit)     (chore)    (chore)          (see room.rs)
//! ```
//!
//! A released block never becomes unallocated: in a child that would show the parent.
//! Fixed images keep their space: they are zeroed in place, and a discard does nothing.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Waker;

use crate::block_map::BlockMapEntry;
use crate::disk::{Disk, Source};
use crate::header::ImageKind;
use crate::image::Place;
use crate::reservation::{Reservation, Reserve, WriteExtent, push_merged};
use crate::units::{DiskBlock, FileBlock, FileOffset, SectorRange, Span};
use crate::visit::{Lane, Visits};
use crate::writer::{State, WriteError, lock};

/// How a range becomes zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// It must read as zeros; its space is kept (WRITE_ZEROES without `unmap`).
    Keep,
    /// It must read as zeros; its space is given back where whole blocks allow it
    /// (WRITE_ZEROES with `unmap`).
    Release,
    /// Nobody needs it any more (DISCARD): as [`Self::Release`], but nothing is copied for it, so
    /// a part of a block may still show the parent.
    Discard,
}

/// What is to be done about one span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// It reads as zeros, or may stay as it is.
    Nothing,
    /// Its block is stored and stays.
    InPlace(FileOffset),
    /// The entry of its block becomes ZERO.
    Entry,
    /// Its block gets storage, since the rest of it shows the parent.
    CopyAround,
}

impl Disk {
    /// Finds what must change for a range to read as zeros.
    ///
    /// The caller zeroes [`Reservation::zeros`] in the file, copies the fills, syncs if needed, and
    /// commits, as for a write.
    ///
    /// # Errors
    /// If the disk takes no writes (any more), or has no room.
    pub fn reserve_zeros(
        self: &Arc<Self>,
        range: SectorRange,
        how: Zeroing,
        lane: &Lane,
        waker: &Waker,
    ) -> Result<Reserve, WriteError> {
        let writer = self.writer.as_ref().ok_or(WriteError::ReadOnly)?;
        let visit = lane.enter();
        let mut state = lock(&writer.state);
        writer.check_status()?;
        let spans = || range.spans(self.header().block_size());
        let (mut changes, mut missing) = (false, 0);
        for span in spans() {
            let action = self.action(span, how);
            if action == Action::Nothing {
                continue;
            }
            changes = true;
            missing += u32::from(action == Action::CopyAround);
            if state.in_transition.contains(&span.block) {
                return Ok(state.park(waker)); // W7
            }
        }
        if changes && !writer.marked.load(Ordering::Acquire) {
            return Ok(state.park_until_marked(writer, waker));
        }
        if !state.room.has(missing) {
            return state.ask_for_room(missing, waker);
        }
        let mut reservation = Reservation::empty(visit);
        reservation.keeps_space = how == Zeroing::Keep || self.header().kind() == ImageKind::Fixed;
        for span in spans() {
            self.act(&mut state, span, self.action(span, how), &mut reservation);
        }
        state.call_if_low();
        Ok(Reserve::Ready(reservation))
    }

    fn action(&self, span: Span, how: Zeroing) -> Action {
        let is_fixed = self.header().kind() == ImageKind::Fixed;
        if is_fixed && how == Zeroing::Discard {
            return Action::Nothing;
        }
        let size = self.header().block_size();
        let left_bytes = self.capacity().bytes() - size.start_of(span.block);
        let is_whole = span.len_bytes == left_bytes.min(u64::from(size.bytes()));
        match self.top().locate(span) {
            Place::Zero => Action::Nothing,
            Place::Stored(_) if is_whole && !is_fixed && how != Zeroing::Keep => Action::Entry,
            Place::Stored(at) => Action::InPlace(at),
            Place::Unallocated if !self.parents_have(span) => Action::Nothing,
            Place::Unallocated if is_whole => Action::Entry,
            Place::Unallocated => match how {
                Zeroing::Discard => Action::Nothing,
                Zeroing::Keep | Zeroing::Release => Action::CopyAround,
            },
        }
    }

    fn parents_have(&self, span: Span) -> bool {
        self.parents_at(span)
            .any(|extent| matches!(extent.source, Source::Stored { .. }))
    }

    /// Gives sorted blocks a new entry that needs no storage and reads as they do. For
    /// maintenance, while no request is at work.
    pub(crate) fn replace_entries(
        self: &Arc<Self>,
        blocks: &[DiskBlock],
        entry: BlockMapEntry,
    ) -> Result<(), WriteError> {
        let writer = self.writer.as_ref().ok_or(WriteError::ReadOnly)?;
        let mut reservation = Reservation::empty(self.visits.lane().enter());
        reservation.changes = blocks.iter().map(|&block| (block, entry)).collect();
        reservation.disk = Some(Arc::clone(self));
        lock(&writer.state).in_transition.extend(blocks);
        self.commit(&mut vec![reservation])
    }

    fn act(
        self: &Arc<Self>,
        state: &mut State,
        span: Span,
        action: Action,
        reservation: &mut Reservation,
    ) {
        match action {
            Action::Nothing => {}
            Action::InPlace(at) => {
                let len_bytes = span.len_bytes;
                push_merged(&mut reservation.zeros, WriteExtent { at, len_bytes });
            }
            Action::Entry => {
                state.in_transition.insert(span.block);
                reservation.changes.push((span.block, BlockMapEntry::Zero));
                reservation.disk.get_or_insert_with(|| Arc::clone(self));
            }
            Action::CopyAround => {
                // The new block reads as zeros already.
                let _ = self.take_block(state, span, Place::Unallocated, reservation);
            }
        }
    }
}

/// Blocks that no entry names any more, on their way back.
#[derive(Debug, Default)]
pub(crate) struct Released {
    /// Still with their old contents.
    unpunched: Vec<FileBlock>,
    /// To be waited for by the next turn.
    punched: Vec<Range<u32>>,
    /// Waited for by the last turn.
    in_turn: Vec<Range<u32>>,
}

impl Released {
    pub(crate) fn add(&mut self, block: FileBlock) {
        self.unpunched.push(block);
    }

    pub(crate) fn is_punch_due(&self) -> bool {
        !self.unpunched.is_empty()
    }

    /// What to punch now. It must come back by [`Self::add_punched`].
    pub(crate) fn take_unpunched(&mut self) -> Vec<Range<u32>> {
        let mut numbers: Vec<u32> = self.unpunched.drain(..).map(FileBlock::get).collect();
        numbers.sort_unstable();
        numbers
            .chunk_by(|a, b| a + 1 == *b)
            .map(|run| run[0]..run[run.len() - 1] + 1)
            .collect()
    }

    pub(crate) fn add_punched(&mut self, ranges: Vec<Range<u32>>) {
        self.punched.extend(ranges);
    }

    /// Those whose last visitors are gone. Begins to wait for the others.
    pub(crate) fn reclaim(&mut self, visits: &Visits) -> Vec<Range<u32>> {
        let mut free = Vec::new();
        // Twice: the turn that was waited for, and the one that begins now.
        for _ in 0..2 {
            if visits.is_over() {
                free.append(&mut self.in_turn);
                if !self.punched.is_empty() {
                    std::mem::swap(&mut self.in_turn, &mut self.punched);
                    visits.turn();
                }
            }
        }
        free
    }

    /// Whether blocks are on their way back: to be punched, or waiting for visitors to go.
    pub(crate) fn is_waiting(&self) -> bool {
        !(self.unpunched.is_empty() && self.in_turn.is_empty() && self.punched.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that is released between the punches and the search for room is no reason to say that there is none.
    #[test]
    fn a_released_block_is_on_its_way_back_until_it_is_free() {
        let visits = Arc::<Visits>::default();
        let mut released = Released::default();
        assert!(!released.is_waiting());
        released.add(FileBlock::new(7).unwrap());
        assert!(released.is_waiting(), "not punched yet");
        let ranges = released.take_unpunched();
        released.add_punched(ranges);
        assert!(released.is_waiting(), "not waited for yet");
        assert_eq!(released.reclaim(&visits).len(), 1);
        assert!(!released.is_waiting());
    }
}
