//! The thread beside a worker that has two files share extents.
//!
//! A first write to a block over a parent's data needs the rest of that block in the child's file. Where the file system can, both files
//! share it: that moves nothing. There is no such operation for a ring, and the call may wait: for I/O on either file that goes past the page cache, for
//! the file system's log. So it is made here, in the order in which it was asked for, and its worker goes on meanwhile.
//!
//! It touches no guest memory, so nothing of R1 is at stake. What the host refuses is told like what was done: whoever asked copies instead.
//!
//! Not here: what can be shared (`vdi_core::share`), and which parent lends nothing any more (`image_file`).

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use vdi_core::Fill;

use crate::command::Doorbell;
use crate::inflight::Key;
use crate::ring::share;
use crate::sandbox::{Role, Sandbox};

/// What is to be shared.
#[derive(Debug)]
pub(crate) struct Share {
    /// Whose work it is.
    pub(crate) key: Key,
    /// Of which bytes.
    pub(crate) fill: Fill,
    /// The parent's file.
    pub(crate) from: Arc<File>,
    /// The top image's.
    pub(crate) to: Arc<File>,
}

/// What became of it.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Whose work it was.
    pub(crate) key: Key,
    /// Of which bytes.
    pub(crate) fill: Fill,
    /// If this is an error, any part of them may be shared, and the others are as they were.
    pub(crate) result: io::Result<()>,
}

/// The thread, for its worker; dropping it ends and joins it.
#[derive(Debug)]
pub(crate) struct Sharer {
    /// Until it is to end.
    asked: Option<Sender<Share>>,
    told: Receiver<Shared>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

impl Sharer {
    /// Starts a thread that rings its worker's bell, and confines it.
    pub(crate) fn start(
        name: String,
        doorbell: Arc<Doorbell>,
        sandbox: &Sandbox,
    ) -> io::Result<Self> {
        let ((asked, to_do), (tell, told)) = (mpsc::channel::<Share>(), mpsc::channel());
        let (started, ready) = mpsc::channel();
        let sandbox = sandbox.clone();
        let thread = thread::Builder::new().name(name).spawn(move || {
            let confined = sandbox.confine(Role::Sharer);
            let serves = confined.is_ok();
            let _ = started.send(confined);
            while serves
                && let Ok(Share {
                    key,
                    fill,
                    from,
                    to,
                }) = to_do.recv()
            {
                let result = share(&from, &to, &fill);
                // If the worker is gone, nobody waits for it.
                let _ = tell.send(Shared { key, fill, result });
                doorbell.ring();
            }
        })?;
        ready.recv().map_err(io::Error::other)??;
        Ok(Self {
            asked: Some(asked),
            told,
            in_flight: 0,
            thread: Some(thread),
        })
    }

    /// Begins with it as soon as all is done that was asked for before.
    pub(crate) fn ask(&mut self, share: Share) {
        if let Some(asked) = &self.asked {
            self.in_flight += 1;
            asked.send(share).expect("the thread ends with this");
        }
    }

    /// What became of the next one. Its worker's bell rings for each, after it was told.
    pub(crate) fn next_shared(&mut self) -> Option<Shared> {
        if self.in_flight == 0 {
            return None;
        }
        let shared = self.told.try_recv().ok()?;
        self.in_flight -= 1;
        Some(shared)
    }

    /// How many are asked for and not heard of.
    pub(crate) const fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for Sharer {
    fn drop(&mut self) {
        self.asked = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
