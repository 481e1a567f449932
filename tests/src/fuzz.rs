//! What a fuzzer calls: a function for each door through which strangers' bytes come in.
//!
//! ```text
//! bytes ─► Input ─► file in memory ─► vdi-core     what is done
//!                        └──────────► Reference    what must come out
//! ```
//!
//! So it is for images; `request` and `session` say the same of theirs. A target takes any bytes and returns; a broken promise is a panic. `ci/fuzz` lets libFuzzer look for such bytes;
//! `fuzz.rs` in the test command replays what it kept in `fuzz/corpus` and adds some random mutations of it.
//! Nothing here depends on a fuzzer.

mod expected;
pub mod image;
mod image_input;
mod mutation;
mod reference;
pub mod request;
mod seeds;
pub mod session;

use crate::random::Random;

/// A function that a fuzzer calls, and what it needs besides.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, also of its folder in `fuzz/corpus`.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
    /// Changes an input a little, knowing what its bytes mean.
    pub mutate: fn(&mut Vec<u8>, &mut Random),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Mutations in each round of the short run, which must not take long.
    pub mutations: u64,
}

/// All targets.
pub const TARGETS: [Target; 3] = [
    Target {
        name: "image",
        run: image::run,
        mutate: mutation::mutate,
        seeds: seeds::seeds,
        mutations: 100,
    },
    Target {
        name: "request",
        run: request::run,
        mutate: request::mutate,
        seeds: request::seeds,
        mutations: 10,
    },
    Target {
        name: "session",
        run: session::run,
        mutate: session::mutate,
        seeds: session::seeds,
        mutations: 20,
    },
];

/// The target of this name.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn target(name: &str) -> Target {
    let found = TARGETS.into_iter().find(|target| target.name == name);
    found.unwrap_or_else(|| panic!("there is no target {name}"))
}
