//! The daemon dies at any instant, another one takes over, and the driver notices nothing but a pause.
//!
//! `region` says what a dead daemon may have left in the in-flight region and what the next one makes of it, `left` stops rings
//! before it has made it, `kills` kills real ones under load, `cache_mode` is about what the guest chose before.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

mod cache_mode;
mod kills;
mod left;
mod region;
mod restart;

use std::path::PathBuf;

use tempfile::TempDir;

/// A path for a socket that outlives its daemons.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory can be made"))
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("socket")
    }
}
