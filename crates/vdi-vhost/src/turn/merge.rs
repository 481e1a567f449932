//! Merging what lies under a disk into its parent, while the disk is used (`vdi_core::commit::live`).
//!
//! ```text
//! vm.vdi ─► parent                          at first
//! vm.vdi ─► vm.vdi.merging ─► parent        frozen: the guest writes to a new child; the parent gets what was frozen
//! vm.vdi ─► parent                          skipped, and removed or kept (`kept`)
//! ```
//!
//! The name in the middle says what is left of a merge that was ended: the next one goes on with it, unless the disk was frozen in between: then the
//! image in the middle is one of the disk's like any other, and the next merge takes another name (`vm.vdi.merging-2`). The parent is claimed meanwhile:
//! its lock excludes everybody else, readers too.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdi_core::commit::{CommitError, live};
use vdi_core::disk::MOST_IMAGES;
use vdi_core::rebase::{RebaseError, rebase_unsafe};
use vdi_core::{Access, Disk, FileError, HostFile, Locking, OpenError, Storage, WriteError};

use super::{Files, Opened, SnapshotError, Turn, TurnError, kept};
use crate::parents::{Identity, Parent, ParentError, identity};

/// What the name of an image ends with that is being merged.
const SUFFIX: &str = ".merging";

/// A merge that can begin.
#[derive(Debug)]
pub(crate) struct Merge {
    chain: Vec<Arc<dyn Storage>>,
    modified: vdi_core::disk::ModifiedParent,
    /// How much a block of what is merged holds.
    pub(crate) block_bytes: u32,
}

/// Why nothing is merged, or was not to its end. The disk reads as before.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MergeError {
    #[error("the disk is served read-only")]
    ReadOnly,
    #[error("the image is not open here")]
    NotHeld,
    #[error("the image has no parent to be merged into")]
    NoParent,
    #[error("the parent is used by {users} too, which would see it change")]
    Shared { users: String },
    #[error("the parent {} is used by another disk or program, which would see it change", path.display())]
    InUse { path: PathBuf },
    #[error("the parent cannot be written; its directory must be one of `image-dirs`")]
    NotWritable(#[source] FileError),
    #[error(
        "{} is there and no part of this disk that is being merged; move it away",
        path.display()
    )]
    Leftover { path: PathBuf },
    #[error(transparent)]
    Merge(#[from] CommitError),
    #[error(transparent)]
    Freeze(#[from] SnapshotError),
    #[error("cannot make the disk durable")]
    Flush(#[from] WriteError),
    #[error("cannot open the parent again")]
    Reopen(#[from] FileError),
    #[error("cannot use the parent")]
    Parent(#[from] ParentError),
    #[error("cannot use the parent's chain")]
    Chain(#[from] OpenError),
    #[error("cannot make the parent the disk's own")]
    Skip(#[from] RebaseError),
    #[error("cannot look at or lock a file")]
    Host(#[from] std::io::Error),
}

impl Merge {
    /// Does it; whether it came to its end. `progress` is told blocks done, and of how many, and says whether to go on.
    pub(crate) fn run(
        self,
        progress: &mut dyn FnMut(u32, u32) -> ControlFlow<()>,
    ) -> Result<bool, CommitError> {
        Ok(live::merge(&self.chain, self.modified, progress)?.is_some())
    }
}

impl Turn {
    /// The name of what is frozen to be merged, or of what was, if that was not merged to its end.
    pub(crate) fn merging_name(&self) -> Result<PathBuf, MergeError> {
        let held = self.held.as_ref().ok_or(MergeError::NotHeld)?;
        Ok(self.merging_name_of(&held.files))
    }

    /// The first name that no image has on which others of the disk's parents are built.
    fn merging_name_of(&self, files: &Files) -> PathBuf {
        let image = &self.opening.disk.image;
        let named = |nth| numbered(image, SUFFIX, nth);
        let deeper = files.parents.iter().skip(1);
        let deeper: Vec<_> = deeper.filter_map(|one| identity(one.file()).ok()).collect();
        let is_free = |name: &PathBuf| identity_of(name).is_none_or(|one| !deeper.contains(&one));
        let mut names = (1..=MOST_IMAGES).map(named);
        // There are fewer parents than names.
        names.find(is_free).unwrap_or_else(|| named(1))
    }

    /// Whether a merge was begun before, and ended before its end.
    pub(crate) fn has_unfinished_merge(&self) -> bool {
        let held = self.held.as_ref();
        held.is_some_and(|held| self.is_unfinished(&held.files))
    }

    fn is_unfinished(&self, files: &Files) -> bool {
        let [frozen, _, ..] = &files.parents[..] else {
            return false;
        };
        let named = identity_of(&self.merging_name_of(files));
        live::loose_parent(frozen.image.header()).is_some()
            && named.is_some()
            && identity(frozen.file()).ok() == named
    }

    fn target<'f>(&self, files: &'f Files) -> Option<&'f Arc<Parent>> {
        files.parents.get(usize::from(self.is_unfinished(files)))
    }

    /// Which file would be merged into.
    pub(crate) fn merge_target(&self) -> Result<Identity, MergeError> {
        if self.opening.disk.access == Access::ReadOnly {
            return Err(MergeError::ReadOnly);
        }
        let held = self.held.as_ref().ok_or(MergeError::NotHeld)?;
        let target = self.target(&held.files).ok_or(MergeError::NoParent)?;
        Ok(identity(target.file())?)
    }

    /// Whether a file is one of the disk's, now or when it is opened next.
    pub(crate) fn uses(&self, file: Identity) -> bool {
        if let Some(held) = &self.held {
            let parents = held.files.parents.iter().map(|parent| parent.file());
            let mut all = parents.chain(std::iter::once(&*held.files.top));
            return all.any(|one| identity(one).is_ok_and(|one| one == file));
        }
        // One that cannot be found now cannot be used either.
        let chain = self.opening.find(Access::ReadOnly, Locking::ForceShare);
        let is_it = |one: &HostFile| identity(one).is_ok_and(|one| one == file);
        chain.is_ok_and(|chain| chain.iter().any(is_it))
    }

    /// Excludes everybody else from the parent, and opens it for writing.
    pub(crate) fn claim(&self) -> Result<HostFile, MergeError> {
        let held = self.held.as_ref().ok_or(MergeError::NotHeld)?;
        let target = self.target(&held.files).ok_or(MergeError::NoParent)?;
        let child = match self.is_unfinished(&held.files) {
            true => held.files.parents[0].image.header(),
            false => held.disk.header(),
        };
        live::check(child, &target.image)?;
        let path = target.file().path().to_owned();
        // It is locked as what it is already.
        let writable = HostFile::open(&path, Access::Writable, Locking::ForceShare);
        let writable = writable.map_err(MergeError::NotWritable)?;
        let is_shared = Arc::strong_count(target) > 1;
        if is_shared || identity(&writable)? != identity(target.file())? {
            return Err(MergeError::InUse { path });
        }
        if !target.file().exclude_others()? {
            return Err(MergeError::InUse { path });
        }
        HostFile::lock_too(writable.file(), Access::Writable)?;
        Ok(writable)
    }

    /// Ends a claim: others may read the parent.
    pub(crate) fn end_claim(&self) {
        let held = self.held.as_ref();
        let target = held.and_then(|held| self.target(&held.files));
        if let Some(Err(error)) = target.map(|target| target.file().keep_reading()) {
            tracing::warn!("a parent stays locked for writing: {error}");
        }
    }

    /// Removes what a merge left that was ended after it had done all but that.
    ///
    /// Its contents are in the parent: the disk is a child of the parent as the merge left it, or it would not have opened.
    pub(crate) fn clear_spent(&self) -> Result<(), MergeError> {
        let path = self.merging_name()?;
        let Some(found) = identity_of(&path) else {
            return Ok(());
        };
        let held = self.held.as_ref().ok_or(MergeError::NotHeld)?;
        // The disk's own image has both names: its freezing was ended halfway.
        if found == identity(&held.files.top)? {
            return Ok(());
        }
        match held.files.parents.first() {
            Some(parent) if kept::is_spent(&path, parent.image.header()) => {
                Ok(std::fs::remove_file(path)?)
            }
            Some(_) | None => Err(MergeError::Leftover { path }),
        }
    }

    /// The merge of what is frozen into the parent, which is claimed.
    pub(crate) fn merge(&self, parent: HostFile) -> Result<Merge, MergeError> {
        let held = self.held.as_ref().ok_or(MergeError::NotHeld)?;
        let [frozen, _, rest @ ..] = &held.files.parents[..] else {
            return Err(MergeError::NoParent);
        };
        let mut chain = vec![frozen.storage(), Arc::new(parent) as Arc<dyn Storage>];
        chain.extend(rest.iter().map(|parent| parent.storage()));
        Ok(Merge {
            chain,
            modified: self.opening.disk.modified,
            block_bytes: frozen.image.header().block_size().bytes(),
        })
    }

    /// Gives what was merged a name to be kept under, before the disk does without it.
    pub(crate) fn name_kept(&self) -> Result<PathBuf, MergeError> {
        Ok(kept::name(&self.opening.disk.image, &self.merging_name()?)?)
    }

    /// Makes the parent that has all now the disk's own, and removes what was frozen, but for the name that it is to be kept under. The disk must
    /// be held, and nobody may be at work with it. What is returned is to be served from now on.
    pub(crate) fn skip_merged(
        &mut self,
        kept: Option<&Path>,
    ) -> Result<(Opened, Result<(), MergeError>), TurnError> {
        let (mut fresh, mut is_changed) = (None, false);
        let (mut files, skipped) = self.change(|turn, disk, files| {
            is_changed = disk.is_changed();
            fresh = Some(turn.skip(disk, files)?);
            Ok::<_, MergeError>(())
        })?;
        self.is_untidy |= is_changed;
        if let Some(fresh) = fresh {
            let merged = self.merging_name_of(&files);
            files.parents.splice(..2, [Arc::clone(&fresh)]);
            self.opening.disk.parents.retain(|path| *path != merged);
            let settled = kept.map(|kept| kept::settle(kept, fresh.image.header()));
            if let Some(Err(error)) = settled {
                let error = crate::chain_of(&error);
                tracing::warn!(
                    "{} takes its parent in any state: {error}",
                    merged.display()
                );
            }
            if let Err(error) = std::fs::remove_file(&merged) {
                tracing::warn!("{} is not needed any more: {error}", merged.display());
            }
        }
        Ok((self.hold(files)?, skipped))
    }

    fn skip(&self, disk: &Disk, files: &Files) -> Result<Arc<Parent>, MergeError> {
        let [_, target, rest @ ..] = &files.parents[..] else {
            return Err(MergeError::NoParent);
        };
        disk.flush()?;
        target.file().keep_reading()?;
        let file = HostFile::open(target.file().path(), Access::ReadOnly, Locking::Locked)?;
        let fresh = self.opening.parents.renew(file)?;
        let behind: Vec<_> = rest.iter().map(|one| Arc::clone(&one.image)).collect();
        let (access, modified) = (Access::ReadOnly, self.opening.disk.modified);
        let parent = Disk::open_over(fresh.storage(), access, &behind, modified)?;
        rebase_unsafe(&*files.top, &parent)?;
        Ok(fresh)
    }
}

fn identity_of(path: &Path) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// The `nth` name of its kind beside an image.
pub(super) fn numbered(image: &Path, suffix: &str, nth: usize) -> PathBuf {
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    if nth > 1 {
        name.push(format!("-{nth}"));
    }
    image.with_file_name(name)
}
