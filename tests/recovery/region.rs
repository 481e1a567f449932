//! What is recorded in the in-flight region, as the next daemon reads it. The dead daemon is played by the test: it
//! writes the region and the used ring up to any point between two stores.
//!
//! Source: vhost-user protocol, "Inflight I/O tracking".

use std::time::{Duration, Instant};

use vdi_tests::driver::{
    Base, Driver, Inflight, InflightQueue, Kept, Layout, Options, PATIENCE, Queue, Request, Token,
};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, Server};

use crate::Place;

const DISK: u64 = 16 * MIB;
const SIZE: u16 = 64;
/// Requests that the driver submits.
const SUBMITTED: u16 = 12;
/// Those the dead daemon had taken.
const TAKEN: u16 = 7;
/// Those it had answered, in this order; the last one is being answered when it dies.
const ANSWERED: [u16; 3] = [4, 0, 5];

/// How far the last answer had come when the daemon died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    BeforeTheAnswer,
    Linked,
    InTheUsedRing,
    Cleared,
    AfterTheAnswer,
}

const DEATHS: [Death; 5] = [
    Death::BeforeTheAnswer,
    Death::Linked,
    Death::InTheUsedRing,
    Death::Cleared,
    Death::AfterTheAnswer,
];

/// A front end whose daemon is dead, and requests that nobody has taken yet.
struct Scene {
    place: Place,
    image: Image,
    driver: Driver,
    kept: Kept,
    tokens: Vec<Token>,
    heads: Vec<u16>,
}

impl Scene {
    fn launch(&self) -> Launch {
        // One thing after the other, so that the order of answers is the order of starts.
        Launch::image_at(self.image.path(), &self.place.socket()).args(["--engine", "sync"])
    }
}

/// A ring that has come to `start` already.
fn scene(start: u16) -> (Scene, Server) {
    let (place, image) = (Place::new(), Image::by_qemu(DISK));
    let server = Launch::image_at(image.path(), &place.socket()).start();
    let options = Options::new().queue_size(SIZE).tracked();
    let mut driver = server.driver(&options);
    for nth in 0..SUBMITTED {
        driver.write(u64::from(nth), &pattern(nth));
    }
    driver.control.stop(0).unwrap();
    driver.queue().continue_at(start);
    let kept = driver.keep(&options);
    let region = driver.inflight.as_ref().unwrap();
    let used_idx = InflightQueue {
        used_idx: start,
        ..region.queue(0)
    };
    region.set_queue(0, &used_idx);
    let first = driver.queue().available_index();
    let submit = |nth: u16| {
        // Reads wait for nothing, so they are answered in the order in which they are started.
        let request = Request::read(u64::from(nth), 512);
        driver.queue().submit(&request, &Layout::framed())
    };
    let tokens: Vec<_> = (0..SUBMITTED).map(submit).collect();
    let queue = driver.queue();
    let available = queue.ring().addresses()[1];
    let head = |nth: u16| {
        let slot = u64::from(first.wrapping_add(nth) % SIZE);
        queue.memory().load_u16(available + 4 + 2 * slot)
    };
    let heads = (0..SUBMITTED).map(head).collect();
    let scene = Scene {
        place,
        image,
        driver,
        kept,
        tokens,
        heads,
    };
    (scene, server)
}

impl Scene {
    fn region(&self) -> &Inflight {
        self.driver.inflight.as_ref().unwrap()
    }

    /// Leaves what a daemon leaves that dies `death`; whether the last answer is out.
    fn die(&mut self, death: Death) -> bool {
        let mut part = self.region().queue(0);
        for nth in 0..TAKEN {
            let state = &mut part.states[usize::from(self.heads[usize::from(nth)])];
            (state.0, state.2) = (1, 1000 + u64::from(nth));
        }
        let (last, before) = ANSWERED.split_last().unwrap();
        for nth in before {
            self.answer(&mut part, *nth, Death::AfterTheAnswer);
        }
        self.answer(&mut part, *last, death);
        self.region().set_queue(0, &part);
        matches!(
            death,
            Death::InTheUsedRing | Death::Cleared | Death::AfterTheAnswer
        )
    }

    fn answer(&mut self, part: &mut InflightQueue, nth: u16, until: Death) {
        let head = self.heads[usize::from(nth)];
        let at = DEATHS.iter().position(|death| *death == until).unwrap();
        let done = |step: Death| DEATHS.iter().position(|death| *death == step).unwrap() <= at;
        if done(Death::Linked) {
            part.states[usize::from(head)].1 = part.last_batch_head;
            part.last_batch_head = head;
        }
        if done(Death::InTheUsedRing) {
            put_into_used_ring(self.driver.queue(), &[head]);
        }
        if done(Death::Cleared) {
            part.states[usize::from(head)].0 = 0;
        }
        if done(Death::AfterTheAnswer) {
            part.used_idx = self.driver.queue().ring().used_index();
        }
    }

    /// What comes back from the next daemon, in order, without what `answered` says had come before.
    fn answers(&mut self, answered: &[u16]) -> Vec<u16> {
        let queue = self.driver.queue();
        let mut order = Vec::new();
        let mut left = SUBMITTED;
        while left > 0 {
            let before = queue.used_index();
            let Some((token, answer)) = queue.wait_any_within(PATIENCE) else {
                panic!("{left} of {SUBMITTED} requests have no answer; the used index is {before}");
            };
            let nth = self.tokens.iter().position(|known| *known == token);
            let nth = u16::try_from(nth.unwrap()).unwrap();
            if !answered.contains(&nth) {
                assert!(answer.expect_ok() == pattern(nth), "request {nth}");
                order.push(nth);
            }
            left -= 1;
        }
        order
    }
}

/// What the disk has in a sector.
fn pattern(nth: u16) -> Vec<u8> {
    vec![u8::try_from(nth).unwrap() + 1; 512]
}

/// Plays the end of an answer; its status byte is nobody's business here.
fn put_into_used_ring(queue: &Queue, heads: &[u16]) {
    let memory = queue.memory();
    let used = queue.ring().addresses()[2];
    let index = queue.ring().used_index();
    for (nth, head) in (0..).zip(heads) {
        let slot = u64::from(index.wrapping_add(nth) % SIZE);
        let mut element = u32::from(*head).to_le_bytes().to_vec();
        element.extend(1_u32.to_le_bytes());
        memory.write(used + 4 + 8 * slot, &element);
    }
    let count = u16::try_from(heads.len()).unwrap();
    memory.store_u16(used + 2, index.wrapping_add(count));
}

/// The order in which the used ring has the requests from `first` on.
fn used_order(scene: &Scene, first: u16, count: u16) -> Vec<u16> {
    let queue = &scene.driver.queues[0];
    let nth_of = |head: u16| scene.heads.iter().position(|known| *known == head).unwrap();
    (0..count)
        .map(|nth| {
            let used = queue.ring().used(first.wrapping_add(nth));
            u16::try_from(nth_of(u16::try_from(used.head).unwrap())).unwrap()
        })
        .collect()
}

#[test]
fn what_was_in_flight_is_answered_once_in_its_order_and_before_anything_new() {
    for start in [0, 5, 65_530] {
        for death in DEATHS {
            for base in [Base::Used, Base::Available] {
                let (mut scene, server) = scene(start);
                let out = scene.die(death);
                assert_eq!(server.kill().signal, Some(9));
                let server = scene.launch().start();
                let _control = scene.kept.reconnect(server.socket(), base).unwrap();
                let answered = if out { &ANSWERED[..] } else { &ANSWERED[..2] };
                let mut came = scene.answers(answered);
                came.sort_unstable();
                let expected: Vec<u16> = (0..SUBMITTED).filter(|n| !answered.contains(n)).collect();
                assert_eq!(came, expected, "{death:?}, {base:?}");
                let first = start.wrapping_add(u16::try_from(answered.len()).unwrap());
                let order = used_order(&scene, first, u16::try_from(expected.len()).unwrap());
                assert_eq!(order, expected, "{death:?}, {base:?}, start {start}");
                assert_eq!(server.terminate().code, Some(0));
            }
        }
    }
}

/// Another back end may answer many at once, and link them all before.
#[test]
fn a_batch_that_reached_the_used_ring_is_not_started_again() {
    let (mut scene, server) = scene(3);
    let mut part = scene.region().queue(0);
    for nth in 0..TAKEN {
        let state = &mut part.states[usize::from(scene.heads[usize::from(nth)])];
        (state.0, state.2) = (1, u64::from(nth));
    }
    let batch: Vec<u16> = [1, 3, 6].map(|nth: usize| scene.heads[nth]).to_vec();
    for head in &batch {
        part.states[usize::from(*head)].1 = part.last_batch_head;
        part.last_batch_head = *head;
    }
    put_into_used_ring(scene.driver.queue(), &batch);
    scene.region().set_queue(0, &part);
    assert_eq!(server.kill().signal, Some(9));
    let server = scene.launch().start();
    let _control = scene.kept.reconnect(server.socket(), Base::Used).unwrap();
    let mut came = scene.answers(&[1, 3, 6]);
    came.sort_unstable();
    assert_eq!(came, [0, 2, 4, 5, 7, 8, 9, 10, 11]);
    server.expect_log("4 requests were in flight");
}

#[test]
fn a_region_about_another_ring_is_ignored() {
    let (mut scene, server) = scene(100);
    let mut part = scene.region().queue(0);
    part.used_idx = 20_000;
    part.states[3].0 = 1;
    scene.region().set_queue(0, &part);
    assert_eq!(server.kill().signal, Some(9));
    let server = scene.launch().start();
    let _control = scene.kept.reconnect(server.socket(), Base::Used).unwrap();
    assert_eq!(scene.answers(&[]).len(), usize::from(SUBMITTED));
    server.expect_log("about another ring");
}

#[test]
fn a_running_daemon_records_what_it_takes_and_clears_what_it_answers() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let options = Options::new().queues(2).queue_size(SIZE).tracked();
    let mut driver = server.driver(&options);
    for nth in 0..5 {
        driver.queues[1].write(nth, &[7; 512]);
    }
    let region = driver.inflight.as_ref().unwrap();
    let (idle, used) = (region.queue(0), region.queue(1));
    assert_eq!((idle.version, idle.desc_num, idle.used_idx), (1, SIZE, 0));
    assert_eq!((used.version, used.desc_num, used.used_idx), (1, SIZE, 5));
    assert!(used.states.iter().all(|state| state.0 == 0));
    assert!(
        used.states.iter().any(|state| state.2 == 5),
        "five came, counted from 1"
    );
    assert_eq!(region.message.mmap_offset, 0);
    assert_eq!(
        (region.message.num_queues, region.message.queue_size),
        (2, SIZE)
    );

    assert!(
        (0..50).any(|round| is_seen_in_flight(&mut driver, round)),
        "nothing was ever seen in flight"
    );
    assert_eq!(server.terminate().code, Some(0));
}

/// Whether a flush with much to do shows in the region before it is answered. Afterwards it must not.
fn is_seen_in_flight(driver: &mut Driver, round: u8) -> bool {
    driver.queues[1].write(0, &vec![round; 8 << 20]);
    let token = driver.queues[1].submit(&Request::flush(), &Layout::framed());
    let in_flight = |driver: &Driver| {
        let part = driver.inflight.as_ref().unwrap().queue(1);
        part.states.iter().any(|state| state.0 == 1)
    };
    let mut seen = false;
    loop {
        seen |= in_flight(driver);
        if let Some(answer) = driver.queues[1].wait_within(token, Duration::ZERO) {
            let _empty = answer.expect_ok();
            break;
        }
    }
    // The call comes after the record is cleared; the used index, at which this driver looks too, a moment before.
    let deadline = Instant::now() + PATIENCE;
    while in_flight(driver) {
        assert!(
            Instant::now() < deadline,
            "an answered request stays in flight"
        );
    }
    seen
}

type Lie = (&'static str, fn(&mut Inflight));

/// What a front end may send instead of the region that it was given, and what the daemon says.
const LIES: [Lie; 8] = [
    ("cannot be mapped", |region| {
        region.file.set_len(0).unwrap_or_else(|_| {
            // Ours cannot be cut; another file can.
            region.file = tempfile::tempfile().unwrap();
        });
    }),
    ("but its queues need", |region| {
        region.message.mmap_size = 64;
    }),
    ("no multiple of 64", |region| region.message.mmap_offset = 8),
    ("there are at most", |region| {
        region.message.num_queues = 300;
    }),
    ("there are at most", |region| {
        region.message.queue_size = 32_768;
    }),
    ("has version 77", |region| {
        let part = region.queue(0);
        region.set_queue(
            0,
            &InflightQueue {
                version: 77,
                ..part
            },
        );
    }),
    ("but its front end says", |region| {
        let part = region.queue(0);
        region.set_queue(
            0,
            &InflightQueue {
                desc_num: 9,
                ..part
            },
        );
    }),
    ("names descriptor 500", |region| {
        let part = region.queue(0);
        let used_idx = part.used_idx.wrapping_sub(1);
        region.set_queue(
            0,
            &InflightQueue {
                used_idx,
                last_batch_head: 500,
                ..part
            },
        );
    }),
];

#[test]
fn a_region_that_lies_is_refused_and_the_next_front_end_is_served() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let options = Options::new().queue_size(SIZE).tracked();
    for (said, lie) in LIES {
        let mut driver = server.driver(&options);
        driver.write(0, &[1; 512]);
        driver.control.stop(0).unwrap();
        let mut kept = driver.keep(&options);
        lie(kept.inflight_mut().unwrap());
        drop(driver.control);
        assert!(
            kept.reconnect(server.socket(), Base::Used).is_err(),
            "{said}"
        );
        server.expect_log(said);
    }
    let mut driver = server.driver(&options);
    driver.write(0, &[1; 512]);
}

#[test]
fn a_ring_larger_than_what_is_tracked_does_not_start() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let options = Options::new().queue_size(SIZE).tracked();
    let driver = server.driver(&options);
    let mut kept = driver.keep(&options);
    let region = {
        let mut control = driver.control;
        control.stop(0).unwrap();
        control.get_inflight(1, SIZE / 2).unwrap()
    };
    *kept.inflight_mut().unwrap() = region;
    assert!(kept.reconnect(server.socket(), Base::Used).is_err());
    server.expect_log("was set up for 32");
}

#[test]
fn a_region_for_a_running_ring_is_refused() {
    let image = Image::by_qemu(DISK);
    let server = Launch::image(image.path()).start();
    let options = Options::new().queue_size(SIZE).tracked();
    let mut driver = server.driver(&options);
    let region = driver.inflight.take().unwrap();
    assert!(driver.control.set_inflight(&region).is_err());
    server.expect_log("queue 0 is running");
}
