//! Log lines that a guest or a front end can bring about: few enough that it cannot fill the host's log (R5).

use std::fmt::{self, Arguments, Display, Formatter};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines per [`PERIOD`]: enough to see what is wrong.
const LINES: u32 = 10;

/// At this rate a log grows by less than 2 MiB a day.
const PERIOD: Duration = Duration::from_secs(60);

/// Says what others do and do wrong, in a few lines for all of one kind.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    /// The disk that it is about, where there are many.
    about: About,
    budget: Mutex<Budget>,
    /// Requests that the host failed, said or not.
    failures: AtomicU64,
}

#[derive(Debug, Default)]
struct Budget {
    since: Option<Instant>,
    said: u32,
    unsaid: u64,
}

/// The beginning of a line.
#[derive(Clone, Debug, Default)]
pub(crate) struct About(Option<Arc<str>>);

impl About {
    /// Lines about one of many disks.
    pub(crate) fn disk(name: &str) -> Self {
        Self(Some(name.into()))
    }
}

impl Display for About {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |name| write!(f, "{name}: "))
    }
}

impl Complaints {
    /// Complaints that begin so.
    pub(crate) fn about(about: About) -> Self {
        Self {
            about,
            ..Self::default()
        }
    }

    /// Something happened that others can make happen as often as they like.
    pub(crate) fn info(&self, line: Arguments<'_>) {
        if let Some(unsaid) = self.permit(Instant::now()) {
            tracing::info!("{}{line}{}", self.about, Unsaid(unsaid));
        }
    }

    /// A guest or a front end did wrong.
    pub(crate) fn warn(&self, line: Arguments<'_>) {
        if let Some(unsaid) = self.permit(Instant::now()) {
            tracing::warn!("{}{line}{}", self.about, Unsaid(unsaid));
        }
    }

    /// The host failed a request.
    pub(crate) fn error(&self, line: Arguments<'_>) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        if let Some(unsaid) = self.permit(Instant::now()) {
            tracing::error!("{}{line}{}", self.about, Unsaid(unsaid));
        }
    }

    /// How many requests the host failed.
    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Whether one more line may be said, and how many were not said before it.
    fn permit(&self, now: Instant) -> Option<u64> {
        let mut budget = self.budget.lock().unwrap_or_else(PoisonError::into_inner);
        let since = *budget.since.get_or_insert(now);
        if now.duration_since(since) >= PERIOD {
            (budget.since, budget.said) = (Some(now), 0);
        }
        if budget.said >= LINES {
            budget.unsaid += 1;
            return None;
        }
        budget.said += 1;
        Some(std::mem::take(&mut budget.unsaid))
    }
}

/// How many lines are missing before this one.
struct Unsaid(u64);

impl std::fmt::Display for Unsaid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " ({count} more such lines were not logged)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_complaints_becomes_a_few_lines_and_a_number() {
        let complaints = Complaints::default();
        let start = Instant::now();
        let said = (0..1000).filter_map(|_| complaints.permit(start));
        assert_eq!(said.count(), LINES as usize);
        assert_eq!(
            complaints.permit(start + PERIOD),
            Some(1000 - u64::from(LINES))
        );
        assert_eq!(complaints.permit(start + PERIOD), Some(0));
    }
}
