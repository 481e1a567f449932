//! Memory that a front end takes away while requests use it (R1): the message is answered when they are, and after that nothing
//! reaches the memory any more.

use std::time::{Duration, Instant};

use vdi_tests::driver::{Layout, Options, PATIENCE, Region, Request, Token, UNTOUCHED};
use vdi_tests::image::{Image, MIB};
use vdi_tests::recorded::{Effect, Kind, Rule};
use vdi_tests::server::Launch;
use vhost::vhost_user::message::VhostUserVirtioFeatures;

use crate::scene::{BLOCK, MODES, Scene};

/// What comes and goes.
const PLUGGED: Region = Region::new(1 << 32, 32 * MIB);
/// Requests, each of a block of its own.
const COUNT: u64 = 8;
const LEN: u32 = 65536;

/// How the memory is taken away.
#[derive(Debug, Clone, Copy)]
enum Message {
    Remove,
    ReplaceTable,
}

fn fill(block: u64) -> u8 {
    u8::try_from(block + 1).unwrap()
}

/// Writes to new blocks, which wait for room that is slow to come; their data are at `place` in the guest's memory, or anywhere.
fn writes_that_wait(scene: &mut Scene, place: Option<u64>) -> Vec<(Request, Layout)> {
    let slow = |kind| Rule::all(kind, Effect::Slow(Duration::from_millis(200)));
    let rules = [Kind::Truncate, Kind::Sync].map(|kind| scene.files.add(slow(kind).times(2)));
    let requests = (0..COUNT).map(|block| {
        let request = Request::write(block * BLOCK, vec![fill(block); LEN as usize]);
        let layout = Layout::framed();
        let at = place.map(|place| place + block * u64::from(LEN));
        (
            request,
            at.map_or(layout, |at| Layout::framed().largest_at(at)),
        )
    });
    let requests: Vec<_> = requests.collect();
    let queue = &mut scene.driver.queues[0];
    let _tokens = queue.submit_all(requests.iter().map(|(request, layout)| (request, layout)));
    let start = Instant::now();
    while rules.iter().all(|rule| scene.files.hits(*rule) == 0) {
        assert!(start.elapsed() < PATIENCE, "nobody makes room");
        std::thread::yield_now();
    }
    assert_eq!(queue.ring().used_index(), 0);
    requests
}

/// Takes memory away from writes that wait.
fn take_away_from_writes(scene: &mut Scene, message: Message) {
    let memory = scene.driver.memory.clone();
    let without = memory.messages();
    memory.add(PLUGGED);
    let plugged = memory.message(PLUGGED);
    scene.driver.control.add_region(&plugged).unwrap();
    let requests = writes_that_wait(scene, Some(PLUGGED.at));
    let (queue, control) = (&mut scene.driver.queues[0], &mut scene.driver.control);
    match message {
        Message::Remove => control.remove_region(&plugged).unwrap(),
        Message::ReplaceTable => control.set_memory(&without).unwrap(),
    }
    // Nothing is waited for any more.
    let answered = queue.answered();
    assert_eq!(
        answered.len(),
        requests.len(),
        "it was taken away too early"
    );
    for (_, answer) in answered {
        let _none = answer.expect_ok();
    }
    let gone = queue.run(&Request::read(0, LEN), &requests[0].1);
    assert_eq!((gone.status, gone.data[0]), (1, UNTOUCHED));
    memory.remove(PLUGGED);
}

#[test]
fn memory_that_is_taken_away_serves_what_is_in_flight_until_that_is_answered() {
    for mode in MODES {
        for message in [Message::Remove, Message::ReplaceTable] {
            println!("{message:?}");
            let mut scene = Scene::new(mode);
            take_away_from_writes(&mut scene, message);
            for block in 0..COUNT {
                let data = scene.driver.read(block * BLOCK, LEN);
                assert!(data == [fill(block); LEN as usize]);
            }
            let exit = scene.server.terminate();
            assert_eq!(exit.code, Some(0), "{}", exit.log);
        }
    }
}

/// D2: a request is marked whole, or over before there is anything to mark.
#[test]
fn a_migration_begins_and_ends_when_what_is_in_flight_is_answered() {
    for mode in MODES {
        let mut scene = Scene::new(mode);
        let log = tempfile::tempfile().unwrap();
        let regions = scene.driver.memory.messages().into_iter();
        let end = regions.map(|region| region.guest_phys_addr + region.memory_size);
        let log_bytes = end.max().unwrap() / 4096 / 8;
        log.set_len(log_bytes).unwrap();
        scene.driver.control.set_log(&log, log_bytes).unwrap();
        let usual = scene.driver.control.features();
        let requests = writes_that_wait(&mut scene, None);
        let logged = usual | VhostUserVirtioFeatures::LOG_ALL.bits();
        scene.driver.control.accept(logged).unwrap();
        let answered = scene.driver.queues[0].answered();
        assert_eq!(answered.len(), requests.len(), "the log came too early");
        let exit = scene.server.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
    }
}

#[test]
fn nothing_that_storage_still_reads_reaches_memory_that_was_taken_away() {
    let image = Image::by_qemu(32 * MIB);
    let server = Launch::image(image.path())
        .args(["--cache", "direct"])
        .start();
    let mut driver = server.driver(&Options::new());
    for block in 0..32 {
        driver.write(block * BLOCK, &[fill(block); 1 << 20]);
    }
    let memory = driver.memory.clone();
    for _ in 0..10 {
        memory.add(PLUGGED);
        let plugged = memory.message(PLUGGED);
        driver.control.add_region(&plugged).unwrap();
        let requests = (0..31).map(|block| {
            let there = PLUGGED.at + block * MIB;
            let layout = Layout::framed().largest_at(there);
            (Request::read(block * BLOCK, 1 << 20), layout)
        });
        let requests: Vec<_> = requests.collect();
        let queue = &mut driver.queues[0];
        let tokens: Vec<Token> =
            queue.submit_all(requests.iter().map(|(request, layout)| (request, layout)));
        driver.control.remove_region(&plugged).unwrap();
        let len = usize::try_from(PLUGGED.len_bytes).unwrap();
        let then = memory.read(PLUGGED.at, len);
        std::thread::sleep(Duration::from_millis(20));
        assert!(memory.read(PLUGGED.at, len) == then, "data came later");
        for (block, token) in (0..31).zip(tokens) {
            // Those that were taken afterwards found no memory.
            let answer = queue.wait(token);
            let byte = if answer.status == 0 {
                fill(block)
            } else {
                UNTOUCHED
            };
            assert!(answer.data.iter().all(|found| *found == byte));
        }
        memory.remove(PLUGGED);
    }
    let exit = server.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
}
