//! What is quick by itself, on a machine that others use too.
//!
//! A daemon that waits for a time-out where it should not is late every time. One that only got no CPU is not: so a try that
//! took long is made again, and only if all did, something is wrong.

use std::time::Duration;

/// How often it is tried. Others keep a CPU for long now and then, not in each of ten tries.
const TRIES: usize = 10;

/// Does something until it takes less than `limit` by its own account.
///
/// # Panics
/// If it never does.
#[track_caller]
pub fn soon(limit: Duration, mut once: impl FnMut() -> Duration) {
    let mut late = Vec::new();
    while late.len() < TRIES {
        let took = once();
        if took < limit {
            return;
        }
        late.push(took);
    }
    panic!("it takes {late:?}, which should be less than {limit:?}");
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_late_now_and_then_is_quick() {
        let mut tries = 0;
        soon(SECOND, || {
            tries += 1;
            if tries < TRIES {
                2 * SECOND
            } else {
                SECOND / 2
            }
        });
        assert_eq!(tries, TRIES);
    }

    #[test]
    #[should_panic(expected = "which should be less than 1s")]
    fn what_is_always_late_is_not() {
        soon(SECOND, || SECOND);
    }
}
