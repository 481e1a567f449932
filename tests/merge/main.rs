//! `commit`, `flatten`, `rebase`, `compare` and `clone`: what they leave, and what a crash leaves of them.
//!
//! - [`chains`]: the tool on the corpus's chains, with the corpus's own sums.
//! - [`copies`]: `compare` beside `qemu-img compare`, and what a clone is.
//! - [`crashes`]: the power goes at any instant of a merge, a flatten, a rebase.
//! - [`live`]: a merge under a disk that is used.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod chains;
mod copies;
mod crashes;
mod live;
