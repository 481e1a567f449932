//! The package under a real systemd, which is the first process of a guest: units, sockets, readiness, watchdog, reload, upgrade, sandbox,
//! journal, and what is left when it is removed.
//!
//! This program is both sides. One test boots the guest (a Debian, under QEMU) and copies this program and the package into it; there the
//! tests in `guest` run. All are ignored unless `ci/systemd` asks for them, since an emulated processor takes minutes.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

mod guest;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use vdi_tests::guest::under_systemd;
use vdi_tests::{counts, tool};

fn run(command: &mut Command) -> String {
    let output = tool::spawn(command.stdout(std::process::Stdio::piped()))
        .wait_with_output()
        .unwrap();
    assert!(output.status.success(), "{command:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The package of this build.
fn package() -> PathBuf {
    let ci = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/package");
    PathBuf::from(run(Command::new(ci).arg("--debug")).trim_end())
}

/// The same with a higher version.
fn newer(package: &Path, place: &TempDir) -> PathBuf {
    let (tree, newer) = (place.path().join("tree"), place.path().join("newer.deb"));
    let dpkg = |option: &str, from: &Path, to: &Path| {
        let mut dpkg = Command::new("dpkg-deb");
        dpkg.args(["--root-owner-group", option]);
        drop(run(dpkg.args([from, to])));
    };
    dpkg("--raw-extract", package, &tree);
    let control = tree.join("DEBIAN/control");
    let text = fs::read_to_string(&control).unwrap();
    let version = format!("\nVersion: {}", env!("CARGO_PKG_VERSION"));
    assert!(text.contains(&version));
    fs::write(
        &control,
        text.replace(&version, &(version.clone() + "+newer")),
    )
    .unwrap();
    dpkg("--build", &tree, &newer);
    newer
}

#[test]
#[ignore = "ci/systemd runs it, in minutes"]
fn the_package_holds_under_a_real_systemd() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name);
    let package = package();
    fs::copy(&package, path("package.deb")).unwrap();
    let newer = newer(&package, &place);
    // Without what only debuggers read, of which there is much.
    let (own, tests) = (std::env::current_exe().unwrap(), path("tests"));
    let mut strip = Command::new("strip");
    drop(run(strip.arg("-o").args([&tests, &own])));
    let only = std::env::var("VDI_SYSTEMD_TESTS").unwrap_or_default();
    let console = under_systemd(&only, &[&tests, &path("package.deb"), &newer]);
    println!("{console}");
    let passed = console
        .lines()
        .filter(|line| line.starts_with("test guest::"));
    let systemd = console.lines().find(|line| line.starts_with("systemd 2"));
    counts::tell(&format!(
        "under systemd ({}): {} tests in a guest",
        systemd.unwrap_or("?"),
        passed.count()
    ));
}
