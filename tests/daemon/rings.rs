//! Rings: notifications, stopping and starting, and memory that changes under them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vdi_tests::driver::{
    Calls, Driver, Layout, Memory, Options, PATIENCE, Queue, Region, Request, UNTOUCHED, feature,
};
use vdi_tests::image::{Image, MIB};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server};
use vdi_tests::stop::StopOnDrop;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_IOERR;

/// Long enough for an idle daemon to do what it should not.
const A_WHILE: Duration = Duration::from_millis(80);

fn serve(image: &Image) -> Server {
    Launch::image(image.path())
        .args(["--num-queues", "4"])
        .start()
}

/// Waits without asking to be called.
fn wait_for_used(queue: &Queue, index: u16) {
    let deadline = Instant::now() + PATIENCE;
    while queue.ring().used_index() != index {
        assert!(
            Instant::now() < deadline,
            "the used index does not come to {index}"
        );
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Has a request answered, forgets the calls that a ring's start may bring, and wants no more.
fn settle(queue: &mut Queue) {
    queue.read(0, 512);
    queue.set_calls(Calls::Unwanted);
    // Its thread has called for the one before when it takes this one.
    queue.read(0, 512);
    let _start = queue.take_calls();
}

#[test]
fn a_driver_that_wants_no_calls_gets_none() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    for options in [Options::new(), Options::new().without(feature::EVENT_IDX)] {
        let mut driver = server.driver(&options);
        let queue = driver.queue();
        settle(queue);
        for _ in 0..32 {
            queue.read(0, 4096);
        }
        std::thread::sleep(A_WHILE);
        assert_eq!(queue.take_calls(), 0);
    }
}

#[test]
fn with_event_idx_the_call_comes_when_the_event_is_reached_and_not_before() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new());
    let queue = driver.queue();
    settle(queue);
    queue.ring().set_used_event(10);
    for nth in 2..10 {
        queue.submit(&Request::read(nth, 512), &Layout::framed());
        wait_for_used(queue, u16::try_from(nth + 1).unwrap());
    }
    std::thread::sleep(A_WHILE);
    assert_eq!(queue.take_calls(), 0, "calls before the event");
    queue.submit(&Request::read(10, 512), &Layout::framed());
    wait_for_used(queue, 11);
    let deadline = Instant::now() + PATIENCE;
    while queue.take_calls() == 0 {
        assert!(Instant::now() < deadline, "no call at the event");
    }
    for nth in 11..20 {
        queue.submit(&Request::read(nth, 512), &Layout::framed());
    }
    wait_for_used(queue, 20);
    std::thread::sleep(A_WHILE);
    assert_eq!(queue.take_calls(), 0, "calls after the event");
}

#[test]
fn many_answers_need_few_calls_and_kicks() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new());
    let queue = driver.queue();
    let kicks = queue.kicks();
    let request = Request::read(0, 512);
    let layout = Layout::framed();
    let tokens = queue.submit_all(std::iter::repeat_n((&request, &layout), 40));
    assert_eq!(queue.kicks() - kicks, 1);
    for token in tokens {
        let _data = queue.wait(token).expect_ok();
    }
}

#[test]
fn no_kick_is_lost_around_the_moment_when_the_device_falls_asleep() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    for options in [Options::new(), Options::new().without(feature::EVENT_IDX)] {
        let mut driver = server.driver(&options);
        let mut random = Random::printed();
        for _ in 0..1500 {
            let count = random.within(1..4);
            for _ in 0..count {
                driver
                    .queue()
                    .submit(&Request::read(0, 512), &Layout::framed());
                for _ in 0..random.within(0..2000) {
                    std::hint::spin_loop();
                }
            }
            for _ in 0..count {
                let (_, answer) = driver.queue().wait_any();
                let _data = answer.expect_ok();
            }
        }
    }
}

#[test]
fn a_kick_without_a_request_is_harmless() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new());
    for _ in 0..50 {
        driver.queue().kick();
    }
    driver.write(0, &[3; 512]);
    driver.queue().kick();
    assert_eq!(driver.read(0, 512), [3; 512]);
}

#[test]
fn the_ring_indexes_may_wrap() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    for options in [Options::new(), Options::new().without(feature::EVENT_IDX)] {
        let mut driver = server.driver(&options);
        let _base = driver.control.stop(0).unwrap();
        driver.queue().continue_at(0xff00);
        driver.control.start(&driver.queues[0], 0xff00).unwrap();
        let request = Request::read(0, 512);
        let layout = Layout::framed().indirect();
        for count in 1..100 {
            let batch = std::iter::repeat_n((&request, &layout), count);
            let tokens = driver.queue().submit_all(batch);
            for token in tokens {
                let _data = driver.queue().wait(token).expect_ok();
            }
        }
        assert!(
            driver.queue().used_index() < 0x8000,
            "the indexes have not wrapped"
        );
    }
}

#[test]
fn a_ring_of_any_legal_size_works() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    for size in [4, 16, 64, 128, 256, 1024] {
        let mut driver = server.driver(&Options::new().queue_size(size));
        for nth in 0..u64::from(size) {
            driver.write(nth, &[7; 512]);
        }
        assert_eq!(driver.read(0, 1024), [7; 1024]);
    }
}

#[test]
fn get_vring_base_answers_all_that_was_taken_and_nothing_is_touched_afterwards() {
    for cache in ["writeback", "direct"] {
        let image = Image::by_qemu(128 * MIB);
        let server = Launch::image(image.path()).args(["--cache", cache]).start();
        stop_again_and_again(&mut server.driver(&Options::new()));
    }
}

fn stop_again_and_again(driver: &mut Driver) {
    driver.write(0, &vec![9; 4 << 20]);
    for round in 0..20 {
        let before = driver.queue().available_index();
        let mut tokens = Vec::new();
        for nth in 0..20_u64 {
            let sector = nth * 256;
            let request = match nth % 3 {
                0 => Request::write(10_240 + round * 5120 + sector, vec![5; 131_072]),
                _ => Request::read(sector, 131_072),
            };
            tokens.push(driver.queue().submit(&request, &Layout::framed()));
        }
        let base = driver.control.stop(0).unwrap();
        assert_eq!(
            driver.queue().ring().used_index(),
            base,
            "what was taken is answered"
        );
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(
            driver.queue().ring().used_index(),
            base,
            "an answer after the stop"
        );
        let answered = driver.queue().answered().len();
        assert_eq!(answered, usize::from(base.wrapping_sub(before)));
        driver.control.start(&driver.queues[0], base).unwrap();
        driver.queue().kick();
        for _ in answered..tokens.len() {
            let _data = driver.queue().wait_any().1.expect_ok();
        }
    }
}

#[test]
fn a_ring_starts_at_the_base_that_it_is_given() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new());
    for nth in 0..70_u64 {
        driver.write(nth, &[u8::try_from(nth).unwrap(); 512]);
    }
    let base = driver.control.stop(0).unwrap();
    assert_eq!(base, 70);
    driver.control.start(&driver.queues[0], base).unwrap();
    for nth in 0..70_u64 {
        assert_eq!(driver.read(nth, 512), [u8::try_from(nth).unwrap(); 512]);
    }
}

#[test]
fn a_request_that_waited_for_the_start_is_served() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new());
    for _ in 0..20 {
        let base = driver.control.stop(0).unwrap();
        let token = driver
            .queue()
            .submit(&Request::read(0, 512), &Layout::framed());
        driver.queue().kick();
        assert!(
            driver
                .queue()
                .wait_within(token, Duration::from_millis(2))
                .is_none()
        );
        driver.control.start(&driver.queues[0], base).unwrap();
        let _data = driver.queue().wait(token).expect_ok();
    }
}

#[test]
fn a_disabled_ring_takes_nothing_until_it_is_enabled() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 512]);
    for _ in 0..3 {
        driver.control.enable(0, false).unwrap();
        let used = driver.queue().used_index();
        let write = driver
            .queue()
            .submit(&Request::write(0, vec![2; 512]), &Layout::framed());
        driver.queue().kick();
        std::thread::sleep(A_WHILE);
        assert_eq!(
            driver.queue().ring().used_index(),
            used,
            "a disabled ring moved"
        );
        driver.control.enable(0, true).unwrap();
        let _none = driver.queue().wait(write).expect_ok();
        assert_eq!(driver.read(0, 512), [2; 512]);
    }
}

#[test]
fn a_ring_that_starts_disabled_takes_nothing_whatever_front_ends_before_enabled() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let options = Options::new();
    for before in [
        Options::new(),
        Options::new().without(feature::PROTOCOL_FEATURES),
    ] {
        server.driver(&before).write(0, &[1; 512]);
        let mut control = server.control(&options);
        let memory = Memory::new(&options.memory);
        control.set_memory(&memory.messages()).unwrap();
        let event_index = control.features() & feature::EVENT_IDX != 0;
        let mut queue = Queue::new(0, &memory, 64, event_index);
        let token = queue.submit(&Request::read(0, 512), &Layout::framed());
        control.attach_disabled(&queue.attachment(), 0).unwrap();
        queue.kick();
        std::thread::sleep(A_WHILE);
        assert_eq!(queue.ring().used_index(), 0, "a disabled ring moved");
        control.enable(0, true).unwrap();
        assert_eq!(queue.wait(token).expect_ok(), [1; 512]);
    }
}

/// Writes and reads until told to stop.
fn busy(queue: &mut Queue, stop: &AtomicBool, rounds: &AtomicU64) {
    let mut nth = 0;
    while !stop.load(Ordering::Relaxed) {
        let sector = 8192 * queue.index() as u64 + nth % 4096;
        let stamp = nth.to_le_bytes().repeat(64);
        queue.write(sector, &stamp);
        assert_eq!(queue.read(sector, 512), stamp);
        nth += 1;
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// Runs something while a queue is busy; it must not disturb the queue.
fn beside_a_busy_queue(queue: &mut Queue, what: impl FnOnce()) {
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let wait_for_ten = || {
        let (first, deadline) = (rounds.load(Ordering::Relaxed), Instant::now() + PATIENCE);
        while rounds.load(Ordering::Relaxed) < first + 10 {
            assert!(Instant::now() < deadline, "the queue is not served");
            std::thread::yield_now();
        }
    };
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| busy(queue, &stop, &rounds));
        let at_last = StopOnDrop::new(&stop);
        wait_for_ten();
        what();
        wait_for_ten();
        drop(at_last);
        worker.join().unwrap();
    });
}

#[test]
fn stopping_one_queue_does_not_stall_another() {
    let image = Image::by_qemu(64 * MIB);
    for workers in ["1", "2"] {
        let server = Launch::image(image.path())
            .args(["--workers", workers])
            .start();
        let mut driver = server.driver(&Options::new().queues(2));
        let (first, second) = driver.queues.split_at_mut(1);
        let control = &mut driver.control;
        beside_a_busy_queue(&mut second[0], || {
            for _ in 0..50 {
                let base = control.stop(0).unwrap();
                std::thread::sleep(Duration::from_millis(1));
                control.start(&first[0], base).unwrap();
                assert_eq!(first[0].read(0, 512), [0; 512]);
            }
        });
        assert_eq!(server.terminate().code, Some(0));
    }
}

#[test]
fn the_memory_table_may_be_replaced_under_load() {
    let image = Image::by_qemu(64 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new());
    let memory = driver.memory.clone();
    let control = &mut driver.control;
    beside_a_busy_queue(&mut driver.queues[0], || {
        for _ in 0..30 {
            control.set_memory(&memory.messages()).unwrap();
        }
    });
}

#[test]
fn regions_may_be_added_and_removed_under_load() {
    let image = Image::by_qemu(64 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new().queues(2));
    let slots = driver.control.within("GET_MAX_MEM_SLOTS", |front_end| {
        vhost::vhost_user::VhostUserFrontend::get_max_mem_slots(front_end)
    });
    assert!(slots.unwrap() >= 8);
    let region = Region::new(1 << 32, MIB);
    let memory = driver.memory.clone();
    let (first, second) = driver.queues.split_at_mut(1);
    let control = &mut driver.control;
    beside_a_busy_queue(&mut second[0], || {
        for round in 0..20_u8 {
            memory.add(region);
            let message = memory.message(region);
            control.add_region(&message).unwrap();
            let there = Layout::framed().largest_at(region.at + 4096);
            let data = vec![round; 8192];
            let write = Request::write(0, data.clone());
            let _none = first[0].run(&write, &there).expect_ok();
            assert_eq!(
                first[0].run(&Request::read(0, 8192), &there).expect_ok(),
                data
            );
            control.remove_region(&message).unwrap();
            let gone = first[0].run(&Request::read(0, 8192), &there);
            assert_eq!(u32::from(gone.status), VIRTIO_BLK_S_IOERR);
            assert_eq!(
                gone.data,
                vec![UNTOUCHED; 8192],
                "the device wrote into memory that was taken away"
            );
            memory.remove(region);
        }
    });
}

#[test]
fn a_device_that_is_reset_has_stopped_its_rings_and_begins_anew() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let mut options = Options::new();
    options.wanted.protocol |= Protocol::RESET_DEVICE;
    let mut driver = server.driver(&options);
    let token = driver
        .queue()
        .submit(&Request::write(5, vec![5; 512]), &Layout::framed());
    let reset = driver.control.within("RESET_DEVICE", |front_end| {
        vhost::vhost_user::VhostUserFrontend::reset_device(front_end)
    });
    reset.unwrap();
    // What was taken is answered, and no more is.
    let before = driver.queue().wait_within(token, Duration::ZERO);
    let late = driver
        .queue()
        .submit(&Request::read(5, 512), &Layout::framed());
    let nothing = driver.queue().wait_within(late, Duration::from_millis(100));
    assert!(nothing.is_none(), "a ring runs after a reset");
    let (features, base) = (driver.control.features(), driver.queue().used_index());
    driver.control.accept(features).unwrap();
    driver.control.start(&driver.queues[0], base).unwrap();
    let _none = before
        .unwrap_or_else(|| driver.queue().wait(token))
        .expect_ok();
    // It may be read before it is written: both may have waited for the ring.
    let _either = driver.queue().wait(late).expect_ok();
    assert_eq!(driver.read(5, 512), [5; 512]);
}

#[test]
fn without_protocol_features_rings_work_at_once() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new().without(feature::PROTOCOL_FEATURES));
    driver.write(5, &[5; 512]);
    assert_eq!(driver.read(5, 512), [5; 512]);
}

#[test]
fn a_front_end_like_firecracker_needs_config_only() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let options = Options::new()
        .queue_size(256)
        .without(feature::INDIRECT_DESC | feature::MQ | feature::SEG_MAX | feature::CONFIG_WCE)
        .without_protocol(!Protocol::CONFIG);
    let mut driver = server.driver(&options);
    assert_eq!(driver.config().unwrap().capacity_sectors, 8 * MIB / 512);
    driver.write(5, &[5; 512]);
    assert_eq!(driver.read(5, 512), [5; 512]);
}

#[test]
fn the_record_of_requests_is_forgotten_with_its_front_end() {
    let image = Image::by_qemu(8 * MIB);
    let server = serve(&image);
    let mut driver = server.driver(&Options::new().tracked());
    driver.write(0, &[1; 512]);
    let region = driver.inflight.take().unwrap();
    drop(driver);
    let before = region.queue(0).used_idx;
    assert_eq!(before, 1);
    // The next one wants none.
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[2; 512]);
    driver.write(8, &[2; 512]);
    assert_eq!(driver.read(0, 512), [2; 512]);
    assert_eq!(region.queue(0).used_idx, before);
}

#[test]
fn records_of_other_rings_do_not_fill_the_log() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new().tracked());
    for _ in 0..40 {
        driver.write(0, &[1; 512]);
        let base = driver.control.stop(0).unwrap();
        let region = driver.inflight.as_ref().unwrap();
        let mut record = region.queue(0);
        record.used_idx = record.used_idx.wrapping_add(1); // Ahead of the ring.
        region.set_queue(0, &record);
        driver.control.start(&driver.queues[0], base).unwrap();
    }
    assert_eq!(driver.read(0, 512), [1; 512]);
    let lines = server.log().matches("is about another ring").count();
    assert!((1..=10).contains(&lines), "{lines} lines");
}
