//! Many disks in one process: by a configuration file, and added and removed while others are served.

use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use vdi_core::NewKind;
use vdi_tests::driver::{Driver, Layout, Options, Request};
use vdi_tests::image::MIB;
use vdi_tests::load::{DISK_SECTORS, Load, Mix, disk_after};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server, scratch, wait_for_listener};
use vdi_tests::soon::soon;
use vdi_tests::stop::StopOnDrop;
use vdi_tests::{operator, qemu, tool, words};

/// A daemon for the disks `a` and `b`, children of one golden image, and more.
pub(crate) struct Fleet {
    pub(crate) server: Server,
    pub(crate) place: TempDir,
}

impl Fleet {
    pub(crate) fn start(more: &str) -> Self {
        let place = scratch();
        let path = |name: &str| place.path().join(name);
        qemu::create(&path("golden.vdi"), "24M");
        tool::qemu_io(&path("golden.vdi"), &["write -P 5 0 24M".to_owned()]).expect_code(0);
        for name in ["a", "b", "c"] {
            let child = path(&format!("{name}.vdi"));
            tool::vdi(words!["snapshot", path("golden.vdi"), child]).expect_code(0);
        }
        operator::describe(place.path(), more);
        let server = operator::serve(place.path());
        Self { server, place }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    pub(crate) fn driver(&self, disk: &str) -> Driver {
        let socket = self.path(&format!("sockets/{disk}.sock"));
        Driver::connect(&socket, &Options::new().queues(2)).unwrap()
    }

    /// Sends a command; what it returns, or its error's class.
    pub(crate) fn ask(&self, command: &str, arguments: &Value) -> Result<Value, String> {
        operator::ask(&self.path("control"), command, arguments)
    }

    pub(crate) fn names(&self) -> Vec<String> {
        operator::names(&self.path("control"))
    }
}

fn open_files(server: &Server, file: &Path) -> usize {
    let fds = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    let target = |fd: fs::DirEntry| fs::read_link(fd.path()).ok();
    let targets = fds.filter_map(|fd| target(fd.unwrap()));
    targets.filter(|target| target == file).count()
}

#[test]
fn disks_of_one_process_are_apart_and_share_their_parent() {
    let fleet = Fleet::start("");
    let (mut a, mut b) = (fleet.driver("a"), fleet.driver("b"));
    a.write(0, &[0xa; 4096]);
    b.write(0, &[0xb; 4096]);
    assert_eq!(a.read(0, 8192)[..4096], [0xa; 4096]);
    assert_eq!(b.read(0, 8192)[..4096], [0xb; 4096]);
    assert_eq!(a.read(8, 4096), [5; 4096]);
    assert_eq!(b.read(40000, 4096), [5; 4096]);
    // A thousand disks over one parent have as many descriptors of it as two.
    let with_two = open_files(&fleet.server, &fleet.path("golden.vdi"));
    let added = fleet.ask("add", &json!({"name": "c", "image": fleet.path("c.vdi")}));
    assert_eq!(added.unwrap()["size_bytes"], 24 * MIB);
    assert_eq!(
        open_files(&fleet.server, &fleet.path("golden.vdi")),
        with_two
    );
    assert_eq!(fleet.driver("c").read(0, 4096), [5; 4096]);
    drop((a, b));
    let place = fleet.place;
    assert_eq!(fleet.server.terminate().code, Some(0));
    for name in ["a.vdi", "b.vdi"] {
        tool::vdi(words!["check", place.path().join(name)]).expect_code(0);
    }
    assert!(!place.path().join("sockets/a.sock").exists());
}

#[test]
fn a_disk_is_added_and_removed_while_another_is_under_load() {
    let mut random = Random::printed();
    let fleet = Fleet::start("");
    // Over zeros, since that is what a load begins with.
    tool::vdi(words![
        "create",
        fleet.path("d.vdi"),
        (DISK_SECTORS * 512).to_string()
    ])
    .expect_code(0);
    let table = json!({"name": "d", "image": fleet.path("d.vdi"), "num-queues": 2});
    fleet.ask("add", &table).unwrap();
    let mut driver = fleet.driver("d");
    let mut loads: Vec<_> = (0..2)
        .map(|_| Load::new(random.fork(), 2, Mix::Everything))
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        let _stop = StopOnDrop::new(stop);
        for (queue, load) in driver.queues.iter_mut().zip(&mut loads) {
            scope.spawn(move || load.run_until(queue, stop));
        }
        for _ in 0..20 {
            let table = json!({"name": "c", "image": fleet.path("c.vdi")});
            fleet.ask("add", &table).unwrap();
            let mut c = fleet.driver("c");
            c.write(8, &[0xc; 4096]);
            assert_eq!(fleet.names(), ["a", "b", "c", "d"]);
            // Its front end is still there.
            fleet.ask("remove", &json!({"disk": "c"})).unwrap();
            assert!(!fleet.path("sockets/c.sock").exists());
            // It is closed and nobody's.
            tool::vdi(words!["check", fleet.path("c.vdi")]).expect_code(0);
        }
    });
    drop(driver);
    fleet.ask("remove", &json!({"disk": "d"})).unwrap();
    let raw = fleet.path("d.raw");
    tool::qemu_img(words!["convert", "-O", "raw", fleet.path("d.vdi"), raw]).expect_code(0);
    assert!(fs::read(raw).unwrap() == disk_after(&loads));
}

#[test]
fn a_snapshot_holds_what_was_answered_and_the_guest_goes_on() {
    let mut random = Random::printed();
    let fleet = Fleet::start("");
    let image = fleet.path("d.vdi");
    tool::vdi(words!["create", image, (DISK_SECTORS * 512).to_string()]).expect_code(0);
    fleet
        .ask("add", &json!({"name": "d", "image": image, "serial": "D"}))
        .unwrap();
    let mut driver = fleet.driver("d");
    let mut load = [Load::new(random.fork(), 1, Mix::Everything)];
    let mut frozen = Vec::new();
    for round in 0..3 {
        let mut left = 500;
        load[0].run(driver.queue(), || {
            left -= 1;
            left > 0
        });
        let to = fleet.path(&format!("d-{round}.vdi"));
        let command = json!({"disk": "d", "to": to});
        fleet.ask("snapshot", &command).unwrap();
        // All of it was answered, and nothing came after it.
        frozen.push((to, disk_after(&load)));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (stop, load) = (&stop, &mut load[0]);
        let _stop = StopOnDrop::new(stop);
        let queue = driver.queue();
        scope.spawn(move || load.run(queue, || !stop.load(Ordering::Relaxed)));
        for nth in 3..6 {
            std::thread::sleep(Duration::from_millis(30));
            let to = fleet.path(&format!("d-{nth}.vdi"));
            fleet
                .ask("snapshot", &json!({"disk": "d", "to": to}))
                .unwrap();
        }
    });
    driver.flush();
    drop(driver);
    let place = fleet.place;
    assert_eq!(fleet.server.terminate().code, Some(0));
    frozen.push((image, disk_after(&load)));
    for (image, expected) in frozen {
        let raw = place.path().join("raw");
        tool::vdi(words!["convert", "--force", "-O", "raw", image, raw]).expect_code(0);
        assert!(fs::read(&raw).unwrap() == expected, "{}", image.display());
        tool::vdi(words!["check", image]).expect_code(0);
    }
}

#[test]
fn a_frozen_image_has_no_room_left_that_nobody_uses() {
    let fleet = Fleet::start("");
    let (image, to) = (fleet.path("d.vdi"), fleet.path("frozen.vdi"));
    tool::vdi(words!["create", image, "20G"]).expect_code(0);
    let add = json!({"name": "d", "image": image});
    fleet.ask("add", &add).unwrap();
    let mut driver = fleet.driver("d");
    driver.write(0, &[1; 512]);
    let command = json!({"disk": "d", "to": to});
    fleet.ask("snapshot", &command).unwrap();
    // Neither leaks nor bytes behind the end.
    tool::vdi(words!["check", to]).expect_code(0);
    driver.write(0, &[2; 512]);
    assert_eq!(driver.read(0, 1024), [[2; 512], [0; 512]].concat());
}

#[test]
fn what_an_operator_gets_wrong_changes_nothing() {
    let fleet = Fleet::start("");
    let elsewhere = scratch();
    let foreign = elsewhere.path().join("x.vdi");
    qemu::create(&foreign, "8M");
    let taken = fleet.path("a.vdi");
    let c = fleet.path("c.vdi");
    for (command, arguments, class) in [
        ("add", json!({"name": "a", "image": c}), "exists"),
        ("add", json!({"name": "x", "image": taken}), "not-open"),
        ("add", json!({"name": "x", "image": foreign}), "not-open"),
        (
            "add",
            json!({"name": "x", "image": "c.vdi"}),
            "not-possible",
        ),
        ("add", json!({"name": "../x", "image": c}), "not-possible"),
        (
            "add",
            json!({"name": "x", "image": c, "cash": 1}),
            "not-understood",
        ),
        (
            "add",
            json!({"name": "x", "image": c, "socket": foreign}),
            "not-possible",
        ),
        ("remove", json!({"disk": "x"}), "no-such-disk"),
        ("info", json!({}), "no-such-disk"),
        (
            "snapshot",
            json!({"disk": "a", "to": foreign}),
            "not-possible",
        ),
        ("snapshot", json!({"disk": "a", "to": c}), "not-possible"),
    ] {
        let answer = fleet.ask(command, &arguments);
        assert_eq!(answer, Err(class.to_owned()), "{command} {arguments}");
        assert_eq!(fleet.names(), ["a", "b"]);
    }
    let mut a = fleet.driver("a");
    a.write(0, &[1; 512]);
    assert_eq!(a.read(0, 1024), [[1; 512], [5; 512]].concat());
    drop(a);
    fleet.ask("shutdown", &json!(null)).unwrap();
    assert_eq!(fleet.server.wait().code, Some(0));
}

#[test]
fn what_a_disk_did_is_counted_by_kind_and_stays_counted() {
    let fleet = Fleet::start("");
    for _ in 0..2 {
        let mut a = fleet.driver("a");
        for nth in 0..3 {
            a.write(nth * 8, &[1; 4096]);
        }
        a.read(0, 8192);
        a.flush();
        // What is answered may not be counted yet; of a stopped ring all is.
        a.control.stop(0).unwrap();
    }
    let stats = fleet.ask("stats", &json!({"disk": "a"})).unwrap();
    let of = |kind: &str| ["requests", "bytes", "errors"].map(|what| stats[kind][what].clone());
    assert_eq!(of("write"), [6, 24576, 0]);
    assert_eq!(of("read"), [2, 16384, 0]);
    assert_eq!(of("flush"), [2, 0, 0]);
    assert_eq!(stats["in_flight_requests"], 0);
    let other = fleet.ask("stats", &json!({"disk": "b"})).unwrap();
    assert_eq!(other["write"]["requests"], 0);
}

#[test]
fn a_disk_that_is_limited_is_held_and_its_neighbour_is_not() {
    let fleet = Fleet::start("");
    let limit = |limits: Value| fleet.ask("set-limits", &json!({"disk": "a", "limits": limits}));
    assert_eq!(
        limit(json!({"iops_total_max": 5})),
        Err("not-understood".to_owned())
    );
    limit(json!({"iops_total": 10})).unwrap();
    let (mut a, mut b) = (fleet.driver("a"), fleet.driver("b"));
    let before = std::time::Instant::now();
    let others = std::thread::scope(|scope| {
        // Shown at once: one after the other, a slow machine would need no limit.
        let held = scope.spawn(|| {
            let (read, layout) = (Request::read(0, 512), Layout::whole());
            let tokens = a.queue().submit_all([(&read, &layout); 12]);
            for token in tokens {
                drop(a.queue().wait(token).expect_ok());
            }
        });
        let reads = std::iter::repeat_with(|| b.read(0, 512));
        reads.take_while(|_| !held.is_finished()).count()
    });
    // A bucket of a tenth of a second, one request, and one that goes over its brim.
    assert!(before.elapsed() >= Duration::from_millis(10 * 100 - 20));
    // One that waits each time until the first is let go on has as many as that.
    assert!(others > 24, "only {others} requests of the other disk");
    let stats = |disk: &str| fleet.ask("stats", &json!({"disk": disk})).unwrap();
    assert!(stats("a")["throttled_requests"].as_u64().unwrap() >= 5);
    assert_eq!(stats("b")["throttled_requests"], 0);
    // One that is held ends all the same.
    limit(json!({"iops_total": 1})).unwrap();
    a.read(0, 512);
    drop(a);
    limit(json!({})).unwrap();
    fleet.ask("remove", &json!({"disk": "a"})).unwrap();
}

#[test]
fn a_front_end_that_floods_a_disk_with_half_messages_does_not_hold_up_another() {
    let fleet = Fleet::start("");
    // Half a message is waited for a second.
    soon(Duration::from_millis(900), || {
        let mut rude = UnixStream::connect(fleet.path("sockets/a.sock")).unwrap();
        rude.write_all(&[1, 0, 0, 0, 1]).unwrap();
        let before = std::time::Instant::now();
        let mut b = fleet.driver("b");
        b.write(0, &[7; 512]);
        before.elapsed()
    });
    assert_eq!(fleet.names(), ["a", "b"]);
}

#[test]
fn a_configuration_that_is_wrong_is_refused_with_its_line() {
    let place = scratch();
    let file = place.path().join("fleet.toml");
    fs::write(&file, "socket-dir = \"s\"\n[[disk]]\nname = \"a\"\n").unwrap();
    let exit = Launch::bare().arg("--config").arg(&file).run();
    assert_eq!(exit.code, Some(1));
    assert!(
        exit.log.contains("line 2: the disk has no `image`"),
        "{}",
        exit.log
    );
}

#[test]
fn a_fleet_of_nothing_waits_for_its_first_disk() {
    let place = scratch();
    let path = |name: &str| place.path().join(name);
    fs::write(
        path("fleet.toml"),
        "control-socket = \"control\"\nsocket-dir = \".\"\nimage-dirs = [\".\"]\n",
    )
    .unwrap();
    let server = Launch::bare()
        .arg("--config")
        .arg(path("fleet.toml"))
        .spawn();
    wait_for_listener(&path("control"));
    let fleet = Fleet { server, place };
    let made = vdi_core::create(
        &fleet.path("a.vdi"),
        &vdi_core::CreateOptions {
            capacity_bytes: 8 * MIB,
            block_size: 1 << 20,
            kind: NewKind::Dynamic,
            uuid: None,
        },
    );
    made.unwrap();
    fleet
        .ask("add", &json!({"name": "a", "image": fleet.path("a.vdi")}))
        .unwrap();
    let mut driver = Driver::connect(&fleet.path("a.sock"), &Options::new()).unwrap();
    driver.write(0, &[1; 512]);
    assert_eq!(driver.read(0, 512), [1; 512]);
}
