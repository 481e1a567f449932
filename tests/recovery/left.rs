//! What a dead daemon left in flight, and a front end that ends a ring before the next daemon has started all of it again: it may
//! throw the record of it away then, so the ring ends when all is answered.

use vdi_tests::driver::{Base, Control, Driver, Kept, Layout, Options, Request, Token};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, Server};

use crate::Place;

const SIZE: u16 = 1024;
/// What is left: many times what a daemon starts in one go.
const COUNT: u16 = 1000;
const DATA: [u8; 4096] = [7; 4096];

/// A front end whose daemon died, and the next daemon.
struct Scene {
    driver: Driver,
    kept: Kept,
    options: Options,
    tokens: Vec<Token>,
    server: Server,
    _place: Place,
    _image: Image,
}

fn scene() -> Scene {
    let (place, image) = (Place::new(), Image::by_qemu(16 * MIB));
    let launch = || Launch::image_at(image.path(), &place.socket());
    let server = launch().start();
    let options = Options::new().queue_size(SIZE).tracked();
    let mut driver = server.driver(&options);
    driver.write(0, &DATA);
    driver.control.stop(0).unwrap();
    let kept = driver.keep(&options);
    let queue = &mut driver.queues[0];
    let first = queue.available_index();
    let request = Request::read(0, 4096);
    let layout = Layout::framed().indirect();
    let tokens = (0..COUNT).map(|_| queue.submit(&request, &layout));
    let tokens = tokens.collect();
    let region = driver.inflight.as_ref().unwrap();
    let mut part = region.queue(0);
    let available = queue.ring().addresses()[1];
    for nth in 0..COUNT {
        let slot = u64::from(first.wrapping_add(nth) % SIZE);
        let head = queue.memory().load_u16(available + 4 + 2 * slot);
        let state = &mut part.states[usize::from(head)];
        (state.0, state.2) = (1, u64::from(nth));
    }
    region.set_queue(0, &part);
    assert_eq!(server.kill().signal, Some(9));
    let server = launch().start();
    Scene {
        driver,
        kept,
        options,
        tokens,
        server,
        _place: place,
        _image: image,
    }
}

impl Scene {
    /// How many requests the record has in flight.
    fn recorded(&self) -> usize {
        let part = self.driver.inflight.as_ref().unwrap().queue(0);
        part.states.iter().filter(|state| state.0 != 0).count()
    }

    /// That all are answered by now, and well.
    fn expect_answers(&mut self) {
        let answers = self.driver.queue().answered();
        let tokens: Vec<_> = answers.iter().map(|(token, _)| *token).collect();
        assert_eq!(tokens, self.tokens);
        for (_, answer) in answers {
            assert!(answer.expect_ok() == DATA);
        }
        assert_eq!(self.recorded(), 0);
    }
}

#[test]
fn a_ring_ends_when_all_that_a_dead_daemon_left_is_answered() {
    // QEMU disables rings before it stops them.
    for disable in [true, false] {
        let mut scene = scene();
        let control = scene.kept.reconnect(scene.server.socket(), Base::Used);
        let mut control = control.unwrap();
        if disable {
            control.enable(0, false).unwrap();
            scene.expect_answers();
            let _base = control.stop(0).unwrap();
        } else {
            let _base = control.stop(0).unwrap();
            scene.expect_answers();
        }
    }
}

#[test]
fn a_ring_that_is_never_enabled_leaves_what_a_dead_daemon_left_to_the_next() {
    let mut scene = scene();
    let mut control = Control::connect(scene.server.socket(), scene.options.wanted).unwrap();
    let region = scene.driver.inflight.as_ref().unwrap();
    control.set_inflight(region).unwrap();
    control.set_memory(&scene.driver.memory.messages()).unwrap();
    let ring = scene.driver.queue().attachment();
    control.attach_disabled(&ring, ring.used_index()).unwrap();
    let _base = control.stop(0).unwrap();
    assert!(scene.driver.queue().answered().is_empty());
    assert_eq!(scene.recorded(), usize::from(COUNT));
    drop(control);
    let control = scene.kept.reconnect(scene.server.socket(), Base::Used);
    let _base = control.unwrap().stop(0).unwrap();
    scene.expect_answers();
}
