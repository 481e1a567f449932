//! What a workload knows of requests that make zeros: what each of them promises.
//!
//! `Keep` and `Release` must read zeros once answered. A `Discard` reads zeros too, except where it may
//! leave the old contents: all of a fixed image, and parts of a child's blocks that show the parent.
//! While such a request is under way, or after it was given up, each sector is as before or zeros.

use std::ops::Range;
use std::sync::Arc;

use vdi_core::{Sector, SectorRange, Source, Storage, Zeroing};

use super::index;
use super::workload::Workload;

const FIXED: u32 = 2;

/// What is special about a request that makes zeros.
#[derive(Clone, Debug)]
pub(super) struct Zeros {
    pub(super) how: Zeroing,
    /// The bytes of the disk that may stay as they are.
    pub(super) may_stay: Vec<Range<u64>>,
}

impl Workload {
    pub(super) fn begin_zeros(&mut self) {
        let range = self.range_for_zeros();
        let is_full = self.in_flight() >= self.habits.most_in_flight;
        if is_full || self.is_in_flight(range) {
            return;
        }
        let how = self.any_zeroing();
        self.reserve(range, zeros(range), Some(how));
    }

    fn any_zeroing(&mut self) -> Zeroing {
        let all = [Zeroing::Keep, Zeroing::Release, Zeroing::Discard];
        *self.random.pick(&all)
    }

    /// Often whole blocks, which alone are released.
    fn range_for_zeros(&mut self) -> SectorRange {
        let range = self.any_range();
        if self.random.within(0..100) < 40 {
            return range;
        }
        let block = u64::from(self.layout.block_size) / 512;
        let sectors = self.disk.capacity().sectors();
        let start = range.start().0 / block * block;
        let end = (start + block * self.random.within(1..4)).min(sectors);
        let whole = self.disk.capacity().range(Sector(start), end - start);
        whole.expect("it ends on the disk")
    }

    /// What a discard of `range` may leave as it is.
    pub(super) fn may_stay(&self, range: SectorRange, how: Zeroing) -> Vec<Range<u64>> {
        if how != Zeroing::Discard {
            return Vec::new();
        }
        if self.layout.image_type == FIXED {
            return std::iter::once(range.start_bytes()..range.end_bytes()).collect();
        }
        let size = u64::from(self.layout.block_size);
        let capacity = self.disk.capacity().bytes();
        let visit = self.lane.enter();
        let mut may_stay = Vec::new();
        for block in range.start_bytes() / size..range.end_bytes().div_ceil(size) {
            let whole = block * size..(block * size + size).min(capacity);
            let part = whole.start.max(range.start_bytes())..whole.end.min(range.end_bytes());
            let sectors = self.disk.capacity().range_of_bytes(part.clone());
            let mut extents = self.disk.map(sectors.expect("U1"), &visit);
            let shows_parent =
                extents.any(|one| matches!(one.source, Source::Stored { depth: 1.., .. }));
            if part != whole && shows_parent {
                may_stay.push(part);
            }
        }
        may_stay
    }

    /// Does what a request that makes zeros does to the file.
    pub(super) fn transfer_zeros(&mut self, nth: usize) {
        let one = &mut self.ready[nth];
        for extent in one.reservation.zeros() {
            let zeroed = if one.reservation.keeps_space() {
                self.file.zero(extent.at, extent.len_bytes)
            } else {
                self.file.punch(extent.at, extent.len_bytes)
            };
            zeroed.expect("nothing was made to fail");
        }
        one.written = one.range.len_bytes();
    }

    /// A request that makes zeros has ended well: it kept its promise, and what is zeros now stays.
    pub(super) fn answer_zeros(&mut self, range: SectorRange, data: &Arc<[u8]>, zeros: &Zeros) {
        let answered = self.file.note();
        for part in self.learn(range) {
            self.oracle.answer_part(&part, data, answered);
        }
        for sector in (range.start_bytes()..range.end_bytes()).step_by(512) {
            let is_zero = self.oracle.now()[index(sector)..][..512]
                .iter()
                .all(|&byte| byte == 0);
            let may_stay = zeros.may_stay.iter().any(|part| part.contains(&sector));
            assert!(
                is_zero || may_stay,
                "{:?} left sector {}",
                zeros.how,
                sector / 512
            );
        }
    }

    /// Sees which sectors have become zeros, and that the others are as they were. Gives those that are zeros.
    pub(super) fn learn(&mut self, range: SectorRange) -> Vec<Range<u64>> {
        let mut found = vec![1; index(range.len_bytes())];
        let done = self.disk.read_at(range, &mut found);
        done.expect("nothing was made to fail");
        let mut are_zeros = Vec::new();
        for (at, sector) in (range.start_bytes()..).step_by(512).zip(found.chunks(512)) {
            if sector.iter().all(|&byte| byte == 0) {
                self.oracle.show(at, sector, &(at..at + 512));
                are_zeros.push(at..at + 512);
            } else {
                let before = &self.oracle.now()[index(at)..][..512];
                assert!(sector == before, "sector {} is neither", at / 512);
            }
        }
        are_zeros
    }

    /// The bytes of the disk that requests under way make zeros.
    pub(super) fn zeros_in_flight(&self) -> Vec<Range<u64>> {
        let all = self.ready.iter().filter(|one| one.zeros.is_some());
        all.map(|one| one.range.start_bytes()..one.range.end_bytes())
            .collect()
    }

    /// On the convenient road.
    pub(super) fn zero_blocking(&mut self) {
        let range = self.range_for_zeros();
        if !self.may_block() || self.is_in_flight(range) {
            return;
        }
        let how = self.any_zeroing();
        let may_stay = self.may_stay(range, how);
        let data = zeros(range);
        let begun = self.file.note();
        let whole = range.start_bytes()..range.end_bytes();
        self.oracle.begin(whole.start, &data, &whole, begun);
        let done = self.disk.zero_at(range, how);
        done.expect("nothing was made to fail");
        self.note_first_write();
        self.answer_zeros(range, &data, &Zeros { how, may_stay });
    }
}

fn zeros(range: SectorRange) -> Arc<[u8]> {
    vec![0; index(range.len_bytes())].into()
}
