//! Which threads serve which disks, and on which CPUs.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vdi_tests::driver::{Options, PATIENCE};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, Server};

use crate::fleet::Fleet;
use crate::sandbox::statuses;

/// The CPUs of this process, as the kernel lists them: all, and the first.
pub(crate) fn cpus() -> (String, String) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("Cpus_allowed_list:"));
    let all = line.unwrap().split_once(':').unwrap().1.trim().to_owned();
    let first = all.split([',', '-']).next().unwrap().to_owned();
    (all, first)
}

/// Where threads whose names begin like this may run, by their names.
fn places(server: &Server, names: &str) -> BTreeMap<String, String> {
    let mut all = statuses(server);
    all.retain(|name, _| name.starts_with(names));
    let place = |status: &BTreeMap<String, String>| status["Cpus_allowed_list"].clone();
    all.iter()
        .map(|(name, status)| (name.clone(), place(status)))
        .collect()
}

fn map<const N: usize>(places: [(&str, &str); N]) -> BTreeMap<String, String> {
    places
        .map(|(name, place)| (name.to_owned(), place.to_owned()))
        .into()
}

#[test]
fn shared_workers_run_where_they_are_told_and_other_threads_anywhere() {
    let image = Image::by_qemu(4 * MIB);
    let (all, first) = cpus();
    let launch = |more: &[&str]| {
        let launch = Launch::image(image.path()).args(["--worker-cpus", &first]);
        launch.args(more).start()
    };
    for engine in ["auto", "sync"] {
        let server = launch(&["--engine", engine]);
        let mut driver = server.driver(&Options::new().queues(2));
        driver.write(0, &[1; 4096]);
        driver.flush();
        // What the kernel does for a thread it does there, too.
        let helpers = places(&server, "iou-wrk");
        assert!(helpers.values().all(|place| *place == first), "{helpers:?}");
        assert_eq!(places(&server, "worker"), map([("worker-0", &first)]));
        let others = [("housekeeper-0", &all[..]), ("housekeeper-1", &all)];
        assert_eq!(places(&server, "housekeeper"), map(others));
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
    }
    let server = launch(&["--workers", "2"]);
    drop(server.driver(&Options::new()));
    let both = [("worker-0", &first[..]), ("worker-1", &first)];
    assert_eq!(places(&server, "worker"), map(both));
    assert_eq!(server.terminate().code, Some(0));
    let wrong = Launch::image(image.path())
        .args(["--worker-cpus", "0-1000"])
        .run();
    assert_eq!(wrong.code, Some(2));
    let said = format!("is none of those that this process may use, which are {all}");
    assert!(wrong.log.contains(&said), "{}", wrong.log);
}

impl Fleet {
    fn info(&self, disk: &str) -> Value {
        self.ask("info", &json!({"disk": disk})).unwrap()
    }

    fn workers(&self, disk: &str) -> (Value, Value, Value) {
        let info = self.info(disk);
        let field = |name: &str| info[name].clone();
        (field("workers"), field("own_workers"), field("worker_cpus"))
    }

    /// Adds the disk `c` with these words; the class of the error, if it is refused.
    fn add(&self, more: &Value) -> Result<(), String> {
        let mut table = json!({"name": "c", "image": self.path("c.vdi")});
        let fields = table.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        self.ask("add", &table).map(drop)
    }

    fn remove(&self, disk: &str) {
        self.ask("remove", &json!({"disk": disk})).unwrap();
    }

    /// Uses a disk at both queues.
    fn use_disk(&self, disk: &str) {
        let mut driver = self.driver(disk);
        for (nth, queue) in (1..).zip(&mut driver.queues) {
            queue.write(u64::from(nth) * 8, &[nth; 4096]);
            assert_eq!(queue.read(u64::from(nth) * 8, 4096), [nth; 4096]);
        }
        driver.flush();
        drop(driver);
        while self.info(disk)["connected"] == true {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// How often each of the threads whose names begin like this has waited, once all of them do: whatever woke one of them
/// before this was asked is done.
fn waits(server: &Server, names: &str) -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut all = statuses(server);
        all.retain(|name, _| name.starts_with(names));
        if all.values().all(|status| status["State"].starts_with('S')) {
            let waits =
                |status: &BTreeMap<String, String>| status["voluntary_ctxt_switches"].clone();
            return all.values().map(waits).collect();
        }
        assert!(Instant::now() < deadline, "{names} is never idle");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_disk_has_threads_that_serve_no_other() {
    let fleet = Fleet::start("workers = 1\nspare-workers = 2\n");
    assert_eq!(fleet.workers("a"), (json!(1), json!(false), json!(null)));
    fleet.add(&json!({"workers": 2})).unwrap();
    assert_eq!(fleet.workers("c"), (json!(2), json!(true), json!(null)));
    let before = (waits(&fleet.server, "own"), waits(&fleet.server, "worker"));
    fleet.use_disk("c");
    let after = (waits(&fleet.server, "own"), waits(&fleet.server, "worker"));
    for (own, was) in after.0.iter().zip(&before.0) {
        assert_ne!(own, was, "one of its threads does nothing");
    }
    assert_eq!(after.1, before.1, "it is served by another thread");
    fleet.use_disk("a");
    fleet.use_disk("b");
    assert_eq!(
        waits(&fleet.server, "own"),
        after.0,
        "its threads serve others"
    );
    assert_eq!(fleet.server.terminate().code, Some(0));
}

#[test]
fn threads_of_a_disk_that_goes_are_the_next_ones() {
    let (all, first) = cpus();
    let fleet = Fleet::start("spare-workers = 3\n");
    let too_many = fleet.add(&json!({"workers": 4}));
    assert_eq!(too_many, Err("not-possible".to_owned()));
    let none = fleet.add(&json!({"worker-cpus": "1000"}));
    assert_eq!(none, Err("not-possible".to_owned()));
    for _ in 0..3 {
        fleet
            .add(&json!({"workers": 3, "worker-cpus": first}))
            .unwrap();
        assert_eq!(fleet.workers("c"), (json!(3), json!(true), json!(first)));
        let names = ["own-0", "own-1", "own-2"];
        assert_eq!(
            places(&fleet.server, "own"),
            map(names.map(|name| (name, &first[..])))
        );
        fleet.use_disk("c");
        let dump = fleet.ask("dump", &json!({"disk": "c"})).unwrap();
        let of_threads = dump["threads"].as_array().unwrap();
        assert!(
            of_threads.iter().all(|thread| thread["cpus"] == first),
            "{dump}"
        );
        assert_eq!(of_threads.len(), 3);
        fleet.remove("c");
        fleet.add(&json!({"workers": 3})).unwrap();
        assert_eq!(
            places(&fleet.server, "own"),
            map(names.map(|name| (name, &all[..])))
        );
        fleet.use_disk("c");
        fleet.remove("c");
    }
    fleet.add(&json!({})).unwrap();
    assert_eq!(fleet.workers("c").1, json!(false));
    let spare = places(&fleet.server, "own");
    assert_eq!(spare.len(), 3, "{spare:?}");
    let exit = fleet.server.terminate();
    assert_eq!((exit.code, exit.signal), (Some(0), None), "{}", exit.log);
}

#[test]
fn a_reload_starts_no_threads_and_changes_none() {
    let (_, first) = cpus();
    let fleet = Fleet::start("spare-workers = 2\n");
    let file = fleet.path("fleet.toml");
    let text = fs::read_to_string(&file).unwrap();
    let with_c =
        |more: &str| format!("{text}\n[[disk]]\nname = \"c\"\nimage = \"c.vdi\"\n{more}\n");
    let reload = |text: &str| {
        fs::write(&file, text).unwrap();
        fleet.ask("reload", &json!(null))
    };
    let refused = Err("not-possible".to_owned());
    assert_eq!(reload(&with_c("workers = 3")), refused);
    assert_eq!(
        reload(&text.replace("spare-workers = 2", "spare-workers = 3")),
        refused
    );
    assert_eq!(reload(&format!("workers = 1\n{text}")), refused);
    assert_eq!(fleet.names(), ["a", "b"]);
    let own = format!("workers = 2\nworker-cpus = \"{first}\"");
    assert_eq!(reload(&with_c(&own)).unwrap()["added"], json!(["c"]));
    assert_eq!(fleet.workers("c"), (json!(2), json!(true), json!(first)));
    fleet.use_disk("c");
    // Another number is for when it is served anew.
    assert_eq!(
        reload(&with_c("workers = 1")).unwrap()["kept"],
        json!(["c"])
    );
    assert_eq!(fleet.workers("c").0, json!(2));
    fleet.remove("c");
    assert_eq!(
        reload(&with_c("workers = 1")).unwrap()["added"],
        json!(["c"])
    );
    assert_eq!(fleet.workers("c"), (json!(1), json!(true), json!(null)));
    fleet.use_disk("c");
    assert_eq!(reload(&text).unwrap()["removed"], json!(["c"]));
    assert_eq!(fleet.server.terminate().code, Some(0));
}
