//! What a queue says of its used ring to those who move the guest.

use std::fs::File;
use std::os::unix::fs::FileExt;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::fuzzing::{self, GuestMemory};
use crate::ring::owned;

const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const SIZE: u16 = 16;

/// A guest that does not move, and its memory.
fn guest() -> (File, Guest) {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(0x8000).unwrap();
    let guest = fuzzing::map(&GuestMemory {
        file: &memory,
        regions: &[[0, 0x8000, 0]],
        log: None,
    });
    (memory, guest)
}

fn vring(guest: &Guest) -> Vring {
    let shared = GuestMemoryAtomic::new(Memory::clone(&guest.memory));
    let vring = Vring::new(shared, SIZE).unwrap();
    vring.set_queue_size(SIZE);
    vring.set_queue_info(0, AVAILABLE, USED).unwrap();
    vring.set_queue_ready(true);
    vring
}

fn started(vring: Vring) -> Queue {
    let setup = Setup {
        index: 0,
        vring,
        error_fd: ErrorFd::default(),
        mode: Mode::Running,
        tracker: None,
        left_behind: Vec::new(),
    };
    Queue::new(setup, Some(WatchKey(7)))
}

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
    let mut queue = started(vring(&guest));
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
fn several_answers_are_seen_before_the_turn_is_over_and_called_for_once_at_its_end() {
    let (memory, guest) = guest();
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    let vring = vring(&guest);
    vring.set_queue_event_idx(true);
    vring.set_call(Some(File::from(owned(call.try_clone().unwrap()))));
    let mut queue = started(vring);
    let seen = || {
        let mut index = [0; 2];
        memory.read_exact_at(&mut index, USED + 2).unwrap();
        usize::from(u16::from_le_bytes(index))
    };
    let answer = |queue: &mut Queue| {
        queue.give_back(Used { head: 0, len: 1 });
        queue.show_several(&guest).unwrap();
    };
    (1..SEVERAL).for_each(|_| answer(&mut queue));
    assert_eq!(seen(), 0);
    answer(&mut queue);
    assert_eq!(seen(), SEVERAL);
    answer(&mut queue);
    assert!(call.read().is_err(), "the turn is not over");
    queue.publish(&guest).unwrap();
    assert_eq!((seen(), call.read().unwrap()), (SEVERAL + 1, 1));
    queue.publish(&guest).unwrap();
    assert!(call.read().is_err(), "nothing is new");
    // The guest has seen all, and wants to be called for the next one.
    let wish = AVAILABLE + AVAILABLE_HEADER_BYTES + 2 * u64::from(SIZE);
    let next = u16::try_from(seen()).unwrap();
    memory.write_all_at(&next.to_le_bytes(), wish).unwrap();
    (0..SEVERAL).for_each(|_| answer(&mut queue));
    queue.publish(&guest).unwrap();
    assert_eq!((seen(), call.read().unwrap()), (2 * SEVERAL + 1, 1));
}

#[test]
fn no_more_chains_are_offered_than_the_ring_holds() {
    let (memory, guest) = guest();
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
