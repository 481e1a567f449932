//! Kicks, calls and errors without a descriptor, and descriptors that are full.
//!
//! Source: vhost-user protocol, bit 8 of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use vdi_tests::driver::raw::{NEED_REPLY, VERSION};
use vdi_tests::driver::{
    Calls, Control, Driver, Layout, Memory, Options, PATIENCE, Queue, Request, feature,
};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, Server};
use vhost::VhostBackend;
use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Long enough for an idle daemon to do what it should not.
const A_WHILE: Duration = Duration::from_millis(80);

/// The bit that says that there is no descriptor.
const NO_FD: u64 = 1 << 8;

/// As much as an eventfd holds; whoever writes more must wait.
const FULL: u64 = u64::MAX - 1;

/// Says that a queue has no descriptor for kicks, calls or errors, which `vhost` cannot.
fn without_fd(control: &Control, request: FrontendReq, index: u64) {
    let header = [u32::from(request), VERSION | NEED_REPLY, 8].map(u32::to_ne_bytes);
    let mut message = header.concat();
    message.extend((index | NO_FD).to_ne_bytes());
    let mut socket = control.socket();
    socket.write_all(&message).unwrap();
    let mut answer = [0; 20];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(
        answer[12..],
        [0; 8],
        "{request:?} without a descriptor is refused"
    );
}

/// Stops the first queue and starts it again without a descriptor for kicks.
fn restart_polled(driver: &mut Driver) {
    let base = driver.control.stop(0).unwrap();
    let ring = driver.queues[0].attachment();
    let control = &mut driver.control;
    let call = |f: &mut vhost::vhost_user::Frontend| f.set_vring_call(0, &ring.call);
    control.within("SET_VRING_CALL", call).unwrap();
    control
        .within("SET_VRING_BASE", |f| f.set_vring_base(0, base))
        .unwrap();
    without_fd(control, FrontendReq::SET_VRING_KICK, 0);
}

/// How often each of the daemon's threads has gone to sleep by itself.
fn sleeps(server: &Server) -> BTreeMap<OsString, u64> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let of = |status: String| -> u64 {
        let (_, rest) = status.split_once("\nvoluntary_ctxt_switches:").unwrap();
        rest.lines().next().unwrap().trim().parse().unwrap()
    };
    tasks
        .filter_map(|task| {
            let task = task.unwrap();
            // The kernel's helpers come and go.
            let status = fs::read_to_string(task.path().join("status")).ok()?;
            Some((task.file_name(), of(status)))
        })
        .collect()
}

fn sleeps_within(server: &Server, time: Duration) -> u64 {
    let before = sleeps(server);
    std::thread::sleep(time);
    let since = |(thread, now): (&OsString, &u64)| now - before.get(thread).unwrap_or(&0);
    sleeps(server).iter().map(since).sum()
}

/// Waits for a time in which the daemon's threads go to sleep less often than that: what was done before may have left
/// something to do, but not for ever.
#[track_caller]
fn expect_few_sleeps(server: &Server, most: u64, what: &str) {
    let counts: Vec<_> = std::iter::repeat_with(|| sleeps_within(server, 5 * A_WHILE))
        .take(10)
        .take_while(|count| *count >= most)
        .collect();
    assert!(counts.len() < 10, "{what}: {counts:?}");
}

#[test]
fn a_ring_without_a_kick_descriptor_is_polled_and_only_that() {
    for engine in ["io-uring", "sync"] {
        let image = Image::by_qemu(8 * MIB);
        let server = Launch::image(image.path())
            .args(["--engine", engine])
            .start();
        let mut driver = server.driver(&Options::new());
        driver.write(0, &[1; 512]);
        restart_polled(&mut driver);
        for nth in 0..200_u64 {
            let data = vec![u8::try_from(nth).unwrap(); 4096];
            driver.write(nth * 8, &data);
            assert_eq!(driver.read(nth * 8, 4096), data);
        }
        // After a long time without chains too.
        std::thread::sleep(A_WHILE);
        assert_eq!(driver.read(8, 512), [1; 512]);

        std::thread::sleep(4 * A_WHILE);
        expect_few_sleeps(&server, 80, "an idle ring is looked at often");
        assert_eq!(driver.read(8, 512), [1; 512]);

        driver.control.enable(0, false).unwrap();
        expect_few_sleeps(&server, 10, "a disabled ring is polled");
        let late = Request::read(8, 512);
        let token = driver.queue().submit(&late, &Layout::framed());
        std::thread::sleep(A_WHILE);
        assert!(driver.queue().answered().is_empty());
        driver.control.enable(0, true).unwrap();
        let _data = driver.queue().wait(token).expect_ok();

        let ring = driver.queues[0].attachment();
        let kick = |f: &mut vhost::vhost_user::Frontend| f.set_vring_kick(0, &ring.kick);
        driver.control.within("SET_VRING_KICK", kick).unwrap();
        assert_eq!(driver.read(16, 512), [2; 512]);
        std::thread::sleep(A_WHILE);
        expect_few_sleeps(&server, 10, "a ring with kicks is polled");
        without_fd(&driver.control, FrontendReq::SET_VRING_KICK, 0);
        assert_eq!(driver.read(16, 512), [2; 512]);
        assert_eq!(server.terminate().code, Some(0));
    }
}

#[test]
fn a_running_ring_hears_kicks_where_it_was_told_last() {
    let image = Image::by_qemu(8 * MIB);
    for engine in ["io-uring", "sync"] {
        let server = Launch::image(image.path())
            .args(["--engine", engine])
            .start();
        let mut driver = server.driver(&Options::new());
        assert_eq!(driver.read(0, 512), [0; 512]);
        let new = EventFd::new(0).unwrap();
        let kick = |f: &mut vhost::vhost_user::Frontend| f.set_vring_kick(0, &new);
        driver.control.within("SET_VRING_KICK", kick).unwrap();
        std::thread::sleep(A_WHILE);
        let read = Request::read(8, 512);
        let token = driver.queue().submit(&read, &Layout::framed());
        // The driver kicks where it did before.
        let early = driver.queue().wait_within(token, A_WHILE);
        assert!(early.is_none(), "the old descriptor is heard, {engine}");
        new.write(1).unwrap();
        let _data = driver.queue().wait(token).expect_ok();
    }
}

#[test]
fn a_running_ring_calls_at_once_where_it_is_told_to() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    assert_eq!(driver.read(0, 512), [0; 512]);
    // Whoever looked at the old one only may have missed an answer.
    let new = EventFd::new(EFD_NONBLOCK).unwrap();
    let call = |f: &mut vhost::vhost_user::Frontend| f.set_vring_call(0, &new);
    driver.control.within("SET_VRING_CALL", call).unwrap();
    assert_eq!(new.read().unwrap(), 1);
    // The same goes for a ring that starts where another daemon stopped, perhaps before it called.
    let base = driver.control.stop(0).unwrap();
    let _old = driver.queue().take_calls();
    driver.control.start(&driver.queues[0], base).unwrap();
    assert_eq!(driver.queue().take_calls(), 1);
}

#[test]
fn a_stopped_ring_keeps_no_descriptor_but_that_for_errors() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).inspectable().start();
    let open = || {
        let fds = fs::read_dir(format!("/proc/{}/fd", server.pid()));
        fds.unwrap().count()
    };
    let options = Options::new();
    let mut control = server.control(&options);
    let memory = Memory::new(&options.memory);
    control.set_memory(&memory.messages()).unwrap();
    let queue = Queue::new(0, &memory, 64, false);
    control.start(&queue, 0).unwrap();
    let running = open();
    // The image is let go of, too; it comes back.
    control.stop(0).unwrap();
    let stopped = open();
    control.start(&queue, 0).unwrap();
    assert_eq!(open(), running);
    let ring = queue.attachment();
    let set = |f: &mut vhost::vhost_user::Frontend| f.set_vring_err(0, &ring.error);
    control.within("SET_VRING_ERR", set).unwrap();
    control.stop(0).unwrap();
    assert_eq!(open(), stopped);
    drop(control);
    let mut fresh = server.control(&options);
    fresh.set_memory(&memory.messages()).unwrap();
    assert_eq!(open() + 1, stopped, "of a ring that was stopped");
}

/// Waits without being called.
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

#[test]
fn without_a_call_descriptor_there_are_answers_and_no_calls() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new().without(feature::EVENT_IDX));
    driver.write(0, &[1; 512]);
    without_fd(&driver.control, FrontendReq::SET_VRING_CALL, 0);
    // The one for the write came before.
    let _calls = driver.queue().take_calls();
    for nth in 1..20 {
        driver
            .queue()
            .submit(&Request::read(0, 512), &Layout::framed());
        wait_for_used(driver.queue(), nth + 1);
    }
    std::thread::sleep(A_WHILE);
    assert_eq!(driver.queue().take_calls(), 0);
}

#[test]
fn without_an_error_descriptor_a_broken_ring_is_told_nowhere_and_others_go_on() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new().queues(2));
    driver.queues[1].write(0, &[1; 512]);
    let broken = driver.queues[0].attachment();
    without_fd(&driver.control, FrontendReq::SET_VRING_ERR, 0);
    driver.queue().offer(u16::MAX);
    server.expect_log("queue 0 is stopped");
    std::thread::sleep(A_WHILE);
    assert!(broken.error.read().is_err(), "an error was told");
    assert_eq!(driver.queues[1].read(0, 512), [1; 512]);
}

/// An eventfd on which a write blocks.
fn full() -> EventFd {
    let eventfd = EventFd::new(0).unwrap();
    eventfd.write(FULL).unwrap();
    eventfd
}

#[test]
fn full_eventfds_block_nobody() {
    let image = Image::by_qemu(8 * MIB);
    // One worker for both queues.
    let server = Launch::image(image.path()).args(["--workers", "1"]).start();
    let mut driver = server.driver(&Options::new().queues(2).without(feature::EVENT_IDX));
    driver.queues[0].write(0, &[1; 512]);
    driver.queues[0].set_calls(Calls::Wanted);
    let (call, error) = (full(), full());
    let control = &mut driver.control;
    control
        .within("SET_VRING_CALL", |f| f.set_vring_call(0, &call))
        .unwrap();
    control
        .within("SET_VRING_ERR", |f| f.set_vring_err(0, &error))
        .unwrap();
    for nth in 1..10 {
        driver.queues[0].submit(&Request::read(0, 512), &Layout::framed());
        wait_for_used(&driver.queues[0], nth + 1);
        assert_eq!(driver.queues[1].read(0, 512), [1; 512]);
    }
    driver.queues[0].offer(u16::MAX);
    server.expect_log("queue 0 is stopped");
    assert_eq!(driver.queues[1].read(0, 512), [1; 512]);
    // The reader finds what was there, or one more: that it was told is not lost.
    assert!(call.read().unwrap() >= FULL);
    assert_eq!(server.terminate().code, Some(0));
}

/// A front end that starts a ring again after an earlier one has filled its call descriptor.
#[test]
fn a_full_call_descriptor_does_not_block_a_start() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 512]);
    let base = driver.control.stop(0).unwrap();
    let mut ring = driver.queues[0].attachment();
    let own = std::mem::replace(&mut ring.call, full());
    driver.control.attach(&ring, base).unwrap();
    let call = |f: &mut vhost::vhost_user::Frontend| f.set_vring_call(0, &own);
    driver.control.within("SET_VRING_CALL", call).unwrap();
    assert_eq!(driver.read(0, 512), [1; 512]);
}

/// Measures; `cargo test -p vdi-tests --test daemon -- --ignored --nocapture idle_polled`.
#[test]
#[ignore = "a measurement"]
fn an_idle_polled_ring_uses_this_much_processor_time() {
    for engine in ["io-uring", "sync"] {
        let image = Image::by_qemu(8 * MIB);
        let server = Launch::image(image.path())
            .args(["--engine", engine])
            .start();
        let mut driver = server.driver(&Options::new());
        driver.write(0, &[1; 512]);
        restart_polled(&mut driver);
        assert_eq!(driver.read(0, 512), [1; 512]);
        std::thread::sleep(A_WHILE);
        let before = ticks(&server);
        let sleeps = sleeps_within(&server, Duration::from_secs(10));
        let ticks = ticks(&server) - before;
        println!(
            "{engine}: {} sleeps and {} ms of CPU a second",
            sleeps / 10,
            ticks
        );
    }
}

/// Processor time of the daemon in hundredths of a second.
fn ticks(server: &Server) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", server.pid())).unwrap();
    let (_, rest) = stat.rsplit_once(')').unwrap();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}
