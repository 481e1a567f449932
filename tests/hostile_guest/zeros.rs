//! Floods of discards and write-zeroes: a few bytes in a ring that ask for terabytes of work.

use std::time::{Duration, Instant};

use vdi_core::NewKind;
use vdi_tests::driver::{Driver, Layout, Options, Request, Segment};
use vdi_tests::image::Image;
use vdi_tests::server::{Launch, Server};
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

/// The disk, of which nothing is stored.
const DISK: u64 = 2 << 40;

/// Requests of the flood.
const FLOOD: u16 = 300;

/// Within this a queue stops, another queue is served, and the daemon ends. It is some hundredths of a second in a debug build; the flood takes
/// half a minute if all of it is waited for.
const SOON: Duration = Duration::from_secs(5);

/// How the daemon is told what to serve.
#[derive(Debug, Clone, Copy)]
enum Limits {
    None,
    /// Too high to hold anything, but chains are taken one by one.
    High,
}

fn launch(image: &Image, limits: Limits) -> Launch {
    let Limits::High = limits else {
        return Launch::image(image.path());
    };
    let directory = image.path().parent().unwrap();
    let config = directory.join("vhost.toml");
    let text = format!(
        "socket-dir = {directory:?}\n[[disk]]\nname = \"a\"\nimage = {:?}\nlimits = {{ iops_total = 1000000 }}\n",
        image.path()
    );
    std::fs::write(&config, text).unwrap();
    Launch::config_at(&config, &directory.join("a.sock"))
}

/// A flood of requests that ask for as much as the device says that it takes in one of them.
fn flooded(image: &Image, limits: Limits, make: fn(&[Segment]) -> Request) -> (Server, Driver) {
    let server = launch(image, limits).start();
    let options = Options::new().queues(2).queue_size(1024).tracked();
    let mut driver = server.driver(&options);
    let (sectors, segments) = driver.config().unwrap().max_write_zeroes;
    let sectors = sectors.min(u32::try_from(DISK / 512 - 1).unwrap());
    let request = make(&vec![Segment::new(0, sectors); segments as usize]);
    let layout = Layout::framed();
    let all = std::iter::repeat_n((&request, &layout), FLOOD.into());
    driver.queues[0].submit_all(all);
    let begin = Instant::now();
    let _zeros = driver.queues[1].read(0, 512);
    assert!(begin.elapsed() < SOON, "another queue waited");
    (server, driver)
}

fn expect_soon(what: &str, begin: Instant) {
    let took = begin.elapsed();
    println!("{what}: {took:?}");
    assert!(took < SOON, "{what} took {took:?}");
}

#[test]
fn a_stop_in_a_flood_of_the_largest_discards_waits_for_one_of_them() {
    let image = Image::by_us(DISK, 1 << 20, NewKind::Dynamic);
    for make in [Request::discard, Request::write_zeroes] {
        for limits in [Limits::None, Limits::High] {
            let (server, mut driver) = flooded(&image, limits, make);
            let begin = Instant::now();
            let base = driver.control.stop(0).unwrap();
            expect_soon("the stop", begin);
            assert!(base < 16, "{base} were taken, {limits:?}");
            let used = driver.queues[0].ring().used_index();
            assert_eq!(used, base, "what was taken is answered");
            let states = driver.inflight.as_ref().unwrap().queue(0).states;
            let left = states.iter().filter(|state| state.0 != 0).count();
            assert_eq!(left, 0, "what was not taken is not recorded");
            drop(driver);
            assert_eq!(server.terminate().code, Some(0));

            let (server, driver) = flooded(&image, limits, make);
            let begin = Instant::now();
            assert_eq!(server.terminate().code, Some(0));
            expect_soon("the end", begin);
            drop(driver);
        }
    }
}

#[test]
fn discards_that_wait_for_others_are_answered_once_and_keep_nothing_behind_them_waiting_for_ever() {
    let image = Image::by_us(DISK, 1 << 20, NewKind::Dynamic);
    for limits in [Limits::None, Limits::High] {
        let server = launch(&image, limits).start();
        let mut driver = server.driver(&Options::new().queue_size(1024).tracked());
        let (sectors, _) = driver.config().unwrap().max_discard;
        let two = Request::discard(&[Segment::new(0, sectors); 2]);
        let read = Request::read(0, 512);
        let layout = Layout::framed();
        let pairs = [(&two, &layout), (&read, &layout)];
        let all = std::iter::repeat_n(pairs, 100).flatten();
        let tokens = driver.queue().submit_all(all);
        for token in tokens {
            assert_eq!(
                u32::from(driver.queue().wait(token).status),
                VIRTIO_BLK_S_OK
            );
        }
        assert_eq!(driver.queue().used_index(), 200);
        assert_eq!(driver.control.stop(0).unwrap(), 200);
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
    }
}
