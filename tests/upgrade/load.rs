//! Upgrades under load.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vdi_tests::counts;
use vdi_tests::driver::{Base, Options};
use vdi_tests::load::{Load, Mix, disk_after};
use vdi_tests::random::Random;
use vdi_tests::stop::StopOnDrop;
use vdi_tests::{qemu, tool, words};

use crate::fleet::Fleet;

const QUEUES: usize = 2;

/// Each time another way for the front end to come back, and with requests that are tracked or not: the old daemon leaves none.
#[test]
fn one_upgrade_after_the_other_under_load_fails_no_request_and_loses_none() {
    let rounds = std::env::var("VDI_TEST_ROUNDS").map_or(6, |rounds| rounds.parse().unwrap());
    let mut random = Random::printed();
    let mut fleet = Fleet::start();
    let options = Options::new().queues(QUEUES).tracked();
    let mut driver = fleet.driver("a", &options);
    let kept = driver.keep(&options);
    let mut loads: Vec<_> = (0..QUEUES)
        .map(|_| Load::new(random.fork(), QUEUES, Mix::Everything))
        .collect();
    let stop = AtomicBool::new(false);
    let pauses = std::thread::scope(|scope| {
        let stop = &stop;
        let _stop = StopOnDrop::new(stop);
        let running: Vec<_> = driver
            .queues
            .iter_mut()
            .zip(&mut loads)
            .map(|(queue, load)| {
                scope.spawn(move || {
                    let (mut longest, mut last) = (Duration::ZERO, Instant::now());
                    load.run(queue, || {
                        longest = longest.max(last.elapsed());
                        last = Instant::now();
                        !stop.load(Ordering::Relaxed)
                    });
                    longest
                })
            })
            .collect();
        for nth in 0..rounds {
            std::thread::sleep(Duration::from_micros(random.within(20_000..120_000)));
            let old = fleet.upgrade();
            assert!(old.log.contains("another daemon has the disks now"));
            assert!(!old.log.contains("WARN"), "{}", old.log);
            let base = [Base::Used, Base::Available][nth % 2];
            driver.control = kept.reconnect(&fleet.path("sockets/a.sock"), base).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        running
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .max()
    });
    let answered: u64 = loads.iter().map(|load| load.answered).sum();
    counts::tell(&format!(
        "upgrades under a driver's load: {rounds}, {answered} requests answered, none failed, the longest pause {:?}",
        pauses.unwrap()
    ));
    drop(driver);
    let place = fleet.end();
    let image = place.path().join("a.vdi");
    let raw = place.path().join("raw");
    tool::vdi(words!["convert", "-O", "raw", image, raw]).expect_code(0);
    assert!(std::fs::read(&raw).unwrap() == disk_after(&loads));
    // Not even a leak: the last one knows what the others left.
    qemu::expect_clean(&image);
}
