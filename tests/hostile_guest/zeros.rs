//! Floods of requests that are a few bytes in a ring and ask for terabytes of work: discards, and reads into the same memory.

use std::time::{Duration, Instant};

use vdi_core::NewKind;
use vdi_tests::driver::{
    Descriptor, Driver, Fate, INDIRECT, Layout, Options, PATIENCE, Request, Segment,
};
use vdi_tests::image::Image;
use vdi_tests::server::{Launch, Server};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN};

use crate::bench::{linked_from, readable, writable};

/// The disk, of which nothing is stored.
const DISK: u64 = 2 << 40;

/// Requests of the flood.
const FLOOD: u16 = 300;

/// Within this a queue stops, another queue is served, and the daemon ends. It is some hundredths of a second in a debug build; the flood takes
/// half a minute if all of it is waited for.
const SOON: Duration = Duration::from_secs(10);

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

#[test]
fn a_stop_in_a_flood_of_reads_into_the_same_memory_waits_for_a_few_of_them() {
    const PIECE: u32 = 16 << 20;
    let image = Image::by_us(DISK, 1 << 20, NewKind::Dynamic);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new().queue_size(1024).tracked());
    let memory = driver.memory.clone();
    let buffer = |len| memory.allocate(len, 4096);
    let (header, status, table) = (buffer(16), buffer(1), buffer(16 * 1024));
    let data = buffer(PIECE.into());
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&VIRTIO_BLK_T_IN.to_le_bytes());
    header.write(&bytes);
    let into_same = |count| {
        let mut chain = vec![readable(header.at(), 16)];
        chain.extend(std::iter::repeat_n(writable(data.at(), PIECE), count));
        chain.push(writable(status.at(), 1));
        let chain = linked_from(0, &chain);
        table.write(&chain.iter().flat_map(|d| d.to_bytes()).collect::<Vec<_>>());
        Descriptor {
            at: table.at(),
            len_bytes: u32::try_from(16 * chain.len()).unwrap(),
            flags: INDIRECT,
            next: 0,
        }
    };
    // More than a used element can tell of.
    let queue = driver.queue();
    queue.offer_chain(0, &[into_same(256)]);
    assert!(matches!(queue.fate(PATIENCE), Fate::Used(_)));
    assert_eq!(u32::from(status.read(1)[0]), VIRTIO_BLK_S_IOERR);
    // Nearly 4 GiB each.
    let all = into_same(255);
    for head in 0..FLOOD {
        queue.ring().set_descriptor(head, all);
        queue.offer(head);
    }
    // The first was answered before.
    while queue.ring().used_index() < 2 {
        std::thread::yield_now();
    }
    let answered = queue.ring().used_index();
    let begin = Instant::now();
    let base = driver.control.stop(0).unwrap();
    expect_soon("the stop", begin);
    println!("{answered} answered, {base} taken");
    // Two are in flight at a time, and some are answered before the stop is heard.
    assert!(base < answered + 8, "{base} were taken");
    assert_eq!(driver.queues[0].ring().used_index(), base);
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
}
