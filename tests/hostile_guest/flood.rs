//! Many hostile chains: random ones, and so many that a log line for each would fill a disk.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vdi_tests::driver::{Descriptor, Fate, INDIRECT, Layout, Options, PATIENCE, Request};
use vdi_tests::image::{Image, MIB, are_zeros};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::server::Launch;
use vdi_tests::stop::StopOnDrop;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use crate::bench::{Bench, FIRST, HOLE, NOWHERE, RING, linked, linked_from};

const LOG_LIMIT: usize = 65536;

#[test]
fn ten_thousand_refused_requests_leave_a_short_log() {
    let mut bench = Bench::new();
    bench.set_header(VIRTIO_BLK_T_OUT, u64::MAX);
    let chain = linked(&[
        bench.header(),
        Descriptor {
            flags: 0,
            ..bench.data(512)
        },
        bench.status(),
    ]);
    for _ in 0..10_000 {
        bench.driver.queues[0].offer_chain(FIRST, &chain);
        assert!(matches!(
            bench.driver.queues[0].fate(PATIENCE),
            Fate::Used(_)
        ));
    }
    assert!(bench.server.log().len() < LOG_LIMIT);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn two_thousand_broken_rings_leave_a_short_log() {
    let mut bench = Bench::new();
    for _ in 0..2000 {
        bench.driver.queues[0].offer(u16::MAX);
        assert_eq!(bench.driver.queues[0].fate(PATIENCE), Fate::Broken);
        bench.restart();
    }
    assert!(
        bench.server.log().len() < LOG_LIMIT,
        "it logged {} bytes",
        bench.server.log().len()
    );
    bench.expect_service();
    bench.expect_good_end();
}

/// Any descriptor, most often one that makes some sense.
fn any_descriptor(bench: &Bench, random: &mut Random) -> Descriptor {
    let flags = *random.pick(&[0, 1, 1, 1, 2, 3, 3, 4, 5, 7, 0xffff]);
    let near = u16::try_from(random.within(0..8)).unwrap();
    Descriptor {
        at: *random.pick(&[
            bench.header.at(),
            bench.data.at(),
            bench.data.at() + 513,
            bench.status.at(),
            HOLE - 8,
            NOWHERE,
            u64::MAX - 3,
        ]),
        len_bytes: *random.pick(&[0, 1, 15, 16, 17, 32, 48, 512, 513, 4096, 65536, u32::MAX]),
        flags,
        next: *random.pick(&[FIRST + near, FIRST + near, FIRST + near, RING, u16::MAX]),
    }
}

#[test]
fn random_chains_are_answered_or_break_the_ring() {
    let mut bench = Bench::new();
    let mut random = Random::printed();
    let deadline = Instant::now() + Duration::from_secs(4);
    for _ in 0..4000 {
        let kind = *random.pick(&[0, 0, 1, 4, 8, 11, 13, 77]);
        // Where a write would hit, nothing is looked at.
        bench.set_header(
            kind,
            *random.pick(&[4096, 4097, 131_071, 131_072, u64::MAX]),
        );
        let chain: Vec<Descriptor> = (0..8)
            .map(|_| any_descriptor(&bench, &mut random))
            .collect();
        bench.driver.queues[0].offer_chain(FIRST, &chain);
        match bench.driver.queues[0].fate(PATIENCE) {
            Fate::Used(_) => {}
            Fate::Broken => bench.restart(),
            Fate::Silence => panic!("nothing became of {chain:x?}"),
        }
        if Instant::now() > deadline {
            break;
        }
    }
    bench.expect_service();
    bench.expect_good_end();
}

/// How long chains change. A daemon that read a descriptor twice and believed the second got away with it in about half of the
/// runs of 0.4 s.
const CHANGING: Duration = Duration::from_secs(3);

/// Another processor of the guest's rewrites the chain, its indirect table and its header while the device reads them.
#[test]
fn chains_that_change_while_they_are_read_are_answered_or_break_the_ring() {
    let mut bench = Bench::new();
    let table = bench.driver.memory.allocate(16 * 8, 16);
    let stop = AtomicBool::new(false);
    let changes = AtomicU64::new(0);
    let [ring, _, _] = bench.driver.queues[0].ring().addresses();
    let places = [ring + 16 * u64::from(FIRST), table.at()];
    let (memory, header) = (bench.driver.memory.clone(), bench.header.at());
    let descriptors: Vec<[u8; 16]> = {
        let mut random = Random::printed();
        let any = |_| any_descriptor(&bench, &mut random).to_bytes();
        (0..512).map(any).collect()
    };
    let whole = linked(&[bench.header(), bench.data(4096), bench.status()]);
    let indirect = [Descriptor {
        at: table.at(),
        len_bytes: 16 * 3,
        flags: INDIRECT,
        next: 0,
    }];
    let inner = linked_from(0, &[bench.header(), bench.data(4096), bench.status()]);
    let (mut answered, mut broken) = (0, 0);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop::new(&stop);
        scope.spawn(|| {
            let mut random = Random::seeded(3);
            while !stop.load(Ordering::Relaxed) {
                let place = *random.pick(&places) + 16 * random.within(0..3);
                let descriptor: &[u8; 16] = random.pick(&descriptors[..]);
                memory.write(place, descriptor);
                // Never one that writes.
                let kind = *random.pick(&[0_u8, 0, 4, 8, 77]);
                memory.write(header, &[kind]);
                memory.write(header + 8, &[*random.pick(&[0_u8, 255]); 8]);
                changes.fetch_add(1, Ordering::Relaxed);
            }
        });
        let start = Instant::now();
        for nth in 0_u64.. {
            let is_enough = answered > 0 && broken > 0 && changes.load(Ordering::Relaxed) > 1000;
            if start.elapsed()
                > if is_enough {
                    CHANGING
                } else {
                    CHANGING + PATIENCE
                }
            {
                break;
            }
            if nth % 2 == 0 {
                bench.driver.queues[0].offer_chain(FIRST, &whole);
            } else {
                let bytes: Vec<u8> = inner.iter().flat_map(|d| d.to_bytes()).collect();
                table.write(&bytes);
                bench.driver.queues[0].offer_chain(FIRST, &indirect);
            }
            match bench.driver.queues[0].fate(PATIENCE) {
                Fate::Used(_) => answered += 1,
                Fate::Broken => {
                    broken += 1;
                    bench.restart();
                }
                Fate::Silence => panic!("nothing became of a chain"),
            }
        }
    });
    let changes = changes.into_inner();
    println!("{answered} answered, {broken} broken, {changes} changes");
    assert!(answered > 0 && broken > 0 && changes > 1000);
    bench.expect_service();
    bench.expect_good_end();
}

/// Bytes of memory that are the daemon's own, not shared with the guest or the page cache.
fn own_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon:"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

#[test]
fn huge_misaligned_requests_with_direct_io_need_bounded_memory() {
    let image = Image::nowhere();
    let path = image.path().to_str().unwrap();
    let made = qemu::img(["create", "-q", "-f", "vdi", "-o", "static=on", path, "1G"]);
    assert!(made.status.success());
    let server = Launch::image(image.path())
        .args(["--cache", "direct"])
        .start();
    let mut driver = server.driver(&Options::new());
    let memory = driver.memory.clone();
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(own_memory(server.pid()), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let _at_last = StopOnDrop::new(&done);
        let layout = Layout::framed().misaligned(1);
        let tokens: Vec<_> = (0..8)
            .map(|nth| {
                let sector = nth * 100 * MIB / 512;
                driver
                    .queue()
                    .submit(&Request::read(sector, 24 << 20), &layout)
            })
            .collect();
        for token in tokens {
            let answer = driver.queue().wait(token);
            assert!(answer.status <= 1);
            assert!(answer.status == 1 || are_zeros(&answer.data));
        }
    });
    let most = most.load(Ordering::Relaxed);
    println!("at most {} KiB of its own", most >> 10);
    assert!(most < 16 * MIB, "it used {} MiB of its own", most / MIB);
    drop(memory);
}

#[test]
fn many_descriptors_that_name_the_same_memory_are_served_or_refused_in_bounded_memory() {
    let mut bench = Bench::new();
    let before = own_memory(bench.server.pid());
    let count = 900;
    let buffer = bench.driver.memory.allocate(16 * 1024, 16);
    let mut table = vec![bench.header()];
    table.extend(std::iter::repeat_n(bench.data(65536), count));
    table.push(bench.status());
    let bytes: Vec<u8> = crate::bench::linked_from(0, &table)
        .iter()
        .flat_map(|descriptor| descriptor.to_bytes())
        .collect();
    buffer.write(&bytes);
    let chain = [Descriptor {
        at: buffer.at(),
        len_bytes: u32::try_from(bytes.len()).unwrap(),
        flags: vdi_tests::driver::INDIRECT,
        next: 0,
    }];
    for _ in 0..5 {
        let _used = bench.expect_survival(&chain);
    }
    let after = own_memory(bench.server.pid());
    assert!(
        after < before + 32 * MIB,
        "it grew from {before} to {after} bytes"
    );
    bench.expect_good_end();
}
