//! A real file system for real programs, which the tests mount: it records all that is done to its files, and fails as it is told to.
//!
//! ```text
//! vdi-vhost, vdi, ... ─► kernel ─► /dev/fuse ─► Recorded ─► Contents     what the file is
//!                                                   ├─────► History ─► cuts: what it could be after a power cut
//!                                                   └─────► rules: what fails, is cut short or takes its time
//! ```
//!
//! One directory of regular files, in memory, which may have several names. The page cache is left out (`FOPEN_DIRECT_IO`), so every system call of a program arrives
//! as it was made, and reads see what the file holds now. An operation takes effect when it arrives, and has ended when
//! it is answered; a sync covers what had ended before it arrived. What happens to names is recorded as well, and synced by the directory.
//!
//! What it cannot show: the kernel holds a sync back while writes to the same file are under way, so a program that syncs before
//! its writes have ended is not caught by that alone.
//!
//! Mounting needs root, or `fusermount3` of the package fuse3.

mod files;
mod rules;
mod serve;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuser::{BackgroundSession, Config, MountOption};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

pub use files::Recording;
pub use rules::{Effect, Kind, Rule, RuleId};

use crate::simulated::{Contents, Moment};
use files::Files;
use rules::Rules;

/// Threads that answer the kernel: as many operations can be slow at a time.
const THREADS: usize = 12;

/// What the mounted file system and the test share.
#[derive(Debug, Default)]
struct Shared {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    files: Files,
    rules: Rules,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file system, mounted until it is dropped.
#[derive(Debug)]
pub struct Recorded {
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
    directory: TempDir,
}

impl Recorded {
    /// Mounts it, with nothing in it.
    ///
    /// # Panics
    /// If that is not possible here.
    #[must_use]
    pub fn mount() -> Self {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let shared = Arc::<Shared>::default();
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("recorded".to_owned())];
        config.n_threads = Some(THREADS);
        let served = serve::Server(Arc::clone(&shared));
        let session = fuser::spawn_mount(served, directory.path(), &config);
        let session = session.unwrap_or_else(|error| {
            panic!("no file system can be mounted: {error}; be root, or install fuse3")
        });
        Self {
            shared,
            session: Some(session),
            directory,
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The path of a file in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Puts a file there, durably, without a record of how.
    pub fn put(&self, name: &str, contents: Contents) {
        self.shared.lock().files.put(name, contents);
    }

    /// What a file holds now.
    ///
    /// # Panics
    /// If there is no such file.
    #[must_use]
    pub fn contents(&self, name: &str) -> Contents {
        let inner = self.shared.lock();
        inner.files.named(name).contents.clone()
    }

    /// Cuts a file behind the back of whoever has it open; nothing is recorded.
    pub fn cut_short(&self, name: &str, len: u64) {
        self.shared
            .lock()
            .files
            .named_mut(name)
            .contents
            .set_len(len);
    }

    /// Something happens that is to be compared with what is done to the files.
    #[must_use]
    pub fn note(&self) -> Moment {
        self.shared.lock().files.note()
    }

    /// Lets a rule hold from now on.
    pub fn add(&self, rule: Rule) -> RuleId {
        self.shared.lock().rules.add(rule)
    }

    /// Ends a rule; gives how often it was applied.
    pub fn lift(&self, rule: RuleId) -> u64 {
        self.shared.lock().rules.lift(rule)
    }

    /// How often a rule was applied.
    #[must_use]
    pub fn hits(&self, rule: RuleId) -> u64 {
        self.shared.lock().rules.hits(rule)
    }

    /// How many operations failed by the rules, and how many were cut short.
    #[must_use]
    pub fn injected(&self) -> (u64, u64) {
        self.shared.lock().rules.injected()
    }

    /// All that was done so far.
    #[must_use]
    pub fn recording(&self) -> Recording {
        self.shared.lock().files.recording()
    }

    /// Starts the record anew: what the files hold now is durable.
    pub fn forget_the_past(&self) {
        self.shared.lock().files.forget_the_past();
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // Programs that have files open, since the test failed, shall not keep it mounted. Who is not root leaves
        // it to `fusermount3`.
        let _detached = umount2(self.directory.path(), MntFlags::MNT_DETACH);
        drop(self.session.take());
    }
}
