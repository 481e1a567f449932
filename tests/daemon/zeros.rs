//! Discard, write-zeroes and zero detection: what reads as zeros, and what space returns to the host.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use vdi_tests::driver::{
    Driver, Layout, Options, PATIENCE, Queue, Region, Request, Segment, feature,
};
use vdi_tests::image::{Image, MIB, are_zeros};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};

const DISK: u64 = 16 * MIB;
const BLOCK_SECTORS: u32 = 2048;
const MODES: [&[&str]; 3] = [
    &["--cache", "writeback"],
    &["--cache", "direct"],
    &["--engine", "sync"],
];

fn run(driver: &mut Driver, request: &Request) -> u32 {
    driver.queue().run(request, &Layout::framed()).status.into()
}

fn allocated_bytes(image: &Path) -> u64 {
    std::fs::metadata(image).unwrap().blocks() * 512
}

/// Space returns at once, but not before the answer.
fn expect_space(image: &Path, most_bytes: u64) {
    let start = Instant::now();
    while allocated_bytes(image) > most_bytes {
        assert!(
            start.elapsed() < PATIENCE,
            "the image has {} bytes, should have {most_bytes}",
            allocated_bytes(image)
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn finish(driver: Driver, server: Server, image: &Path) {
    drop(driver);
    let exit = server.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    qemu::expect_clean(image);
}

fn read_all(driver: &mut Driver) -> Vec<u8> {
    let parts = (0..DISK / (4 * MIB)).map(|nth| driver.read(nth * 8192, 4 << 20));
    parts.collect::<Vec<_>>().concat()
}

#[test]
fn the_config_space_says_what_can_be_discarded_and_only_if_it_can() {
    let image = Image::by_qemu(DISK);
    for (choice, offered) in [("unmap", true), ("ignore", false)] {
        let server = Launch::image(image.path())
            .args(["--discard", choice])
            .start();
        let mut driver = server.driver(&Options::new());
        let features = driver.control.features();
        assert_eq!(features & feature::DISCARD != 0, offered);
        assert_ne!(features & feature::WRITE_ZEROES, 0);
        let config = driver.config().unwrap();
        assert_eq!(config.write_zeroes_may_unmap, u8::from(offered));
        assert!(config.max_write_zeroes.0 >= BLOCK_SECTORS && config.max_write_zeroes.1 >= 64);
        if offered {
            assert!(config.max_discard.0 >= BLOCK_SECTORS && config.max_discard.1 >= 64);
            assert_ne!(config.discard_alignment, 0);
        } else {
            assert_eq!((config.max_discard, config.discard_alignment), ((0, 0), 0));
        }
    }
}

/// Up to 64 ranges that do not overlap, whole blocks and others.
fn segments(random: &mut Random, is_discard: bool) -> Vec<Segment> {
    let count = *random.pick(&[1, 2, 5, 64]);
    let room = DISK / 512 / count;
    (0..count)
        .map(|nth| {
            let (start, most) = (nth * room, room.min(3 * u64::from(BLOCK_SECTORS)));
            let skip = *random.pick(&[0, 0, 1, 7]);
            let sectors = match random.within(0..3) {
                0 => most,
                1 => random.within(1..most + 1),
                _ => random.within(1..9),
            };
            let sectors = u32::try_from(sectors.min(room - skip)).unwrap();
            let segment = Segment::new(start + skip, sectors);
            if !is_discard && random.within(0..2) == 0 {
                segment.unmap()
            } else {
                segment
            }
        })
        .collect()
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zeros_and_nothing_else_changes() {
    for mode in MODES {
        let image = Image::by_qemu(DISK);
        let server = Launch::image(image.path()).args(mode).start();
        let mut driver = server.driver(&Options::new());
        let mut random = Random::seeded(11);
        let mut disk = vec![0; usize::try_from(DISK).unwrap()];
        for round in 0..60 {
            let sector = random.within(0..DISK / 512 - 5000);
            let bytes = usize::try_from(random.within(1..5000) * 512).unwrap();
            let data = random.bytes(bytes);
            driver.write(sector, &data);
            let at = usize::try_from(sector * 512).unwrap();
            disk[at..at + data.len()].copy_from_slice(&data);

            let is_discard = round % 2 == 0;
            let segments = segments(&mut random, is_discard);
            let request = match is_discard {
                true => Request::discard(&segments),
                false => Request::write_zeroes(&segments),
            };
            assert_eq!(run(&mut driver, &request), VIRTIO_BLK_S_OK, "{segments:?}");
            for segment in &segments {
                let start = usize::try_from(segment.sector * 512).unwrap();
                disk[start..start + segment.sectors as usize * 512].fill(0);
            }
            if round % 10 == 9 {
                assert!(read_all(&mut driver) == disk, "round {round}, {mode:?}");
            }
        }
        finish(driver, server, image.path());
        assert!(qemu::contents(image.path()) == disk, "{mode:?}");
    }
}

#[test]
fn bad_segments_are_refused_and_change_nothing() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &vec![7; 1 << 20]);
    let last = DISK / 512;
    let flags = |flags| Segment {
        flags,
        ..Segment::new(0, 8)
    };
    let good = Segment::new(0, 8);
    for (segments, wanted) in [
        (vec![Segment::new(last - 1, 2)], VIRTIO_BLK_S_IOERR),
        (vec![Segment::new(u64::MAX, 1)], VIRTIO_BLK_S_IOERR),
        (vec![good, Segment::new(last, 1)], VIRTIO_BLK_S_IOERR),
        (vec![flags(2)], VIRTIO_BLK_S_UNSUPP),
        (vec![flags(1 << 31)], VIRTIO_BLK_S_UNSUPP),
    ] {
        for request in [
            Request::discard(&segments),
            Request::write_zeroes(&segments),
        ] {
            assert_eq!(run(&mut driver, &request), wanted, "{request:?}");
        }
    }
    let unmap = Request::discard(&[good.unmap()]);
    assert_eq!(run(&mut driver, &unmap), VIRTIO_BLK_S_UNSUPP);
    assert_eq!(driver.read(0, 1 << 20), vec![7; 1 << 20]);
    finish(driver, server, image.path());

    let server = Launch::image(image.path()).arg("--read-only").start();
    let mut driver = server.driver(&Options::new());
    for request in [Request::discard(&[good]), Request::write_zeroes(&[good])] {
        assert_ne!(run(&mut driver, &request), VIRTIO_BLK_S_OK);
    }
    assert_eq!(driver.read(0, 512), [7; 512]);
}

#[test]
fn space_returns_at_once_and_is_used_again() {
    for mode in MODES {
        let image = Image::by_qemu(DISK);
        let server = Launch::image(image.path()).args(mode).start();
        let mut driver = server.driver(&Options::new());
        let whole = [Segment::new(0, u32::try_from(DISK / 512).unwrap())];
        let mut longest = 0;
        for round in 1..6 {
            for nth in 0..4 {
                driver.write(nth * 8192, &vec![round; 4 << 20]);
            }
            assert!(allocated_bytes(image.path()) >= DISK);
            let len = std::fs::metadata(image.path()).unwrap().len();
            assert!(round == 1 || len <= longest, "the file grows, {mode:?}");
            longest = len;
            assert_eq!(run(&mut driver, &Request::discard(&whole)), VIRTIO_BLK_S_OK);
            expect_space(image.path(), MIB);
        }
        driver.write(5000, &[9; 4096]);
        finish(driver, server, image.path());
        assert!(std::fs::metadata(image.path()).unwrap().len() < 3 * MIB);
    }
}

#[test]
fn space_is_kept_where_it_is_to_be_kept() {
    let two = Segment::new(0, 2 * BLOCK_SECTORS);
    for (arguments, segment, keeps) in [
        (["--discard", "unmap"], two, true),
        (["--discard", "unmap"], two.unmap(), false),
        (["--discard", "ignore"], two.unmap(), true),
    ] {
        let image = Image::by_qemu(DISK);
        let server = Launch::image(image.path()).args(arguments).start();
        let mut driver = server.driver(&Options::new());
        driver.write(0, &vec![3; 2 << 20]);
        let request = Request::write_zeroes(&[segment]);
        assert_eq!(run(&mut driver, &request), VIRTIO_BLK_S_OK);
        assert!(are_zeros(&driver.read(0, 2 << 20)));
        if keeps {
            std::thread::sleep(Duration::from_millis(50));
            assert!(allocated_bytes(image.path()) >= 2 * MIB, "{arguments:?}");
        } else {
            expect_space(image.path(), MIB);
        }
        finish(driver, server, image.path());
    }
}

#[test]
fn written_zeros_take_no_space_where_they_are_looked_for() {
    for (choice, kept_mib) in [("off", 4), ("on", 2), ("unmap", 0)] {
        let image = Image::by_qemu(DISK);
        let server = Launch::image(image.path())
            .args(["--detect-zeroes", choice])
            .start();
        let mut driver = server.driver(&Options::new());
        driver.write(0, &vec![3; 2 << 20]);
        // Over data, and over nothing.
        driver.write(0, &vec![0; 2 << 20]);
        driver.write(8192, &vec![0; 2 << 20]);
        expect_space(image.path(), kept_mib * MIB + MIB / 2);
        let allocated = allocated_bytes(image.path());
        assert!(allocated >= kept_mib * MIB, "{choice}: {allocated}");
        assert!(are_zeros(&read_all(&mut driver)));
        finish(driver, server, image.path());
    }
}

/// So many bytes are looked through at once, however long a request is.
const WINDOW: u64 = 16 * MIB;

#[test]
fn zeros_are_looked_for_in_windows_of_a_request() {
    let image = Image::by_qemu(4 * WINDOW);
    let server = Launch::image(image.path())
        .args(["--detect-zeroes", "unmap"])
        .start();
    let region = Region::new(0, 6 * WINDOW);
    let mut driver = server.driver(&Options::new().memory(vec![region]));
    let window = usize::try_from(WINDOW).unwrap();
    let data = [vec![0; window], vec![5; window], vec![0; window]].concat();
    for _ in 0..2 {
        driver.write(0, &data);
        expect_space(image.path(), WINDOW + MIB);
        for (nth, part) in data.chunks(1 << 20).enumerate() {
            assert!(driver.read(nth as u64 * 2048, 1 << 20) == part, "{nth}");
        }
        // The next round goes over data.
        for nth in 0..3 {
            driver.write(nth * WINDOW / 512, &vec![9; window]);
        }
    }
    finish(driver, server, image.path());
}

/// Writes and discards blocks of its own, every other one, and knows what they hold.
fn churn(queue: &mut Queue, seed: u64) -> Vec<(u64, u8)> {
    let mut random = Random::seeded(seed);
    let blocks: Vec<u64> = (0..DISK / MIB)
        .filter(|block| block % 2 == queue.index() as u64)
        .collect();
    let mut holds: Vec<(u64, u8)> = blocks.into_iter().map(|block| (block, 0)).collect();
    for round in 0..120 {
        let stamp = u8::try_from(round % 250 + 1).unwrap();
        let mut tokens = Vec::new();
        for (block, held) in &mut holds {
            let sector = *block * u64::from(BLOCK_SECTORS);
            let segment = Segment::new(sector, BLOCK_SECTORS);
            let (request, holds) = match random.within(0..4) {
                0 | 1 => (Request::discard(&[segment]), 0),
                2 => (Request::write_zeroes(&[segment.unmap()]), 0),
                _ => (Request::write(sector, vec![stamp; 1 << 18]), stamp),
            };
            tokens.push(queue.submit(&request, &Layout::framed()));
            *held = holds;
        }
        for token in tokens {
            let _none = queue.wait(token).expect_ok();
        }
        for &(block, held) in &holds {
            let data = queue.read(block * u64::from(BLOCK_SECTORS), 1 << 18);
            assert!(data.iter().all(|&byte| byte == held), "block {block}");
        }
    }
    holds
}

#[test]
fn discards_and_writes_on_two_queues_at_once_keep_blocks_apart() {
    for mode in MODES {
        let image = Image::by_qemu(DISK);
        let server = Launch::image(image.path())
            .args(mode)
            .args(["--num-queues", "2"])
            .start();
        let mut driver = server.driver(&Options::new().queues(2));
        let holds: Vec<(u64, u8)> = std::thread::scope(|scope| {
            let queues = driver.queues.iter_mut().zip(1..);
            let threads: Vec<_> = queues
                .map(|(queue, seed)| scope.spawn(move || churn(queue, seed)))
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        finish(driver, server, image.path());
        let disk = qemu::contents(image.path());
        for (block, held) in holds {
            let start = usize::try_from(block * MIB).unwrap();
            let data = &disk[start..start + (1 << 18)];
            assert!(
                data.iter().all(|&byte| byte == held),
                "block {block}, {mode:?}"
            );
            let rest = &disk[start + (1 << 18)..start + (1 << 20)];
            assert!(are_zeros(rest), "block {block} shows another one, {mode:?}");
        }
    }
}

/// tmpfs cannot zero a range in place.
#[test]
fn zeros_can_be_written_where_the_file_system_has_no_word_for_it() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().join("disk.vdi");
    qemu::create(&path, "16M");
    for mode in [MODES[0], MODES[2]] {
        let server = Launch::image(&path).args(mode).start();
        let mut driver = server.driver(&Options::new());
        for segment in [Segment::new(3, 5000), Segment::new(3, 5000).unmap()] {
            driver.write(0, &vec![5; 4 << 20]);
            let request = Request::write_zeroes(&[segment]);
            assert_eq!(run(&mut driver, &request), VIRTIO_BLK_S_OK);
            let data = driver.read(0, 4 << 20);
            let zeros = 3 * 512..5003 * 512;
            assert!(are_zeros(&data[zeros.clone()]));
            assert!(data[..zeros.start].iter().all(|&byte| byte == 5));
            assert!(data[zeros.end..].iter().all(|&byte| byte == 5));
        }
        finish(driver, server, &path);
    }
}
