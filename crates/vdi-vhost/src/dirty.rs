//! The dirty log of a live migration: which pages of the guest's memory this process has written.
//!
//! A front end that moves its guest elsewhere copies the guest's memory while the guest runs, and copies again what
//! changed. It sees what the guest's processors write, and not what we do: read data, status bytes and the used ring. What
//! is not marked here arrives stale, and nobody notices.
//!
//! - **D1** A page is marked after it was written, and before the ring stops: a front end that takes the mark away and
//!   copies the page has the new contents, or finds the mark again.
//! - **D2** The log changes only while nothing is in flight, so a request is either marked whole or was over before.
//! - Marks are made for all that a request may have written, whether it did or not: one too many costs a copy. What a chain names and
//!   its request does not write is not marked: a guest could name terabytes of the same memory. What a read writes is marked window by
//!   window (`inflight`), since it may fill as much as the disk has.
//!
//! Source: vhost-user protocol, "Migration".

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vhost::vhost_user::message::{VhostUserLog, VhostUserMemoryRegion};
use vm_memory::{GuestAddress, GuestMemoryRegion, MemoryRegionAddress, VolatileMemory};

use crate::chain::Pieces;
use crate::fault::Account;
use crate::memory::{Memory, MemoryError, Region};

/// Bytes that one bit stands for.
const PAGE: u64 = 4096;

/// The bitmap that the front end shares: page `n` is bit `n % 8` of byte `n / 8`.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    bitmap: Region,
}

impl DirtyLog {
    /// Maps the log that the front end described.
    pub(crate) fn map(
        log: &VhostUserLog,
        file: File,
        account: &Account,
    ) -> Result<Self, MemoryError> {
        let region = VhostUserMemoryRegion::new(0, log.mmap_size, 0, log.mmap_offset);
        Region::map(&region, file, account).map(|bitmap| Self { bitmap })
    }

    /// The memory that it lies in.
    pub(crate) fn region(&self) -> &Region {
        &self.bitmap
    }

    /// How many bytes of guest memory, from address 0 on, it has bits for.
    pub(crate) fn covers(&self) -> u64 {
        self.bitmap.len().saturating_mul(8 * PAGE)
    }

    /// Marks the pages of `len` bytes from `at` (D1). What lies beyond the log is nobody's memory.
    pub(crate) fn mark(&self, at: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|rest| at.checked_add(rest)) else {
            return;
        };
        for page in at / PAGE..=(last / PAGE).min(self.covers() / PAGE) {
            self.mark_page(page);
        }
    }

    fn mark_page(&self, page: u64) {
        let Ok(byte) = self.bitmap.get_slice(MemoryRegionAddress(page / 8), 1) else {
            return;
        };
        if let Ok(bits) = byte.get_atomic_ref::<AtomicU8>(0) {
            bits.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}

/// What a worker has of the guest: its memory, and where writes to it are marked.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    /// The memory.
    pub(crate) memory: Arc<Memory>,
    /// The log, while a migration wants one.
    pub(crate) log: Option<Arc<DirtyLog>>,
}

/// What of a request's buffers is still to be marked.
#[derive(Debug)]
pub(crate) struct Dirty {
    log: Arc<DirtyLog>,
    /// Those of its data, of which the first `used` are marked, and `marked` bytes in all.
    data: Pieces,
    used: usize,
    marked: u64,
    status_at: GuestAddress,
}

impl Guest {
    /// A guest without memory.
    pub(crate) fn none() -> Self {
        Self {
            memory: Arc::new(Memory::new()),
            log: None,
        }
    }

    /// What is to be marked of buffers that may be written, and of a status.
    pub(crate) fn dirty(
        &self,
        data: impl FnOnce() -> Pieces,
        status_at: GuestAddress,
    ) -> Option<Dirty> {
        self.log.as_ref().map(|log| Dirty {
            log: Arc::clone(log),
            data: data(),
            used: 0,
            marked: 0,
            status_at,
        })
    }
}

impl Dirty {
    /// Marks the first `bytes` of the data, as far as they are not marked yet.
    pub(crate) fn mark_data(&mut self, bytes: u64) {
        let mut missing = bytes.saturating_sub(self.marked);
        while let Some(piece) = self.data.get_mut(self.used)
            && missing > 0
        {
            let len = u32::try_from(missing).map_or(piece.len, |most| most.min(piece.len));
            self.log.mark(piece.at.0, len.into());
            // In the guest's memory, or nothing would have been written.
            piece.at = GuestAddress(piece.at.0.saturating_add(len.into()));
            piece.len -= len;
            self.used += usize::from(piece.len == 0);
            self.marked += u64::from(len);
            missing -= u64::from(len);
        }
    }

    /// Marks the status.
    pub(crate) fn mark_status(&self) {
        self.log.mark(self.status_at.0, 1);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::chain::Piece;

    #[test]
    fn every_page_that_is_touched_is_marked_and_no_other() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x3000).unwrap();
        let own = file.try_clone().unwrap();
        // It begins in the middle of a page of its file and of a byte of nothing.
        let log =
            DirtyLog::map(&VhostUserLog::new(0x10, 0x1003), own, &Account::default()).unwrap();
        assert_eq!(log.covers(), 0x10 * 8 * 4096);
        log.mark(0, 1);
        log.mark(9 * 4096 - 1, 2);
        log.mark(20 * 4096 + 1, 4096);
        log.mark(50 * 4096, 0);
        log.mark(127 * 4096, 1 << 40);
        log.mark(u64::MAX - 10, 20);
        let mut bits = [0; 0x12];
        file.read_exact_at(&mut bits, 0x1002).unwrap();
        let mut expected = [0; 0x12];
        expected[1] = 0b1;
        expected[2] = 0b11;
        expected[3] = 0b11_0000;
        expected[16] = 0b1000_0000;
        assert_eq!(bits, expected);
    }

    #[test]
    fn data_are_marked_as_far_as_they_are_written_and_once() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8).unwrap();
        let own = file.try_clone().unwrap();
        let log = DirtyLog::map(&VhostUserLog::new(8, 0), own, &Account::default());
        let guest = Guest {
            log: Some(Arc::new(log.unwrap())),
            ..Guest::none()
        };
        let piece = |page: u64, len| Piece {
            at: GuestAddress(page * PAGE),
            len,
        };
        let pieces = [piece(3, 8192), piece(20, 512), piece(30, 8192)];
        let status_at = GuestAddress(40 * PAGE);
        let mut dirty = guest.dirty(|| pieces.into_iter().collect(), status_at);
        let dirty = dirty.as_mut().unwrap();
        // What was marked before and is taken away does not come back.
        let marked_by = |dirty: &mut Dirty, bytes| {
            dirty.mark_data(bytes);
            let mut bits = [0; 8];
            file.read_exact_at(&mut bits, 0).unwrap();
            file.write_all_at(&[0; 8], 0).unwrap();
            let bits = u64::from_le_bytes(bits);
            (0..64)
                .filter(|page| bits >> page & 1 == 1)
                .collect::<Vec<u64>>()
        };
        let none: Vec<u64> = Vec::new();
        assert_eq!(marked_by(dirty, 0), none);
        assert_eq!(marked_by(dirty, 4096), [3]);
        assert_eq!(marked_by(dirty, 4096), none);
        assert_eq!(marked_by(dirty, 8192 + 512 + 1), [4, 20, 30]);
        assert_eq!(marked_by(dirty, 100), none);
        assert_eq!(marked_by(dirty, u64::MAX), [30, 31]);
        assert_eq!(marked_by(dirty, u64::MAX), none);
        dirty.mark_status();
        assert_eq!(marked_by(dirty, 0), [40]);
    }

    #[test]
    fn a_log_longer_than_its_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x1000).unwrap();
        let log = VhostUserLog::new(0x1001, 0);
        assert!(DirtyLog::map(&log, file, &Account::default()).is_err());
    }
}
