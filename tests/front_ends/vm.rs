//! A real guest that a test drives: shell commands over its console, QEMU's monitor beside it.
//!
//! How a guest boots is known to `ci/guest/run` alone; the loop in the guest is `ci/guest/jobs/drive.sh`. Whatever does not
//! come within [`PATIENCE`] is a panic that shows the console.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use vdi_tests::server::Server;

/// How long a boot or a command may take. A healthy one takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(100);

/// A guest that hangs is killed after this long. A healthy one takes a twentieth of it, on a busy machine a quarter.
const LIFETIME: Duration = Duration::from_secs(600);

/// How much of the console a panic shows, in lines.
const SHOWN: usize = 40;

/// A guest under QEMU that waits for commands.
pub(crate) struct Vm {
    run: Child,
    console: Console,
    monitor: Monitor,
    _directory: TempDir,
}

struct Console {
    lines: BufReader<UnixStream>,
    seen: Vec<String>,
}

struct Monitor {
    lines: BufReader<UnixStream>,
    events: Vec<Value>,
}

/// What [`Vm::boot`] starts.
pub(crate) struct Boot<'a> {
    /// Processors.
    pub(crate) cpus: u16,
    /// The disk that is there from the beginning: its daemon, how many queues (or as many as QEMU thinks right), and more
    /// options of `vhost-user-blk-pci`.
    pub(crate) disk: Option<(&'a Server, Option<u16>, &'a str)>,
    /// The socket on which it arrives from another QEMU, instead of booting.
    pub(crate) incoming: Option<&'a Path>,
    /// Whether it has `fio`. It must be the same on both sides of a migration.
    pub(crate) with_fio: bool,
}

impl Vm {
    /// Boots a guest and waits until it takes commands.
    pub(crate) fn boot(boot: &Boot<'_>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/guest");
        let mut command = Command::new(guest.join("run"));
        command.arg("--drive").arg(directory.path());
        command.args(["--timeout", &LIFETIME.as_secs().to_string()]);
        command.args(["--cpus", &boot.cpus.to_string()]);
        if let Some((daemon, queues, options)) = boot.disk {
            command.arg("--socket").arg(daemon.socket());
            let queues = queues.map_or(String::new(), |queues| queues.to_string());
            command.args(["--queues", &queues, "--device", options]);
        }
        if let Some(path) = boot.incoming {
            command.arg("--incoming").arg(path);
        }
        if boot.with_fio {
            command.arg("--with-fio");
        }
        let run = command
            .arg(guest.join("jobs/drive.sh"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let console = Console {
            lines: connect(&directory.path().join("console")),
            seen: Vec::new(),
        };
        let monitor = Monitor::connect(&directory.path().join("qmp"));
        let mut vm = Self {
            run,
            console,
            monitor,
            _directory: directory,
        };
        if boot.incoming.is_none() {
            vm.console.wait_for("DRIVE-READY");
        }
        vm
    }

    /// Ends QEMU, whose guest is elsewhere.
    pub(crate) fn leave_behind(mut self) {
        let _ended = self.qmp("quit", &json!({}));
        let status = self.run.wait().unwrap();
        assert!(status.success(), "QEMU did not end well");
    }

    /// Runs a command in the guest, which must succeed; what it printed, without the last line's end.
    pub(crate) fn shell(&mut self, line: &str) -> String {
        self.console.send(line);
        let from = self.console.seen.len();
        let done = self.console.wait_for("DRIVE-DONE: ");
        let printed = self.console.seen[from..self.console.seen.len() - 1].join("\n");
        assert_eq!(done, "0", "`{line}` failed in the guest:\n{printed}");
        printed
    }

    /// Runs a command of QEMU's monitor, which must succeed; what it returned.
    pub(crate) fn qmp(&mut self, name: &str, arguments: &Value) -> Value {
        self.monitor.ask(name, arguments)
    }

    /// Waits for an event of QEMU's monitor that came or comes after the last one of its name that was waited for.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        self.monitor.event(name)
    }

    /// Waits until the guest takes commands again after it was reset.
    pub(crate) fn rebooted(&mut self) {
        self.console.wait_for("DRIVE-READY");
    }

    /// Has the guest restart by itself and waits until it takes commands again.
    pub(crate) fn reboot(&mut self) {
        self.console.send("reboot -f");
        self.rebooted();
    }

    /// Has the guest switch itself off, and QEMU end.
    pub(crate) fn end(mut self) {
        self.console.send("leave");
        let status = self.run.wait().unwrap();
        assert!(status.success(), "QEMU or the guest did not end well");
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Ok(None) = self.run.try_wait() {
            // The script takes QEMU with it.
            let pid = Pid::from_raw(i32::try_from(self.run.id()).unwrap());
            let _may_be_gone = kill(pid, Signal::SIGTERM);
            let _status = self.run.wait();
        }
    }
}

impl Console {
    fn send(&mut self, line: &str) {
        let console = self.lines.get_mut();
        console.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Reads until a line begins with `what`; the rest of that line.
    fn wait_for(&mut self, what: &str) -> String {
        loop {
            let mut line = String::new();
            let end = self.lines.read_line(&mut line);
            let first = self.seen.len().saturating_sub(SHOWN);
            let shown = || self.seen[first..].join("\n");
            match end {
                Ok(0) => panic!("the console ended before `{what}`:\n{}", shown()),
                Ok(_) => {}
                Err(error) => panic!("no `{what}` on the console, {error}:\n{}", shown()),
            }
            let line = line.trim_end().to_owned();
            self.seen.push(line.clone());
            if let Some(rest) = line.strip_prefix(what) {
                return rest.to_owned();
            }
        }
    }
}

impl Monitor {
    fn connect(path: &Path) -> Self {
        let mut monitor = Self {
            lines: connect(path),
            events: Vec::new(),
        };
        let greeting = monitor.next();
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        monitor.ask("qmp_capabilities", &json!({}));
        monitor
    }

    fn ask(&mut self, name: &str, arguments: &Value) -> Value {
        let command = json!({ "execute": name, "arguments": arguments });
        self.lines
            .get_mut()
            .write_all(command.to_string().as_bytes())
            .unwrap();
        loop {
            let answer = self.next();
            if answer.get("event").is_some() {
                self.events.push(answer);
                continue;
            }
            return match answer.get("return") {
                Some(value) => value.clone(),
                None => panic!("{command}: {answer}"),
            };
        }
    }

    fn event(&mut self, name: &str) -> Value {
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return self.events.remove(at);
            }
            let event = self.next();
            self.events.push(event);
        }
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        self.lines
            .read_line(&mut line)
            .expect("QEMU's monitor says something");
        serde_json::from_str(&line).expect("QEMU's monitor speaks JSON")
    }
}

fn connect(path: &Path) -> BufReader<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    let socket = loop {
        match UnixStream::connect(path) {
            Ok(socket) => break socket,
            Err(error) if Instant::now() > deadline => panic!("{}: {error}", path.display()),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(socket)
}
