//! P5: one writer at a time, QEMU's tools included.

use vdi_tests::driver::Options;
use vdi_tests::image::{Image, MIB};
use vdi_tests::qemu;
use vdi_tests::server::Launch;

#[test]
fn while_an_image_is_served_nobody_else_can_write_to_it() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    server.driver(&Options::new()).write(0, &[1; 512]);
    assert!(!qemu::io(image.path(), "write -P 2 0 512").status.success());
    let exit = Launch::image(image.path()).run();
    assert_ne!(exit.code, Some(0));
    assert!(
        exit.log.contains(image.path().to_str().unwrap()),
        "{}",
        exit.log
    );
    assert_eq!(server.driver(&Options::new()).read(0, 512), [1; 512]);
    assert_eq!(server.terminate().code, Some(0));
    assert!(qemu::io(image.path(), "write -P 2 0 512").status.success());
    let server = Launch::image(image.path()).start();
    assert_eq!(server.driver(&Options::new()).read(0, 512), [2; 512]);
}

#[test]
fn an_image_that_qemu_writes_to_is_refused() {
    let image = Image::by_qemu(8 * MIB);
    let other = Launch::storage_daemon(image.path(), "vdi", 1).start();
    for launch in [
        Launch::image(image.path()),
        Launch::image(image.path()).arg("--read-only"),
    ] {
        let exit = launch.run();
        assert_ne!(exit.code, Some(0));
        assert!(
            exit.log.contains(image.path().to_str().unwrap()),
            "{}",
            exit.log
        );
    }
    drop(other);
    let server = Launch::image(image.path()).start();
    server.driver(&Options::new()).write(0, &[1; 512]);
}

#[test]
fn readers_share_an_image_and_keep_writers_out() {
    let image = Image::by_qemu(8 * MIB);
    let one = Launch::image(image.path()).arg("--read-only").start();
    let other = Launch::image(image.path()).arg("--read-only").start();
    assert_eq!(one.driver(&Options::new()).read(0, 512), [0; 512]);
    assert_eq!(other.driver(&Options::new()).read(0, 512), [0; 512]);
    qemu::expect_clean(image.path());
    assert!(!qemu::io(image.path(), "write -P 2 0 512").status.success());
    assert_ne!(Launch::image(image.path()).run().code, Some(0));
}

#[test]
fn a_killed_daemon_holds_no_lock() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    server.driver(&Options::new()).write(0, &[1; 512]);
    assert_eq!(server.kill().signal, Some(9));
    let server = Launch::image(image.path()).start();
    assert_eq!(server.driver(&Options::new()).read(0, 512), [1; 512]);
}

#[test]
fn what_qemu_wrote_before_and_after_us_and_we_before_and_after_qemu_stays() {
    let image = Image::by_qemu(8 * MIB);
    for round in 0..4_u8 {
        let at = u64::from(round) * 2 * MIB - u64::from(round > 0) * 4096;
        let write = format!("write -P {} {at} 8192", 0x10 + round);
        assert!(qemu::io(image.path(), &write).status.success());
        let server = Launch::image(image.path()).start();
        let mut driver = server.driver(&Options::new());
        driver.write((at + 8192) / 512, &[0x20 + round; 8192]);
        assert_eq!(driver.read(at / 512, 8192), [0x10 + round; 8192]);
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
        qemu::expect_clean(image.path());
    }
    let contents = qemu::contents(image.path());
    for round in 0..4_u8 {
        let at = usize::from(round) * (2 << 20) - usize::from(round > 0) * 4096;
        assert_eq!(contents[at..at + 8192], [0x10 + round; 8192]);
        assert_eq!(contents[at + 8192..at + 16384], [0x20 + round; 8192]);
    }
}
