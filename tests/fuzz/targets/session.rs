//! The target `session` of `vdi_tests::fuzz` for libFuzzer.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use vdi_tests::fuzz::target;
use vdi_tests::random::Random;

fuzz_target!(|bytes: &[u8]| (target("session").run)(bytes));

fuzz_mutator!(|bytes: &mut [u8], len: usize, most: usize, seed: u32| {
    let mut random = Random::seeded(seed.into());
    if random.within(0..4) == 0 {
        return fuzzer_mutate(bytes, len, most);
    }
    let mut mutated = bytes[..len].to_vec();
    (target("session").mutate)(&mut mutated, &mut random);
    let len = mutated.len().min(most);
    bytes[..len].copy_from_slice(&mutated[..len]);
    len
});
