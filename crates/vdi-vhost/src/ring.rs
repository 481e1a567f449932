//! Where memory meets the kernel: buffers in guest memory, and the io_uring that carries transfers; calls are in `calls`, below.
//! What is `unsafe` is here, behind a safe interface.
//!
//! Not here: what a transfer is and how it goes on (`transfer`), which bytes of which file (`image_file`, `inflight`), and
//! the engine for hosts without io_uring (`engine`).
//!
//! - **R1** The kernel touches only what an in-flight [`Transfer`] owns: its iovecs, its bounce buffer, and guest
//!   memory that its [`GuestBuffer`] keeps mapped. [`Ring`] owns a transfer from submission until its completion is
//!   reaped; only the completion frees it; a ring is drained, then dropped.
//!
//! Sources: io_uring(7), preadv2(2), ioctl_ficlonerange(2), statx(2) (STATX_DIOALIGN), open(2) (O_DIRECT).
#![expect(
    unsafe_code,
    reason = "io_uring, vectored I/O on guest memory and adopting a descriptor have no safe interface"
)]

pub(crate) mod calls;

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use smallvec::SmallVec;
use vdi_core::Fill;
use vm_memory::bitmap::BS;
use vm_memory::{GuestMemoryBackend, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::chain::Piece;
use crate::engine::Wait;
use crate::image_file::Reads;
use crate::memory::{self, Memory};
use crate::transfer::{Bounce, BounceBuffer, Finished, MAX_IOVECS, Operation, Progress, Transfer};

/// Bounce buffers of one engine: 4 MiB, however many unaligned requests a guest sends; the others wait.
const MAX_BOUNCES: usize = 16;

/// Entries of the submission queue: a turn's worth; a fuller one is submitted in between.
const SUBMISSIONS: u32 = 256;

/// Transfers that are handed over as soon as so many were started, so that storage does not stand still while the rest of a burst
/// is parsed. Measured with O_DIRECT: all of a burst at once reached 0.7 of fio's rate, eights 0.92 to 0.94, fours and twos no more at
/// more CPU time. Fewer are, where storage has less than that to do ([`Ring::is_eager`]).
const EAGER: usize = 8;

/// Entries of the completion queue. The kernel keeps what does not fit (IORING_FEAT_NODROP).
const COMPLETIONS: u32 = 1024;

/// All that a ring can be told to do. A filter of system calls does not see what a ring does, so without this whoever broke
/// into a worker could open files and sockets through it.
const OPERATIONS: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
];

/// Marks a completion as a watch's; transfers have their slot number alone.
const WATCH: u64 = 1 << 63;

/// The completion of taking a watch away, in which nobody is interested.
const UNWATCHED: u64 = u64::MAX;

/// A run of guest memory that stays mapped as long as this exists.
#[derive(Debug)]
pub(crate) struct GuestBuffer {
    /// Keeps what `iovecs` point to mapped.
    memory: Arc<Memory>,
    /// Never empty ones.
    iovecs: SmallVec<[libc::iovec; 2]>,
    /// How many of `iovecs` are used up.
    used: usize,
    /// Bytes in the iovecs that are left.
    len: u64,
}

impl GuestBuffer {
    /// The pieces as one buffer, if all of them lie in the guest's memory.
    pub(crate) fn new(memory: &Arc<Memory>, pieces: &[Piece]) -> Option<Self> {
        let mut iovecs = SmallVec::new();
        let mut len = 0;
        let iovec = |slice: &VolatileSlice<'_, BS<'_, ()>>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        for piece in pieces {
            let piece_len = usize::try_from(piece.len).ok()?;
            // Nearly always in one region.
            if let Ok(slice) = memory.get_slice(piece.at, piece_len) {
                iovecs.push(iovec(&slice));
            } else {
                for slice in memory.get_slices(piece.at, piece_len) {
                    iovecs.push(iovec(&slice.ok()?));
                }
            }
            len += u64::from(piece.len);
        }
        Some(Self {
            memory: Arc::clone(memory),
            iovecs,
            used: 0,
            len,
        })
    }

    /// How many bytes are left.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Takes the first `len` bytes away as a buffer of their own.
    pub(crate) fn split_front(&mut self, len: u64) -> Self {
        assert!(len <= self.len, "a buffer is split within its length");
        let mut front = Self {
            memory: Arc::clone(&self.memory),
            iovecs: SmallVec::new(),
            used: 0,
            len,
        };
        if len == self.len {
            std::mem::swap(&mut front.iovecs, &mut self.iovecs);
            front.used = std::mem::take(&mut self.used);
            self.len = 0;
            return front;
        }
        let mut missing = len;
        while missing > 0 {
            let iovec = self.iovecs[self.used];
            let take = missing.min(iovec.iov_len as u64);
            front.iovecs.push(libc::iovec {
                iov_base: iovec.iov_base,
                iov_len: to_usize(take),
            });
            self.consume(take);
            missing -= take;
        }
        front
    }

    /// Writes zeros all over what is left.
    pub(crate) fn fill_with_zeros(&self) {
        for iovec in self.kept() {
            // SAFETY: `memory` keeps the range mapped (checked by `new`); the guest may change it at the same
            // time, which only affects what the guest sees.
            unsafe { std::ptr::write_bytes(iovec.iov_base.cast::<u8>(), 0, iovec.iov_len) };
        }
    }

    /// Whether the first `len` bytes are zeros now; no more of them are looked at. The guest may change them at any time, and then
    /// it is the guest's own doing which of both is written.
    pub(crate) fn begins_with_zeros(&self, len: u64) -> bool {
        let mut missing = to_usize(len);
        self.kept().all(|iovec| {
            let count = missing.min(iovec.iov_len);
            missing -= count;
            // SAFETY: `memory` keeps the range mapped; bytes that the guest changes meanwhile are still bytes.
            let bytes = unsafe { std::slice::from_raw_parts(iovec.iov_base.cast::<u8>(), count) };
            count == 0 || is_zero(bytes)
        })
    }

    /// Copies as many of `bytes` as there is room for; how many.
    pub(crate) fn fill_from(&self, bytes: &[u8]) -> usize {
        let mut copied = 0;
        for iovec in self.kept() {
            let part = &bytes[copied..];
            let count = part.len().min(iovec.iov_len);
            // SAFETY: `memory` keeps the target mapped and `bytes` is not guest memory.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), iovec.iov_base.cast(), count) };
            copied += count;
        }
        copied
    }

    /// Copies the first bytes that are left into all of `bytes`.
    pub(crate) fn copy_out(&self, bytes: &mut [u8]) {
        let mut copied = 0;
        for iovec in self.kept() {
            let part = &mut bytes[copied..];
            let count = part.len().min(iovec.iov_len);
            // SAFETY: `memory` keeps the source mapped and `bytes` is not guest memory.
            unsafe {
                std::ptr::copy_nonoverlapping(iovec.iov_base.cast(), part.as_mut_ptr(), count);
            }
            copied += count;
        }
    }

    /// Whether zeros may have taken the place of what the guest has there.
    pub(crate) fn is_lost(&self) -> bool {
        memory::is_lost(&self.memory)
    }

    /// What is left of it, as long as it is there.
    fn kept(&self) -> impl Iterator<Item = &libc::iovec> {
        self.left().iter().take_while(|_| !self.is_lost())
    }

    /// What is left of it, for the kernel.
    pub(crate) fn left(&self) -> &[libc::iovec] {
        &self.iovecs[self.used..]
    }

    /// Gives up the first `len` bytes.
    pub(crate) fn consume(&mut self, len: u64) {
        self.len -= len;
        let mut rest = to_usize(len);
        while rest > 0 {
            let iovec = &mut self.iovecs[self.used];
            let count = rest.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(count).cast();
            iovec.iov_len -= count;
            rest -= count;
            if iovec.iov_len == 0 {
                self.used += 1;
            }
        }
    }

    /// Whether every address and length is a multiple of `align`.
    pub(crate) fn is_aligned_to(&self, align: usize) -> bool {
        let fits = |v: &libc::iovec| {
            (v.iov_base as usize).is_multiple_of(align) && v.iov_len.is_multiple_of(align)
        };
        self.left().iter().all(fits)
    }
}

/// Whether bytes are all zeros, by words where they are aligned.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Most data differ early.
    let (head, rest) = bytes.split_at(bytes.len().min(16));
    head.iter().all(|&byte| byte == 0)
        && rest
            .chunks(4096)
            .all(|chunk| chunk.iter().fold(0, |or, &byte| or | byte) == 0)
}

/// Does the next round of a transfer in one system call; its result as io_uring would report it.
pub(crate) fn run_round(transfer: &Transfer) -> i64 {
    let (fd, at) = (transfer.fd().as_raw_fd(), transfer.at().cast_signed());
    let iovecs = transfer.iovecs();
    let count = libc::c_int::try_from(iovecs.len()).unwrap_or(libc::c_int::MAX);
    let result = match transfer.operation() {
        // SAFETY: R1: `transfer` owns the memory that the iovecs name, for longer than the call.
        Operation::Read => unsafe { libc::preadv(fd, iovecs.as_ptr(), count, at) },
        // SAFETY: R1, as above.
        Operation::Write => unsafe { libc::pwritev(fd, iovecs.as_ptr(), count, at) },
        // SAFETY: no memory is involved.
        Operation::Sync => unsafe { libc::fdatasync(fd) as isize },
        Operation::Punch | Operation::Zero => {
            let (mode, len) = (transfer.operation().fallocate_mode(), transfer.range_len());
            // SAFETY: no memory is involved.
            unsafe { libc::fallocate(fd, mode, at, len.cast_signed()) as isize }
        }
    };
    if result < 0 {
        -i64::from(
            io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EIO),
        )
    } else {
        result as i64
    }
}

/// Has `to` share a part of `from`'s extents, or fails; then any part of it may be shared.
pub(crate) fn share(from: &File, to: &File, fill: &Fill) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: i64::from(from.as_raw_fd()),
        src_offset: fill.from.0,
        src_length: fill.len_bytes,
        dest_offset: fill.to.0,
    };
    // SAFETY: the call reads the one structure, and touches no other memory.
    let result = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Fills `into` from `file` at `at` if that can be done without waiting for storage; false if not all of it was there, or
/// something is wrong: then it is for the engine to find out.
pub(crate) fn read_now(file: &File, reads: Reads, at: u64, into: &GuestBuffer) -> bool {
    let flags = match reads {
        Reads::Now => 0,
        Reads::IfCached => libc::RWF_NOWAIT,
        Reads::Queued => return false,
    };
    let Some(count) = iovec_count(into) else {
        return false;
    };
    let (fd, at, first) = (file.as_raw_fd(), at.cast_signed(), into.left().as_ptr());
    // SAFETY: R1: `into` keeps the memory that the iovecs name mapped, for longer than the call.
    let result = unsafe { libc::preadv2(fd, first, count, at, flags) };
    u64::try_from(result) == Ok(into.len())
}

/// Writes all of `from` to `file` at `at`; false if it was cut short or failed.
pub(crate) fn write_now(file: &File, at: u64, from: &GuestBuffer) -> bool {
    let Some(count) = iovec_count(from) else {
        return false;
    };
    let (fd, at, first) = (file.as_raw_fd(), at.cast_signed(), from.left().as_ptr());
    // SAFETY: R1: `from` keeps the memory that the iovecs name mapped, for longer than the call.
    let result = unsafe { libc::pwritev(fd, first, count, at) };
    u64::try_from(result) == Ok(from.len())
}

/// How many iovecs a buffer has, if one call can take them.
fn iovec_count(buffer: &GuestBuffer) -> Option<libc::c_int> {
    let count = buffer.left().len();
    (count <= MAX_IOVECS).then_some(libc::c_int::try_from(count).ok()?)
}

/// Whether the file system can say that it would have to wait for storage.
pub(crate) fn can_read_cached(file: &File) -> bool {
    let mut byte = 0_u8;
    let iovec = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let (fd, flags) = (file.as_raw_fd(), libc::RWF_NOWAIT);
    // SAFETY: the one iovec names one byte of our own.
    let result = unsafe { libc::preadv2(fd, &raw const iovec, 1, 0, flags) };
    result >= 0 || io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock
}

/// A watched descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct WatchKey(pub(crate) u32);

/// What a watch has to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fired {
    /// Someone wrote to it.
    Ready,
    /// It cannot be watched (any longer).
    Dead,
}

/// An io_uring with everything that is in flight on it.
pub(crate) struct Ring {
    uring: IoUring,
    /// R1: what the kernel works on. Boxed, so that it stays in its place.
    transfers: Vec<Option<Box<Transfer>>>,
    free: Vec<usize>,
    in_flight: usize,
    /// The slot of the transfer that was started last.
    last: usize,
    /// Slots whose transfers wait for a bounce buffer.
    waiting: VecDeque<usize>,
    bounces: Vec<BounceBuffer>,
    bounces_made: usize,
    watches: BTreeMap<WatchKey, OwnedFd>,
    /// Reaped, and not looked at yet: user data, result, flags.
    reaped: VecDeque<(u64, i32, u32)>,
    finished: VecDeque<Finished>,
    fired: VecDeque<(WatchKey, Fired)>,
}

impl Ring {
    /// A ring of this thread; an error where the host forbids it.
    pub(crate) fn new() -> io::Result<Self> {
        // Before Linux 5.19 there is only the other kind.
        let uring = build(Completing::WhenAsked).or_else(|_| build(Completing::AtOnce))?;
        let mut allowed = OPERATIONS.map(Restriction::sqe_op);
        uring.submitter().register_restrictions(&mut allowed)?;
        uring.submitter().register_enable_rings()?;
        Ok(Self {
            uring,
            transfers: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            last: 0,
            waiting: VecDeque::new(),
            bounces: Vec::new(),
            bounces_made: 0,
            watches: BTreeMap::new(),
            reaped: VecDeque::new(),
            finished: VecDeque::new(),
            fired: VecDeque::new(),
        })
    }

    /// Reports under `key` whenever someone writes to `fd`, an eventfd, which is never read.
    pub(crate) fn watch(&mut self, key: WatchKey, fd: OwnedFd) {
        let poll = poll(fd.as_raw_fd(), key);
        self.watches.insert(key, fd);
        self.push(&poll);
    }

    /// Ends a watch; nothing is reported for it any more.
    pub(crate) fn unwatch(&mut self, key: WatchKey) {
        let Some(fd) = self.watches.remove(&key) else {
            return;
        };
        let remove = opcode::PollRemove::new(WATCH | u64::from(key.0))
            .build()
            .user_data(UNWATCHED);
        self.push(&remove);
        // The kernel must have seen both before the descriptor's number can mean something else.
        self.enter(0);
        drop(fd);
    }

    /// Starts a transfer. It is submitted by the next [`Ring::turn`] at the latest.
    pub(crate) fn start(&mut self, transfer: Transfer) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.transfers.push(None);
            self.transfers.len() - 1
        });
        self.transfers[slot] = Some(Box::new(transfer));
        self.in_flight += 1;
        self.last = slot;
        self.submit(slot);
        if self.is_eager() {
            self.enter(0);
        }
    }

    /// Whether storage should hear now of what was started: it has less than that to do, or there is much of it. A single one waits
    /// for the turn's own call.
    fn is_eager(&mut self) -> bool {
        let here = self.uring.submission().len();
        let there = self.in_flight.saturating_sub(here + self.waiting.len());
        here >= EAGER || (here > 1 && here > there)
    }

    /// Does a transfer at once, on this thread.
    pub(crate) fn run(&mut self, transfer: Transfer) {
        self.finished.push_back(transfer.run());
    }

    /// Submits what was started and collects what is over; waits as it is told for something to report.
    pub(crate) fn turn(&mut self, wait: Wait) {
        self.collect();
        let idle = self.reaped.is_empty() && self.finished.is_empty() && self.fired.is_empty();
        match wait {
            Wait::Forever if idle => self.enter(1),
            Wait::AtMost(time) if idle => self.nap(time),
            Wait::No | Wait::Forever | Wait::AtMost(_)
                if self.has_unsubmitted() || self.is_owed_completions() =>
            {
                self.enter(0);
            }
            Wait::No | Wait::Forever | Wait::AtMost(_) => {}
        }
        self.collect();
        while let Some((user_data, result, flags)) = self.reaped.pop_front() {
            if user_data == UNWATCHED {
                continue;
            }
            if user_data & WATCH != 0 {
                self.watch_reported(user_data, result, flags);
            } else {
                self.transfer_reported(user_data, result);
            }
        }
    }

    /// Whether a turn would have something to report without waiting.
    pub(crate) fn has_news(&mut self) -> bool {
        let reported = !self.finished.is_empty() || !self.fired.is_empty();
        let reaped = !self.reaped.is_empty() || !self.uring.completion().is_empty();
        reported || reaped || self.is_owed_completions()
    }

    /// Whether the kernel writes completions down as soon as it is called.
    fn is_owed_completions(&mut self) -> bool {
        self.uring.submission().taskrun()
    }

    /// Whether only one transfer is in flight, and it is small: then it is the last one, or is not known.
    pub(crate) fn is_soon_over(&self) -> bool {
        let last = self.transfers.get(self.last).and_then(Option::as_ref);
        self.in_flight == 1 && last.is_some_and(|transfer| transfer.is_small())
    }

    /// Submits what was started.
    pub(crate) fn hand_over(&mut self) {
        if self.has_unsubmitted() {
            self.enter(0);
        }
    }

    /// Whether the next turn submits something.
    pub(crate) fn has_unsubmitted(&mut self) -> bool {
        !self.uring.submission().is_empty()
    }

    /// The next transfer that is over.
    pub(crate) fn next_finished(&mut self) -> Option<Finished> {
        self.finished.pop_front()
    }

    /// The next watch that has something to tell.
    pub(crate) fn next_fired(&mut self) -> Option<(WatchKey, Fired)> {
        self.fired.pop_front()
    }

    /// Transfers that the kernel or a queue for it has.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn submit(&mut self, slot: usize) {
        let Some(transfer) = &mut self.transfers[slot] else {
            return;
        };
        if let Bounce::Wanted(align) = *transfer.bounce() {
            let bounce = self.bounces.pop().or_else(|| {
                let room = self.bounces_made < MAX_BOUNCES;
                self.bounces_made += usize::from(room);
                room.then(|| BounceBuffer::new(align))
            });
            let Some(bounce) = bounce else {
                self.waiting.push_back(slot);
                return;
            };
            let mut bounce = bounce;
            bounce.reset();
            *transfer.bounce() = Bounce::Held(bounce);
        }
        transfer.prepare();
        let entry = transfer.submission().user_data(slot as u64);
        self.push(&entry);
    }

    fn transfer_reported(&mut self, user_data: u64, result: i32) {
        let slot = to_usize(user_data);
        let Some(transfer) = self.transfers.get_mut(slot).and_then(Option::as_mut) else {
            return;
        };
        let Progress::Done(result) = transfer.advance(i64::from(result)) else {
            self.submit(slot);
            return;
        };
        let token = transfer.token();
        self.finished.push_back(Finished { token, result });
        self.in_flight -= 1;
        self.free.push(slot);
        let ended = self.transfers[slot].take();
        let bounce = ended.map(|mut ended| std::mem::replace(ended.bounce(), Bounce::NotNeeded));
        if let Some(Bounce::Held(bounce)) = bounce {
            self.bounces.push(bounce);
            if let Some(next) = self.waiting.pop_front() {
                self.submit(next);
            }
        }
    }

    fn watch_reported(&mut self, user_data: u64, result: i32, flags: u32) {
        let key = WatchKey(u32::try_from(user_data & u64::from(u32::MAX)).unwrap_or(u32::MAX));
        let Some(fd) = self.watches.get(&key) else {
            return;
        };
        let bad = i32::from(libc::POLLERR | libc::POLLHUP | libc::POLLNVAL);
        if result < 0 || result & bad != 0 {
            self.watches.remove(&key);
            self.fired.push_back((key, Fired::Dead));
            return;
        }
        let entry = poll(fd.as_raw_fd(), key);
        self.fired.push_back((key, Fired::Ready));
        // The kernel may end a multishot poll, for example when it was short of memory.
        if !cqueue::more(flags) {
            self.push(&entry);
        }
    }

    fn push(&mut self, entry: &squeue::Entry) {
        loop {
            // SAFETY: R1: what the entry points to is owned by a boxed transfer in `transfers` until its
            // completion is reaped; polls point to nothing.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return;
            }
            self.enter(0);
        }
    }

    /// Hands over submissions and waits for `want` completions.
    fn enter(&mut self, want: usize) {
        loop {
            let Err(error) = self.uring.submit_and_wait(want) else {
                return;
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // Completions must be taken before the kernel accepts more.
                Some(libc::EAGAIN | libc::EBUSY) => self.collect(),
                // The ring is ours alone and was set up, so this is a defect, and nothing can be answered any more.
                _ => panic!("io_uring_enter failed: {error}"),
            }
            if want > 0 && !self.reaped.is_empty() {
                return;
            }
        }
    }

    /// Hands over submissions and waits for a completion, but not for long.
    fn nap(&mut self, time: Duration) {
        let time = types::Timespec::from(time);
        let arguments = types::SubmitArgs::new().timespec(&time);
        let Err(error) = self.uring.submitter().submit_with_args(1, &arguments) else {
            return;
        };
        match error.raw_os_error() {
            Some(libc::ETIME | libc::EINTR) => {}
            // As in `enter`, which also does without a time limit what could not be done with one.
            _ => self.enter(0),
        }
    }

    fn collect(&mut self) {
        let completions = self.uring.completion();
        let triple = |c: cqueue::Entry| (c.user_data(), c.result(), c.flags());
        self.reaped.extend(completions.map(triple));
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // R1: rather a leak than a kernel that writes to freed memory.
            std::mem::forget(std::mem::take(&mut self.transfers));
            return;
        }
        while self.in_flight > 0 {
            self.finished.clear();
            self.fired.clear();
            self.turn(Wait::Forever);
        }
    }
}

/// When the kernel writes down what is over.
#[derive(Debug, Clone, Copy)]
enum Completing {
    /// It interrupts the thread for it.
    AtOnce,
    /// With the thread's next call; a flag says that there is something.
    WhenAsked,
}

fn build(completing: Completing) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder
        .dontfork()
        .setup_r_disabled()
        .setup_cqsize(COMPLETIONS);
    match completing {
        Completing::AtOnce => {}
        Completing::WhenAsked => {
            builder.setup_coop_taskrun().setup_taskrun_flag();
        }
    }
    builder.build(SUBMISSIONS)
}

fn poll(fd: RawFd, key: WatchKey) -> squeue::Entry {
    let events = u32::from(libc::POLLIN.cast_unsigned());
    opcode::PollAdd::new(types::Fd(fd), events)
        .multi(true)
        .build()
        .user_data(WATCH | u64::from(key.0))
}

/// What O_DIRECT asks of buffers and offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DirectAlignment {
    /// Addresses and lengths in memory.
    pub(crate) memory: usize,
    /// Offsets and lengths in the file.
    pub(crate) offset: u64,
}

/// What the file system says about O_DIRECT on `file`; sectors where it says nothing (tmpfs, old kernels).
pub(crate) fn direct_alignment(file: &File) -> io::Result<DirectAlignment> {
    // SAFETY: all zeros is a value of this plain structure.
    let mut info: libc::statx = unsafe { std::mem::zeroed() };
    let (path, flags, mask) = (c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
    // SAFETY: the path is a C string, and `info` is written by the call alone.
    let result = unsafe { libc::statx(file.as_raw_fd(), path, flags, mask, &raw mut info) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let known = info.stx_mask & libc::STATX_DIOALIGN != 0;
    let or_sector = |value: u32| if known && value > 0 { value } else { 512 };
    Ok(DirectAlignment {
        memory: to_usize(u64::from(or_sector(info.stx_dio_mem_align))),
        offset: u64::from(or_sector(info.stx_dio_offset_align)),
    })
}

/// Takes over a descriptor that this process was started with (`--fd`).
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD touches no memory.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: it is open, and called once and first of all, so nothing in this process owns it yet.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An eventfd as a plain descriptor, which `vmm-sys-util` has no safe way to.
pub(crate) fn owned(eventfd: EventFd) -> OwnedFd {
    // SAFETY: `into_raw_fd` gives up the only ownership of an open descriptor.
    unsafe { OwnedFd::from_raw_fd(eventfd.into_raw_fd()) }
}

/// Lengths of memory fit an address: this daemon runs on 64-bit hosts only.
pub(crate) fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("a 64-bit host")
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn zeros_are_looked_for_as_far_as_is_said_and_no_further() {
        let memory = Arc::new(crate::chain::tests::memory());
        let piece = |at, len| Piece {
            at: vm_memory::GuestAddress(at),
            len,
        };
        let at = |at| vm_memory::GuestAddress(at);
        memory.write_slice(&[1], at(0x3000)).unwrap();
        let pieces = [piece(0x1000, 0x1800), piece(0x2800, 0x1000)];
        let buffer = GuestBuffer::new(&memory, &pieces).unwrap();
        for (len, zeros) in [(0, true), (0x1800, true), (0x2000, true), (0x2001, false)] {
            assert_eq!(buffer.begins_with_zeros(len), zeros, "{len}");
        }
    }

    #[test]
    fn a_ring_opens_no_sockets() {
        let Ok(mut ring) = Ring::new() else {
            eprintln!("this host forbids io_uring: not tested");
            return;
        };
        let socket = opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build();
        ring.push(&socket.user_data(UNWATCHED));
        ring.enter(1);
        ring.collect();
        let results: Vec<_> = ring.reaped.iter().map(|(_, result, _)| *result).collect();
        assert_eq!(results, [-libc::EACCES]);
    }

    #[test]
    fn a_burst_is_handed_over_before_its_end() {
        let Ok(mut ring) = Ring::new() else {
            eprintln!("this host forbids io_uring: not tested");
            return;
        };
        let file = Arc::new(tempfile::tempfile().unwrap());
        let handed_over = (1..=27).filter(|count| {
            ring.start(Transfer::sync(*count, Arc::clone(&file)));
            !ring.has_unsubmitted()
        });
        // More than storage has, and eights at most.
        assert!(handed_over.eq([2, 5, 11, 19, 27]));
        let mut finished = Vec::new();
        while ring.in_flight() > 0 {
            ring.turn(Wait::Forever);
            finished.extend(std::iter::from_fn(|| ring.next_finished()).map(|over| over.token));
        }
        finished.sort_unstable();
        assert!(finished.into_iter().eq(1..=27));
    }

    #[test]
    fn only_a_small_transfer_that_is_alone_is_soon_over() {
        let Ok(mut ring) = Ring::new() else {
            eprintln!("this host forbids io_uring: not tested");
            return;
        };
        let memory = Arc::new(crate::chain::tests::memory());
        let file = Arc::new(tempfile::tempfile().unwrap());
        let write = |len| {
            let at = vm_memory::GuestAddress(0x1000);
            let buffer = GuestBuffer::new(&memory, &[Piece { at, len }]).unwrap();
            Transfer::data(1, Operation::Write, Arc::clone(&file), 0, buffer, None)
        };
        let drain = |ring: &mut Ring| {
            while ring.in_flight() > 0 {
                ring.turn(Wait::Forever);
            }
            assert!(!ring.is_soon_over());
        };
        ring.start(write(4096));
        assert!(ring.is_soon_over() && ring.has_unsubmitted());
        ring.hand_over();
        assert!(!ring.has_unsubmitted());
        ring.start(write(4096));
        assert!(!ring.is_soon_over(), "two");
        drain(&mut ring);
        ring.start(Transfer::sync(1, Arc::clone(&file)));
        assert!(!ring.is_soon_over(), "a sync");
        drain(&mut ring);
        ring.start(write(0x2_0000));
        assert!(!ring.is_soon_over(), "a large one");
        drain(&mut ring);
    }
}
