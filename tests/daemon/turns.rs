//! Two daemons, one image, one guest: whoever serves the rings has the image, and reads what the other one wrote.
//!
//! What a whole live migration adds (a VMM on each side, the dirty log) is in `migration.rs` of the guests' tests.

use vdi_core::NewKind;
use vdi_tests::driver::{Base, Driver, Kept, Options};
use vdi_tests::image::{Image, MIB, field};
use vdi_tests::load::{DISK_SECTORS, Load, Mix, disk_after};
use vdi_tests::page_cache::{leave_unwritten, unwritten_pages};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server};
use vdi_tests::{qemu, tool};

const QUEUES: usize = 2;

/// Starts the rings at a daemon; they must have been stopped at the other one.
fn arrive(driver: &mut Driver, kept: &Kept, server: &Server) {
    driver.control = kept.reconnect(server.socket(), Base::Used).unwrap();
}

fn leave(driver: &mut Driver) {
    for index in 0..driver.queues.len() {
        driver.control.stop(index).unwrap();
    }
}

#[test]
fn a_guest_goes_to_and_fro_between_two_daemons_and_every_byte_with_it() {
    let mut random = Random::printed();
    for cache in ["writeback", "direct"] {
        let image = Image::by_us(DISK_SECTORS * 512, 1 << 20, NewKind::Dynamic);
        let first = Launch::image(image.path()).args(["--cache", cache]).start();
        let second = Launch::image(image.path())
            .args(["--cache", cache, "--incoming"])
            .start();
        let options = Options::new().queues(QUEUES).queue_size(128);
        let mut driver = first.driver(&options);
        let kept = driver.keep(&options);
        let mut loads: Vec<_> = (0..QUEUES)
            .map(|_| Load::new(random.fork(), QUEUES, Mix::Everything))
            .collect();
        for round in 0..8 {
            std::thread::scope(|scope| {
                for (queue, load) in driver.queues.iter_mut().zip(&mut loads) {
                    let mut left = 0..60;
                    scope.spawn(move || load.run(queue, || left.next().is_some()));
                }
            });
            leave(&mut driver);
            // Whatever the other one says, the image is sound between two turns.
            let check = tool::vdi(["check".as_ref(), image.path().as_os_str()]);
            assert!(matches!(check.code, Some(0 | 3)), "{check:#?}");
            arrive(&mut driver, &kept, [&second, &first][round % 2]);
        }
        leave(&mut driver);
        drop(driver);
        assert_eq!(second.terminate().code, Some(0));
        assert_eq!(first.terminate().code, Some(0));
        assert!(image.contents() == disk_after(&loads), "{cache}");
        qemu::expect_clean(image.path());
    }
}

#[test]
fn an_image_is_durable_when_its_last_ring_has_stopped() {
    let image = Image::by_qemu(16 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    let write = || driver.write(0, &[1; 65536]);
    assert!(leave_unwritten(image.path(), 0, write));
    driver.control.stop(0).unwrap();
    assert_eq!(unwritten_pages(image.path()), 0);
}

#[test]
fn what_is_wrong_with_an_image_is_said_a_few_times_however_often_rings_start() {
    let image = Image::by_qemu(8 * MIB);
    image.patch(field::UUID_IMAGE, &[0; 16]);
    let server = Launch::image(image.path()).arg("--read-only").start();
    let mut driver = server.driver(&Options::new());
    for _ in 0..40 {
        let base = driver.control.stop(0).unwrap();
        driver.control.start(&driver.queues[0], base).unwrap();
    }
    assert_eq!(driver.read(0, 512), [0; 512]);
    let lines = server.log().matches("uuid_image").count();
    assert!((1..=10).contains(&lines), "{lines} lines");
}

#[test]
fn rings_do_not_start_while_another_daemon_has_the_image() {
    let image = Image::by_qemu(16 * MIB);
    let first = Launch::image(image.path()).start();
    let second = Launch::image(image.path()).arg("--incoming").start();
    second.expect_log("when it is our turn");
    let mut driver = first.driver(&Options::new());
    driver.write(0, &[1; 512]);
    assert!(second.try_driver(&Options::new()).is_err());
    assert_eq!(driver.read(0, 512), [1; 512]);
    leave(&mut driver);
    let mut guest = second.driver(&Options::new());
    assert_eq!(guest.read(0, 512), [1; 512]);
    // And the first one has to wait now.
    let refused = tool::qemu_img(["info", image.path().to_str().unwrap()]);
    assert_ne!(refused.code, Some(0), "QEMU opened an image in use");
    assert!(first.try_driver(&Options::new()).is_err());
}

#[test]
fn an_image_that_no_ring_uses_may_change_and_is_read_anew() {
    let image = Image::by_qemu(16 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 4096]);
    let index = driver.queue().used_index();
    leave(&mut driver);
    let path = image.path().to_str().unwrap();
    let _done = tool::vdi(["resize", path, "32M"]).expect_code(0);
    let _done = tool::qemu_io(image.path(), &["write -P 2 0 4k".to_owned()]);
    let queue = &driver.queues[0];
    driver.control.start(queue, index).unwrap();
    assert_eq!(driver.read(0, 4096), [2; 4096]);
    assert_eq!(driver.config().unwrap().capacity_sectors, 32 * MIB / 512);
    driver.write(17 * MIB / 512, &[3; 4096]);
    assert_eq!(server.terminate().code, Some(0));
}

#[test]
fn a_daemon_that_let_go_of_its_image_leaves_it_exact_all_the_same() {
    let image = Image::by_qemu(64 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 4096]);
    leave(&mut driver);
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    qemu::expect_clean(image.path());
}

/// A VMM that dies stops no rings: nobody else may have the image meanwhile.
#[test]
fn a_front_end_that_vanishes_leaves_the_image_to_its_daemon() {
    let image = Image::by_qemu(16 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 512]);
    let _memory = driver.vanish();
    let refused = tool::qemu_img(["info", image.path().to_str().unwrap()]);
    assert_ne!(refused.code, Some(0), "QEMU opened an image in use");
    let mut driver = server.driver(&Options::new());
    assert_eq!(driver.read(0, 512), [1; 512]);
}

#[test]
fn a_daemon_that_never_had_its_turn_leaves_the_image_as_it_is() {
    let image = Image::by_qemu(16 * MIB);
    let before = std::fs::read(image.path()).unwrap();
    let server = Launch::image(image.path()).arg("--incoming").start();
    assert_eq!(server.terminate().code, Some(0));
    assert!(std::fs::read(image.path()).unwrap() == before);
}
