//! What a sparse file holds: pages that were written, and a length.
//!
//! A copy shares its pages, so a file can be looked at in hundreds of states.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::index;

const PAGE: u64 = 4096;
type Page = [u8; 4096];

/// The bytes of a file; what no page has is zeros.
#[derive(Clone, Default)]
pub struct Contents {
    /// By number; pages behind the end hold zeros only.
    pages: BTreeMap<u64, Arc<Page>>,
    len: u64,
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes in {} pages", self.len, self.pages.len())
    }
}

/// The part of one page that a range touches: its number, where in it, how many bytes.
fn parts(range: Range<u64>) -> impl Iterator<Item = (u64, usize, usize)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let (page, skip) = (at / PAGE, at % PAGE);
        let len = (PAGE - skip).min(range.end.saturating_sub(at));
        at += len;
        (len > 0).then_some((page, index(skip), index(len)))
    })
}

impl Contents {
    /// The length of the file.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.len
    }

    /// How many pages of 4 KiB it has stored.
    #[must_use]
    pub fn pages_held(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Fills `buf`; false if the file ends before.
    #[must_use]
    pub fn read(&self, buf: &mut [u8], at: u64) -> bool {
        let end = at + buf.len() as u64;
        let mut rest = buf;
        for (number, skip, len) in parts(at..end) {
            let (piece, behind) = rest.split_at_mut(len);
            match self.pages.get(&number) {
                Some(page) => piece.copy_from_slice(&page[skip..skip + len]),
                None => piece.fill(0),
            }
            rest = behind;
        }
        end <= self.len
    }

    /// The bytes of a range; zeros behind the end.
    #[must_use]
    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; index(range.end - range.start)];
        let _short = self.read(&mut bytes, range.start);
        bytes
    }

    /// Writes, and lengthens the file if need be.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let end = at + bytes.len() as u64;
        let mut rest = bytes;
        for (number, skip, len) in parts(at..end) {
            let (piece, behind) = rest.split_at(len);
            let page = self
                .pages
                .entry(number)
                .or_insert_with(|| Arc::new([0; 4096]));
            Arc::make_mut(page)[skip..skip + len].copy_from_slice(piece);
            rest = behind;
        }
        self.len = self.len.max(end);
    }

    /// Makes a range read as zeros; the length stays.
    pub fn zero(&mut self, range: Range<u64>) {
        let numbers = range.start / PAGE..range.end.div_ceil(PAGE);
        let present: Vec<u64> = self
            .pages
            .range(numbers)
            .map(|(&number, _)| number)
            .collect();
        for number in present {
            let page = number * PAGE..(number + 1) * PAGE;
            if range.start <= page.start && page.end <= range.end {
                self.pages.remove(&number);
                continue;
            }
            let cut = range.start.max(page.start)..range.end.min(page.end);
            if let (false, Some(page_bytes)) = (cut.is_empty(), self.pages.get_mut(&number)) {
                let skip = index(cut.start - page.start);
                let end = index(cut.end - page.start);
                Arc::make_mut(page_bytes)[skip..end].fill(0);
            }
        }
    }

    /// Cuts or lengthens the file.
    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            self.zero(len..self.len);
        }
        self.len = len;
    }

    /// The pieces of 512 bytes in a range that may hold something else than zeros.
    pub fn pieces_held(&self, range: &Range<u64>) -> Vec<u64> {
        let numbers = range.start / PAGE..range.end.div_ceil(PAGE);
        self.pages
            .range(numbers)
            .flat_map(|(&number, _)| {
                (0..PAGE / 512).map(move |piece| number * (PAGE / 512) + piece)
            })
            .filter(|piece| piece * 512 < range.end && (piece + 1) * 512 > range.start)
            .collect()
    }

    /// What a file of the host holds.
    ///
    /// # Errors
    /// The host's.
    pub fn load(path: &Path) -> io::Result<Self> {
        let bytes = std::fs::read(path)?;
        let mut contents = Self::default();
        for (at, part) in (0..).step_by(4096).zip(bytes.chunks(4096)) {
            if part.iter().any(|&byte| byte != 0) {
                contents.write(at, part);
            }
        }
        contents.set_len(bytes.len() as u64);
        Ok(contents)
    }

    /// Writes it to a file of the host.
    ///
    /// # Errors
    /// The host's.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        for (&number, page) in &self.pages {
            file.write_all_at(&page[..], number * PAGE)?;
        }
        file.set_len(self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    #[test]
    fn contents_are_what_a_plain_array_says() {
        let mut random = Random::seeded(1);
        let (mut contents, mut array) = (Contents::default(), Vec::new());
        for _ in 0..500 {
            let at = index(random.within(0..20_000));
            let len = index(random.within(0..9_000));
            match random.within(0..3) {
                0 => {
                    let bytes = random.bytes(len);
                    contents.write(at as u64, &bytes);
                    array.resize(array.len().max(at + len), 0);
                    array[at..at + len].copy_from_slice(&bytes);
                }
                1 => {
                    contents.zero(at as u64..(at + len) as u64);
                    let (from, to) = (at.min(array.len()), (at + len).min(array.len()));
                    array[from..to].fill(0);
                }
                _ => {
                    contents.set_len(at as u64);
                    array.resize(at, 0);
                }
            }
            assert_eq!(contents.len_bytes(), array.len() as u64);
            assert!(contents.bytes(0..array.len() as u64) == array);
            let beyond = contents.bytes(array.len() as u64..array.len() as u64 + 9000);
            assert!(beyond.iter().all(|&byte| byte == 0));
        }
    }
}
