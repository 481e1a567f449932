//! Making a new image.
//!
//! The layout is VirtualBox's: the long header, the map at 1 MiB, the data at the next
//! MiB behind it, which suits QEMU (multiples of 512) and direct I/O alike.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::posix_fallocate;
use uuid::Uuid;
use zerocopy::{FromZeros, IntoBytes};

use crate::format::{self, ENTRY_BYTES, ENTRY_FREE, RawHeader};
use crate::header::{Header, ParentLink};
use crate::units::{BlockSize, DataArea, SECTOR_SIZE};

/// Where map and data begin is a multiple of this.
const ALIGNMENT: u64 = 1 << 20;
/// The block size that every program knows.
pub const DEFAULT_BLOCK_SIZE: u32 = 1 << 20;
/// For the eye only; every program writes its own.
const TEXT: &[u8] = b"<<< vdi-vhost VirtualBox Disk Image >>>\n";

/// Whether a new image reserves its space at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewKind {
    /// Blocks get storage when they are first written.
    Dynamic,
    /// All blocks have storage, and the host has reserved its space.
    Fixed,
    /// A child: what it does not have shows through from this parent.
    Differencing(ParentLink),
}

/// What a new image shall be.
#[derive(Clone, Copy, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes: a multiple of 512 above 0.
    pub capacity_bytes: u64,
    /// Bytes in a block: a power of two from 128 KiB to 128 MiB. QEMU reads 1 MiB only.
    pub block_size: u32,
    /// Dynamic or fixed.
    pub kind: NewKind,
    /// `uuid_image`; random if not given.
    pub uuid: Option<Uuid>,
}

/// Makes an image that reads as zeros in a new file at `path`, and syncs it.
///
/// # Errors
/// If the options break a limit, `path` exists, or the host fails; then no file is left.
pub fn create(path: &Path, options: &CreateOptions) -> Result<(), CreateError> {
    write_new(path, &new_header(options)?, options.kind)
}

/// Makes the image that a new header describes.
pub(crate) fn write_new(path: &Path, header: &RawHeader, kind: NewKind) -> Result<(), CreateError> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    write_image(&file, header, kind).inspect_err(|_| {
        // The first error is the one to report.
        let _ = std::fs::remove_file(path);
    })
}

/// Makes an image that reads as zeros in an empty file, and syncs it.
///
/// # Errors
/// If the options break a limit or the host fails.
pub fn create_in(file: &File, options: &CreateOptions) -> Result<(), CreateError> {
    write_image(file, &new_header(options)?, options.kind)
}

/// Makes a child of `parent` in a new file at `path`, and syncs it. It has the parent's size and
/// geometry, and nothing of its own: all of the parent shows through.
///
/// # Errors
/// As [`create`]; and if the parent has no UUID by which the child could name it.
pub fn create_child(
    path: &Path,
    parent: &Header,
    block_size: u32,
    uuid: Option<Uuid>,
) -> Result<(), CreateError> {
    if parent.uuid_image().is_nil() {
        return Err(CreateError::NamelessParent);
    }
    let kind = NewKind::Differencing(parent.as_parent());
    let mut header = new_header(&CreateOptions {
        capacity_bytes: parent.capacity().bytes(),
        block_size,
        kind,
        uuid,
    })?;
    if parent.raw().has_lchs() {
        header.lchs_geometry = parent.raw().lchs_geometry;
    }
    write_new(path, &header, kind)
}

/// The header of a new image.
pub(crate) fn new_header(options: &CreateOptions) -> Result<RawHeader, CreateError> {
    let CreateOptions {
        capacity_bytes,
        block_size,
        kind,
        uuid,
    } = *options;
    if capacity_bytes == 0 || capacity_bytes % SECTOR_SIZE != 0 {
        return Err(CreateError::Capacity { capacity_bytes });
    }
    let size = BlockSize::new(block_size).ok_or(CreateError::BlockSize { block_size })?;
    let too_large = || CreateError::TooLarge {
        capacity_bytes,
        most: most_capacity_bytes(size),
        block_size,
    };
    let blocks = u32::try_from(size.blocks_for(capacity_bytes)).map_err(|_| too_large())?;
    let offset_data = (ALIGNMENT + u64::from(blocks) * ENTRY_BYTES).next_multiple_of(ALIGNMENT);
    let offset_data = u32::try_from(offset_data).map_err(|_| too_large())?;

    let mut raw = RawHeader::new_zeroed();
    raw.text[..TEXT.len()].copy_from_slice(TEXT);
    raw.signature = format::SIGNATURE.into();
    raw.version = format::VERSION_1_1.into();
    raw.header_size = format::HEADER_SIZE_LONG.into();
    raw.offset_bmap = (1 << 20).into();
    raw.offset_data = offset_data.into();
    raw.legacy_sector_size = 512.into();
    raw.lchs_sector_size = 512.into();
    raw.disk_size = capacity_bytes.into();
    raw.block_size = block_size.into();
    raw.blocks_in_image = blocks.into();
    let (image_type, blocks_allocated) = match kind {
        NewKind::Dynamic => (format::TYPE_DYNAMIC, 0),
        NewKind::Fixed => (format::TYPE_FIXED, blocks),
        NewKind::Differencing(link) => {
            raw.uuid_parent = link.uuid_image.into();
            raw.uuid_parent_modify = link.uuid_modify.into();
            (format::TYPE_DIFFERENCING, 0)
        }
    };
    raw.image_type = image_type.into();
    raw.blocks_allocated = blocks_allocated.into();
    raw.uuid_image = uuid.unwrap_or_else(Uuid::new_v4).into();
    raw.uuid_modify = Uuid::new_v4().into();
    Ok(raw)
}

/// The largest disk whose map ends at an `offset_data` of 32 bits.
fn most_capacity_bytes(size: BlockSize) -> u64 {
    let most_offset_data = u64::from(u32::MAX) / ALIGNMENT * ALIGNMENT;
    (most_offset_data - ALIGNMENT) / ENTRY_BYTES * u64::from(size.bytes())
}

fn write_image(file: &File, raw: &RawHeader, kind: NewKind) -> Result<(), CreateError> {
    let size = BlockSize::new(raw.block_size.get()).expect("new_header checked it");
    let area = DataArea::new(raw.offset_data.get(), 0, size);
    let blocks = raw.blocks_in_image.get();
    match kind {
        NewKind::Dynamic | NewKind::Differencing(_) => file.set_len(area.start().0)?,
        NewKind::Fixed => {
            let len = i64::try_from(area.end_of(blocks).0)
                .map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
            posix_fallocate(file, 0, len).map_err(io::Error::from)?;
        }
    }
    write_map(file, u64::from(raw.offset_bmap.get()), blocks, kind)?;
    // The header last: before it the file is no VDI.
    file.write_all_at(raw.as_bytes(), 0)?;
    file.sync_all()?;
    Ok(())
}

fn write_map(file: &File, start: u64, blocks: u32, kind: NewKind) -> io::Result<()> {
    const PIECE: u32 = 256 << 10;
    let mut bytes = Vec::new();
    for first in (0..blocks).step_by(PIECE as usize) {
        bytes.clear();
        for block in first..blocks.min(first.saturating_add(PIECE)) {
            let entry = match kind {
                NewKind::Dynamic | NewKind::Differencing(_) => ENTRY_FREE,
                NewKind::Fixed => block,
            };
            bytes.extend_from_slice(&entry.to_le_bytes());
        }
        file.write_all_at(&bytes, start + u64::from(first) * ENTRY_BYTES)?;
    }
    Ok(())
}

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum CreateError {
    #[error("the size is {capacity_bytes} bytes, but must be a multiple of 512 above 0")]
    Capacity { capacity_bytes: u64 },
    #[error("the block size is {block_size}, but must be a power of two from 128 KiB to 128 MiB")]
    BlockSize { block_size: u32 },
    #[error(
        "the size is {capacity_bytes} bytes, but with blocks of {block_size} bytes an image ends at {most}; \
         choose larger blocks"
    )]
    TooLarge {
        capacity_bytes: u64,
        most: u64,
        block_size: u32,
    },
    #[error("the parent's uuid_image is null, so that no child can name it")]
    NamelessParent,
    #[error("cannot write the image")]
    Io(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(capacity_bytes: u64, block_size: u32) -> CreateOptions {
        CreateOptions {
            capacity_bytes,
            block_size,
            kind: NewKind::Dynamic,
            uuid: None,
        }
    }

    #[test]
    fn the_largest_disk_can_be_described_and_one_sector_more_cannot() {
        for block_size in [128 << 10, 1 << 20, 128 << 20] {
            let most = most_capacity_bytes(BlockSize::new(block_size).unwrap());
            let raw = new_header(&options(most, block_size)).unwrap();
            assert!(raw.map_end() <= u64::from(raw.offset_data.get()));
            let refused = new_header(&options(most + 512, block_size));
            assert!(matches!(refused, Err(CreateError::TooLarge { most: m, .. }) if m == most));
        }
    }

    #[test]
    fn a_size_that_is_no_whole_sector_is_refused() {
        for bytes in [0, 1, 511, 513] {
            assert!(matches!(
                new_header(&options(bytes, 1 << 20)),
                Err(CreateError::Capacity { .. })
            ));
        }
    }

    #[test]
    fn create_leaves_an_existing_file_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"mine").unwrap();
        assert!(matches!(
            create(file.path(), &options(512, 1 << 20)),
            Err(CreateError::Io(_))
        ));
        assert_eq!(std::fs::read(file.path()).unwrap(), b"mine");
    }
}
