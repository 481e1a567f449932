//! Whether a sync will be over soon: then a worker whom nobody else needs does it on its own time, which is cheaper than to
//! hand it on. The same of writes into fresh room (`lone`).
//!
//! Who comes meanwhile waits for the rest of it, also another queue, so this must be rare to go wrong. What a guest did not write it
//! cannot make others wait for, so much unsynced data is always handed on. For what the storage does there is no bound, only
//! experience: each sync that took long is followed by many that are handed on, twice as many each time, before the next one is
//! trusted. So of [`MOST_PROBES`] syncs of storage that is often slow at most one holds the worker up.

use std::time::Duration;

/// What a late comer may wait for a sync: as long as for a ring that is looked at now and then.
const PROMPT: Duration = Duration::from_millis(1);

/// Unsynced data that storage takes in a fraction of that time.
const FEW_BYTES: u64 = 128 << 10;

/// Prompt syncs in a row that make the next one trusted.
const LEAST_PROBES: u32 = 8;

/// The same for storage that is often slow.
const MOST_PROBES: u32 = 1024;

/// Prompt syncs in a row that halve the number again.
const FORGIVEN_AFTER: u32 = 4 * MOST_PROBES;

/// How long the syncs of a worker took lately.
#[derive(Debug)]
pub(crate) struct Promptness {
    /// Prompt syncs in a row.
    in_row: u32,
    /// As many make the next one trusted.
    probes: u32,
}

impl Default for Promptness {
    fn default() -> Self {
        Self {
            in_row: 0,
            probes: LEAST_PROBES,
        }
    }
}

impl Promptness {
    /// Whether a sync of so many bytes will be over soon.
    pub(crate) fn expects(&self, unsynced_bytes: u64) -> bool {
        self.in_row >= self.probes && unsynced_bytes <= FEW_BYTES
    }

    /// A sync took so long.
    pub(crate) fn took(&mut self, time: Duration) {
        if time > PROMPT {
            self.in_row = 0;
            self.probes = (self.probes * 2).min(MOST_PROBES);
            return;
        }
        self.in_row = self.in_row.saturating_add(1);
        if self.in_row.is_multiple_of(FORGIVEN_AFTER) {
            self.probes = (self.probes / 2).max(LEAST_PROBES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_micros(100);
    const LATE: Duration = Duration::from_millis(50);

    /// How many of `syncs`, of which every `period`th is late, are trusted and late.
    fn held_up(syncs: u32, period: u32) -> u32 {
        let mut promptness = Promptness::default();
        (1..=syncs)
            .filter(|nth| {
                let (trusted, late) = (promptness.expects(4096), nth.is_multiple_of(period));
                promptness.took(if late { LATE } else { SOON });
                trusted && late
            })
            .count()
            .try_into()
            .unwrap()
    }

    #[test]
    fn much_that_is_unsynced_is_never_expected_to_be_prompt() {
        let mut promptness = Promptness::default();
        for _ in 0..100 {
            promptness.took(SOON);
        }
        assert!(promptness.expects(4096) && promptness.expects(FEW_BYTES));
        assert!(!promptness.expects(FEW_BYTES + 1));
    }

    #[test]
    fn nothing_is_expected_before_it_was_seen() {
        let mut promptness = Promptness::default();
        for _ in 0..LEAST_PROBES {
            assert!(!promptness.expects(0));
            promptness.took(SOON);
        }
        assert!(promptness.expects(0));
        promptness.took(LATE);
        assert!(!promptness.expects(0));
    }

    #[test]
    fn storage_that_is_often_slow_seldom_holds_the_worker_up() {
        assert_eq!(held_up(100_000, 1), 0);
        assert_eq!(held_up(100_000, 8), 0);
        // Late ones that come while syncs are handed on make the series begin again.
        assert!(held_up(100_000, 100) <= 5);
        assert!(held_up(100_000, 2000) <= 50);
    }

    #[test]
    fn storage_that_was_prompt_for_long_is_trusted_as_soon_as_at_first() {
        let mut promptness = Promptness::default();
        (0..100).for_each(|_| promptness.took(LATE));
        (0..7 * FORGIVEN_AFTER).for_each(|_| promptness.took(SOON));
        promptness.took(LATE);
        (0..2 * LEAST_PROBES).for_each(|_| promptness.took(SOON));
        assert!(promptness.expects(0));
    }
}
