//! Every command of the control socket, against a daemon whose disks are in use.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vdi_tests::driver::{Driver, Layout, PATIENCE, Request};
use vdi_tests::image::MIB;
use vdi_tests::load::{DISK_SECTORS, Load, Mix, disk_after};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server, scratch, wait_for_listener};
use vdi_tests::soon::soon;
use vdi_tests::stop::StopOnDrop;
use vdi_tests::{operator, tool, words};

use crate::fleet::Fleet;

impl Fleet {
    /// What a disk's list entry says.
    fn listed(&self, disk: &str) -> Value {
        let list = self.ask("list", &json!(null)).unwrap();
        let mut disks = list["disks"].as_array().unwrap().iter();
        let found = disks.find(|entry| entry["name"] == disk);
        found.unwrap().clone()
    }

    /// Requests of a disk that waited for a limit.
    fn throttled(&self, disk: &str) -> u64 {
        let stats = self.ask("stats", &json!({"disk": disk})).unwrap();
        stats["throttled_requests"].as_u64().unwrap()
    }
}

/// Reads and checks so many times.
fn read(driver: &mut Driver, times: u64) {
    for nth in 0..times {
        assert_eq!(driver.read(nth * 64, 512), [5; 512]);
    }
}

#[test]
fn limits_and_groups_come_from_the_file_and_from_operators() {
    let fleet = Fleet::start(
        r#"
        [defaults]
        group = "all"
        [[group]]
        name = "all"
        limits = { iops_total = 5 }
        "#,
    );
    let groups = || fleet.ask("list", &json!(null)).unwrap()["groups"].take();
    assert_eq!(
        groups(),
        json!([{"name": "all", "limits": {"iops_total": 5}}])
    );
    assert_eq!(fleet.listed("a")["group"], "all");
    let (mut a, mut b) = (fleet.driver("a"), fleet.driver("b"));
    std::thread::scope(|scope| {
        scope.spawn(|| read(&mut a, 4));
        read(&mut b, 4);
    });
    // One goes over the brim at once, the others every fifth of a second.
    let waited = fleet.throttled("a") + fleet.throttled("b");
    assert!((2..=7).contains(&waited), "{waited}");
    // Out of the group, nothing is held.
    let before = fleet.throttled("b");
    let left = fleet.ask("leave-group", &json!({"disk": "b"})).unwrap();
    assert_eq!(left["group"], Value::Null);
    read(&mut b, 30);
    assert_eq!(fleet.throttled("b"), before);
    // In another one, with limits of its own beside.
    let table = json!({"name": "few", "limits": {"iops_total": 2}});
    assert_eq!(fleet.ask("add-group", &table), Ok(table.clone()));
    let joined = json!({"disk": "b", "group": "few"});
    assert_eq!(fleet.ask("join-group", &joined).unwrap()["group"], "few");
    read(&mut b, 3);
    let held = fleet.throttled("b");
    assert!(held > before, "{held}");
    let free = json!({"group": "few", "limits": {}});
    fleet.ask("set-limits", &free).unwrap();
    read(&mut b, 30);
    assert_eq!(fleet.throttled("b"), held);
    // A disk that is added says what it may do.
    let own = json!({"iops_total": 100, "iops_total_max": 200, "iops_total_max_length": 3});
    let table = json!({"name": "c", "image": fleet.path("c.vdi"), "group": "few", "limits": own});
    fleet.ask("add", &table).unwrap();
    let c = fleet.listed("c");
    assert_eq!((&c["group"], &c["limits"]), (&json!("few"), &own));
    read(&mut fleet.driver("c"), 5);
    fleet.ask("remove", &json!({"disk": "c"})).unwrap();
    fleet.ask("leave-group", &json!({"disk": "b"})).unwrap();
    let gone = json!({"group": "few"});
    fleet.ask("remove-group", &gone).unwrap();
    assert_eq!(groups().as_array().unwrap().len(), 1);
}

#[test]
fn what_is_wrong_about_groups_changes_nothing() {
    let fleet = Fleet::start("[[group]]\nname = \"all\"\n");
    let all = json!({"disk": "a", "group": "all"});
    fleet.ask("join-group", &all).unwrap();
    let before = fleet.ask("list", &json!(null)).unwrap();
    let c = fleet.path("c.vdi");
    for (command, arguments, class) in [
        ("add-group", json!({"name": "all"}), "exists"),
        ("add-group", json!({"name": "a\nb"}), "not-possible"),
        (
            "add-group",
            json!({"name": "b", "limit": {}}),
            "not-understood",
        ),
        ("remove-group", json!({"group": "all"}), "in-use"),
        ("remove-group", json!({"group": "some"}), "no-such-group"),
        (
            "join-group",
            json!({"disk": "a", "group": "some"}),
            "no-such-group",
        ),
        (
            "join-group",
            json!({"disk": "x", "group": "all"}),
            "no-such-disk",
        ),
        ("join-group", json!({"disk": "a"}), "not-understood"),
        ("leave-group", json!({}), "no-such-disk"),
        (
            "set-limits",
            json!({"group": "some", "limits": {}}),
            "no-such-group",
        ),
        (
            "set-limits",
            json!({"disk": "a", "group": "all", "limits": {}}),
            "not-understood",
        ),
        (
            "set-limits",
            json!({"disk": "a", "limits": {"bps_total": -1}}),
            "not-understood",
        ),
        (
            "add",
            json!({"name": "x", "image": c, "group": "some"}),
            "no-such-group",
        ),
    ] {
        let answer = fleet.ask(command, &arguments);
        assert_eq!(answer, Err(class.to_owned()), "{command} {arguments}");
        assert_eq!(fleet.ask("list", &json!(null)).unwrap(), before);
    }
}

/// Ticks of a processor that a process has used, a hundred in a second.
fn ticks(server: &Server) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", server.pid())).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let fields: Vec<_> = fields.split(' ').collect();
    let number = |nth: usize| fields[nth].parse::<u64>().unwrap();
    number(11) + number(12)
}

impl Fleet {
    /// A disk of zeros called `d`, and a driver of two queues.
    fn add_disk(&self) -> Driver {
        let size = (DISK_SECTORS * 512).to_string();
        tool::vdi(words!["create", self.path("d.vdi"), size]).expect_code(0);
        let table = json!({"name": "d", "image": self.path("d.vdi")});
        self.ask("add", &table).unwrap();
        self.driver("d")
    }

    /// Does something while the disk is under load, until that ends; what the disk must hold then.
    fn under_load(&self, driver: &mut Driver, what: impl FnOnce()) -> Vec<u8> {
        let mut random = Random::printed();
        let loads = || Load::new(random.fork(), 2, Mix::Everything);
        let mut loads: Vec<_> = std::iter::repeat_with(loads).take(2).collect();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop = &stop;
            let _stop = StopOnDrop::new(stop);
            for (queue, load) in driver.queues.iter_mut().zip(&mut loads) {
                scope.spawn(move || load.run(queue, || !stop.load(Ordering::Relaxed)));
            }
            self.wait_for_requests("d");
            what();
            self.wait_for_requests("d");
        });
        disk_after(&loads)
    }

    /// Waits until so many more requests were answered that some were taken after this was called.
    fn wait_for_requests(&self, disk: &str) {
        let first = self.answered(disk);
        let deadline = Instant::now() + PATIENCE;
        while self.answered(disk) < first + 100 {
            assert!(Instant::now() < deadline, "nothing is answered");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn answered(&self, disk: &str) -> u64 {
        let stats = self.ask("stats", &json!({"disk": disk})).unwrap();
        let kinds = ["read", "write", "flush", "discard", "write_zeroes"];
        let of = |kind| stats[kind]["requests"].as_u64().unwrap();
        kinds.map(of).iter().sum()
    }

    /// Removes the disk and compares what its image holds.
    fn expect_contents(&self, expected: &[u8]) {
        self.ask("remove", &json!({"disk": "d"})).unwrap();
        let raw = self.path("raw");
        tool::vdi(words![
            "convert",
            "--force",
            "-O",
            "raw",
            self.path("d.vdi"),
            raw
        ])
        .expect_code(0);
        let found = fs::read(raw).unwrap();
        assert!(found[..expected.len()] == *expected, "the image differs");
        tool::vdi(words!["check", self.path("d.vdi")]).expect_code(0);
    }
}

#[test]
fn a_paused_disk_answers_what_it_took_and_nothing_else_until_it_is_resumed() {
    let fleet = Fleet::start("");
    let mut driver = fleet.add_disk();
    let d = json!({"disk": "d"});
    let expected = fleet.under_load(&mut driver, || {
        for _ in 0..3 {
            assert_eq!(fleet.ask("pause", &d).unwrap()["paused"], true);
            let stats = fleet.ask("stats", &d).unwrap();
            assert_eq!(stats["in_flight_requests"], 0);
            let answered = fleet.answered("d");
            // Though its rings are full. What was answered may leave something to do.
            soon(Duration::from_millis(40), || {
                let before = ticks(&fleet.server);
                std::thread::sleep(Duration::from_millis(300));
                Duration::from_millis((ticks(&fleet.server) - before) * 10)
            });
            assert_eq!(fleet.answered("d"), answered);
            assert_eq!(fleet.listed("d")["paused"], true);
            assert_eq!(fleet.listed("a")["paused"], false);
            // What stops all rings for a while starts none of them.
            let to = fleet.path(&format!("d-{answered}.vdi"));
            let command = json!({"disk": "d", "to": to});
            fleet.ask("snapshot", &command).unwrap();
            fleet.ask("pause", &d).unwrap();
            assert_eq!(fleet.answered("d"), answered);
            assert_eq!(fleet.ask("resume", &d).unwrap()["paused"], false);
            fleet.wait_for_requests("d");
        }
        fleet.ask("resume", &d).unwrap();
    });
    drop(driver);
    fleet.expect_contents(&expected);
}

#[test]
fn a_pause_outlives_front_ends_and_lets_them_go() {
    let fleet = Fleet::start("");
    let a = json!({"disk": "a"});
    // Without a front end.
    fleet.ask("pause", &a).unwrap();
    for _ in 0..2 {
        let mut driver = fleet.driver("a");
        let token = driver
            .queue()
            .submit(&Request::read(8, 512), &Layout::framed());
        let soon = Duration::from_millis(100);
        assert!(driver.queue().wait_within(token, soon).is_none());
        // A front end that says again what it wants gets no more by that.
        driver.control.enable(0, true).unwrap();
        assert!(driver.queue().wait_within(token, soon).is_none());
        // It stops with a chain in the ring that nobody took.
        assert_eq!(driver.control.stop(0).unwrap(), 0);
    }
    let mut driver = fleet.driver("a");
    let token = driver
        .queue()
        .submit(&Request::read(8, 512), &Layout::framed());
    fleet.ask("resume", &a).unwrap();
    assert_eq!(driver.queue().wait(token).expect_ok(), [5; 512]);
    // One that was paused ends all the same.
    fleet.ask("pause", &a).unwrap();
    fleet.ask("remove", &a).unwrap();
    drop(driver);
    tool::vdi(words!["check", fleet.path("a.vdi")]).expect_code(0);
}

#[test]
fn every_command_is_carried_out_while_the_disk_is_in_use() {
    let fleet = Fleet::start("[[group]]\nname = \"all\"\n");
    let mut driver = fleet.add_disk();
    let c = json!({"name": "c", "image": fleet.path("c.vdi")});
    let frozen = fleet.path("frozen.vdi");
    let larger = DISK_SECTORS * 512 + 4 * MIB;
    let limits = json!({"iops_total": 500, "bps_total": 100 * MIB});
    let expected = fleet.under_load(&mut driver, || {
        for (command, arguments) in [
            ("list", json!(null)),
            ("info", json!({"disk": "d"})),
            ("stats", json!({"disk": "d"})),
            ("dump", json!({"disk": "d"})),
            ("set-limits", json!({"disk": "d", "limits": limits})),
            ("join-group", json!({"disk": "d", "group": "all"})),
            (
                "set-limits",
                json!({"group": "all", "limits": {"iops_total": 400}}),
            ),
            ("set-limits", json!({"disk": "d", "limits": {}})),
            ("dump", json!({"disk": "d"})),
            ("leave-group", json!({"disk": "d"})),
            ("pause", json!({"disk": "d"})),
            ("dump", json!({"disk": "d"})),
            ("resume", json!({"disk": "d"})),
            ("resize", json!({"disk": "d", "size_bytes": larger})),
            ("snapshot", json!({"disk": "d", "to": frozen})),
            ("log-level", json!({"level": "debug"})),
            ("add", c.clone()),
            ("remove", json!({"disk": "c"})),
            ("log-level", json!({"level": "info"})),
        ] {
            let answer = fleet.ask(command, &arguments);
            assert!(answer.is_ok(), "{command} {arguments}: {answer:?}");
            if command != "pause" && fleet.listed("d")["paused"] == false {
                fleet.wait_for_requests("d");
            }
        }
    });
    assert_eq!(fleet.listed("d")["size_bytes"], larger);
    drop(driver);
    fleet.expect_contents(&expected);
}

#[test]
fn a_shutdown_answers_what_was_taken_and_closes_the_image_clean() {
    let fleet = Fleet::start("");
    let mut driver = fleet.driver("a");
    let mut written = Vec::new();
    for nth in 0..32_u8 {
        let request = Request::write(u64::from(nth) * 64, vec![nth + 10; 4096]);
        written.push((driver.queue().submit(&request, &Layout::framed()), nth));
    }
    // At least one was taken.
    let (first, answer) = driver.queue().wait_any();
    let _nothing = answer.expect_ok();
    let mut done = vec![first];
    fleet.ask("shutdown", &json!(null)).unwrap();
    let Fleet { server, place } = fleet;
    assert_eq!(server.wait().code, Some(0));
    for (token, answer) in driver.queue().answered() {
        let _nothing = answer.expect_ok();
        done.push(token);
    }
    let (image, raw) = (place.path().join("a.vdi"), place.path().join("raw"));
    tool::vdi(words!["check", image]).expect_code(0);
    tool::vdi(words!["convert", "-O", "raw", image, raw]).expect_code(0);
    let found = fs::read(raw).unwrap();
    for (token, nth) in written {
        if done.contains(&token) {
            let at = usize::from(nth) * 64 * 512;
            assert_eq!(found[at..at + 4096], [nth + 10; 4096]);
        }
    }
}

#[test]
fn the_log_tells_more_when_an_operator_wants_it() {
    let fleet = Fleet::start("");
    let level = |level: &str| fleet.ask("log-level", &json!({"level": level}));
    let told = fleet.ask("log-level", &json!(null)).unwrap();
    assert_eq!(told["level"], told["before"]);
    drop(fleet.driver("a"));
    assert!(!fleet.server.log().contains("queue 0 is started"));
    for wrong in ["debgu", "", "loud"] {
        assert_eq!(level(wrong), Err("not-understood".to_owned()));
    }
    let changed = level("debug").unwrap();
    assert_eq!(changed["before"], told["level"]);
    assert!(changed["level"].as_str().unwrap().contains("debug"));
    drop(fleet.driver("a"));
    fleet.server.expect_log("queue 0 is started");
    // What was told can be said.
    let before = changed["before"].as_str().unwrap();
    assert_eq!(level(before).unwrap()["level"], told["level"]);
}

#[test]
fn a_dump_shows_where_requests_are_and_no_data() {
    let fleet = Fleet::start("[[group]]\nname = \"all\"\nlimits = { iops_total = 1 }\n");
    let dump = |disk: &str| fleet.ask("dump", &json!({"disk": disk})).unwrap();
    let idle = dump("a");
    assert_eq!(idle["connected"], false);
    assert_eq!(idle["control"]["rings"], json!([]));
    assert_eq!(idle["control"]["image"]["images"], 2);
    assert!(
        idle["threads"]
            .as_array()
            .unwrap()
            .iter()
            .all(|thread| thread["seat"].is_null())
    );
    let mut driver = fleet.driver("a");
    read(&mut driver, 1);
    fleet
        .ask("join-group", &json!({"disk": "a", "group": "all"}))
        .unwrap();
    let secret = vec![0x53; 512];
    // One a second: some are left however long it takes to ask.
    for _ in 0..20 {
        driver
            .queue()
            .submit(&Request::write(0, secret.clone()), &Layout::framed());
    }
    let deadline = Instant::now() + PATIENCE;
    let held = loop {
        let dump = dump("a");
        // Who is busy for long is left out.
        let told = |thread: &Value| thread["silent"] == false;
        let all_told =
            dump["control"].is_object() && dump["threads"].as_array().unwrap().iter().all(told);
        if dump["held_seats"] == 1 && all_told {
            break dump;
        }
        assert!(Instant::now() < deadline, "nothing is held: {dump}");
    };
    assert_eq!(
        (&held["connected"], &held["group"]),
        (&json!(true), &json!("all"))
    );
    assert_eq!(held["group_limits"]["iops_total"], 1);
    assert_eq!(held["control"]["rings"].as_array().unwrap().len(), 2);
    let threads = held["threads"].as_array().unwrap().iter();
    let seats = threads.filter(|thread| !thread["seat"].is_null());
    let queues = seats.flat_map(|thread| thread["seat"]["queues"].as_array().unwrap());
    let queue = queues.clone().find(|queue| queue["queue"] == 0).unwrap();
    assert_eq!(queues.count(), 2);
    let number = |what: &str| queue[what].as_u64().unwrap();
    assert!(number("next_available") < number("available"), "{queue}");
    assert_eq!(
        (number("available"), &queue["mode"]),
        (21, &json!("running"))
    );
    let text = held.to_string();
    assert!(text.len() < 16 << 10, "{} bytes", text.len());
    assert!(!text.contains("SSSS"));
    fleet.ask("leave-group", &json!({"disk": "a"})).unwrap();
}

#[test]
fn a_disk_is_limited_under_load_whatever_its_engine() {
    for cache in ["direct", "writeback"] {
        let fleet = Fleet::start(&format!("[defaults]\ncache = \"{cache}\"\n"));
        let mut driver = fleet.add_disk();
        let limits = json!({"bps_total": 6 * MIB, "iops_total": 300});
        fleet
            .ask("set-limits", &json!({"disk": "d", "limits": limits}))
            .unwrap();
        let begun = Instant::now();
        let expected = fleet.under_load(&mut driver, || {
            std::thread::sleep(Duration::from_millis(500));
            let stats = fleet.ask("stats", &json!({"disk": "d"})).unwrap();
            let bytes = |kind: &str| stats[kind]["bytes"].as_u64().unwrap();
            let moved = bytes("read") + bytes("write");
            // A tenth of a second's in the bucket, and one request of each queue that goes over its brim.
            let most = 6 * MIB * u64::try_from(begun.elapsed().as_millis() + 100).unwrap() / 1000;
            assert!(moved <= most + MIB, "{moved} of {most}");
            assert!(stats["throttled_requests"].as_u64().unwrap() > 0);
            fleet
                .ask("set-limits", &json!({"disk": "d", "limits": {}}))
                .unwrap();
        });
        drop(driver);
        fleet.expect_contents(&expected);
    }
}

#[test]
fn a_daemon_of_one_disk_makes_no_files_and_says_so() {
    let place = scratch();
    let path = |name: &str| place.path().join(name);
    let (image, control) = (path("disk.vdi"), path("control"));
    tool::vdi(words!["create", image, "8M"]).expect_code(0);
    let launch = Launch::image(&image).arg("--control-socket").arg(&control);
    let server = launch.start();
    wait_for_listener(&control);
    let new = json!({"name": "x", "image": path("x.vdi"), "socket": path("x")});
    let clone = json!({"of": image, "add": new});
    let add = json!({"name": "y", "image": image, "socket": path("y")});
    for (command, arguments) in [
        ("snapshot", json!({"to": path("frozen.vdi")})),
        ("commit", json!(null)),
        ("clone", clone),
        ("add", add),
    ] {
        let answer = operator::ask(&control, command, &arguments);
        assert_eq!(answer, Err("not-possible".to_owned()), "{command}");
    }
    let log = server.log();
    assert_eq!(log.matches("makes no files").count(), 4, "{log}");
    assert_eq!(server.terminate().code, Some(0));
    let left = fs::read_dir(place.path()).unwrap().count();
    assert_eq!(left, 1, "only the image");
}
