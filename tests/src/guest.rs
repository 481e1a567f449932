//! Real guests: a daemon on an image, and Linux under QEMU on the daemon's socket.
//!
//! How a guest boots is known to `ci/guest/run` alone, which the demo uses too; what
//! it does is a shell script in `ci/guest/jobs`. Everything here ends by itself: a
//! guest by its time-out, a daemon at the latest when its [`Daemon`] is dropped.
//! Nothing is skipped: what is missing fails the test with the command to run.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// A guest that hangs is killed after this long. A healthy one takes a tenth of it.
const GUEST_TIMEOUT_S: u32 = 150;
/// How long a daemon may take to make its socket, and to end after SIGTERM.
const DAEMON_PATIENCE: Duration = Duration::from_secs(15);

/// An image in a directory of its own.
pub struct Image {
    path: PathBuf,
    _dir: TempDir,
}

impl Image {
    /// An empty dynamic image of `size_bytes`, made by `vdi create`.
    pub fn create(size_bytes: u64) -> Self {
        // Not the system's place for such files: that can be a tmpfs, which knows no O_DIRECT.
        let dir = TempDir::new_in(target_dir()).expect("a directory in target");
        let path = dir.path().join("disk.vdi");
        let mut create = Command::new(program("vdi"));
        create.arg("create").arg(&path).arg(size_bytes.to_string());
        succeed(&mut create);
        Self { path, _dir: dir }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Panics unless both `vdi check` and `qemu-img check` find nothing wrong, not even a leak.
    pub fn assert_clean(&self) {
        succeed(Command::new(program("vdi")).arg("check").arg(&self.path));
        let mut check = Command::new("qemu-img");
        check.args(["check", "-f", "vdi"]).arg(&self.path);
        succeed(&mut check);
    }
}

/// A running `vdi-vhost`.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    dir: TempDir,
}

impl Daemon {
    /// Starts the daemon on `image` with more `options`, and waits for its socket.
    pub fn start(image: &Image, options: &[&str]) -> Self {
        // A socket's path has at most 107 bytes, so it cannot lie deep in a checkout.
        let dir = TempDir::new().expect("a temporary directory");
        let log = dir.path().join("log");
        let output = File::create(&log).expect("a log file");
        let child = Command::new(program("vdi-vhost"))
            .arg("--socket-path")
            .arg(dir.path().join("socket"))
            .arg("--blk-file")
            .arg(image.path())
            .args(options)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("one more descriptor"))
            .stderr(output)
            .spawn()
            .expect("vdi-vhost starts");
        let mut daemon = Self { child, log, dir };
        let until = Instant::now() + DAEMON_PATIENCE;
        while !daemon.socket().exists() {
            let ended = daemon.child.try_wait().expect("our own child");
            assert!(
                ended.is_none(),
                "vdi-vhost ended with {ended:?}:\n{}",
                daemon.log()
            );
            assert!(
                Instant::now() < until,
                "vdi-vhost made no socket:\n{}",
                daemon.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        daemon
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Ends it by SIGTERM; panics unless it ends soon and with 0.
    pub fn stop(mut self) {
        let pid = Pid::from_raw(
            self.child
                .id()
                .try_into()
                .expect("a process id is positive"),
        );
        kill(pid, Signal::SIGTERM).expect("our own child");
        let status = self.wait();
        assert!(
            status.success(),
            "vdi-vhost ended with {status}:\n{}",
            self.log()
        );
    }

    fn wait(&mut self) -> ExitStatus {
        let until = Instant::now() + DAEMON_PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("our own child") {
                return status;
            }
            assert!(
                Instant::now() < until,
                "vdi-vhost did not end:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of vdi-vhost:\n{}", self.log());
        }
        // Both fail when it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that is about to boot, with four processors and the daemon's image as its disk.
pub struct Guest {
    command: Command,
}

impl Guest {
    /// A guest on `daemon` whose disk has `queues` queues.
    pub fn on(daemon: &Daemon, queues: u16) -> Self {
        let mut command = Command::new(repository().join("ci/guest/run"));
        command.arg("--socket").arg(daemon.socket());
        command.args(["--cpus", "4", "--queues", &queues.to_string()]);
        command.args(["--timeout", &GUEST_TIMEOUT_S.to_string()]);
        Self { command }
    }

    /// With more options for QEMU's device.
    pub fn device(mut self, options: &str) -> Self {
        self.command.args(["--device", options]);
        self
    }

    /// With `fio` in it.
    pub fn with_fio(mut self) -> Self {
        self.command.arg("--with-fio");
        self
    }

    /// With a variable for its job.
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.command.arg("--set").arg(format!("{name}={value}"));
        self
    }

    /// Boots it, lets it do the job of that name in `ci/guest/jobs`, and returns what its
    /// console said. Panics unless the job ends with 0 and QEMU had nothing to complain about.
    pub fn run(mut self, job: &str) -> String {
        let jobs = repository().join("ci/guest/jobs");
        self.command
            .arg(jobs.join(job))
            .arg(jobs.join("expect.sh"))
            .arg(jobs.join("blocks.fio"));
        let console = succeed(&mut self.command);
        println!("{console}");
        assert!(!console.contains("qemu-system-x86_64: "), "QEMU complained");
        console
    }
}

/// A program of this workspace, next to the directory that the running test is in.
fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    let path = test
        .ancestors()
        .nth(2)
        .expect("target/debug above target/debug/deps")
        .join(name);
    assert!(
        path.exists(),
        "{} is missing; run `cargo build --workspace --bins`",
        path.display()
    );
    path
}

fn target_dir() -> PathBuf {
    let test = std::env::current_exe().expect("the path of this test");
    test.ancestors()
        .nth(3)
        .expect("target above target/debug/deps")
        .to_owned()
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this crate is a member of the workspace")
}

/// Runs a command and returns its standard output; panics with all it said unless it ends with 0.
fn succeed(command: &mut Command) -> String {
    let Output {
        status,
        stdout,
        stderr,
    } = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => panic!("{command:?} could not start, {error}; run ci/setup"),
    };
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    let stderr = String::from_utf8_lossy(&stderr);
    assert!(
        status.success(),
        "{command:?} ended with {status}:\n{stdout}{stderr}"
    );
    stdout
}
