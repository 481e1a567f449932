//! Results as a picture: how often each server does what QEMU's daemon does once, on a scale of powers of two.

use std::fmt::Write;

use crate::back_end::Server;
use crate::medium::Medium;
use crate::results::Results;
use crate::workload::{ALL, Disk, Workload};

/// The bars of one workload, from above, and their colours.
const BARS: [(Server, &str, &str); 4] = [
    (Server::VdiVhost, "vdi-vhost, VDI", "#1a7f37"),
    (
        Server::QsdVdiUring,
        "qemu-storage-daemon, VDI, aio=io_uring",
        "#bf8700",
    ),
    (Server::QsdRaw, "qemu-storage-daemon, raw", "#cf6a4c"),
    (Server::Fio, "fio io_uring, raw, no guest", "#8c959f"),
];
const MEDIA: [(Medium, &str); 3] = [
    (Medium::Tmpfs, "tmpfs"),
    (Medium::Buffered, "file system, page cache"),
    (Medium::Direct, "file system, O_DIRECT"),
];

/// From 2^-3 to 2^8.
const OCTAVES: (i32, i32) = (-3, 8);
const OCTAVE: f64 = 23.0;
const BAR: f64 = 5.0;
const ROW: f64 = 28.0;
const LEFT: f64 = 185.0;
const TOP: f64 = 78.0;
const GAP: f64 = 22.0;

/// A picture of all media.
pub(crate) fn draw(results: &Results) -> String {
    let measured = |workload: &&Workload| {
        let on = |(medium, _)| results.qemu(medium, workload.name).is_some();
        is_shown(workload) && MEDIA.into_iter().any(on)
    };
    let rows: Vec<_> = ALL.iter().filter(measured).collect();
    let panel = f64::from(OCTAVES.1 - OCTAVES.0) * OCTAVE;
    let width = LEFT + 3.0 * (panel + GAP);
    let bottom = TOP + rows.len() as f64 * ROW;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
        bottom + 52.0
    );
    let mut put = |line: String| writeln!(svg, "{line}").expect("strings grow");
    put(text(
        8.0,
        18.0,
        "start",
        "Requests per second, as multiples of qemu-storage-daemon on the same VDI image (logarithmic)",
        "bold",
    ));
    legend(&mut put);
    for (nth, workload) in rows.iter().enumerate() {
        let y = TOP + nth as f64 * ROW;
        put(text(LEFT - 8.0, y + 16.0, "end", workload.name, "normal"));
    }
    for (nth, (medium, name)) in MEDIA.into_iter().enumerate() {
        let left = LEFT + nth as f64 * (panel + GAP);
        put(text(left, TOP - 8.0, "start", name, "bold"));
        axis(&mut put, left, bottom);
        for (nth, workload) in rows.iter().enumerate() {
            bars(
                &mut put,
                results,
                medium,
                workload.name,
                (left, TOP + nth as f64 * ROW),
            );
        }
    }
    if let Some(machine) = results.machine() {
        for (nth, half) in machine.sentence().split("; ").enumerate() {
            let y = bottom + 30.0 + 14.0 * nth as f64;
            put(text(8.0, y, "start", half, "normal"));
        }
    }
    svg + "</svg>\n"
}

/// QEMU answers discards of VDI images and does nothing, and has no chains of them.
fn is_shown(workload: &Workload) -> bool {
    !matches!(
        workload.disk,
        Disk::Refilled | Disk::Chain | Disk::FreshChain | Disk::FreshSmallChain
    )
}

fn legend(put: &mut impl FnMut(String)) {
    let mut x = 8.0;
    for (_, name, colour) in BARS {
        put(format!(
            "<rect x=\"{x}\" y=\"30\" width=\"12\" height=\"9\" fill=\"{colour}\"/>"
        ));
        put(text(x + 17.0, 39.0, "start", name, "normal"));
        x += 40.0 + 6.2 * name.len() as f64;
    }
}

fn axis(put: &mut impl FnMut(String), left: f64, bottom: f64) {
    for power in OCTAVES.0..=OCTAVES.1 {
        let x = left + f64::from(power - OCTAVES.0) * OCTAVE;
        let colour = if power == 0 { "#24292f" } else { "#d8dee4" };
        put(format!(
            "<line x1=\"{x}\" y1=\"{TOP}\" x2=\"{x}\" y2=\"{bottom}\" stroke=\"{colour}\"/>"
        ));
        if power % 2 == 0 {
            put(text(
                x,
                bottom + 13.0,
                "middle",
                &2_f64.powi(power).to_string(),
                "normal",
            ));
        }
    }
}

fn bars(
    put: &mut impl FnMut(String),
    results: &Results,
    medium: Medium,
    workload: &str,
    (left, y): (f64, f64),
) {
    let Some(qemu) = results.qemu(medium, workload) else {
        return;
    };
    let zero = left - f64::from(OCTAVES.0) * OCTAVE;
    for (nth, (server, _, colour)) in BARS.into_iter().enumerate() {
        let row = if server == Server::Fio {
            results.fio(medium, workload)
        } else {
            results.row(medium, workload, server)
        };
        let Some(row) = row else { continue };
        let times = row.iops() / qemu.iops();
        let power = times.log2().clamp(OCTAVES.0.into(), OCTAVES.1.into());
        let (from, to) = if power < 0.0 {
            (zero + power * OCTAVE, zero)
        } else {
            (zero, zero + power * OCTAVE)
        };
        let top = y + 3.0 + nth as f64 * BAR;
        // A bar of no length is seen, too.
        let length = (to - from).max(1.0);
        put(format!(
            "<rect x=\"{from:.1}\" y=\"{top:.1}\" width=\"{length:.1}\" height=\"{BAR}\" fill=\"{colour}\"><title>{workload}: {times:.2}</title></rect>"
        ));
        if server == Server::VdiVhost {
            put(format!(
                "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"8\" fill=\"#1a7f37\">{times:.1}</text>",
                to.max(zero) + 3.0,
                top + BAR
            ));
        }
    }
}

fn text(x: f64, y: f64, anchor: &str, words: &str, weight: &str) -> String {
    format!(
        "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\" font-weight=\"{weight}\">{words}</text>"
    )
}
