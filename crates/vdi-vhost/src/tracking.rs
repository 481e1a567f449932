//! In-flight tracking: which chains were taken from a ring and not given back yet, in memory that the front end
//! keeps while this process does not live.
//!
//! A daemon that is killed leaves chains behind that are neither in the part of the available ring that the next one
//! would look at nor in the used ring. The front end hands the region to the next daemon, which learns from it what
//! to start again, and where the available ring goes on.
//!
//! Layout, little to it and all of it the protocol's (split rings, host byte order):
//!
//! ```text
//! region  │ queue 0 │ queue 1 │ … │ trailer │            each at a multiple of 64 bytes
//! queue   │ features u64 │ version u16 │ desc_num u16 │ last_batch_head u16 │ used_idx u16 │ state × desc_num │
//! state   │ inflight u8 │ padding [u8; 5] │ next u16 │ counter u64 │
//! trailer │ magic u64 │ writeback u8 │                  our own: the protocol leaves the size to the back end
//! ```
//!
//! Invariants:
//!
//! - **T1** A chain is recorded before its request is started, in the order of the available ring. So the ring goes on
//!   at `used index + chains recorded`, whatever the front end believes.
//! - **T2** A chain is a batch of its own: it is linked as the last batch, put into the used ring, then cleared, then
//!   `used_idx` follows. A death between any two of these leaves `used_idx` behind the used ring by at most that one
//!   batch, and recovery clears it by its links.
//! - **T3** What is read from the region is checked: the front end can write there, and may have got it from elsewhere.
//!   It is read only when a ring starts; a running ring only writes.
//!
//! The trailer keeps the guest's choice of `writeback`, which front ends do not send again after a reconnect.
//!
//! Not here: which heads mean what (`queue`), who starts them (`worker`).
//!
//! Source: vhost-user protocol, "Inflight I/O tracking", "VHOST_USER_GET_INFLIGHT_FD".

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserInflight, VhostUserMemoryRegion};
use vm_memory::{AtomicAccess, Bytes, GuestMemoryRegion, MemoryRegionAddress};

use crate::device::Writeback;
use crate::fault::Account;
use crate::memory::{MemoryError, Region};

/// Every queue's part begins at a multiple of this: a cache line.
const ALIGNMENT: u64 = 64;

/// Bytes before the states of the descriptors.
const HEADER_BYTES: u64 = 16;

/// Bytes of the state of one descriptor.
const STATE_BYTES: u64 = 16;

/// The version of the layout.
const VERSION: u16 = 1;

/// Bytes of the trailer.
const TRAILER_BYTES: u64 = ALIGNMENT;

/// Tells our trailer from whatever another back end has there: "vdivhost".
const TRAILER_MAGIC: u64 = u64::from_be_bytes(*b"vdivhost");

/// Most queues and descriptors that are tracked: what [`crate::rings`] allows. Bounds the region at 4 MiB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Queues of the device.
    pub(crate) queues: u16,
    /// Descriptors of a queue.
    pub(crate) queue_size: u16,
}

/// The whole region.
#[derive(Debug)]
pub(crate) struct Tracking {
    region: Region,
    queues: u16,
    queue_size: u16,
}

/// One queue's part of it.
#[derive(Debug)]
pub(crate) struct Tracker {
    tracking: Arc<Tracking>,
    /// Where the queue's part begins.
    base: u64,
    /// The number of the next chain.
    counter: u64,
    last_batch_head: u16,
}

/// What a ring has to go on with.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Chains to start again, in the order in which the guest made them available.
    pub(crate) heads: Vec<u16>,
    /// The index of the next chain to take.
    pub(crate) next_available: u16,
    /// The ring was tracked before, so the trailer tells what its guest chose.
    pub(crate) was_tracked: bool,
    /// The region is about another ring, and what it had in flight is forgotten.
    pub(crate) was_stale: bool,
}

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrackingError {
    /// More than the device has.
    #[error(
        "in-flight tracking is asked for {queues} queues of {queue_size} descriptors, \
         but there are at most {} of {}", limits.queues, limits.queue_size
    )]
    TooLarge {
        queues: u16,
        queue_size: u16,
        limits: Limits,
    },
    /// The memory cannot be made.
    #[error("the memory for in-flight tracking cannot be made")]
    Make(#[source] io::Error),
    /// It is not as long as its queues need.
    #[error("the region for in-flight tracking has {found} bytes, but its queues need {needed}")]
    TooShort { found: u64, needed: u64 },
    /// Counters could not be written at once.
    #[error(
        "the region for in-flight tracking begins at byte {offset} of its file, which is no multiple of {ALIGNMENT}"
    )]
    Misaligned { offset: u64 },
    /// The file is too short, or cannot be mapped.
    #[error("the region for in-flight tracking cannot be mapped")]
    Map(#[source] MemoryError),
    /// A later one, or garbage.
    #[error(
        "the region for in-flight tracking has version {found} for queue {queue}; only {VERSION} is supported"
    )]
    Version { queue: u16, found: u16 },
    /// It says something else than the message it came with.
    #[error(
        "the region for in-flight tracking has {found} descriptors for queue {queue}, \
         but its front end says {expected}"
    )]
    Descriptors {
        queue: u16,
        found: u16,
        expected: u16,
    },
    /// The ring is larger than what is tracked.
    #[error(
        "queue {queue} has {size} descriptors, but in-flight tracking was set up for {tracked}"
    )]
    RingTooLarge { queue: u16, size: u16, tracked: u16 },
    /// A head that no ring of this size has.
    #[error(
        "the region for in-flight tracking names descriptor {head} of queue {queue}, which has {size}"
    )]
    BadHead { queue: u16, head: u16, size: u16 },
    /// The kernel let it be mapped and not be used.
    #[error("the region for in-flight tracking cannot be read")]
    Access(#[from] vm_memory::GuestMemoryError),
}

type Result<T> = std::result::Result<T, TrackingError>;

impl Tracking {
    /// Makes an empty region; the front end keeps it and gives it back.
    pub(crate) fn make(
        wanted: &VhostUserInflight,
        limits: Limits,
        writeback: Writeback,
        account: &Account,
    ) -> Result<(VhostUserInflight, File)> {
        let (queues, queue_size) = check_limits(wanted, limits)?;
        let len = trailer_at(queues, queue_size) + TRAILER_BYTES;
        let file = make_file(len).map_err(TrackingError::Make)?;
        let message = VhostUserInflight::new(len, 0, queues, queue_size);
        let own = file.try_clone().map_err(TrackingError::Make)?;
        Self::map(&message, own, limits, account)?.set_writeback(writeback)?;
        Ok((message, file))
    }

    /// Takes the region that the front end kept.
    pub(crate) fn map(
        message: &VhostUserInflight,
        file: File,
        limits: Limits,
        account: &Account,
    ) -> Result<Self> {
        let (queues, queue_size) = check_limits(message, limits)?;
        let (offset, found) = (message.mmap_offset, message.mmap_size);
        let needed = trailer_at(queues, queue_size);
        if found < needed {
            return Err(TrackingError::TooShort { found, needed });
        }
        if !offset.is_multiple_of(ALIGNMENT) {
            return Err(TrackingError::Misaligned { offset });
        }
        // What lies behind the trailer is nobody's.
        let len = found.min(needed + TRAILER_BYTES);
        let region = Region::map(
            &VhostUserMemoryRegion::new(0, len, 0, offset),
            file,
            account,
        )
        .map_err(TrackingError::Map)?;
        Ok(Self {
            region,
            queues,
            queue_size,
        })
    }

    /// The memory that it lies in.
    pub(crate) fn region(&self) -> &Region {
        &self.region
    }

    /// What an earlier daemon knew of the guest's choice of `writeback`.
    pub(crate) fn writeback(&self) -> Result<Option<Writeback>> {
        let at = trailer_at(self.queues, self.queue_size);
        if !self.has_trailer() || self.load::<u64>(at)? != TRAILER_MAGIC {
            return Ok(None);
        }
        Ok(Writeback::from_raw(self.load(at + 8)?))
    }

    /// Leaves the guest's choice of `writeback` to a later daemon. Nothing happens if the region has no trailer.
    pub(crate) fn set_writeback(&self, choice: Writeback) -> Result<()> {
        if !self.has_trailer() {
            return Ok(());
        }
        let at = trailer_at(self.queues, self.queue_size);
        self.store(at + 8, choice.to_raw())?;
        self.store(at, TRAILER_MAGIC)
    }

    fn has_trailer(&self) -> bool {
        self.region.len() >= trailer_at(self.queues, self.queue_size) + TRAILER_BYTES
    }

    fn load<T: AtomicAccess>(&self, at: u64) -> Result<T> {
        Ok(self
            .region
            .load(MemoryRegionAddress(at), Ordering::Acquire)?)
    }

    /// Stores in the order of the program, which is all that another life of this process needs.
    fn store<T: AtomicAccess>(&self, at: u64, value: T) -> Result<()> {
        self.region
            .store(value, MemoryRegionAddress(at), Ordering::Release)?;
        fence(Ordering::Release);
        Ok(())
    }
}

impl Tracker {
    /// The part of `queue`, if it has one, and what its ring, of `size` descriptors and with this used index, has to
    /// go on with.
    pub(crate) fn recover(
        tracking: &Arc<Tracking>,
        queue: u16,
        size: u16,
        ring_used: u16,
    ) -> Result<Option<(Self, Recovered)>> {
        if queue >= tracking.queues {
            return Ok(None);
        }
        let tracked = tracking.queue_size;
        if size > tracked {
            return Err(TrackingError::RingTooLarge {
                queue,
                size,
                tracked,
            });
        }
        let mut tracker = Self {
            tracking: Arc::clone(tracking),
            base: u64::from(queue) * queue_bytes(tracked),
            counter: 0,
            last_batch_head: 0,
        };
        let was_tracked =
            tracker.check_header(queue, ring_used)? && tracking.writeback()?.is_some();
        let was_stale = !tracker.end_last_batch(queue, ring_used)?;
        let heads = tracker.heads_in_flight(queue, size)?;
        let recovered = Recovered {
            next_available: ring_used.wrapping_add(
                u16::try_from(heads.len()).expect("a ring has at most 32768 entries"),
            ),
            heads,
            was_tracked,
            was_stale,
        };
        Ok(Some((tracker, recovered)))
    }

    /// A chain was taken, and is about to be started (T1).
    pub(crate) fn taken(&mut self, head: u16) -> Result<()> {
        let state = self.state(head);
        self.tracking.store(state + 8, self.counter)?;
        self.counter = self.counter.wrapping_add(1);
        self.tracking.store(state, 1_u8)
    }

    /// The chain that was taken last was not started, and is as if it had not been taken (T1).
    pub(crate) fn put_back(&self, head: u16) -> Result<()> {
        self.tracking.store(self.state(head), 0_u8)
    }

    /// A chain is about to be put into the used ring (T2).
    pub(crate) fn giving_back(&mut self, head: u16) -> Result<()> {
        self.tracking
            .store(self.state(head) + 6, self.last_batch_head)?;
        self.last_batch_head = head;
        self.tracking.store(self.base + 12, head)
    }

    /// It is in the used ring, whose index is now `used` (T2).
    pub(crate) fn given_back(&self, head: u16, used: u16) -> Result<()> {
        self.tracking.store(self.state(head), 0_u8)?;
        self.tracking.store(self.base + 14, used)
    }

    /// Accepts a header of ours; false if it was all zeros, then it is made ours: its ring may have come far without.
    fn check_header(&self, queue: u16, ring_used: u16) -> Result<bool> {
        let expected = self.tracking.queue_size;
        match self.tracking.load::<u16>(self.base + 8)? {
            0 => {
                self.tracking.store(self.base + 10, expected)?;
                self.tracking.store(self.base + 14, ring_used)?;
                self.tracking.store(self.base + 8, VERSION)?;
                Ok(false)
            }
            VERSION => match self.tracking.load::<u16>(self.base + 10)? {
                found if found == expected => Ok(true),
                found => Err(TrackingError::Descriptors {
                    queue,
                    found,
                    expected,
                }),
            },
            found => Err(TrackingError::Version { queue, found }),
        }
    }

    /// Clears what reached the used ring in the moment of death (T2). False if the region is about another ring: then
    /// nothing of it is in flight.
    fn end_last_batch(&mut self, queue: u16, ring_used: u16) -> Result<bool> {
        let size = self.tracking.queue_size;
        let behind = ring_used.wrapping_sub(self.tracking.load(self.base + 14)?);
        let fits = behind <= size;
        if fits {
            let mut head: u16 = self.tracking.load(self.base + 12)?;
            for _ in 0..behind {
                if head >= size {
                    return Err(TrackingError::BadHead { queue, head, size });
                }
                self.tracking.store(self.state(head), 0_u8)?;
                head = self.tracking.load(self.state(head) + 6)?;
            }
        } else {
            for head in 0..size {
                self.tracking.store(self.state(head), 0_u8)?;
            }
        }
        self.tracking.store(self.base + 14, ring_used)?;
        Ok(fits)
    }

    fn heads_in_flight(&mut self, queue: u16, size: u16) -> Result<Vec<u16>> {
        let mut found = Vec::new();
        for head in 0..self.tracking.queue_size {
            if self.tracking.load::<u8>(self.state(head))? != 0 {
                if head >= size {
                    return Err(TrackingError::BadHead { queue, head, size });
                }
                found.push((self.tracking.load::<u64>(self.state(head) + 8)?, head));
            }
        }
        found.sort_unstable();
        let last = found.last().map_or(0, |(counter, _)| *counter);
        self.counter = last.wrapping_add(1);
        Ok(found.into_iter().map(|(_, head)| head).collect())
    }

    fn state(&self, head: u16) -> u64 {
        self.base + HEADER_BYTES + u64::from(head) * STATE_BYTES
    }
}

fn check_limits(message: &VhostUserInflight, limits: Limits) -> Result<(u16, u16)> {
    let (queues, queue_size) = (message.num_queues, message.queue_size);
    if queues > limits.queues || queue_size > limits.queue_size {
        return Err(TrackingError::TooLarge {
            queues,
            queue_size,
            limits,
        });
    }
    Ok((queues, queue_size))
}

fn queue_bytes(queue_size: u16) -> u64 {
    (HEADER_BYTES + u64::from(queue_size) * STATE_BYTES).next_multiple_of(ALIGNMENT)
}

fn trailer_at(queues: u16, queue_size: u16) -> u64 {
    u64::from(queues) * queue_bytes(queue_size)
}

/// Memory whose size nobody can change, so that no access can fail later.
fn make_file(len: u64) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"vdi-vhost-inflight", flags)?);
    file.set_len(len)?;
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}
