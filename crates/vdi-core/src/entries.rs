//! The entries of a block map in memory, in pages: there is no page where no entry was ever anything but unallocated.
//!
//! So a disk takes memory for the parts of it that were written, and opening one whose map says nothing costs no more than reading that.
//! Look-ups take no lock and never wait: a page, once there, stays.
//!
//! Not here: what entries mean, and which are right (`block_map`).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::format::ENTRY_FREE;

/// Entries of a page: 4 KiB of them, so that a block of 1 MiB that is written makes the entries of 1 GiB resident.
pub(crate) const PAGE_ENTRIES: u32 = 1024;

/// Bytes of a page's entries in the file.
pub(crate) const PAGE_BYTES: usize = PAGE_ENTRIES as usize * size_of::<u32>();

const COUNT: usize = PAGE_ENTRIES as usize;

/// The bytes of a page that is not there.
static UNALLOCATED: [u8; PAGE_BYTES] = [0xff; PAGE_BYTES];

const _: () = assert!(ENTRY_FREE == u32::MAX, "UNALLOCATED has its bytes");

type Page = [AtomicU32; COUNT];

/// The entries, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    pages: Vec<OnceLock<Box<Page>>>,
    len: usize,
}

impl Entries {
    /// Adds the next page, or the part of it that the disk has, from its bytes in the file. All pages before it are whole.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let (entries, _) = bytes.as_chunks();
        let page = OnceLock::new();
        if !is_unallocated(bytes) {
            let entry = |at: usize| {
                entries
                    .get(at)
                    .map_or(ENTRY_FREE, |&raw| u32::from_le_bytes(raw))
            };
            page.get_or_init(|| new_page(entry));
        }
        self.pages.push(page);
        self.len += entries.len();
    }

    /// No more entries follow.
    pub(crate) fn end(&mut self) {
        self.pages.shrink_to_fit();
    }

    pub(crate) const fn len(&self) -> usize {
        self.len
    }

    /// The entry with this number, below `len`.
    pub(crate) fn get(&self, at: usize) -> u32 {
        match self.pages[at / COUNT].get() {
            Some(page) => page[at % COUNT].load(Ordering::Acquire),
            None => ENTRY_FREE,
        }
    }

    /// Changes it for all who look from now on; what it was before.
    pub(crate) fn set(&self, at: usize, raw: u32) -> u32 {
        assert!(at < self.len, "the disk has the block");
        let page = self.pages[at / COUNT].get_or_init(|| new_page(|_| ENTRY_FREE));
        page[at % COUNT].swap(raw, Ordering::AcqRel)
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        (0..self.len).map(|at| self.get(at))
    }

    /// Those of pages that are there, with their numbers: all that are not unallocated, and some that are.
    pub(crate) fn present(&self) -> impl Iterator<Item = (usize, u32)> {
        let pages = self.pages.iter().enumerate();
        let there = pages.filter_map(|(nth, page)| Some((nth * COUNT, page.get()?)));
        there.flat_map(|(first, page)| {
            let raw = page.iter().map(|raw| raw.load(Ordering::Acquire));
            (first..).zip(raw)
        })
    }
}

/// Whether the file says of all entries in these bytes, of a page at most, that they are unallocated.
pub(crate) fn is_unallocated(bytes: &[u8]) -> bool {
    bytes == &UNALLOCATED[..bytes.len()]
}

fn new_page(entry: impl Fn(usize) -> u32) -> Box<Page> {
    let entries: Box<[AtomicU32]> = (0..COUNT).map(|at| AtomicU32::new(entry(at))).collect();
    entries.try_into().expect("it has so many")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_page_only_where_something_was_set() {
        let mut entries = Entries::default();
        entries.push(&UNALLOCATED);
        let mut bytes = UNALLOCATED;
        bytes[4..8].copy_from_slice(&7_u32.to_le_bytes());
        entries.push(&bytes);
        entries.push(&UNALLOCATED);
        entries.push(&UNALLOCATED[..8]);
        entries.end();
        let pages = |entries: &Entries| {
            let there = entries.pages.iter().map(|page| page.get().is_some());
            there.collect::<Vec<_>>()
        };
        assert_eq!(pages(&entries), [false, true, false, false]);
        assert_eq!(entries.set(3 * COUNT + 1, 9), ENTRY_FREE);
        assert_eq!(pages(&entries), [false, true, false, true]);

        let mut expected = vec![ENTRY_FREE; 3 * COUNT + 2];
        expected[COUNT + 1] = 7;
        expected[3 * COUNT + 1] = 9;
        assert_eq!(entries.len(), expected.len());
        assert!(entries.iter().eq(expected.iter().copied()));
        let set = |(_, raw): &(usize, u32)| *raw != ENTRY_FREE;
        let found: Vec<_> = entries.present().filter(set).collect();
        assert_eq!(found, [(COUNT + 1, 7), (3 * COUNT + 1, 9)]);
    }

    #[test]
    #[should_panic(expected = "the disk has the block")]
    fn what_lies_behind_the_last_entry_is_not_set() {
        let mut entries = Entries::default();
        entries.push(&UNALLOCATED[..8]);
        let _ = entries.set(2, 0);
    }
}
