//! `vdi snapshot`: a child of an image.

use std::process::ExitCode;
use std::sync::Arc;

use vdi_core::{Access, HostFile, Image, Locking, create_child};

use super::{Failure, refuse_same};
use crate::args::SnapshotArgs;
use crate::new_file::{Existing, NewFile};

pub(super) fn run(args: &SnapshotArgs) -> Result<ExitCode, Failure> {
    refuse_same(&args.base, &args.child)?;
    // Its locks are kept to the end: who writes to the base would modify it under the child.
    let file =
        HostFile::open(&args.base, Access::ReadOnly, Locking::Locked).map_err(Failure::File)?;
    let base = Image::examine(Arc::new(file)).map_err(|source| Failure::Open {
        path: args.base.clone(),
        source,
    })?;
    let new = NewFile::beside(&args.child, Existing::KeepAlways)?;
    let block_size = args
        .block_size
        .unwrap_or(vdi_core::create::DEFAULT_BLOCK_SIZE);
    create_child(new.path(), base.header(), block_size, args.uuid).map_err(|source| {
        Failure::Create {
            path: args.child.clone(),
            source,
        }
    })?;
    new.publish()?;
    Ok(ExitCode::SUCCESS)
}
