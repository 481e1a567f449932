//! `vdi commit`: merges a child into its parent.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use vdi_core::commit::{self, Merged};
use vdi_core::{Access, HostFile, Locking, Storage};

use crate::args::CommitArgs;
use crate::commands::{
    Failure, bar_of_blocks, chain_options, done, find_files, modified_parent, output, told,
};

pub(super) fn commit(args: &CommitArgs) -> Result<ExitCode, Failure> {
    let files = writable_parent(args)?;
    let parent = files[1].path().to_owned();
    let chain: Vec<Arc<dyn Storage>> = files
        .into_iter()
        .map(|file| Arc::new(file) as Arc<dyn Storage>)
        .collect();
    let bar = bar_of_blocks(args.quiet);
    let merged = commit::commit(&chain, modified_parent(&args.chain), &mut told(&bar));
    bar.finish_and_clear();
    let merged = merged.map_err(|source| Failure::Commit {
        path: args.file.clone(),
        source,
    })?;
    let mut out = output();
    if !args.quiet {
        let Merged {
            blocks_written,
            blocks_zeroed,
            grown_to,
        } = merged;
        let (child, parent) = (args.file.display(), parent.display());
        writeln!(
            out,
            "{child} is merged into {parent}: {blocks_written} blocks written, {blocks_zeroed} made zeros"
        )?;
        if let Some(to) = grown_to {
            writeln!(out, "{parent} has grown to {} bytes", to.bytes())?;
        }
        writeln!(out, "{child} is an empty child of it now")?;
        if (blocks_written, blocks_zeroed) != (0, 0) {
            writeln!(out, "other children of {parent} are invalid now")?;
        }
    }
    done(out, ExitCode::SUCCESS)
}

/// The files of the chain, of which the first two can be written.
fn writable_parent(args: &CommitArgs) -> Result<Vec<HostFile>, Failure> {
    let options = chain_options(&args.chain, Locking::Locked);
    let mut files = find_files(&args.file, Access::Writable, &options)?;
    if files.len() < 2 {
        return Err(Failure::NoParent {
            path: args.file.clone(),
        });
    }
    let parent = files[1].path().to_owned();
    // The parents' locks go, since they are asked for anew; the child's stays.
    files.truncate(1);
    files.extend(find_files(&parent, Access::Writable, &options)?);
    Ok(files)
}
