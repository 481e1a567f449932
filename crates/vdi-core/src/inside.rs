//! What a disk that is being served looks like inside, for whoever searches a fault.

use std::sync::atomic::Ordering;

use crate::disk::Disk;
use crate::writer::lock;

/// Numbers of one instant. A disk that is only read has zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inside {
    /// Blocks that the header counts.
    pub counted_blocks: u32,
    /// Blocks that the map has.
    pub blocks_in_image: u32,
    /// Blocks that can be handed out at once.
    pub fresh_blocks: u32,
    /// Blocks of nobody that can be once they are punched.
    pub stale_blocks: u32,
    /// The file block that the file is lengthened from.
    pub next_file_block: u32,
    /// Blocks whose entries are about to change (W7).
    pub blocks_in_transition: usize,
    /// Who waits for a change of these.
    pub waiting: usize,
    /// Blocks that a parked request wants.
    pub wanted_blocks: u32,
    /// Whether the last attempt to make room failed.
    pub has_no_room: bool,
    /// Whether `uuid_modify` is renewed (W6).
    pub is_marked: bool,
    /// Whether a failure ended all writing (W5).
    pub is_failed: bool,
    /// Whether all that was committed is durable.
    pub is_synced: bool,
}

impl Disk {
    /// What it looks like inside. Waits for no I/O.
    #[must_use]
    pub fn inside(&self) -> Inside {
        let header = self.header();
        let mut inside = Inside {
            counted_blocks: header.blocks_allocated(),
            blocks_in_image: header.blocks_in_image(),
            fresh_blocks: 0,
            stale_blocks: 0,
            next_file_block: 0,
            blocks_in_transition: 0,
            waiting: 0,
            wanted_blocks: 0,
            has_no_room: false,
            is_marked: false,
            is_failed: self.is_failed(),
            is_synced: true,
        };
        if let Some(writer) = &self.writer {
            let state = lock(&writer.state);
            (
                inside.fresh_blocks,
                inside.stale_blocks,
                inside.next_file_block,
            ) = state.room.counts();
            inside.counted_blocks = writer.counted.load(Ordering::Relaxed);
            inside.blocks_in_transition = state.in_transition.len();
            inside.waiting = state.parked.len();
            inside.wanted_blocks = state.wants_blocks;
            inside.has_no_room = state.no_room.is_some();
            inside.is_marked = writer.marked.load(Ordering::Relaxed);
            inside.is_synced = writer.is_synced();
        }
        inside
    }
}
