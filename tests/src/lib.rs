//! Helpers for the tests: what builds images, drives the daemon and boots guests.

pub mod driver;
pub mod qemu;
pub mod server;
