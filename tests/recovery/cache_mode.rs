//! What the guest chose for `writeback` outlives the daemon, and is never taken for less than it was (P2).

use vdi_tests::driver::{Base, Driver, Kept, Options, feature};
use vdi_tests::image::{Image, MIB};
use vdi_tests::page_cache::leave_unwritten;
use vdi_tests::server::{Launch, Server};

use crate::Place;

const DISK: u64 = 16 * MIB;

/// A guest that has used its disk already.
struct Scene {
    place: Place,
    image: Image,
    driver: Driver,
    kept: Kept,
    server: Option<Server>,
}

impl Scene {
    fn new(options: &Options) -> Self {
        let (place, image) = (Place::new(), Image::by_qemu(DISK));
        let server = Launch::image_at(image.path(), &place.socket()).start();
        let mut driver = server.driver(options);
        driver.write(0, &[1; 512]);
        let kept = driver.keep(options);
        Self {
            place,
            image,
            driver,
            kept,
            server: Some(server),
        }
    }

    /// Kills the daemon and starts another one.
    fn replace(&mut self) {
        let killed = self.server.take().unwrap().kill();
        assert_eq!(killed.signal, Some(9));
        let server = Launch::image_at(self.image.path(), &self.place.socket()).start();
        self.driver.control = self.kept.reconnect(server.socket(), Base::Used).unwrap();
        self.server = Some(server);
    }

    fn is_durable_at_once(&mut self) -> bool {
        self.driver.flush();
        let write = || self.driver.write(MIB / 512, &[5; 65_536]);
        !leave_unwritten(self.image.path(), 0, write)
    }

    fn writeback(&mut self) -> u8 {
        self.driver.config().unwrap().writeback
    }

    fn doubts(&self) -> bool {
        let log = self.server.as_ref().unwrap().log();
        log.contains("its cache mode is not known")
    }
}

#[test]
fn a_choice_to_write_through_holds_for_the_next_daemon() {
    let mut scene = Scene::new(&Options::new().tracked());
    scene.driver.set_writeback(false).unwrap();
    scene.replace();
    assert_eq!(scene.writeback(), 0);
    assert!(scene.is_durable_at_once());
    // And for the one after that, until the guest chooses anew.
    scene.replace();
    assert!(scene.is_durable_at_once());
    scene.driver.set_writeback(true).unwrap();
    assert!(!scene.is_durable_at_once());
    scene.replace();
    assert_eq!(scene.writeback(), 1);
    assert!(!scene.is_durable_at_once());
    assert!(!scene.doubts());
}

#[test]
fn no_choice_stays_no_choice() {
    let mut scene = Scene::new(&Options::new().tracked());
    scene.replace();
    assert_eq!(scene.writeback(), 1);
    assert!(!scene.is_durable_at_once());
    assert!(!scene.doubts());
}

#[test]
fn without_a_record_a_guest_that_runs_already_gets_write_through_until_it_chooses() {
    let mut scene = Scene::new(&Options::new());
    assert!(!scene.is_durable_at_once());
    scene.replace();
    assert_eq!(scene.writeback(), 0);
    assert!(scene.is_durable_at_once());
    assert!(scene.doubts());
    scene.driver.set_writeback(true).unwrap();
    assert!(!scene.is_durable_at_once());
}

#[test]
fn a_guest_that_cannot_choose_is_not_doubted() {
    let mut scene = Scene::new(&Options::new().without(feature::CONFIG_WCE));
    scene.replace();
    assert!(!scene.is_durable_at_once());
    assert!(!scene.doubts());
}
