//! Calls: one is added to an eventfd of the front end's, whatever it has made of that eventfd, without ever waiting.
//!
//! `write` waits while the counter has no room and O_NONBLOCK is not set, and both are the front end's to change at any time: looking
//! first leaves a moment in between, and a worker that waits serves nobody. (`RWF_NOWAIT` is not supported for eventfds, and
//! `/proc/self/fd` cannot open them anew.) The kernel's own way to tell an eventfd something has no such case: it adds one, or leaves a
//! counter that is at its end as it is. Linux AIO does that when an operation is over whose `aio_resfd` is that eventfd; so a call is an
//! operation that is over at once, a poll of an eventfd that is always readable.
//!
//! It takes one system call, plus one for every [`EVENTS`] calls, which takes the operations' results away; 0.54 us, where a write took
//! 0.18 us, and a look and a write 0.34 us. The poll is over before `io_submit` returns, and it names no memory, a guest's least of all.
//!
//! A host without AIO (a kernel built without it, a filter that forbids it, no more queues: `fs.aio-max-nr`) gets the look and the write. There
//! a front end that fills its eventfd in between makes the worker wait, and all queues that it serves, until somebody reads that eventfd; the
//! daemon warns of it once, when it starts. A call that the kernel has no memory for goes the same way.
//!
//! Sources: io_submit(2), eventfd(2), the kernel's `fs/aio.c` (`aio_complete`) and `fs/eventfd.c` (`eventfd_signal_mask`).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::owned;

/// Results that are left in the kernel's queue until it is full.
const EVENTS: usize = 256;

/// Times a call is tried: twice, but for other threads that fill the queue in between.
const ATTEMPTS: usize = 64;

/// `IOCB_CMD_POLL`.
const COMMAND_POLL: u16 = 5;

/// `IOCB_FLAG_RESFD`.
const FLAG_TELLS_EVENTFD: u32 = 1;

/// The queue of this process. Every thread may use it, and none waits for another.
static QUEUE: OnceLock<Option<Queue>> = OnceLock::new();

/// A queue of Linux AIO.
struct Queue {
    context: libc::c_ulong,
    /// Always readable.
    readable: OwnedFd,
}

/// Makes what calls need, once; later a filter of system calls may forbid it.
pub(crate) fn prepare() {
    let _ready = queue();
}

/// Adds one to an eventfd, unless it is full: then its reader has been told. Never waits.
pub(crate) fn call(eventfd: &impl AsRawFd) {
    // A front end that closed its end is not interested, so nothing is made of failures.
    match queue() {
        Some(queue) => queue.call(eventfd),
        None => write_if_room(eventfd),
    }
}

fn queue() -> Option<&'static Queue> {
    let made = QUEUE.get_or_init(|| {
        let said = "Linux AIO cannot be used here: a front end that keeps filling its eventfds could stall a worker";
        let queue = Queue::new();
        queue
            .inspect_err(|error| tracing::warn!("{said} ({error})"))
            .ok()
    });
    made.as_ref()
}

impl Queue {
    fn new() -> io::Result<Self> {
        let readable = EventFd::new(EFD_CLOEXEC)?;
        readable.write(1)?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the context is written by the call alone. The process never ends it.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut context) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let readable = owned(readable);
        Ok(Self { context, readable })
    }

    fn call(&self, eventfd: &impl AsRawFd) {
        for _ in 0..ATTEMPTS {
            if self.submit(eventfd) != Err(Errno::EAGAIN) {
                return;
            }
            self.discard_results();
        }
        // The kernel is short of memory.
        write_if_room(eventfd);
    }

    fn submit(&self, eventfd: &impl AsRawFd) -> nix::Result<()> {
        // SAFETY: all zeros is a value of this plain structure.
        let mut operation: libc::iocb = unsafe { std::mem::zeroed() };
        operation.aio_lio_opcode = COMMAND_POLL;
        operation.aio_fildes = self.readable.as_raw_fd().cast_unsigned();
        operation.aio_buf = u64::from(libc::POLLIN.cast_unsigned());
        operation.aio_flags = FLAG_TELLS_EVENTFD;
        operation.aio_resfd = eventfd.as_raw_fd().cast_unsigned();
        let mut operations = [&raw mut operation];
        let first = operations.as_mut_ptr();
        // SAFETY: the kernel copies the one operation, which names no memory.
        let result = unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1_i64, first) };
        Errno::result(result).map(drop)
    }

    /// Takes away what tells that earlier calls were made.
    fn discard_results(&self) {
        // Two addresses and two numbers of 64 bits each.
        let mut results = [[0_u64; 4]; EVENTS];
        let at_once = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let (least, most) = (0_i64, EVENTS);
        // SAFETY: the kernel writes `most` results at most, each of the size of one element.
        let _count = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                least,
                most,
                results.as_mut_ptr(),
                ptr::from_ref(&at_once),
            )
        };
    }
}

/// Where there is no AIO. The front end may fill the eventfd in between, and then this waits.
fn write_if_room(eventfd: &impl AsRawFd) {
    // SAFETY: `eventfd` owns the descriptor and is borrowed for as long as this.
    let fd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    let _counted = nix::poll::poll(&mut fds, PollTimeout::ZERO);
    let found = fds[0].revents();
    if found.is_some_and(|found| found.contains(PollFlags::POLLOUT)) {
        let _ = nix::unistd::write(fd, &1_u64.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// As much as a write can make an eventfd hold.
    const FULL: u64 = u64::MAX - 1;

    #[test]
    fn a_call_adds_one_however_many_there_were() {
        assert!(queue().is_some(), "this host has AIO");
        let eventfd = EventFd::new(0).unwrap();
        let many = 5 * EVENTS as u64;
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..many).for_each(|_| call(&eventfd)));
            }
        });
        assert_eq!(eventfd.read().unwrap(), 4 * many);
    }

    #[test]
    fn a_call_to_a_full_eventfd_returns_without_a_look_at_it_before() {
        let (eventfd, (done, is_done)) = (EventFd::new(0).unwrap(), mpsc::channel());
        eventfd.write(FULL).unwrap();
        let own = eventfd.try_clone().unwrap();
        thread::spawn(move || {
            let queue = queue().expect("this host has AIO");
            (0..3).for_each(|_| queue.call(&own));
            done.send(()).unwrap();
        });
        is_done
            .recv_timeout(Duration::from_secs(10))
            .expect("a call waits");
        assert!(eventfd.read().unwrap() >= FULL);
        assert_eq!(eventfd.write(1).and_then(|()| eventfd.read()).unwrap(), 1);
    }

    #[test]
    fn a_call_to_what_is_no_eventfd_writes_nothing() {
        let file = tempfile::tempfile().unwrap();
        call(&file);
        assert_eq!(file.metadata().unwrap().len(), 0);
    }

    #[test]
    fn without_aio_a_full_eventfd_is_left_alone_and_another_called() {
        let eventfd = EventFd::new(0).unwrap();
        write_if_room(&eventfd);
        assert_eq!(eventfd.read().unwrap(), 1);
        eventfd.write(FULL).unwrap();
        write_if_room(&eventfd);
        assert_eq!(eventfd.read().unwrap(), FULL);
    }
}
