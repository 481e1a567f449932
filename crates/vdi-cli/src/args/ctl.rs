//! `vdi ctl`: the words of operators. Which of them make sense is for the daemon to say, so that there is one place that knows.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use serde_json::Value;

use super::block_size;
use super::edit::{NewSize, new_size};
use crate::size;

/// Where the daemon of a fleet is asked, by docs/fleet.md.
pub(super) const SOCKET: &str = "/run/vdi-vhost/control.sock";

/// Tell a running daemon what to do, or ask it something
#[derive(Debug, Args)]
#[command(after_help = "\
The only disk of a daemon that was started without --config is called `disk`. Sizes take a unit as in `vdi create`.

Exit codes:
  0  done
  1  the daemon refused, and everything is as it was; or bad arguments
  2  no daemon was reached, or it gave no answer

Examples:
  vdi ctl list
  vdi ctl stats vm1
  vdi ctl add vm3 /var/lib/vdi-vhost/vm3.vdi --serial vm3
  vdi ctl clone vm4 /srv/golden/debian-12.vdi /var/lib/vdi-vhost/vm4.vdi
  vdi ctl resize vm3 +10G
  vdi ctl snapshot vm3 /var/lib/vdi-vhost/vm3-monday.vdi
  vdi ctl set-limits vm3 iops_total=2000 bps_total=100M iops_total_max=8000
  vdi ctl add-group tenant-1 iops_total=10000
  vdi ctl join-group vm3 tenant-1
  vdi ctl dump vm3
  vdi ctl --socket /run/vdi-vhost/disk1.control info
  vdi ctl raw '{\"version\": 1, \"execute\": \"list\"}'")]
pub(crate) struct CtlArgs {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH", default_value = SOCKET, global = true)]
    pub(crate) socket: PathBuf,
    /// Print what the daemon returns, as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) said: Said,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Said {
    #[command(flatten)]
    Command(CtlCommand),
    /// Send any message and print the answer as it comes
    Raw {
        /// One JSON object, such as {"version": 1, "execute": "list"}
        #[arg(value_name = "JSON", value_parser = message)]
        message: Value,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum CtlCommand {
    /// Show all disks, and the groups that share limits
    List,
    /// Show a disk
    Info(Which),
    /// Show what a disk did since the daemon was started, or what all did
    Stats(Which),
    Add(Box<AddArgs>),
    Clone(Box<CloneArgs>),
    /// End the service of a disk: requests are answered, its front end is disconnected, the image closed
    Remove {
        /// The disk
        disk: String,
    },
    /// Make a disk larger while its guest runs, which is told
    Resize {
        /// The disk
        disk: String,
        /// The new size, or what to add (+)
        #[arg(value_name = "[+]SIZE", value_parser = new_size, allow_hyphen_values = true)]
        size: NewSize,
    },
    /// Freeze a disk as it is at this instant; its guest goes on in a child that takes the image's old name
    Snapshot {
        /// The disk
        disk: String,
        /// The frozen image's new name, in the same directory
        to: PathBuf,
        /// The size of the child's blocks, 128k to 128M, if not the image's
        #[arg(long, value_name = "SIZE", value_parser = block_size)]
        block_size: Option<u32>,
    },
    /// Merge what a disk's image holds into its parent while its guest goes on; done when it has begun
    Commit {
        /// The disk; it can be left out if there is only one
        disk: Option<String>,
        /// Keep what was merged as an image of its own, IMAGE.merged, instead of removing it
        #[arg(long)]
        keep: bool,
    },
    /// Show how far each disk's last merge is
    Jobs,
    /// End a disk's merge; it can be taken up again
    Cancel(Which),
    /// Limit a disk or a group from now on, instead of the limits it had
    #[command(after_help = LIMITS_HELP)]
    SetLimits {
        /// NAME is a group's
        #[arg(long)]
        group: bool,
        /// The disk, or the group
        name: String,
        /// Limits, such as iops_total=2000 or bps_total=100M, or `none`
        #[arg(value_name = "KEY=VALUE", required = true, value_parser = limit)]
        limits: Vec<Limit>,
    },
    /// Make a group, whose disks share limits beside their own
    #[command(after_help = LIMITS_HELP)]
    AddGroup {
        /// What the group is to be called
        name: String,
        /// Limits, such as iops_total=2000 or bps_total=100M
        #[arg(value_name = "KEY=VALUE", value_parser = limit)]
        limits: Vec<Limit>,
    },
    /// End a group that has no disks
    RemoveGroup {
        /// The group
        group: String,
    },
    /// Have a disk share a group's limits, and no other's
    JoinGroup {
        /// The disk
        disk: String,
        /// The group
        group: String,
    },
    /// Have a disk heed no limits but its own
    LeaveGroup(Which),
    /// Answer what a disk has taken, and let the rest wait
    Pause(Which),
    /// Go on with a disk that is paused
    Resume(Which),
    /// Say what the daemon logs, or have it log something else from now on
    LogLevel {
        /// off, error, warn, info, debug, trace, or as RUST_LOG has it
        level: Option<String>,
    },
    /// Show what a disk is doing, even one that hangs: its rings, threads and oldest requests, and no data of its guest
    Dump(Which),
    /// Have the daemon read its configuration again: disks are added and removed, limits and groups changed
    ///
    /// A disk that is gone from the file stays while a front end is connected, and is told as `kept`.
    Reload,
    /// End the daemon: requests are answered, all images closed
    Shutdown,
}

/// What can be limited.
const LIMITS_HELP: &str = "\
KEY is one of QEMU's: iops_total and bps_total per second; iops_total_max and bps_total_max for what may come at once after a \
quiet time; iops_total_max_length and bps_total_max_length to make that a rate, for so many seconds. `none` ends all limits.";

/// A disk, where it may be left out.
#[derive(Debug, Args)]
pub(crate) struct Which {
    /// The disk; it can be left out if there is only one
    pub(crate) disk: Option<String>,
}

/// Serve one more disk
///
/// What is not said is as in the `defaults` of the daemon's configuration.
#[derive(Debug, Args)]
pub(crate) struct AddArgs {
    /// What the disk is to be called
    pub(crate) name: String,
    /// Its image
    pub(crate) image: PathBuf,
    #[command(flatten)]
    pub(crate) served: DiskArgs,
}

/// Make a linked child of an image, and serve it: both or neither
///
/// The parent stays as it is, as with `vdi snapshot`; nobody may write it from now on. What is not said is as in the `defaults` of the daemon's
/// configuration. The child is made in one of its `image-dirs`.
#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// What the disk is to be called
    pub(crate) name: String,
    /// The parent, such as a golden image
    pub(crate) of: PathBuf,
    /// The new image
    pub(crate) image: PathBuf,
    /// The size of its blocks, 128k to 128M, if not the parent's: `vdi snapshot --help` tells what small ones cost
    #[arg(long, value_name = "SIZE", value_parser = block_size)]
    pub(crate) block_size: Option<u32>,
    #[command(flatten)]
    pub(crate) served: DiskArgs,
}

/// How a disk is to be served.
#[derive(Debug, Args)]
pub(crate) struct DiskArgs {
    /// Where its front end connects [default: NAME.sock in the daemon's socket-dir]
    #[arg(long, value_name = "PATH")]
    pub(crate) disk_socket: Option<PathBuf>,
    /// Serve it read-only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// How many queues its front end may use
    #[arg(long, value_name = "N")]
    pub(crate) num_queues: Option<u16>,
    /// Whether data go through the host's page cache or past it
    #[arg(long, value_parser = PossibleValuesParser::new(["writeback", "direct"]))]
    pub(crate) cache: Option<String>,
    /// File of a parent (can be given several times)
    #[arg(long = "parent", value_name = "FILE")]
    pub(crate) parents: Vec<PathBuf>,
    /// Directory with images that may be parents (can be given several times)
    #[arg(long = "image-dir", value_name = "DIR")]
    pub(crate) image_dirs: Vec<PathBuf>,
    /// Take a parent that was written to after its child was made
    #[arg(long)]
    pub(crate) allow_modified_parent: bool,
    /// Whether its guest can give space back
    #[arg(long, value_parser = PossibleValuesParser::new(["unmap", "ignore"]))]
    pub(crate) discard: Option<String>,
    /// Whether data that are nothing but zeros take no space
    #[arg(long, value_parser = PossibleValuesParser::new(["off", "on", "unmap"]))]
    pub(crate) detect_zeroes: Option<String>,
    /// The serial number that its guest sees
    #[arg(long, value_name = "ID")]
    pub(crate) serial: Option<String>,
    /// Open it when its first queue starts
    #[arg(long)]
    pub(crate) incoming: bool,
    /// How many threads serve this disk alone, out of the daemon's spare-workers; 0: it shares the others
    #[arg(long, value_name = "N")]
    pub(crate) workers: Option<u16>,
    /// CPUs that those threads run on, such as 0-3,8; one for each, if --workers does not say how many
    #[arg(long, value_name = "LIST")]
    pub(crate) worker_cpus: Option<String>,
    /// Group to share limits with; '' for none
    #[arg(long, value_name = "NAME")]
    pub(crate) group: Option<String>,
    /// One of its own limits, as in `vdi ctl set-limits`, or `none` (can be given several times)
    #[arg(long = "limit", value_name = "KEY=VALUE", value_parser = limit)]
    pub(crate) limits: Vec<Limit>,
}

/// One limit as it is said; no limit at all is `none`.
pub(crate) type Limit = Option<(String, u64)>;

fn limit(text: &str) -> Result<Limit, String> {
    if text == "none" {
        return Ok(None);
    }
    let (key, value) = text
        .split_once('=')
        .ok_or("not KEY=VALUE, such as iops_total=2000, nor `none`")?;
    let key = key.replace('-', "_");
    let value = if key.ends_with("_max_length") {
        value.parse().map_err(|_| "not a number of seconds")?
    } else if key.starts_with("bps") {
        size::parse(value).map_err(|error| error.to_string())?
    } else {
        value.parse().map_err(|_| "not a number of requests")?
    };
    Ok(Some((key, value)))
}

fn message(text: &str) -> Result<Value, String> {
    let value: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    value
        .is_object()
        .then_some(value)
        .ok_or_else(|| "a message is one object".to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn bandwidths_are_sizes_and_rates_are_numbers() {
        let some = |key: &str, value| Ok(Some((key.to_owned(), value)));
        assert_eq!(limit("bps_total=100M"), some("bps_total", 100 << 20));
        assert_eq!(limit("iops-total=5"), some("iops_total", 5));
        assert_eq!(
            limit("bps_total_max_length=60"),
            some("bps_total_max_length", 60)
        );
        assert_eq!(limit("none"), Ok(None));
        for bad in [
            "",
            "iops_total",
            "iops_total=5k",
            "bps_total=-1",
            "bps_total_max_length=1M",
        ] {
            assert!(limit(bad).is_err(), "{bad}");
        }
    }
    /// `Info` is `info`, and `StatsOfAll` is `stats-of-all`.
    fn kebab(name: &str) -> String {
        let mut text = String::new();
        for letter in name.chars() {
            if letter.is_uppercase() && !text.is_empty() {
                text.push('-');
            }
            text.extend(letter.to_lowercase());
        }
        text
    }

    #[test]
    fn no_command_of_a_daemon_is_without_a_word() {
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../vdi-vhost/src/control.rs");
        let source = std::fs::read_to_string(source).unwrap();
        let (_, commands) = source.split_once("\nenum Command {\n").unwrap();
        let (commands, _) = commands.split_once("\n}\n").unwrap();
        let names = commands.lines().filter_map(|line| {
            let name = line.strip_prefix("    ")?;
            name.starts_with(char::is_uppercase)
                .then(|| name.split(|c: char| !c.is_alphanumeric()).next())?
        });
        let commands: BTreeSet<String> = names.map(kebab).collect();
        let examples = source.lines().filter_map(|line| {
            let (_, rest) = line.strip_prefix("//! ")?.split_once("\"execute\": \"")?;
            Some(rest.split_once('"')?.0.to_owned())
        });
        // What is between two daemons is no operator's.
        let examples: BTreeSet<String> = examples.filter(|name| name != "hand-over").collect();
        assert_eq!(commands, examples, "the examples and the commands");
        let words = CtlCommand::augment_subcommands(clap::Command::new("ctl"));
        let words = words
            .get_subcommands()
            .map(|word| word.get_name().to_owned());
        // Which is `stats` without a disk.
        let words: BTreeSet<String> = words.chain(["stats-of-all".to_owned()]).collect();
        assert_eq!(commands, words, "the commands and the words");
    }

    #[test]
    fn nothing_that_a_disk_can_be_is_without_an_option() {
        let source = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../vdi-vhost/src/config/disk.rs"
        );
        let source = std::fs::read_to_string(source).unwrap();
        let (_, fields) = source.split_once("struct DiskTable {\n").unwrap();
        let (fields, _) = fields.split_once("\n}\n").unwrap();
        let fields = fields
            .lines()
            .filter_map(|line| line.split_once(": Option<"));
        let of_field = |(name, _): (&str, &str)| match name.trim() {
            "socket" => "disk-socket".to_owned(),
            // Said once for each.
            many @ ("parents" | "image_dirs" | "limits") => {
                many.trim_end_matches('s').replace('_', "-")
            }
            other => other.replace('_', "-"),
        };
        let fields: BTreeSet<String> = fields.map(of_field).collect();
        let words = DiskArgs::augment_args(clap::Command::new("add"));
        let options = words.get_arguments().filter_map(|option| option.get_long());
        let words: BTreeSet<String> = options
            // Which are no options.
            .chain(["name", "image"])
            .map(str::to_owned)
            .collect();
        assert_eq!(fields, words);
    }
}
