//! Crashes: what is left of an image when its program is killed or the power goes.
//!
//! - [`any_instant`]: random use, stopped at every instant (P1, P2, P3, W1, W2).
//! - [`any_failure`]: random use of a disk whose host fails, and then a crash (W5).
//! - [`rules`]: one test for each claim of W3, W5, W6 and W7.
//! - [`killed`]: a real program and a real `kill -9`.
//!
//! The promises and rules are those of the design document, by name.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod any_failure;
mod any_instant;
mod killed;
mod maintenance;
mod rules;
