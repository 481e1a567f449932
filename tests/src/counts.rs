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
