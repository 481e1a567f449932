//! Growing and shrinking an image in place.
//!
//! The map's place and length, where the data begin, the size and both counts lie in the
//! header's first 512 bytes, so one write of a sector switches all of them. Before it everything
//! is written where the old header sees nothing ([`grow`] has the pictures).
//!
//! VirtualBox destroys images here in three ways (it moves too few blocks when there are few, assumes that block 0
//! has an owner and that the file ends with the last block). None can happen: blocks are first
//! closed up to the front with [`crate::holes`], those in the way move by their owners, and the file is cut
//! and lengthened to what the numbers say.
//!
//! Like VirtualBox's, a resize scales the cylinders of the LCHS geometry if it is set
//! (`VD.cpp`, `VDResize`), and leaves `uuid_modify` alone unless contents are lost.
//!
//! In version 0 the data follow the map at once, so `blocks_in_image` stays what it is: such an image can
//! shrink, and grow as far as its map reaches.

mod grow;
mod layout;
mod shrink;

use std::io;
use std::sync::Arc;

use crate::disk::{Disk, ReadError, WriteError};
use crate::format::RawHeader;
use crate::image::OpenError;
use crate::storage::Access;
use crate::units::{Capacity, DiskBlock, SECTOR_SIZE};

/// Blocks whose entries are written in one go.
const BATCH: usize = 1024;

/// What a resize would do.
#[derive(Clone, Debug)]
pub struct ResizePlan {
    /// The size before.
    pub from: Capacity,
    /// The size after.
    pub to: Capacity,
    /// How it is done.
    pub step: ResizeStep,
}

/// How a size changes.
#[derive(Clone, Debug)]
pub enum ResizeStep {
    /// It is the size that the disk has.
    Nothing,
    /// The disk gets larger.
    Grow {
        /// Blocks at the front of the data that make way for the map.
        vacated: u32,
        /// Blocks without storage that get some, so that the image is full while others are away (B1).
        filled: u32,
    },
    /// The disk gets smaller.
    Shrink {
        /// Blocks with storage behind the new end.
        cut: Vec<DiskBlock>,
        /// Bytes behind the new end, counted in sectors, that are not all zeros.
        lost_bytes: u64,
    },
}

/// Says what a resize would do. Changes nothing.
///
/// # Errors
/// If the size is not possible, or what would be cut cannot be read.
pub fn plan(disk: &Disk, to: Capacity) -> Result<ResizePlan, ResizeError> {
    let from = disk.capacity();
    if to.sectors() == 0 {
        return Err(ResizeError::Empty);
    }
    if disk.hidden_end() > 0 {
        return Err(ResizeError::HiddenBlocks);
    }
    let step = match to.cmp(&from) {
        std::cmp::Ordering::Equal => ResizeStep::Nothing,
        std::cmp::Ordering::Greater => grow::plan(disk, to)?,
        std::cmp::Ordering::Less => shrink::plan(disk, to)?,
    };
    Ok(ResizePlan { from, to, step })
}

/// Does what the plan says and closes the disk. No request may be at work.
///
/// # Errors
/// If the host fails. The image then has the old size and reads as before, or has the new one.
pub fn apply(disk: &Arc<Disk>, plan: &ResizePlan) -> Result<(), ResizeError> {
    if disk.access() == Access::ReadOnly {
        return Err(ResizeError::Write(WriteError::ReadOnly));
    }
    match &plan.step {
        ResizeStep::Nothing => Ok(disk.close()?),
        ResizeStep::Grow { .. } => grow::grow(disk, plan.to),
        ResizeStep::Shrink { cut, lost_bytes } => shrink::shrink(disk, plan.to, cut, *lost_bytes),
    }
}

impl Disk {
    /// The one write that counts: what the header is to say from now on. Then the file is cut to it.
    fn switch_header(&self, change: impl FnOnce(&mut RawHeader)) -> io::Result<()> {
        let storage = &*self.top().storage;
        storage.sync()?;
        let mut raw = RawHeader::read(storage)?;
        let before = raw.disk_size;
        change(&mut raw);
        if raw.disk_size != before {
            scale_geometry(&mut raw);
        }
        raw.write(storage)?;
        storage.sync()?;
        let stride = self.data_area().stride_bytes();
        let blocks = u64::from(raw.blocks_allocated.get());
        let end = u64::from(raw.offset_data.get()) + blocks * stride;
        if storage.len_bytes()? > end {
            storage.set_len(end)?;
            storage.sync()?;
        }
        Ok(())
    }
}

/// As VirtualBox does it: heads and sectors stay, and cylinders are what fits. A geometry with a zero in it
/// is not set.
fn scale_geometry(raw: &mut RawHeader) {
    let geometry = raw.lchs_geometry.map(u64::from);
    if !raw.can_keep_lchs() || geometry.contains(&0) {
        return;
    }
    let [_, heads, sectors] = geometry;
    let fit = raw.disk_size.get() / SECTOR_SIZE / heads / sectors;
    raw.lchs_geometry[0] = u32::try_from(fit).unwrap_or(u32::MAX).into();
}

/// Why an image could not be resized.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum ResizeError {
    #[error(
        "an image of version 0 keeps its data right behind its map, so it cannot grow beyond \
         {most} bytes, which its map of {blocks_in_image} entries reaches; convert it first"
    )]
    Version0 { most: u64, blocks_in_image: u32 },
    #[error(
        "disk_size {disk_size} is no multiple of 512, and its map must move while every block of the disk has storage, \
         but its last bytes are in a block that has none; convert it"
    )]
    OddSize { disk_size: u64 },
    #[error("a disk has at least one sector")]
    Empty,
    #[error("the map has entries with data beyond the end of the disk; run `vdi check`")]
    HiddenBlocks,
    #[error(
        "{to} bytes need a map that does not fit before data blocks of {block_size} bytes; \
         convert it to an image with larger blocks"
    )]
    TooLarge { to: u64, block_size: u32 },
    #[error("cannot open the image again after its map was moved; its size is as before")]
    Reopen { source: OpenError },
    #[error("cannot change the image's file")]
    Io { source: io::Error },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
}
