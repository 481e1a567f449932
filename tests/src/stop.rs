//! A word to other threads that it is over, which a panic says too.
//!
//! Without it a test that fails inside `std::thread::scope` would wait for its threads for ever.

use std::sync::atomic::{AtomicBool, Ordering};

/// Says so when it is dropped.
#[derive(Debug)]
pub struct StopOnDrop<'a>(&'a AtomicBool);

impl<'a> StopOnDrop<'a> {
    /// Will set `stop`.
    #[must_use]
    pub const fn new(stop: &'a AtomicBool) -> Self {
        Self(stop)
    }
}

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
