//! Results as text: one table of ratios beside what was to be reached, one for each medium, and one with every server.

use clap::ValueEnum;

use crate::back_end::Server;
use crate::medium::Medium;
use crate::results::{Results, Row};
use crate::start::DISKS;
use crate::targets::{self, Ratios};
use crate::workload::ALL;

/// The shortest table: ratios, and what was to be reached.
pub(crate) fn overview(results: &Results) -> String {
    let media: Vec<Medium> = measured_media(results).collect();
    let mut text = results
        .machine()
        .map_or_else(String::new, |machine| machine.sentence() + "\n\n");
    let heads = media.iter().flat_map(|medium| {
        ["× QEMU", "× fio", "CPU × QEMU"].map(|column| format!("{}: {column}", short(*medium)))
    });
    let heads: Vec<_> = std::iter::once("workload".to_owned())
        .chain(heads)
        .collect();
    text += &row_of(&heads);
    text += &row_of(&vec!["---".to_owned(); heads.len()]);
    for workload in ALL {
        let cells: Vec<_> = media
            .iter()
            .map(|medium| {
                let ours = results.row(*medium, workload.name, Server::VdiVhost)?;
                let reached = reached(results, *medium, workload.name, &ours);
                let wanted = targets::of(*medium, workload.name);
                Some(overview_cells(reached, wanted))
            })
            .collect();
        if cells.iter().any(Option::is_some) {
            let cells = cells.into_iter().flat_map(Option::unwrap_or_default);
            let name = std::iter::once(workload.name.to_owned());
            text += &row_of(&name.chain(cells).collect::<Vec<_>>());
        }
    }
    text + &starts(results)
}

/// Ratios beside what is wanted, in the order of the columns.
fn overview_cells(reached: Ratios, wanted: Ratios) -> [String; 3] {
    [
        at_least(reached.times_qemu, wanted.times_qemu),
        at_least(reached.times_fio, wanted.times_fio),
        at_most(reached.cpu_of_qemu, wanted.cpu_of_qemu),
    ]
}

/// A figure and what is wanted of it; bold if it is less.
fn at_least(reached: Option<f64>, wanted: Option<f64>) -> String {
    beside(
        reached,
        wanted,
        |reached, wanted| reached >= wanted,
        ["≥", "<"],
    )
}

/// A figure and what is wanted of it; bold if it is more.
fn at_most(reached: Option<f64>, wanted: Option<f64>) -> String {
    beside(
        reached,
        wanted,
        |reached, wanted| reached <= wanted,
        ["≤", ">"],
    )
}

/// A figure as it is shown is what is compared: further digits say nothing.
fn beside(
    reached: Option<f64>,
    wanted: Option<f64>,
    meets: impl Fn(f64, f64) -> bool,
    [met, missed]: [&str; 2],
) -> String {
    let shown = ratio(reached);
    match (shown.parse(), wanted) {
        (Ok(reached), Some(wanted)) if meets(reached, wanted) => format!("{shown} {met} {wanted}"),
        (Ok(_), Some(wanted)) => format!("**{shown} {missed} {wanted}**"),
        _ => shown,
    }
}

fn measured_media(results: &Results) -> impl Iterator<Item = Medium> {
    let all = Medium::value_variants().iter().copied();
    all.filter(|medium| results.has(*medium))
}

fn reached(results: &Results, medium: Medium, workload: &str, ours: &Row<'_>) -> Ratios {
    let qemu = results.qemu(medium, workload);
    let fio = results.fio(medium, workload);
    Ratios {
        times_qemu: qemu.as_ref().map(|qemu| ours.iops() / qemu.iops()),
        times_fio: fio.map(|fio| ours.iops() / fio.iops()),
        cpu_of_qemu: qemu.as_ref().map(|qemu| ours.cpu_us() / qemu.cpu_us()),
    }
}

/// The tables of each medium: our daemon beside the others.
pub(crate) fn by_medium(results: &Results) -> String {
    let mut text = String::new();
    for medium in measured_media(results) {
        text += &format!("\n### {}\n\n", title(medium));
        text += &row_of(
            &[
                "workload",
                "requests/s (least-most)",
                "× QEMU",
                "× QEMU, io_uring",
                "× QEMU, raw",
                "× fio, raw",
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
        text += &row_of(&["---"; 17].map(str::to_owned));
        for workload in ALL {
            if let Some(ours) = results.row(medium, workload.name, Server::VdiVhost) {
                text += &medium_row(results, medium, workload.name, &ours);
            }
        }
    }
    text
}

fn title(medium: Medium) -> &'static str {
    match medium {
        Medium::Tmpfs => "tmpfs: what the software costs",
        Medium::Buffered => "a file system, through the page cache",
        Medium::Direct => "the same file system past the page cache",
    }
}

fn short(medium: Medium) -> &'static str {
    match medium {
        Medium::Tmpfs => "tmpfs",
        Medium::Buffered => "page cache",
        Medium::Direct => "O_DIRECT",
    }
}

fn row_of(cells: &[String]) -> String {
    format!("| {} |\n", cells.join(" | "))
}

fn medium_row(results: &Results, medium: Medium, workload: &str, ours: &Row<'_>) -> String {
    let qemu = results.qemu(medium, workload);
    let rate_beside = |other: Option<Row<'_>>| other.map(|other| ours.iops() / other.iops());
    let of = |server| rate_beside(results.row(medium, workload, server));
    let reached = reached(results, medium, workload, ours);
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
        let part = memory(Server::QsdVdi).map(|qemu| mib / qemu);
        text += &row_of(&[
            disk.to_owned(),
            at_most(Some(ms), (disk == "2 TiB").then_some(targets::START_MS)),
            number(time(Server::QsdVdi)),
            number(Some(mib)),
            number(memory(Server::QsdVdi)),
            at_most(part, (disk == "4 GiB").then_some(targets::IDLE_OF_QEMU)),
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
    ];
    let head = row_of(&head.map(str::to_owned)) + &row_of(&["---"; 6].map(str::to_owned));
    format!("\n### Starting, and doing nothing\n\n{head}{text}")
}

/// The long tables: every server.
pub(crate) fn details(results: &Results) -> String {
    let mut text = String::new();
    for medium in measured_media(results) {
        text += &format!("\n### {}, all servers\n\n", title(medium));
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
                if let Some(row) = results.row(medium, workload.name, *server) {
                    text += &details_row(results, medium, workload.name, *server, &row);
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
    overview(results) + &by_medium(results) + &details(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missed_is_seen() {
        assert_eq!(at_least(Some(1.04), Some(2.0)), "**1.04 < 2**");
        assert_eq!(at_least(Some(2.5), Some(2.5)), "2.50 ≥ 2.5");
        assert_eq!(at_most(Some(0.49), Some(0.25)), "**0.49 > 0.25**");
        assert_eq!(at_most(Some(0.2), Some(0.25)), "0.20 ≤ 0.25");
        assert_eq!(at_most(Some(0.2), None), "0.20");
        assert_eq!(at_least(None, Some(1.0)), "");
        assert_eq!(at_least(Some(0.949), Some(0.95)), "0.95 ≥ 0.95");
        assert_eq!(at_least(Some(0.944), Some(0.95)), "**0.94 < 0.95**");
    }
}
