//! An upgrade that fails, at each point where it can: the old daemon serves on.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};
use vdi_core::{Access, HostFile, Locking};
use vdi_tests::driver::{Base, Driver, Options, PATIENCE};
use vdi_tests::random::Random;

use crate::fleet::Fleet;

/// The new daemon, played: it does what it is told here, and drops the descriptors.
struct Played(BufReader<UnixStream>);

impl Played {
    fn connect(fleet: &Fleet) -> Self {
        let stream = UnixStream::connect(fleet.path("control")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    /// Takes a step; the answer.
    fn step(&mut self, name: &str) -> Value {
        let line = json!({"version": 1, "execute": name});
        writeln!(self.0.get_mut(), "{line}").unwrap();
        self.line()
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Is offered all disks.
    fn is_offered(&mut self) -> Vec<Value> {
        let offer = self.step("hand-over");
        if offer["return"]["metrics"].is_string() {
            // Their socket comes with a line of its own, without words.
            self.0.read_line(&mut String::new()).unwrap();
        }
        let count = offer["return"]["disks"].as_u64().unwrap();
        (0..count).map(|_| self.line()).collect()
    }
}

/// The front end that was there is there, and was never away.
fn expect_undisturbed(driver: &mut Driver, fleet: &mut Fleet) {
    driver.write(8, &[7; 512]);
    assert_eq!(driver.read(8, 512), [7; 512]);
    driver.config().unwrap();
    assert!(fleet.info("a")["connected"].as_bool().unwrap());
    assert!(fleet.server().is_alive());
}

#[test]
fn a_new_daemon_that_ends_before_it_is_ready_disturbs_nobody() {
    let mut fleet = Fleet::start();
    let mut driver = fleet.driver("a", &Options::new());
    for (text, said) in [
        ("control-socket = 5", "is no configuration"),
        (
            "[[disk]]\nname = \"a\"\n",
            "line 1: the disk names no `socket`",
        ),
        ("socket-dir = \"sockets\"", "a take-over cannot move it"),
        ("control-socket = \"other\"", "a take-over cannot move it"),
    ] {
        let config = fleet.path("broken.toml");
        fs::write(&config, text).unwrap();
        let exit = fleet.next_with(&config).run();
        assert_eq!(exit.code, Some(1), "{text}");
        assert!(exit.log.contains(said), "{}", exit.log);
        expect_undisturbed(&mut driver, &mut fleet);
    }
    // One that does not even begin.
    let exit = fleet.next().arg("--nonsense").run();
    assert_eq!(exit.code, Some(2));
    expect_undisturbed(&mut driver, &mut fleet);
    // And now one that does.
    drop(driver);
    fleet.upgrade();
    assert_eq!(fleet.driver("a", &Options::new()).read(8, 512), [7; 512]);
    fleet.end();
}

#[test]
fn a_new_daemon_that_cannot_read_an_image_disturbs_nobody() {
    let mut fleet = Fleet::start();
    let mut driver = fleet.driver("a", &Options::new());
    // What the old daemon has open has no name any more.
    fs::rename(fleet.path("b.vdi"), fleet.path("away.vdi")).unwrap();
    fs::write(fleet.path("b.vdi"), "no image").unwrap();
    let exit = fleet.next().run();
    assert_eq!(exit.code, Some(1));
    assert!(exit.log.contains("b.vdi"), "{}", exit.log);
    expect_undisturbed(&mut driver, &mut fleet);
    fleet.server().expect_log("the disks stay here");
    fs::rename(fleet.path("away.vdi"), fleet.path("b.vdi")).unwrap();
    drop(driver);
    fleet.upgrade();
    fleet.end();
}

#[test]
fn a_new_daemon_that_dies_with_the_sockets_disturbs_nobody() {
    let mut fleet = Fleet::start();
    let mut driver = fleet.driver("a", &Options::new());
    let mut played = Played::connect(&fleet);
    let disks = played.is_offered();
    assert_eq!(disks[0]["disk"]["name"], "b", "the idle one goes first");
    // Meanwhile nothing may be changed, and everything may be seen.
    let add = json!({"name": "c", "image": fleet.path("c.vdi")});
    for (command, arguments) in [
        ("add", add),
        ("remove", json!({"disk": "b"})),
        ("resize", json!({"disk": "a", "size_bytes": 1 << 30})),
        ("shutdown", json!(null)),
    ] {
        let refused = fleet.ask(command, &arguments);
        assert_eq!(refused, Err("not-possible".to_owned()), "{command}");
    }
    assert_eq!(fleet.names(), ["a", "b"]);
    expect_undisturbed(&mut driver, &mut fleet);
    drop(played);
    expect_undisturbed(&mut driver, &mut fleet);
    // One that says something else is not waited for.
    for word in ["finish", "hand-over", "nonsense"] {
        let mut played = Played::connect(&fleet);
        played.is_offered();
        let answer = played.step(word);
        assert_eq!(answer["error"]["class"], "not-possible", "{word}");
    }
    expect_undisturbed(&mut driver, &mut fleet);
    drop(driver);
    fleet.upgrade();
    fleet.end();
}

#[test]
fn a_new_daemon_that_dies_with_the_disks_gives_them_back() {
    let mut fleet = Fleet::start();
    let options = Options::new().tracked();
    let mut driver = fleet.driver("a", &options);
    let kept = driver.keep(&options);
    driver.write(0, &[1; 4096]);
    for says_a_word in [true, false] {
        let mut played = Played::connect(&fleet);
        played.is_offered();
        let released = played.step("release");
        assert_eq!(released["return"]["changed"], json!(["a"]));
        // It has been let go of.
        let image = fleet.path("a.vdi");
        let taken = HostFile::open(&image, Access::Writable, Locking::Locked).unwrap();
        drop(taken);
        if says_a_word {
            assert_eq!(played.step("nonsense")["error"]["class"], "not-possible");
        }
        drop(played);
        let socket = fleet.path("sockets/a.sock");
        driver.control = kept.reconnect(&socket, Base::Used).unwrap();
        expect_undisturbed(&mut driver, &mut fleet);
        assert_eq!(driver.read(0, 4096), [1; 4096]);
        // The one that nobody uses is open and locked again, too.
        assert!(fleet.info("b")["open"].as_bool().unwrap());
    }
    drop(driver);
    fleet.upgrade();
    let place = fleet.end();
    assert!(!place.path().join("sockets/a.sock").exists());
}

/// Guests wait while it is late, so it is not waited for long.
#[test]
fn a_new_daemon_that_is_late_has_nothing() {
    let mut fleet = Fleet::start();
    let options = Options::new().tracked();
    let mut driver = fleet.driver("a", &options);
    let kept = driver.keep(&options);
    let mut played = Played::connect(&fleet);
    played.is_offered();
    played.step("release");
    // The old one gives up, and says so.
    let stream = played.0.get_ref();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    assert_eq!(played.line()["error"]["class"], "not-possible");
    let socket = fleet.path("sockets/a.sock");
    driver.control = kept.reconnect(&socket, Base::Used).unwrap();
    expect_undisturbed(&mut driver, &mut fleet);
    drop(driver);
    fleet.end();
}

/// A third program has locked an image when the old daemon lets go of it: the new daemon cannot open it, and the old one serves all
/// others at once and this one when it can.
#[test]
fn a_new_daemon_that_cannot_open_one_image_has_none() {
    let mut fleet = Fleet::start();
    let options = Options::new().tracked();
    let mut driver = fleet.driver("a", &options);
    driver.write(0, &[1; 512]);
    let kept = driver.keep(&options);
    // The old daemon has the image, too, and looks for others only when it opens it.
    let taken = File::options()
        .read(true)
        .write(true)
        .open(fleet.path("b.vdi"))
        .unwrap();
    HostFile::lock_too(&taken, Access::Writable).unwrap();
    let exit = fleet.next().run();
    assert_eq!(exit.code, Some(1));
    assert!(exit.log.contains("b cannot be taken over"), "{}", exit.log);
    let socket = fleet.path("sockets/a.sock");
    driver.control = kept.reconnect(&socket, Base::Used).unwrap();
    expect_undisturbed(&mut driver, &mut fleet);
    assert_eq!(driver.read(0, 512), [1; 512]);
    assert!(!fleet.info("b")["open"].as_bool().unwrap());
    drop(taken);
    let mut b = fleet.driver("b", &Options::new());
    b.write(0, &[2; 512]);
    drop((driver, b));
    fleet.upgrade();
    assert_eq!(fleet.driver("b", &Options::new()).read(0, 512), [2; 512]);
    fleet.end();
}

/// Whether nothing may be changed, since the disks are being handed over; also if there is no answer.
fn refuses_changes(fleet: &Fleet) -> bool {
    let ask = || -> io::Result<String> {
        let mut stream = UnixStream::connect(fleet.path("control"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let line = json!({"version": 1, "execute": "remove", "arguments": {"disk": "none"}});
        writeln!(stream, "{line}")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        Ok(answer)
    };
    !ask().is_ok_and(|answer| answer.contains("no-such-disk"))
}

#[test]
fn a_new_daemon_may_be_killed_at_any_instant() {
    let mut random = Random::printed();
    let mut fleet = Fleet::start();
    let mut driver = fleet.driver("a", &Options::new());
    let (mut early, mut late) = (0, 0);
    for nth in 0..12_u8 {
        driver.write(u64::from(nth), &[nth; 512]);
        let next = fleet.next().spawn();
        std::thread::sleep(Duration::from_millis(random.within(0..80)));
        let _killed = next.kill();
        // The old one keeps the disks, or ends. While it does not know yet, it lets nobody change anything.
        let said = |fleet: &mut Fleet, what: &str| fleet.server().log().matches(what).count();
        while fleet.server().is_alive()
            && (refuses_changes(&fleet)
                || said(&mut fleet, "go over to it") > said(&mut fleet, "the disks stay here"))
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(driver);
        if fleet.server().is_alive() {
            early += 1;
        } else {
            late += 1;
            fleet = fleet.launch_next();
        }
        driver = fleet.driver("a", &Options::new());
        assert_eq!(driver.read(u64::from(nth), 512), [nth; 512]);
    }
    println!("{early} died before they had the disks, {late} after");
    drop(driver);
    fleet.end();
}
