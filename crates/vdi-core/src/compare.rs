//! Comparing two disks, whatever their form: raw, an image, a chain of them.
//!
//! What both have as zeros without storage is not read. Where one disk is shorter, the other must
//! be zeros. Sectors are the unit: the answer names the first one that differs, as
//! `qemu-img compare` does.

use std::ops::{ControlFlow, Range};

use crate::convert::{CopyError, End, is_zero};

/// How much is read and compared at a time.
const CHUNK_BYTES: u64 = 1 << 20;

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
    go_on: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Comparison, CompareError> {
    let is_strict = strictness == Strictness::SizesAndStorage;
    if is_strict && first.capacity() != second.capacity() {
        return Ok(Comparison::Sizes);
    }
    let wrap_first = |source| CompareError::First { source };
    let wrap_second = |source| CompareError::Second { source };
    let (mut first, mut second) = (Side::new(first), Side::new(second));
    let total = first.end_bytes().max(second.end_bytes());
    let mut at = 0;
    while at < total {
        if go_on(at).is_break() {
            return Err(CompareError::Interrupted);
        }
        let (one, one_end) = first.run_at(at).map_err(wrap_first)?;
        let (other, other_end) = second.run_at(at).map_err(wrap_second)?;
        let run_end = one_end.min(other_end).min(total);
        if is_strict && one != other {
            return Ok(Comparison::Storage { at_bytes: at });
        }
        if (one, other) == (Run::Zeros, Run::Zeros) {
            at = run_end;
            continue;
        }
        let end = run_end.min(at + CHUNK_BYTES);
        first.read(one, at..end).map_err(wrap_first)?;
        second.read(other, at..end).map_err(wrap_second)?;
        if let Some(skip) = first_difference(&first.buf, &second.buf) {
            return Ok(Comparison::Different {
                at_bytes: at + skip,
            });
        }
        at = end;
    }
    Ok(Comparison::Same)
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    Zeros,
    Data,
}

/// One of the two disks.
struct Side<'e> {
    end: &'e End,
    /// The next run of data at or behind where it was last asked for; empty at the end if there is none.
    data: Range<u64>,
    buf: Vec<u8>,
}

impl<'e> Side<'e> {
    const fn new(end: &'e End) -> Self {
        Self {
            end,
            data: 0..0,
            buf: Vec::new(),
        }
    }

    fn end_bytes(&self) -> u64 {
        self.end.capacity().bytes()
    }

    /// What there is at `at`, and to where. Behind the disk's end there are zeros without end.
    fn run_at(&mut self, at: u64) -> Result<(Run, u64), CopyError> {
        if at >= self.end_bytes() {
            return Ok((Run::Zeros, u64::MAX));
        }
        if self.data.end <= at {
            let end = self.end_bytes();
            self.data = self.end.next_data(at)?.unwrap_or(end..end);
        }
        if self.data.start <= at {
            Ok((Run::Data, self.data.end))
        } else {
            Ok((Run::Zeros, self.data.start))
        }
    }

    fn read(&mut self, run: Run, bytes: Range<u64>) -> Result<(), CopyError> {
        self.buf.clear();
        if run == Run::Zeros {
            return Ok(());
        }
        let len = usize::try_from(bytes.end - bytes.start).expect("a chunk fits in memory");
        self.buf.resize(len, 0);
        self.end.read(&mut self.buf, bytes.start)
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
