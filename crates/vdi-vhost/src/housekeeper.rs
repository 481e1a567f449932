//! The thread that does what must not happen on a request's path: lengthening the file ahead of need (W1), marking
//! the image before its first change (W6).
//!
//! It sleeps until the disk wakes it; nothing ticks.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::task::{Wake, Waker};
use std::thread::{self, JoinHandle, Thread};

use vdi_core::Disk;

use crate::sandbox::{Role, Sandbox};

/// The running thread; dropping it ends and joins it.
#[derive(Debug)]
pub(crate) struct Housekeeper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Wakes the thread. A wake-up before it sleeps is not lost: `unpark` leaves a token.
struct Bell(Thread);

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Housekeeper {
    /// Starts the thread and tells the disk about it.
    pub(crate) fn start(disk: &Arc<Disk>, sandbox: &Sandbox) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (its_disk, its_stop) = (Arc::clone(disk), Arc::clone(&stop));
        let (sandbox, (started, ready)) = (sandbox.clone(), mpsc::channel());
        let thread = thread::Builder::new()
            .name("housekeeper".to_owned())
            .spawn(move || {
                let confined = sandbox.confine(Role::Housekeeper);
                let serves = confined.is_ok();
                let _ = started.send(confined);
                if serves {
                    keep_house(&its_disk, &its_stop);
                }
            })?;
        ready.recv().map_err(io::Error::other)??;
        disk.set_housekeeper(Waker::from(Arc::new(Bell(thread.thread().clone()))));
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Housekeeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

fn keep_house(disk: &Disk, stop: &AtomicBool) {
    let mut failing = false;
    while !stop.load(Ordering::Acquire) {
        match disk.do_chores() {
            Ok(true) => failing = false,
            Ok(false) => thread::park(),
            Err(error) => {
                // One line per spell of trouble: a guest can bring it about again and again (disk full).
                if !std::mem::replace(&mut failing, true) {
                    tracing::error!(
                        "the image cannot take new data: {}",
                        crate::chain_of(&error)
                    );
                }
                thread::park();
            }
        }
    }
}
