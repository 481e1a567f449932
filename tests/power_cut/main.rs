//! P1, P2, P3: the power is cut under the real daemon, at every instant, in every way.
//!
//! A driver uses a disk that the daemon serves from the recorded file system. Then, for thousands of instants, what a power cut could
//! have left of the files is rebuilt: what a completed sync covers, and any part of the rest. It is opened by the core and
//! by a reader that shares no code with it, some by QEMU's tools too, and every sector must read as it may.
//!
//! Not here: the core alone under the same cuts, which can fail in more ways (`crash`), and kills of a daemon that runs on.
//!
//! The daemon's threads make each record another one, so a seed does not bring a failure back: the images that failed are kept, with all
//! that was done to them before, and the message says where.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

mod judge;
mod load;
mod names;
mod scenes;
mod tools;
