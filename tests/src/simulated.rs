//! An image's file that exists in memory only, knows all that was done to it, fails when it
//! is told to, and can be looked at as a killed program or a power cut would have left it.
//!
//! ```text
//! Workload ─► Disk ─► SimulatedFile ─► Contents     what the file is
//!    │                      └────────► History ─► cuts: what it could be after a crash
//!    └──────► Oracle                   what a disk may read as, then and now
//! ```
//!
//! Not a file system: what may be lost between two syncs is as much as any file system
//! loses and more, see [`history`]. Programs that write on another road than [`Storage`]
//! (a ring) can keep a [`History`] of their own and use [`Oracle`] with it.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use vdi_core::{FileOffset, Storage};

pub mod chain;
pub mod contents;
pub mod flag;
pub mod history;
pub mod layout;
pub mod oracle;
pub mod parts;
pub mod plain;
pub mod replay;
mod slow_read;
pub mod workload;
mod zeros;

pub use chain::{Built, Chain};
pub use contents::Contents;
pub use history::{Cut, History, Moment, Operation};
pub use layout::{Found, Layout};
pub use oracle::{Crash, Oracle};
pub use plain::Plain;
pub use replay::Replay;
pub use workload::{Habits, Workload};

use crate::random::Random;

/// The environment variable that says how many rounds a random test makes.
pub const ROUNDS: &str = "VDI_TEST_ROUNDS";
/// The environment variable that names the one seed to run.
pub const SEED: &str = "VDI_TEST_SEED";

/// Runs a random test for the seeds from 0 on: `rounds` of them unless [`ROUNDS`] says
/// otherwise, or only that of [`SEED`]. Each seed is printed before its round.
///
/// # Panics
/// If a variable is no number.
pub fn for_each_seed(rounds: u64, mut round: impl FnMut(Random)) {
    let variable = |name| {
        let value = std::env::var(name).ok()?;
        Some(value.parse::<u64>().expect("the variable is a number"))
    };
    let seeds = match variable(SEED) {
        Some(seed) => seed..seed + 1,
        None => 0..variable(ROUNDS).unwrap_or(rounds),
    };
    for seed in seeds {
        println!("{SEED}={seed}");
        // Seeds that are neighbours shall not make neighbouring numbers.
        let mut random = Random::seeded(seed);
        round(random.fork());
    }
}

/// Whether something happens that happens so often in a hundred times.
pub fn percent(random: &mut Random, chance: u64) -> bool {
    random.within(0..100) < chance
}

/// A position in memory for one in a file.
pub(crate) fn index(at: u64) -> usize {
    usize::try_from(at).expect("64-bit hosts only")
}

/// The kinds of operation that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Storage::write_all_at`].
    Write,
    /// [`Storage::set_len`].
    SetLen,
    /// [`Storage::punch`].
    Punch,
    /// [`Storage::sync`].
    Sync,
}

/// How an operation fails.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    /// Nothing is done.
    Clean(Errno),
    /// Of a write, this many bytes are done.
    Short(Errno, usize),
}

/// A failure that is to come, once.
#[derive(Clone, Debug)]
struct Fault {
    kind: Kind,
    /// Where in the file; operations elsewhere do not count.
    within: Range<u64>,
    /// How many such operations succeed before it.
    after: usize,
    failure: Failure,
}

/// A file in memory, see [the module](self).
#[derive(Debug)]
pub struct SimulatedFile {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    contents: Contents,
    history: History,
    faults: Vec<Fault>,
}

impl SimulatedFile {
    /// A file that holds this, durably.
    #[must_use]
    pub fn new(contents: Contents) -> Arc<Self> {
        let history = History::new(contents.clone());
        Arc::new(Self {
            inner: Mutex::new(Inner {
                contents,
                history,
                faults: Vec::new(),
            }),
        })
    }

    /// What programs see in it now: after a `kill -9`, all that was done.
    pub fn contents(&self) -> Contents {
        self.lock().contents.clone()
    }

    /// All that was done to it.
    pub fn history(&self) -> History {
        self.lock().history.clone()
    }

    /// The present.
    pub fn now(&self) -> Moment {
        self.lock().history.now()
    }

    /// Something happens that is to be compared with what is done to the file.
    pub fn note(&self) -> Moment {
        self.lock().history.note()
    }

    /// What was done since.
    pub fn done_since(&self, moment: Moment) -> Vec<Operation> {
        self.lock().history.since(moment).cloned().collect()
    }

    /// Lets an operation fail: the one that comes after `after` others of its kind that
    /// touch the bytes `within`. (A length touches the byte that it makes the first missing one;
    /// a sync touches all.)
    pub fn fail(&self, kind: Kind, within: Range<u64>, after: usize, failure: Failure) {
        self.lock().faults.push(Fault {
            kind,
            within,
            after,
            failure,
        });
    }

    /// Lets operations of a kind fail until [`Self::heal`].
    pub fn fail_all(&self, kind: Kind, errno: Errno) {
        for _ in 0..1000 {
            self.fail(kind, 0..u64::MAX, 0, Failure::Clean(errno));
        }
    }

    /// No more failures.
    pub fn heal(&self) {
        self.lock().faults.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// The failure that is due for an operation.
    fn failure(&mut self, kind: Kind, touched: &Range<u64>) -> Option<Failure> {
        let meets = |fault: &Fault| {
            let meets = fault.within.start < touched.end && touched.start < fault.within.end;
            fault.kind == kind && meets
        };
        let due = self
            .faults
            .iter()
            .position(|fault| meets(fault) && fault.after == 0);
        for fault in &mut self.faults {
            if meets(fault) {
                fault.after = fault.after.saturating_sub(1);
            }
        }
        due.map(|due| self.faults.remove(due).failure)
    }

    fn record(&mut self, operation: Operation) {
        let record = self.history.begin(operation);
        self.history.end(record);
    }
}

impl Storage for SimulatedFile {
    fn read_exact_at(&self, buf: &mut [u8], at: FileOffset) -> io::Result<()> {
        match self.lock().contents.read(buf, at.0) {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn write_all_at(&self, buf: &[u8], at: FileOffset) -> io::Result<()> {
        let inner = &mut *self.lock();
        let failure = inner.failure(Kind::Write, &(at.0..at.0 + buf.len() as u64));
        let (done, result) = match failure {
            None => (buf, Ok(())),
            Some(Failure::Clean(errno)) => (&buf[..0], Err(errno.into())),
            Some(Failure::Short(errno, len)) => (&buf[..len.min(buf.len())], Err(errno.into())),
        };
        if !done.is_empty() {
            inner.contents.write(at.0, done);
            inner.record(Operation::Write {
                at: at.0,
                bytes: done.into(),
            });
        }
        result
    }

    /// No more than is promised: other writes may be lost.
    fn write_durably(&self, buf: &[u8], at: FileOffset) -> io::Result<()> {
        self.write_all_at(buf, at)?;
        let inner = &mut *self.lock();
        match inner.failure(Kind::Sync, &(0..u64::MAX)) {
            None => {
                inner.record(Operation::SyncOf(at.0..at.0 + buf.len() as u64));
                Ok(())
            }
            Some(Failure::Clean(errno) | Failure::Short(errno, _)) => {
                inner.record(Operation::FailedSync);
                Err(errno.into())
            }
        }
    }

    fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.lock().contents.len_bytes())
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        let inner = &mut *self.lock();
        match inner.failure(Kind::SetLen, &(len_bytes..len_bytes + 1)) {
            None => {
                inner.contents.set_len(len_bytes);
                inner.record(Operation::SetLen(len_bytes));
                Ok(())
            }
            Some(Failure::Clean(errno) | Failure::Short(errno, _)) => Err(errno.into()),
        }
    }

    fn punch(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        let inner = &mut *self.lock();
        let range = at.0..at.0 + len_bytes;
        match inner.failure(Kind::Punch, &range) {
            None => {
                inner.contents.zero(range.clone());
                inner.record(Operation::Punch(range));
                Ok(())
            }
            Some(Failure::Clean(errno) | Failure::Short(errno, _)) => Err(errno.into()),
        }
    }

    fn zero(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        self.punch(at, len_bytes)
    }

    fn reserve(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        let end = at.0 + len_bytes;
        if self.len_bytes()? < end {
            self.set_len(end)?;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let inner = &mut *self.lock();
        match inner.failure(Kind::Sync, &(0..u64::MAX)) {
            None => {
                inner.record(Operation::Sync);
                Ok(())
            }
            Some(Failure::Clean(errno) | Failure::Short(errno, _)) => {
                inner.record(Operation::FailedSync);
                Err(errno.into())
            }
        }
    }
}
