//! Shrinking: what lies behind the new end is let go, and the header switched.

use std::sync::Arc;

use super::{BATCH, ResizeError, ResizeStep};
use crate::block_map::BlockMapEntry;
use crate::chores::Modified;
use crate::disk::{Disk, ReadError, Source, Zeroing};
use crate::units::{Capacity, DiskBlock, SECTOR_SIZE, Sector, SectorRange};

pub(super) fn plan(disk: &Disk, to: Capacity) -> Result<ResizeStep, ResizeError> {
    let size = disk.header().block_size();
    let first_cut = size.blocks_for(to.bytes());
    let mut cut: Vec<_> = disk
        .top()
        .map
        .allocated()
        .map(|(_, block)| block)
        .filter(|block| u64::from(block.get()) >= first_cut)
        .collect();
    cut.sort_unstable();
    let lost = disk
        .capacity()
        .range_of_bytes(to.bytes()..disk.capacity().bytes());
    let lost_bytes = match lost {
        Some(range) => disk.nonzero_bytes(range)?,
        None => 0,
    };
    Ok(ResizeStep::Shrink { cut, lost_bytes })
}

pub(super) fn shrink(
    disk: &Arc<Disk>,
    to: Capacity,
    cut: &[DiskBlock],
    lost_bytes: u64,
) -> Result<(), ResizeError> {
    disk.begin_maintenance(if lost_bytes > 0 {
        Modified::Contents
    } else {
        Modified::Places
    })?;
    let size = disk.header().block_size();
    let block_end = size.blocks_for(to.bytes()) * u64::from(size.bytes());
    let tail = to.sectors()..block_end.min(disk.capacity().bytes()) / SECTOR_SIZE;
    if let Some(range) = disk
        .capacity()
        .range(Sector(tail.start), tail.end - tail.start)
    {
        // What grows again must not show what was cut.
        disk.zero_at(range, Zeroing::Keep)?;
    }
    for batch in cut.chunks(BATCH) {
        disk.replace_entries(batch, BlockMapEntry::Zero)?;
        disk.do_chores()?;
    }
    // Afterwards the blocks in use are the first ones, and so fewer than the entries that are left.
    disk.close_moving(u64::MAX)?;
    let blocks = u32::try_from(size.blocks_for(to.bytes())).expect("fewer than before");
    let switched = disk.switch_header(|raw| {
        if !raw.is_version_0() {
            raw.blocks_in_image = blocks.into();
        }
        raw.blocks_allocated = disk.top().map.owned_end().into();
        raw.disk_size = to.bytes().into();
    });
    switched.map_err(|source| ResizeError::Io { source })
}

impl Disk {
    /// How much of a range is in sectors that are not all zeros, in whichever image they are.
    fn nonzero_bytes(&self, range: SectorRange) -> Result<u64, ReadError> {
        let mut buf = vec![0; 256 << 10];
        let mut count = 0;
        let lane = self.lane();
        let visit = lane.enter();
        for extent in self.map(range, &visit) {
            let Source::Stored { depth, at } = extent.source else {
                continue;
            };
            let mut done = 0;
            while done < extent.len_bytes {
                let left = usize::try_from(extent.len_bytes - done).unwrap_or(usize::MAX);
                let len = left.min(buf.len());
                let piece = &mut buf[..len];
                self.read_image(depth, piece, at.plus(done))?;
                let (sectors, _) = piece.as_chunks::<512>();
                count += sectors
                    .iter()
                    .filter(|sector| sector.iter().any(|&byte| byte != 0))
                    .count() as u64;
                done += len as u64;
            }
        }
        Ok(count * SECTOR_SIZE)
    }
}
