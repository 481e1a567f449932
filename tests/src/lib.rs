//! Helpers for the tests: what builds images, drives the daemon and boots guests.

pub mod guest;
pub mod images;
pub mod random;
pub mod simulated;
pub mod tool;
