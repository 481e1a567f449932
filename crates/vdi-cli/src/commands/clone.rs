//! `vdi clone`: a child of an image, or a copy of its whole chain.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vdi_core::convert::End;
use vdi_core::{Access, CreateOptions, Disk, HostFile, Locking, clone};

use crate::args::CloneArgs;
use crate::commands::convert::{Copying, copy, create_image};
use crate::commands::{Failure, existing, open_chain, refuse_same, stop_on_signals};
use crate::new_file::NewFile;

pub(super) fn clone(args: &CloneArgs) -> Result<ExitCode, Failure> {
    let stop = stop_on_signals()?;
    let source = open_chain(&args.source, Access::ReadOnly, &args.chain, Locking::Locked)?;
    refuse_same(&args.source, &args.destination)?;
    let options = if args.linked {
        clone::linked(&source, args.block_size).map_err(|error| Failure::Clone {
            path: args.source.clone(),
            source: error,
        })?
    } else {
        clone::full(&source)
    };
    let new = NewFile::beside(&args.destination, existing(args.force))?;
    if args.linked {
        create(args, &new, &options)?;
    } else {
        fill(args, &new, &options, &source, &stop)?;
    }
    if stop.load(Ordering::Relaxed) {
        return Err(Failure::Interrupted);
    }
    new.publish()?;
    Ok(ExitCode::SUCCESS)
}

fn create(args: &CloneArgs, new: &NewFile, options: &CreateOptions) -> Result<(), Failure> {
    vdi_core::create(new.path(), options).map_err(|source| Failure::Create {
        path: args.destination.clone(),
        source,
    })
}

fn fill(
    args: &CloneArgs,
    new: &NewFile,
    options: &CreateOptions,
    source: &Arc<Disk>,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    let copying = Copying {
        from: &args.source,
        to: &args.destination,
        options: args.copying.options(),
        is_quiet: args.quiet,
    };
    let from = End::Image(Arc::clone(source));
    let to = create_image(&args.destination, new.path(), options)?;
    copy(&copying, &from, to, stop)?;
    let file = HostFile::open(new.path(), Access::Writable, Locking::Locked)?;
    clone::describe_as(&file, source.header()).map_err(|source| Failure::Describe {
        path: args.destination.clone(),
        source,
    })
}
