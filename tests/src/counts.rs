//! What a test counted (kills survived, cuts tried, bytes verified), for a reader who wants more than "ok".
//!
//! `cargo test` hides what a passing test prints, so the lines also go to the file that `VDI_TEST_COUNTS` names; `ci/test`
//! shows it at its end.

use std::fs::File;
use std::io::Write;
use std::process::Command;

/// Tells one line of counts.
///
/// # Panics
/// If the file cannot be written.
pub fn tell(line: &str) {
    println!("{line}");
    if let Some(path) = std::env::var_os("VDI_TEST_COUNTS") {
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(path)
            .expect("VDI_TEST_COUNTS names a file that can be written");
        // One write, so that lines of tests that run at once do not mix.
        file.write_all(format!("{line}\n").as_bytes())
            .expect("VDI_TEST_COUNTS names a file that can be written");
    }
}

/// A row of the README's table of front ends. `ci/front-ends` makes the table of those that were told.
#[derive(Debug, Clone, Copy)]
pub struct FrontEnd<'a> {
    /// Who it is.
    pub name: &'a str,
    /// What it was this time.
    pub version: &'a str,
    /// How it was used.
    pub features: &'a str,
    /// What came of it.
    pub verified: &'a str,
}

impl FrontEnd<'_> {
    /// Tells it, at the end of the test that found it true.
    ///
    /// # Panics
    /// If the README says anything else, but for the version.
    pub fn tell(&self) {
        let Self {
            name,
            version,
            features,
            verified,
        } = self;
        tell(&format!("| {name} | {version} | {features} | {verified} |"));
        let (start, end) = (
            format!("| {name} | "),
            format!(" | {features} | {verified} |"),
        );
        let is_it = |line: &str| line.starts_with(&start) && line.ends_with(&end);
        assert!(
            README.lines().any(is_it),
            "the README's table of front ends does not say: {start}...{end}"
        );
    }
}

const README: &str = include_str!("../../README.md");

/// The version of QEMU that guests are run with.
///
/// # Panics
/// If it does not say so.
#[must_use]
pub fn qemu_version() -> String {
    let output = Command::new("qemu-system-x86_64").arg("--version").output();
    let text = String::from_utf8(output.expect("QEMU can be run").stdout);
    let text = text.expect("QEMU speaks UTF-8");
    let version = text.split_whitespace().nth(3);
    format!("QEMU {}", version.expect("it says its version"))
}

/// The version of a crate that the tests are built with.
///
/// # Panics
/// If there is no such crate.
#[must_use]
pub fn crate_version(name: &str) -> &'static str {
    let entry = format!("name = \"{name}\"\nversion = \"");
    let (_, rest) = LOCK.split_once(&entry).expect("the crate is locked");
    rest.split_once('"').expect("a version ends").0
}

/// The versions of all crates.
const LOCK: &str = include_str!("../../Cargo.lock");
