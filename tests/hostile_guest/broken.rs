//! What is no chain: the ring breaks, and only the ring.

use vdi_tests::driver::{Buffer, Descriptor, Fate, INDIRECT, NEXT, PATIENCE, Request, WRITE};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_DISCARD;

use crate::bench::{Bench, FIRST, HOLE, NOWHERE, RING, linked, linked_from, readable, writable};

#[test]
fn a_chain_that_loops_breaks_the_ring() {
    let mut bench = Bench::new();
    let to = |next| Descriptor {
        flags: NEXT,
        next,
        ..bench.header()
    };
    let loops = [
        vec![to(FIRST)],
        vec![to(FIRST + 1), to(FIRST)],
        vec![to(FIRST + 1), to(FIRST + 2), to(FIRST + 1)],
        vec![
            to(FIRST + 1),
            Descriptor {
                flags: NEXT | WRITE,
                next: FIRST + 1,
                ..bench.status()
            },
        ],
    ];
    for chain in loops {
        bench.expect_chain_breaks(&chain);
    }
    bench.expect_good_end();
}

#[test]
fn a_next_outside_the_table_breaks_the_ring() {
    let mut bench = Bench::new();
    for next in [RING, RING + 1, u16::MAX] {
        let chain = [Descriptor {
            flags: NEXT,
            next,
            ..bench.header()
        }];
        bench.expect_chain_breaks(&chain);
    }
    bench.expect_good_end();
}

#[test]
fn a_head_outside_the_table_breaks_the_ring() {
    let mut bench = Bench::new();
    for head in [RING, RING + 1, u16::MAX] {
        bench.expect_broken(|bench| bench.driver.queues[0].offer(head));
    }
    bench.expect_good_end();
}

#[test]
fn an_available_index_that_jumps_beyond_the_ring_breaks_the_ring() {
    let mut bench = Bench::new();
    for jump in [RING + 1, 0x8000, u16::MAX] {
        bench.expect_broken(|bench| {
            let queue = &mut bench.driver.queues[0];
            let index = queue.available_index().wrapping_add(jump);
            queue.jump_to(index);
        });
    }
    bench.expect_good_end();
}

#[test]
fn a_chain_without_a_writable_byte_breaks_the_ring() {
    let mut bench = Bench::new();
    let chains = [
        vec![bench.header()],
        linked(&[
            bench.header(),
            Descriptor {
                flags: 0,
                ..bench.data(512)
            },
        ]),
        linked(&[
            bench.header(),
            Descriptor {
                len_bytes: 0,
                ..bench.status()
            },
        ]),
        vec![Descriptor::default()],
    ];
    for chain in chains {
        bench.expect_chain_breaks(&chain);
    }
    bench.expect_good_end();
}

#[test]
fn a_status_byte_outside_guest_memory_breaks_the_ring() {
    let mut bench = Bench::new();
    for at in [NOWHERE, HOLE, u64::MAX] {
        let chain = linked(&[bench.header(), bench.data(512), writable(at, 1)]);
        bench.expect_chain_breaks(&chain);
    }
    bench.expect_good_end();
}

/// A descriptor of a table that holds the given descriptors.
fn table(bench: &Bench, descriptors: &[Descriptor]) -> (Descriptor, Buffer) {
    let len = 16 * descriptors.len();
    let buffer = bench.driver.memory.allocate(len as u64, 16);
    let bytes: Vec<u8> = descriptors.iter().flat_map(|d| d.to_bytes()).collect();
    buffer.write(&bytes);
    let descriptor = Descriptor {
        at: buffer.at(),
        len_bytes: u32::try_from(len).unwrap(),
        flags: INDIRECT,
        next: 0,
    };
    (descriptor, buffer)
}

#[test]
fn an_indirect_table_in_an_indirect_table_breaks_the_ring() {
    let mut bench = Bench::new();
    let request = linked_from(0, &[bench.header(), bench.data(512), bench.status()]);
    let (inner, _inner) = table(&bench, &request);
    let (outer, _outer) = table(&bench, &[inner]);
    bench.expect_chain_breaks(&[outer]);
    let header = Descriptor {
        flags: NEXT,
        next: 1,
        ..bench.header()
    };
    let (outer, _outer) = table(&bench, &[header, inner]);
    bench.expect_chain_breaks(&[outer]);
    bench.expect_good_end();
}

#[test]
fn an_indirect_table_whose_length_is_no_number_of_descriptors_breaks_the_ring() {
    let mut bench = Bench::new();
    let request = linked_from(0, &[bench.header(), bench.data(512), bench.status()]);
    let (whole, _buffer) = table(&bench, &request);
    for len_bytes in [0, 1, 8, 15, 17, 24, 47, 49, u32::MAX] {
        bench.expect_chain_breaks(&[Descriptor { len_bytes, ..whole }]);
    }
    bench.expect_good_end();
}

#[test]
fn an_indirect_table_that_is_cut_off_breaks_the_ring() {
    let mut bench = Bench::new();
    let request = linked_from(0, &[bench.header(), bench.data(512), bench.status()]);
    let (whole, _buffer) = table(&bench, &request);
    bench.expect_chain_breaks(&[Descriptor {
        len_bytes: 16,
        ..whole
    }]);
    bench.expect_chain_breaks(&[Descriptor {
        len_bytes: 32,
        ..whole
    }]);
    bench.expect_good_end();
}

#[test]
fn an_indirect_table_outside_guest_memory_breaks_the_ring() {
    let mut bench = Bench::new();
    for at in [NOWHERE, HOLE, HOLE - 8, u64::MAX - 15, u64::MAX] {
        let chain = [Descriptor {
            at,
            len_bytes: 32,
            flags: INDIRECT,
            next: 0,
        }];
        bench.expect_chain_breaks(&chain);
    }
    bench.expect_good_end();
}

#[test]
fn an_indirect_descriptor_with_a_next_breaks_the_ring() {
    let mut bench = Bench::new();
    let request = linked_from(0, &[bench.header(), bench.data(512), bench.status()]);
    let (whole, _buffer) = table(&bench, &request);
    let chain = linked(&[whole, bench.status()]);
    bench.expect_chain_breaks(&chain);
    bench.expect_good_end();
}

#[test]
fn a_huge_indirect_table_that_loops_or_leaves_memory_breaks_the_ring() {
    let mut bench = Bench::new();
    let count = 65_536_u64;
    let buffer = bench.driver.memory.allocate(16 * count, 16);
    for nth in 0..count {
        let next = u16::try_from((nth + 1) % count).unwrap();
        let descriptor = Descriptor {
            flags: NEXT,
            next,
            ..bench.header()
        };
        bench
            .driver
            .memory
            .write(buffer.at() + 16 * nth, &descriptor.to_bytes());
    }
    for len_bytes in [16 * 65_536, u32::MAX - 15] {
        let chain = [Descriptor {
            at: buffer.at(),
            len_bytes,
            flags: INDIRECT,
            next: 0,
        }];
        bench.expect_chain_breaks(&chain);
    }
    bench.expect_good_end();
}

#[test]
fn a_head_that_is_offered_twice_breaks_the_ring_or_is_answered_twice() {
    let mut bench = Bench::new();
    for _ in 0..20 {
        let chain = linked(&[bench.header(), bench.data(65536), bench.status()]);
        let queue = &mut bench.driver.queues[0];
        for (index, descriptor) in (FIRST..).zip(&chain) {
            queue.ring().set_descriptor(index, *descriptor);
        }
        queue.offer_twice(FIRST);
        let fates = [queue.fate(PATIENCE), queue.fate(PATIENCE)];
        match fates {
            [Fate::Used(_), Fate::Used(_)] => {}
            [Fate::Broken, _] | [Fate::Used(_), Fate::Broken] => bench.restart(),
            other => panic!("{other:?}"),
        }
        bench.expect_service();
    }
    bench.expect_good_end();
}

/// A discard is never answered before the rest of its burst is taken.
#[test]
fn a_head_that_is_surely_in_flight_breaks_the_ring() {
    let mut bench = Bench::new();
    bench.set_header(VIRTIO_BLK_T_DISCARD, 0);
    let segment = [&2048_u64.to_le_bytes()[..], &8_u32.to_le_bytes(), &[0; 4]].concat();
    bench.data.write(&segment);
    let chain = linked(&[
        bench.header(),
        readable(bench.data.at(), 16),
        bench.status(),
    ]);
    let queue = &mut bench.driver.queues[0];
    for (index, descriptor) in (FIRST..).zip(&chain) {
        queue.ring().set_descriptor(index, *descriptor);
    }
    queue.offer_twice(FIRST);
    let fates = [queue.fate(PATIENCE), queue.fate(PATIENCE)];
    assert!(fates.contains(&Fate::Broken), "{fates:?}");
    bench.restart();
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn a_ring_that_breaks_leaves_the_requests_before_it_answered() {
    let mut bench = Bench::new();
    for round in 1..10_u8 {
        let queue = &mut bench.driver.queues[0];
        let write = Request::write(2048, vec![round; 65536]);
        let token = queue.submit(&write, &vdi_tests::driver::Layout::framed());
        queue.offer(u16::MAX);
        let answer = queue.wait(token);
        assert_eq!(answer.status, 0);
        assert_eq!(queue.fate(PATIENCE), Fate::Broken);
        bench.restart();
        assert!(bench.driver.queues[1].read(2048, 65536) == vec![round; 65536]);
    }
    bench.expect_good_end();
}

#[test]
fn after_a_broken_ring_the_next_connection_is_served() {
    let mut bench = Bench::new();
    bench.driver.queues[0].offer(u16::MAX);
    assert_eq!(bench.driver.queues[0].fate(PATIENCE), Fate::Broken);
    let Bench { driver, server, .. } = bench;
    drop(driver);
    let mut driver = server.driver(&vdi_tests::driver::Options::new());
    assert!(driver.read(0, 4096) == [0x5a; 4096]);
}
