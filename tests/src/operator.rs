//! A daemon whose disks come and go, and what an operator asks of it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::driver::{Driver, Options, PATIENCE};
use crate::server::{Launch, Server, scratch, wait_for_listener};

/// Sends the daemon that listens there a command; what it returns, or its error's class.
///
/// # Errors
/// The class of the daemon's error.
///
/// # Panics
/// If there is no answer, or none that can be understood.
pub fn ask(control: &Path, command: &str, arguments: &Value) -> Result<Value, String> {
    let mut stream = UnixStream::connect(control).expect("the daemon listens");
    stream
        .set_read_timeout(Some(PATIENCE))
        .expect("it is not zero");
    let line = json!({"version": 1, "execute": command, "arguments": arguments});
    writeln!(stream, "{line}").expect("the daemon listens");
    let mut answer = String::new();
    let read = BufReader::new(stream).read_line(&mut answer);
    read.expect("the daemon answers in time");
    let mut answer: Value = serde_json::from_str(&answer).expect("it answers JSON");
    match answer.get_mut("return") {
        Some(returned) => Ok(returned.take()),
        None => Err(answer["error"]["class"]
            .as_str()
            .expect("an error has a class")
            .to_owned()),
    }
}

/// The names of all disks of the daemon that listens there.
///
/// # Panics
/// As [`ask`], and if it refuses.
#[must_use]
pub fn names(control: &Path) -> Vec<String> {
    let list = ask(control, "list", &json!(null)).expect("it tells");
    let disks = list["disks"].as_array().expect("there is a list").iter();
    let name = |disk: &Value| disk["name"].as_str().map(str::to_owned);
    disks
        .map(|disk| name(disk).expect("each has a name"))
        .collect()
}

/// Describes the disks `a` and `b`, and what else is said, in the `fleet.toml` of this directory, where the daemon's sockets will be, too:
/// `control`, and those of the disks in `sockets`.
///
/// # Panics
/// If there is no room.
pub fn describe(place: &Path, more: &str) {
    fs::create_dir(place.join("sockets")).expect("there is room");
    let text = format!(
        r#"
        control-socket = "control"
        socket-dir = "sockets"
        image-dirs = ["."]
        {more}
        [[disk]]
        name = "a"
        image = "a.vdi"
        [[disk]]
        name = "b"
        image = "b.vdi"
        "#
    );
    fs::write(place.join("fleet.toml"), text).expect("there is room");
}

/// Starts a daemon by the `fleet.toml` of this directory.
///
/// # Panics
/// If it does not listen there in time.
#[must_use]
pub fn serve(place: &Path) -> Server {
    let file = place.join("fleet.toml");
    let server = Launch::bare().arg("--config").arg(file).spawn();
    wait_for_listener(&place.join("control"));
    server
}

/// A daemon that serves disks whose images lie in one directory.
pub struct Desk {
    /// The daemon.
    pub server: Server,
    /// Where its sockets are.
    place: tempfile::TempDir,
}

impl Desk {
    /// Starts it with these disks: each has the name of its image, without `.vdi`.
    ///
    /// # Panics
    /// If it does not listen in time.
    #[must_use]
    pub fn open(images: &Path, disks: &[&str]) -> Self {
        let place = scratch();
        let mut text = format!(
            "control-socket = \"control\"\nsocket-dir = \".\"\nimage-dirs = [{images:?}]\n"
        );
        for disk in disks {
            let image = images.join(format!("{disk}.vdi"));
            text += &format!("[[disk]]\nname = \"{disk}\"\nimage = {image:?}\nnum-queues = 2\n");
        }
        fs::write(place.path().join("fleet.toml"), text).expect("there is room");
        let server = serve(place.path());
        Self { server, place }
    }

    /// Where commands are sent.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.place.path().join("control")
    }

    /// Sends a command.
    ///
    /// # Errors
    /// The class of the daemon's error.
    pub fn ask(&self, command: &str, arguments: &Value) -> Result<Value, String> {
        ask(&self.control(), command, arguments)
    }

    /// Waits until the last job of a disk is in this state; what is said of it.
    ///
    /// # Panics
    /// If it ends in another one, or not in time.
    pub fn wait_for_job(&self, disk: &str, state: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let jobs = self.ask("jobs", &json!(null)).expect("it is known");
            let of_disk = |job: &&Value| job["disk"] == disk;
            let jobs = jobs["jobs"].as_array().expect("there is a list");
            let job = jobs.iter().find(of_disk).expect("there is a job");
            if job["state"] == state {
                return job.clone();
            }
            assert_eq!(job["state"], "running", "{job}");
            assert!(Instant::now() < deadline, "it does not end: {job}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Where a disk's front end connects.
    #[must_use]
    pub fn socket(&self, disk: &str) -> PathBuf {
        self.place.path().join(format!("{disk}.sock"))
    }

    /// A front end of a disk.
    ///
    /// # Panics
    /// If the daemon does not let it in.
    #[must_use]
    pub fn driver(&self, disk: &str) -> Driver {
        Driver::connect(&self.socket(disk), &Options::new().queues(2)).expect("the disk is served")
    }
}
