//! Words of `qemu-img`: those that are taken, so that its users' hands and scripts need not learn, and for the others what to
//! say instead.

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue};
use clap::{Args, ValueEnum};

/// Whether the answer is for programs.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// Print JSON with the keys of `qemu-img`
    #[arg(long)]
    json: bool,
    /// The same in qemu-img's words
    #[arg(long, value_name = "FORMAT", conflicts_with = "json")]
    output: Option<OutputFormat>,
}

/// Who reads the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    /// People
    Human,
    /// Programs
    Json,
}

impl OutputArgs {
    pub(crate) fn is_json(&self) -> bool {
        self.json || self.output == Some(OutputFormat::Json)
    }
}

/// The format, where there is one only.
#[derive(Debug, Args)]
pub(crate) struct VdiArgs {
    /// Format of the image
    #[arg(short, long, value_name = "FORMAT", hide = true)]
    format: Option<OnlyVdi>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum OnlyVdi {
    Vdi,
}

/// What is so anyway.
#[derive(Debug, Args)]
pub(crate) struct ProgressArgs {
    /// Show progress, which a terminal is shown anyway
    #[arg(short, long, hide = true)]
    progress: bool,
}

/// Verb, option, and what to use instead; an empty verb for all of them.
const INSTEAD: &[(&str, &str, &str)] = &[
    ("check", "-r", "`vdi repair --apply` mends an image"),
    ("check", "--repair", "`vdi repair --apply` mends an image"),
    (
        "create",
        "-b",
        "`vdi snapshot BASE CHILD` makes a child of an image",
    ),
    ("create", "-o", "--fixed is qemu-img's `-o static=on`"),
    (
        "convert",
        "-o",
        "--fixed is qemu-img's `-o static=on`, --block-size sets the unit of allocation",
    ),
    (
        "convert",
        "-S",
        "zeros are always left out; --fixed reserves the space of all blocks",
    ),
    (
        "convert",
        "-n",
        "--force replaces a file, and writes to a block device in place",
    ),
    (
        "convert",
        "--target-is-zero",
        "zeros are left out where the destination is new, and written to a block device",
    ),
    ("convert", "-c", "the format knows no compression"),
    (
        "convert",
        "-B",
        "`vdi snapshot` makes a child, `vdi rebase` gives an image another parent",
    ),
    (
        "convert",
        "-r",
        "there is no limit of the rate; `ionice` may help",
    ),
    ("convert", "-l", "snapshots are files: name the child"),
    ("convert", "-C", "--reflink says whether extents are shared"),
    (
        "convert",
        "--salvage",
        "`vdi repair` keeps what can be read of a damaged image",
    ),
    (
        "resize",
        "--preallocation",
        "a fixed image keeps its space reserved",
    ),
    (
        "commit",
        "-b",
        "an image is merged into its parent, one step at a time",
    ),
    (
        "commit",
        "-d",
        "the child is left as an empty child of its parent",
    ),
    ("snapshot", "-l", SNAPSHOTS),
    ("snapshot", "-c", SNAPSHOTS),
    ("snapshot", "-a", SNAPSHOTS),
    ("snapshot", "-d", SNAPSHOTS),
    ("", "-T", CACHE),
    ("", "-t", CACHE),
    ("", "--image-opts", "images are named by their files"),
    ("", "--object", "images are named by their files"),
    (
        "measure",
        "",
        "`vdi info` shows what an image takes, `vdi compact --dry-run` what it could",
    ),
    ("dd", "", "`vdi convert` copies an image"),
    ("amend", "", "`vdi set` changes what the header says"),
];

const SNAPSHOTS: &str = "snapshots are files: `vdi snapshot BASE CHILD` makes one, `vdi info --backing-chain` lists them, \
                         `vdi commit` merges one into its parent";
const CACHE: &str = "there are no cache modes: the host's page cache is used, and what is written is synced at the end";

/// Tells who used a word of qemu-img's that is not taken what to use instead.
pub(crate) fn explain(mut error: clap::Error, verb: &str) -> clap::Error {
    let unknown = [ContextKind::InvalidArg, ContextKind::InvalidSubcommand];
    let word = unknown.into_iter().find_map(|kind| match error.get(kind) {
        Some(ContextValue::String(word)) => Some(word.clone()),
        _ => None,
    });
    let Some(word) = word.filter(|_| error.kind() != clap::error::ErrorKind::InvalidValue) else {
        return error;
    };
    let option = if word == verb { "" } else { word.as_str() };
    let known = INSTEAD.iter().find(|(of, name, _)| {
        *name == option && (*of == verb || (of.is_empty() && !name.is_empty()))
    });
    if let Some((_, _, instead)) = known {
        let tip = ContextValue::StyledStrs(vec![StyledStr::from(*instead)]);
        error.insert(ContextKind::Suggested, tip);
        for other in [ContextKind::SuggestedArg, ContextKind::SuggestedSubcommand] {
            error.remove(other);
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::args::Cli;

    #[test]
    fn who_knows_qemu_img_is_told_what_to_use_instead() {
        for (verb, option, instead) in INSTEAD {
            let verb = if verb.is_empty() { "convert" } else { verb };
            let words = ["vdi", verb, option];
            let words = words.into_iter().filter(|word| !word.is_empty());
            let error = explain(Cli::try_parse_from(words).unwrap_err(), verb).to_string();
            assert!(error.contains(&format!("tip: {instead}")), "{error}");
            assert!(!error.contains("as a value"), "{error}");
        }
    }

    #[test]
    fn no_word_is_explained_that_is_taken() {
        for (verb, option, _) in INSTEAD {
            let command = Cli::command();
            let Some(verb) = command.find_subcommand(verb) else {
                continue;
            };
            assert!(!option.is_empty(), "{} is a verb", verb.get_name());
            let taken = verb.get_arguments().flat_map(|arg| {
                let short = arg.get_short().map(|short| format!("-{short}"));
                short
                    .into_iter()
                    .chain(arg.get_long().map(|long| format!("--{long}")))
            });
            let taken: Vec<_> = taken.collect();
            assert!(
                !taken.iter().any(|taken| taken == option),
                "{option} of {taken:?}"
            );
        }
    }
}
