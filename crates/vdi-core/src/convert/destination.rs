//! What is written: a raw disk or a new image, by several threads.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::convert::new_image::{NewImage, Placed, Turn};
use crate::convert::raw::RawDisk;
use crate::units::{Capacity, FileOffset};

/// What a disk is copied to.
#[derive(Debug)]
pub enum Destination {
    /// A raw disk, new or old.
    Raw(RawDisk),
    /// A new image.
    Image(NewImage),
}

impl Destination {
    /// The size of the disk.
    pub fn capacity(&self) -> Capacity {
        match self {
            Self::Raw(raw) => raw.capacity(),
            Self::Image(image) => image.capacity(),
        }
    }

    pub(super) fn file(&self) -> &File {
        match self {
            Self::Raw(raw) => raw.file(),
            Self::Image(image) => image.file().file(),
        }
    }

    /// Whether it reads zeros where nothing was written (V1).
    pub(super) const fn reads_zeros(&self) -> bool {
        match self {
            Self::Raw(raw) => raw.is_new(),
            Self::Image(_) => true,
        }
    }

    /// Whether what it takes may belong to others too. A fixed image has the space reserved that it will
    /// ever need; a shared block would need more when it is written.
    pub(super) const fn may_share(&self) -> bool {
        match self {
            Self::Raw(raw) => raw.is_new(),
            Self::Image(image) => !image.is_fixed(),
        }
    }

    /// A turn to find places, where they depend on what was placed before.
    pub(super) fn turn(&self) -> Option<Turn<'_>> {
        match self {
            Self::Raw(_) => None,
            Self::Image(image) => Some(image.turn()),
        }
    }

    pub(super) fn write(&self, buf: &[u8], at: FileOffset) -> io::Result<()> {
        self.file().write_all_at(buf, at.0)
    }

    /// Makes it all visible and durable (V3).
    pub(super) fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Raw(raw) => raw.file().sync_all(),
            Self::Image(image) => image.finish(),
        }
    }
}

/// Finds places for parts of the disk; of a raw disk they are where the parts are.
pub(super) fn place(turn: Option<Turn<'_>>, parts: Vec<Range<u64>>) -> Vec<Placed> {
    match turn {
        Some(turn) => turn.place(&parts),
        None => parts
            .into_iter()
            .map(|disk| Placed {
                at: FileOffset(disk.start),
                disk,
            })
            .collect(),
    }
}
