//! What the command line may say.
//!
//! Only words become types here; whether a file exists or a size is possible is
//! found out by whoever uses it. Sources: `qemu-img(1)`, whose names and meanings
//! are kept where it has them.

mod ctl;
mod edit;
mod qemu;
mod top;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use uuid::Uuid;
use vdi_core::Threads;
use vdi_core::convert::{CopyOptions, Sharing};

use crate::size;

pub(crate) use self::ctl::{CtlArgs, CtlCommand, DiskArgs, Limit, Said, Which};
pub(crate) use self::edit::{CompactArgs, NewSize, ResizeArgs, SetArgs, SnapshotArgs};
pub(crate) use self::qemu::{OutputArgs, ProgressArgs, VdiArgs, explain};
pub(crate) use self::top::TopArgs;

const EXIT_CODES: &str = "\
Exit codes:
  0  done; for `check` and `repair`: nothing is wrong but perhaps for a note; for `compare`: the disks
     are the same
  1  not done, because of an error (bad arguments, too); for `check`: not checked; for `compare`: the
     disks differ
  2  for `check` and `repair`: the image is corrupt; for `compare`: not compared, because of an error;
     for `ctl` and `top`: no daemon answers
  3  only `check` and `repair`: nothing is corrupt, but space is leaked";

const EXAMPLES: &str = "\
Examples:
  vdi create disk.vdi 20G                      an empty image that grows when written
  vdi create --fixed disk.vdi 20G              all of its space is reserved now
  vdi info disk.vdi                            what it is and what it takes
  vdi check disk.vdi && echo sound
  vdi repair disk.vdi                          what could be mended; --apply does it
  vdi convert -f raw -O vdi disk.raw disk.vdi  import a raw image
  vdi convert -O raw disk.vdi disk.raw         export it again
  vdi snapshot disk.vdi today.vdi              keep disk.vdi as it is and go on with today.vdi
  vdi compact disk.vdi                         give back what is zeros
  vdi resize disk.vdi +10G";

/// The tool for VirtualBox VDI images
#[derive(Debug, Parser)]
#[command(name = "vdi", version, after_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"), max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Create(CreateArgs),
    Info(InfoArgs),
    Check(CheckArgs),
    Repair(RepairArgs),
    Map(MapArgs),
    Convert(ConvertArgs),
    Snapshot(SnapshotArgs),
    Compact(CompactArgs),
    Resize(ResizeArgs),
    Set(SetArgs),
    Commit(CommitArgs),
    Flatten(FlattenArgs),
    Rebase(RebaseArgs),
    Compare(CompareArgs),
    Clone(CloneArgs),
    Ctl(Box<CtlArgs>),
    Top(TopArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

/// Make an empty image
///
/// To make a child of another image, see `vdi snapshot`.
///
/// The image appears under its name only when it is complete.
#[derive(Debug, Args)]
#[command(after_help = "\
Sizes take a unit: b (bytes, the default), k, M, G, T, P, E or KiB, MiB ...: powers of 1024.
They are rounded up to whole sectors of 512 bytes.

Examples:
  vdi create disk.vdi 20G
  vdi create --fixed --size 512M disk.vdi
  vdi create --block-size 128k --uuid 706c398a-86ca-49e3-9a30-3cbc9073cd11 disk.vdi 1.5T")]
pub(crate) struct CreateArgs {
    /// The file to make
    pub(crate) file: PathBuf,
    /// Size of the disk, such as 20G
    #[arg(value_name = "SIZE", value_parser = size::parse, required_unless_present = "size_option")]
    size: Option<u64>,
    /// Size of the disk, for those who like options
    #[arg(long = "size", short = 's', value_name = "SIZE", value_parser = size::parse, conflicts_with = "size")]
    size_option: Option<u64>,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
    /// UUID of the image [default: a random one]
    #[arg(long, value_name = "UUID", value_parser = uuid_not_null)]
    pub(crate) uuid: Option<Uuid>,
    /// Replace the file if it exists and is not empty
    #[arg(long)]
    pub(crate) force: bool,
    /// Say nothing, as it does anyway
    #[arg(short, long, hide = true)]
    quiet: bool,
    #[command(flatten)]
    format: VdiArgs,
}

impl CreateArgs {
    /// The size, wherever it was given.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.size
            .or(self.size_option)
            .expect("clap requires one of the two")
    }
}

/// How a new image is laid out.
#[derive(Debug, Args)]
pub(crate) struct LayoutArgs {
    /// Reserve the space of all blocks now
    #[arg(long)]
    pub(crate) fixed: bool,
    /// Unit of allocation, a power of two from 128k to 128M; QEMU opens only 1M [default: 1M]
    #[arg(long, value_name = "SIZE", value_parser = block_size)]
    block_size: Option<u32>,
}

impl LayoutArgs {
    /// Bytes of a block.
    pub(crate) fn block_size(&self) -> u32 {
        self.block_size.unwrap_or(1 << 20)
    }

    /// Whether anything was said about the layout.
    pub(crate) fn is_given(&self) -> bool {
        self.fixed || self.block_size.is_some()
    }
}

/// How an image that is only read is opened.
#[derive(Debug, Args)]
pub(crate) struct OpenArgs {
    /// Read the image even though another process is writing to it; what is seen may be torn
    #[arg(long, short = 'U')]
    pub(crate) force_share: bool,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
}

/// Where the parents of a differencing image are.
#[derive(Debug, Args)]
pub(crate) struct ChainArgs {
    /// File of a parent of the image, if it is a differencing one (can be given several times)
    #[arg(long = "parent", value_name = "FILE")]
    pub(crate) parents: Vec<PathBuf>,
    /// Directory with images that may be parents; the image's own is one (can be given several times)
    #[arg(long = "image-dir", value_name = "DIR")]
    pub(crate) image_dirs: Vec<PathBuf>,
    /// Take a parent that was written to after its child was made
    #[arg(long)]
    pub(crate) allow_modified_parent: bool,
}

/// How many threads move data.
#[derive(Debug, Args)]
pub(crate) struct ThreadsArgs {
    /// Threads that read and write, from 1 to 16 [default: 3 to copy, to compare one for each CPU, at least 8]
    #[arg(long, short = 'm', value_name = "N", value_parser = threads)]
    threads: Option<Threads>,
}

impl ThreadsArgs {
    /// The number that was asked for, or else the one that suits.
    pub(crate) fn or(&self, suited: Threads) -> Threads {
        self.threads.unwrap_or(suited)
    }
}

/// How a disk is copied.
#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    #[command(flatten)]
    threads: ThreadsArgs,
    /// Whether the destination shares extents with the source where the file system can
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    reflink: Reflink,
}

/// When extents are shared; the words are those of `cp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Reflink {
    /// Where the file system can
    Auto,
    /// Not at all: all is read, and all zeros are left out
    Never,
}

impl CopyArgs {
    /// What the library makes of it.
    pub(crate) fn options(&self) -> CopyOptions {
        CopyOptions {
            threads: self.threads.or(Threads::TO_COPY),
            sharing: match self.reflink {
                Reflink::Auto => Sharing::Auto,
                Reflink::Never => Sharing::Never,
            },
        }
    }
}

/// Show what an image is and what it takes
///
/// A differencing image is shown even if its parent is not found.
#[derive(Debug, Args)]
#[command(after_help = "\
Fragmentation is the share of blocks that are not kept right behind the block with storage in front
of them, as `qemu-img check` counts it: 0 % if the file has them in the disk's order. Unused blocks in
the file are `vdi compact`'s to remove.

JSON (--json, or --output json) has the keys of `qemu-img info`. Under format-specific.data there are, besides the header:
  blocks         blocks of the disk: allocated, zero, unallocated
  fragmentation  runs: pieces of the file in the disk's order, at best 1; fragmented-clusters:
                 runs - 1; fragmented-percent: of the allocated ones; holes: unused blocks of the
                 file between used ones; tail: unused blocks behind them; away: blocks that a
                 stopped resize left behind the last number
  shown          with --backing-chain, if there are parents: bytes of data and of zeros that readers
                 of the disk get from this image; its children hide the rest")]
pub(crate) struct InfoArgs {
    /// The image
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    #[command(flatten)]
    format: VdiArgs,
    /// Print a list, with the image's parents behind it
    #[arg(long)]
    pub(crate) backing_chain: bool,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
}

/// Look for what is wrong with an image; changes nothing
///
/// A differencing image is checked by itself, and so is whether its parents are the ones that it
/// names: a modified parent, a loop, or a file given with --parent that is none are corruption; a parent
/// that is not found is a note.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
  0  nothing is wrong but perhaps for a note
  1  the image could not be checked
  2  the image is corrupt
  3  nothing is corrupt, but space is leaked

JSON (--json, or --output json) has the keys of `qemu-img check` and besides:
  notes     findings that are harmless; corruptions and leaks count the others
  findings  a list, at most 20 of a kind, each with kind (a stable name), severity, message and advice
  counts    how many findings there are of each kind, listed or not")]
pub(crate) struct CheckArgs {
    /// The image
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Say nothing; the exit code tells
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    format: VdiArgs,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
}

/// Show how a damaged image can be mended, or mend it
///
/// What can be read is kept: a block with two owners is copied for the second one, a block at an
/// impossible place is moved, one that the file's end cuts keeps what is left of it. Space that nothing uses
/// is given back; for that blocks at the end may move into holes. What cannot be mended is named and left as
/// it is. A repair that was interrupted is finished by another one.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes, without --apply for the image as it is, with it for what the repair made of it:
  0  nothing is wrong but perhaps for a note
  1  no plan could be made, or it could not be carried out
  2  the image is corrupt
  3  nothing is corrupt, but space is leaked

Examples:
  vdi repair disk.vdi           what is wrong and what would be done
  vdi repair --apply disk.vdi   do it; header and map are kept in disk.vdi.vdi-repair-<seconds>")]
pub(crate) struct RepairArgs {
    /// The image
    pub(crate) file: PathBuf,
    /// Carry the plan out
    #[arg(long)]
    pub(crate) apply: bool,
    /// Keep no copy of header and map beside the image
    #[arg(long, requires = "apply")]
    pub(crate) no_backup: bool,
    /// Let blocks read as zeros of which the file has nothing any more
    #[arg(long)]
    pub(crate) drop_unreadable: bool,
}

/// Show which parts of the disk have data, and where in which file
///
/// Of a differencing image the whole disk is shown, and behind each range the file of the image that it comes
/// from. On a terminal the layout is drawn below the table.
#[derive(Debug, Args)]
#[command(after_help = "\
The drawing has a strip for the disk, whose cells have the colour of the image that most of the
cell comes from, and one for each file in the file's order, whose cells have the colour of their
place on the disk: a file without fragments goes through the colours once. Without colours
(NO_COLOR, a dumb terminal, no terminal) there are digits instead; CLICOLOR_FORCE=1 asks for colours
all the same.

JSON (--json, or --output json) is a list of ranges in the disk's order, with the keys of `qemu-img map`:
  start, length     the range, in bytes of the disk
  depth             the image that it comes from: 0 the one named, 1 its parent, and so on
  present           whether any image has something here
  zero, data        whether it reads as zeros without storage, or is in a file
  offset, filename  where in which file, if it is in one

Examples:
  vdi map disk.vdi                   a table
  vdi map --strip disk.vdi           a drawing for a look
  vdi map --svg disk.svg disk.vdi    a picture for a browser, with details where the mouse points")]
pub(crate) struct MapArgs {
    /// The image
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) output: OutputArgs,
    /// Draw the layout and print no table
    #[arg(long, conflicts_with_all = ["json", "output"])]
    pub(crate) strip: bool,
    /// Draw the layout as a picture into FILE, and print no table
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "output", "strip"])]
    pub(crate) svg: Option<PathBuf>,
    /// Where the table begins on the disk
    #[arg(short, long, value_name = "SIZE", value_parser = size::parse, default_value = "0", conflicts_with_all = ["strip", "svg"])]
    pub(crate) start_offset: u64,
    /// How much of the disk the table is about [default: all to its end]
    #[arg(short = 'l', long, value_name = "SIZE", value_parser = size::parse, conflicts_with_all = ["strip", "svg"])]
    pub(crate) max_length: Option<u64>,
    #[command(flatten)]
    format: VdiArgs,
    /// Replace the picture's FILE if it exists and is not empty
    #[arg(long, requires = "svg")]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
}

/// A format to convert from or to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// The bytes of the disk and nothing else
    Raw,
    /// VirtualBox disk image
    Vdi,
}

/// Copy a disk into another file, raw or VDI
///
/// The source is a VDI image unless `-f raw` says otherwise: a raw disk's contents are its guest's, who
/// could write the header of another format there. Of a differencing image the whole disk is copied, its
/// parents' part too; they are looked for beside it (see also --parent and --image-dir). Zeros take no space in the destination, which appears
/// under its name only when it is complete and on stable storage.
///
/// Where the file system can (btrfs, XFS), source and destination share what lies on whole blocks of the file system in
/// both: that copies nothing and takes no space, but zeros that the source stores stay stored.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi convert -f raw -O vdi disk.raw disk.vdi
  vdi convert -O vdi --fixed dynamic.vdi fixed.vdi
  vdi convert -O raw --force disk.vdi /dev/vg/disk   a block device is written in place")]
pub(crate) struct ConvertArgs {
    /// The disk to copy
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,
    /// The file to make, or a block device
    #[arg(value_name = "DST")]
    pub(crate) destination: PathBuf,
    /// Format of the source
    #[arg(short = 'f', long, value_name = "FORMAT", default_value = "vdi")]
    pub(crate) source_format: Format,
    /// Format of the destination
    #[arg(short = 'O', long, value_name = "FORMAT")]
    pub(crate) output_format: Format,
    #[command(flatten)]
    pub(crate) layout: LayoutArgs,
    /// Replace the destination if it exists and is not empty
    #[arg(long)]
    pub(crate) force: bool,
    /// Show no progress
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    /// Write out of order, as is done anyway
    #[arg(short = 'W', hide = true)]
    is_out_of_order: bool,
    #[command(flatten)]
    pub(crate) copying: CopyArgs,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
}

/// Merge a differencing image into its parent
///
/// Afterwards the parent reads as the image did, and the image is an empty child of it. Other children
/// of the parent become invalid. A merge that was interrupted harms nothing: the image reads as
/// before, and the same command completes it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi commit snapshot.vdi && rm snapshot.vdi
  vdi commit --parent base.vdi snapshot.vdi")]
pub(crate) struct CommitArgs {
    /// The image to merge
    #[arg(value_name = "CHILD")]
    pub(crate) file: PathBuf,
    /// Show no progress and say nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    format: VdiArgs,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
}

/// Make a differencing image one without a parent
///
/// What its parents have is copied into it. An interrupted flatten harms nothing and can be done again.
#[derive(Debug, Args)]
pub(crate) struct FlattenArgs {
    /// The image to change
    #[arg(value_name = "CHILD")]
    pub(crate) file: PathBuf,
    /// Show no progress and say nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
}

/// Give an image another parent
///
/// Where the old parent and the new one differ, the image first gets what it shows of the old one, so it
/// reads as before. An interrupted rebase harms nothing and can be done again.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi rebase -b base.vdi child.vdi             drop the images between the two
  vdi rebase --unsafe -b copy.vdi child.vdi    the parent's contents are elsewhere now
  vdi rebase -b '' child.vdi                   the same as `vdi flatten child.vdi`")]
pub(crate) struct RebaseArgs {
    /// The image to change
    #[arg(value_name = "CHILD")]
    pub(crate) file: PathBuf,
    /// The new parent; an empty name for none
    #[arg(short = 'b', long = "new-parent", value_name = "FILE")]
    pub(crate) new_parent: OsString,
    /// Change the name of the parent only: what the image reads as changes where the parents differ
    #[arg(long = "unsafe", short = 'u')]
    pub(crate) is_unsafe: bool,
    /// Show no progress and say nothing
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    format: VdiArgs,
    /// Format of the new parent
    #[arg(short = 'F', value_name = "FORMAT", hide = true, value_parser = ["vdi"])]
    parent_format: Option<String>,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
}

/// Say whether two disks hold the same, as `qemu-img compare` does
///
/// A disk that is shorter than the other counts as the same if the other has zeros there.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
  0  the disks are the same
  1  the disks differ
  2  the disks could not be compared, because of an error (bad arguments, too)

Examples:
  vdi compare before.vdi after.vdi
  vdi compare -f raw disk.raw disk.vdi")]
pub(crate) struct CompareArgs {
    /// A disk
    #[arg(value_name = "A")]
    pub(crate) first: PathBuf,
    /// The other disk
    #[arg(value_name = "B")]
    pub(crate) second: PathBuf,
    /// Format of A
    #[arg(short = 'f', long, value_name = "FORMAT", default_value = "vdi")]
    pub(crate) first_format: Format,
    /// Format of B
    #[arg(short = 'F', long, value_name = "FORMAT", default_value = "vdi")]
    pub(crate) second_format: Format,
    /// The sizes, and which ranges have storage, must be the same too
    #[arg(short, long)]
    pub(crate) strict: bool,
    /// Say nothing; the exit code tells
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    progress: ProgressArgs,
    #[command(flatten)]
    pub(crate) threads: ThreadsArgs,
    #[command(flatten)]
    pub(crate) open: OpenArgs,
}

/// Make another image that holds what an image and its parents do
///
/// It gets a UUID of its own; a full clone keeps the source's comment, geometry and uuid_modify.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi clone vm.vdi copy.vdi             a copy of the whole chain, as one image
  vdi clone --linked vm.vdi child.vdi   an empty child of vm.vdi, which must not change any more
  vdi clone --linked --block-size 128k vm.vdi child.vdi    see `vdi snapshot --help` for what that costs")]
pub(crate) struct CloneArgs {
    /// The image to clone
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,
    /// The file to make
    #[arg(value_name = "DST")]
    pub(crate) destination: PathBuf,
    /// Make a child of the source, which takes no time and no space
    #[arg(long)]
    pub(crate) linked: bool,
    /// Unit of allocation of the child, a power of two from 128k to 128M [default: the source's]
    #[arg(long, value_name = "SIZE", value_parser = block_size, requires = "linked")]
    pub(crate) block_size: Option<u32>,
    /// Replace the destination if it exists and is not empty
    #[arg(long)]
    pub(crate) force: bool,
    /// Show no progress
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) copying: CopyArgs,
    #[command(flatten)]
    pub(crate) chain: ChainArgs,
}

/// Print completions for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi completions bash > ~/.local/share/bash-completion/completions/vdi
  vdi completions fish > ~/.config/fish/completions/vdi.fish")]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: Shell,
}

/// Write the manual pages, one for each verb
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  vdi man ~/.local/share/man/man1")]
pub(crate) struct ManArgs {
    /// An existing directory
    pub(crate) directory: PathBuf,
}

fn block_size(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    u32::try_from(bytes)
        .ok()
        .and_then(vdi_core::BlockSize::new)
        .map(vdi_core::BlockSize::bytes)
        .ok_or_else(|| "a block size is a power of two from 128k to 128M".to_owned())
}

fn threads(text: &str) -> Result<Threads, String> {
    let count = text.parse().ok().and_then(Threads::new);
    count.ok_or_else(|| format!("a number from 1 to {}", Threads::MOST))
}

fn uuid_not_null(text: &str) -> Result<Uuid, String> {
    let uuid: Uuid = text
        .parse()
        .map_err(|error: uuid::Error| error.to_string())?;
    if uuid.is_nil() {
        return Err("the null UUID names no image".to_owned());
    }
    Ok(uuid)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_agree_with_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_size_is_given_once_in_either_way() {
        for words in [
            ["create", "f", "10M"].as_slice(),
            &["create", "--size", "10M", "f"],
            &["create", "-s10M", "f"],
        ] {
            let cli = Cli::try_parse_from([&["vdi"], words].concat()).unwrap();
            let Verb::Create(args) = cli.verb else {
                panic!("{words:?}")
            };
            assert_eq!(args.size_bytes(), 10 << 20);
        }
        for words in [
            ["create", "f"].as_slice(),
            &["create", "--size", "10M", "f", "10M"],
        ] {
            assert!(
                Cli::try_parse_from([&["vdi"], words].concat()).is_err(),
                "{words:?}"
            );
        }
    }

    #[test]
    fn a_block_size_is_one_that_virtualbox_opens() {
        assert_eq!(block_size("128k"), Ok(128 << 10));
        assert_eq!(block_size("128M"), Ok(128 << 20));
        for text in ["0", "64k", "3M", "256M", "8E", "1MB"] {
            assert!(block_size(text).is_err(), "{text}");
        }
    }
}
