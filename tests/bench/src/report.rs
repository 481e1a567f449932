//! Records as tables: the median of the rounds, from the least to the most, and how servers compare.

use std::fmt::Write;

use clap::ValueEnum;

use crate::back_end::Server;
use crate::medium::Medium;
use crate::record::Record;
use crate::workload::ALL;

/// The rounds of one server under one workload.
struct Row<'a> {
    rounds: Vec<&'a Record>,
}

impl Row<'_> {
    fn median(&self, value: impl Fn(&Record) -> f64) -> f64 {
        let mut values: Vec<f64> = self.rounds.iter().map(|record| value(record)).collect();
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        }
    }

    fn median_of_some(&self, value: impl Fn(&Record) -> Option<f64>) -> Option<f64> {
        self.rounds
            .iter()
            .all(|record| value(record).is_some())
            .then(|| self.median(|record| value(record).unwrap_or_default()))
    }

    fn range(&self) -> (f64, f64) {
        let rates = self.rounds.iter().map(|record| record.iops);
        rates.fold((f64::INFINITY, 0.0), |(least, most), rate| {
            (rate.min(least), rate.max(most))
        })
    }
}

/// One table for each medium that was measured.
pub(crate) fn tables(records: &[Record]) -> String {
    let mut text = String::new();
    for medium in Medium::value_variants() {
        let on_it: Vec<_> = records
            .iter()
            .filter(|record| record.medium == *medium)
            .collect();
        if !on_it.is_empty() {
            table(&mut text, *medium, &on_it);
        }
    }
    text
}

fn table(text: &mut String, medium: Medium, records: &[&Record]) {
    let head = "| workload | server | requests/s (least-most) | to QEMU's VDI | to fio | p50 us | p99 us | CPU us/request | to QEMU's VDI | kicks/request | calls/request | resident MiB |";
    writeln!(text, "\n### {medium:?}\n\n{head}\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |").expect("strings grow");
    for workload in ALL {
        let row = |server: Server| {
            let rounds: Vec<_> = records
                .iter()
                .filter(|record| record.workload == workload.name && record.server == server)
                .copied()
                .collect();
            (!rounds.is_empty()).then_some(Row { rounds })
        };
        let qemu = row(Server::QsdVdi).or_else(|| row(Server::QsdQcow2));
        let fio = row(Server::Fio);
        for server in Server::value_variants() {
            if let Some(row) = row(*server) {
                line(
                    text,
                    workload.name,
                    *server,
                    &row,
                    qemu.as_ref(),
                    fio.as_ref(),
                );
            }
        }
    }
}

fn line(
    text: &mut String,
    workload: &str,
    server: Server,
    row: &Row<'_>,
    qemu: Option<&Row<'_>>,
    fio: Option<&Row<'_>>,
) {
    let iops = row.median(|record| record.iops);
    let (least, most) = row.range();
    let cpu = row.median(|record| record.cpu_us);
    let ratio = |of: f64, to: Option<f64>| {
        to.map_or_else(|| "-".to_owned(), |to| format!("{:.2}", of / to))
    };
    let some =
        |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.3}"));
    let mib = row.median_of_some(|record| record.resident_kib.map(mebibytes));
    let name = server
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned());
    writeln!(
        text,
        "| {workload} | {name} | {iops:.0} ({least:.0}-{most:.0}) | {} | {} | {:.1} | {:.1} | {cpu:.2} | {} | {} | {} | {} |",
        ratio(iops, qemu.map(|qemu| qemu.median(|record| record.iops))),
        ratio(iops, fio.map(|fio| fio.median(|record| record.iops))),
        row.median(|record| record.p50_us),
        row.median(|record| record.p99_us),
        ratio(cpu, qemu.map(|qemu| qemu.median(|record| record.cpu_us))),
        some(row.median_of_some(|record| record.kicks)),
        some(row.median_of_some(|record| record.calls)),
        mib.map_or_else(|| "-".to_owned(), |mib| format!("{mib:.1}")),
    )
    .expect("strings grow");
}

#[expect(clippy::cast_precision_loss, reason = "memory is far below 2^52 KiB")]
fn mebibytes(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
