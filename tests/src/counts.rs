//! What a test counted (kills survived, cuts tried, bytes verified), for a reader who wants more than "ok".
//!
//! `cargo test` hides what a passing test prints, so the lines also go to the file that `VDI_TEST_COUNTS` names; `ci/test`
//! shows it at its end.

use std::fs::File;
use std::io::Write;

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

/// Tells one line of what was verified of a front end, for the table of front ends in the README.
pub fn tell_front_end(name: &str, features: &str, verified: &str) {
    tell(&format!("front end {name}: {features}: {verified}"));
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
