//! Real Linux guests on `vdi-vhost`: what they wrote is there when the next one boots,
//! and both QEMU's tools and ours find the image sound.
//!
//! Here is what only a whole guest shows: its own driver, its page cache, its file
//! system, a boot after a boot. Odd rings and hostile chains have tests of their own.
//! What the guests do is in `ci/guest/jobs`.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use vdi_core::{Access, CreateOptions, Disk, HostFile, Locking, NewKind};
use vdi_tests::counts::{self, FrontEnd, qemu_version};
use vdi_tests::guest::{Guest, create_image, expect_clean, stop};
use vdi_tests::image::{Image, MIB};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server, requests_started_again};
use vdi_tests::tool;

/// No power of two, and no whole number of GiB.
const DISK_BYTES: u64 = 641 * MIB;
const SERIAL: &str = "guest-test-20chars-x";

/// Writes blocks of 512 B to 4 MiB and a file system.
fn write(daemon: &Server, queues: u16, device: &str) {
    Guest::on(daemon, queues)
        .device(device)
        .with_fio()
        .set("SECTORS", &(DISK_BYTES / 512).to_string())
        .set("QUEUES", &queues.to_string())
        .set("SERIAL", SERIAL)
        .run("write.sh");
}

/// Finds all that [`write`] left.
fn verify(daemon: &Server, queues: u16) {
    Guest::on(daemon, queues).with_fio().run("verify.sh");
}

fn start(image: &Image, queues: &str, cache: &str) -> Server {
    let options = ["--num-queues", queues, "--cache", cache, "--serial", SERIAL];
    Launch::image(image.path()).args(options).start()
}

#[test]
fn one_queue_buffered_keeps_what_a_guest_wrote_for_the_next_one_on_the_same_daemon() {
    let image = create_image(DISK_BYTES);
    let daemon = start(&image, "1", "writeback");
    write(&daemon, 1, "config-wce=on");
    verify(&daemon, 1);
    stop(daemon);
    expect_clean(&image);
}

#[test]
fn four_queues_buffered_keep_what_a_guest_wrote_for_the_next_daemon() {
    let image = create_image(DISK_BYTES);
    let daemon = start(&image, "4", "writeback");
    write(&daemon, 4, "config-wce=on");
    stop(daemon);
    expect_clean(&image);

    let daemon = start(&image, "4", "writeback");
    verify(&daemon, 4);
    stop(daemon);
    expect_clean(&image);
}

#[test]
fn one_queue_direct_keeps_what_a_guest_wrote_for_the_next_daemon() {
    let image = create_image(DISK_BYTES);
    let daemon = start(&image, "1", "direct");
    write(&daemon, 1, "config-wce=off");
    stop(daemon);
    expect_clean(&image);

    // Through the other cache mode, so that nothing is right only in its own.
    let daemon = start(&image, "1", "writeback");
    verify(&daemon, 1);
    stop(daemon);
    expect_clean(&image);
}

#[test]
fn four_queues_direct_keep_what_a_guest_wrote_for_the_next_one_on_the_same_daemon() {
    let image = create_image(DISK_BYTES);
    let daemon = start(&image, "4", "direct");
    write(&daemon, 4, "config-wce=on,queue-size=256");
    // The daemon has four queues; this guest uses two of them.
    verify(&daemon, 2);
    stop(daemon);
    expect_clean(&image);
}

/// `VDI_TEST_ROUNDS` says how many kills.
#[test]
fn kill_9_under_a_guest_is_a_pause_and_no_error() {
    const QUEUES: u16 = 4;
    let wanted = std::env::var("VDI_TEST_ROUNDS").map_or(8, |rounds| rounds.parse().unwrap());
    let mut random = Random::printed();
    let image = create_image(DISK_BYTES);
    let place = tempfile::tempdir().unwrap();
    let launch = || {
        let launch = Launch::image_at(image.path(), &place.path().join("socket"));
        // Past the page cache writes take long enough for a kill to meet them.
        launch.args(["--num-queues", &QUEUES.to_string(), "--cache", "direct"])
    };
    let mut daemon = launch().start();
    let guest = Guest::on(&daemon, QUEUES)
        .that_reconnects()
        .with_fio()
        .within(300 + wanted * 10)
        .set("LOOPS", &(1 + wanted / 6).to_string());
    let (mut kills, mut recovered) = (0, 0);
    let daemon = std::thread::scope(|scope| {
        let guest = scope.spawn(|| guest.run("recover.sh"));
        // Most kills meet nothing: a guest whose processors are played has seldom a request in flight.
        while (kills < wanted || recovered == 0) && !guest.is_finished() {
            std::thread::sleep(Duration::from_millis(random.within(50..700)));
            if has_data(&image) {
                recovered += requests_started_again(&daemon.log());
                assert_eq!(daemon.kill().signal, Some(9));
                kills += 1;
                daemon = launch().start();
            }
        }
        if let Err(panic) = guest.join() {
            std::panic::resume_unwind(panic);
        }
        daemon
    });
    recovered += requests_started_again(&daemon.log());
    assert!(
        kills >= wanted,
        "the guest ended before all kills were done"
    );
    assert!(recovered > 0, "no kill met a request in flight");
    counts::tell(&format!(
        "kill -9 under a real guest: {kills} kills, {recovered} requests started again, 0 errors in the guest, fio verified \
         every block"
    ));
    let row = FrontEnd {
        name: "QEMU, Linux guest",
        version: &qemu_version(),
        features: &format!("`num-queues={QUEUES}`, `reconnect-ms`"),
        verified: "`kill -9` of the daemon under fio that verifies",
    };
    row.tell();
    stop(daemon);
    // The last daemon may have had nothing to write, and then leaves what the killed ones had reserved.
    let check = tool::vdi(["check".as_ref(), image.path().as_os_str()]);
    assert!(matches!(check.code, Some(0 | 3)), "{check:#?}");
}

/// A daemon of a fleet, and those that take over from it.
struct Upgrades {
    image: Image,
    place: tempfile::TempDir,
}

impl Upgrades {
    fn new() -> Self {
        let (image, place) = (
            create_image(DISK_BYTES),
            tempfile::tempdir().expect("it can be made"),
        );
        let text = format!(
            "control-socket = \"control\"\n[[disk]]\nname = \"a\"\nsocket = \"socket\"\nimage = \"{}\"\n",
            image.path().display()
        );
        std::fs::write(place.path().join("toml"), text).expect("it can be written");
        Self { image, place }
    }

    fn launch(&self) -> Launch {
        let [config, socket] = ["toml", "socket"].map(|of| self.place.path().join(of));
        Launch::config_at(&config, &socket)
    }

    /// Has a new daemon take over, and waits for the end of the old one.
    fn upgrade(&self, daemon: Server) -> Server {
        let control = self.place.path().join("control");
        let next = self.launch().arg("--take-over").arg(control).spawn();
        let old = daemon.wait();
        assert_eq!(old.code, Some(0), "{}{}", old.log, next.log());
        assert_eq!(requests_started_again(&old.log), 0, "some were in flight");
        next
    }
}

/// `VDI_TEST_ROUNDS` says how many upgrades.
#[test]
fn an_upgrade_under_a_guest_is_a_pause_and_no_error() {
    let wanted = std::env::var("VDI_TEST_ROUNDS").map_or(6, |rounds| rounds.parse().unwrap());
    let mut random = Random::printed();
    let upgrades = Upgrades::new();
    let mut daemon = upgrades.launch().start();
    let guest = Guest::on(&daemon, 4).that_reconnects().with_fio();
    let mut done = 0;
    let daemon = std::thread::scope(|scope| {
        let guest = scope.spawn(|| guest.run("upgrade.sh"));
        while done < wanted && !guest.is_finished() {
            std::thread::sleep(Duration::from_millis(random.within(200..700)));
            if has_data(&upgrades.image) {
                daemon = upgrades.upgrade(daemon);
                done += 1;
            }
        }
        if let Err(panic) = guest.join() {
            std::panic::resume_unwind(panic);
        }
        daemon
    });
    assert_eq!(
        done, wanted,
        "the guest ended before all upgrades were done"
    );
    counts::tell(&format!(
        "upgrades under a real guest: {done}, 0 errors in the guest, fio verified every block"
    ));
    stop(daemon);
    expect_clean(&upgrades.image);
}

/// The guest tells the slowest of its reads, one after the other; with `VDI_TEST_ROUNDS=0` that is what to compare with.
#[test]
#[ignore = "a measurement, for a machine that has nothing else to do"]
fn how_long_a_guest_waits_for_an_upgrade() {
    let wanted = std::env::var("VDI_TEST_ROUNDS").map_or(20, |rounds| rounds.parse().unwrap());
    let upgrades = Upgrades::new();
    let mut daemon = upgrades.launch().start();
    let guest = Guest::on(&daemon, 1).that_reconnects().with_fio();
    let daemon = std::thread::scope(|scope| {
        let guest = scope.spawn(|| guest.run("pause.sh"));
        let mut done = 0;
        while !guest.is_finished() {
            std::thread::sleep(Duration::from_millis(500));
            if done < wanted && requests(&upgrades) > 1000 {
                daemon = upgrades.upgrade(daemon);
                done += 1;
            }
        }
        guest.join().unwrap();
        println!("{done} upgrades");
        daemon
    });
    stop(daemon);
}

/// How many requests this daemon has served.
fn requests(upgrades: &Upgrades) -> u64 {
    use std::io::{BufRead, BufReader, Write};
    let control = upgrades.place.path().join("control");
    let mut stream = std::os::unix::net::UnixStream::connect(control).expect("it listens");
    stream
        .write_all(b"{\"version\": 1, \"execute\": \"stats\"}\n")
        .expect("it reads");
    let mut answer = String::new();
    BufReader::new(stream)
        .read_line(&mut answer)
        .expect("it answers");
    let answer: serde_json::Value = serde_json::from_str(&answer).expect("it is JSON");
    answer["return"]["read"]["requests"]
        .as_u64()
        .expect("it is a number")
}

/// Whether the guest has begun to write in earnest.
fn has_data(image: &Image) -> bool {
    std::fs::metadata(image.path()).is_ok_and(|found| found.blocks() * 512 > 8 * MIB)
}

#[test]
fn a_read_only_disk_can_be_read_and_its_image_stays_as_it_is() {
    let image = create_image(64 * MIB);
    let daemon = Launch::image(image.path()).start();
    Guest::on(&daemon, 1).run("one-file.sh");
    stop(daemon);
    let before = std::fs::read(image.path()).unwrap();

    let daemon = Launch::image(image.path()).arg("--read-only").start();
    Guest::on(&daemon, 1).run("read-only.sh");
    stop(daemon);
    assert!(
        before == std::fs::read(image.path()).unwrap(),
        "the image was changed"
    );
    expect_clean(&image);
}

/// What the choice does to the order of writes and syncs, a guest cannot see; the daemon's own tests can.
#[test]
fn the_guest_chooses_its_cache_only_where_the_front_end_lets_it() {
    let image = create_image(64 * MIB);
    let daemon = Launch::image(image.path()).start();
    Guest::on(&daemon, 1)
        .device("config-wce=on")
        .set("CAN_CHANGE", "yes")
        .run("cache.sh");
    Guest::on(&daemon, 1)
        .device("config-wce=off")
        .set("CAN_CHANGE", "no")
        .run("cache.sh");
    stop(daemon);
    expect_clean(&image);
}

/// Bytes that the host keeps for a file.
fn allocated_bytes(image: &Image) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(image.path());
    file.expect("the image is ours").blocks() * 512
}

#[test]
fn a_trim_gives_back_what_was_deleted_and_a_child_goes_on_from_there() {
    let image = create_image(DISK_BYTES);
    let daemon = Launch::image(image.path()).start();
    let most = std::thread::scope(|scope| {
        let guest = scope.spawn(|| Guest::on(&daemon, 1).run("trim.sh"));
        let mut most = 0;
        while !guest.is_finished() {
            most = most.max(allocated_bytes(&image));
            std::thread::sleep(Duration::from_millis(20));
        }
        guest.join().unwrap();
        most
    });
    assert!(most > 300 * MIB, "the file was never there: {most} bytes");
    let left = allocated_bytes(&image);
    println!("{left} bytes are left");
    assert!(left < 40 * MIB, "{left} bytes for 5 MB and a file system");
    stop(daemon);
    expect_clean(&image);

    let before = std::fs::read(image.path()).unwrap();
    let parent = HostFile::open(image.path(), Access::ReadOnly, Locking::ForceShare).unwrap();
    let parent = Disk::open(Arc::new(parent), Access::ReadOnly).unwrap();
    let child = image.path().with_file_name("child.vdi");
    let options = CreateOptions {
        capacity_bytes: DISK_BYTES,
        block_size: 1 << 20,
        kind: NewKind::Differencing(parent.header().as_parent()),
        uuid: None,
    };
    vdi_core::create(&child, &options).unwrap();
    let daemon = Launch::image(&child).start();
    Guest::on(&daemon, 1).run("change.sh");
    stop(daemon);
    assert!(
        before == std::fs::read(image.path()).unwrap(),
        "the parent was changed"
    );
}
