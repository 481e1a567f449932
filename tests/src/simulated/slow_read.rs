//! Reads that ask the map early and the files late, as a ring's do. As long as their visit lasts, no block
//! that they know of may show another block's bytes (W4).

use std::ops::Range;

use vdi_core::{Extent, Sector, SectorRange, Source, Storage, Visit};

use super::index;
use super::workload::Workload;

/// Reads under way at most.
const MOST: usize = 3;

/// A read that knows where its bytes are.
#[derive(Debug)]
pub(super) struct SlowRead {
    range: SectorRange,
    before: Vec<u8>,
    extents: Vec<Extent>,
    /// What was made zeros meanwhile, in bytes of the disk.
    zeroed: Vec<Range<u64>>,
    _visit: Visit,
}

impl Workload {
    pub(super) fn begin_slow_read(&mut self) {
        if self.slow_reads.len() >= MOST {
            return;
        }
        let range = self.any_range();
        let visit = self.lane.enter();
        let extents = self.disk.map(range, &visit).collect();
        let start = range.start_bytes();
        let before = self.oracle.now()[index(start)..index(range.end_bytes())].to_vec();
        self.slow_reads.push(SlowRead {
            range,
            before,
            extents,
            zeroed: self.zeros_in_flight(),
            _visit: visit,
        });
    }

    /// Something begins to make a range zeros.
    pub(super) fn tell_slow_reads(&mut self, range: &Range<u64>) {
        for read in &mut self.slow_reads {
            read.zeroed.push(range.clone());
        }
    }

    pub(super) fn end_slow_read(&mut self) {
        if self.slow_reads.is_empty() {
            return;
        }
        let nth = index(self.random.within(0..self.slow_reads.len() as u64));
        let read = self.slow_reads.swap_remove(nth);
        let mut found = Vec::new();
        for extent in &read.extents {
            let mut piece = vec![0; index(extent.len_bytes)];
            if let Source::Stored { depth, at } = extent.source {
                let file = match depth {
                    0 => &self.file,
                    _ => &self.parents[depth - 1],
                };
                let done = file.read_exact_at(&mut piece, at);
                done.expect("nothing was made to fail");
            }
            found.extend(piece);
        }
        let sectors = found.chunks(512).zip(read.before.chunks(512));
        for (nth, (found, before)) in (read.range.start().0..).zip(sectors) {
            assert!(
                may_read(&read, Sector(nth), found, before),
                "W4: a slow read of sector {nth} got {:?}..",
                &found[..16]
            );
        }
    }
}

/// A sector as it was, zeros if it was zeroed, or new data that bear its own number.
fn may_read(read: &SlowRead, sector: Sector, found: &[u8], before: &[u8]) -> bool {
    let at = sector.0 * 512;
    let was_zeroed = read.zeroed.iter().any(|range| range.contains(&at));
    let is_zero = found.iter().all(|&byte| byte == 0);
    let is_new = found[..8] != [0; 8] && found[8..16] == sector.0.to_le_bytes();
    found == before || is_new || (was_zeroed && is_zero)
}
