//! Helpers for the tests: what builds images, drives the daemon and boots guests.

pub mod builder;
pub mod corpus;
pub mod counts;
pub mod driver;
pub mod fuzz;
pub mod guest;
pub mod image;
pub mod load;
pub mod mounted;
pub mod operator;
pub mod page_cache;
pub mod pages;
pub mod qemu;
pub mod random;
pub mod recorded;
pub mod server;
pub mod simulated;
pub mod soon;
pub mod stop;
pub mod tool;
