//! What the daemon does for a driver that keeps the rules, without a virtual machine.
//!
//! Not here: drivers that break the rules (`hostile_guest.rs`), and real guests.
//!
//! Sources: virtio 1.2 section 5.2, QEMU `docs/interop/vhost-user.rst`; the promises P1, P2 and P5 of the design.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

mod blkio;
mod chains;
mod clones;
mod connections;
mod control;
mod corpus;
mod ctl;
mod cut_memory;
mod device;
mod dirty_log;
mod durability;
mod eventfds;
mod fleet;
mod load;
mod merges;
mod metrics;
mod program;
mod reload;
mod requests;
mod resize;
mod rings;
#[cfg(target_arch = "x86_64")]
mod roles;
mod sandbox;
mod service;
mod sharing;
mod top;
mod turns;
mod workers;
mod zeros;
