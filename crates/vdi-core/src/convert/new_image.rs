//! An image that is made in one go: blocks in the order of the disk, the map at the end.
//!
//! Nobody else sees the file before [`NewImage::finish`], so what [`crate::writer`] does for a crash at any
//! moment is not needed: until then the file says that it holds nothing. Threads that write to it
//! have a [`Turn`] each, given out in the order of the disk; places are found in that order (V2),
//! data are written in any.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use zerocopy::IntoBytes;

use crate::create::{CreateError, CreateOptions, NewKind, new_header, write_new};
use crate::format::{ENTRY_BYTES, RawHeader};
use crate::storage::{Access, FileError, HostFile, Locking, Storage};
use crate::units::{BlockSize, Capacity, DataArea, DiskBlock, FileBlock, FileOffset};
use crate::writer::lock;

/// Entries that are written at a time.
const PIECE_ENTRIES: usize = 64 << 10;

/// An image that is being made.
#[derive(Debug)]
pub struct NewImage {
    file: HostFile,
    /// In a box, since it is half a kilobyte.
    header: Box<RawHeader>,
    area: DataArea,
    size: BlockSize,
    layout: Layout,
}

#[derive(Debug)]
enum Layout {
    /// Each block has its place already.
    Fixed,
    Dynamic {
        placing: Mutex<Placing>,
        /// Told when a turn is over.
        turned: Condvar,
    },
}

#[derive(Debug, Default)]
struct Placing {
    /// Turns given out, and turns over.
    given: u64,
    over: u64,
    /// The file's blocks, each with the block of the disk that it holds: ascending (V2).
    blocks: Vec<DiskBlock>,
}

/// A part of the disk, and where it goes in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    pub(super) disk: Range<u64>,
    pub(super) at: FileOffset,
}

impl NewImage {
    /// Makes the file, locked; until it is finished it is an empty image.
    ///
    /// # Errors
    /// If the options break a limit, `path` exists, or the host fails.
    ///
    /// # Panics
    /// If the options are those of a child: it would not read zeros (V1).
    pub fn create(path: &Path, options: &CreateOptions) -> Result<Self, NewImageError> {
        let layout = match options.kind {
            NewKind::Fixed => Layout::Fixed,
            NewKind::Dynamic => Layout::Dynamic {
                placing: Mutex::default(),
                turned: Condvar::new(),
            },
            NewKind::Differencing(_) => panic!("V1: a child does not read zeros"),
        };
        let header = new_header(options)?;
        let size = BlockSize::new(options.block_size).expect("new_header checked it");
        write_new(path, &header, options.kind)?;
        Ok(Self {
            file: HostFile::open(path, Access::Writable, Locking::Locked)?,
            area: DataArea::new(header.offset_data.get(), 0, size),
            header: Box::new(header),
            size,
            layout,
        })
    }

    /// The size of the disk.
    pub fn capacity(&self) -> Capacity {
        Capacity::from_bytes_rounded_down(self.header.disk_size.get())
    }

    pub(super) const fn file(&self) -> &HostFile {
        &self.file
    }

    /// Whether all space was reserved at once.
    pub(super) const fn is_fixed(&self) -> bool {
        matches!(self.layout, Layout::Fixed)
    }

    /// Asks for a turn, behind all that were asked for before.
    pub(super) fn turn(&self) -> Turn<'_> {
        let number = match &self.layout {
            Layout::Fixed => 0,
            Layout::Dynamic { placing, .. } => {
                let mut placing = lock(placing);
                placing.given += 1;
                placing.given - 1
            }
        };
        Turn {
            image: self,
            number,
        }
    }

    /// Where a part of the disk goes that `place_of` finds blocks for; neighbours in the file in one.
    fn places(
        &self,
        disk: &Range<u64>,
        mut place_of: impl FnMut(DiskBlock) -> FileBlock,
        placed: &mut Vec<Placed>,
    ) {
        let mut at_disk = disk.start;
        while at_disk < disk.end {
            let span = self
                .size
                .span_at(at_disk)
                .expect("the range is on the disk");
            let end = (at_disk + span.len_bytes).min(disk.end);
            let block = place_of(span.block);
            let at = self.area.contents_of(block).plus(span.skip_bytes);
            match placed.last_mut() {
                Some(last)
                    if last.disk.end == at_disk
                        && last.at.plus(last.disk.end - last.disk.start) == at =>
                {
                    last.disk.end = end;
                }
                _ => placed.push(Placed {
                    disk: at_disk..end,
                    at,
                }),
            }
            at_disk = end;
        }
    }

    /// Writes the map and the count, and brings all to stable storage (V3).
    pub(super) fn finish(&mut self) -> io::Result<()> {
        if let Layout::Dynamic { placing, .. } = &mut self.layout {
            let blocks = &placing
                .get_mut()
                .unwrap_or_else(PoisonError::into_inner)
                .blocks;
            let count = u32::try_from(blocks.len()).expect("block numbers have 32 bits");
            write_entries(&self.file, &self.header, blocks)?;
            self.file.set_len(self.area.end_of(count).0)?;
            self.header.blocks_allocated = count.into();
            self.file
                .write_all_at(self.header.as_bytes(), FileOffset(0))?;
        }
        self.file.file().sync_all()
    }
}

/// Names the file's blocks in the map; neighbours of the disk in one write.
fn write_entries(file: &HostFile, header: &RawHeader, blocks: &[DiskBlock]) -> io::Result<()> {
    let map_start = FileOffset(u64::from(header.offset_bmap.get()));
    let mut number = 0_u32;
    let mut bytes = Vec::new();
    for run in blocks.chunk_by(|a, b| a.is_before(*b)) {
        for piece in run.chunks(PIECE_ENTRIES) {
            bytes.clear();
            for _ in piece {
                bytes.extend_from_slice(&number.to_le_bytes());
                number += 1;
            }
            let at = map_start.plus(u64::from(piece[0].get()) * ENTRY_BYTES);
            file.write_all_at(&bytes, at)?;
        }
    }
    Ok(())
}

/// The duty to find places, or to let the next one do so: dropped, it is done, after all before it.
#[derive(Debug)]
pub(super) struct Turn<'i> {
    image: &'i NewImage,
    number: u64,
}

impl Turn<'_> {
    /// Finds places for parts of the disk, which lie behind those of all turns before.
    pub(super) fn place(self, parts: &[Range<u64>]) -> Vec<Placed> {
        let mut placed = Vec::new();
        match &self.image.layout {
            Layout::Fixed => {
                let place_of = |block: DiskBlock| file_block(block.index());
                for part in parts {
                    self.image.places(part, place_of, &mut placed);
                }
            }
            Layout::Dynamic { placing, turned } => {
                let mut placing = self.wait(placing, turned);
                let mut place_of = |block| {
                    if placing.blocks.last() != Some(&block) {
                        placing.blocks.push(block);
                    }
                    file_block(placing.blocks.len() - 1)
                };
                for part in parts {
                    self.image.places(part, &mut place_of, &mut placed);
                }
            }
        }
        placed
    }

    /// Waits until the turns before are over.
    fn wait<'p>(&self, placing: &'p Mutex<Placing>, turned: &Condvar) -> MutexGuard<'p, Placing> {
        turned
            .wait_while(lock(placing), |placing| placing.over < self.number)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Layout::Dynamic { placing, turned } = &self.image.layout {
            self.wait(placing, turned).over += 1;
            turned.notify_all();
        }
    }
}

fn file_block(index: usize) -> FileBlock {
    let number = u32::try_from(index).ok().and_then(FileBlock::new);
    number.expect("an image has fewer blocks than there are numbers")
}

/// Why no image could be made.
#[derive(Debug, thiserror::Error)]
pub enum NewImageError {
    /// It could not be created.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The new file could not be opened.
    #[error(transparent)]
    File(#[from] FileError),
}
