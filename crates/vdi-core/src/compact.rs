//! Compaction: blocks whose contents need no storage give it up, holes are filled, the file is cut.
//!
//! A [`CompactPlan`] says what is to be done; [`apply`] does just that. Every step leaves an image
//! that reads the same: an entry changes only where block and entry say the same thing, and blocks
//! move as [`crate::holes`] tells. Like VirtualBox's, it leaves `uuid_modify` alone, so
//! children stay valid.

use std::sync::Arc;

use crate::block_map::BlockMapEntry;
use crate::chores::Modified;
use crate::disk::{Disk, ReadError, Source, WriteError};
use crate::header::ImageKind;
use crate::storage::Access;
use crate::units::{DiskBlock, Span};

/// Blocks that are changed with one write of the map.
const BATCH: usize = 1024;
/// How much is read at a time.
const PIECE_BYTES: usize = 256 << 10;

/// What compaction may give up besides zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Equal {
    /// Blocks of zeros only.
    Zeros,
    /// Also blocks that are the same in the parent, which then shows through.
    ZerosAndParent,
}

/// What compaction would do.
#[derive(Clone, Debug)]
pub struct CompactPlan {
    /// Blocks that hold zeros only; their entries become ZERO.
    pub zeros: Vec<DiskBlock>,
    /// Blocks that hold what the parent has; their entries become FREE.
    pub same_as_parent: Vec<DiskBlock>,
    /// Blocks with storage before.
    pub blocks_before: u32,
    /// What `blocks_allocated` said before.
    pub counted_before: u32,
    /// How many of the others move towards the start of the file.
    pub moves: u32,
    /// The length of the file before.
    pub file_bytes_before: u64,
    /// The length of the file after.
    pub file_bytes_after: u64,
}

impl CompactPlan {
    /// Whether the image is compact already.
    pub const fn is_empty(&self) -> bool {
        self.zeros.is_empty()
            && self.same_as_parent.is_empty()
            && self.file_bytes_before == self.file_bytes_after
            && self.counted_before == self.blocks_before
    }
}

/// How far it is: blocks done, and of how many.
pub type Progress<'p> = &'p mut dyn FnMut(u32, u32);

/// Reads every stored block and says what would be done. Changes nothing.
///
/// # Errors
/// If the image is fixed, has entries that cannot be moved, or cannot be read.
pub fn plan(
    disk: &Disk,
    equal: Equal,
    progress: Progress<'_>,
) -> Result<CompactPlan, CompactError> {
    let top = disk.top();
    if disk.header().kind() == ImageKind::Fixed {
        return Err(CompactError::Fixed);
    }
    let mut owned: Vec<_> = top.map.allocated().collect();
    // By place, so that the file is read from front to back.
    owned.sort_unstable();
    let total = u32::try_from(owned.len()).expect("block numbers have 32 bits");
    let (mut zeros, mut same_as_parent, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    for (done, &(file_block, disk_block)) in (0..).zip(&owned) {
        progress(done, total);
        match compare(disk, disk_block, equal)? {
            Contents::Zeros => zeros.push(disk_block),
            Contents::SameAsParent => same_as_parent.push(disk_block),
            Contents::Own => kept.push(file_block),
        }
    }
    progress(total, total);
    let file_bytes_before = top
        .storage
        .len_bytes()
        .map_err(|source| CompactError::Length { source })?;
    let exact = u32::try_from(kept.len()).expect("block numbers have 32 bits");
    let moves = kept.iter().filter(|block| block.get() >= exact).count();
    zeros.sort_unstable();
    same_as_parent.sort_unstable();
    Ok(CompactPlan {
        zeros,
        same_as_parent,
        blocks_before: total,
        counted_before: disk.header().blocks_allocated(),
        moves: u32::try_from(moves).expect("block numbers have 32 bits"),
        file_bytes_before,
        file_bytes_after: top.area.end_of(exact).0.min(file_bytes_before),
    })
}

/// Does what the plan says, and closes the disk. No request may be at work.
///
/// # Errors
/// If the host fails; the image then reads as before, and compaction can be begun again.
pub fn apply(disk: &Arc<Disk>, plan: &CompactPlan) -> Result<(), CompactError> {
    if disk.access() == Access::ReadOnly {
        return Err(CompactError::Write(WriteError::ReadOnly));
    }
    disk.begin_maintenance(Modified::Places)?;
    let changes = [
        (&plan.zeros, BlockMapEntry::Zero),
        (&plan.same_as_parent, BlockMapEntry::Unallocated),
    ];
    for (blocks, entry) in changes {
        for batch in blocks.chunks(BATCH) {
            disk.replace_entries(batch, entry)?;
            if entry == BlockMapEntry::Unallocated {
                // The blocks are not zeros: none may be punched that a power cut could bring back.
                disk.flush()?;
            }
            disk.do_chores()?;
        }
    }
    disk.close_moving(u64::MAX)?;
    Ok(())
}

enum Contents {
    Zeros,
    SameAsParent,
    Own,
}

/// Whether a stored block could do without its storage.
fn compare(disk: &Disk, block: DiskBlock, equal: Equal) -> Result<Contents, CompactError> {
    let size = disk.header().block_size();
    let start = size.start_of(block);
    let len_bytes = u64::from(size.bytes()).min(disk.capacity().bytes() - start);
    let (mut is_zero, mut is_same) = (true, equal == Equal::ZerosAndParent && disk.has_parent());
    let (mut own, mut parents) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    let mut done = 0;
    while done < len_bytes && (is_zero || is_same) {
        let len = PIECE_BYTES.min(usize::try_from(len_bytes - done).unwrap_or(PIECE_BYTES));
        let span = Span {
            block,
            skip_bytes: done,
            len_bytes: len as u64,
        };
        disk.read_own(span, &mut own[..len])?;
        is_zero &= own[..len].iter().all(|&byte| byte == 0);
        if is_same {
            disk.read_parents(span, &mut parents[..len])?;
            is_same = own[..len] == parents[..len];
        }
        done += len as u64;
    }
    // In a child both may hold; FREE then keeps it a mere difference.
    Ok(match (is_same, is_zero) {
        (true, _) => Contents::SameAsParent,
        (false, true) => Contents::Zeros,
        (false, false) => Contents::Own,
    })
}

impl Disk {
    fn has_parent(&self) -> bool {
        self.headers().len() > 1
    }

    /// Reads from the top image alone, where it has storage.
    pub(crate) fn read_own(&self, span: Span, buf: &mut [u8]) -> Result<(), ReadError> {
        let crate::image::Place::Stored(at) = self.top().locate(span) else {
            buf.fill(0);
            return Ok(());
        };
        self.top()
            .storage
            .read_exact_at(buf, at)
            .map_err(|source| ReadError { at, source })
    }

    /// Reads what the parents have where `span` of the top image is.
    pub(crate) fn read_parents(&self, span: Span, buf: &mut [u8]) -> Result<(), ReadError> {
        let mut rest = buf;
        for extent in self.parents_at(span) {
            let len = usize::try_from(extent.len_bytes).expect("an extent is inside the buffer");
            let (piece, behind) = rest.split_at_mut(len);
            match extent.source {
                Source::Unallocated | Source::Zero { .. } => piece.fill(0),
                Source::Stored { depth, at } => self.read_image(depth + 1, piece, at)?,
            }
            rest = behind;
        }
        Ok(())
    }
}

/// Why an image could not be compacted.
#[derive(Debug, thiserror::Error)]
pub enum CompactError {
    /// Fixed images keep their space.
    #[error("a fixed image keeps all of its space; convert it to a dynamic one first")]
    Fixed,
    /// The host could not tell the length of the file.
    #[error("cannot learn the length of the image's file")]
    Length {
        /// The host's error.
        source: std::io::Error,
    },
    /// A block could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The image could not be changed.
    #[error(transparent)]
    Write(#[from] WriteError),
}
