//! P1 and P2: what was answered survives the death of the daemon, and what was flushed the loss of power.
//!
//! Power cannot be cut here. What is seen instead is what a power loss would take: the pages of the image that
//! the kernel has and the disk has not.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use vdi_tests::driver::{Driver, Layout, Options, PATIENCE, Queue, Request, Token, feature};
use vdi_tests::image::{Image, MIB, are_zeros, field};
use vdi_tests::page_cache::{leave_unwritten, unwritten_pages};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::server::Launch;
use vdi_tests::stop::StopOnDrop;

const DISK: u64 = 64 * MIB;

#[test]
fn a_write_may_wait_for_a_flush_and_a_flush_writes_everything() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    let writes = || (0..8).for_each(|nth| driver.write(nth * 1000, &[1; 65536]));
    assert!(
        leave_unwritten(image.path(), 8, writes),
        "writes in write-back mode were synced, or this is no disk"
    );
    driver.flush();
    assert_eq!(
        unwritten_pages(image.path()),
        0,
        "pages that the flush left behind"
    );
    let write = || driver.write(0, &[2; 4096]);
    assert!(leave_unwritten(image.path(), 0, write));
    driver.flush();
    assert_eq!(unwritten_pages(image.path()), 0);
}

#[test]
fn a_flush_after_the_flush_of_another_queue_covers_new_writes_only_and_misses_none() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path())
        .args(["--num-queues", "2"])
        .start();
    let mut driver = server.driver(&Options::new().queues(2));
    for round in 0..10 {
        driver.queues[0].write(round * 2048, &[1; 4096]);
        driver.queues[1].flush();
        assert_eq!(unwritten_pages(image.path()), 0);
        driver.queues[0].flush();
    }
}

#[test]
fn without_flush_and_config_wce_every_write_is_written_through() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let without = feature::FLUSH | feature::CONFIG_WCE;
    let mut driver = server.driver(&Options::new().without(without));
    for nth in 0..8 {
        driver.write(nth * 1000, &[1; 65536]);
        assert_eq!(unwritten_pages(image.path()), 0, "write {nth}");
    }
}

#[test]
fn with_writeback_0_every_write_is_written_through_until_it_is_1_again() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    driver.set_writeback(false).unwrap();
    for nth in 0..8 {
        driver.write(nth * 1000, &[1; 65536]);
        assert_eq!(unwritten_pages(image.path()), 0, "write {nth}");
    }
    driver.set_writeback(true).unwrap();
    let write = || driver.write(0, &[2; 65536]);
    assert!(leave_unwritten(image.path(), 0, write));
}

#[test]
fn switching_writeback_off_covers_what_was_written_before() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    let write = || driver.write(0, &[1; 65536]);
    assert!(leave_unwritten(image.path(), 0, write));
    // No later write does it.
    driver.set_writeback(false).unwrap();
    assert_eq!(unwritten_pages(image.path()), 0);
}

#[test]
fn the_end_of_the_daemon_writes_everything() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    server.driver(&Options::new()).write(0, &[1; 65536]);
    assert_eq!(server.terminate().code, Some(0));
    assert_eq!(unwritten_pages(image.path()), 0);
}

#[test]
fn the_first_write_renews_uuid_modify_and_reading_does_not() {
    let image = Image::by_qemu(DISK);
    let before: [u8; 16] = image.bytes(field::UUID_MODIFY);
    let serve_and = |write: bool| {
        let server = Launch::image(image.path()).start();
        let mut driver = server.driver(&Options::new());
        driver.read(0, 4096);
        if write {
            driver.write(0, &[1; 512]);
        }
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
        image.bytes(field::UUID_MODIFY)
    };
    assert_eq!(serve_and(false), before);
    let first = serve_and(true);
    assert_ne!(first, before);
    assert_ne!(serve_and(true), first);
}

const SLOT_SECTORS: u64 = 12;
const SLOTS: u64 = DISK / 512 / SLOT_SECTORS;

fn stamp(slot: u64) -> Vec<u8> {
    Random::seeded(slot).bytes(512 * 12)
}

/// What one queue wrote, each slot once.
#[derive(Default)]
struct Written {
    answered: Vec<u64>,
    unanswered: Vec<u64>,
}

/// Writes slots in random order at depth 24 until the device falls silent or is told to stop.
fn write_slots(queue: &mut Queue, queues: u64, stop: &AtomicBool, count: &AtomicUsize) -> Written {
    let mut written = Written::default();
    let mut pending: Vec<(Token, u64)> = Vec::new();
    let mut random = Random::seeded(queue.index() as u64);
    let mine = SLOTS / queues;
    let mut order: Vec<u64> = (0..mine)
        .map(|n| n * queues + queue.index() as u64)
        .collect();
    for at in (1..order.len()).rev() {
        let other = usize::try_from(random.within(0..at as u64 + 1)).unwrap();
        order.swap(at, other);
    }
    let mut settle = |pending: &mut Vec<(Token, u64)>, token: Token| {
        let at = pending
            .iter()
            .position(|(other, _)| *other == token)
            .unwrap();
        written.answered.push(pending.swap_remove(at).1);
        count.fetch_add(1, Ordering::Relaxed);
    };
    while !stop.load(Ordering::Relaxed) {
        while pending.len() < 24
            && let Some(slot) = order.pop()
        {
            let request = Request::write(slot * SLOT_SECTORS, stamp(slot));
            pending.push((queue.submit(&request, &Layout::framed()), slot));
        }
        if let Some((token, answer)) = queue.wait_any_within(Duration::from_millis(20)) {
            assert_eq!(answer.status, 0);
            settle(&mut pending, token);
        }
    }
    for (token, answer) in queue.answered() {
        assert_eq!(answer.status, 0);
        settle(&mut pending, token);
    }
    written.unanswered = pending.into_iter().map(|(_, slot)| slot).collect();
    written
}

/// Runs a daemon under load, ends it by a signal in the midst of it, and returns what was written.
fn end_under_load(image: &Image, cache: &str, after_answers: usize, signal: Signal) -> Written {
    let arguments = ["--cache", cache, "--num-queues", "2"];
    let server = Launch::image(image.path()).args(arguments).start();
    let mut driver = server.driver(&Options::new().queues(2));
    let (stop, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    let mut all = Written::default();
    std::thread::scope(|scope| {
        let queues = driver.queues.iter_mut();
        let (stop, count) = (&stop, &count);
        let workers: Vec<_> = queues
            .map(|queue| scope.spawn(move || write_slots(queue, 2, stop, count)))
            .collect();
        let at_last = StopOnDrop::new(stop);
        let start = std::time::Instant::now();
        while count.load(Ordering::Relaxed) < after_answers && start.elapsed() < PATIENCE {
            std::thread::yield_now();
        }
        server.signal(signal);
        let exit = server.wait();
        drop(at_last);
        if signal == Signal::SIGTERM {
            assert_eq!(exit.code, Some(0), "{}", exit.log);
        }
        for worker in workers {
            let written = worker.join().unwrap();
            all.answered.extend(written.answered);
            all.unanswered.extend(written.unanswered);
        }
    });
    assert!(all.answered.len() >= after_answers);
    all
}

/// Every sector of a slot is as it was written, or zeros if that may be.
fn expect_slots(disk: &[u8], slots: &[u64], may_be_zeros: bool) {
    for &slot in slots {
        let start = usize::try_from(slot * SLOT_SECTORS * 512).unwrap();
        let expected = stamp(slot);
        for (nth, wanted) in expected.chunks(512).enumerate() {
            let sector = &disk[start + nth * 512..start + (nth + 1) * 512];
            let zeros = may_be_zeros && are_zeros(sector);
            assert!(
                sector == wanted || zeros,
                "sector {nth} of slot {slot} is not what was written"
            );
        }
    }
}

fn expect_written(disk: &[u8], written: &Written) {
    expect_slots(disk, &written.answered, false);
    expect_slots(disk, &written.unanswered, true);
    let mut untouched = vec![true; usize::try_from(SLOTS).unwrap()];
    for slot in written.answered.iter().chain(&written.unanswered) {
        untouched[usize::try_from(*slot).unwrap()] = false;
    }
    for (slot, contents) in disk.chunks(512 * 12).enumerate().take(untouched.len()) {
        let zeros = are_zeros(contents);
        assert!(zeros || !untouched[slot], "slot {slot} was never written");
    }
}

#[test]
fn after_sigterm_under_load_the_image_is_clean_and_holds_all_that_was_answered() {
    for cache in ["writeback", "direct"] {
        let image = Image::by_qemu(DISK);
        let written = end_under_load(&image, cache, 300, Signal::SIGTERM);
        qemu::expect_clean(image.path());
        expect_written(&qemu::contents(image.path()), &written);
    }
}

#[test]
fn after_kill_9_under_load_all_that_was_answered_is_there_for_qemu_and_for_a_new_daemon() {
    for (cache, after) in [("writeback", 30), ("writeback", 400), ("direct", 200)] {
        let image = Image::by_qemu(DISK);
        let written = end_under_load(&image, cache, after, Signal::SIGKILL);
        // It waits for what the kernel still does for the dead one.
        expect_written(&qemu::contents(image.path()), &written);
        let before: [u8; 4] = image.bytes(field::BLOCKS_ALLOCATED);
        let server = Launch::image(image.path()).start();
        let mut driver = server.driver(&Options::new());
        let mut disk = Vec::new();
        for nth in 0..DISK / (4 * MIB) {
            disk.extend_from_slice(&driver.read(nth * 8192, 4 << 20));
        }
        expect_written(&disk, &written);
        assert_eq!(
            image.bytes(field::BLOCKS_ALLOCATED),
            before,
            "reading changed the image"
        );
        driver.write(0, &[1; 512]);
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
        qemu::expect_clean(image.path());
    }
}

#[test]
fn a_kill_at_the_first_write_leaves_an_image_that_opens() {
    for nth in 0..10 {
        let image = Image::by_qemu(8 * MIB);
        let server = Launch::image(image.path()).start();
        let mut driver = server.driver(&Options::new());
        driver
            .queue()
            .submit(&Request::write(0, vec![1; 4096]), &Layout::framed());
        std::thread::sleep(Duration::from_micros(nth * 150));
        let exit = server.kill();
        assert_eq!(exit.signal, Some(9));
        let contents = qemu::contents(image.path());
        let stamp = contents[0];
        assert!(stamp <= 1 && contents[..4096].iter().all(|&byte| byte == stamp));
        let server = Launch::image(image.path()).start();
        let answered = !driver.queue().answered().is_empty();
        let data = server.driver(&Options::new()).read(0, 4096);
        assert_eq!(data[0], stamp);
        assert!(!answered || stamp == 1, "an answered write is lost");
    }
}

/// A shell that makes a file that would be too long an error instead of a signal.
const NO_SIGNAL: [&str; 3] = ["sh", "-c", "trap '' XFSZ; exec \"$0\" \"$@\""];

/// Lets a process write no file beyond so many bytes.
fn limit_files(pid: u32, bytes: &str) {
    let arguments = [
        "--pid",
        &pid.to_string(),
        &format!("--fsize={bytes}:unlimited"),
    ];
    let status = Command::new("prlimit").args(arguments).status();
    assert!(status.unwrap().success());
}

fn write_block(driver: &mut Driver, block: u8) -> u8 {
    let request = Request::write(u64::from(block) * 2048, vec![block; 4096]);
    driver.queue().run(&request, &Layout::framed()).status
}

#[test]
fn a_write_that_the_host_refuses_fails_alone_and_works_when_there_is_room_again() {
    for cache in ["writeback", "direct"] {
        let image = Image::by_qemu(DISK);
        let launch = Launch::image(image.path()).args(["--cache", cache]);
        let server = launch.under(NO_SIGNAL).start();
        let mut driver = server.driver(&Options::new());
        assert_eq!(write_block(&mut driver, 0), 0);
        limit_files(server.pid(), "10485760");
        let (kept, failed): (Vec<u8>, Vec<u8>) =
            (1..40).partition(|&block| write_block(&mut driver, block) == 0);
        assert!(
            (5..10).contains(&kept.len()),
            "10 MiB hold some blocks, {cache}: {kept:?}"
        );
        assert_eq!(
            write_block(&mut driver, kept[0]),
            0,
            "a block that has its room"
        );
        for &block in &failed {
            let data = driver.read(u64::from(block) * 2048, 8192);
            assert!(are_zeros(&data), "block {block}, whose write failed");
        }
        limit_files(server.pid(), "unlimited");
        for &block in &failed {
            assert_eq!(write_block(&mut driver, block), 0, "block {block}, {cache}");
        }
        for block in 1..40 {
            let data = driver.read(u64::from(block) * 2048, 8192);
            assert!(
                data[..4096] == [block; 4096] && are_zeros(&data[4096..]),
                "block {block}"
            );
        }
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
        qemu::expect_clean(image.path());
    }
}

#[test]
fn when_the_host_has_no_room_for_new_blocks_the_others_are_served_until_there_is() {
    let image = Image::by_qemu(DISK);
    assert!(qemu::io(image.path(), "write -P 1 1M 1M").status.success());
    let server = Launch::image(image.path()).under(NO_SIGNAL).start();
    let mut driver = server.driver(&Options::new());
    limit_files(server.pid(), "2097152");
    for block in 2..12 {
        assert_eq!(write_block(&mut driver, block), 1, "block {block}");
        assert_eq!(write_block(&mut driver, 1), 0, "a block that has its room");
        driver.flush();
    }
    limit_files(server.pid(), "unlimited");
    for block in 2..12 {
        assert_eq!(write_block(&mut driver, block), 0, "block {block}");
    }
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    qemu::expect_clean(image.path());
}

#[test]
fn writes_that_fail_again_and_again_use_nothing_up() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).under(NO_SIGNAL).start();
    let mut driver = server.driver(&Options::new());
    assert_eq!(write_block(&mut driver, 0), 0);
    limit_files(server.pid(), "1048576"); // the first block ends behind that
    for nth in 0..300 {
        assert_eq!(
            write_block(&mut driver, 2 + u8::try_from(nth % 30).unwrap()),
            1
        );
    }
    limit_files(server.pid(), "unlimited");
    for block in 1..64 {
        assert_eq!(write_block(&mut driver, block), 0, "block {block}");
    }
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    qemu::expect_clean(image.path());
}
