//! Copying a disk between forms: raw, dynamic, fixed.
//!
//! [`copy`] moves what reads other than zero and leaves the rest alone, so a sparse
//! source gives a sparse destination. Where the file system can let two files share extents, they do:
//! that moves nothing, so zeros that have storage are not looked for there. It opens, names
//! and renames nothing, prints nothing, and asks again and again whether to go on.
//!
//! ```text
//! runs ─► pieces ─► read ──────► look for zeros ─► places, in order ─► write      map, count, sync
//!  one thread at a time         any thread        one at a time    any thread       the last
//! ```
//!
//! Invariants:
//!
//! - **V1** Zeros are left out only where the destination reads zeros before the copy:
//!   in an image or a file that was made for it. Anything else is written everywhere.
//! - **V2** Blocks of a new image are in the order of the disk, so that neighbours on the disk are
//!   neighbours in the file, and so that the number of threads does not show in it.
//! - **V3** [`copy`] returns `Ok` only when the destination is on stable storage.
//! - **V4** A hole in the source's files takes no space in the destination, unless that is fixed.

mod buffer;
mod destination;
mod direct;
mod end;
mod new_image;
mod raw;
mod reader;
mod zeros;

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::crew::{Stopped, Threads, share_out};
use crate::disk::ReadError;
use crate::share;
use crate::storage::Access;
use crate::units::FileOffset;

pub(crate) use self::buffer::Buffer;
pub use self::destination::Destination;
use self::direct::Direct;
pub use self::end::End;
pub(crate) use self::end::{Reading, Run, Runs, Stored};
pub use self::new_image::{NewImage, NewImageError};
use self::new_image::{Placed, Turn};
pub use self::raw::{RawDisk, RawError};
pub(crate) use self::reader::{CachedReads, Reader, Way, Ways};
pub(crate) use self::zeros::is_zero;

/// Bytes read and judged at a time: few enough to be in the CPU's cache still when they are written. Reads take turns, so do
/// writes to one file, and so do threads that find places: there are not to be too many turns.
const PIECE_BYTES: u64 = 512 << 10;

/// As [`PIECE_BYTES`], of a raw disk that is copied. Smaller pieces were measured to be faster there (a file with holes, not in
/// the page cache), and slower where the source is an image.
const RAW_PIECE_BYTES: u64 = 128 << 10;

/// As [`PIECE_BYTES`], of what is read or written past the page cache. Measured with three threads, raw to VDI: 0.86 s where 1 MiB
/// made 0.95 and 512 KiB made 1.13.
const DIRECT_PIECE_BYTES: u64 = 2 << 20;

/// Bytes shared at a time. It may take long where the source's extents are small, or not yet
/// written by the host.
const SHARE_BYTES: u64 = 64 << 20;

/// Whether source and destination may share extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Where the file system can.
    Auto,
    /// No: all is read, and zeros are left out wherever they are.
    Never,
}

/// How a copy is made.
#[derive(Clone, Copy, Debug)]
pub struct CopyOptions {
    /// How many threads move data.
    pub threads: Threads,
    /// Whether extents are shared.
    pub sharing: Sharing,
}

/// How far a copy has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the disk that are done, data or not.
    pub done_bytes: u64,
    /// Bytes of the disk.
    pub total_bytes: u64,
}

/// Why a disk could not be copied.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages are the documentation")]
pub enum CopyError {
    #[error("the source cannot be read at byte {at_bytes}")]
    ReadRaw { at_bytes: u64, source: io::Error },
    #[error("the source cannot be read at byte {at_bytes}")]
    ReadImage { at_bytes: u64, source: ReadError },
    #[error("holes cannot be found in the source's file at {at}")]
    Seek { at: FileOffset, source: io::Error },
    #[error("the destination cannot be written at byte {at_bytes}")]
    Write { at_bytes: u64, source: io::Error },
    #[error("the destination has {found} bytes, but the source's disk has {needed}")]
    TooSmall { found: u64, needed: u64 },
    #[error("the destination cannot be brought to stable storage")]
    Finish(#[source] io::Error),
    #[error("interrupted")]
    Interrupted,
}

/// Copies the disk `from` to `to`, which must be at least as large, and syncs it.
/// `go_on` is told of the progress now and then and may break the copy off.
///
/// # Errors
/// The first failure; the destination is then incomplete.
pub fn copy(
    from: &End,
    mut to: Destination,
    options: CopyOptions,
    go_on: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<(), CopyError> {
    let (total_bytes, found) = (from.capacity().bytes(), to.capacity().bytes());
    if found < total_bytes {
        return Err(CopyError::TooSmall {
            found,
            needed: total_bytes,
        });
    }
    let done = AtomicU64::new(0);
    let mut tell = || {
        go_on(Progress {
            done_bytes: done.load(Ordering::Relaxed),
            total_bytes,
        })
    };
    let from = from.look();
    let copier = Copier {
        from: Reader::new(&from, CachedReads::InTurns),
        files: from.files(),
        piece_bytes: match from {
            Reading::Raw(_) => RAW_PIECE_BYTES,
            Reading::Image(..) => PIECE_BYTES,
        },
        to: &to,
        to_direct: buffer::has_large_pages()
            .then(|| Direct::open(to.file(), Access::Writable))
            .flatten(),
        done: &done,
    };
    let pieces = copier.pieces(options.sharing);
    let desk = || Buffer::new(DIRECT_PIECE_BYTES);
    let work = |buf: &mut Buffer, piece| copier.copy(piece, buf);
    share_out(options.threads, pieces, desk, work, &mut tell).map_err(|stopped| match stopped {
        Stopped::Ended(error) => error,
        Stopped::Interrupted => CopyError::Interrupted,
    })?;
    if tell().is_break() {
        return Err(CopyError::Interrupted);
    }
    to.finish().map_err(CopyError::Finish)
}

/// A part of the disk for one thread.
struct Piece<'t> {
    disk: Range<u64>,
    how: How,
    turn: Option<Turn<'t>>,
}

/// How a piece comes to the destination.
#[derive(Clone, Copy, Debug)]
enum How {
    /// It is read, and written where it is not zero.
    Move(Stored, Way),
    /// The destination shares it.
    Share(Stored),
    /// There are zeros.
    Zero,
}

struct Copier<'c> {
    from: Reader<'c>,
    /// The source's.
    files: Vec<Option<&'c File>>,
    /// Bytes that are moved at a time.
    piece_bytes: u64,
    to: &'c Destination,
    /// The same past the page cache, where that can be.
    to_direct: Option<Direct>,
    /// Bytes of the disk that are done.
    done: &'c AtomicU64,
}

impl<'c> Copier<'c> {
    fn pieces(&'c self, sharing: Sharing) -> Pieces<'c> {
        let unit = |file: &Option<&File>| share::unit_bytes((*file)?, self.to.file());
        let units = match sharing {
            Sharing::Auto if self.to.may_share() => self.files.iter().map(unit).collect(),
            Sharing::Auto | Sharing::Never => vec![None; self.files.len()],
        };
        Pieces {
            copier: self,
            runs: self.from.reading().runs(),
            run: None,
            ways: self.from.ways(),
            units,
        }
    }

    fn copy(&self, piece: Piece<'_>, buf: &mut Buffer) -> Result<(), CopyError> {
        let Piece { disk, how, turn } = piece;
        let len_bytes = disk.end - disk.start;
        match how {
            How::Move(stored, way) => self.move_data(disk, (stored, way), turn, buf)?,
            How::Share(stored) => self.share(disk, stored, turn, buf)?,
            How::Zero => self.write_zeros(&disk, buf)?,
        }
        self.done.fetch_add(len_bytes, Ordering::Relaxed);
        Ok(())
    }

    fn move_data(
        &self,
        disk: Range<u64>,
        from: (Stored, Way),
        turn: Option<Turn<'_>>,
        buf: &mut Buffer,
    ) -> Result<(), CopyError> {
        let start = disk.start;
        let data = self.from.read(from, start, disk.end - start, buf)?;
        let parts = if self.to.reads_zeros() {
            let pieces = zeros::nonzero_pieces(data, start);
            pieces
                .map(|piece| start + piece.start as u64..start + piece.end as u64)
                .collect()
        } else {
            vec![disk]
        };
        for Placed { disk, at } in destination::place(turn, parts) {
            let part = part_of(data, disk.start - start, disk.end - start);
            self.write_past(part, disk.start, at)?;
        }
        Ok(())
    }

    fn share(
        &self,
        disk: Range<u64>,
        stored: Stored,
        turn: Option<Turn<'_>>,
        buf: &mut Buffer,
    ) -> Result<(), CopyError> {
        let start = disk.start;
        let file = self.files[stored.depth].expect("what is shared is in a file");
        for Placed { disk, at } in destination::place(turn, vec![disk]) {
            let from = stored.plus(disk.start - start);
            let shared = share::share(file, from.at, self.to.file(), at, disk.end - disk.start)
                .map_err(|errno| CopyError::Write {
                    at_bytes: disk.start,
                    source: errno.into(),
                })?;
            let rest = Placed {
                at: at.plus(shared),
                disk: disk.start + shared..disk.end,
            };
            self.move_to(&rest, from.plus(shared), buf)?;
        }
        Ok(())
    }

    /// Moves what has its place and could not be shared.
    fn move_to(&self, to: &Placed, from: Stored, buf: &mut Buffer) -> Result<(), CopyError> {
        let mut done = 0;
        let len_bytes = to.disk.end - to.disk.start;
        while done < len_bytes {
            let at_disk = to.disk.start + done;
            let part = (from.plus(done), Way::Cached);
            let piece_bytes = PIECE_BYTES.min(len_bytes - done);
            let data = self.from.read(part, at_disk, piece_bytes, buf)?;
            for part in zeros::nonzero_pieces(data, at_disk) {
                let skip = part.start as u64;
                self.write(&data[part], at_disk + skip, to.at.plus(done + skip))?;
            }
            done += data.len() as u64;
        }
        Ok(())
    }

    /// V1: only a raw disk can be without zeros.
    fn write_zeros(&self, disk: &Range<u64>, buf: &mut Buffer) -> Result<(), CopyError> {
        let zeros = buf.first(disk.end - disk.start);
        zeros.fill(0);
        self.write(zeros, disk.start, FileOffset(disk.start))
    }

    /// As [`Self::write`], what can be past the page cache.
    fn write_past(&self, data: &[u8], at_bytes: u64, at: FileOffset) -> Result<(), CopyError> {
        let written = match &self.to_direct {
            Some(direct) => direct.write(data, at),
            None => Ok(0..0),
        };
        let written = written.map_err(|source| CopyError::Write { at_bytes, source })?;
        for rest in [0..written.start, written.end..data.len()] {
            let skip = rest.start as u64;
            self.write(&data[rest], at_bytes + skip, at.plus(skip))?;
        }
        Ok(())
    }

    fn write(&self, data: &[u8], at_bytes: u64, at: FileOffset) -> Result<(), CopyError> {
        self.to
            .write(data, at)
            .map_err(|source| CopyError::Write { at_bytes, source })
    }
}

fn part_of(data: &[u8], start: u64, end: u64) -> &[u8] {
    let index = |at| usize::try_from(at).expect("a part is inside the buffer");
    &data[index(start)..index(end)]
}

/// Cuts the source's disk into pieces, in order.
struct Pieces<'c> {
    copier: &'c Copier<'c>,
    runs: Runs<'c>,
    ways: Ways<'c>,
    /// What is left of the run that was begun.
    run: Option<Run>,
    /// In what units each of the source's files can share its extents.
    units: Vec<Option<u64>>,
}

impl<'c> Iterator for Pieces<'c> {
    type Item = Result<Piece<'c>, CopyError>;

    fn next(&mut self) -> Option<Self::Item> {
        let Copier { to, done, .. } = *self.copier;
        loop {
            let mut run = match self.run.take() {
                Some(run) => run,
                None => match self.runs.next()? {
                    Ok(run) => run,
                    Err(error) => return Some(Err(error)),
                },
            };
            let (how, len_bytes) = match self.first_of(&run) {
                Ok(first) => first,
                Err(error) => return Some(Err(error)),
            };
            let disk = run.disk.start..run.disk.start + len_bytes;
            run.advance(len_bytes);
            self.run = (run.len_bytes() > 0).then_some(run);
            let turn = match how {
                How::Zero if to.reads_zeros() => {
                    done.fetch_add(len_bytes, Ordering::Relaxed);
                    continue;
                }
                How::Zero => None,
                How::Move(..) | How::Share(_) => to.turn(),
            };
            return Some(Ok(Piece { disk, how, turn }));
        }
    }
}

impl Pieces<'_> {
    /// How to deal with the beginning of a run, and how long that is.
    fn first_of(&mut self, run: &Run) -> Result<(How, u64), CopyError> {
        let len_bytes = run.len_bytes();
        let to_next = |step: u64| len_bytes.min(step - run.disk.start % step);
        let zeros = |len_bytes: u64| {
            // Where they need not be written, any number is one piece.
            let is_free = self.copier.to.reads_zeros();
            let most = if is_free { u64::MAX } else { PIECE_BYTES };
            (How::Zero, len_bytes.min(most))
        };
        let Some(stored) = run.stored else {
            return Ok(zeros(len_bytes));
        };
        let hole_bytes = self.copier.from.reading().hole_bytes(stored, len_bytes)?;
        if hole_bytes > 0 {
            return Ok(zeros(hole_bytes));
        }
        if let Some(unit) = self.units[stored.depth]
            && run.disk.start.is_multiple_of(unit)
            && stored.at.0.is_multiple_of(unit)
        {
            let most = to_next(SHARE_BYTES);
            // V4: a hole is not to be filled.
            let data_bytes = self.copier.from.reading().data_bytes(stored, most)?;
            let whole = data_bytes - data_bytes % unit;
            if whole > 0 {
                return Ok((How::Share(stored), whole));
            }
        }
        let way = self.ways.way(stored, len_bytes);
        let piece_bytes = match way {
            Way::Cached if self.copier.to_direct.is_none() => self.copier.piece_bytes,
            Way::Cached | Way::Direct => DIRECT_PIECE_BYTES,
        };
        Ok((How::Move(stored, way), to_next(piece_bytes)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;
    use crate::storage::{Access, Locking};
    use crate::units::Capacity;

    const OPTIONS: CopyOptions = CopyOptions {
        threads: Threads::TWO,
        sharing: Sharing::Auto,
    };

    fn raw(path: &Path, access: Access) -> RawDisk {
        RawDisk::open(path, access, Locking::Locked).unwrap()
    }

    /// A raw disk of 3 MiB with something in the second.
    fn source(directory: &Path) -> End {
        let path = directory.join("from");
        let file = File::create(&path).unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(&[5; 700], (1 << 20) + 512).unwrap();
        End::Raw(raw(&path, Access::ReadOnly))
    }

    #[test]
    fn what_was_there_before_is_written_over_everywhere() {
        let directory = tempfile::tempdir().unwrap();
        let from = source(directory.path());
        let path = directory.path().join("to");
        std::fs::write(&path, vec![0xFF; 4 << 20]).unwrap();
        let mut told = Vec::new();
        let to = Destination::Raw(raw(&path, Access::Writable));
        copy(&from, to, OPTIONS, &mut |progress| {
            told.push(progress.done_bytes);
            ControlFlow::Continue(())
        })
        .unwrap();
        let found = std::fs::read(&path).unwrap();
        assert!(found[..3 << 20] == std::fs::read(directory.path().join("from")).unwrap());
        assert!(
            found[3 << 20..] == [0xFF; 1 << 20],
            "behind the disk nothing changes"
        );
        assert!(
            told.is_sorted() && told.last() == Some(&(3 << 20)),
            "{told:?}"
        );
    }

    #[test]
    fn a_copy_goes_on_only_while_it_is_told_to() {
        let directory = tempfile::tempdir().unwrap();
        let from = source(directory.path());
        let path = directory.path().join("to");
        let to = Destination::Raw(RawDisk::create(&path, from.capacity()).unwrap());
        let stopped = copy(&from, to, OPTIONS, &mut |_| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(CopyError::Interrupted)));
    }

    #[test]
    fn a_destination_that_is_too_small_is_not_touched() {
        let directory = tempfile::tempdir().unwrap();
        let from = source(directory.path());
        let path = directory.path().join("to");
        let capacity = Capacity::from_bytes_rounded_down(1 << 20);
        let to = Destination::Raw(RawDisk::create(&path, capacity).unwrap());
        let refused = copy(&from, to, OPTIONS, &mut |_| ControlFlow::Continue(()));
        assert!(matches!(
            refused,
            Err(CopyError::TooSmall {
                found: 0x10_0000,
                needed: 0x30_0000
            })
        ));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 1 << 20);
    }

    /// A raw disk of 9 MiB and a bit, out of the page cache: a hole, data, zeros, data to the end. `None` if this file system
    /// has only the way through the page cache.
    fn cold_source(directory: &Path) -> Option<(Vec<u8>, File, End)> {
        let path = directory.join("from");
        let mut bytes = vec![0; (9 << 20) + 1000];
        for (at, byte) in bytes.iter_mut().enumerate().skip(1 << 20) {
            *byte = u8::try_from((at / 512 + at) % 251).expect("less than 251");
        }
        bytes[(5 << 20) + 4096..6 << 20].fill(0);
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        let file = options.open(&path).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        file.write_all_at(&bytes[1 << 20..], 1 << 20).unwrap();
        direct::tests::evict(&file);
        let has_both = Direct::open(&file, Access::ReadOnly).is_some() && buffer::has_large_pages();
        if !has_both {
            eprintln!("nothing is tested: no O_DIRECT or no large pages here");
            return None;
        }
        Some((bytes, file, End::Raw(raw(&path, Access::ReadOnly))))
    }

    #[test]
    fn what_is_not_in_the_page_cache_is_copied_past_it() {
        let directory = tempfile::tempdir().unwrap();
        let Some((mut bytes, file, from)) = cold_source(directory.path()) else {
            return;
        };
        let path = directory.path().join("to");
        let to = Destination::Raw(RawDisk::create(&path, from.capacity()).unwrap());
        copy(&from, to, OPTIONS, &mut |_| ControlFlow::Continue(())).unwrap();
        let is_cold = |file, mib: u64| direct::is_cold(file, FileOffset((mib << 20) + 70_000));
        let copied = File::open(&path).unwrap();
        // The last piece ends behind the file, so it is read as any.
        for mib in [2, 4, 6] {
            assert!(is_cold(&file, mib), "MiB {mib} was read past it");
            assert!(is_cold(&copied, mib), "MiB {mib} was written past it");
        }
        assert!(
            direct::is_cold(&file, FileOffset(1 << 20)),
            "the look is forgotten"
        );
        bytes.resize((9 << 20) + 1024, 0);
        assert!(std::fs::read(&path).unwrap() == bytes);
        let holes = raw(&path, Access::ReadOnly);
        let zeros = (5 << 20) + 4096;
        assert_eq!(holes.next_data(zeros).unwrap().unwrap().start, 6 << 20);
    }

    #[test]
    fn what_is_in_the_page_cache_is_read_there() {
        let directory = tempfile::tempdir().unwrap();
        let Some((bytes, file, from)) = cold_source(directory.path()) else {
            return;
        };
        let mut found = vec![0; bytes.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        let reading = from.look();
        let reader = Reader::new(&reading, CachedReads::InTurns);
        let stored = Stored {
            depth: 0,
            at: FileOffset(2 << 20),
        };
        assert_eq!(reader.ways().way(stored, 1 << 20), Way::Cached);
        direct::tests::evict(&file);
        assert_eq!(reader.ways().way(stored, 1 << 20), Way::Direct);
        assert_eq!(reader.ways().way(stored, 4096), Way::Cached, "little");
    }

    #[test]
    fn a_source_that_shrinks_meanwhile_is_an_error_at_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let Some((_, file, from)) = cold_source(directory.path()) else {
            return;
        };
        let reading = from.look();
        let reader = Reader::new(&reading, CachedReads::InTurns);
        file.set_len(3 << 20).unwrap();
        let at_bytes = 2 << 20;
        let stored = Stored {
            depth: 0,
            at: FileOffset(at_bytes),
        };
        let mut buf = Buffer::new(DIRECT_PIECE_BYTES);
        let read = reader.read((stored, Way::Direct), at_bytes, 2 << 20, &mut buf);
        let error = read.unwrap_err();
        assert!(
            matches!(
                error,
                CopyError::ReadRaw {
                    at_bytes: 0x20_0000,
                    ..
                }
            ),
            "{error}"
        );
    }
}
