//! What operators began that takes its time: merges of images into their parents. They can be watched and cancelled, and there is one
//! at a time, since all of them want the same storage that guests wait for.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use vdi_core::commit::CommitError;

use crate::backend::ControlError;
use crate::berth::Berth;
use crate::fleet::{Fleet, FleetError};
use crate::turn::kept::Spent;
use crate::turn::merge::{Merge, MergeError};

/// Most users of a parent that are named.
const MOST_NAMED: usize = 5;

/// The longest rest after a piece of work.
const LONGEST_REST: Duration = Duration::from_millis(200);

/// How long `cancel` waits for the end of a job: a piece of work and its syncs.
const CANCEL_TIME: Duration = Duration::from_secs(60);

/// Why a job failed of which nothing else is known. (A release build ends with the thread.)
const PANICKED: &str = "the thread that merged panicked; the log says why";

/// The last job of each disk.
#[derive(Debug, Default)]
pub(crate) struct Jobs(Mutex<Vec<Arc<Job>>>);

/// One merge.
#[derive(Debug)]
pub(crate) struct Job {
    disk: String,
    spent: Spent,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    is_cancelled: AtomicBool,
    phase: Mutex<Phase>,
    changed: Condvar,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// The parent is written, and the images are open for that.
    Merging,
    /// They are closed.
    Merged,
    Over(End),
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Done {
        /// Where what was merged is, if it was kept.
        kept: Option<PathBuf>,
    },
    Cancelled,
    Failed(String),
}

/// What operators see of a job.
#[derive(Debug, Serialize)]
pub(crate) struct JobInfo {
    disk: String,
    command: &'static str,
    state: &'static str,
    done_bytes: u64,
    total_bytes: u64,
    /// Where what was merged is, if it was kept.
    kept: Option<PathBuf>,
    /// Why it failed.
    error: Option<String>,
}

/// Why there is no such job.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JobError {
    #[error(transparent)]
    Fleet(#[from] FleetError),
    #[error(transparent)]
    Disk(#[from] ControlError),
    #[error("a merge is under way for the disk {disk}; there is one at a time")]
    Busy { disk: String },
    #[error("nothing was begun for the disk {disk}")]
    None { disk: String },
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

impl Jobs {
    fn begin(&self, disk: &str, spent: Spent) -> Result<Arc<Job>, JobError> {
        let mut all = self.lock();
        if let Some(job) = all.iter().find(|job| !job.is_over()) {
            let disk = job.disk.clone();
            return Err(JobError::Busy { disk });
        }
        let job = Arc::new(Job {
            disk: disk.to_owned(),
            spent,
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            is_cancelled: AtomicBool::new(false),
            phase: Mutex::new(Phase::Merging),
            changed: Condvar::new(),
        });
        all.retain(|job| job.disk != disk);
        all.push(Arc::clone(&job));
        Ok(job)
    }

    fn forget(&self, job: &Arc<Job>) {
        self.lock().retain(|one| !Arc::ptr_eq(one, job));
    }

    /// All of them.
    pub(crate) fn list(&self) -> Vec<JobInfo> {
        self.lock().iter().map(|job| job.info()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Job>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Job {
    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        matches!(*self.lock(), Phase::Over(_))
    }

    /// What becomes of what is merged.
    pub(crate) const fn spent(&self) -> Spent {
        self.spent
    }

    /// Whether it is to end.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Acquire)
    }

    /// Has it end soon.
    pub(crate) fn cancel(&self) {
        let phase = self.lock();
        self.is_cancelled.store(true, Ordering::Release);
        drop(phase);
        self.changed.notify_all();
    }

    /// Waits until it has no image open any more.
    pub(crate) fn wait_until_merged(&self) {
        let merges = |phase: &mut Phase| *phase == Phase::Merging;
        drop(self.changed.wait_while(self.lock(), merges));
    }

    /// Waits until it is over, so long at most.
    fn wait_until_over(&self, most: Duration) {
        let goes_on = |phase: &mut Phase| !matches!(phase, Phase::Over(_));
        drop(self.changed.wait_timeout_while(self.lock(), most, goes_on));
    }

    fn enter(&self, phase: Phase) {
        *self.lock() = phase;
        self.changed.notify_all();
    }

    /// Rests as long as the last piece took, so that guests have half of the storage at least; whether to go on.
    fn rest(&self, worked: Duration) -> ControlFlow<()> {
        let phase = self.lock();
        let stays = |_: &mut Phase| !self.is_cancelled();
        let rested = self
            .changed
            .wait_timeout_while(phase, worked.min(LONGEST_REST), stays);
        drop(rested);
        match self.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Does the work and ends it; whatever panics, it is over then.
    fn conduct(
        &self,
        merge: impl FnOnce() -> Result<bool, CommitError>,
        end: impl FnOnce(Result<bool, CommitError>) -> End,
    ) {
        let merged = catch_unwind(AssertUnwindSafe(merge));
        self.enter(Phase::Merged);
        let has_panicked = merged.is_err();
        // What it has done stays, as if it was cancelled.
        let end = catch_unwind(AssertUnwindSafe(|| end(merged.unwrap_or(Ok(false)))));
        let end = end.ok().filter(|_| !has_panicked);
        let end = end.unwrap_or_else(|| End::Failed(PANICKED.to_owned()));
        match &end {
            End::Done { .. } => tracing::info!("{}: merged into its parent", self.disk),
            End::Cancelled => tracing::info!("{}: the merge was cancelled", self.disk),
            End::Failed(why) => tracing::error!("{}: the merge failed: {why}", self.disk),
        }
        self.enter(Phase::Over(end));
    }

    fn merge(&self, merge: Merge) -> Result<bool, CommitError> {
        let block_bytes = u64::from(merge.block_bytes);
        let mut begun = Instant::now();
        merge.run(&mut |done, total| {
            let bytes = |blocks| u64::from(blocks) * block_bytes;
            self.total_bytes.store(bytes(total), Ordering::Relaxed);
            self.done_bytes.store(bytes(done), Ordering::Relaxed);
            let go_on = self.rest(begun.elapsed());
            begun = Instant::now();
            go_on
        })
    }

    fn info(&self) -> JobInfo {
        let (state, kept, error) = match &*self.lock() {
            Phase::Merging | Phase::Merged => ("running", None, None),
            Phase::Over(End::Done { kept }) => ("done", kept.clone(), None),
            Phase::Over(End::Cancelled) => ("cancelled", None, None),
            Phase::Over(End::Failed(why)) => ("failed", None, Some(why.clone())),
        };
        JobInfo {
            disk: self.disk.clone(),
            command: "commit",
            state,
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
            kept,
            error,
        }
    }
}

/// Begins to merge what a disk's image holds into its parent, while the guest goes on in a child of it.
pub(crate) fn commit(fleet: &Fleet, disk: Option<&str>, spent: Spent) -> Result<JobInfo, JobError> {
    let berth = fleet.find(disk)?;
    let job = fleet.jobs().begin(berth.name(), spent)?;
    let begun = begin(fleet, &berth, &job);
    if begun.is_err() {
        fleet.jobs().forget(&job);
    }
    begun.map(|()| job.info())
}

fn begin(fleet: &Fleet, berth: &Arc<Berth>, job: &Arc<Job>) -> Result<(), JobError> {
    refuse_sharers(fleet, berth)?;
    let merge = berth.lock().begin_merge(job)?;
    let (its, own) = (Arc::clone(berth), Arc::clone(job));
    let thread = thread::Builder::new().name("commit".to_owned());
    let started = thread.spawn(move || {
        own.conduct(
            || own.merge(merge),
            |merged| its.lock().end_merge(&own, merged),
        );
    });
    started.map(drop).map_err(|error| {
        job.cancel();
        job.enter(Phase::Merged);
        let _ = berth.lock().end_merge(job, Ok(false));
        JobError::Thread(error)
    })
}

/// Disks of this process that use the parent, be they open now or when their guest starts, would see it change.
fn refuse_sharers(fleet: &Fleet, berth: &Arc<Berth>) -> Result<(), JobError> {
    let target = berth.lock().merge_target()?;
    let others = fleet.list().into_iter();
    let others = others.filter(|other| !Arc::ptr_eq(other, berth));
    let users: Vec<_> = others.filter(|other| other.lock().uses(target)).collect();
    if users.is_empty() {
        return Ok(());
    }
    let named: Vec<_> = users
        .iter()
        .take(MOST_NAMED)
        .map(|user| user.name())
        .collect();
    let mut users_named = named.join(", ");
    if let more @ 1.. = users.len().saturating_sub(MOST_NAMED) {
        users_named += &format!(" and {more} others");
    }
    let shared = MergeError::Shared { users: users_named };
    Err(ControlError::from(shared).into())
}

/// Ends a disk's merge; what became of it. One that hangs in the storage is `running` still.
pub(crate) fn cancel(fleet: &Fleet, disk: Option<&str>) -> Result<JobInfo, JobError> {
    let berth = fleet.find(disk)?;
    let disk = berth.name().to_owned();
    let found = {
        let all = fleet.jobs().lock();
        all.iter().find(|job| job.disk == disk).cloned()
    };
    let job = found.ok_or(JobError::None { disk })?;
    job.cancel();
    job.wait_until_over(CANCEL_TIME);
    Ok(job.info())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn begun() -> (Jobs, Arc<Job>) {
        let jobs = Jobs::default();
        let job = jobs.begin("d", Spent::Remove).unwrap();
        let other = jobs.begin("e", Spent::Remove);
        assert!(matches!(other, Err(JobError::Busy { .. })));
        (jobs, job)
    }

    #[test]
    fn a_job_that_panics_has_failed_and_is_waited_for_no_longer() {
        for panics_in_the_work in [true, false] {
            let (jobs, job) = begun();
            let own = Arc::clone(&job);
            let mut was_ended = false;
            let thread = thread::spawn(move || {
                let merge = || match panics_in_the_work {
                    true => panic!("as a test wants it"),
                    false => Ok(true),
                };
                own.conduct(merge, |merged| {
                    was_ended = matches!(merged, Ok(false));
                    assert!(panics_in_the_work, "as a test wants it");
                    End::Cancelled
                });
                was_ended
            });
            job.cancel();
            job.wait_until_over(Duration::from_secs(10));
            let was_ended = thread.join().unwrap();
            job.wait_until_merged();
            assert_eq!(was_ended, panics_in_the_work, "it was not ended");
            let info = job.info();
            assert_eq!(
                (info.state, info.error.as_deref()),
                ("failed", Some(PANICKED))
            );
            assert!(jobs.begin("e", Spent::Remove).is_ok());
        }
    }

    #[test]
    fn a_job_that_hangs_is_not_waited_for_without_end() {
        let (_jobs, job) = begun();
        job.cancel();
        job.wait_until_over(Duration::from_millis(1));
        assert_eq!(job.info().state, "running");
    }
}
