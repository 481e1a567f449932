//! Transfers: one piece of work on a file each, with everything the kernel needs for it.
//!
//! A transfer goes in rounds: what one system call left undone, because it was cut short, interrupted, had too many
//! iovecs or went through a bounce buffer, the next one does. Not here: the calls themselves (`ring`).
//!
//! - **R1** A transfer owns what the kernel touches: iovecs, bounce buffer, and guest memory that stays mapped. It must not move
//!   between a submission and its completion, so the ring boxes it.
//! - **R4** Iovecs point into guest memory; a bounce buffer is used only where O_DIRECT's alignment asks for it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{opcode, squeue, types};

use crate::ring::{GuestBuffer, is_zero, run_round, to_usize};

/// Iovecs of one system call: the kernel's UIO_MAXIOV; more is EINVAL.
pub(crate) const MAX_IOVECS: usize = 1024;

/// Bytes of a bounce buffer: large enough that a round costs little beside its copying.
const BOUNCE_BYTES: usize = 256 << 10;

/// The alignment of buffers of our own: a page suits every file.
const BOUNCE_ALIGNMENT: usize = 4096;

/// What is copied or left out as a whole.
const PAGE: usize = 4096;

/// Bytes that fast storage moves in the time of a wake-up or two.
const SMALL: u64 = 64 << 10;

/// How often a transfer that the kernel interrupted or could not queue is started again.
const MAX_RETRIES: u8 = 100;

/// What a transfer does with its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// From the file into guest memory.
    Read,
    /// From guest memory into the file.
    Write,
    /// `fdatasync`.
    Sync,
    /// Gives a range of the file back to the host; it reads as zeros then.
    Punch,
    /// Makes a range of the file zeros, which keeps its space.
    Zero,
}

impl Operation {
    /// The mode of `fallocate(2)` for it.
    pub(crate) fn fallocate_mode(self) -> libc::c_int {
        match self {
            Self::Zero => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
            Self::Punch | Self::Read | Self::Write | Self::Sync => {
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE
            }
        }
    }
}

/// One piece of work on a file, with everything the kernel needs for it (R1).
#[derive(Debug)]
pub(crate) struct Transfer {
    /// Whose work it is; given back with the result.
    token: u64,
    operation: Operation,
    file: Arc<File>,
    /// Where in the file the rest goes.
    at: u64,
    /// What is left to do.
    rest: Rest,
    bounce: Bounce,
    retries: u8,
}

/// What a transfer has left to do.
#[derive(Debug)]
enum Rest {
    /// A single call.
    Call,
    /// A single call about so many bytes of the file.
    Range(u64),
    /// Guest memory to move.
    Guest(GuestBuffer),
    /// Bytes to move through our own buffer.
    Own(Own),
}

/// Bytes that come from a file, or are zeros, and go to another place, by way of the bounce buffer.
#[derive(Debug)]
struct Own {
    /// Where they come from; nowhere if they are zeros.
    source: Option<(Arc<File>, u64)>,
    target: (Arc<File>, u64),
    /// Bytes that are not in the target yet.
    left: u64,
}

/// How a transfer meets the alignment of its file.
#[derive(Debug)]
pub(crate) enum Bounce {
    /// It does, or there is none to meet.
    NotNeeded,
    /// Needed at this alignment, and not there yet.
    Wanted(usize),
    /// In use.
    Held(BounceBuffer),
}

/// An aligned buffer between an unaligned guest buffer and an O_DIRECT file.
#[derive(Debug)]
pub(crate) struct BounceBuffer {
    bytes: Vec<u8>,
    /// Where the aligned part begins.
    start: usize,
    /// The current round's part of `bytes`.
    iovec: libc::iovec,
}

impl BounceBuffer {
    /// A buffer for rounds of up to [`BOUNCE_BYTES`].
    pub(crate) fn new(align: usize) -> Self {
        // They are handed from one transfer to the next, which may want more.
        let align = align.max(BOUNCE_ALIGNMENT);
        let bytes = vec![0; BOUNCE_BYTES + align];
        let start = bytes.as_ptr().align_offset(align);
        let iovec = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            bytes,
            start,
            iovec,
        }
    }

    /// Begins a round of `len` bytes.
    fn begin(&mut self, len: usize) -> &mut [u8] {
        let round = &mut self.bytes[self.start..][..len];
        self.iovec = libc::iovec {
            iov_base: round.as_mut_ptr().cast(),
            iov_len: len,
        };
        round
    }

    /// Ends the round of whoever had it before.
    pub(crate) fn reset(&mut self) {
        self.iovec.iov_len = 0;
    }

    /// Has the round fail as one from memory that is gone does (EFAULT): its bytes are not the guest's.
    fn spoil(&mut self) {
        self.iovec.iov_base = std::ptr::null_mut();
    }

    /// Begins the round of `len` bytes again with what is there, but for the pages of zeros that it begins and ends with: where what is
    /// left begins, if anything is.
    fn rewind_to_stored(&mut self, len: usize) -> Option<usize> {
        let round = &mut self.bytes[self.start..][..len];
        let stored = |page: &[u8]| !is_zero(page);
        let first = round.chunks(PAGE).position(stored)?;
        let last = round.chunks(PAGE).rposition(stored)?;
        let skipped = first * PAGE;
        let left = &mut round[skipped..len.min((last + 1) * PAGE)];
        self.iovec = libc::iovec {
            iov_base: left.as_mut_ptr().cast(),
            iov_len: left.len(),
        };
        Some(skipped)
    }

    /// Goes on behind the first `len` bytes of the round; true if that was its end.
    fn consume(&mut self, len: usize) -> bool {
        let len = len.min(self.iovec.iov_len);
        self.iovec.iov_base = self.iovec.iov_base.cast::<u8>().wrapping_add(len).cast();
        self.iovec.iov_len -= len;
        self.iovec.iov_len == 0
    }

    /// The first `len` bytes of the round.
    fn front(&self, len: usize) -> &[u8] {
        &self.bytes[self.start..][..len.min(self.iovec.iov_len)]
    }
}

/// What became of a transfer's round.
#[derive(Debug)]
pub(crate) enum Progress {
    /// It was the last.
    Done(io::Result<()>),
    /// Another one follows.
    Again,
}

impl Transfer {
    /// All of `buffer`, from or to `file` at byte `at`. With an alignment, a buffer that does not meet it is
    /// copied through an aligned one.
    pub(crate) fn data(
        token: u64,
        operation: Operation,
        file: Arc<File>,
        at: u64,
        buffer: GuestBuffer,
        align: Option<usize>,
    ) -> Self {
        let bounce = match align {
            Some(align) if !buffer.is_aligned_to(align) => Bounce::Wanted(align),
            _ => Bounce::NotNeeded,
        };
        let rest = Rest::Guest(buffer);
        Self {
            token,
            operation,
            file,
            at,
            rest,
            bounce,
            retries: 0,
        }
    }

    /// Copies `len` bytes from one place to another (copy-on-write). The target reads as zeros before, so pages of zeros that a round
    /// begins or ends with are not written: where the source has holes, the target mostly has them too.
    pub(crate) fn copy(
        token: u64,
        source: (Arc<File>, u64),
        target: (Arc<File>, u64),
        len: u64,
    ) -> Self {
        let (file, at) = source.clone();
        let source = Some(source);
        Self {
            token,
            operation: Operation::Read,
            file,
            at,
            rest: Rest::Own(Own {
                source,
                target,
                left: len,
            }),
            bounce: Bounce::Wanted(BOUNCE_ALIGNMENT),
            retries: 0,
        }
    }

    /// Makes `len` bytes of `file` at byte `at` zeros, by [`Operation::Punch`] or [`Operation::Zero`].
    pub(crate) fn clear(
        token: u64,
        operation: Operation,
        file: Arc<File>,
        at: u64,
        len: u64,
    ) -> Self {
        let (rest, bounce) = (Rest::Range(len), Bounce::NotNeeded);
        Self {
            token,
            operation,
            file,
            at,
            rest,
            bounce,
            retries: 0,
        }
    }

    /// Everything written to `file` so far becomes durable.
    pub(crate) fn sync(token: u64, file: Arc<File>) -> Self {
        let (operation, bounce) = (Operation::Sync, Bounce::NotNeeded);
        Self {
            token,
            operation,
            file,
            at: 0,
            rest: Rest::Call,
            bounce,
            retries: 0,
        }
    }

    /// Does all of it at once, on this thread.
    pub(crate) fn run(mut self) -> Finished {
        loop {
            if let Bounce::Wanted(align) = self.bounce {
                self.bounce = Bounce::Held(BounceBuffer::new(align));
            }
            self.prepare();
            let result = run_round(&self);
            if let Progress::Done(result) = self.advance(result) {
                return Finished {
                    token: self.token,
                    result,
                };
            }
        }
    }

    /// Whose work it is.
    pub(crate) fn token(&self) -> u64 {
        self.token
    }

    /// Bytes of guest memory that are not moved yet.
    pub(crate) fn guest_len(&self) -> u64 {
        match &self.rest {
            Rest::Guest(buffer) => buffer.len(),
            Rest::Call | Rest::Range(_) | Rest::Own(_) => 0,
        }
    }

    /// Whether it moves a little guest data and does nothing else.
    pub(crate) fn is_small(&self) -> bool {
        matches!(&self.rest, Rest::Guest(buffer) if buffer.len() <= SMALL)
    }

    /// What it does.
    pub(crate) fn operation(&self) -> Operation {
        self.operation
    }

    /// Its file.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where in the file the next round begins.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Its bounce buffer, or the need for one.
    pub(crate) fn bounce(&mut self) -> &mut Bounce {
        &mut self.bounce
    }

    /// Bytes of the file that a call about a range means.
    pub(crate) fn range_len(&self) -> u64 {
        match self.rest {
            Rest::Range(len) => len,
            Rest::Call | Rest::Guest(_) | Rest::Own(_) => 0,
        }
    }

    /// Fills the bounce buffer, if there is one, for the next round.
    pub(crate) fn prepare(&mut self) {
        let Bounce::Held(bounce) = &mut self.bounce else {
            return;
        };
        match &self.rest {
            Rest::Guest(buffer) => {
                let round = bounce.begin(round_len(buffer.len()));
                if self.operation == Operation::Write {
                    buffer.copy_out(round);
                    if buffer.is_lost() {
                        bounce.spoil(); // F2
                    }
                }
            }
            // Between rounds only: a round that was cut short goes on where it stopped.
            Rest::Own(own) if bounce.iovec.iov_len == 0 => {
                let round = bounce.begin(round_len(own.left));
                if own.source.is_none() {
                    round.fill(0);
                }
            }
            Rest::Own(_) | Rest::Call | Rest::Range(_) => {}
        }
    }

    /// The memory of the next round.
    pub(crate) fn iovecs(&self) -> &[libc::iovec] {
        match (&self.bounce, &self.rest) {
            (Bounce::Held(bounce), _) => std::slice::from_ref(&bounce.iovec),
            (Bounce::NotNeeded | Bounce::Wanted(_), Rest::Guest(buffer)) => {
                let left = buffer.left();
                &left[..left.len().min(MAX_IOVECS)]
            }
            (Bounce::NotNeeded | Bounce::Wanted(_), Rest::Call | Rest::Range(_) | Rest::Own(_)) => {
                &[]
            }
        }
    }

    /// Takes the result of a round: bytes moved, or a negative error number.
    pub(crate) fn advance(&mut self, result: i64) -> Progress {
        let Ok(count) = u64::try_from(result) else {
            return self.failed(i32::try_from(-result).unwrap_or(libc::EIO));
        };
        if matches!(self.rest, Rest::Call | Rest::Range(_)) {
            return Progress::Done(Ok(()));
        }
        if count == 0 {
            return Progress::Done(Err(match self.operation {
                Operation::Read => io::ErrorKind::UnexpectedEof.into(),
                Operation::Write | Operation::Sync | Operation::Punch | Operation::Zero => {
                    io::ErrorKind::WriteZero.into()
                }
            }));
        }
        self.at += count;
        self.retries = 0;
        match &mut self.rest {
            Rest::Guest(buffer) => {
                if let (Bounce::Held(bounce), Operation::Read) = (&self.bounce, self.operation) {
                    buffer.fill_from(bounce.front(to_usize(count)));
                }
                buffer.consume(count);
                match buffer.len() {
                    0 => Progress::Done(Ok(())),
                    _ => Progress::Again,
                }
            }
            Rest::Own(_) => self.advance_own(to_usize(count)),
            Rest::Call | Rest::Range(_) => Progress::Done(Ok(())),
        }
    }

    /// A round of its own reads all of the round, then writes it.
    fn advance_own(&mut self, count: usize) -> Progress {
        let (Rest::Own(own), Bounce::Held(bounce)) = (&mut self.rest, &mut self.bounce) else {
            return Progress::Done(Ok(()));
        };
        if !bounce.consume(count) {
            return Progress::Again;
        }
        let len = round_len(own.left);
        if self.operation == Operation::Read
            && let Some(skipped) = bounce.rewind_to_stored(len)
        {
            self.operation = Operation::Write;
            let (file, at) = own.target.clone();
            (self.file, self.at) = (file, at + skipped as u64);
            return Progress::Again;
        }
        let done = len as u64;
        own.left -= done;
        own.target.1 += done;
        if own.left == 0 {
            return Progress::Done(Ok(()));
        }
        if let Some((file, at)) = &mut own.source {
            *at += done;
            self.operation = Operation::Read;
            (self.file, self.at) = (Arc::clone(file), *at);
        }
        Progress::Again
    }

    fn failed(&mut self, errno: i32) -> Progress {
        if matches!(errno, libc::EINTR | libc::EAGAIN) && self.retries < MAX_RETRIES {
            self.retries += 1;
            return Progress::Again;
        }
        if let (libc::EOPNOTSUPP, Rest::Range(left)) = (errno, &self.rest) {
            // The file system has no such call (ZERO_RANGE on tmpfs): zeros are written.
            let (target, left) = ((Arc::clone(&self.file), self.at), *left);
            self.operation = Operation::Write;
            self.bounce = Bounce::Wanted(BOUNCE_ALIGNMENT);
            self.rest = Rest::Own(Own {
                source: None,
                target,
                left,
            });
            return Progress::Again;
        }
        Progress::Done(Err(io::Error::from_raw_os_error(errno)))
    }

    /// The next round as a submission. Whoever submits it must keep `self` where it is until its completion (R1).
    pub(crate) fn submission(&self) -> squeue::Entry {
        let fd = types::Fd(self.file.as_raw_fd());
        let iovecs = self.iovecs();
        let count = u32::try_from(iovecs.len()).unwrap_or(u32::MAX);
        match (self.operation, iovecs) {
            (Operation::Sync, _) => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            (Operation::Punch | Operation::Zero, _) => opcode::Fallocate::new(fd, self.range_len())
                .offset(self.at)
                .mode(self.operation.fallocate_mode())
                .build(),
            // One stretch needs no vector. What exceeds 32 bits is left to the next round.
            (Operation::Read, [one]) => {
                let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
                opcode::Read::new(fd, one.iov_base.cast(), len)
                    .offset(self.at)
                    .build()
            }
            (Operation::Write, [one]) => {
                let len = u32::try_from(one.iov_len).unwrap_or(u32::MAX);
                opcode::Write::new(fd, one.iov_base.cast(), len)
                    .offset(self.at)
                    .build()
            }
            (Operation::Read, many) => opcode::Readv::new(fd, many.as_ptr(), count)
                .offset(self.at)
                .build(),
            (Operation::Write, many) => opcode::Writev::new(fd, many.as_ptr(), count)
                .offset(self.at)
                .build(),
        }
    }
}

/// Bytes of a round through a buffer of our own.
fn round_len(left: u64) -> usize {
    to_usize(left.min(BOUNCE_BYTES as u64))
}

/// A transfer that is over.
#[derive(Debug)]
pub(crate) struct Finished {
    /// As given to [`Transfer::data`] or [`Transfer::sync`].
    pub(crate) token: u64,
    /// Whether all of it was done.
    pub(crate) result: io::Result<()>,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::chain::Piece;
    use crate::chain::tests::memory;
    use crate::memory::Memory;

    const AT: u64 = 0x1000;

    fn pieces(pieces: &[(u64, u32)]) -> Vec<Piece> {
        let piece = |&(at, len)| Piece {
            at: GuestAddress(at),
            len,
        };
        pieces.iter().map(piece).collect()
    }

    fn file(bytes: &[u8]) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Arc::new(file)
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| u8::try_from(i * 7 % 251).unwrap())
            .collect()
    }

    fn transfer(
        memory: &Arc<Memory>,
        operation: Operation,
        file: &Arc<File>,
        into: &[(u64, u32)],
        align: Option<usize>,
    ) -> Transfer {
        let buffer = GuestBuffer::new(memory, &pieces(into)).unwrap();
        Transfer::data(1, operation, Arc::clone(file), 0, buffer, align)
    }

    /// Does at most `step` bytes of a round, as a kernel may that cuts calls short.
    fn run_in_steps(transfer: &mut Transfer, step: usize) -> io::Result<()> {
        loop {
            transfer.prepare();
            let bytes = pattern(0x4000);
            let from = to_usize(transfer.at());
            let first = transfer.iovecs()[0].iov_len.min(step);
            let part = &bytes[from..][..first];
            // Stands for the kernel: fills the beginning of the round.
            let Rest::Guest(buffer) = &transfer.rest else {
                panic!("it has guest memory")
            };
            buffer.fill_from(part);
            if let Progress::Done(result) = transfer.advance(i64::try_from(first).unwrap()) {
                return result;
            }
        }
    }

    #[test]
    fn a_read_that_is_cut_short_goes_on_where_it_stopped() {
        let memory = Arc::new(memory());
        let into = [(AT, 100), (0x7_ff00, 0x200), (0x3000, 0x1000)];
        let mut read = transfer(&memory, Operation::Read, &file(&[]), &into, None);
        run_in_steps(&mut read, 33).unwrap();
        let mut found = vec![0; 100 + 0x200 + 0x1000];
        memory
            .read_slice(&mut found[..100], GuestAddress(AT))
            .unwrap();
        memory
            .read_slice(&mut found[100..0x264], GuestAddress(0x7_ff00))
            .unwrap();
        memory
            .read_slice(&mut found[0x264..], GuestAddress(0x3000))
            .unwrap();
        assert!(found == pattern(found.len()));
    }

    #[test]
    fn reading_beyond_the_end_of_the_file_is_an_error_and_no_zeros() {
        let memory = Arc::new(memory());
        let read = transfer(
            &memory,
            Operation::Read,
            &file(&pattern(700)),
            &[(AT, 1024)],
            None,
        );
        let error = read.run().result.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn interruptions_are_retried_and_other_errors_are_not() {
        let memory = Arc::new(memory());
        let mut read = transfer(&memory, Operation::Read, &file(&[]), &[(AT, 512)], None);
        for errno in [libc::EINTR, libc::EAGAIN] {
            assert!(matches!(read.advance(-i64::from(errno)), Progress::Again));
        }
        let failed = read.advance(-i64::from(libc::ENOSPC));
        let Progress::Done(Err(error)) = failed else {
            panic!("{failed:?}")
        };
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        let again = (0..=MAX_RETRIES).map(|_| read.advance(-i64::from(libc::EAGAIN)));
        assert!(matches!(again.last(), Some(Progress::Done(Err(_)))));
    }

    #[test]
    fn more_iovecs_than_a_call_takes_are_done_in_rounds() {
        let memory = Arc::new(memory());
        let into: Vec<_> = (0..1500).map(|i| (AT + i * 8, 8)).collect();
        let bytes = pattern(1500 * 8);
        let read = transfer(&memory, Operation::Read, &file(&bytes), &into, None);
        assert_eq!(read.iovecs().len(), MAX_IOVECS);
        read.run().result.unwrap();
        let mut found = vec![0; bytes.len()];
        memory.read_slice(&mut found, GuestAddress(AT)).unwrap();
        assert!(found == bytes);
    }

    #[test]
    fn an_unaligned_buffer_goes_through_an_aligned_one_in_both_directions() {
        let memory = Arc::new(memory());
        let len = 0x5_0000;
        let bytes = pattern(len);
        let source = file(&bytes);
        let into = [(AT + 1, 511), (0x1_0003, 0x4_fe01)];
        let read = transfer(&memory, Operation::Read, &source, &into, Some(512));
        assert!(matches!(read.bounce, Bounce::Wanted(512)));
        read.run().result.unwrap();
        let target = file(&[]);
        let mut write = transfer(&memory, Operation::Write, &target, &into, Some(512));
        *write.bounce() = Bounce::Held(BounceBuffer::new(512));
        write.prepare();
        assert!((write.iovecs()[0].iov_base as usize).is_multiple_of(512));
        write.run().result.unwrap();
        let mut found = vec![0; len];
        target.read_exact_at(&mut found, 0).unwrap();
        assert!(found == bytes);
    }

    #[test]
    fn a_copy_leaves_out_the_zeros_that_its_rounds_begin_and_end_with() {
        let len = 3 * BOUNCE_BYTES + 5 * 512;
        let mut bytes = vec![0; len];
        bytes[5 * PAGE + 7] = 1;
        bytes[9 * PAGE - 1] = 2;
        // The second round is nothing but zeros; the last one ends with a part of a page.
        bytes[2 * BOUNCE_BYTES] = 3;
        bytes[len - 1] = 4;
        let source = file(&bytes);
        // What is not written can be told by what was there before.
        let target = file(&vec![9; len + 512]);
        let (from, to) = ((source, 0), (Arc::clone(&target), 512));
        Transfer::copy(1, from, to, len as u64)
            .run()
            .result
            .unwrap();
        let mut expected = bytes;
        for left_out in [
            0..5 * PAGE,
            9 * PAGE..2 * BOUNCE_BYTES,
            2 * BOUNCE_BYTES + PAGE..3 * BOUNCE_BYTES,
        ] {
            expected[left_out].fill(9);
        }
        let mut found = vec![0; len];
        target.read_exact_at(&mut found, 512).unwrap();
        assert!(found == expected);
    }

    #[test]
    fn an_aligned_buffer_is_not_bounced() {
        let memory = Arc::new(memory());
        // Mappings begin at pages, so guest alignment is alignment here.
        let read = transfer(
            &memory,
            Operation::Read,
            &file(&[]),
            &[(AT, 512), (0x3200, 1024)],
            Some(512),
        );
        assert!(matches!(read.bounce, Bounce::NotNeeded));
    }
}
