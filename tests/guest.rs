//! Real Linux guests on `vdi-vhost`: what they wrote is there when the next one boots,
//! and both QEMU's tools and ours find the image sound.
//!
//! Here is what only a whole guest shows: its own driver, its page cache, its file
//! system, a boot after a boot. Odd rings and hostile chains have tests of their own.
//! What the guests do is in `ci/guest/jobs`.

use vdi_tests::guest::{Daemon, Guest, Image};

const MIB: u64 = 1 << 20;
/// No power of two, and no whole number of GiB.
const DISK_BYTES: u64 = 641 * MIB;
const SERIAL: &str = "guest-test-20chars-x";

/// Writes blocks of 512 B to 4 MiB and a file system.
fn write(daemon: &Daemon, queues: u16, device: &str) {
    Guest::on(daemon, queues)
        .device(device)
        .with_fio()
        .set("SECTORS", &(DISK_BYTES / 512).to_string())
        .set("QUEUES", &queues.to_string())
        .set("SERIAL", SERIAL)
        .run("write.sh");
}

/// Finds all that [`write`] left.
fn verify(daemon: &Daemon, queues: u16) {
    Guest::on(daemon, queues).with_fio().run("verify.sh");
}

fn options<'a>(queues: &'a str, cache: &'a str) -> [&'a str; 6] {
    ["--num-queues", queues, "--cache", cache, "--serial", SERIAL]
}

#[test]
fn one_queue_buffered_keeps_what_a_guest_wrote_for_the_next_one_on_the_same_daemon() {
    let image = Image::create(DISK_BYTES);
    let daemon = Daemon::start(&image, &options("1", "writeback"));
    write(&daemon, 1, "config-wce=on");
    verify(&daemon, 1);
    daemon.stop();
    image.assert_clean();
}

#[test]
fn four_queues_buffered_keep_what_a_guest_wrote_for_the_next_daemon() {
    let image = Image::create(DISK_BYTES);
    let daemon = Daemon::start(&image, &options("4", "writeback"));
    write(&daemon, 4, "config-wce=on");
    daemon.stop();
    image.assert_clean();

    let daemon = Daemon::start(&image, &options("4", "writeback"));
    verify(&daemon, 4);
    daemon.stop();
    image.assert_clean();
}

#[test]
fn one_queue_direct_keeps_what_a_guest_wrote_for_the_next_daemon() {
    let image = Image::create(DISK_BYTES);
    let daemon = Daemon::start(&image, &options("1", "direct"));
    write(&daemon, 1, "config-wce=off");
    daemon.stop();
    image.assert_clean();

    // Through the other cache mode, so that nothing is right only in its own.
    let daemon = Daemon::start(&image, &options("1", "writeback"));
    verify(&daemon, 1);
    daemon.stop();
    image.assert_clean();
}

#[test]
fn four_queues_direct_keep_what_a_guest_wrote_for_the_next_one_on_the_same_daemon() {
    let image = Image::create(DISK_BYTES);
    let daemon = Daemon::start(&image, &options("4", "direct"));
    write(&daemon, 4, "config-wce=on,queue-size=256");
    // The daemon has four queues; this guest uses two of them.
    verify(&daemon, 2);
    daemon.stop();
    image.assert_clean();
}

#[test]
fn a_read_only_disk_can_be_read_and_its_image_stays_as_it_is() {
    let image = Image::create(64 * MIB);
    let daemon = Daemon::start(&image, &[]);
    Guest::on(&daemon, 1).run("one-file.sh");
    daemon.stop();
    let before = std::fs::read(image.path()).unwrap();

    let daemon = Daemon::start(&image, &["--read-only"]);
    Guest::on(&daemon, 1).run("read-only.sh");
    daemon.stop();
    assert!(
        before == std::fs::read(image.path()).unwrap(),
        "the image was changed"
    );
    image.assert_clean();
}

/// What the choice does to the order of writes and syncs, a guest cannot see; the daemon's own tests can.
#[test]
fn the_guest_chooses_its_cache_only_where_the_front_end_lets_it() {
    let image = Image::create(64 * MIB);
    let daemon = Daemon::start(&image, &[]);
    Guest::on(&daemon, 1)
        .device("config-wce=on")
        .set("CAN_CHANGE", "yes")
        .run("cache.sh");
    Guest::on(&daemon, 1)
        .device("config-wce=off")
        .set("CAN_CHANGE", "no")
        .run("cache.sh");
    daemon.stop();
    image.assert_clean();
}
