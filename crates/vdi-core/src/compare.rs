//! Comparing two disks, whatever their form: raw, an image, a chain of them.
//!
//! What both have as zeros without storage is not read, nor what is the same place of the same file (a
//! parent that they share). Where one disk is shorter, the other must be zeros. Sectors are the
//! unit: the answer names the first one that differs, as `qemu-img compare` does, however many
//! threads look (T1 of [`crate::crew`]).

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::convert::{
    Buffer, CachedReads, CopyError, End, Reader, Run, Runs, Stored, Way, Ways, is_zero,
};
use crate::crew::{Stopped, Threads, share_out};

/// How much is read of each disk and compared at a time; both fit in the CPU's cache.
const PIECE_BYTES: u64 = 256 << 10;

/// As [`PIECE_BYTES`], where a disk is read past the page cache.
const DIRECT_PIECE_BYTES: u64 = 1 << 20;

const SECTOR_BYTES: usize = 512;
type Sector = [u8; SECTOR_BYTES];

/// What must be the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// What is read; zeros behind the end of the shorter disk do not matter.
    Contents,
    /// Also the sizes, and which ranges have storage.
    SizesAndStorage,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// They are the same.
    Same,
    /// They differ in this sector first.
    Different {
        /// Where it begins.
        at_bytes: u64,
    },
    /// They have different sizes, which matters.
    Sizes,
    /// One has storage here and the other has not, which matters.
    Storage {
        /// Where that begins.
        at_bytes: u64,
    },
}

/// Compares two disks. `go_on` is told the bytes that are done and may break it off.
///
/// # Errors
/// If a disk cannot be read, or it was broken off.
pub fn compare(
    first: &End,
    second: &End,
    strictness: Strictness,
    threads: Threads,
    go_on: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Comparison, CompareError> {
    let is_strict = strictness == Strictness::SizesAndStorage;
    if is_strict && first.capacity() != second.capacity() {
        return Ok(Comparison::Sizes);
    }
    let total_bytes = first.capacity().max(second.capacity()).bytes();
    let readings = [first.look(), second.look()];
    let readers = readings
        .each_ref()
        .map(|reading| Reader::new(reading, CachedReads::AtOnce));
    let done = AtomicU64::new(0);
    let pairs = Pairs {
        sides: readers.each_ref().map(Side::new),
        at: 0,
        total_bytes,
        strictness,
        done: &done,
    };
    let desk = || [(); 2].map(|()| Buffer::new(DIRECT_PIECE_BYTES));
    let work = |bufs: &mut [Buffer; 2], pair: Pair| {
        let len_bytes = pair.disk.end - pair.disk.start;
        pair.compare(&readers, bufs)?;
        done.fetch_add(len_bytes, Ordering::Relaxed);
        Ok(())
    };
    let mut tell = || go_on(done.load(Ordering::Relaxed));
    match share_out(threads, pairs, desk, work, &mut tell) {
        Ok(()) => Ok(Comparison::Same),
        Err(Stopped::Ended(Found::Difference(comparison))) => Ok(comparison),
        Err(Stopped::Ended(Found::Failure(error))) => Err(error),
        Err(Stopped::Interrupted) => Err(CompareError::Interrupted),
    }
}

/// What ends a comparison.
enum Found {
    Difference(Comparison),
    Failure(CompareError),
}

/// Which of the two disks; an index.
#[derive(Clone, Copy)]
enum Which {
    First,
    Second,
}

impl Which {
    const BOTH: [Self; 2] = [Self::First, Self::Second];

    const fn failed(self, source: CopyError) -> Found {
        Found::Failure(match self {
            Self::First => CompareError::First { source },
            Self::Second => CompareError::Second { source },
        })
    }
}

/// A part of both disks that at least one of them stores.
struct Pair {
    disk: Range<u64>,
    /// Where, and the way there; zeros if nowhere.
    stored: [Option<(Stored, Way)>; 2],
}

impl Pair {
    fn compare(&self, readers: &[Reader<'_>; 2], bufs: &mut [Buffer; 2]) -> Result<(), Found> {
        let at = self.disk.start;
        let [one, other] = bufs;
        let mut read: [&[u8]; 2] = [&[], &[]];
        for (which, buf) in Which::BOTH.into_iter().zip([one, other]) {
            if let Some(stored) = self.stored[which as usize] {
                read[which as usize] = readers[which as usize]
                    .read(stored, at, self.disk.end - at, buf)
                    .map_err(|error| which.failed(error))?;
            }
        }
        match first_difference(read[0], read[1]) {
            None => Ok(()),
            Some(skip) => Err(Found::Difference(Comparison::Different {
                at_bytes: at + skip,
            })),
        }
    }
}

/// Where the first sector begins that differs.
fn first_difference(one: &[u8], other: &[u8]) -> Option<u64> {
    let same = match (one.is_empty(), other.is_empty()) {
        (false, false) => one == other,
        // Nothing was read where there are zeros.
        (true, _) => is_zero(other),
        (_, true) => is_zero(one),
    };
    if same {
        return None;
    }
    let len = one.len().max(other.len()) as u64;
    let sector = |buf: &[u8], at: u64| -> Sector {
        let found = usize::try_from(at).ok().and_then(|at| buf.get(at..));
        let found = found.and_then(|rest| rest.first_chunk());
        found.copied().unwrap_or([0; SECTOR_BYTES])
    };
    (0..len)
        .step_by(SECTOR_BYTES)
        .find(|&at| sector(one, at) != sector(other, at))
}

/// Cuts both disks into parts that are to be read, in order.
struct Pairs<'p> {
    sides: [Side<'p>; 2],
    at: u64,
    total_bytes: u64,
    strictness: Strictness,
    /// What is passed over counts here.
    done: &'p AtomicU64,
}

impl Iterator for Pairs<'_> {
    type Item = Result<Pair, Found>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.at < self.total_bytes {
            let pair = match self.pair() {
                Ok(pair) => pair,
                Err(found) => return Some(Err(found)),
            };
            self.at = pair.disk.end;
            if pair.stored != [None, None] {
                return Some(Ok(pair));
            }
            let len_bytes = pair.disk.end - pair.disk.start;
            self.done.fetch_add(len_bytes, Ordering::Relaxed);
        }
        None
    }
}

impl Pairs<'_> {
    /// The next part; nothing is stored where it need not be read.
    fn pair(&mut self) -> Result<Pair, Found> {
        let (start, mut end) = (self.at, self.total_bytes);
        let mut stored = [None; 2];
        for which in Which::BOTH {
            let run = self.sides[which as usize].run_at(start);
            let run = run.map_err(|error| which.failed(error))?;
            stored[which as usize] = run.stored;
            end = end.min(run.disk.end);
        }
        let [one, other] = stored;
        if self.strictness == Strictness::SizesAndStorage && one.is_some() != other.is_some() {
            let storage = Comparison::Storage { at_bytes: start };
            return Err(Found::Difference(storage));
        }
        if let (Some(one), Some(other)) = (one, other)
            && self.is_one_place(one, other)
        {
            return Ok(Pair {
                disk: start..end,
                stored: [None; 2],
            });
        }
        for which in Which::BOTH {
            let Some(place) = stored[which as usize] else {
                continue;
            };
            let reading = self.sides[which as usize].reader.reading();
            let hole_bytes = reading
                .hole_bytes(place, end - start)
                .map_err(|error| which.failed(error))?;
            if hole_bytes > 0 {
                stored[which as usize] = None;
                end = start + hole_bytes;
            }
        }
        Ok(self.piece(start..end, stored))
    }

    /// The beginning of a part, to be read at once.
    fn piece(&mut self, disk: Range<u64>, stored: [Option<Stored>; 2]) -> Pair {
        let Range { start, mut end } = disk;
        let ways = Which::BOTH.map(|which| {
            let stored = stored[which as usize]?;
            let way = self.sides[which as usize].ways.way(stored, end - start);
            Some((stored, way))
        });
        let piece_bytes = if ways.iter().flatten().any(|(_, way)| *way == Way::Direct) {
            DIRECT_PIECE_BYTES
        } else {
            PIECE_BYTES
        };
        if ways != [None, None] {
            end = end.min(start - start % piece_bytes + piece_bytes);
        }
        Pair {
            disk: start..end,
            stored: ways,
        }
    }

    fn is_one_place(&self, one: Stored, other: Stored) -> bool {
        let file = |which: Which, stored: Stored| self.sides[which as usize].files[stored.depth];
        let (first, second) = (file(Which::First, one), file(Which::Second, other));
        first.is_some() && first == second && one.at == other.at
    }
}

/// One of the two disks.
struct Side<'r> {
    reader: &'r Reader<'r>,
    ways: Ways<'r>,
    runs: Runs<'r>,
    run: Run,
    /// Which files those of [`Stored::depth`] are.
    files: Vec<Option<(u64, u64)>>,
}

impl<'r> Side<'r> {
    fn new(reader: &'r Reader<'r>) -> Self {
        let reading = reader.reading();
        Self {
            reader,
            ways: reader.ways(),
            runs: reading.runs(),
            run: Run {
                disk: 0..0,
                stored: None,
            },
            files: reading.identities(),
        }
    }

    /// What there is from `at` on, which is not before where it was asked for last. Behind the disk's
    /// end there are zeros without end.
    fn run_at(&mut self, at: u64) -> Result<Run, CopyError> {
        while self.run.disk.end <= at {
            self.run = match self.runs.next() {
                Some(run) => run?,
                None => Run {
                    disk: at..u64::MAX,
                    stored: None,
                },
            };
        }
        let mut run = self.run.clone();
        run.advance(at - run.disk.start);
        Ok(run)
    }
}

/// Why two disks could not be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The first one cannot be read.
    #[error("the first disk cannot be read")]
    First {
        /// Why not.
        source: CopyError,
    },
    /// The second one cannot be read.
    #[error("the second disk cannot be read")]
    Second {
        /// Why not.
        source: CopyError,
    },
    /// It was broken off.
    #[error("interrupted")]
    Interrupted,
}
