//! Every front end that the daemon is for, doing what its users do: the matrix.
//!
//! `qemu` is the real one with a real guest. Cloud Hypervisor and Firecracker are not here in the flesh: `cloud_hypervisor`
//! and `firecracker` send their messages in their order, by the crate that both use (`vhost`). `blkio` has its tests in
//! `tests/daemon`. Each case tells one line of what was verified, for the table in the README.
//!
//! Not here: what a front end gets wrong (`hostile_guest`), deaths of the daemon (`recovery`), and everything about the
//! image below.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

mod cloud_hypervisor;
mod firecracker;
mod migration;
mod played;
mod qemu;
mod vm;
