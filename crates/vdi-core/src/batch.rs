//! Many writes that share their syncs, for maintenance that copies whole blocks.
//!
//! A write over a parent's data must be synced before it is published (W2). [`Disk::write_at`] does that for
//! each; here they are kept until there are as many as the caller wants, and one sync serves all. Not for
//! guests: what was written shows only after [`Batch::finish`].

use std::sync::Arc;
use std::task::Waker;

use crate::disk::{Disk, Unpark};
use crate::reservation::{Reservation, Reserve};
use crate::units::SectorRange;
use crate::visit::Lane;
use crate::writer::WriteError;

/// How much waits for one sync where nobody else waits: enough that its cost does not matter.
pub(crate) const MOST_BYTES: u64 = 64 << 20;

/// Writes that were done but do not show yet. Dropping it undoes them.
#[derive(Debug)]
pub(crate) struct Batch<'d> {
    disk: &'d Arc<Disk>,
    lane: Lane,
    waker: Waker,
    written: Vec<Reservation>,
    written_bytes: u64,
    most_bytes: u64,
}

impl<'d> Batch<'d> {
    pub(crate) fn new(disk: &'d Arc<Disk>, most_bytes: u64) -> Self {
        Self {
            disk,
            lane: disk.lane(),
            waker: Waker::from(Arc::new(Unpark(std::thread::current()))),
            written: Vec::new(),
            written_bytes: 0,
            most_bytes,
        }
    }

    /// Writes `buf`, which has the range's length.
    pub(crate) fn write(&mut self, range: SectorRange, buf: &[u8]) -> Result<(), WriteError> {
        let reservation = self.reserve(range)?;
        let mut rest = buf;
        for extent in reservation.extents() {
            let len = usize::try_from(extent.len_bytes).expect("an extent is inside the buffer");
            let (piece, behind) = rest.split_at(len);
            let written = self.disk.top().storage.write_all_at(piece, extent.at);
            written.map_err(|source| WriteError::Data { source })?;
            rest = behind;
        }
        self.disk.fill_from_parents(&reservation)?;
        self.written.push(reservation);
        self.written_bytes += range.len_bytes();
        if self.written_bytes >= self.most_bytes {
            self.finish()?;
        }
        Ok(())
    }

    /// Publishes what was written.
    pub(crate) fn finish(&mut self) -> Result<(), WriteError> {
        self.written_bytes = 0;
        if self.written.iter().any(Reservation::needs_sync) {
            let flush = self.disk.begin_data_sync();
            let synced = self.disk.top().storage.sync();
            self.disk.end_data_sync(flush, synced, &mut self.written)?;
        }
        self.disk.commit(&mut self.written)
    }

    fn reserve(&mut self, range: SectorRange) -> Result<Reservation, WriteError> {
        loop {
            match self.disk.reserve(range, &self.lane, &self.waker)? {
                Reserve::Ready(reservation) => return Ok(reservation),
                Reserve::Parked => match self.disk.do_chores() {
                    Ok(true) => {}
                    // It waits for what this batch holds: a block in transition, or a visit.
                    Ok(false) if !self.written.is_empty() => self.finish()?,
                    Ok(false) => std::thread::park(),
                    // Told by the next attempt.
                    Err(WriteError::NoSpace { .. }) => {}
                    Err(error) => return Err(error),
                },
            }
        }
    }
}
