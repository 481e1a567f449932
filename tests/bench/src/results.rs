//! Records by medium, workload and server, and the medians of their rounds.

use crate::back_end::Server;
use crate::machine::Machine;
use crate::medium::Medium;
use crate::record::{Load, Record, Start};

/// The rounds of one server under one workload on one medium; at least one.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    rounds: Vec<&'a Load>,
}

impl Row<'_> {
    pub(crate) fn iops(&self) -> f64 {
        self.median(|load| load.iops)
    }

    pub(crate) fn cpu_us(&self) -> f64 {
        self.median(|load| load.cpu_us)
    }

    pub(crate) fn median(&self, value: impl Fn(&Load) -> f64) -> f64 {
        median(self.rounds.iter().map(|load| value(load)).collect())
    }

    /// Nothing if one of the rounds has none.
    pub(crate) fn median_of_some(&self, value: impl Fn(&Load) -> Option<f64>) -> Option<f64> {
        let values: Option<Vec<_>> = self.rounds.iter().map(|load| value(load)).collect();
        values.map(median)
    }

    /// The lowest and the highest rate.
    pub(crate) fn range(&self) -> (f64, f64) {
        let rates = self.rounds.iter().map(|load| load.iops);
        rates.fold((f64::INFINITY, 0.0), |(least, most), rate| {
            (rate.min(least), rate.max(most))
        })
    }
}

/// Everything that was measured.
#[derive(Debug)]
pub(crate) struct Results(pub(crate) Vec<Record>);

impl Results {
    /// Where it was measured, as the first part says.
    pub(crate) fn machine(&self) -> Option<&Machine> {
        self.0.iter().find_map(|record| match record {
            Record::Machine(machine) => Some(machine),
            Record::Load(_) | Record::Counted(_) | Record::Start(_) => None,
        })
    }

    fn loads(&self) -> impl Iterator<Item = &Load> {
        self.0.iter().filter_map(|record| match record {
            Record::Load(load) => Some(load),
            Record::Machine(_) | Record::Counted(_) | Record::Start(_) => None,
        })
    }

    /// Whether a medium was measured.
    pub(crate) fn has(&self, medium: Medium) -> bool {
        self.loads().any(|load| load.medium == medium)
    }

    /// The rounds of a server, if there are any.
    pub(crate) fn row(&self, medium: Medium, workload: &str, server: Server) -> Option<Row<'_>> {
        let of_it = |load: &&Load| {
            load.medium == medium && load.workload == workload && load.server == server
        };
        let rounds: Vec<_> = self.loads().filter(of_it).collect();
        (!rounds.is_empty()).then_some(Row { rounds })
    }

    /// What QEMU's daemon does with the same image, or with the QCOW2 image that stands for it.
    pub(crate) fn qemu(&self, medium: Medium, workload: &str) -> Option<Row<'_>> {
        let of = |server| self.row(medium, workload, server);
        of(Server::QsdVdi).or_else(|| of(Server::QsdQcow2))
    }

    /// The limit; fio knows no calls, so it is that of the workload without them.
    pub(crate) fn fio(&self, medium: Medium, workload: &str) -> Option<Row<'_>> {
        let workload = workload.strip_suffix("-calls").unwrap_or(workload);
        self.row(medium, workload, Server::Fio)
    }

    /// System calls for each request.
    pub(crate) fn syscalls(&self, medium: Medium, workload: &str, server: Server) -> Option<f64> {
        self.0.iter().find_map(|record| match record {
            Record::Counted(load)
                if load.medium == medium && load.workload == workload && load.server == server =>
            {
                load.syscalls
            }
            Record::Counted(_) | Record::Machine(_) | Record::Load(_) | Record::Start(_) => None,
        })
    }

    /// A median of the starts of a server with a disk.
    pub(crate) fn start(
        &self,
        server: Server,
        disk_bytes: u64,
        value: impl Fn(&Start) -> f64,
    ) -> Option<f64> {
        let of_it = |record: &Record| match record {
            Record::Start(start) if start.server == server && start.disk_bytes == disk_bytes => {
                Some(value(start))
            }
            Record::Start(_) | Record::Machine(_) | Record::Load(_) | Record::Counted(_) => None,
        };
        let values: Vec<_> = self.0.iter().filter_map(of_it).collect();
        (!values.is_empty()).then(|| median(values))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len().is_multiple_of(2) {
        f64::midpoint(values[middle - 1], values[middle])
    } else {
        values[middle]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
    }
}
