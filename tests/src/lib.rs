//! Helpers for the tests: what builds images, drives the daemon and boots guests.

pub mod driver;
pub mod guest;
pub mod image;
pub mod page_cache;
pub mod qemu;
pub mod random;
pub mod server;
