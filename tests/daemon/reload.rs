//! The configuration is read again while its disks are served, by SIGHUP or a command.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use vdi_tests::driver::{Driver, Options, PATIENCE};
use vdi_tests::server::{Launch, Server, scratch, wait_for_listener};
use vdi_tests::{tool, words};

struct Reloading {
    server: Server,
    place: TempDir,
}

const HEAD: &str = "control-socket = \"control\"\nsocket-dir = \".\"\nimage-dirs = [\".\"]\n";

fn disk(name: &str, more: &str) -> String {
    format!("[[disk]]\nname = \"{name}\"\nimage = \"{name}.vdi\"\n{more}\n")
}

impl Reloading {
    /// A daemon for `a` and `b`; there is an image for `c`.
    fn start() -> Self {
        let place = scratch();
        for name in ["a", "b", "c"] {
            let image = place.path().join(format!("{name}.vdi"));
            tool::vdi(words!["create", image, "8M"]).expect_code(0);
        }
        let config = place.path().join("fleet.toml");
        fs::write(&config, format!("{HEAD}{}{}", disk("a", ""), disk("b", ""))).unwrap();
        let server = Launch::bare().arg("--config").arg(config).spawn();
        wait_for_listener(&place.path().join("control"));
        Self { server, place }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// Puts a new file in the place of the configuration, as editors do.
    fn configure(&self, text: &str) {
        fs::write(self.path("new"), text).unwrap();
        fs::rename(self.path("new"), self.path("fleet.toml")).unwrap();
    }

    fn driver(&self, disk: &str) -> Driver {
        Driver::connect(&self.path(&format!("{disk}.sock")), &Options::new()).unwrap()
    }

    fn ask(&self, command: &str, arguments: &Value) -> Value {
        let mut stream = UnixStream::connect(self.path("control")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let line = json!({"version": 1, "execute": command, "arguments": arguments});
        writeln!(stream, "{line}").unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        serde_json::from_str(&answer).unwrap()
    }

    fn reload(&self) -> Value {
        self.ask("reload", &json!(null))
    }

    fn groups(&self) -> Vec<Value> {
        let list = self.ask("list", &json!(null));
        list["return"]["groups"].as_array().unwrap().clone()
    }

    fn limits(&self, disk: &str) -> (Value, Value) {
        let info = self.ask("info", &json!({"disk": disk}));
        let info = &info["return"];
        (info["limits"].clone(), info["group"].clone())
    }

    fn names(&self) -> Vec<String> {
        let list = self.ask("list", &json!(null));
        let disks = list["return"]["disks"].as_array().unwrap().iter();
        let name = |disk: &Value| disk["name"].as_str().unwrap().to_owned();
        disks.map(name).collect()
    }
}

fn did(added: &[&str], removed: &[&str], kept: &[&str]) -> Value {
    let none: [&str; 0] = [];
    json!({"version": 1, "return": {"added": added, "removed": removed, "limited": none, "kept": kept}})
}

#[test]
fn new_disks_come_and_old_ones_go_while_others_are_served() {
    let fleet = Reloading::start();
    let mut a = fleet.driver("a");
    a.write(0, &[1; 512]);
    fleet.configure(&format!("{HEAD}{}{}", disk("a", ""), disk("c", "")));
    assert_eq!(fleet.reload(), did(&["c"], &["b"], &[]));
    assert_eq!(fleet.names(), ["a", "c"]);
    fleet.driver("c").write(0, &[3; 512]);
    assert!(!fleet.path("b.sock").exists());
    tool::vdi(words!["check", fleet.path("b.vdi")]).expect_code(0);
    assert_eq!(a.read(0, 512), [1; 512]);
    assert_eq!(fleet.reload(), did(&[], &[], &[]));
    // And by a signal.
    fleet.configure(&format!("{HEAD}{}{}", disk("a", ""), disk("b", "")));
    // The thread of its front end is at its end.
    let deadline = Instant::now() + PATIENCE;
    while fleet.ask("info", &json!({"disk": "c"}))["return"]["connected"] == true {
        assert!(Instant::now() < deadline);
    }
    fleet.server.signal(Signal::SIGHUP);
    while fleet.names() != ["a", "b"] {
        assert!(Instant::now() < deadline, "{}", fleet.server.log());
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(a);
    let place = fleet.place;
    assert_eq!(fleet.server.terminate().code, Some(0));
    tool::vdi(words!["check", place.path().join("a.vdi")]).expect_code(0);
}

#[test]
fn what_a_front_end_uses_stays_until_it_is_removed() {
    let fleet = Reloading::start();
    let (mut a, mut b) = (fleet.driver("a"), fleet.driver("b"));
    fleet.configure(&format!("{HEAD}{}", disk("a", "num-queues = 3")));
    for _ in 0..2 {
        assert_eq!(fleet.reload(), did(&[], &[], &["a", "b"]));
    }
    a.write(0, &[1; 512]);
    b.write(0, &[2; 512]);
    assert_eq!(b.read(0, 512), [2; 512]);
    for name in ["a", "b"] {
        fleet.ask("remove", &json!({"disk": name}));
    }
    drop((a, b));
    assert_eq!(fleet.reload(), did(&["a"], &[], &[]));
    let mut a = fleet.driver("a");
    assert_eq!(a.config().unwrap().num_queues, 3);
    assert_eq!(a.read(0, 512), [1; 512]);
}

#[test]
fn limits_and_groups_are_those_of_the_file_once_it_says_something_else() {
    let fleet = Reloading::start();
    let mut a = fleet.driver("a");
    let group =
        |rate: u32| format!("[[group]]\nname = \"g\"\nlimits = {{ iops_total = {rate} }}\n");
    let own = "limits = { bps_total = 1048576 }\ngroup = \"g\"";
    let text =
        |rate, own: &str| format!("{HEAD}{}{}{}", group(rate), disk("a", own), disk("b", ""));
    fleet.configure(&text(100, own));
    assert_eq!(fleet.reload()["return"]["limited"], json!(["a"]));
    assert_eq!(
        fleet.limits("a"),
        (json!({"bps_total": 1_048_576}), json!("g"))
    );
    assert_eq!(fleet.limits("b"), (json!({}), json!(null)));
    // It heeds them, and was not asked to come back.
    let before = Instant::now();
    (0..30).for_each(|_| drop(a.read(0, 512)));
    assert!(before.elapsed() > Duration::from_millis(150));
    // What an operator did stays while the file says the same as before.
    let set = |what: &Value| assert!(fleet.ask("set-limits", what)["return"].is_object());
    set(&json!({"disk": "a", "limits": {"iops_total": 7000}}));
    set(&json!({"group": "g", "limits": {"iops_total": 8000}}));
    assert_eq!(fleet.reload(), did(&[], &[], &[]));
    assert_eq!(fleet.limits("a").0, json!({"iops_total": 7000}));
    assert_eq!(fleet.groups()[0]["limits"], json!({"iops_total": 8000}));
    fleet.configure(&text(200, "limits = {}"));
    assert_eq!(fleet.reload()["return"]["limited"], json!(["a"]));
    assert_eq!(fleet.limits("a"), (json!({}), json!(null)));
    assert_eq!(fleet.groups()[0]["limits"], json!({"iops_total": 200}));
    // Defaults are those of disks that say nothing, and of those that are added later.
    fleet.configure(&format!(
        "{HEAD}[defaults]\nlimits = {{ iops_total = 300 }}\n{}{}",
        disk("a", ""),
        disk("b", "")
    ));
    assert_eq!(fleet.reload()["return"]["limited"], json!(["a", "b"]));
    fleet.ask("add", &json!({"name": "c", "image": fleet.path("c.vdi")}));
    for disk in ["a", "b", "c"] {
        assert_eq!(fleet.limits(disk).0, json!({"iops_total": 300}));
    }
    // A group that is gone from the file may have disks.
    assert_eq!(fleet.groups().len(), 1);
}

#[test]
fn what_operators_added_is_theirs() {
    let fleet = Reloading::start();
    fleet.ask(
        "add",
        &json!({"name": "c", "image": fleet.path("c.vdi"), "num-queues": 2}),
    );
    assert_eq!(fleet.reload(), did(&[], &[], &[]));
    assert_eq!(fleet.names(), ["a", "b", "c"]);
}

#[test]
fn a_wrong_file_changes_nothing_and_its_line_is_told() {
    let fleet = Reloading::start();
    let mut a = fleet.driver("a");
    for (text, said) in [
        (format!("{HEAD}[[disk]]\ncash = 1\n"), "line 5"),
        (format!("{HEAD}{}", disk("../x", "")), "line 4"),
        (
            format!(
                "{HEAD}[[group]]\nname = \"new\"\n{}{}",
                disk("c", "group = \"new\""),
                disk("missing", "")
            ),
            "missing cannot be served",
        ),
        (
            HEAD.replace("\"control\"", "\"elsewhere\""),
            "`control-socket` changed",
        ),
        (
            format!("{HEAD}{}", disk("c", "group = \"missing\"")),
            "line 4",
        ),
        (
            format!(
                "{HEAD}[[group]]\nname = \"new\"\n{}",
                disk("c", "num-queues = 0")
            ),
            "line 6",
        ),
        (
            HEAD.replace("image-dirs = [\".\"]", "image-dirs = [\"/tmp\"]"),
            "`image-dirs` changed",
        ),
    ] {
        fleet.configure(&text);
        let answer = fleet.reload();
        assert_eq!(answer["error"]["class"], "not-possible");
        let desc = answer["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(said), "{text}: {desc}");
        assert_eq!(fleet.names(), ["a", "b"]);
        assert!(!fleet.path("c.sock").exists());
        assert!(fleet.groups().is_empty());
    }
    a.write(0, &[1; 512]);
    fleet.server.signal(Signal::SIGHUP);
    let deadline = Instant::now() + PATIENCE;
    while !fleet
        .server
        .log()
        .contains("the configuration was not read again")
    {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(a.read(0, 512), [1; 512]);
    // It is asked by the tool, too.
    let control = fleet.path("control");
    let refused = tool::vdi(words!["ctl", "--socket", control, "reload"]);
    refused.expect_code(1);
    fleet.configure(&format!("{HEAD}{}{}", disk("a", ""), disk("b", "")));
    let done = tool::vdi(words!["ctl", "--json", "--socket", control, "reload"]);
    done.expect_code(0);
}
