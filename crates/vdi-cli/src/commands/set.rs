//! `vdi set`: fields of the header.

use std::process::ExitCode;

use vdi_core::set::{self, Fields};
use vdi_core::{Access, HostFile, Locking};

use super::Failure;
use crate::args::SetArgs;

pub(super) fn run(args: &SetArgs) -> Result<ExitCode, Failure> {
    let file = HostFile::open(&args.file, Access::Writable, Locking::Locked)?;
    let fields = Fields {
        comment: args.comment.clone(),
        uuid_image: args.uuid_image,
        uuid_modify: args.uuid_modify,
        lchs: args.lchs,
    };
    set::set(&file, &fields).map_err(|source| Failure::Set {
        path: args.file.clone(),
        source,
    })?;
    Ok(ExitCode::SUCCESS)
}
