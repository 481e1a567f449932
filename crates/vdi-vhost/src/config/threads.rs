//! Which threads the daemon starts for queues, and which of them serve one disk alone.

use std::ops::{Range, RangeInclusive};

use toml::Spanned;

use super::ConfigError;
use crate::args::MAX_QUEUES;
use crate::cpus::{CpuError, CpuList};
use crate::crew::{MOST_SPARE, Staffing};

/// Which threads a process starts, but for those of the disks that are served from the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Threads {
    /// How many serve all disks that have none of their own, if that is said.
    pub(crate) shared: Option<u16>,
    /// Where those run.
    pub(crate) cpus: Option<CpuList>,
    /// How many wait for disks that want some of their own.
    pub(crate) spare: u16,
}

/// Why there cannot be such threads.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ThreadsError {
    #[error("`{what}` is {found}; it can be {least} to {most}")]
    Count {
        what: &'static str,
        found: u16,
        least: u16,
        most: u16,
    },
    #[error(
        "`workers` is {found}, but the disk has {queues} queues, which is the most that can be served at a time"
    )]
    Idle { found: usize, queues: u16 },
    #[error(
        "`worker-cpus` is {found}, but `workers` is 0; say how many workers the disk is to have, or leave both out"
    )]
    Nobody { found: CpuList },
    #[error("`worker-cpus` is {found}")]
    Cpus {
        found: CpuList,
        #[source]
        source: CpuError,
    },
}

/// What the file says of threads, each with its place there.
pub(super) type Wanted = (
    Option<Spanned<u16>>,
    Option<Spanned<CpuList>>,
    Option<Spanned<u16>>,
);

impl Threads {
    pub(super) fn of(
        (workers, cpus, spare): Wanted,
        at: impl Fn(Range<usize>, ThreadsError) -> ConfigError,
    ) -> Result<Self, ConfigError> {
        if let Some(workers) = &workers {
            let checked = in_range("workers", *workers.get_ref(), 1..=MAX_QUEUES);
            checked.map_err(|source| at(workers.span(), source))?;
        }
        if let Some(spare) = &spare {
            let checked = in_range("spare-workers", *spare.get_ref(), 0..=MOST_SPARE);
            checked.map_err(|source| at(spare.span(), source))?;
        }
        if let Some(cpus) = &cpus {
            check_cpus(cpus.get_ref()).map_err(|source| at(cpus.span(), source))?;
        }
        Ok(Self {
            shared: workers.map(Spanned::into_inner),
            cpus: cpus.map(Spanned::into_inner),
            spare: spare.map_or(0, Spanned::into_inner),
        })
    }
}

/// The threads that a disk has for its own, by what it says and what the defaults say.
pub(super) fn own_workers(
    (workers, cpus): (Option<u16>, Option<CpuList>),
    (default_workers, default_cpus): (Option<u16>, Option<&CpuList>),
    queues: u16,
) -> Result<Option<Staffing>, ThreadsError> {
    if let (Some(0), Some(found)) = (workers, &cpus) {
        let found = found.clone();
        return Err(ThreadsError::Nobody { found });
    }
    // A disk that names CPUs only wants one thread for each.
    let workers = workers.or_else(|| default_workers.filter(|_| cpus.is_none()));
    let cpus = cpus.or_else(|| default_cpus.cloned());
    let count = match (workers, &cpus) {
        (Some(0), _) | (None, None) => return Ok(None),
        (Some(count), _) => usize::from(count),
        (None, Some(cpus)) => cpus.len(),
    };
    if count > usize::from(queues) {
        let found = count;
        return Err(ThreadsError::Idle { found, queues });
    }
    cpus.as_ref().map_or(Ok(()), check_cpus)?;
    Ok(Some(Staffing { count, cpus }))
}

fn check_cpus(cpus: &CpuList) -> Result<(), ThreadsError> {
    cpus.check().map_err(|source| ThreadsError::Cpus {
        found: cpus.clone(),
        source,
    })
}

fn in_range(
    what: &'static str,
    found: u16,
    range: RangeInclusive<u16>,
) -> Result<(), ThreadsError> {
    let (least, most) = range.clone().into_inner();
    if range.contains(&found) {
        return Ok(());
    }
    Err(ThreadsError::Count {
        what,
        found,
        least,
        most,
    })
}
