//! `vdi info`: an image as it is by itself, or with its parents.

use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::sync::Arc;

use vdi_core::{Access, HostFile, Image, ImageKind, find_parent};

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
    match (args.json, looked.as_slice()) {
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
            let looked = Looked::new(&path, &image, metadata.len(), on_host_bytes);
            Ok((image, looked))
        }
        Err(source) => Err(Failure::Open { path, source }),
    }
}

/// Looks at an image and all its parents, whose links are judged but not insisted on.
fn look_at_chain(args: &InfoArgs) -> Result<Vec<Looked>, Failure> {
    let options = chain_options(&args.open.chain, locking(&args.open));
    let modified = modified_parent(&args.open.chain);
    let mut child: Option<(Image, Looked)> = None;
    let mut chain = Vec::new();
    for file in find_files(&args.file, Access::ReadOnly, &options)? {
        let path = file.path().to_owned();
        let parent = look_at(file)?;
        if let Some((image, mut looked)) = child.take() {
            looked.parent_is(&path);
            if let Err(error) = image.check_parent(&parent.0, modified) {
                looked.warn(&error);
            }
            chain.push(looked);
        }
        child = Some(parent);
    }
    chain.extend(child.map(|(_, looked)| looked));
    Ok(chain)
}
