//! `vdi info`: an image as it is by itself, or with its parents.

use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::sync::Arc;

use vdi_core::{Access, HostFile, Image, ImageKind, find_parent, layout};

use super::{
    Failure, chain_options, done, find_files, locking, modified_parent, open_file, output,
};
use crate::args::InfoArgs;
use crate::report::{self, Looked};

pub(super) fn run(args: &InfoArgs) -> Result<ExitCode, Failure> {
    let looked = if args.backing_chain {
        look_at_chain(args)?
    } else {
        let (image, mut looked) = look_at(open_file(&args.file, &args.open)?)?;
        if let ImageKind::Differencing(link) = image.header().kind() {
            let options = chain_options(&args.open.chain, locking(&args.open));
            match find_parent(&args.file, link.uuid_image, &options) {
                Ok(path) => looked.parent_is(&path),
                // It can be shown all the same.
                Err(error) => looked.warn(&error),
            }
        }
        vec![looked]
    };
    let mut out = output();
    match (args.output.is_json(), looked.as_slice()) {
        (true, [one]) if !args.backing_chain => report::json(&mut out, one)?,
        (true, chain) => report::json(&mut out, chain)?,
        (false, chain) => report::info(&mut out, chain)?,
    }
    done(out, ExitCode::SUCCESS)
}

/// Looks at one file of a disk.
fn look_at(file: HostFile) -> Result<(Image, Looked), Failure> {
    let path = file.path().to_owned();
    let metadata = match file.file().metadata() {
        Ok(metadata) => metadata,
        Err(source) => return Err(Failure::Look { path, source }),
    };
    match Image::examine(Arc::new(file)) {
        Ok(image) => {
            // st_blocks counts in units of 512 bytes whatever the file system's block is.
            let on_host_bytes = metadata.blocks() * 512;
            match Looked::new(&path, &image, metadata.len(), on_host_bytes) {
                Ok(looked) => Ok((image, looked)),
                Err(source) => Err(Failure::Look { path, source }),
            }
        }
        Err(source) => Err(Failure::Open { path, source }),
    }
}

/// Looks at an image and all its parents, whose links are judged but not insisted on.
fn look_at_chain(args: &InfoArgs) -> Result<Vec<Looked>, Failure> {
    let options = chain_options(&args.open.chain, locking(&args.open));
    let modified = modified_parent(&args.open.chain);
    let mut images: Vec<Arc<Image>> = Vec::new();
    let mut chain: Vec<Looked> = Vec::new();
    for file in find_files(&args.file, Access::ReadOnly, &options)? {
        let path = file.path().to_owned();
        let (image, looked) = look_at(file)?;
        if let (Some(child), Some(child_looked)) = (images.last(), chain.last_mut()) {
            child_looked.parent_is(&path);
            if let Err(error) = child.check_parent(&image, modified) {
                child_looked.warn(&error);
            }
        }
        images.push(Arc::new(image));
        chain.push(looked);
    }
    // Alone an image shows all that it has.
    if images.len() > 1 {
        for (looked, shown) in chain.iter_mut().zip(layout::shown(&images)) {
            looked.shows(shown);
        }
    }
    Ok(chain)
}
