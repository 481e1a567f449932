//! The daemon under a service manager: sockets that it is handed, what it tells, and its log.
//!
//! The sockets come from systemd's own `systemd-socket-activate`; systemd itself runs on no machine that only runs
//! tests, so who is told things is a socket of the test's (but see `systemd/main.rs`).
//!
//! Sources: sd_listen_fds(3), sd_notify(3), sd-daemon(3).

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;

use serde_json::Value;
use vdi_tests::driver::{Driver, Options, PATIENCE};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, wait_for_listener};

/// The manager's end.
struct Manager {
    socket: UnixDatagram,
    place: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(place.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, place }
    }

    fn environment(&self) -> OsString {
        let mut variable = OsString::from("NOTIFY_SOCKET=");
        variable.push(self.place.path().join("notify"));
        variable
    }

    fn hear(&self) -> String {
        let mut heard = [0; 4096];
        let len = self.socket.recv(&mut heard).unwrap();
        String::from_utf8(heard[..len].to_vec()).unwrap()
    }

    /// Beats come although nothing happens: what was said so far does not count.
    fn expect_beats(&self) {
        self.socket.set_nonblocking(true).unwrap();
        while self.socket.recv(&mut [0; 64]).is_ok() {}
        self.socket.set_nonblocking(false).unwrap();
        for _ in 0..2 {
            assert_eq!(self.hear(), "WATCHDOG=1\n");
        }
    }

    /// What is said next but for beats.
    fn hear_state(&self) -> String {
        loop {
            let heard = self.hear();
            if heard != "WATCHDOG=1\n" {
                return heard;
            }
        }
    }
}

fn info(control: &Path) -> Value {
    let mut stream = UnixStream::connect(control).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
        .write_all(b"{\"version\": 1, \"execute\": \"info\"}\n")
        .unwrap();
    let mut answer = String::new();
    let _len = BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

#[test]
fn sockets_of_a_socket_unit_are_served_by_their_names() {
    let image = Image::by_qemu(8 * MIB);
    let place = tempfile::tempdir().unwrap();
    let [front, control] = ["front", "control"].map(|name| place.path().join(name));
    let server = Launch::bare()
        .under([
            "systemd-socket-activate".as_ref(),
            "--fdname=control:vdi-vhost@disk.socket".as_ref(),
            "-l".as_ref(),
            control.as_os_str(),
            "-l".as_ref(),
            front.as_os_str(),
        ])
        .arg("--blk-file")
        .arg(image.path())
        .spawn();
    wait_for_listener(&front);
    for nth in 0..2_u8 {
        let mut driver = Driver::connect(&front, &Options::new()).unwrap();
        assert_eq!(driver.read(0, 512), [nth; 512]);
        driver.write(0, &[nth + 1; 512]);
        assert_eq!(info(&control)["return"]["size_bytes"], 8 * MIB);
    }
    let exit = server.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert!(front.exists(), "the manager's sockets stay");
}

#[test]
fn two_sockets_for_front_ends_are_refused() {
    let image = Image::by_qemu(8 * MIB);
    let place = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| place.path().join(name));
    let server = Launch::bare()
        .under([
            "systemd-socket-activate".as_ref(),
            "-l".as_ref(),
            one.as_os_str(),
            "-l".as_ref(),
            two.as_os_str(),
        ])
        .arg("--blk-file")
        .arg(image.path())
        .spawn();
    wait_for_listener(&two);
    let _front_end = UnixStream::connect(&two).unwrap();
    let exit = server.wait();
    assert_eq!(exit.code, Some(1));
    assert!(
        exit.log.contains("two sockets for front ends"),
        "{}",
        exit.log
    );
}

#[test]
fn a_manager_is_told_of_readiness_of_every_beat_and_of_the_end() {
    let image = Image::by_qemu(8 * MIB);
    let manager = Manager::new();
    let server = Launch::image(image.path())
        .under([
            "env".into(),
            manager.environment(),
            "WATCHDOG_USEC=900000".into(),
        ])
        .start();
    let ready = manager.hear();
    assert!(ready.starts_with("READY=1\nSTATUS=serving "), "{ready}");
    // Nobody there, then a front end that says nothing.
    manager.expect_beats();
    let driver = server.driver(&Options::new());
    manager.expect_beats();
    drop(driver);
    let exit = server.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert_eq!(manager.hear_state(), "STOPPING=1\n");
}

#[test]
fn a_daemon_that_cannot_serve_is_never_ready() {
    let manager = Manager::new();
    let exit = Launch::image(Path::new("/does/not/exist.vdi"))
        .under(["env".into(), manager.environment()])
        .run();
    assert_eq!(exit.code, Some(1));
    manager.socket.set_nonblocking(true).unwrap();
    assert!(manager.socket.recv(&mut [0; 64]).is_err());
}

#[test]
fn the_journal_gets_priorities_and_collectors_get_objects() {
    let image = Image::by_qemu(8 * MIB);
    let journal = ["env", "JOURNAL_STREAM=8:12345"];
    let exit = Launch::image(image.path())
        .under(journal)
        .start()
        .terminate();
    assert!(exit.log.starts_with("<6>serving "), "{}", exit.log);
    assert!(exit.log.lines().all(|line| line.starts_with('<')));
    let exit = Launch::image(Path::new("/does/not/exist.vdi"))
        .under(journal)
        .run();
    assert!(exit.log.starts_with("<3>cannot open"), "{}", exit.log);

    let server = Launch::image(image.path()).args(["--log-format", "json"]);
    let exit = server.start().terminate();
    let mut lines = exit.log.lines().peekable();
    assert!(lines.peek().is_some());
    for line in lines {
        let object: Value = serde_json::from_str(line).unwrap();
        assert_eq!(object["level"], "INFO");
        assert!(object["message"].is_string() && object["timestamp"].is_string());
    }
}
