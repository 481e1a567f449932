//! Real guests: Linux under QEMU on a daemon's socket.
//!
//! How a guest boots is known to `ci/guest/run` alone, which the demo uses too; what
//! it does is a shell script in `ci/guest/jobs`. A guest ends by itself, at the
//! latest by its time-out. Nothing is skipped: what is missing fails the test with
//! the command to run.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::image::Image;
use crate::qemu;
use crate::server::{Server, binary};

/// A guest that hangs is killed after this long. A healthy one takes a twentieth of it.
const GUEST_TIMEOUT_S: u32 = 300;

/// An empty dynamic image of `size_bytes`, made by `vdi create`.
///
/// # Panics
/// If that fails.
#[must_use]
pub fn create_image(size_bytes: u64) -> Image {
    let image = Image::nowhere();
    let mut create = Command::new(binary("vdi"));
    create
        .arg("create")
        .arg(image.path())
        .arg(size_bytes.to_string());
    succeed(&mut create);
    image
}

/// Demands that neither `vdi check` nor `qemu-img check` finds anything wrong, not even a leak.
///
/// # Panics
/// If one does.
pub fn expect_clean(image: &Image) {
    succeed(Command::new(binary("vdi")).arg("check").arg(image.path()));
    qemu::expect_clean(image.path());
}

/// Ends a daemon by SIGTERM and demands that it closed its image well.
///
/// # Panics
/// If it does not end soon, or not with 0.
pub fn stop(daemon: Server) {
    let exit = daemon.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
}

/// A guest that is about to boot, with four processors and the daemon's image as its disk.
#[derive(Debug)]
pub struct Guest {
    command: Command,
    /// QEMU says so when its back end goes away, and that is no complaint.
    may_lose_its_back_end: bool,
}

impl Guest {
    /// A guest on `daemon` whose disk has `queues` queues.
    #[must_use]
    pub fn on(daemon: &Server, queues: u16) -> Self {
        let mut command = Command::new(repository().join("ci/guest/run"));
        command.arg("--socket").arg(daemon.socket());
        command.args(["--cpus", "4", "--queues", &queues.to_string()]);
        command.args(["--timeout", &GUEST_TIMEOUT_S.to_string()]);
        Self {
            command,
            may_lose_its_back_end: false,
        }
    }

    /// On a daemon that dies and is replaced.
    #[must_use]
    pub fn that_reconnects(mut self) -> Self {
        self.command.args(["--reconnect", "50"]);
        self.may_lose_its_back_end = true;
        self
    }

    /// With another limit for its time, in seconds.
    #[must_use]
    pub fn within(mut self, seconds: u64) -> Self {
        self.command.args(["--timeout", &seconds.to_string()]);
        self
    }

    /// With more options for QEMU's device.
    #[must_use]
    pub fn device(mut self, options: &str) -> Self {
        self.command.args(["--device", options]);
        self
    }

    /// With `fio` in it.
    #[must_use]
    pub fn with_fio(mut self) -> Self {
        self.command.arg("--with-fio");
        self
    }

    /// With a variable for its job.
    #[must_use]
    pub fn set(mut self, name: &str, value: &str) -> Self {
        self.command.arg("--set").arg(format!("{name}={value}"));
        self
    }

    /// Boots it and lets it do the job of that name in `ci/guest/jobs`.
    ///
    /// # Panics
    /// If the job does not end with 0, or QEMU has something to complain about.
    pub fn run(mut self, job: &str) {
        let jobs = repository().join("ci/guest/jobs");
        for file in [job, "expect.sh", "blocks.fio"] {
            self.command.arg(jobs.join(file));
        }
        let console = succeed(&mut self.command);
        println!("{console}");
        assert!(
            self.may_lose_its_back_end || !console.contains("qemu-system-x86_64: "),
            "QEMU complained:\n{console}"
        );
    }
}

/// Boots a Debian whose systemd runs the first of `files`, a test program, on the others (`ci/guest/jobs/systemd.sh`); what its console showed. Only the
/// tests of these names, unless they are empty.
///
/// # Panics
/// If one of its tests fails.
#[must_use]
pub fn under_systemd(only: &str, files: &[&Path]) -> String {
    let image = repository().join("target/guest/system.ext4");
    assert!(
        image.exists(),
        "{} is missing; run ci/systemd",
        image.display()
    );
    let mut command = Command::new(repository().join("ci/guest/run"));
    command.arg("--system").arg(image);
    command.args(["--memory", "768", "--timeout", "900"]);
    command.arg("--set").arg(format!("ONLY={only}"));
    command.arg(repository().join("ci/guest/jobs/systemd.sh"));
    succeed(command.args(files))
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("this crate is a member of the workspace")
}

/// Runs a command and returns its standard output; panics with all it said unless it ends with 0.
fn succeed(command: &mut Command) -> String {
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => panic!("{command:?} could not start, {error}; run ci/setup"),
    };
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{command:?} ended with {}:\n{stdout}{stderr}",
        output.status
    );
    stdout
}
