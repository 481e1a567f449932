//! Parts of a range of the disk, in bytes: those with storage, and the rest.

use std::ops::Range;

use vdi_core::{Disk, SectorRange, Source};

/// The parts of a range, in bytes of the disk, that have storage in the top image.
#[must_use]
pub fn stored_parts(disk: &Disk, range: SectorRange) -> Vec<Range<u64>> {
    let mut at = range.start_bytes();
    let mut stored = Vec::new();
    let visit = disk.lane().enter();
    for extent in disk.map(range, &visit) {
        if matches!(extent.source, Source::Stored { depth: 0, .. }) {
            stored.push(at..at + extent.len_bytes);
        }
        at += extent.len_bytes;
    }
    stored
}

/// What is left of a range without some parts of it, which are in order.
#[must_use]
pub fn parts_without(whole: Range<u64>, without: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut at = whole.start;
    for part in without {
        left.push(at..part.start);
        at = part.end;
    }
    left.push(at..whole.end);
    left.retain(|part| !part.is_empty());
    left
}
