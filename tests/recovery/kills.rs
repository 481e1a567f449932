//! `kill -9` under a load that verifies every byte: no request fails, none is lost, none is done twice.
//!
//! `VDI_TEST_ROUNDS` says how many kills; `ci/kill-loop` asks for many.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;
use vdi_tests::counts;
use vdi_tests::driver::{Base, Kept, Layout, Options, Request};
use vdi_tests::image::Image;
use vdi_tests::load::{DISK_SECTORS, Load, Mix, disk_after};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server, requests_started_again};
use vdi_tests::stop::StopOnDrop;
use vdi_tests::tool;

use crate::Place;

const QUEUES: usize = 2;

/// How the daemon is run, and how its front end comes back.
struct Setting {
    arguments: &'static [&'static str],
    base: Base,
}

const SETTINGS: [Setting; 4] = [
    Setting {
        arguments: &["--cache", "writeback"],
        base: Base::Used,
    },
    Setting {
        arguments: &["--cache", "direct"],
        base: Base::Available,
    },
    Setting {
        arguments: &["--workers", "1", "--cache", "direct"],
        base: Base::Used,
    },
    Setting {
        arguments: &["--engine", "sync"],
        base: Base::Available,
    },
];

/// What happened.
#[derive(Debug, Default)]
struct Count {
    kills: u64,
    /// Kills before the front end was attached again.
    early_kills: u64,
    /// Requests that were in flight and started again.
    recovered: u64,
}

fn kills() -> u64 {
    std::env::var("VDI_TEST_ROUNDS").map_or(6, |rounds| rounds.parse().expect("a number"))
}

#[test]
fn kill_9_under_load_loses_nothing() {
    let mut random = Random::printed();
    let rounds = kills();
    let (mut total, mut verified) = (Count::default(), 0);
    for setting in &SETTINGS {
        let image = Image::by_qemu(DISK_SECTORS * 512);
        let (count, loads) = run(&image, setting, rounds, &mut random);
        total.kills += count.kills;
        total.early_kills += count.early_kills;
        total.recovered += count.recovered;
        verified += loads.iter().map(|load| load.verified_bytes).sum::<u64>();
        let disk = disk_after(&loads);
        assert!(
            image.contents() == disk,
            "{:?}: the image differs",
            setting.arguments
        );
        verified += disk.len() as u64;
        expect_sound(image.path());
    }
    counts::tell(&format!(
        "kill -9 under a driver's load: {} kills, {} of them before the front end was back; {} requests started again, \
         {verified} bytes verified, 0 lost",
        total.kills, total.early_kills, total.recovered
    ));
    assert!(total.recovered > 0, "no kill met a request in flight");
}

/// Kills and replaces the daemon `rounds` times under load, and ends it well.
fn run(image: &Image, setting: &Setting, rounds: u64, random: &mut Random) -> (Count, Vec<Load>) {
    let place = Place::new();
    let launch = || {
        Launch::image_at(image.path(), &place.socket())
            .args(["--num-queues", &QUEUES.to_string()])
            .args(setting.arguments)
    };
    let mut server = launch().start();
    let options = Options::new().queues(QUEUES).queue_size(128).tracked();
    let mut driver = server.driver(&options);
    let kept = driver.keep(&options);
    let mut loads: Vec<_> = (0..QUEUES)
        .map(|_| Load::new(random.fork(), QUEUES, Mix::Everything))
        .collect();
    let mut count = Count::default();
    let stop = AtomicBool::new(false);
    let server = std::thread::scope(|scope| {
        let stop = &stop;
        let _stop = StopOnDrop::new(stop);
        for (queue, load) in driver.queues.iter_mut().zip(&mut loads) {
            scope.spawn(move || load.run(queue, || !stop.load(Ordering::Relaxed)));
        }
        while count.kills < rounds {
            std::thread::sleep(Duration::from_micros(random.within(0..60_000)));
            count.recovered += requests_started_again(&server.kill().log);
            count.kills += 1;
            if random.within(0..3) == 0 {
                count.kills += 1;
                count.early_kills += 1;
                let log = die_while_attaching(launch().start(), &kept, setting.base, random);
                count.recovered += requests_started_again(&log);
            }
            server = launch().start();
            driver.control = kept.reconnect(server.socket(), setting.base).unwrap();
        }
        server
    });
    // All is answered; now the disk as the driver sees it, then a clean end.
    count.recovered += requests_started_again(&server.log());
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    (count, loads)
}

/// Kills a daemon while the front end attaches; what it logged.
fn die_while_attaching(server: Server, kept: &Kept, base: Base, random: &mut Random) -> String {
    let socket = UnixStream::connect(server.socket()).unwrap();
    std::thread::scope(|scope| {
        // It may get through, and may not.
        let attaching = scope.spawn(move || kept.reconnect_on(socket, base).is_ok());
        std::thread::sleep(Duration::from_micros(random.within(0..8000)));
        let killed = server.kill();
        let _attached = attaching.join();
        killed.log
    })
}

/// Clean, or nothing worse than blocks that nobody uses.
fn expect_sound(image: &Path) {
    let check = tool::vdi(["check".as_ref(), image.as_os_str()]);
    assert!(matches!(check.code, Some(0 | 3)), "{check:#?}");
}

/// A stopped daemon is not dead: nothing is started again, nothing is lost.
#[test]
fn sigstop_and_sigcont_under_load_are_a_pause() {
    let mut random = Random::printed();
    let image = Image::by_qemu(DISK_SECTORS * 512);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new().tracked());
    let mut load = [Load::new(random.fork(), 1, Mix::Everything)];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = StopOnDrop::new(&stop);
        scope.spawn(|| load[0].run(&mut driver.queues[0], || !stop.load(Ordering::Relaxed)));
        for _ in 0..10 {
            std::thread::sleep(Duration::from_micros(random.within(0..40_000)));
            server.signal(Signal::SIGSTOP);
            std::thread::sleep(Duration::from_micros(random.within(0..40_000)));
            server.signal(Signal::SIGCONT);
        }
    });
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    assert!(image.contents() == disk_after(&load));
}

/// A front end that dies takes its requests with it, whole or not; the next one finds a disk that works.
#[test]
fn a_front_end_killed_under_load_is_replaced() {
    let mut random = Random::printed();
    let image = Image::by_qemu(DISK_SECTORS * 512);
    let server = Launch::image(image.path()).start();
    for _ in 0..10 {
        let mut driver = server.driver(&Options::new().tracked());
        let data = random.bytes(1 << 20);
        driver.write(40_000, &data);
        let requests: Vec<_> = (0..30)
            .map(|nth| Request::write(nth * 512, random.bytes(65_536)))
            .collect();
        let layout = Layout::framed();
        let _tokens = driver
            .queue()
            .submit_all(requests.iter().map(|request| (request, &layout)));
        std::thread::sleep(Duration::from_micros(random.within(0..3000)));
        let _memory = driver.vanish();
        let mut next = server.driver(&Options::new().tracked());
        assert!(
            next.read(40_000, 1 << 20) == data,
            "an answered write is gone"
        );
    }
    assert_eq!(server.terminate().code, Some(0));
    expect_sound(image.path());
}
