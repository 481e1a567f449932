//! What is wrong between the images of a chain.
//!
//! Only headers are read. An image whose parent is not found is no worse for it: the file may
//! be elsewhere, so that is a note. A parent that the user named and that is none, one
//! that was modified, and a loop are corruption: the disk cannot be read, or not rightly.

use std::path::{Path, PathBuf};

use super::{Finding, Report};
use crate::chain::{ChainError, ChainOptions, find_parent};
use crate::disk::MOST_IMAGES;
use crate::format::{self, RawHeader};
use crate::storage::{Access, HostFile};

/// Looks for the parents of the image at `path` and adds what is wrong with them.
///
/// # Errors
/// If a file cannot be read, or is in use by a writer.
pub fn check_parents(
    path: &Path,
    options: &ChainOptions,
    report: &mut Report,
) -> Result<(), ChainError> {
    let mut chain = vec![Member::open(path, options)?];
    while let Some(parent) = find_next(&chain, options, report)? {
        let parent = Member::open(&parent, options)?;
        let child = chain.last().expect("it begins with one");
        let known = child.header.uuid_parent_modify.get();
        let found = parent.header.uuid_modify.get();
        if !known.is_nil() && known != found {
            report.add(Finding::ParentModified {
                child: child.path.clone(),
                parent: parent.path.clone(),
                known,
                found,
            });
        }
        chain.push(parent);
    }
    // A file that was named as a parent has to be one.
    for path in &options.parents {
        let named = Member::open(path, options)?;
        let found = named.header.uuid_image.get();
        let mut ours = chain
            .iter()
            .flat_map(|one| [one.header.uuid_image.get(), one.header.uuid_parent.get()]);
        if !ours.any(|uuid| uuid == found) {
            let path = path.clone();
            report.add(Finding::WrongParent { path, found });
        }
    }
    Ok(())
}

struct Member {
    path: PathBuf,
    header: RawHeader,
}

impl Member {
    fn open(path: &Path, options: &ChainOptions) -> Result<Self, ChainError> {
        let path = path.to_owned();
        let file = HostFile::open(&path, Access::ReadOnly, options.locking)?;
        match RawHeader::read(&file) {
            Ok(header) => Ok(Self { path, header }),
            Err(source) => Err(ChainError::Header { path, source }),
        }
    }
}

/// The file of the last image's parent, if it has one and that is not a finding.
fn find_next(
    chain: &[Member],
    options: &ChainOptions,
    report: &mut Report,
) -> Result<Option<PathBuf>, ChainError> {
    let last = chain.last().expect("it begins with one");
    let parent = last.header.uuid_parent.get();
    // A fixed image has no parent; that it names one is a finding already.
    let is_fixed = last.header.image_type.get() == format::TYPE_FIXED;
    if !last.header.is_vdi() || parent.is_nil() || is_fixed {
        return Ok(None);
    }
    let child = last.path.clone();
    let finding = if chain
        .iter()
        .any(|one| one.header.uuid_image.get() == parent)
    {
        Finding::ParentLoop { child, parent }
    } else if chain.len() == MOST_IMAGES {
        Finding::ChainTooLong { most: MOST_IMAGES }
    } else {
        match find_parent(&last.path, parent, options) {
            Ok(found) => return Ok(Some(found)),
            Err(ChainError::Missing { child, parent, .. }) => {
                Finding::ParentMissing { child, parent }
            }
            Err(ChainError::Ambiguous {
                parent,
                first,
                second,
            }) => Finding::ParentAmbiguous {
                parent,
                first,
                second,
            },
            Err(error) => return Err(error),
        }
    };
    report.add(finding);
    Ok(None)
}
