//! Filling holes: blocks from the end of the file move into unowned places, so that the file
//! ends where its last block does and the header's count is the number of blocks in use. QEMU
//! calls any other count corrupt.
//!
//! Crash-safe without a journal: a block is copied and synced before its entry names the new
//! place, and its old place stays as it was until the file is cut.

use std::io;
use std::ops::Range;

use crate::block_map::BlockMapEntry;
use crate::disk::Disk;
use crate::units::{DiskBlock, FileBlock, FileOffset};

/// Blocks moved between two syncs hold at most this many bytes.
const BATCH_BYTES: u64 = 64 << 20;
/// Zeros are not copied in pieces of this size, so that moving keeps a file sparse.
const PIECE_BYTES: usize = 64 << 10;

impl Disk {
    /// Fills holes with blocks from the end, as far as `most_bytes` and the host's space allow. Gives the number
    /// behind the last block then in use.
    ///
    /// No request may be at work, no entry beyond the disk may own a block, and all changes of
    /// the map must be durable.
    pub(crate) fn fill_holes(&self, most_bytes: u64) -> io::Result<u32> {
        let moves = self.moves();
        let stride = self.top().area.stride_bytes();
        let affordable = usize::try_from(most_bytes / stride).unwrap_or(usize::MAX);
        // All or nothing: a part of the moves does not make the count exact.
        if moves.len() <= affordable {
            let _as_far_as_there_is_space = self.move_all(&moves)?;
        }
        Ok(self.top().map.owned_end())
    }

    /// Moves blocks to places that no entry names and the header counts. On a full file system some may stay where
    /// they are: then it gives false.
    pub(crate) fn move_all(&self, moves: &[Move]) -> io::Result<bool> {
        let stride = self.top().area.stride_bytes();
        let per_batch = usize::try_from(BATCH_BYTES.div_ceil(stride)).unwrap_or(1);
        for batch in moves.chunks(per_batch) {
            let copied = batch.iter().try_for_each(|one| self.copy_block(one));
            if let Err(error) = copied {
                return self.give_up_copies(batch, error);
            }
            self.move_entries(batch)?;
        }
        Ok(true)
    }

    /// Which blocks go where: the last ones into the first holes.
    fn moves(&self) -> Vec<Move> {
        let map = &self.top().map;
        let mut owned: Vec<(FileBlock, DiskBlock)> = map.allocated().collect();
        owned.sort_unstable();
        let exact = owned.len();
        let mut is_hole = vec![true; exact];
        for (from, _) in &owned {
            if let Some(hole) = is_hole.get_mut(from.index()) {
                *hole = false;
            }
        }
        let holes = (0u32..).zip(is_hole).filter(|(_, is_hole)| *is_hole);
        let tail = owned
            .iter()
            .rev()
            .take_while(|(from, _)| from.index() >= exact);
        tail.zip(holes)
            .filter_map(|(&(from, disk_block), (hole, _))| {
                let to = FileBlock::new(hole)?;
                Some(Move {
                    disk_block,
                    from,
                    to,
                })
            })
            .collect()
    }

    /// No entry names the copies yet, so they can go; the space was not there.
    fn give_up_copies(&self, batch: &[Move], error: io::Error) -> io::Result<bool> {
        if error.kind() != io::ErrorKind::StorageFull {
            return Err(error);
        }
        let stride = self.top().area.stride_bytes();
        for one in batch {
            let to = self.top().area.end_of(one.to.get());
            self.top().storage.punch(to, stride)?;
        }
        Ok(false)
    }

    fn move_entries(&self, batch: &[Move]) -> io::Result<()> {
        let top = self.top();
        top.storage.sync()?;
        for one in batch {
            let entry = BlockMapEntry::Allocated(one.to);
            let bytes = entry.to_raw().to_le_bytes();
            top.storage
                .write_all_at(&bytes, top.map.entry_at(one.disk_block))?;
            top.map.publish(one.disk_block, entry);
        }
        top.storage.sync()
    }

    /// Copies a block with its private bytes; where the file ends inside of it are zeros.
    fn copy_block(&self, one: &Move) -> io::Result<()> {
        let (area, storage) = (self.top().area, &self.top().storage);
        let span = |block: FileBlock| -> Range<u64> {
            area.end_of(block.get()).0..area.end_of(block.get() + 1).0
        };
        let (from, to) = (span(one.from), span(one.to));
        storage.punch(FileOffset(to.start), to.end - to.start)?;
        let file_len = storage.len_bytes()?;
        let mut buf = vec![0; PIECE_BYTES];
        let mut done = 0;
        while from.start + done < from.end.min(file_len) {
            let left = from.end.min(file_len) - from.start - done;
            let len = PIECE_BYTES.min(usize::try_from(left).unwrap_or(PIECE_BYTES));
            let piece = &mut buf[..len];
            storage.read_exact_at(piece, FileOffset(from.start + done))?;
            if piece.iter().any(|&byte| byte != 0) {
                storage.write_all_at(piece, FileOffset(to.start + done))?;
            }
            done += len as u64;
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Move {
    pub(crate) disk_block: DiskBlock,
    pub(crate) from: FileBlock,
    pub(crate) to: FileBlock,
}
