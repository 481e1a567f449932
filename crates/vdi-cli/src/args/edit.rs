//! The words of the verbs that change an image or continue one.

use std::path::PathBuf;

use clap::Args;
use uuid::Uuid;

use super::{block_size, uuid_not_null};

/// Make a child of an image: an empty one through which all of it shows
///
/// It takes no time and no space. From now on write to the child only: a change of the base would change what
/// the child reads as, so it is noticed and the child is not opened any more.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi snapshot disk.vdi today.vdi
  vdi-vhost --socket-path /tmp/disk.sock --blk-file today.vdi    the guest goes on there

The base is found again by its UUID among the images beside the child; see --parent and --image-dir
of the other verbs if it is elsewhere.")]
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
