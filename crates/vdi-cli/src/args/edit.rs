//! The words of the verbs that change an image or continue one.

use std::path::PathBuf;

use clap::Args;
use uuid::Uuid;

use super::{ChainArgs, VdiArgs, block_size, uuid_not_null};
use crate::size;

/// Make a child of an image: an empty one through which all of it shows
///
/// It takes no time and no space. From now on write to the child only: a change of the base would change what
/// the child reads as, so it is noticed and the child is not opened any more. (QEMU's writes are not noticed: it
/// leaves no mark.)
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi snapshot disk.vdi today.vdi
  vdi-vhost --socket-path /tmp/disk.sock --blk-file today.vdi    the guest goes on there

The base is found again by its UUID among the images beside the child; see --parent and --image-dir
of the other verbs if it is elsewhere.

The first write to a block copies the rest of the block from the parents: 1 MiB at most with the
default, 128 KiB with --block-size 128k. Small blocks cost map: for each 4 bytes in the file and in
the memory of whoever has the image open, so 4 MiB for a TiB of disk in blocks of 1M, 32 MiB in blocks
of 128k. Images of one chain may have different blocks.")]
pub(crate) struct SnapshotArgs {
    /// The image to stay as it is
    pub(crate) base: PathBuf,
    /// The file to make
    pub(crate) child: PathBuf,
    /// UUID of the child [default: a random one]
    #[arg(long, value_name = "UUID", value_parser = uuid_not_null)]
    pub(crate) uuid: Option<Uuid>,
    /// Unit of allocation of the child, a power of two from 128k to 128M [default: 1M]
    #[arg(long, value_name = "SIZE", value_parser = block_size)]
    pub(crate) block_size: Option<u32>,
}

/// Give back the space of blocks that need none, and close the holes in the file
///
/// Blocks of zeros are released, the others move together, the file is cut. The contents stay, and so do children.
/// A crash or a signal at any time leaves an image that reads the same; begin again then.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi compact --dry-run disk.vdi         how much would it save?
  vdi compact --same-as-parent child.vdi

A guest's deleted files are zeros only if it discarded them (fstrim) or wrote zeros over them.")]
pub(crate) struct CompactArgs {
    /// The image
    pub(crate) file: PathBuf,
    /// Only say what would be done
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Release blocks of a child, too, that are the same as in its parent
    #[arg(long)]
    pub(crate) same_as_parent: bool,
    /// Show no progress and no plan
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
}

/// Make the disk of an image larger or smaller
///
/// What is added reads as zeros. The image is changed in place; a crash or a signal at any time leaves it with the
/// old or the new size. The guest's partitions and file systems are its own business: shrink them before,
/// grow them afterwards.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi resize disk.vdi 40G
  vdi resize disk.vdi +10G
  vdi resize --shrink disk.vdi -10G

Sizes take a unit as in `vdi create` and are rounded up to whole sectors of 512 bytes.")]
pub(crate) struct ResizeArgs {
    /// The image
    pub(crate) file: PathBuf,
    /// The new size, or what to add (+) or take away (-)
    #[arg(value_name = "[+|-]SIZE", value_parser = new_size, allow_hyphen_values = true)]
    pub(crate) size: NewSize,
    /// Let the disk get smaller
    #[arg(long)]
    pub(crate) shrink: bool,
    /// Let data that are not zeros be cut off
    #[arg(long)]
    pub(crate) force: bool,
    /// Only say what would be done
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Say nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    format: VdiArgs,
    /// Have the daemon do it that serves the image, while its guest runs: the daemon's --control-socket. It can only grow
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["shrink", "force", "dry_run"])]
    pub(crate) online: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
}

/// Set what the header says of an image besides its contents
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("field").required(true).multiple(true), after_help = "\
Examples:
  vdi set --comment 'before the upgrade' disk.vdi
  vdi set --lchs 1024/255/63 disk.vdi

A child finds its parent by the parent's UUID, and takes another modify UUID for a change of the parent.
To let a copy of a disk be another image, give it another UUID.")]
pub(crate) struct SetArgs {
    /// The image
    pub(crate) file: PathBuf,
    /// Comment, of at most 255 bytes
    #[arg(long, value_name = "TEXT", group = "field")]
    pub(crate) comment: Option<String>,
    /// UUID of the image
    #[arg(long, value_name = "UUID", value_parser = uuid_not_null, group = "field")]
    pub(crate) uuid_image: Option<Uuid>,
    /// UUID of the state of its contents
    #[arg(long, value_name = "UUID", value_parser = uuid_not_null, group = "field")]
    pub(crate) uuid_modify: Option<Uuid>,
    /// Geometry for a BIOS: cylinders, heads and sectors; 0/0/0 for none
    #[arg(long, value_name = "C/H/S", value_parser = lchs, group = "field")]
    pub(crate) lchs: Option<[u32; 3]>,
}

fn lchs(text: &str) -> Result<[u32; 3], String> {
    let numbers: Result<Vec<u32>, _> = text.split('/').map(str::parse).collect();
    numbers
        .ok()
        .and_then(|numbers| numbers.try_into().ok())
        .ok_or_else(|| "a geometry is three numbers, such as 1024/255/63".to_owned())
}

/// A size, or its difference to the one there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NewSize {
    Is(u64),
    Larger(u64),
    Smaller(u64),
}

impl NewSize {
    /// The size in bytes, in whole sectors, if there is such a one.
    pub(crate) fn from(self, bytes: u64) -> Option<u64> {
        let size = match self {
            Self::Is(size) => Some(size),
            Self::Larger(more) => bytes.checked_add(more),
            Self::Smaller(less) => bytes.checked_sub(less),
        };
        size?.checked_next_multiple_of(vdi_core::SECTOR_SIZE)
    }
}

pub(super) fn new_size(text: &str) -> Result<NewSize, String> {
    let parse = |text| size::parse(text).map_err(|error| error.to_string());
    match text.as_bytes().first() {
        Some(b'+') => parse(&text[1..]).map(NewSize::Larger),
        Some(b'-') => parse(&text[1..]).map(NewSize::Smaller),
        Some(_) | None => parse(text).map(NewSize::Is),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_size_is_absolute_or_relative_and_never_wraps() {
        assert_eq!(new_size("1k"), Ok(NewSize::Is(1024)));
        assert_eq!(new_size("+1k").unwrap().from(512), Some(1536));
        assert_eq!(new_size("-1k").unwrap().from(1536), Some(512));
        assert_eq!(new_size("-1").unwrap().from(1024), Some(1024));
        assert_eq!(new_size("-1k").unwrap().from(512), None);
        assert_eq!(NewSize::Larger(u64::MAX).from(512), None);
        assert_eq!(NewSize::Is(u64::MAX).from(512), None);
        for text in ["", "+", "--1k", "+-1k"] {
            assert!(new_size(text).is_err(), "{text}");
        }
    }
}
