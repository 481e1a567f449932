//! Random writes and reads at depth, verified against a byte array for each queue.

use vdi_core::NewKind;
use vdi_tests::driver::Options;
use vdi_tests::image::Image;
use vdi_tests::load::{DISK_SECTORS, Load, Mix, disk_after};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::server::Launch;

const OPERATIONS: usize = 600;

/// Returns what the disk must hold.
fn run_load(image: &Image, options: &[&str], queues: usize, random: &mut Random) -> Vec<u8> {
    let count = queues.to_string();
    let launch = Launch::image(image.path()).args(["--num-queues", &count]);
    let server = launch.args(options).start();
    let mut driver = server.driver(&Options::new().queues(queues).queue_size(256));
    let load = |_| Load::new(random.fork(), queues, Mix::ReadsAndWrites);
    let mut loads: Vec<_> = (0..queues).map(load).collect();
    std::thread::scope(|scope| {
        for (queue, load) in driver.queues.iter_mut().zip(&mut loads) {
            let mut left = 0..OPERATIONS;
            scope.spawn(move || load.run(queue, || left.next().is_some()));
        }
    });
    let disk = disk_after(&loads);
    for (nth, expected) in disk.chunks(1 << 20).enumerate() {
        let data = driver.read(nth as u64 * 2048, 1 << 20);
        assert!(data == expected, "MiB {nth} differs at the end");
    }
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    disk
}

fn load_on_images_that_qemu_reads(cache: &str) {
    let mut random = Random::printed();
    for queues in [1, 2, 4] {
        let image = Image::by_qemu(DISK_SECTORS * 512);
        let disk = run_load(&image, &["--cache", cache], queues, &mut random);
        qemu::expect_clean(image.path());
        assert!(
            qemu::contents(image.path()) == disk,
            "QEMU reads something else"
        );
    }
}

#[test]
fn random_load_on_1_2_and_4_queues_is_verified_through_the_page_cache() {
    load_on_images_that_qemu_reads("writeback");
}

#[test]
fn random_load_on_1_2_and_4_queues_is_verified_with_direct_io() {
    load_on_images_that_qemu_reads("direct");
}

#[test]
fn random_load_is_verified_on_every_block_size_and_on_fixed_images() {
    let mut random = Random::printed();
    for (nth, block_size) in [128 << 10, 256 << 10, 512 << 10, 2 << 20, 4 << 20]
        .into_iter()
        .enumerate()
    {
        let cache = ["writeback", "direct"][nth % 2];
        let image = Image::by_us(DISK_SECTORS * 512, block_size, NewKind::Dynamic);
        let disk = run_load(&image, &["--cache", cache], 2, &mut random);
        assert!(
            image.contents() == disk,
            "the core reads something else, {block_size}"
        );
    }
    let image = Image::by_us(DISK_SECTORS * 512, 1 << 20, NewKind::Fixed);
    let disk = run_load(&image, &[], 2, &mut random);
    qemu::expect_clean(image.path());
    assert!(
        qemu::contents(image.path()) == disk,
        "QEMU reads something else"
    );
}

#[test]
fn random_load_is_verified_with_one_worker_for_all_queues_and_without_io_uring() {
    let mut random = Random::printed();
    for options in [
        &["--workers", "1"][..],
        &["--workers", "1", "--cache", "direct"],
        &["--engine", "sync"],
        &["--engine", "sync", "--cache", "direct"],
    ] {
        let image = Image::by_qemu(DISK_SECTORS * 512);
        let disk = run_load(&image, options, 4, &mut random);
        qemu::expect_clean(image.path());
        assert!(
            qemu::contents(image.path()) == disk,
            "QEMU reads something else"
        );
    }
}
