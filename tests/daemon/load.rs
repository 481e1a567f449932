//! Random writes and reads at depth, verified against a byte array for each queue.

use std::collections::HashMap;
use std::ops::Range;

use vdi_core::NewKind;
use vdi_tests::driver::{Layout, Options, Queue, Request, Token};
use vdi_tests::image::{Image, MIB};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::server::Launch;

const DISK_SECTORS: u64 = 24 * MIB / 512;
/// No multiple of a block, so that the stripes of different queues share blocks.
const STRIPE_SECTORS: u64 = 320;
const DEPTH: usize = 32;
const OPERATIONS: usize = 600;

/// One queue's part of the disk: every so-many-th stripe.
struct Worker {
    model: Vec<u8>,
    random: Random,
    queues: u64,
    busy: Vec<(Token, Range<u64>)>,
    reads: HashMap<Token, Vec<u8>>,
}

impl Worker {
    fn new(random: Random, queues: usize) -> Self {
        Self {
            model: vec![0; bytes(0..DISK_SECTORS).end],
            random,
            queues: queues as u64,
            busy: Vec::new(),
            reads: HashMap::new(),
        }
    }

    fn run(&mut self, queue: &mut Queue) {
        for _ in 0..OPERATIONS {
            if self.busy.len() == DEPTH {
                self.finish_one(queue);
            }
            self.start_one(queue);
        }
        while !self.busy.is_empty() {
            self.finish_one(queue);
        }
    }

    fn start_one(&mut self, queue: &mut Queue) {
        let range = self.range(queue.index() as u64);
        if self
            .busy
            .iter()
            .any(|(_, busy)| busy.start < range.end && range.start < busy.end)
        {
            return;
        }
        let layouts = [
            Layout::framed(),
            Layout::framed().indirect(),
            Layout::data_every(65536),
            Layout::whole(),
            Layout::framed().misaligned(3),
        ];
        let layout = self.random.pick(&layouts).clone();
        let len = u32::try_from((range.end - range.start) * 512).unwrap();
        let token = if self.random.within(0..3) > 0 {
            let data = self.random.bytes(len as usize);
            self.model[bytes(range.clone())].copy_from_slice(&data);
            queue.submit(&Request::write(range.start, data), &layout)
        } else {
            let token = queue.submit(&Request::read(range.start, len), &layout);
            self.reads
                .insert(token, self.model[bytes(range.clone())].to_vec());
            token
        };
        self.busy.push((token, range));
    }

    fn finish_one(&mut self, queue: &mut Queue) {
        let (token, answer) = queue.wait_any();
        let at = self
            .busy
            .iter()
            .position(|(busy, _)| *busy == token)
            .unwrap();
        let (_, range) = self.busy.swap_remove(at);
        let data = answer.expect_ok();
        if let Some(expected) = self.reads.remove(&token) {
            assert!(
                data == expected,
                "queue {}: sectors {range:?} differ",
                queue.index()
            );
        }
    }

    fn range(&mut self, queue: u64) -> Range<u64> {
        let stripes = DISK_SECTORS / STRIPE_SECTORS / self.queues;
        let stripe = self.random.within(0..stripes) * self.queues + queue;
        let longest = *self.random.pick(&[1, 8, 8, 64, STRIPE_SECTORS]);
        let count = self.random.within(1..longest + 1);
        let offset = self.random.within(0..STRIPE_SECTORS - count + 1);
        let start = stripe * STRIPE_SECTORS + offset;
        start..start + count
    }
}

fn bytes(sectors: Range<u64>) -> Range<usize> {
    let at = |sector: u64| usize::try_from(sector * 512).unwrap();
    at(sectors.start)..at(sectors.end)
}

/// Returns what the disk must hold.
fn run_load(image: &Image, options: &[&str], queues: usize, random: &mut Random) -> Vec<u8> {
    let count = queues.to_string();
    let launch = Launch::image(image.path()).args(["--num-queues", &count]);
    let server = launch.args(options).start();
    let mut driver = server.driver(&Options::new().queues(queues).queue_size(256));
    let mut workers: Vec<_> = (0..queues)
        .map(|_| Worker::new(random.fork(), queues))
        .collect();
    std::thread::scope(|scope| {
        for (queue, worker) in driver.queues.iter_mut().zip(&mut workers) {
            scope.spawn(move || worker.run(queue));
        }
    });
    let mut disk = vec![0; bytes(0..DISK_SECTORS).end];
    for (nth, stripe) in disk.chunks_mut(bytes(0..STRIPE_SECTORS).end).enumerate() {
        let start = nth * bytes(0..STRIPE_SECTORS).end;
        let model = &workers[nth % queues].model;
        stripe.copy_from_slice(&model[start..start + stripe.len()]);
    }
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
