//! A new daemon takes over from an old one while guests run: no request fails, no byte is wrong, and if anything goes wrong the
//! old one serves on.
//!
//! Here a driver stands in for the guest; a real one is in `guest.rs`.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

mod failures;
mod fleet;
mod load;

use fleet::Fleet;
use serde_json::json;
use vdi_tests::driver::{Base, Options};
use vdi_tests::{tool, words};

#[test]
fn what_operators_did_goes_over_with_the_disks() {
    let mut fleet = Fleet::start();
    tool::vdi(words!["create", fleet.path("c.vdi"), "8M"]).expect_code(0);
    let add = json!({"name": "c", "image": fleet.path("c.vdi")});
    fleet.ask("add", &add).unwrap();
    fleet.ask("remove", &json!({"disk": "b"})).unwrap();
    let frozen = json!({"disk": "a", "to": fleet.path("frozen.vdi")});
    let mut a = fleet.driver("a", &Options::new());
    a.write(0, &[1; 4096]);
    let serial = a.queue().get_id();
    fleet.ask("snapshot", &frozen).unwrap();
    a.write(8, &[2; 4096]);
    let limits = json!({"disk": "c", "limits": {"iops_total": 50}});
    fleet.ask("set-limits", &limits).unwrap();
    drop(a);

    fleet.upgrade();
    assert_eq!(fleet.names(), ["a", "c"]);
    assert!(fleet.metrics().contains("vdi_vhost_disks 2\n"));
    let mut a = fleet.driver("a", &Options::new());
    assert_eq!(a.read(0, 8192), [[1; 4096], [2; 4096]].concat());
    assert_eq!(a.queue().get_id(), serial, "another disk, for its guest");
    let mut c = fleet.driver("c", &Options::new());
    let before = std::time::Instant::now();
    (0..30).for_each(|_| drop(c.read(0, 512)));
    // A tenth of a second's worth at once, and one more.
    assert!(
        before.elapsed().as_millis() >= 24 * 20 - 20,
        "it is not limited"
    );
    // It can do all that the first one could.
    fleet.ask("remove", &json!({"disk": "c"})).unwrap();
    let back = json!({"name": "b", "image": fleet.path("b.vdi")});
    fleet.ask("add", &back).unwrap();
    drop((a, c));
    let path = fleet.end();
    for image in ["a.vdi", "frozen.vdi", "b.vdi"] {
        tool::vdi(words!["check", path.path().join(image)]).expect_code(0);
    }
    for socket in ["control", "metrics", "sockets/a.sock", "sockets/b.sock"] {
        assert!(!path.path().join(socket).exists(), "{socket} is left");
    }
}

#[test]
fn a_disk_that_waits_for_its_turn_waits_on() {
    let mut fleet = Fleet::start();
    let mut a = fleet.driver("a", &Options::new());
    a.write(0, &[1; 512]);
    let (kept, next) = (a.keep(&Options::new()), a.queue().used_index());
    // A migration is on its way: the image is nobody's.
    a.control.stop(0).unwrap();
    fleet.upgrade();
    tool::vdi(words!["check", fleet.path("a.vdi")]).expect_code(3);
    assert!(!fleet.info("a")["open"].as_bool().unwrap());
    a.control = kept
        .reconnect(&fleet.path("sockets/a.sock"), Base::Used)
        .unwrap();
    assert_eq!(a.queue().used_index(), next);
    assert_eq!(a.read(0, 512), [1; 512]);
    drop(a);
    let place = fleet.end();
    tool::vdi(words!["check", place.path().join("a.vdi")]).expect_code(0);
}

#[test]
fn limits_groups_and_a_pause_go_over_with_the_disks() {
    let mut fleet = Fleet::start();
    let group = json!({"name": "g", "limits": {"iops_total": 50}});
    fleet.ask("add-group", &group).unwrap();
    let empty = json!({"name": "empty", "limits": {"bps_total": 4096}});
    fleet.ask("add-group", &empty).unwrap();
    let join = json!({"disk": "b", "group": "g"});
    fleet.ask("join-group", &join).unwrap();
    let limits = json!({"disk": "b", "limits": {"iops_total": 7000}});
    fleet.ask("set-limits", &limits).unwrap();
    fleet.ask("pause", &json!({"disk": "a"})).unwrap();

    // Twice: what was taken over is handed over.
    for _ in 0..2 {
        fleet.upgrade();
        let list = fleet.ask("list", &json!(null)).unwrap();
        assert_eq!(list["groups"], json!([empty, group]));
        let [a, b] = ["a", "b"].map(|disk| fleet.info(disk));
        assert_eq!((&a["group"], &a["limits"]), (&json!(null), &json!({})));
        assert_eq!(
            (&b["group"], &b["limits"]),
            (&json!("g"), &limits["limits"])
        );
        assert_eq!((&a["paused"], &b["paused"]), (&json!(true), &json!(false)));
    }
    let mut b = fleet.driver("b", &Options::new());
    let before = std::time::Instant::now();
    (0..30).for_each(|_| drop(b.read(0, 512)));
    assert!(
        before.elapsed().as_millis() >= 24 * 20 - 20,
        "the group's limits are not heeded"
    );
    fleet.ask("resume", &json!({"disk": "a"})).unwrap();
    let mut a = fleet.driver("a", &Options::new());
    a.write(0, &[1; 512]);
    assert_eq!(a.read(0, 512), [1; 512]);
    drop((a, b));
    fleet.end();
}

#[test]
fn a_disk_has_workers_of_its_own_at_the_next_daemon_too() {
    let fleet = Fleet::make();
    let config = fleet.path("fleet.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let own = "image = \"a.vdi\"\nworkers = 2\nworker-cpus = \"0\"\n";
    let text = text.replacen("image = \"a.vdi\"", own, 1);
    std::fs::write(&config, format!("spare-workers = 1\n{text}")).unwrap();
    let mut fleet = fleet.launch_next();
    fleet.ask("remove", &json!({"disk": "b"})).unwrap();
    let again = json!({"name": "b", "image": fleet.path("b.vdi"), "workers": 1});
    fleet.ask("add", &again).unwrap();
    for _ in 0..2 {
        for (disk, workers, cpus) in [("a", 2, json!("0")), ("b", 1, json!(null))] {
            let info = fleet.info(disk);
            let found = (&info["workers"], &info["own_workers"], &info["worker_cpus"]);
            assert_eq!(found, (&json!(workers), &json!(true), &cpus), "{disk}");
            let mut driver = fleet.driver(disk, &Options::new());
            driver.write(0, &[1; 512]);
            assert_eq!(driver.read(0, 512), [1; 512]);
        }
        fleet.upgrade();
    }
    // The one that is spare in the file is another one again.
    tool::vdi(words!["create", fleet.path("c.vdi"), "8M"]).expect_code(0);
    let more = json!({"name": "c", "image": fleet.path("c.vdi"), "workers": 1});
    fleet.ask("add", &more).unwrap();
    fleet.end();
}

#[test]
fn what_operators_did_stays_until_the_file_says_something_else_than_before() {
    let mut fleet = Fleet::start();
    let file = fleet.path("fleet.toml");
    let text = std::fs::read_to_string(&file).unwrap();
    let say = |group: u32| {
        let group = format!("[[group]]\nname = \"g\"\nlimits = {{ iops_total = {group} }}\n");
        std::fs::write(&file, text.clone() + &group).unwrap();
    };
    say(1000);
    let reload = |fleet: &Fleet| drop(fleet.ask("reload", &json!(null)).unwrap());
    let groups = |fleet: &Fleet| fleet.ask("list", &json!(null)).unwrap()["groups"].take();
    let limited = |limit: u32| json!([{"name": "g", "limits": {"iops_total": limit}}]);
    reload(&fleet);
    assert_eq!(groups(&fleet), limited(1000));
    let of_group = json!({"group": "g", "limits": {"iops_total": 50}});
    let of_disk = json!({"disk": "b", "limits": {"iops_total": 60}});
    fleet.ask("set-limits", &of_group).unwrap();
    fleet.ask("set-limits", &of_disk).unwrap();
    // In the same daemon, in the next one, and in the one after that.
    for nth in 0..3 {
        reload(&fleet);
        assert_eq!(groups(&fleet), limited(50), "daemon {nth}");
        assert_eq!(fleet.info("b")["limits"], of_disk["limits"], "daemon {nth}");
        fleet.upgrade();
    }
    // What the file says when it takes over is heeded by the next reload.
    say(2000);
    fleet.upgrade();
    assert_eq!(groups(&fleet), limited(50));
    reload(&fleet);
    assert_eq!(groups(&fleet), limited(2000));
    fleet.end();
}

#[test]
fn where_nobody_is_the_new_one_begins_by_itself() {
    let fleet = Fleet::make();
    let fleet = fleet.launch_next();
    assert_eq!(fleet.names(), ["a", "b"]);
    let place = fleet.end();
    assert!(!place.path().join("control").exists());
}
