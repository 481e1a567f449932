//! Reads and writes: every size, every layout, every place.

use std::sync::atomic::{AtomicUsize, Ordering};

use vdi_tests::driver::{Answer, Cut, Driver, Layout, Options, Queue, Region, Request, feature};
use vdi_tests::image::{Image, MIB, are_zeros};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server};
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_IOERR;

const CACHES: [&str; 2] = ["writeback", "direct"];

fn serve(image: &Image, cache: &str) -> Server {
    Launch::image(image.path()).args(["--cache", cache]).start()
}

#[test]
fn an_unwritten_disk_reads_as_zeros() {
    let image = Image::by_qemu(8 * MIB);
    for cache in CACHES {
        let server = serve(&image, cache);
        let data = server.driver(&Options::new()).read(3, 3 << 20);
        assert!(are_zeros(&data));
    }
}

#[test]
fn requests_of_all_sizes_at_all_places_hold_what_was_written() {
    const SIZES: [u32; 9] = [
        512,
        1024,
        4096,
        65536,
        MIB32 - 512,
        MIB32,
        MIB32 + 512,
        3 * MIB32 - 1024,
        4 * MIB32,
    ];
    const MIB32: u32 = 1 << 20;
    let mut random = Random::seeded(1);
    for cache in CACHES {
        let image = Image::by_qemu(64 * MIB);
        let server = serve(&image, cache);
        let mut driver = server.driver(&Options::new());
        let mut disk = vec![0; 64 << 20];
        for (nth, size) in SIZES.into_iter().enumerate() {
            for offset in [0, 512, MIB - 512, MIB - 1536] {
                let at = 6 * nth as u64 * MIB + offset;
                let data = random.bytes(size as usize);
                driver.write(at / 512, &data);
                let start = usize::try_from(at).unwrap();
                disk[start..start + data.len()].copy_from_slice(&data);
                assert!(
                    driver.read(at / 512, size) == data,
                    "{size} bytes at {at}, {cache}"
                );
            }
        }
        for (nth, expected) in disk.chunks(4 << 20).enumerate() {
            let data = driver.read(nth as u64 * 8192, 4 << 20);
            assert!(data == expected, "the disk from {} MiB, {cache}", 4 * nth);
        }
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
        qemu::expect_clean(image.path());
        assert!(
            qemu::contents(image.path()) == disk,
            "QEMU reads something else, {cache}"
        );
    }
}

#[test]
fn the_status_is_the_last_writable_byte_and_the_header_the_first_16_readable_however_they_are_cut()
{
    let image = Image::by_qemu(8 * MIB);
    for cache in CACHES {
        for options in [Options::new(), Options::new().without(feature::EVENT_IDX)] {
            let server = serve(&image, cache);
            let mut random = Random::seeded(2);
            let mut driver = server.driver(&options);
            for (nth, (name, layout)) in Layout::all_kinds().into_iter().enumerate() {
                // Over a block border, so that a request is several I/Os.
                let sector = 2048 * (1 + nth as u64 % 6) - 4;
                let data = random.bytes(4096);
                let write = Request::write(sector, data.clone());
                assert!(
                    driver.queue().run(&write, &layout).expect_ok().is_empty(),
                    "{name}, {cache}"
                );
                let read = driver.queue().run(&Request::read(sector, 4096), &layout);
                assert!(read.expect_ok() == data, "{name}, {cache}");
                let _none = driver.queue().run(&Request::flush(), &layout).expect_ok();
                let _id = driver.queue().run(&Request::get_id(), &layout).expect_ok();
            }
        }
    }
}

#[test]
fn a_request_of_seg_max_segments_is_served() {
    let image = Image::by_qemu(8 * MIB);
    for cache in CACHES {
        let server = serve(&image, cache);
        let mut driver = server.driver(&Options::new());
        let segments = driver.config().unwrap().seg_max;
        let data = Random::seeded(3).bytes(segments as usize * 512);
        let layout = Layout::data_every(512);
        let write = Request::write(2000, data.clone());
        for layout in [layout.clone(), layout.indirect()] {
            let _none = driver.queue().run(&write, &layout).expect_ok();
            let read = Request::read(2000, segments * 512);
            assert!(
                driver.queue().run(&read, &layout).expect_ok() == data,
                "{cache}"
            );
        }
    }
}

#[test]
fn buffers_may_cross_the_border_of_two_memory_regions() {
    let image = Image::by_qemu(8 * MIB);
    let regions = vec![
        Region {
            file_offset: 4096,
            ..Region::new(0x10_0000, 8 * MIB)
        },
        Region::new(0x10_0000 + 8 * MIB, 8 * MIB),
        Region::new(1 << 32, 8 * MIB),
    ];
    for cache in CACHES {
        let server = serve(&image, cache);
        let mut driver = server.driver(&Options::new().memory(regions.clone()));
        let mut random = Random::seeded(4);
        let border = 0x10_0000 + 8 * MIB;
        for at in [border - 8192, border - 4096, border - 513, border - 1] {
            for layout in [
                Layout::framed().largest_at(at),
                Layout::whole().largest_at(at),
            ] {
                let data = random.bytes(16384);
                let write = Request::write(2040, data.clone());
                let _none = driver.queue().run(&write, &layout).expect_ok();
                let read = Request::read(2040, 16384);
                assert!(
                    driver.queue().run(&read, &layout).expect_ok() == data,
                    "at {at:#x}, {cache}"
                );
            }
        }
    }
}

fn status_of(driver: &mut Driver, request: &Request) -> Answer {
    driver.queue().run(request, &Layout::framed())
}

#[test]
fn requests_that_do_not_fit_the_disk_fail_and_the_last_sector_does_not() {
    let image = Image::by_qemu(2 * MIB);
    let server = serve(&image, "writeback");
    let mut driver = server.driver(&Options::new());
    driver.write(4095, &[1; 512]);
    assert_eq!(driver.read(4095, 512), [1; 512]);
    for sector in [4095, 4096, u64::MAX / 512, u64::MAX - 1, u64::MAX] {
        for request in [
            Request::read(sector, 1024),
            Request::write(sector, vec![2; 1024]),
        ] {
            let answer = status_of(&mut driver, &request);
            assert_eq!(
                u32::from(answer.status),
                VIRTIO_BLK_S_IOERR,
                "sector {sector}"
            );
            assert!(answer.used_bytes as usize <= answer.data.len() + 1);
        }
    }
    assert_eq!(driver.read(4095, 512), [1; 512]);
}

#[test]
fn requests_without_data_are_answered() {
    let image = Image::by_qemu(2 * MIB);
    let server = serve(&image, "writeback");
    let mut driver = server.driver(&Options::new());
    for request in [Request::read(0, 0), Request::write(0, Vec::new())] {
        let answer = status_of(&mut driver, &request);
        assert_ne!(answer.status, vdi_tests::driver::UNTOUCHED);
        assert_eq!(answer.used_bytes, 1);
    }
    driver.flush();
}

/// Writes half of the first 64 KiB of a block, as soon as another queue is about to write the other half.
fn write_every_other_page(queue: &mut Queue, block: u64, ready: &AtomicUsize) {
    let mine = queue.index() as u64;
    let stamp = vec![0x40 + u8::try_from(mine).unwrap(); 4096];
    ready.fetch_add(1, Ordering::Relaxed);
    while ready.load(Ordering::Relaxed) < 2 {
        std::hint::spin_loop();
    }
    let tokens: Vec<_> = (0..8)
        .map(|part| {
            let sector = block * 2048 + (2 * part + mine) * 8;
            queue.submit(&Request::write(sector, stamp.clone()), &Layout::framed())
        })
        .collect();
    for token in tokens {
        let _none = queue.wait(token).expect_ok();
    }
}

#[test]
fn two_queues_that_write_parts_of_one_fresh_block_at_once_both_succeed() {
    const BLOCKS: u64 = 64;
    for cache in CACHES {
        let image = Image::by_qemu(BLOCKS * MIB);
        let server = serve(&image, cache);
        let mut driver = server.driver(&Options::new().queues(2));
        for block in 0..BLOCKS {
            let ready = AtomicUsize::new(0);
            std::thread::scope(|scope| {
                for queue in &mut driver.queues {
                    scope.spawn(|| write_every_other_page(queue, block, &ready));
                }
            });
        }
        let expected: Vec<u8> = (0..16)
            .flat_map(|part| vec![0x40 + part % 2; 4096])
            .collect();
        for block in 0..BLOCKS {
            let data = driver.read(block * 2048, 2 * 65536);
            assert!(data[..65536] == expected, "block {block}, {cache}");
            assert!(are_zeros(&data[65536..]), "block {block}, {cache}");
        }
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
        qemu::expect_clean(image.path());
    }
}

#[test]
fn a_request_may_span_blocks_of_every_kind() {
    let image = Image::by_qemu(16 * MIB);
    for cache in CACHES {
        let server = serve(&image, cache);
        let mut driver = server.driver(&Options::new());
        // Allocated out of order, so that neighbours on the disk are none in the file.
        for block in [5_u64, 1, 4, 2] {
            driver.write(block * 2048, &[u8::try_from(block).unwrap(); 512]);
        }
        let data = driver.read(0, 7 << 20);
        for (block, contents) in data.chunks(1 << 20).enumerate() {
            let stamp = if [1, 2, 4, 5].contains(&block) {
                u8::try_from(block).unwrap()
            } else {
                0
            };
            assert_eq!(contents[..512], [stamp; 512], "block {block}");
            assert!(are_zeros(&contents[512..]), "block {block}");
        }
        let all = Random::seeded(5).bytes(4 << 20);
        let odd = Layout::cut(Cut::Sizes(vec![16, 1 << 20, (2 << 20) + 512]), Cut::Framed);
        let _none = driver
            .queue()
            .run(&Request::write(3, all.clone()), &odd)
            .expect_ok();
        assert!(driver.read(3, 4 << 20) == all);
        driver.write(0, &vec![0; 7 << 20]);
    }
}
