//! What the daemon says about the disk: features, config space, serial number.

use vdi_tests::driver::{Config, Layout, Options, Request, feature};
use vdi_tests::image::{Image, MIB, are_zeros};
use vdi_tests::server::{Launch, Server};
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP};

#[test]
fn what_is_offered_is_what_every_front_end_needs_and_nothing_undone() {
    let image = Image::by_qemu(64 * MIB);
    let server = Launch::image(image.path()).start();
    let control = server.control(&Options::new());
    let needed = feature::VERSION_1
        | feature::PROTOCOL_FEATURES
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::TOPOLOGY
        | feature::FLUSH
        | feature::CONFIG_WCE
        | feature::MQ
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX;
    let never = feature::RO | feature::SIZE_MAX | feature::RING_PACKED | feature::NOTIFICATION_DATA;
    assert_eq!(control.offered() & needed, needed);
    assert_eq!(control.offered() & never, 0);
    let needed =
        Protocol::MQ | Protocol::CONFIG | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS;
    let never = Protocol::STATUS | Protocol::PAGEFAULT | Protocol::INBAND_NOTIFICATIONS;
    assert!(control.offered_protocol().contains(needed));
    assert!(!control.offered_protocol().intersects(never));
}

#[test]
fn the_config_space_describes_the_disk() {
    let image = Image::by_qemu(64 * MIB);
    let server = Launch::image(image.path())
        .args(["--num-queues", "3"])
        .start();
    let mut driver = server.driver(&Options::new().queues(3));
    let config = driver.config().unwrap();
    assert_eq!(config.capacity_sectors, 64 * MIB / 512);
    assert_eq!(config.size_max, 0);
    assert_eq!(config.blk_size, 512);
    assert_eq!(config.writeback, 1);
    assert_eq!((config.num_queues, driver.control.queues_offered()), (3, 3));
    assert!(
        (1..=126).contains(&config.seg_max),
        "a ring of 128 holds a request of seg_max segments"
    );
    assert_eq!(config.alignment_offset, 0);
}

#[test]
fn more_queues_are_offered_than_one_by_default() {
    let image = Image::by_qemu(MIB);
    let server = Launch::image(image.path()).start();
    assert!(server.control(&Options::new()).queues_offered() > 1);
}

#[test]
fn the_config_space_is_found_at_0_and_at_0x100_and_is_zero_beyond_its_end() {
    let image = Image::by_qemu(64 * MIB);
    let server = Launch::image(image.path()).start();
    let mut control = server.control(&Options::new());
    let fields = control.config_bytes(0, Config::LEN_BYTES).unwrap();
    assert_eq!(
        control.config_bytes(0x100, Config::LEN_BYTES).unwrap(),
        fields
    );
    assert_eq!(control.config_bytes(4, 8).unwrap(), fields[4..12]);
    let longer = control.config_bytes(0, 256).unwrap();
    assert_eq!(longer[..60], fields);
    assert!(are_zeros(&longer[60..]));
    assert_eq!(control.config_bytes(200, 40).unwrap(), [0; 40]);
    assert_eq!(control.config_bytes(0x300, 16).unwrap(), [0; 16]);
}

#[test]
fn writeback_can_be_switched_and_reads_back_and_nothing_else_can_be_written() {
    let image = Image::by_qemu(MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    for on in [false, true] {
        driver.set_writeback(on).unwrap();
        assert_eq!(driver.config().unwrap().writeback, u8::from(on));
    }
    drop(driver);
    for (offset, bytes) in [
        (0, &[9; 8][..]),
        (Config::WRITEBACK_AT, &[0, 0]),
        (34, &[9, 9]),
    ] {
        let mut control = server.control(&Options::new());
        assert!(
            control.set_config_bytes(offset, bytes).is_err(),
            "{bytes:?} at {offset}"
        );
        drop(control);
        let config = server.driver(&Options::new()).config().unwrap();
        assert_eq!((config.capacity_sectors, config.writeback), (MIB / 512, 1));
    }
}

#[test]
fn writeback_starts_at_0_for_a_driver_that_cannot_flush() {
    let image = Image::by_qemu(MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new().without(feature::FLUSH));
    assert_eq!(driver.config().unwrap().writeback, 0);
}

#[test]
fn a_disk_of_odd_size_is_rounded_down_and_its_header_is_left_alone() {
    let image = Image::by_qemu(11 * MIB);
    let odd = 10 * MIB + 700;
    image.patch(vdi_tests::image::field::DISK_SIZE, &odd.to_le_bytes());
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    let sectors = driver.config().unwrap().capacity_sectors;
    assert_eq!(sectors, (10 * MIB + 512) / 512);
    driver.write(sectors - 1, &[7; 512]);
    assert_eq!(driver.read(sectors - 1, 512), [7; 512]);
    let beyond = driver
        .queue()
        .run(&Request::read(sectors, 512), &Layout::framed());
    assert_eq!(u32::from(beyond.status), VIRTIO_BLK_S_IOERR);
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    assert_eq!(
        image.bytes(vdi_tests::image::field::DISK_SIZE),
        odd.to_le_bytes()
    );
}

#[test]
fn the_serial_is_what_was_asked_for_padded_with_nuls() {
    let image = Image::by_qemu(MIB);
    for (serial, expected) in [
        ("disk-1", b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("12345678901234567890", b"12345678901234567890"),
    ] {
        let server = Launch::image(image.path())
            .args(["--serial", serial])
            .start();
        assert_eq!(server.driver(&Options::new()).queue().get_id(), expected);
    }
    let too_long = Launch::image(image.path()).args(["--serial", "123456789012345678901"]);
    let exit = too_long.run();
    assert_ne!(exit.code, Some(0));
    assert!(exit.log.contains("serial"), "{}", exit.log);
}

#[test]
fn a_serial_that_was_not_asked_for_belongs_to_the_image() {
    let (one, other) = (Image::by_qemu(MIB), Image::by_qemu(MIB));
    let serial_of = |image: &Image| {
        let server = Launch::image(image.path()).start();
        let serial = server.driver(&Options::new()).queue().get_id();
        assert_eq!(server.terminate().code, Some(0));
        serial
    };
    let serial = serial_of(&one);
    assert_ne!(serial[0], 0);
    assert_eq!(serial_of(&one), serial);
    assert_ne!(serial_of(&other), serial);
}

#[test]
fn requests_that_are_not_offered_are_unsupported() {
    const SECURE_ERASE: u32 = 14;
    const ZONE_REPORT: u32 = 16;
    let image = Image::by_qemu(MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    for kind in [2, 7, SECURE_ERASE, ZONE_REPORT, 0xffff_ffff] {
        let answer = driver
            .queue()
            .run(&Request::of_kind(kind), &Layout::framed());
        assert_eq!(u32::from(answer.status), VIRTIO_BLK_S_UNSUPP, "type {kind}");
        assert_eq!(answer.used_bytes, 1);
    }
}

#[test]
fn a_read_only_disk_can_be_read_and_flushed_and_is_never_changed() {
    let image = Image::by_qemu(4 * MIB);
    let before = std::fs::read(image.path()).unwrap();
    let server = Launch::image(image.path()).arg("--read-only").start();
    for options in [Options::new(), Options::new().without(feature::RO)] {
        let mut driver = server.driver(&options);
        assert_ne!(driver.control.offered() & feature::RO, 0);
        assert_eq!(driver.read(0, 4096), [0; 4096]);
        let write = Request::write(0, vec![1; 512]);
        let answer = driver.queue().run(&write, &Layout::framed());
        assert_eq!(u32::from(answer.status), VIRTIO_BLK_S_IOERR);
        assert_eq!(answer.used_bytes, 1);
        driver.flush();
        assert_eq!(driver.read(0, 4096), [0; 4096]);
    }
    assert_eq!(server.terminate().code, Some(0));
    assert!(std::fs::read(image.path()).unwrap() == before);
}

/// A number in the daemon's `/proc/PID/status`.
fn status(server: &Server, name: &str) -> u64 {
    let path = format!("/proc/{}/status", server.pid());
    let status = std::fs::read_to_string(path).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn as_many_queues_as_any_machine_asks_for_are_offered_and_cost_nothing_until_they_are_used() {
    let image = Image::by_qemu(8 * MIB);
    let other = Image::by_qemu(8 * MIB);
    // No more threads than queues are started, so as many as the modest one has.
    let launch = |image: &Image| Launch::image(image.path()).args(["--workers", "1"]);
    let server = launch(&image).start();
    let modest = launch(&other).args(["--num-queues", "1"]).start();
    // Who is connected has a thread.
    let (control, _one) = (
        server.control(&Options::new()),
        modest.control(&Options::new()),
    );
    assert_eq!(control.queues_offered(), 256);
    assert_eq!(status(&server, "Threads"), status(&modest, "Threads"));
    let [all, one] = [&server, &modest].map(|server| status(server, "RssAnon"));
    let most = one + 512;
    assert!(all < most, "{all} KiB with 256 queues, {one} with one");
    drop(control);
    let mut driver = server.driver(&Options::new().queues(256).queue_size(16));
    for queue in &mut driver.queues {
        let sector = queue.index() as u64;
        queue.write(sector, &[7; 512]);
        assert_eq!(queue.read(sector, 512), [7; 512]);
    }
}
