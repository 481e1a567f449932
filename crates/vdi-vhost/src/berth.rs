//! A disk's place in this process: what serves it, where its front end connects, and the thread that hears that.
//!
//! ```text
//! door ─► (a connection) ─► a thread: session ─► backend ─► workers
//!   ▲                             │
//!   └──── opened again ◄──────────┘ the front end is gone
//! ```
//!
//! One front end is served at a time; others wait in the socket's backlog. A thread exists only while one is there, so a disk that
//! nobody uses costs none.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vdi_core::WriteError;

use crate::backend::Backend;
use crate::complaints::About;
use crate::dump::Witnesses;
use crate::limits::Throttle;
use crate::rings::RingError;
use crate::session::{self, Said, ServeError};
use crate::socket::SocketFile;
use crate::stats::{Stats, StatsSnapshot, Usage};

/// Where a disk's front ends come from.
#[derive(Debug)]
pub(crate) enum Door {
    /// A socket where they connect, one after the other, and its file if that is ours.
    Listener {
        listener: UnixListener,
        file: Option<SocketFile>,
    },
    /// The one connection there will be (`--fd`).
    Connected(Mutex<Option<UnixStream>>),
}

/// A disk that is served.
pub(crate) struct Berth {
    name: String,
    door: Door,
    /// What limits it: the backend's, which may be busy for long.
    throttle: Arc<Throttle>,
    /// The threads that serve it, for the same reason.
    witnesses: Witnesses,
    backend: Arc<Mutex<Backend>>,
    /// What the backend counts, which is looked at without its lock.
    stats: Arc<Stats>,
    /// What was seen of the backend when its lock could last be had at once.
    usage: Mutex<Usage>,
    /// Has its session look up from its work.
    poke: EventFd,
    /// The session is to end, and no other to begin.
    is_closing: AtomicBool,
    session: Mutex<Option<JoinHandle<()>>>,
    said: Said,
}

/// What is done when a session is over: with the reason for which the process cannot go on, if there is one.
pub(crate) type Afterwards = Box<dyn FnOnce(&Arc<Berth>, Result<(), ServeError>) + Send>;

impl Berth {
    /// A place for a disk whose image is open, or will be.
    pub(crate) fn new(
        name: String,
        about: &About,
        door: Door,
        backend: Backend,
    ) -> io::Result<Self> {
        if let Door::Listener { listener, .. } = &door {
            listener.set_nonblocking(true)?;
        }
        Ok(Self {
            name,
            door,
            stats: Arc::clone(backend.stats()),
            usage: Mutex::new(backend.usage()),
            throttle: Arc::clone(backend.throttle()),
            witnesses: backend.witnesses(),
            backend: Arc::new(Mutex::new(backend)),
            poke: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            is_closing: AtomicBool::new(false),
            session: Mutex::new(None),
            said: Said::about(about),
        })
    }

    /// What operators call the disk.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What serves it. Locked while a message of the front end's, or a command, is carried out.
    pub(crate) const fn backend(&self) -> &Arc<Mutex<Backend>> {
        &self.backend
    }

    /// The same, locked.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Backend> {
        self.backend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the disk did since the daemon was started. It waits for nobody.
    pub(crate) fn stats(&self) -> StatsSnapshot {
        self.stats.snapshot()
    }

    /// What the disk takes, and how it fares; a command that takes its time is not waited for.
    pub(crate) fn usage(&self) -> Usage {
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        match self.backend.try_lock() {
            Ok(backend) => *usage = backend.usage(),
            Err(TryLockError::Poisoned(backend)) => *usage = backend.into_inner().usage(),
            Err(TryLockError::WouldBlock) => {}
        }
        *usage
    }

    /// What limits it.
    pub(crate) const fn throttle(&self) -> &Arc<Throttle> {
        &self.throttle
    }

    /// Who can tell how it is when what serves it is busy.
    pub(crate) const fn witnesses(&self) -> &Witnesses {
        &self.witnesses
    }

    /// What a session has said.
    pub(crate) const fn said(&self) -> &Said {
        &self.said
    }

    /// What becomes readable when a session should look up.
    pub(crate) const fn poked(&self) -> &EventFd {
        &self.poke
    }

    /// Has the session look up, if there is one.
    pub(crate) fn poke(&self) {
        // Full is as good as written to.
        let _ = self.poke.write(1);
    }

    /// Whether the session is to end.
    pub(crate) fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Acquire)
    }

    /// Whether a front end is there.
    pub(crate) fn is_connected(&self) -> bool {
        let session = self.session();
        session.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// What becomes readable when a front end comes.
    pub(crate) fn listener(&self) -> Option<BorrowedFd<'_>> {
        match &self.door {
            Door::Listener { listener, .. } => Some(listener.as_fd()),
            Door::Connected(_) => None,
        }
    }

    /// Lets a front end in that waits at the door, and serves it on a thread of its own; false if there is none.
    pub(crate) fn let_in(self: &Arc<Self>, afterwards: Afterwards) -> io::Result<bool> {
        let stream = match &self.door {
            Door::Listener { listener, .. } => match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if is_passing(&error) => return Ok(false),
                Err(error) => return Err(error),
            },
            Door::Connected(stream) => {
                let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
                match stream.take() {
                    Some(stream) => stream,
                    None => return Ok(false),
                }
            }
        };
        let mut session = self.session();
        if self.is_closing() {
            return Ok(false);
        }
        let its = Arc::clone(self);
        let thread = thread::Builder::new()
            .name(format!("session-{}", self.name))
            .spawn(move || {
                let served = session::converse(stream, &its);
                afterwards(&its, served);
            })?;
        // The last one's thread has nothing left to do.
        *session = Some(thread);
        Ok(true)
    }

    /// Has the session end, when what is in flight is answered, and no other begin; it is not waited for.
    pub(crate) fn begin_to_leave(&self) {
        self.is_closing.store(true, Ordering::Release);
        self.poke();
    }

    /// Waits for the end of the session and lets go of the image; whether that is not exact about count and length.
    pub(crate) fn let_go(&self) -> Result<bool, RingError> {
        let thread = self.session().take();
        if let Some(thread) = thread {
            // A session that panicked has said so.
            let _ = thread.join();
        }
        self.lock().let_go()
    }

    /// Lets front ends in again.
    pub(crate) fn stay(&self) {
        self.is_closing.store(false, Ordering::Release);
    }

    /// Makes durable what the disk has, while it is served.
    pub(crate) fn flush(&self) {
        let disk = self.lock().disk();
        if let Some(disk) = disk
            && let Err(error) = disk.flush()
        {
            tracing::error!("{}: {}", self.name, crate::chain_of(&error));
        }
    }

    /// The socket's file is this process's to remove.
    pub(crate) fn own(&self) {
        if let Some(file) = self.socket_file() {
            file.own();
        }
    }

    /// The socket's file is another process's.
    pub(crate) fn disown(&self) {
        if let Some(file) = self.socket_file() {
            file.disown();
        }
    }

    const fn socket_file(&self) -> Option<&SocketFile> {
        match &self.door {
            Door::Listener { file, .. } => file.as_ref(),
            Door::Connected(_) => None,
        }
    }

    /// Ends the session, when what is in flight is answered, and closes the image. The last thing that is done with it.
    pub(crate) fn close(self: Arc<Self>) -> Result<(), WriteError> {
        self.begin_to_leave();
        let thread = self.session().take();
        if let Some(thread) = thread {
            // A session that panicked has said so.
            let _ = thread.join();
        }
        self.lock().close()
    }

    fn session(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether it is the peer's doing that there was nothing to accept.
fn is_passing(error: &io::Error) -> bool {
    let passing = [libc::EAGAIN, libc::EINTR, libc::ECONNABORTED, libc::EPROTO];
    error
        .raw_os_error()
        .is_some_and(|errno| passing.contains(&errno))
}
