//! `vdi top` against a running daemon: what scripts read of it, and how it leaves a terminal.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;
use std::os::fd::AsFd;
use vdi_tests::driver::PATIENCE;
use vdi_tests::stop::StopOnDrop;
use vdi_tests::tool::{self, program, spawn};
use vdi_tests::words;

use crate::fleet::Fleet;

#[test]
fn a_table_shows_what_disks_did_in_the_interval() {
    let fleet = Fleet::start("");
    let (mut a, socket) = (fleet.driver("a"), fleet.path("control"));
    let stop = AtomicBool::new(false);
    let shown = std::thread::scope(|scope| {
        let stop = &stop;
        let _stop = StopOnDrop::new(stop);
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                a.read(0, 4096);
            }
        });
        tool::vdi(words!["top", "--once", "-d", "0.5", "--socket", socket])
    });
    let shown = shown.expect_code(0).out;
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines[0].starts_with("2 disks, 1 busy: "), "{shown}");
    assert!(lines[1].starts_with("NAME "), "{shown}");
    let row: Vec<&str> = lines[2].split_whitespace().collect();
    let (name, iops): (_, u64) = (row[0], row[1].parse().unwrap());
    assert_eq!(name, "a");
    assert!(iops > 10, "{shown}");
    assert!(lines[3].starts_with("b "), "{shown}");
    assert_eq!(lines.len(), 4, "{shown}");
    let one = tool::vdi(words![
        "top", "--batch", "-n", "2", "-d", "0.1", "--filter", "b", "--socket", socket
    ]);
    let rows = one.expect_code(0).out;
    assert_eq!(
        rows.lines().filter(|line| line.starts_with("b ")).count(),
        2
    );
    assert!(!rows.contains("\na "), "{rows}");
}

#[test]
fn without_a_terminal_or_a_daemon_it_says_so() {
    let fleet = Fleet::start("");
    let socket = fleet.path("control");
    let answer = tool::vdi(words!["top", "--socket", socket]).expect_code(1);
    assert!(answer.err.contains("--batch"), "{answer:?}");
    let nowhere = fleet.path("nowhere");
    let answer = tool::vdi(words!["top", "--once", "--socket", nowhere]).expect_code(2);
    assert!(answer.err.contains("--control-socket"), "{answer:?}");
}

#[test]
fn a_daemon_that_goes_away_is_told_of_and_the_tables_go_on() {
    let fleet = Fleet::start("");
    let mut top = Command::new(program("vdi"));
    top.args(["top", "--batch", "-d", "0.1", "--socket"]);
    top.arg(fleet.path("control")).stdout(Stdio::piped());
    let mut top = spawn(&mut top);
    let mut tables = Shown::on(top.stdout.take().unwrap());
    let first = tables.until("\n\n");
    assert!(first.starts_with("2 disks, 0 busy: "), "{first}");
    assert_eq!(fleet.server.terminate().code, Some(0));
    tables.until("no answer, asking again: ");
    // The rest of this table, and the next one.
    let rest = tables.until("no answer, asking again: ");
    assert!(rest.contains("\na "), "{rest}");
    top.kill().unwrap();
    top.wait().unwrap();
}

/// A terminal's.
const SIZE: Winsize = Winsize {
    ws_row: 24,
    ws_col: 80,
    ws_xpixel: 0,
    ws_ypixel: 0,
};

/// What a program shows.
struct Shown<S> {
    on: S,
    /// What was not waited for yet.
    rest: Vec<u8>,
}

impl<S: Read + AsFd> Shown<S> {
    const fn on(on: S) -> Self {
        Self {
            on,
            rest: Vec::new(),
        }
    }

    /// Waits until this is shown, behind what was waited for before; all in between, and it.
    fn until(&mut self, wanted: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let is_wanted = |part: &[u8]| part == wanted.as_bytes();
        loop {
            if let Some(at) = self.rest.windows(wanted.len()).position(is_wanted) {
                let shown = self.rest.drain(..at + wanted.len()).collect();
                return String::from_utf8(shown).unwrap();
            }
            assert!(Instant::now() < deadline, "{wanted:?} is not shown");
            let mut fds = [PollFd::new(self.on.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(50_u8)).unwrap() > 0 {
                let mut piece = [0; 4096];
                let len = self.on.read(&mut piece).unwrap();
                self.rest.extend_from_slice(&piece[..len]);
            }
        }
    }
}

#[test]
fn a_signal_ends_it_and_the_terminal_is_as_it_was() {
    const INTO: &str = "\u{1b}[?1049h";
    const OUT_OF: &str = "\u{1b}[?1049l";
    let fleet = Fleet::start("");
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let OpenptyResult { master, slave } = openpty(&SIZE, None).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let mut top = Command::new(program("vdi"));
        top.args(["top", "--socket"]).arg(fleet.path("control"));
        top.stdin(end()).stdout(end()).stderr(end());
        let mut top = spawn(&mut top);
        let mut screen = Shown::on(File::from(master));
        screen.until(INTO);
        screen.until("NAME");
        let during = tcgetattr(&slave).unwrap();
        assert!(!during.local_flags.contains(LocalFlags::ECHO));
        kill(Pid::from_raw(top.id().try_into().unwrap()), signal).unwrap();
        screen.until(OUT_OF);
        let exit = top.wait().unwrap();
        assert_eq!(exit.signal(), Some(signal as i32), "{exit}");
        assert!(tcgetattr(&slave).unwrap() == before, "{signal}");
    }
}

#[test]
fn a_terminal_that_goes_away_ends_it() {
    let fleet = Fleet::start("");
    let OpenptyResult { master, slave } = openpty(&SIZE, None).unwrap();
    let mut top = Command::new(program("vdi"));
    top.args(["top", "--socket"]).arg(fleet.path("control"));
    let end = || Stdio::from(slave.try_clone().unwrap());
    top.stdin(end()).stdout(end()).stderr(Stdio::null());
    let mut top = spawn(&mut top);
    drop(slave);
    let mut screen = Shown::on(File::from(master));
    screen.until("NAME");
    drop(screen);
    // What a session's leader hears then.
    kill(Pid::from_raw(top.id().try_into().unwrap()), Signal::SIGHUP).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while top.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "it goes on for nobody");
        std::thread::sleep(Duration::from_millis(10));
    }
}
