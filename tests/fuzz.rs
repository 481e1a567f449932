//! A short run of the fuzz targets: all that the fuzzer kept, and some random mutations of it.
//!
//! The long runs are `ci/fuzz`'s.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use vdi_tests::fuzz::{TARGETS, Target};
use vdi_tests::random::Random;
use vdi_tests::simulated::for_each_seed;

/// Every input ends soon. Time that others take on this machine does not count.
const MOST_TIME: Duration = Duration::from_secs(5);

/// One test at a time: a target counts the descriptors of this process.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .unwrap()
        .into()
}

/// What the fuzzer kept for a target, by name.
fn kept(target: Target) -> Vec<(String, Vec<u8>)> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let files = fs::read_dir(corpus.join(target.name)).unwrap();
    let mut kept: Vec<_> = files
        .map(|file| file.unwrap().path())
        .map(|path| (path.display().to_string(), fs::read(&path).unwrap()))
        .collect();
    kept.sort();
    kept
}

fn run(target: Target, bytes: &[u8]) {
    let start = now();
    (target.run)(bytes);
    let took = now() - start;
    assert!(took < MOST_TIME, "{} took {took:?}", target.name);
}

#[test]
fn nothing_that_the_fuzzers_kept_breaks_a_promise() {
    let _turn = alone();
    for target in TARGETS {
        let kept = kept(target);
        assert!(kept.len() > 100, "{} has {}", target.name, kept.len());
        for (name, bytes) in kept {
            println!("{name}");
            run(target, &bytes);
        }
    }
}

#[test]
fn no_mutation_breaks_a_promise() {
    let _turn = alone();
    for target in TARGETS {
        let mut inputs = (target.seeds)();
        inputs.extend(kept(target).into_iter().map(|(_, bytes)| bytes));
        for_each_seed(20, |mut random: Random| {
            for nth in 0..target.mutations {
                let mut bytes = random.pick(&inputs).clone();
                for _ in 0..*random.pick(&[1, 1, 2, 4, 8]) {
                    (target.mutate)(&mut bytes, &mut random);
                }
                println!("{} {nth}", target.name);
                run(target, &bytes);
            }
        });
    }
}
