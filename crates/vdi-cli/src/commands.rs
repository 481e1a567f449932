//! The verbs: each is one call of the library and one report.

mod check;
mod clone;
mod commit;
mod compact;
mod compare;
mod convert;
mod ctl;
mod info;
mod map;
mod rebase;
mod repair;
mod resize;
mod set;
mod snapshot;

use std::fs;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::CommandFactory;
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vdi_core::check::CheckError;
use vdi_core::clone::CloneError;
use vdi_core::commit::CommitError;
use vdi_core::compact::CompactError;
use vdi_core::compare::CompareError;
use vdi_core::convert::{CopyError, End, NewImageError, RawDisk, RawError};
use vdi_core::rebase::RebaseError;
use vdi_core::repair::{ApplyError, PlanError};
use vdi_core::resize::ResizeError;
use vdi_core::set::SetError;
use vdi_core::{
    Access, ChainError, ChainOptions, CreateError, CreateOptions, Disk, FileError, HostFile,
    Locking, ModifiedParent, NewKind, OpenError, SECTOR_SIZE, Storage, find_chain,
};

use crate::args::{
    ChainArgs, Cli, CompletionsArgs, CreateArgs, Format, LayoutArgs, ManArgs, OpenArgs, Verb,
};
use crate::daemon::DaemonError;
use crate::new_file::{Existing, NewFile, NewFileError};

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{held}, or give --force-share (-U) to read what may be half changed")]
    InUse { held: FileError },
    #[error("cannot open {}", path.display())]
    Open { path: PathBuf, source: OpenError },
    #[error("cannot find the parents of {}", path.display())]
    Chain { path: PathBuf, source: ChainError },
    #[error("cannot open {}", path.display())]
    OpenRaw { path: PathBuf, source: RawError },
    #[error("cannot check {}", path.display())]
    Check { path: PathBuf, source: CheckError },
    #[error("cannot make a plan to repair {}", path.display())]
    PlanRepair { path: PathBuf, source: PlanError },
    #[error("cannot keep a copy of header and map of {}; nothing was changed", path.display())]
    BackUp { path: PathBuf, source: io::Error },
    #[error(
        "the repair of {} copies {needed} bytes, but its file system has only {free} left; make room there, \
         or move the image to a larger one", path.display()
    )]
    NoRoomToRepair {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("cannot repair {}", path.display())]
    Repair { path: PathBuf, source: ApplyError },
    #[error("cannot write manual pages into {}", path.display())]
    Man { path: PathBuf, source: io::Error },
    #[error("cannot create {}", path.display())]
    Create { path: PathBuf, source: CreateError },
    #[error("cannot create {}", path.display())]
    CreateRaw { path: PathBuf, source: RawError },
    #[error("cannot create {}", path.display())]
    CreateImage {
        path: PathBuf,
        source: NewImageError,
    },
    #[error(transparent)]
    New(#[from] NewFileError),
    #[error("cannot look at {}", path.display())]
    Look { path: PathBuf, source: io::Error },
    #[error("{} and {} are the same file", from.display(), to.display())]
    Same { from: PathBuf, to: PathBuf },
    #[error("{} is a parent of what is copied, which would be lost; choose another name", path.display())]
    OverParent { path: PathBuf },
    #[error("a raw disk has no layout; --fixed and --block-size go with -O vdi")]
    LayoutOfRaw,
    #[error("{} is a block device; it can take a raw disk only (-O raw)", path.display())]
    ImageOnDevice { path: PathBuf },
    #[error("{} is a block device, whose contents would be lost; give --force to write to it", path.display())]
    DeviceWithoutForce { path: PathBuf },
    #[error("cannot copy {} to {}", from.display(), to.display())]
    Copy {
        from: PathBuf,
        to: PathBuf,
        source: CopyError,
    },
    #[error("cannot compact {}", path.display())]
    Compact { path: PathBuf, source: CompactError },
    #[error("cannot resize {}", path.display())]
    Resize { path: PathBuf, source: ResizeError },
    #[error(transparent)]
    ResizeRefused(#[from] resize::Refused),
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    #[error(transparent)]
    NotSent(#[from] ctl::NotSent),
    #[error("cannot set the fields of {}", path.display())]
    Set { path: PathBuf, source: SetError },
    #[error("cannot merge {} into its parent", path.display())]
    Commit { path: PathBuf, source: CommitError },
    #[error("cannot change the parent of {}", path.display())]
    Rebase { path: PathBuf, source: RebaseError },
    #[error("cannot compare {} with {}", first.display(), second.display())]
    Compare {
        first: PathBuf,
        second: PathBuf,
        source: CompareError,
    },
    #[error("cannot clone {}", path.display())]
    Clone { path: PathBuf, source: CloneError },
    #[error("cannot write the header of {}", path.display())]
    Describe { path: PathBuf, source: io::Error },
    #[error("{} has no parent", path.display())]
    NoParent { path: PathBuf },
    #[error("an image without a parent has all of its contents; --unsafe goes with a new parent")]
    UnsafeFlatten,
    #[error("cannot write the picture {}", path.display())]
    Picture { path: PathBuf, source: io::Error },
    #[error("standard output is no terminal; `vdi top --batch` and `--once` write text")]
    NoTerminal,
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    #[error("interrupted")]
    Interrupted,
    #[error("cannot write the answer")]
    Output(#[from] io::Error),
}

/// Does what the command line says.
pub(crate) fn run(verb: Verb) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Create(args) => create(&args),
        Verb::Info(args) => info::run(&args).map_err(or_shared),
        Verb::Check(args) => check::run(&args).map_err(or_shared),
        Verb::Repair(args) => repair::repair(&args),
        Verb::Map(args) => map::run(&args).map_err(or_shared),
        Verb::Convert(args) => convert::run(&args).map_err(or_shared),
        Verb::Snapshot(args) => snapshot::run(&args),
        Verb::Compact(args) => compact::run(&args),
        Verb::Resize(args) => resize::run(&args),
        Verb::Set(args) => set::run(&args),
        Verb::Commit(args) => commit::commit(&args),
        Verb::Flatten(args) => rebase::flatten(&args),
        Verb::Rebase(args) => rebase::rebase(&args),
        Verb::Compare(args) => compare::compare(&args).map_err(or_shared),
        Verb::Clone(args) => clone::clone(&args),
        Verb::Ctl(args) => ctl::run(*args),
        Verb::Top(args) => crate::top::run(&args),
        Verb::Completions(args) => completions(&args),
        Verb::Man(args) => man(&args),
    }
}

fn create(args: &CreateArgs) -> Result<ExitCode, Failure> {
    let stop = stop_on_signals()?;
    let new = NewFile::beside(&args.file, existing(args.force))?;
    let capacity_bytes = args.size_bytes().next_multiple_of(SECTOR_SIZE);
    let options = CreateOptions {
        uuid: args.uuid,
        ..options(capacity_bytes, &args.layout)
    };
    vdi_core::create(new.path(), &options).map_err(|source| Failure::Create {
        path: args.file.clone(),
        source,
    })?;
    if stop.load(Ordering::Relaxed) {
        return Err(Failure::Interrupted);
    }
    new.publish()?;
    Ok(ExitCode::SUCCESS)
}

fn completions(args: &CompletionsArgs) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "vdi", &mut script);
    let mut out = output();
    out.write_all(&script)?;
    done(out, ExitCode::SUCCESS)
}

fn man(args: &ManArgs) -> Result<ExitCode, Failure> {
    clap_mangen::generate_to(Cli::command(), &args.directory).map_err(|source| Failure::Man {
        path: args.directory.clone(),
        source,
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Opens a disk of some format for reading.
fn open_end(path: &Path, format: Format, open: &OpenArgs) -> Result<End, Failure> {
    match format {
        Format::Vdi => Ok(End::Image(open_disk(path, open)?)),
        Format::Raw => match RawDisk::open(path, Access::ReadOnly, locking(open)) {
            Ok(raw) => Ok(End::Raw(raw)),
            Err(RawError::File(error)) => Err(Failure::File(error)),
            Err(source) => Err(Failure::OpenRaw {
                path: path.to_owned(),
                source,
            }),
        },
    }
}

fn options(capacity_bytes: u64, layout: &LayoutArgs) -> CreateOptions {
    let kind = if layout.fixed {
        NewKind::Fixed
    } else {
        NewKind::Dynamic
    };
    CreateOptions {
        capacity_bytes,
        block_size: layout.block_size(),
        kind,
        uuid: None,
    }
}

fn existing(force: bool) -> Existing {
    if force {
        Existing::Replace
    } else {
        Existing::Keep
    }
}

fn locking(open: &OpenArgs) -> Locking {
    if open.force_share {
        Locking::ForceShare
    } else {
        Locking::Locked
    }
}

fn open_file(path: &Path, open: &OpenArgs) -> Result<HostFile, Failure> {
    HostFile::open(path, Access::ReadOnly, locking(open)).map_err(Failure::File)
}

/// Adds the way out to an error about locks, for the verbs that have one: they only read.
fn or_shared(failure: Failure) -> Failure {
    match failure {
        Failure::File(held @ FileError::Locked { .. }) => Failure::InUse { held },
        other => other,
    }
}

/// Opens an image and its parents for reading.
fn open_disk(path: &Path, open: &OpenArgs) -> Result<Arc<Disk>, Failure> {
    open_chain(path, Access::ReadOnly, &open.chain, locking(open))
}

/// Opens an image that a verb changes, unless it only says what it would do.
fn open_to_change(path: &Path, chain: &ChainArgs, dry_run: bool) -> Result<Arc<Disk>, Failure> {
    let access = if dry_run {
        Access::ReadOnly
    } else {
        Access::Writable
    };
    let files = find_files(path, access, &chain_options(chain, Locking::Locked))?;
    open_files(path, files, access, modified_parent(chain))
}

/// Opens an image, and its parents for reading.
fn open_chain(
    path: &Path,
    access: Access,
    chain: &ChainArgs,
    locking: Locking,
) -> Result<Arc<Disk>, Failure> {
    let files = find_files(path, access, &chain_options(chain, locking))?;
    open_files(path, files, access, modified_parent(chain))
}

fn chain_options(chain: &ChainArgs, locking: Locking) -> ChainOptions {
    ChainOptions {
        parents: chain.parents.clone(),
        image_dirs: chain.image_dirs.clone(),
        locking,
        seen: Arc::default(),
    }
}

fn modified_parent(chain: &ChainArgs) -> ModifiedParent {
    if chain.allow_modified_parent {
        ModifiedParent::Allow
    } else {
        ModifiedParent::Refuse
    }
}

/// Opens the files of an image and its parents.
fn find_files(
    path: &Path,
    access: Access,
    options: &ChainOptions,
) -> Result<Vec<HostFile>, Failure> {
    find_chain(path, access, options).map_err(|error| no_chain(path, error))
}

fn no_chain(path: &Path, error: ChainError) -> Failure {
    match error {
        ChainError::File(file) => Failure::File(file),
        source => Failure::Chain {
            path: path.to_owned(),
            source,
        },
    }
}

fn open_files(
    path: &Path,
    files: Vec<HostFile>,
    access: Access,
    modified: ModifiedParent,
) -> Result<Arc<Disk>, Failure> {
    let storages = files
        .into_iter()
        .map(|file| Arc::new(file) as Arc<dyn Storage>);
    Disk::open_chain(storages.collect(), access, modified)
        .map(Arc::new)
        .map_err(|source| Failure::Open {
            path: path.to_owned(),
            source,
        })
}

/// A bar that counts blocks, unless nobody wants to see it.
fn bar_of_blocks(is_quiet: bool) -> ProgressBar {
    let bar = if is_quiet {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(0)
    };
    bar.with_style(
        ProgressStyle::with_template("{wide_bar} {pos}/{len} blocks {eta}")
            .expect("the template is right"),
    )
}

/// Tells a bar how many blocks are done, and of how many.
fn told(bar: &ProgressBar) -> impl FnMut(u32, u32) {
    |done, total| {
        bar.set_length(total.into());
        bar.set_position(done.into());
    }
}

fn refuse_same(from: &Path, to: &Path) -> Result<(), Failure> {
    let identity = |path: &Path| {
        fs::metadata(path)
            .map(|found| (found.dev(), found.ino()))
            .ok()
    };
    let same = identity(from).is_some_and(|source| Some(source) == identity(to));
    if same {
        Err(Failure::Same {
            from: from.to_owned(),
            to: to.to_owned(),
        })
    } else {
        Ok(())
    }
}

/// From now on a signal that would end the program sets this instead, so that what was
/// begun can be removed.
fn stop_on_signals() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(Failure::Signals)?;
    }
    Ok(stop)
}

/// Bytes that are put out at a time: a map may have gigabytes.
const OUTPUT_BYTES: usize = 64 << 10;

fn output() -> BufWriter<io::StdoutLock<'static>> {
    BufWriter::with_capacity(OUTPUT_BYTES, io::stdout().lock())
}

fn done(mut out: impl Write, code: ExitCode) -> Result<ExitCode, Failure> {
    out.flush()?;
    Ok(code)
}
