//! What we want to reach: a rate beside QEMU's on the same image, or fio's on a raw file.

use crate::medium::Medium;

/// How a server does beside others, or how it shall do. Nothing where there is nothing to compare with, or nothing is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Ratios {
    /// The rate, as a multiple of that of QEMU's daemon; the more the better.
    pub(crate) times_qemu: Option<f64>,
    /// The rate, as a multiple of fio's; the more the better.
    pub(crate) times_fio: Option<f64>,
    /// The CPU time of a request, as a multiple of that of QEMU's daemon; the less the better.
    pub(crate) cpu_of_qemu: Option<f64>,
}

/// Rates count as equal from here on: rounds differ by more.
pub(crate) const EQUAL: f64 = 0.95;

/// How long a start with a disk of 2 TiB may take.
pub(crate) const START_MS: f64 = 20.0;
/// The part of QEMU's memory that an idle daemon may have.
pub(crate) const IDLE_OF_QEMU: f64 = 0.25;

/// What is wanted of one workload on one medium.
pub(crate) fn of(medium: Medium, workload: &str) -> Ratios {
    let qemu = |times| Ratios {
        times_qemu: Some(times),
        ..Ratios::default()
    };
    let fio = Ratios {
        times_fio: Some(EQUAL),
        ..Ratios::default()
    };
    let times = |tmpfs, buffered, direct| match medium {
        Medium::Tmpfs => qemu(tmpfs),
        Medium::Buffered => qemu(buffered),
        Medium::Direct => qemu(direct),
    };
    let or_fio = |tmpfs, buffered| match medium {
        Medium::Tmpfs => qemu(tmpfs),
        Medium::Buffered => qemu(buffered),
        Medium::Direct => fio,
    };
    match workload {
        "randread-4k-qd1" => times(2.5, 2.5, 1.5),
        "randread-4k-qd32" => Ratios {
            cpu_of_qemu: match medium {
                Medium::Tmpfs => Some(0.55),
                Medium::Buffered => None,
                Medium::Direct => Some(0.65),
            },
            ..or_fio(2.0, 2.2)
        },
        "randread-4k-qd32-2q" | "randread-4k-qd32-2q-calls" => or_fio(5.0, 4.5),
        "randwrite-4k-qd32" => or_fio(2.0, 2.5),
        "seqread-128k-qd8" | "seqread-1m-qd8" => or_fio(1.6, 1.3),
        "allocwrite-4k-qd1" => times(30.0, 11.0, 15.0),
        "allocwrite-4k-qd16" => times(60.0, 12.0, 45.0),
        "allocwrite-1m-qd4" => times(1.3, 1.3, 3.0),
        "zeroread-4k-qd32" => times(1.5, 2.0, 2.0),
        "writeflush-4k-qd1" => times(2.0, 1.3, 1.3),
        _ => Ratios::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::ALL;

    #[test]
    fn targets_are_of_workloads_that_there_are() {
        let with_targets = ALL
            .iter()
            .filter(|workload| of(Medium::Direct, workload.name) != Ratios::default());
        assert_eq!(with_targets.count(), 12);
    }
}
