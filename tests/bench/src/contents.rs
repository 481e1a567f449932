//! What a disk must read as: every sector begins with a stamp of its number and of how often it was written.
//!
//! Not the bytes between the stamps: they are the same everywhere. A stamp tells data of another place, of an older
//! write or of another request's buffer from the right ones, at a cost of one word a sector.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};

/// How finely writes are told apart: every request covers whole pages.
pub(crate) const PAGE: usize = 4096;
/// Stamped are sectors of this size.
pub(crate) const SECTOR: usize = 512;

/// Never written: reads as zeros.
const UNWRITTEN: u8 = 0;
/// Discarded: may read as anything.
const UNKNOWN: u8 = u8::MAX;

/// How often each page of a disk was written. No two requests in flight may cover the same page.
#[derive(Debug)]
pub(crate) struct Contents {
    generations: Vec<AtomicU8>,
}

impl Contents {
    /// A disk that reads as zeros.
    pub(crate) fn zeros(bytes: u64) -> Self {
        Self::of(bytes, UNWRITTEN)
    }

    /// A disk as [`fill`] makes it.
    pub(crate) fn filled(bytes: u64) -> Self {
        Self::of(bytes, 1)
    }

    fn of(bytes: u64, generation: u8) -> Self {
        let pages = page_at(bytes);
        Self {
            generations: (0..pages).map(|_| AtomicU8::new(generation)).collect(),
        }
    }

    /// Says that the pages of this range are written anew.
    pub(crate) fn write(&self, at: u64, len: usize) {
        for page in self.range(at, len) {
            let next = match page.load(Ordering::Relaxed) {
                UNKNOWN => 1,
                generation if generation == UNKNOWN - 1 => 1,
                generation => generation + 1,
            };
            page.store(next, Ordering::Relaxed);
        }
    }

    /// Says that the pages of this range may read as anything from now on.
    pub(crate) fn forget(&self, at: u64, len: usize) {
        for page in self.range(at, len) {
            page.store(UNKNOWN, Ordering::Relaxed);
        }
    }

    /// The first word of the sector at this offset, if there is only one right answer.
    pub(crate) fn stamp(&self, at: u64) -> Option<u64> {
        match self.generations[page_at(at)].load(Ordering::Relaxed) {
            UNWRITTEN => Some(0),
            UNKNOWN => None,
            generation => Some(stamp(at, generation)),
        }
    }

    /// How long the disk is.
    pub(crate) fn bytes(&self) -> u64 {
        self.generations.len() as u64 * PAGE as u64
    }

    fn range(&self, at: u64, len: usize) -> &[AtomicU8] {
        let first = page_at(at);
        &self.generations[first..first + len / PAGE]
    }
}

fn page_at(at: u64) -> usize {
    usize::try_from(at / PAGE as u64).expect("the table of pages fits in memory")
}

/// Never zero, so that it is told from a hole.
fn stamp(at: u64, generation: u8) -> u64 {
    mix((at / SECTOR as u64) << 8 | u64::from(generation)) | 1
}

/// A number that looks random (the output step of splitmix64).
pub(crate) fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What stands between the stamps: bytes that no layer can compress or take for zeros.
pub(crate) fn filler(len: usize) -> Vec<u8> {
    let words = (0..len as u64 / 8).map(|nth| mix(nth) | 1);
    words.flat_map(u64::to_le_bytes).collect()
}

/// Writes a raw disk of which every sector is written once.
pub(crate) fn fill(path: &Path, bytes: u64) -> io::Result<()> {
    const STEP: usize = 1 << 20;
    let mut file = File::create(path)?;
    let mut data = filler(STEP);
    for start in (0..bytes).step_by(STEP) {
        for (at, sector) in (start..).step_by(SECTOR).zip(data.chunks_mut(SECTOR)) {
            sector[..8].copy_from_slice(&stamp(at, 1).to_le_bytes());
        }
        file.write_all(&data)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_tells_places_and_writes_apart() {
        let contents = Contents::zeros(1 << 20);
        assert_eq!(contents.stamp(0), Some(0));
        contents.write(0, 2 * PAGE);
        let first = contents.stamp(0);
        assert_ne!(first, contents.stamp(512));
        contents.write(0, PAGE);
        assert_ne!(first, contents.stamp(0));
        assert_eq!(contents.stamp(2 * PAGE as u64), Some(0));
    }

    #[test]
    fn what_was_discarded_is_not_known_until_it_is_written() {
        let contents = Contents::filled(1 << 20);
        contents.forget(0, PAGE);
        assert_eq!(contents.stamp(0), None);
        contents.write(0, PAGE);
        assert!(contents.stamp(0).is_some());
    }

    #[test]
    fn generations_begin_again_before_they_run_out() {
        let contents = Contents::filled(PAGE as u64);
        for _ in 0..1000 {
            contents.write(0, PAGE);
            assert!(contents.stamp(0).is_some_and(|stamp| stamp != 0));
        }
    }
}
