//! What can be wrong with an image, and what to do about it.
//!
//! A [`Finding`] is a fact with its values; what all findings of a kind have in
//! common (a stable name, a severity, an advice) is in one table here.

use std::fmt;
use std::path::PathBuf;

use uuid::Uuid;

use crate::header::{HeaderError, Warning};
use crate::units::SECTOR_SIZE;

/// How bad a finding is, the harmless first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Harmless, but worth knowing.
    Note,
    /// Space in the file that nothing uses.
    Leak,
    /// Data are lost, in danger or out of reach, or other programs refuse the image.
    Corruption,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Note => "note",
            Self::Leak => "leak",
            Self::Corruption => "corruption",
        })
    }
}

/// One thing that is wrong. Its text has the value found and the limit; [`Finding::advice`]
/// says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum Finding {
    #[error("the file has {len_bytes} bytes, less than the {least} of the shortest header")]
    HeaderTruncated { len_bytes: u64, least: u32 },
    #[error(transparent)]
    Header(HeaderError),
    #[error("{0}")]
    Flaw(Warning),
    #[error(
        "the map has {blocks_in_image} entries and ends at {map_end}, but the file ends at {len_bytes}; \
         {missing} entries are missing"
    )]
    MapTruncated {
        blocks_in_image: u32,
        map_end: u64,
        len_bytes: u64,
        missing: u64,
    },
    #[error(
        "disk block {block} is kept in file block {file_block}, \
         but an image of {blocks_in_image} blocks (blocks_in_image) has only lower numbers"
    )]
    EntryOutOfRange {
        block: u32,
        file_block: u32,
        blocks_in_image: u32,
    },
    #[error(
        "the image is full, and {count} of its blocks are behind the last number of {blocks_in_image} (blocks_in_image), the \
         first of them disk block {block} in file block {file_block}: a resize was stopped"
    )]
    BlocksAway {
        count: u64,
        block: u32,
        file_block: u32,
        blocks_in_image: u32,
    },
    #[error(
        "disk block {block} is kept in file block {file_block}, which ends at byte {block_end}, \
         but the file ends at {len_bytes}"
    )]
    BlockBehindEnd {
        block: u32,
        file_block: u32,
        block_end: u64,
        len_bytes: u64,
    },
    #[error("disk blocks {first} and {second} are both kept in file block {file_block}")]
    SharedBlock {
        first: u32,
        second: u32,
        file_block: u32,
    },
    #[error(
        "blocks_allocated is {blocks_allocated}, but the map uses file blocks up to {highest}, \
         so it must be at least {}", highest + 1
    )]
    CountTooSmall { blocks_allocated: u32, highest: u32 },
    #[error(
        "{count} of the {blocks_allocated} file blocks of blocks_allocated are in no map entry"
    )]
    LeakedBlocks { count: u64, blocks_allocated: u32 },
    #[error("{count} bytes follow the last file block, which ends at {data_end}")]
    TrailingBytes { count: u64, data_end: u64 },
    #[error(
        "blocks_allocated is {blocks_allocated}, but the file ends at {len_bytes}, \
         in or before file block {covered}"
    )]
    CountBehindEnd {
        blocks_allocated: u32,
        len_bytes: u64,
        covered: u32,
    },
    #[error("the legacy sector size is {found}, not 512")]
    LegacySectorSize { found: u32 },
    #[error("disk_size is {disk_size}, no multiple of 512; the disk has {} bytes", disk_size - disk_size % SECTOR_SIZE)]
    OddDiskSize { disk_size: u64 },
    #[error("the parent {parent} of {} was not found", child.display())]
    ParentMissing { child: PathBuf, parent: Uuid },
    #[error("both {} and {} are the parent {parent} by their UUID", first.display(), second.display())]
    ParentAmbiguous {
        parent: Uuid,
        first: PathBuf,
        second: PathBuf,
    },
    #[error(
        "{} was given as a parent, but is the image {found}, which is no parent of this one",
        path.display()
    )]
    WrongParent { path: PathBuf, found: Uuid },
    #[error(
        "the parent {} was modified after its child {} was made: its uuid_modify is {found}, the child knows {known}",
        parent.display(),
        child.display()
    )]
    ParentModified {
        child: PathBuf,
        parent: PathBuf,
        known: Uuid,
        found: Uuid,
    },
    #[error("{} has the parent {parent}, which is its own descendant", child.display())]
    ParentLoop { child: PathBuf, parent: Uuid },
    #[error("the chain has more than {most} images")]
    ChainTooLong { most: usize },
}

/// What all findings of a kind have in common.
struct About {
    kind: &'static str,
    severity: Severity,
    advice: &'static str,
}

impl Finding {
    /// The stable name of the kind of finding.
    pub fn kind(&self) -> &'static str {
        self.about().kind
    }

    /// How bad it is.
    pub fn severity(&self) -> Severity {
        self.about().severity
    }

    /// What it means and what to do.
    pub fn advice(&self) -> &'static str {
        self.about().advice
    }

    fn about(&self) -> About {
        use Severity::{Corruption, Leak, Note};
        let (kind, severity, advice) = match self {
            Self::HeaderTruncated { .. } => ("header-truncated", Corruption, RESTORE),
            Self::Header(error) => about_header(error),
            Self::Flaw(Warning::CountTooLarge { .. }) => ("count-too-large", Corruption, REPAIR),
            Self::Flaw(Warning::NullUuid { .. }) => ("null-uuid", Corruption, REPAIR),
            Self::Flaw(Warning::MapInHeader { .. }) => ("map-in-header", Corruption, CONVERT),
            Self::MapTruncated { .. } => ("map-truncated", Corruption, RESTORE),
            Self::EntryOutOfRange { .. } => ("entry-out-of-range", Corruption, DO_NOT_WRITE),
            Self::BlocksAway { .. } => ("blocks-away", Leak, RESIZE_AGAIN),
            Self::BlockBehindEnd { .. } => ("block-behind-end", Corruption, CUT_OFF),
            Self::SharedBlock { .. } => ("shared-block", Corruption, DO_NOT_WRITE),
            Self::CountTooSmall { .. } => ("count-too-small", Corruption, COUNT),
            Self::LeakedBlocks { .. } => ("leaked-blocks", Leak, UNUSED),
            Self::TrailingBytes { .. } => ("trailing-bytes", Leak, UNUSED),
            Self::CountBehindEnd { .. } => (
                "count-behind-end",
                Note,
                "harmless: no block of the disk is kept there",
            ),
            Self::LegacySectorSize { .. } => (
                "legacy-sector-size",
                Note,
                "QEMU refuses the image, VirtualBox does not mind; `vdi repair` mends it",
            ),
            Self::OddDiskSize { .. } => (
                "odd-disk-size",
                Note,
                "harmless: the partial last sector is not shown",
            ),
            Self::ParentMissing { .. } => ("parent-missing", Note, NAME_PARENT),
            Self::ParentAmbiguous { .. } => ("parent-ambiguous", Note, NAME_PARENT),
            Self::WrongParent { .. } => ("wrong-parent", Corruption, NAME_PARENT),
            Self::ParentModified { .. } => ("parent-modified", Corruption, MODIFIED),
            Self::ParentLoop { .. } => ("parent-loop", Corruption, RESTORE),
            Self::ChainTooLong { .. } => (
                "chain-too-long",
                Corruption,
                "the disk cannot be opened; merge some of its images",
            ),
        };
        About {
            kind,
            severity,
            advice,
        }
    }
}

const RESTORE: &str = "restore the image from a backup";
const REPAIR: &str =
    "VirtualBox refuses the image; its contents are intact, and `vdi repair` mends it";
const CONVERT: &str = "do not write to the image: VirtualBox overwrites the first entries of the map; \
                       its contents are intact, and `vdi convert` makes a sound image of them";
const CUT_OFF: &str =
    "restore the image from a backup; if there is none, `vdi repair` keeps what is left";
const DO_NOT_WRITE: &str = "do not write to the image: a write may hit another block's data; `vdi repair` gives each block its own copy";
const RESIZE_AGAIN: &str = "the contents are intact, here, in VirtualBox and in QEMU; resize the image again or run `vdi repair \
                            --apply`, but not VirtualBox's repair: it throws such blocks away";
const NAME_PARENT: &str = "the image itself was checked all the same; to read it, name the right parent with --parent \
                           or its directory with --image-dir";
const MODIFIED: &str = "the child's contents are unreliable: restore the parent from a backup; \
                        --allow-modified-parent reads it as it is";
const COUNT: &str = "do not write to the image with VirtualBox or QEMU: they overwrite blocks in use; \
                     `vdi repair` mends it";
const UNUSED: &str = "harmless: only space is lost; `vdi repair` gives it back";

fn about_header(error: &HeaderError) -> (&'static str, Severity, &'static str) {
    let kind = match error {
        HeaderError::Signature { .. } => "signature",
        HeaderError::Version { .. } => "version",
        HeaderError::HeaderSize { .. } => "header-size",
        HeaderError::MapOffset { .. } => "map-offset",
        HeaderError::DataOffset { .. } => "data-offset",
        HeaderError::ImageType { .. } => "image-type",
        HeaderError::ImageFlags { .. } => "image-flags",
        HeaderError::LchsSectorSize { .. } => "lchs-sector-size",
        HeaderError::FixedChild { .. } => "fixed-with-parent",
        HeaderError::NoParentNamed => "no-parent",
        HeaderError::DiskSizeZero => "disk-size-zero",
        HeaderError::BlockSize { .. } => "block-size",
        HeaderError::BlockExtra { .. } => "block-extra",
        HeaderError::TooFewBlocks { .. } => "too-few-blocks",
        HeaderError::Flaw { .. } => "flaw",
    };
    (kind, Severity::Corruption, RESTORE)
}
