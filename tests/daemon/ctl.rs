//! `vdi ctl` against running daemons: what operators type, what they see, and its exit codes.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use vdi_tests::driver::{Layout, Options, Request};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, wait_for_listener};
use vdi_tests::tool::{self, Answer};
use vdi_tests::words;

use crate::fleet::Fleet;

const PATIENCE: Duration = Duration::from_secs(20);

fn ctl(socket: &Path, words: &[&str]) -> Answer {
    let start = [
        OsStr::new("ctl"),
        OsStr::new("--socket"),
        socket.as_os_str(),
    ];
    let words = words.iter().map(|word| OsStr::new(*word));
    tool::vdi(start.into_iter().chain(words))
}

impl Fleet {
    fn ctl(&self, words: &[&str]) -> Answer {
        ctl(&self.path("control"), words)
    }

    fn ctl_json(&self, words: &[&str]) -> Value {
        let words = [words, &["--json"]].concat();
        self.ctl(&words).expect_code(0).json()
    }
}

#[test]
fn an_operator_adds_grows_freezes_limits_and_removes_a_disk_that_is_used() {
    let fleet = Fleet::start("");
    let image = fleet.path("c.vdi");
    let image = image.to_str().unwrap();
    let shown = fleet.ctl(&["add", "c", image, "--num-queues", "2", "--serial", "C"]);
    assert!(shown.expect_code(0).out.contains("25165824 (24 MiB)"));
    let mut driver = fleet.driver("c");
    driver.write(0, &[7; 4096]);
    assert!(driver.queue().get_id().starts_with(b"C"));

    assert_eq!(
        fleet.ctl_json(&["resize", "c", "+8M"])["size_bytes"],
        32 * MIB
    );
    assert_eq!(
        fleet.ctl_json(&["resize", "c", "40M"])["size_bytes"],
        40 * MIB
    );
    assert_eq!(driver.read(0, 4096), [7; 4096]);
    let frozen = fleet.path("c-monday.vdi");
    fleet
        .ctl(&["snapshot", "c", frozen.to_str().unwrap()])
        .expect_code(0);
    driver.write(0, &[8; 4096]);
    assert!(frozen.exists());

    let (golden, clone) = (fleet.path("golden.vdi"), fleet.path("clone.vdi"));
    let (golden, clone) = (golden.to_str().unwrap(), clone.to_str().unwrap());
    let made = fleet.ctl_json(&["clone", "clone", golden, clone, "--num-queues", "2"]);
    assert_eq!(made["size_bytes"], 24 * MIB);
    let refused = fleet.ctl(&["clone", "other", golden, clone]).expect_code(1);
    assert!(refused.err.contains("(exists): the file "), "{refused:?}");
    fleet.ctl(&["remove", "clone"]).expect_code(0);

    fleet
        .ctl(&["set-limits", "c", "iops_total=1000", "bps_total=10M"])
        .expect_code(0);
    fleet.ctl(&["set-limits", "c", "none"]).expect_code(0);

    let listed = fleet.ctl(&["list"]).expect_code(0).out;
    let rows: Vec<Vec<&str>> = listed
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let header = ["NAME", "SIZE", "STATE", "GROUP", "IMAGE", "SOCKET"];
    assert_eq!(rows[0], header);
    assert_eq!(rows[1][..5], ["a", "24", "MiB", "idle", "-"]);
    assert_eq!(rows[3][..5], ["c", "40", "MiB", "in", "use"]);
    assert_eq!(fleet.ctl_json(&["info", "c"])["connected"], true);

    // What is answered may not be counted yet; of a stopped ring all is.
    driver.control.stop(0).unwrap();
    let stats = fleet.ctl(&["stats", "c"]).expect_code(0).out;
    let writes = stats.lines().find(|line| line.starts_with("write "));
    let writes: Vec<&str> = writes.unwrap().split_whitespace().collect();
    assert_eq!(writes[..5], ["write", "2", "0", "8", "KiB"]);
    let all = fleet.ctl(&["stats"]).expect_code(0).out;
    assert_eq!(all.lines().count(), 4, "{all}");
    assert_eq!(
        fleet.ctl_json(&["stats"])["disks"][2]["write"]["requests"],
        2
    );

    assert_eq!(fleet.ctl(&["remove", "c"]).expect_code(0).out, "");
    assert!(!fleet.ctl(&["list"]).out.contains("c.vdi"));
    fleet.ctl(&["shutdown"]).expect_code(0);
    assert_eq!(fleet.server.wait().code, Some(0));
}

#[test]
fn an_operator_gives_a_disk_threads_of_its_own_and_sees_them() {
    let fleet = Fleet::start("spare-workers = 1\n");
    let (image, (_, first)) = (fleet.path("c.vdi"), crate::workers::cpus());
    let add = ["add", "c", image.to_str().unwrap(), "--worker-cpus", &first];
    let refused = fleet.ctl(&[&add[..], &["--workers", "2"]].concat());
    let refused = refused.expect_code(1).err;
    let said =
        "(not-possible): the disk wants 2 workers of its own, and 1 are left; `spare-workers` in";
    assert!(refused.contains(said), "{refused}");
    let shown = fleet.ctl(&add).expect_code(0).out;
    for (field, value) in [
        ("workers:", "1"),
        ("own workers:", "yes"),
        ("worker cpus:", &first),
    ] {
        let line = shown.lines().find_map(|line| line.strip_prefix(field));
        assert_eq!(line.map(str::trim), Some(value), "{shown}");
    }
    let mut driver = fleet.driver("c");
    driver.write(0, &[7; 4096]);
    let dump = fleet.ctl(&["dump", "c"]).expect_code(0).out;
    let place = format!("\nTHREAD 0, CPU {first}\n");
    assert!(dump.contains(&place), "{dump}");
    drop(driver);
    fleet.ctl(&["shutdown"]).expect_code(0);
    assert_eq!(fleet.server.wait().code, Some(0));
}

/// What stands in a table in the row that begins with `first`.
fn row<'a>(text: &'a str, first: &str) -> Vec<&'a str> {
    let rows = text.lines().map(|line| line.split_whitespace().collect());
    let found = rows
        .into_iter()
        .find(|row: &Vec<_>| row.first() == Some(&first));
    found.unwrap_or_else(|| panic!("no {first} in {text}"))
}

#[test]
fn groups_hold_their_disks_and_a_dump_shows_what_waits() {
    let fleet = Fleet::start("");
    let quiet = |words: &[&str]| assert_eq!(fleet.ctl(words).expect_code(0).out, "", "{words:?}");
    quiet(&["add-group", "t", "iops_total=50000", "bps_total=100M"]);
    let image = fleet.path("c.vdi");
    let image = image.to_str().unwrap();
    let limit = "--limit=bps_total_max_length=2";
    let limits = ["--limit=bps_total=1G", "--limit=bps_total_max=2G", limit];
    let add = [&["add", "c", image, "--group", "t"], &limits[..]].concat();
    let added = fleet.ctl(&add).expect_code(0).out;
    let own = "bps_total=1024M bps_total_max=2048M bps_total_max_length=2";
    assert!(added.contains(own), "{added}");
    let listed = fleet.ctl(&["list"]).expect_code(0).out;
    assert_eq!(row(&listed, "c")[..5], ["c", "24", "MiB", "idle", "t"]);
    let group = ["t", "bps_total=100M", "iops_total=50000"];
    assert_eq!(row(&listed, "t"), group);

    let mut driver = fleet.driver("c");
    quiet(&["set-limits", "c", "none"]);
    quiet(&["set-limits", "--group", "t", "iops_total=1"]);
    let request = || Request::write(0, vec![0x53; 512]);
    // One a second: some are left however long it takes to ask.
    let tokens = [(); 20].map(|()| driver.queue().submit(&request(), &Layout::framed()));
    let deadline = Instant::now() + PATIENCE;
    while fleet.ctl_json(&["dump", "c"])["held_seats"] != 1 {
        assert!(Instant::now() < deadline, "nothing is held");
    }
    let dump = fleet.ctl(&["dump", "c"]).expect_code(0).out;
    for said in ["group limits: iops_total=1\n", "\nIMAGE\n", "held for: "] {
        assert!(dump.contains(said), "no {said:?} in {dump}");
    }
    let threads = dump.matches("\nTHREAD ").count();
    assert!((1..=2).contains(&threads), "{dump}");
    assert!(!dump.contains("SSSS") && dump.lines().count() < 100);
    quiet(&["set-limits", "--group", "t", "none"]);
    for token in tokens {
        let _status = driver.queue().wait(token).expect_ok();
    }

    let refused = fleet.ctl(&["remove-group", "t"]).expect_code(1).err;
    assert!(refused.contains("(in-use): the group t has disks; c is one; `vdi ctl leave-group`"));
    quiet(&["leave-group", "c"]);
    quiet(&["join-group", "a", "t"]);
    let listed = fleet.ctl(&["list"]).expect_code(0).out;
    assert_eq!((row(&listed, "a")[4], row(&listed, "c")[5]), ("t", "-"));
    assert_eq!(row(&listed, "t"), ["t", "none"]);
    quiet(&["leave-group", "a"]);
    quiet(&["remove-group", "t"]);
    assert!(!fleet.ctl(&["list"]).out.contains("LIMITS"));
}

#[test]
fn a_disk_pauses_and_is_merged_and_the_log_says_more() {
    let fleet = Fleet::start("");
    let (base, image) = (fleet.path("base.vdi"), fleet.path("d.vdi"));
    tool::vdi(words!["create", base, "64M"]).expect_code(0);
    tool::vdi(words!["snapshot", base, image]).expect_code(0);
    let image = image.to_str().unwrap();
    fleet.ctl(&["add", "d", image]).expect_code(0);
    let mut driver = fleet.driver("d");
    driver.write(0, &vec![7; 8 << 20]);

    assert_eq!(fleet.ctl(&["pause", "d"]).expect_code(0).out, "");
    let token = driver
        .queue()
        .submit(&Request::read(0, 512), &Layout::framed());
    let listed = fleet.ctl(&["list"]).expect_code(0).out;
    assert_eq!(row(&listed, "d")[3], "paused");
    assert_eq!(fleet.ctl_json(&["stats", "d"])["read"]["requests"], 0);
    assert_eq!(fleet.ctl_json(&["resume", "d"])["paused"], false);
    assert_eq!(driver.queue().wait(token).expect_ok()[..512], [7; 512]);

    let level = fleet.ctl(&["log-level"]).expect_code(0).out;
    let changed = fleet.ctl(&["log-level", "debug"]).expect_code(0).out;
    let both = format!("debug (before: {})\n", level.trim_end());
    assert!(changed.ends_with(&both), "{changed}");
    let now = fleet.ctl(&["log-level"]).expect_code(0).out;
    assert!(now.ends_with("debug\n"), "{now}");
    fleet.ctl(&["log-level", "loud=loud"]).expect_code(1);

    assert_eq!(fleet.ctl(&["jobs"]).expect_code(0).out.lines().count(), 1);
    let begun = fleet.ctl(&["commit", "d"]).expect_code(0).out;
    assert!(begun.contains("disk:"), "{begun}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let jobs = fleet.ctl(&["jobs"]).expect_code(0).out;
        match row(&jobs, "d")[..3] {
            [_, "commit", "done"] => {
                break assert_eq!(row(&jobs, "d")[3..], ["8", "MiB", "8", "MiB"]);
            }
            _ => assert!(Instant::now() < deadline, "{jobs}"),
        }
    }
    assert_eq!(fleet.ctl_json(&["cancel", "d"])["state"], "done");
    assert_eq!(driver.read(0, 512), [7; 512]);
    let begun = fleet.ctl_json(&["commit", "--keep", "d"]);
    assert_eq!(
        (begun["state"].as_str(), begun["kept"].as_str()),
        (Some("running"), None)
    );
    let deadline = Instant::now() + PATIENCE;
    let kept = format!("{}.merged", fleet.path("d.vdi").display());
    while row(&fleet.ctl(&["jobs"]).expect_code(0).out, "d").last() != Some(&&*kept) {
        assert!(Instant::now() < deadline, "nothing is kept");
    }
    assert!(std::path::Path::new(&kept).exists());
    let refused = fleet.ctl(&["cancel", "a"]).expect_code(1).err;
    assert!(refused.contains("nothing was begun for the disk a"));
}

#[test]
fn what_a_daemon_refuses_is_told_with_its_class_and_what_to_do() {
    let fleet = Fleet::start("");
    let image = fleet.path("c.vdi");
    let image = image.to_str().unwrap();
    for (words, said) in [
        (
            &["info", "x"][..],
            "(no-such-disk): there is no disk called x; `vdi ctl list` shows",
        ),
        (&["info"], "(no-such-disk): there are 2 disks"),
        (&["add", "a", image], "(exists): a disk called a is there"),
        (&["add", "x", "/etc/passwd"], "(not-open): "),
        (
            &["add", "x", image, "--num-queues", "0"],
            "(not-possible): num-queues is 0",
        ),
        (
            &["set-limits", "a", "iops=5"],
            "(not-understood): no command: unknown field `iops`",
        ),
        (
            &["set-limits", "a", "none", "iops_total=5"],
            "`none` ends all limits",
        ),
        (&["resize", "a", "1M"], "can only grow while it is served"),
        (&["resize", "a", "1MB"], "is a power of 1000 to some"),
        (&["raw", "5"], "a message is one object"),
        (&["destroy", "a"], "unrecognized subcommand"),
    ] {
        let answer = fleet.ctl(words).expect_code(1);
        assert!(answer.err.contains(said), "{words:?}: {answer:?}");
        assert_eq!(answer.out, "", "{words:?}");
    }
    assert_eq!(fleet.names(), ["a", "b"]);
}

#[test]
fn any_message_can_be_sent_as_it_is() {
    let fleet = Fleet::start("");
    let list = fleet.ctl(&["raw", r#"{"version": 1, "execute": "list"}"#]);
    let list = list.expect_code(0).json();
    assert_eq!(list["return"]["disks"][1]["name"], "b");
    let refused = fleet.ctl(&["raw", r#"{"version": 9, "execute": "list"}"#]);
    let refused = refused.expect_code(1).json();
    assert_eq!(refused["error"]["class"], "not-understood");
}

#[test]
fn the_only_disk_of_a_daemon_need_not_be_named() {
    let image = Image::by_qemu(8 * MIB);
    let place = tempfile::tempdir().unwrap();
    let control = place.path().join("control");
    let server = Launch::image(image.path())
        .arg("--control-socket")
        .arg(&control)
        .start();
    wait_for_listener(&control);
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 512]);
    driver.control.stop(0).unwrap();
    let info = ctl(&control, &["info"]).expect_code(0).out;
    assert!(info.contains("8388608 (8 MiB)"), "{info}");
    let stats = ctl(&control, &["stats", "--json"]).expect_code(0).json();
    assert_eq!(stats["disks"][0]["name"], "disk");
    assert_eq!(stats["disks"][0]["write"]["bytes"], 512);
    ctl(&control, &["resize", "disk", "9M"]).expect_code(0);
    ctl(&control, &["shutdown"]).expect_code(0);
    assert_eq!(server.wait().code, Some(0));
}

#[test]
fn that_nobody_answers_has_an_exit_code_of_its_own() {
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("control");
    let answer = ctl(&socket, &["list"]).expect_code(2);
    assert!(answer.err.contains("--control-socket"), "{answer:?}");
    // One that hears and says nothing.
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let answer = ctl(&socket, &["list"]).expect_code(2);
    thread.join().unwrap();
    assert!(
        answer.err.contains("hung up without an answer"),
        "{answer:?}"
    );
    fs::remove_file(socket).unwrap();
}
