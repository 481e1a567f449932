//! Results as text: a short table for each medium, with what was to be reached, and one with every server.

use clap::ValueEnum;

use crate::back_end::Server;
use crate::medium::Medium;
use crate::results::{Results, Row};
use crate::start::DISKS;
use crate::targets::{self, Reached};
use crate::workload::ALL;

/// The short tables: our daemon beside the others.
pub(crate) fn summary(results: &Results) -> String {
    let mut text = results
        .machine()
        .map_or_else(String::new, |machine| machine.sentence() + "\n");
    for medium in Medium::value_variants()
        .iter()
        .filter(|medium| results.has(**medium))
    {
        text += &format!("\n### {}\n\n", title(*medium));
        text += &row_of(
            &[
                "workload",
                "requests/s (least-most)",
                "× QEMU",
                "× QEMU, io_uring",
                "× QEMU, raw",
                "× fio, raw",
                "to reach",
                "p50 µs",
                "p99 µs",
                "QEMU p50",
                "QEMU p99",
                "CPU µs",
                "× QEMU",
                "syscalls",
                "QEMU",
                "calls",
                "MiB",
                "QEMU",
            ]
            .map(str::to_owned),
        );
        text += &row_of(&["---"; 18].map(str::to_owned));
        for workload in ALL {
            if let Some(ours) = results.row(*medium, workload.name, Server::VdiVhost) {
                text += &summary_row(results, *medium, workload.name, &ours);
            }
        }
    }
    text + &starts(results)
}

fn title(medium: Medium) -> &'static str {
    match medium {
        Medium::Tmpfs => "tmpfs: what the software costs",
        Medium::Buffered => "a file system, through the page cache",
        Medium::Direct => "the same file system past the page cache",
    }
}

fn row_of(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

fn summary_row(results: &Results, medium: Medium, workload: &str, ours: &Row<'_>) -> String {
    let qemu = results.qemu(medium, workload);
    let rate_beside = |other: Option<Row<'_>>| other.map(|other| ours.iops() / other.iops());
    let of = |server| rate_beside(results.row(medium, workload, server));
    let reached = Reached {
        times_qemu: qemu.as_ref().map(|qemu| ours.iops() / qemu.iops()),
        times_fio: rate_beside(results.fio(medium, workload)),
        cpu_of_qemu: qemu.as_ref().map(|qemu| ours.cpu_us() / qemu.cpu_us()),
    };
    let targets = targets::of(medium, workload);
    let verdicts: Vec<_> = targets
        .into_iter()
        .map(|target| target.verdict(reached))
        .collect();
    let (least, most) = ours.range();
    let qemus = |value: fn(&Row<'_>) -> f64| number(qemu.as_ref().map(value));
    let qemu_server = if results.row(medium, workload, Server::QsdVdi).is_some() {
        Server::QsdVdi
    } else {
        Server::QsdQcow2
    };
    row_of(&[
        workload.to_owned(),
        format!("{:.0} ({least:.0}-{most:.0})", ours.iops()),
        ratio(reached.times_qemu),
        ratio(of(Server::QsdVdiUring)),
        ratio(of(Server::QsdRaw)),
        ratio(reached.times_fio),
        verdicts.join(", "),
        number(Some(p50(ours))),
        number(Some(p99(ours))),
        qemus(p50),
        qemus(p99),
        number(Some(ours.cpu_us())),
        ratio(reached.cpu_of_qemu),
        ratio(results.syscalls(medium, workload, Server::VdiVhost)),
        ratio(results.syscalls(medium, workload, qemu_server)),
        ratio(ours.median_of_some(|load| load.calls)),
        number(resident_mib(ours)),
        number(qemu.as_ref().and_then(resident_mib)),
    ])
}

fn p50(row: &Row<'_>) -> f64 {
    row.median(|load| load.p50_us)
}

fn p99(row: &Row<'_>) -> f64 {
    row.median(|load| load.p99_us)
}

/// Three digits that count.
fn number(value: Option<f64>) -> String {
    match value {
        None => String::new(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

fn ratio(value: Option<f64>) -> String {
    match value {
        Some(value) if !value.is_finite() => String::new(),
        Some(value) if value >= 0.01 || value == 0.0 => number(Some(value)),
        Some(value) => format!("{value:.4}"),
        None => String::new(),
    }
}

#[expect(clippy::cast_precision_loss, reason = "memory is far below 2^52 KiB")]
fn mebibytes(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

fn resident_mib(row: &Row<'_>) -> Option<f64> {
    row.median_of_some(|load| load.resident_kib.map(mebibytes))
}

/// The table of starts.
fn starts(results: &Results) -> String {
    let mut text = String::new();
    for (bytes, disk) in DISKS {
        let time = |server| results.start(server, bytes, |start| start.first_reply_ms);
        let memory = |server| results.start(server, bytes, |start| mebibytes(start.idle_kib));
        let (Some(ms), Some(mib)) = (time(Server::VdiVhost), memory(Server::VdiVhost)) else {
            continue;
        };
        let mut verdicts = Vec::new();
        let verdict = |met: bool| if met { "met" } else { "**missed**" };
        if disk == "2 TiB" {
            verdicts.push(format!(
                "{} ms: {}",
                targets::START_MS,
                verdict(ms <= targets::START_MS)
            ));
        }
        let part = memory(Server::QsdVdi).map(|qemu| mib / qemu);
        if let (Some(part), "4 GiB") = (part, disk) {
            verdicts.push(format!(
                "memory {} × QEMU: {}",
                targets::IDLE_OF_QEMU,
                verdict(part <= targets::IDLE_OF_QEMU)
            ));
        }
        text += &row_of(&[
            disk.to_owned(),
            number(Some(ms)),
            number(time(Server::QsdVdi)),
            number(Some(mib)),
            number(memory(Server::QsdVdi)),
            ratio(part),
            verdicts.join(", "),
        ]);
    }
    if text.is_empty() {
        return text;
    }
    let head = [
        "empty disk of",
        "ms to the first reply",
        "QEMU",
        "idle MiB",
        "QEMU",
        "× QEMU",
        "to reach",
    ];
    let head = row_of(&head.map(str::to_owned)) + &row_of(&["---"; 7].map(str::to_owned));
    format!("\n### Starting, and doing nothing\n\n{head}{text}")
}

/// The long tables: every server.
pub(crate) fn details(results: &Results) -> String {
    let mut text = String::new();
    for medium in Medium::value_variants()
        .iter()
        .filter(|medium| results.has(**medium))
    {
        text += &format!("\n### {}, all servers\n\n", title(*medium));
        text += &row_of(
            &[
                "workload",
                "server",
                "requests/s (least-most)",
                "× QEMU",
                "× fio",
                "p50 µs",
                "p99 µs",
                "CPU µs",
                "× QEMU",
                "syscalls",
                "kicks",
                "calls",
                "MiB",
            ]
            .map(str::to_owned),
        );
        text += &row_of(&["---"; 13].map(str::to_owned));
        for workload in ALL {
            for server in Server::value_variants() {
                if let Some(row) = results.row(*medium, workload.name, *server) {
                    text += &details_row(results, *medium, workload.name, *server, &row);
                }
            }
        }
    }
    text
}

fn details_row(
    results: &Results,
    medium: Medium,
    workload: &str,
    server: Server,
    row: &Row<'_>,
) -> String {
    let qemu = results.qemu(medium, workload);
    let fio = results.fio(medium, workload);
    let (least, most) = row.range();
    row_of(&[
        workload.to_owned(),
        server
            .to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned()),
        format!("{:.0} ({least:.0}-{most:.0})", row.iops()),
        ratio(qemu.as_ref().map(|qemu| row.iops() / qemu.iops())),
        ratio(fio.map(|fio| row.iops() / fio.iops())),
        number(Some(p50(row))),
        number(Some(p99(row))),
        number(Some(row.cpu_us())),
        ratio(qemu.as_ref().map(|qemu| row.cpu_us() / qemu.cpu_us())),
        ratio(results.syscalls(medium, workload, server)),
        ratio(row.median_of_some(|load| load.kicks)),
        ratio(row.median_of_some(|load| load.calls)),
        number(resident_mib(row)),
    ])
}

/// All tables.
pub(crate) fn whole(results: &Results) -> String {
    summary(results) + &details(results)
}
