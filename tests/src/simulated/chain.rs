//! Chains of images of every shape: a child, its parent, its parent's parent.
//!
//! What a chain reads as is computed here from `vdi-format.md` alone: where an image says FREE, its
//! parent counts, and beyond a parent's end are zeros.

use std::sync::Arc;

use vdi_core::{Access, Disk, ModifiedParent, OpenError, Storage};

use super::contents::Contents;
use super::layout::{FREE, Layout};
use super::{SimulatedFile, index};
use crate::random::Random;

/// Images, the top one first.
#[derive(Clone, Debug)]
pub struct Chain {
    /// What they shall be.
    pub layouts: Vec<Layout>,
}

/// The files of a chain.
#[derive(Debug)]
pub struct Built {
    /// The top image's contents.
    pub top: Contents,
    /// The files of the others, nearest first.
    pub parents: Vec<Arc<SimulatedFile>>,
    /// What the disk reads as.
    pub disk: Vec<u8>,
}

impl Chain {
    /// One image without parents.
    #[must_use]
    pub fn alone(layout: Layout) -> Self {
        let layouts = vec![layout];
        Self { layouts }
    }

    /// Up to four images of any shape, block size and disk size.
    #[must_use]
    pub fn any(block_sizes: &[u32], random: &mut Random) -> Self {
        let count = *random.pick(&[1, 2, 2, 3, 4]);
        let mut layouts: Vec<Layout> = (0..count)
            .map(|_| Layout::any(block_sizes, random))
            .collect();
        for (layout, uuid) in layouts.iter_mut().zip(1..) {
            layout.uuid = uuid;
            if u64::from(uuid) < count {
                layout.image_type = 4;
                layout.parent = Some(uuid + 1);
            }
        }
        Self { layouts }
    }

    /// The top image.
    #[must_use]
    pub fn top(&self) -> &Layout {
        &self.layouts[0]
    }

    /// Makes the files.
    #[must_use]
    pub fn build(&self, random: &mut Random) -> Built {
        let mut built = self.layouts.iter().map(|layout| layout.build(random));
        let (top, top_disk) = built.next().expect("a chain has an image");
        let (parents, disks): (Vec<Contents>, Vec<Vec<u8>>) = built.unzip();
        let disks = std::iter::once(top_disk).chain(disks);
        let pairs: Vec<_> = self.layouts.iter().zip(disks).collect();
        let disk = pairs
            .into_iter()
            .rev()
            .fold(Vec::new(), |below, (layout, own)| {
                show_through(layout, own, &below)
            });
        let parents = parents.into_iter().map(SimulatedFile::new).collect();
        Built { top, parents, disk }
    }
}

/// What an image reads as over what its parent reads as.
fn show_through(layout: &Layout, mut own: Vec<u8>, parent: &[u8]) -> Vec<u8> {
    let size = layout.block_size as usize;
    let blocks = own.chunks_mut(size).zip(&layout.entries);
    for (nth, (bytes, &entry)) in blocks.enumerate() {
        let start = (nth * size).min(parent.len());
        let end = (start + bytes.len()).min(parent.len());
        if entry == FREE {
            bytes[..end - start].copy_from_slice(&parent[start..end]);
        }
    }
    own
}

/// Opens the disk of a chain.
///
/// # Errors
/// If the core refuses it.
pub fn open_chain(
    top: &Arc<SimulatedFile>,
    parents: &[Arc<SimulatedFile>],
) -> Result<Disk, OpenError> {
    let files = std::iter::once(top).chain(parents);
    let storages = files.map(|file| Arc::clone(file) as Arc<dyn Storage>);
    Disk::open_chain(storages.collect(), Access::Writable, ModifiedParent::Refuse)
}

/// Reads all of a disk.
///
/// # Panics
/// If it cannot be read.
#[must_use]
pub fn contents(disk: &Disk) -> Vec<u8> {
    let whole = disk.capacity().whole();
    let mut found = vec![1; index(whole.len_bytes())];
    disk.read_at(whole, &mut found)
        .expect("nothing was made to fail");
    found
}
