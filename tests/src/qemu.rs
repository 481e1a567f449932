//! QEMU's tools: a second opinion on what an image holds.
//!
//! Not a guest. QEMU reads images with blocks of 1 MiB only.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::driver::PATIENCE;

/// Runs `qemu-img`.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn img(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
    run("qemu-img", arguments)
}

/// Runs `qemu-io -f vdi -c COMMAND IMAGE`.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn io(image: &Path, command: &str) -> Output {
    let options = ["-f", "vdi", "-c", command].map(OsStr::new);
    run("qemu-io", options.into_iter().chain([image.as_os_str()]))
}

fn run(program: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
    Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program} cannot be started: {error}; install qemu-utils"))
}

/// Makes an image as QEMU does.
///
/// # Panics
/// If `qemu-img` fails.
pub fn create(image: &Path, size: &str) {
    let path = image.to_str().expect("test paths are UTF-8");
    expect_success(&img(["create", "-q", "-f", "vdi", path, size]));
}

/// Demands that `qemu-img check` finds neither errors nor leaks.
///
/// # Panics
/// If it finds any.
pub fn expect_clean(image: &Path) {
    let path = image.to_str().expect("test paths are UTF-8");
    expect_success(&img(["check", "-f", "vdi", path]));
}

/// What QEMU reads from an image.
///
/// # Panics
/// If it cannot.
#[must_use]
pub fn contents(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("qemu-raw");
    let from = image.to_str().expect("test paths are UTF-8");
    let to = raw.to_str().expect("test paths are UTF-8");
    let read = || img(["convert", "-f", "vdi", "-O", "raw", from, to]);
    let deadline = Instant::now() + PATIENCE;
    let mut output = read();
    // The kernel ends the last I/O of a daemon that was killed after the daemon is gone, and its locks with that.
    while is_locked(&output) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
        output = read();
    }
    expect_success(&output);
    let bytes = std::fs::read(&raw).expect("qemu-img wrote it");
    std::fs::remove_file(&raw).expect("it is ours");
    bytes
}

fn is_locked(output: &Output) -> bool {
    String::from_utf8_lossy(&output.stderr).contains("Failed to get")
}

fn expect_success(output: &Output) {
    assert!(
        output.status.success(),
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
