//! The region in which a back end tracks requests in flight, as the front end that keeps it sees it.
//!
//! Not a check of the region: a test may write anything into it.
//!
//! Source: vhost-user protocol, "Inflight I/O tracking", split virtqueues.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vhost::vhost_user::message::VhostUserInflight;

/// The region and the message that goes with it.
pub struct Inflight {
    /// What GET_INFLIGHT_FD answered.
    pub message: VhostUserInflight,
    /// The memory.
    pub file: File,
}

/// One queue's part of a region, field by field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InflightQueue {
    /// Of the layout.
    pub version: u16,
    /// Descriptors that are tracked.
    pub desc_num: u16,
    /// The head that was put into the used ring last.
    pub last_batch_head: u16,
    /// The used index after that.
    pub used_idx: u16,
    /// For each descriptor: whether its chain is in flight, the link to the batch before, the order of arrival.
    pub states: Vec<(u8, u16, u64)>,
}

impl Inflight {
    /// The same region once more.
    ///
    /// # Panics
    /// If descriptors are short.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        let VhostUserInflight {
            mmap_size,
            mmap_offset,
            num_queues,
            queue_size,
        } = self.message;
        Self {
            message: VhostUserInflight::new(mmap_size, mmap_offset, num_queues, queue_size),
            file: self.file.try_clone().expect("a file can be duplicated"),
        }
    }

    /// Reads a queue's part.
    ///
    /// # Panics
    /// If the region is too short.
    #[must_use]
    pub fn queue(&self, index: u16) -> InflightQueue {
        let base = self.base(index);
        let header = self.read::<16>(base);
        let word = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let state = |head: u64| {
            let bytes = self.read::<16>(base + 16 + 16 * head);
            let counter = bytes[8..].try_into().expect("8 bytes");
            let next = u16::from_ne_bytes([bytes[6], bytes[7]]);
            (bytes[0], next, u64::from_ne_bytes(counter))
        };
        InflightQueue {
            version: word(8),
            desc_num: word(10),
            last_batch_head: word(12),
            used_idx: word(14),
            states: (0..u64::from(self.message.queue_size)).map(state).collect(),
        }
    }

    /// Writes a queue's part.
    ///
    /// # Panics
    /// If the region is too short.
    pub fn set_queue(&self, index: u16, queue: &InflightQueue) {
        let words = [
            queue.version,
            queue.desc_num,
            queue.last_batch_head,
            queue.used_idx,
        ];
        let mut bytes = vec![0; 8];
        bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        for (inflight, next, counter) in &queue.states {
            bytes.extend([*inflight, 0, 0, 0, 0, 0]);
            bytes.extend(next.to_ne_bytes());
            bytes.extend(counter.to_ne_bytes());
        }
        self.file
            .write_all_at(&bytes, self.base(index))
            .expect("the region can be written");
    }

    /// The file offset of a queue's part: parts begin at multiples of 64 bytes.
    fn base(&self, index: u16) -> u64 {
        let part = (16 + 16 * u64::from(self.message.queue_size)).next_multiple_of(64);
        self.message.mmap_offset + u64::from(index) * part
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file
            .read_exact_at(&mut bytes, at)
            .expect("the region can be read");
        bytes
    }
}
