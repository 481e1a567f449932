//! `vdi rebase` and `vdi flatten`: give a child another parent, or none.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use vdi_core::rebase::{self, Copied, RebaseError};
use vdi_core::{Access, Disk, HostFile, Locking};

use crate::args::{ChainArgs, FlattenArgs, RebaseArgs};
use crate::commands::{Failure, bar_of_blocks, done, open_chain, output, told};

pub(super) fn flatten(args: &FlattenArgs) -> Result<ExitCode, Failure> {
    flatten_file(&args.file, &args.chain, args.quiet)
}

pub(super) fn rebase(args: &RebaseArgs) -> Result<ExitCode, Failure> {
    let path = &args.file;
    if args.new_parent.is_empty() {
        if args.is_unsafe {
            return Err(Failure::UnsafeFlatten);
        }
        return flatten_file(path, &args.chain, args.quiet);
    }
    let parent = open_chain(
        Path::new(&args.new_parent),
        Access::ReadOnly,
        &args.chain,
        Locking::Locked,
    )?;
    refuse_loop(path, &parent)?;
    let mut out = output();
    if args.is_unsafe {
        let child = HostFile::open(path, Access::Writable, Locking::Locked)?;
        rebase::rebase_unsafe(&child, &parent).map_err(|source| failure(path, source))?;
        if !args.quiet {
            writeln!(
                out,
                "{} has a new parent; nothing was copied",
                path.display()
            )?;
        }
        return done(out, ExitCode::SUCCESS);
    }
    let child = open_chain(path, Access::Writable, &args.chain, Locking::Locked)?;
    let bar = bar_of_blocks(args.quiet);
    let copied = rebase::rebase(&child, &parent, &mut told(&bar));
    bar.finish_and_clear();
    let Copied {
        blocks_copied,
        blocks_zeroed,
    } = copied.map_err(|source| failure(path, source))?;
    if !args.quiet {
        writeln!(
            out,
            "{} has a new parent: {blocks_copied} blocks copied from the old one, {blocks_zeroed} made zeros",
            path.display()
        )?;
    }
    done(out, ExitCode::SUCCESS)
}

fn flatten_file(path: &Path, chain: &ChainArgs, is_quiet: bool) -> Result<ExitCode, Failure> {
    let child = open_chain(path, Access::Writable, chain, Locking::Locked)?;
    let bar = bar_of_blocks(is_quiet);
    let copied = rebase::flatten(&child, &mut told(&bar));
    bar.finish_and_clear();
    let copied = copied.map_err(|source| failure(path, source))?;
    let mut out = output();
    if !is_quiet {
        let blocks = copied.blocks_copied;
        writeln!(
            out,
            "{} has no parent any more: {blocks} blocks copied",
            path.display()
        )?;
    }
    done(out, ExitCode::SUCCESS)
}

/// Before the child is opened for writing, which the locks of a loop would forbid for a reason that
/// misleads.
fn refuse_loop(path: &Path, parent: &Disk) -> Result<(), Failure> {
    let child = HostFile::open(path, Access::ReadOnly, Locking::ForceShare)?;
    rebase::check_ancestry(&child, parent).map_err(|source| failure(path, source))
}

fn failure(path: &Path, source: RebaseError) -> Failure {
    Failure::Rebase {
        path: path.to_owned(),
        source,
    }
}
