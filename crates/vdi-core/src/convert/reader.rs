//! How the pieces of a disk are read: through the page cache, or past it where they are not in it.
//!
//! What is in the page cache is read from there. What is not is read past it by several threads at once, in pieces large enough
//! to keep the device busy, and does not push out what others have there.

use std::fs::File;
use std::sync::Mutex;

use crate::convert::buffer::{Buffer, has_large_pages};
use crate::convert::direct::{self, Direct, LEAST_BYTES};
use crate::convert::{CopyError, Reading, Stored};
use crate::storage::Access;
use crate::units::FileOffset;
use crate::writer::lock;

/// For how many pieces of a file it holds what was found for one: looking costs a request to the device, and few files are in the page
/// cache in small parts.
const PIECES_PER_LOOK: u32 = 16;

/// The way to a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through the page cache.
    Cached,
    /// Past it.
    Direct,
}

/// Whether threads that read through the page cache take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CachedReads {
    /// They do: the host sees one read follow the other.
    InTurns,
    /// They do not.
    AtOnce,
}

/// Reads the pieces of a disk.
pub(crate) struct Reader<'r> {
    reading: &'r Reading<'r>,
    /// As [`Stored::depth`] counts, where a file has both ways.
    doors: Vec<Option<Doors<'r>>>,
    one_reads: Option<Mutex<()>>,
}

struct Doors<'r> {
    cached: &'r File,
    direct: Direct,
}

impl<'r> Reader<'r> {
    pub(crate) fn new(reading: &'r Reading<'r>, cached: CachedReads) -> Self {
        let has_large_pages = has_large_pages();
        let doors = |file: Option<&'r File>| {
            let cached = file.filter(|_| has_large_pages)?;
            let direct = Direct::open(cached, Access::ReadOnly)?;
            Some(Doors { cached, direct })
        };
        Self {
            reading,
            doors: reading.files().into_iter().map(doors).collect(),
            one_reads: (cached == CachedReads::InTurns).then(Mutex::default),
        }
    }

    /// The disk.
    pub(crate) const fn reading(&self) -> &'r Reading<'r> {
        self.reading
    }

    /// Reads what is stored at the disk's byte `at_bytes`, and gives it.
    pub(crate) fn read<'b>(
        &self,
        (stored, way): (Stored, Way),
        at_bytes: u64,
        len_bytes: u64,
        buf: &'b mut Buffer,
    ) -> Result<&'b mut [u8], CopyError> {
        if way == Way::Direct
            && let Some(doors) = &self.doors[stored.depth]
            && let Some(found) = doors.direct.read(stored.at, len_bytes, buf.whole())
        {
            return Ok(&mut buf.whole()[found]);
        }
        let _one = self.one_reads.as_ref().map(lock);
        let data = buf.first(len_bytes);
        self.reading.read(stored, at_bytes, data)?;
        Ok(data)
    }

    /// The ways to the disk's pieces.
    pub(crate) fn ways(&self) -> Ways<'_> {
        Ways {
            doors: &self.doors,
            looks: self.doors.iter().map(|_| None).collect(),
        }
    }
}

/// Finds the way to each piece of a disk; asked in their order.
pub(crate) struct Ways<'r> {
    doors: &'r [Option<Doors<'r>>],
    /// The last look at each file.
    looks: Vec<Option<Look>>,
}

struct Look {
    at: FileOffset,
    way: Way,
    pieces_left: u32,
}

impl Ways<'_> {
    /// The way to a piece that is in a run of `len_bytes` that begins with it.
    pub(crate) fn way(&mut self, stored: Stored, len_bytes: u64) -> Way {
        let Some(doors) = &self.doors[stored.depth] else {
            return Way::Cached;
        };
        if len_bytes < LEAST_BYTES {
            return Way::Cached;
        }
        let last = &mut self.looks[stored.depth];
        if let Some(look) = last
            && look.pieces_left > 0
        {
            look.pieces_left -= 1;
            return look.way;
        }
        if let Some(look) = last.take() {
            look.end(doors);
        }
        let is_cold = direct::is_cold(doors.cached, stored.at);
        let way = if is_cold { Way::Direct } else { Way::Cached };
        *last = Some(Look {
            at: stored.at,
            way,
            pieces_left: PIECES_PER_LOOK - 1,
        });
        way
    }
}

impl Look {
    /// What the look itself brought into the page cache is there by now.
    fn end(self, doors: &Doors<'_>) {
        if self.way == Way::Direct {
            direct::forget(doors.cached, self.at);
        }
    }
}

impl Drop for Ways<'_> {
    fn drop(&mut self) {
        for (look, doors) in self.looks.iter_mut().zip(self.doors) {
            if let (Some(look), Some(doors)) = (look.take(), doors) {
                look.end(doors);
            }
        }
    }
}
