//! Which CPUs threads may run on, as the kernel writes that: `0-3,8`.
//!
//! A list of as many CPUs as there are threads pins each thread to one of them; with any other number each thread may run on all of
//! the list.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// CPUs, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CpuList(BTreeSet<usize>);

/// Why a list of CPUs cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CpuError {
    #[error("{found:?} is no list of CPUs; write it as the kernel does, such as 0-3,8")]
    Syntax { found: String },
    #[error("CPU {cpu} is none of those that this process may use, which are {allowed}")]
    NotAllowed { cpu: usize, allowed: CpuList },
    #[error("the host does not say which CPUs this process may use")]
    Unknown(#[source] Errno),
}

impl CpuList {
    /// Those that this thread may run on: in a thread that was never pinned, the process's.
    pub(crate) fn allowed() -> Result<Self, CpuError> {
        let set = sched_getaffinity(Pid::from_raw(0)).map_err(CpuError::Unknown)?;
        let is_set = |cpu: &usize| set.is_set(*cpu).unwrap_or(false);
        Ok(Self((0..CpuSet::count()).filter(is_set).collect()))
    }

    /// Refuses CPUs that do not exist here, or are kept from this process.
    pub(crate) fn check(&self) -> Result<(), CpuError> {
        let allowed = Self::allowed()?;
        match self.0.difference(&allowed.0).next() {
            Some(&cpu) => Err(CpuError::NotAllowed { cpu, allowed }),
            None => Ok(()),
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Where the `nth` of `count` threads may run.
    pub(crate) fn of_thread(&self, nth: usize, count: usize) -> Self {
        let one = self.0.iter().nth(nth).filter(|_| count == self.len());
        one.map_or_else(|| self.clone(), |cpu| Self([*cpu].into()))
    }

    /// Has a thread of this process run on these alone; 0 is this one.
    pub(crate) fn bind(&self, thread: Pid) -> Result<(), Errno> {
        let mut set = CpuSet::new();
        for cpu in &self.0 {
            set.set(*cpu)?;
        }
        sched_setaffinity(thread, &set)
    }
}

impl FromStr for CpuList {
    type Err = CpuError;

    fn from_str(text: &str) -> Result<Self, CpuError> {
        let wrong = || CpuError::Syntax {
            found: text.to_owned(),
        };
        let number = |text: &str| {
            let digits = text.bytes().all(|byte| byte.is_ascii_digit());
            let cpu = text.parse().ok().filter(|_| digits);
            cpu.filter(|cpu| *cpu < CpuSet::count()).ok_or_else(wrong)
        };
        let mut cpus = BTreeSet::new();
        for piece in text.split(',') {
            let (first, last) = piece.split_once('-').unwrap_or((piece, piece));
            let (first, last): (usize, usize) = (number(first)?, number(last)?);
            if first > last {
                return Err(wrong());
            }
            cpus.extend(first..=last);
        }
        Ok(Self(cpus))
    }
}

impl Display for CpuList {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut cpus = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(first) = cpus.next() {
            let mut last = first;
            while let Some(next) = cpus.next_if_eq(&(last + 1)) {
                last = next;
            }
            write!(f, "{comma}{first}")?;
            if last > first {
                write!(f, "-{last}")?;
            }
            comma = ",";
        }
        Ok(())
    }
}

impl Serialize for CpuList {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CpuList {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let text = String::deserialize(source)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> CpuList {
        text.parse().unwrap()
    }

    #[test]
    fn a_list_is_written_as_the_kernel_writes_it() {
        for (text, canonical) in [
            ("0", "0"),
            ("0-3,8", "0-3,8"),
            ("8,3,0-2,1", "0-3,8"),
            ("1023", "1023"),
            ("4,6-7,5", "4-7"),
        ] {
            assert_eq!(list(text).to_string(), canonical, "{text}");
        }
        for wrong in [
            "",
            ",",
            "1,",
            "a",
            "-1",
            "3-1",
            "1-",
            "+1",
            "1-2-3",
            "0 1",
            "1024",
            "0-9999999999",
        ] {
            let error = wrong.parse::<CpuList>().unwrap_err();
            assert!(error.to_string().contains("0-3,8"), "{wrong}");
        }
    }

    #[test]
    fn as_many_threads_as_cpus_have_one_each_and_others_have_all() {
        let cpus = list("1,4-5");
        let each = [0, 1, 2].map(|nth| cpus.of_thread(nth, 3).to_string());
        assert_eq!(each, ["1", "4", "5"]);
        for (nth, count) in [(0, 1), (1, 2), (3, 4)] {
            assert_eq!(cpus.of_thread(nth, count), cpus);
        }
    }

    #[test]
    fn what_this_process_may_not_use_is_refused_and_told() {
        let allowed = CpuList::allowed().unwrap();
        assert_eq!(allowed.check(), Ok(()));
        // No machine that this is tested on has so many.
        let error = list("1023").check().unwrap_err().to_string();
        assert!(error.contains("CPU 1023") && error.ends_with(&allowed.to_string()));
    }
}
