//! What a queue says of its used ring to those who move the guest.

use std::os::unix::fs::FileExt;

use super::*;
use crate::fuzzing::{self, GuestMemory};

const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const SIZE: u16 = 16;

#[test]
fn whatever_is_written_of_the_used_ring_is_marked_at_once() {
    let (memory, log) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    memory.set_len(0x8000).unwrap();
    log.set_len(8).unwrap();
    let guest = fuzzing::map(&GuestMemory {
        file: &memory,
        regions: &[[0, 0x8000, 0]],
        log: Some((log.try_clone().unwrap(), 8)),
    });
    let shared = GuestMemoryAtomic::new(Memory::clone(&guest.memory));
    let vring = Vring::new(shared, SIZE).unwrap();
    vring.set_queue_size(SIZE);
    vring.set_queue_info(0, AVAILABLE, USED).unwrap();
    vring.set_queue_ready(true);
    let setup = Setup {
        index: 0,
        vring,
        error_fd: ErrorFd::default(),
        mode: Mode::Running,
        tracker: None,
        left_behind: Vec::new(),
    };
    let mut queue = Queue::new(setup, Some(WatchKey(7)));
    let mut expect_mark = |step: &str, write: &dyn Fn(&mut Queue)| {
        log.write_all_at(&[0; 8], 0).unwrap();
        write(&mut queue);
        let mut bits = [0; 8];
        log.read_exact_at(&mut bits, 0).unwrap();
        assert_eq!(u64::from_le_bytes(bits), 1 << (USED >> 12), "{step}");
    };
    // Each may be the last one before the ring stops.
    expect_mark("kicks are wanted", &|queue| {
        assert!(queue.sleep(&guest).unwrap());
    });
    expect_mark("kicks are not wanted", &|queue| queue.wake(&guest));
    expect_mark("an answer", &|queue| {
        queue.give_back(Used { head: 0, len: 1 });
        queue.publish(&guest).unwrap();
    });
}

#[test]
fn no_more_chains_are_offered_than_the_ring_holds() {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(0x8000).unwrap();
    let guest = fuzzing::map(&GuestMemory {
        file: &memory,
        regions: &[[0, 0x8000, 0]],
        log: None,
    });
    let mut ring = virtio_queue::Queue::new(SIZE).unwrap();
    ring.set_size(SIZE);
    ring.set_desc_table_address(Some(0), Some(0));
    ring.set_avail_ring_address(Some(u32::try_from(AVAILABLE).unwrap()), Some(0));
    ring.set_used_ring_address(Some(u32::try_from(USED).unwrap()), Some(0));
    for (index, is_taken) in [(SIZE, true), (2 * SIZE + 1, false), (SIZE - 1, false)] {
        memory
            .write_all_at(&index.to_le_bytes(), AVAILABLE + 2)
            .unwrap();
        let heads = available_heads(&mut ring, &guest.memory, BURST);
        assert_eq!(heads.is_ok(), is_taken, "{index}");
    }
}
