//! What becomes of a served image when the host fails: W5, with the real daemon on a file system that fails as it is told
//! to, and on real ones that are full.
//!
//! Each scene runs with both caches and both engines, and ends with `vdi check` and with a comparison by QEMU's tools.
//!
//! Not here: crashes (`power_cut`), and the core alone (`crash`).

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

mod alone;
mod last;
mod operators;
mod partly;
mod scene;
mod space;
mod taken_away;
