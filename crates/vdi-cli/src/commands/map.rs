//! `vdi map`: where the data of a disk are.

use std::path::PathBuf;
use std::process::ExitCode;

use vdi_core::Access;

use super::{
    Failure, chain_options, done, find_files, locking, modified_parent, open_files, output,
};
use crate::args::MapArgs;
use crate::report;

pub(super) fn run(args: &MapArgs) -> Result<ExitCode, Failure> {
    let chain = &args.open.chain;
    let options = chain_options(chain, locking(&args.open));
    let files = find_files(&args.file, Access::ReadOnly, &options)?;
    let paths: Vec<PathBuf> = files.iter().map(|file| file.path().to_owned()).collect();
    let disk = open_files(&args.file, files, Access::ReadOnly, modified_parent(chain))?;
    let visit = disk.lane().enter();
    let mut out = output();
    let extents = disk.map(disk.capacity().whole(), &visit);
    if args.json {
        report::map_json(&mut out, extents, &paths)?;
    } else {
        report::map(&mut out, extents, &paths)?;
    }
    done(out, ExitCode::SUCCESS)
}
