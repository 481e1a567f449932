//! The dirty log of a migration: whatever the device writes of the guest's memory is marked.
//!
//! What changed is found by comparing all of the guest's memory before and after, so nothing is known here of what the
//! device writes where.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use vdi_tests::driver::{Driver, Layout, Options, PATIENCE, Queue, Region, Request};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::Launch;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

const DISK: u64 = 16 * MIB;
const MEMORY: u64 = 32 * MIB;
const PAGE: u64 = 4096;
const LOG_BYTES: u64 = MEMORY / PAGE / 8;

/// Accepts LOG_ALL with a log of its own.
fn switch_on(driver: &mut Driver) -> File {
    let log = tempfile::tempfile().unwrap();
    log.set_len(LOG_BYTES).unwrap();
    driver.control.set_log(&log, LOG_BYTES).unwrap();
    let all = driver.control.features() | VhostUserVirtioFeatures::LOG_ALL.bits();
    driver.control.accept(all).unwrap();
    // QEMU says again where the rings are, with the flag that asks for their log.
    let rings: Vec<_> = driver.queues.iter().map(Queue::attachment).collect();
    for ring in &rings {
        driver.control.set_addresses(ring).unwrap();
    }
    log
}

fn switch_off(driver: &mut Driver) {
    let usual = driver.control.features() & !VhostUserVirtioFeatures::LOG_ALL.bits();
    driver.control.accept(usual).unwrap();
}

fn enable(driver: &mut Driver, enabled: bool) {
    for index in 0..driver.queues.len() {
        driver.control.enable(index, enabled).unwrap();
    }
}

/// Has the device do these requests on every queue; the pages that changed meanwhile. The driver does nothing
/// meanwhile, so all of that is the device's.
fn changed_by(driver: &mut Driver, requests: &[(Request, Layout)]) -> Vec<u64> {
    enable(driver, false);
    let mut until = Vec::new();
    for queue in &mut driver.queues {
        for (request, layout) in requests {
            let _token = queue.submit(request, layout);
        }
        until.push(queue.available_index());
    }
    let all = usize::try_from(MEMORY).unwrap();
    let before = driver.memory.read(0, all);
    enable(driver, true);
    let deadline = Instant::now() + PATIENCE;
    for (queue, until) in driver.queues.iter().zip(until) {
        while queue.ring().used_index() != until {
            assert!(Instant::now() < deadline, "no answer");
        }
    }
    // Nothing is in flight, and nothing is written any more.
    enable(driver, false);
    let after = driver.memory.read(0, all);
    enable(driver, true);
    let pages = before.chunks(4096).zip(after.chunks(4096));
    (0..)
        .zip(pages)
        .filter(|(_, (a, b))| a != b)
        .map(|(page, _)| page)
        .collect()
}

fn marked(log: &File) -> Vec<u64> {
    let mut bits = vec![0; usize::try_from(LOG_BYTES).unwrap()];
    log.read_exact_at(&mut bits, 0).unwrap();
    let is_marked = |page: &u64| bits[usize::try_from(page / 8).unwrap()] >> (page % 8) & 1 == 1;
    (0..MEMORY / PAGE).filter(is_marked).collect()
}

fn options(queues: usize) -> Options {
    let mut options = Options::new()
        .queues(queues)
        .queue_size(256)
        .memory(vec![Region::new(0, MEMORY)]);
    options.wanted.protocol |= VhostUserProtocolFeatures::LOG_SHMFD;
    options
}

#[test]
fn data_status_and_used_ring_are_marked_while_the_log_is_on_and_nothing_else() {
    let image = Image::by_qemu(DISK);
    for engine in ["io-uring", "sync"] {
        let server = Launch::image(image.path())
            .args(["--num-queues", "2", "--engine", engine])
            .start();
        let mut driver = server.driver(&options(2));
        driver.write(0, &vec![0x77; 1 << 20]);
        // Data, nothing, an id, a request that does not exist, a status alone.
        let requests = [
            (Request::read(0, 300 << 10), Layout::data_every(8192)),
            (Request::read(16_384, 64 << 10), Layout::framed().indirect()),
            (Request::get_id(), Layout::framed()),
            (Request::of_kind(77), Layout::framed()),
            // Refused: 32 pages that nobody writes.
            (Request::read(DISK / 512, 128 << 10), Layout::framed()),
            (Request::write(2048, vec![3; 4096]), Layout::whole()),
            (Request::flush(), Layout::framed()),
        ];
        let log = switch_on(&mut driver);
        let changed = changed_by(&mut driver, &requests);
        assert!(
            changed.len() >= 2 * 364 / 4,
            "only {} pages changed",
            changed.len()
        );
        let found = marked(&log);
        let missed: Vec<_> = changed
            .iter()
            .filter(|page| !found.contains(page))
            .collect();
        assert!(
            missed.is_empty(),
            "pages {missed:?} changed and are not marked, {engine}"
        );
        // A few pages may hold buffers in part, or be marked for a used ring that changed in another page.
        let more = found.len() - changed.len();
        assert!(
            more < 20,
            "{more} pages are marked and did not change, {engine}"
        );

        log.write_all_at(&[0; 1024], 0).unwrap();
        switch_off(&mut driver);
        assert!(!changed_by(&mut driver, &requests).is_empty());
        assert!(marked(&log).is_empty(), "the log is off");

        // Another log, as some front ends give in every round.
        let log = switch_on(&mut driver);
        let changed = changed_by(&mut driver, &requests[..1]);
        let found = marked(&log);
        assert!(changed.iter().all(|page| found.contains(page)), "{engine}");

        // Another one while the first is in use, as when memory came meanwhile.
        log.write_all_at(&[0; 1024], 0).unwrap();
        let next = tempfile::tempfile().unwrap();
        next.set_len(LOG_BYTES).unwrap();
        driver.control.set_log(&next, LOG_BYTES).unwrap();
        let changed = changed_by(&mut driver, &requests[..1]);
        let found = marked(&next);
        assert!(changed.iter().all(|page| found.contains(page)), "{engine}");
        assert!(marked(&log).is_empty(), "the first log is not in use");
        assert_eq!(server.terminate().code, Some(0));
    }
}

#[test]
fn a_log_is_forgotten_with_its_front_end() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&options(1));
    let log = switch_on(&mut driver);
    drop(driver);
    // The next one wants writes to be marked, and says nowhere where.
    let mut driver = server.driver(&options(1));
    let all = driver.control.features() | VhostUserVirtioFeatures::LOG_ALL.bits();
    driver.control.accept(all).unwrap();
    log.write_all_at(&[0; 1024], 0).unwrap();
    assert_eq!(driver.read(0, 512), [0; 512]);
    assert!(marked(&log).is_empty());
}

#[test]
fn a_log_that_does_not_cover_the_memory_is_refused() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&options(1));
    let log = tempfile::tempfile().unwrap();
    log.set_len(LOG_BYTES).unwrap();
    assert!(driver.control.set_log(&log, LOG_BYTES - 1).is_err());
    let mut driver = server.driver(&options(1));
    assert!(
        driver.control.set_log(&log, LOG_BYTES + 1).is_err(),
        "it is longer than its file"
    );
    let mut driver = server.driver(&options(1));
    driver.write(0, &[1; 512]);
}
