//! The daemon.
mod chain;
mod device;
mod memory;
mod request;
mod ring;
fn main() {}
