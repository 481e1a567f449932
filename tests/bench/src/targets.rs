//! What we want to reach: a rate beside QEMU's on the same image, or fio's on a raw file.

use crate::medium::Medium;

/// A figure to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Target {
    /// So many times the rate of QEMU's daemon.
    TimesQemu(f64),
    /// The rate of fio, within [`EQUAL`].
    Fio,
    /// At most this part of the CPU time of QEMU's daemon.
    CpuOfQemu(f64),
}

/// Rates count as equal from here on: rounds differ by more.
pub(crate) const EQUAL: f64 = 0.95;

/// How long a start with a disk of 2 TiB may take.
pub(crate) const START_MS: f64 = 20.0;
/// The part of QEMU's memory that an idle daemon may have.
pub(crate) const IDLE_OF_QEMU: f64 = 0.25;

/// The targets of one workload on one medium.
pub(crate) fn of(medium: Medium, workload: &str) -> Vec<Target> {
    use Target::{CpuOfQemu, Fio, TimesQemu};
    let times = |tmpfs, buffered, direct| match medium {
        Medium::Tmpfs => TimesQemu(tmpfs),
        Medium::Buffered => TimesQemu(buffered),
        Medium::Direct => TimesQemu(direct),
    };
    let or_fio = |tmpfs, buffered| match medium {
        Medium::Tmpfs => TimesQemu(tmpfs),
        Medium::Buffered => TimesQemu(buffered),
        Medium::Direct => Fio,
    };
    match workload {
        "randread-4k-qd1" => vec![times(2.5, 2.5, 1.5)],
        "randread-4k-qd32" => match medium {
            Medium::Tmpfs => vec![TimesQemu(2.0), CpuOfQemu(0.55)],
            Medium::Buffered => vec![TimesQemu(2.2)],
            Medium::Direct => vec![Fio, CpuOfQemu(0.65)],
        },
        "randread-4k-qd32-2q" | "randread-4k-qd32-2q-calls" => vec![or_fio(5.0, 4.5)],
        "randwrite-4k-qd32" => vec![or_fio(2.0, 2.5)],
        "seqread-128k-qd8" | "seqread-1m-qd8" => vec![or_fio(1.6, 1.3)],
        "allocwrite-4k-qd1" => vec![times(30.0, 11.0, 15.0)],
        "allocwrite-4k-qd16" => vec![times(60.0, 12.0, 45.0)],
        "allocwrite-1m-qd4" => vec![times(1.3, 1.3, 3.0)],
        "zeroread-4k-qd32" => vec![times(1.5, 2.0, 2.0)],
        "writeflush-4k-qd1" => vec![times(2.0, 1.3, 1.3)],
        _ => vec![],
    }
}

/// How one server did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reached {
    pub(crate) times_qemu: Option<f64>,
    pub(crate) times_fio: Option<f64>,
    pub(crate) cpu_of_qemu: Option<f64>,
}

impl Target {
    /// The target and whether it was met, for a table.
    pub(crate) fn verdict(self, reached: Reached) -> String {
        let (what, met) = match self {
            Self::TimesQemu(wanted) => (
                format!("{wanted} × QEMU"),
                reached.times_qemu.map(|times| times >= wanted),
            ),
            Self::Fio => (
                "fio".to_owned(),
                reached.times_fio.map(|times| times >= EQUAL),
            ),
            Self::CpuOfQemu(wanted) => (
                format!("CPU {wanted} × QEMU"),
                reached.cpu_of_qemu.map(|part| part <= wanted),
            ),
        };
        match met {
            Some(true) => format!("{what}: met"),
            Some(false) => format!("{what}: **missed**"),
            None => what,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::ALL;

    #[test]
    fn a_target_is_met_or_missed_by_its_own_figure() {
        let reached = Reached {
            times_qemu: Some(2.0),
            times_fio: Some(0.9),
            cpu_of_qemu: Some(0.5),
        };
        assert_eq!(Target::TimesQemu(2.0).verdict(reached), "2 × QEMU: met");
        assert_eq!(Target::Fio.verdict(reached), "fio: **missed**");
        assert_eq!(
            Target::CpuOfQemu(0.4).verdict(reached),
            "CPU 0.4 × QEMU: **missed**"
        );
    }

    #[test]
    fn targets_are_of_workloads_that_there_are() {
        let with_targets = ALL
            .iter()
            .filter(|workload| !of(Medium::Direct, workload.name).is_empty());
        assert_eq!(with_targets.count(), 12);
    }
}
