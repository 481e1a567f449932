//! Merges of what a disk holds into its parent, as a front end and an operator see them: when they may begin, and what ends them.
//!
//! Not here: what becomes of the files (`turn::merge`), the thread that does the work (`jobs`).

use std::path::PathBuf;
use std::sync::Arc;

use vdi_core::commit::CommitError;

use super::{Backend, ControlError};
use crate::jobs::{End, Job};
use crate::parents::Identity;
use crate::turn::Purpose;
use crate::turn::kept::Spent;
use crate::turn::merge::{Merge, MergeError};

/// A merge that is under way.
pub(super) struct Merging {
    job: Arc<Job>,
    /// The image is open for that alone.
    lets_go: bool,
}

impl Backend {
    /// Which file the disk would be merged into.
    pub(crate) fn merge_target(&mut self) -> Result<Identity, ControlError> {
        let was_held = self.is_open();
        if !was_held {
            self.begin_turn().map_err(ControlError::Open)?;
        }
        let target = self.turn.merge_target();
        self.let_go_if(!was_held);
        Ok(target?)
    }

    /// Whether a file is one of the disk's.
    pub(crate) fn uses(&self, file: Identity) -> bool {
        self.turn.uses(file)
    }

    /// Freezes what the disk holds, to be merged into its parent, which nobody else may use; or takes up where an earlier merge
    /// was ended.
    pub(crate) fn begin_merge(&mut self, job: &Arc<Job>) -> Result<Merge, ControlError> {
        let lets_go = !self.is_open();
        if lets_go {
            self.begin_turn().map_err(ControlError::Open)?;
        }
        let merge = self.freeze_to_merge();
        match merge {
            Ok(_) => {
                let job = Arc::clone(job);
                self.merging = Some(Merging { job, lets_go });
            }
            Err(_) => {
                self.turn.end_claim();
                self.let_go_if(lets_go);
            }
        }
        merge
    }

    fn freeze_to_merge(&mut self) -> Result<Merge, ControlError> {
        let parent = self.turn.claim()?;
        if !self.turn.has_unfinished_merge() {
            self.turn.clear_spent()?;
            let to = self.turn.merging_name()?;
            let frozen = self.while_suspended(|turn| turn.snapshot(&to, Purpose::Merge))?;
            frozen.map_err(MergeError::from)?;
        }
        Ok(self.turn.merge(parent)?)
    }

    /// Ends a merge, which was done or not: with the parent as the disk's own, or with all as it is.
    pub(crate) fn end_merge(&mut self, job: &Job, merged: Result<bool, CommitError>) -> End {
        let merging = self.merging.take();
        let failed = |error: &dyn std::error::Error| End::Failed(crate::chain_of(error));
        let end = match merged {
            Err(error) => failed(&error),
            Ok(done) if !done || job.is_cancelled() || !self.is_open() => End::Cancelled,
            Ok(_) => match self.skip_merged(job.spent()) {
                Ok(kept) => End::Done { kept },
                Err(error) => failed(&error),
            },
        };
        self.turn.end_claim();
        self.let_go_if(merging.is_some_and(|merging| merging.lets_go));
        end
    }

    /// Has the disk do without what was merged; where that is now, if it is to be kept.
    fn skip_merged(&mut self, spent: Spent) -> Result<Option<PathBuf>, ControlError> {
        let kept = match spent {
            Spent::Keep => Some(self.turn.name_kept()?),
            Spent::Remove => None,
        };
        let skipped = self.while_suspended(|turn| turn.skip_merged(kept.as_deref()));
        let skipped = skipped.and_then(|skipped| Ok(skipped?));
        if let (Err(_), Some(kept)) = (&skipped, &kept) {
            // It has its first name still, and the disk may need it.
            let _ = std::fs::remove_file(kept);
        }
        skipped.map(|()| kept)
    }

    /// Ends a merge when the image is about to be let go of. What it has done stays.
    pub(super) fn abandon_merge(&mut self) {
        if let Some(merging) = self.merging.take() {
            merging.job.cancel();
            merging.job.wait_until_merged();
        }
    }
}
