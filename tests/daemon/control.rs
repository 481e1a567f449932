//! Every command of the control socket, against a daemon whose disks are in use.

use serde_json::{Value, json};
use vdi_tests::driver::Driver;

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
        limits = { iops_total = 40 }
        "#,
    );
    let groups = || fleet.ask("list", &json!(null)).unwrap()["groups"].take();
    assert_eq!(
        groups(),
        json!([{"name": "all", "limits": {"iops_total": 40}}])
    );
    assert_eq!(fleet.listed("a")["group"], "all");
    let (mut a, mut b) = (fleet.driver("a"), fleet.driver("b"));
    std::thread::scope(|scope| {
        scope.spawn(|| read(&mut a, 10));
        read(&mut b, 10);
    });
    // Four are in the bucket, and at most as many leaked while the drivers started.
    let waited = fleet.throttled("a") + fleet.throttled("b");
    assert!((8..=16).contains(&waited), "{waited}");
    // Out of the group, nothing is held.
    let before = fleet.throttled("b");
    let left = fleet.ask("leave-group", &json!({"disk": "b"})).unwrap();
    assert_eq!(left["group"], Value::Null);
    read(&mut b, 30);
    assert_eq!(fleet.throttled("b"), before);
    // In another one, with limits of its own beside.
    let table = json!({"name": "few", "limits": {"iops_total": 20, "iops_total_max": 20}});
    assert_eq!(fleet.ask("add-group", &table), Ok(table.clone()));
    let joined = json!({"disk": "b", "group": "few"});
    assert_eq!(fleet.ask("join-group", &joined).unwrap()["group"], "few");
    read(&mut b, 25);
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
