//! What `ctl` answers people: what a daemon returned, as tables.

use std::io::{self, Write};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::daemon::Info;
use crate::size::Human;
use crate::stats::{DiskStats, KindStats};

#[derive(Deserialize)]
struct Disks<T> {
    disks: Vec<T>,
    #[serde(default)]
    groups: Vec<Group>,
}

/// Disks that share limits.
#[derive(Deserialize)]
struct Group {
    name: String,
    limits: Map<String, Value>,
}

#[derive(Deserialize)]
struct Jobs {
    jobs: Vec<Job>,
}

/// A merge.
#[derive(Deserialize)]
struct Job {
    disk: String,
    command: String,
    state: String,
    done_bytes: u64,
    total_bytes: u64,
    kept: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Level {
    level: String,
    before: String,
}

/// Writes rows below each other: the first column to the left, of the others those to the right whose header begins with a space.
pub(super) fn table<R: AsRef<[String]>>(
    out: &mut impl Write,
    header: &[&str],
    rows: &[R],
) -> io::Result<()> {
    let width = |(nth, name): (usize, &&str)| {
        let cells = rows.iter().map(|row| row.as_ref()[nth].chars().count());
        cells.chain([name.trim_start().len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = header.iter().enumerate().map(width).collect();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for ((cell, width), name) in cells.zip(&widths).zip(header) {
            if name.starts_with(' ') {
                text += &format!("{cell:>width$}  ");
            } else {
                text += &format!("{cell:<width$}  ");
            }
        }
        writeln!(out, "{}", text.trim_end())
    };
    line(&mut header.iter().map(|name| name.trim_start()))?;
    rows.iter()
        .try_for_each(|row| line(&mut row.as_ref().iter().map(String::as_str)))
}

/// Any object: a line for each of its fields.
pub(crate) fn object(out: &mut impl Write, value: &Value) -> io::Result<()> {
    let Value::Object(fields) = value else {
        return writeln!(out, "{value}");
    };
    let width = fields.keys().map(String::len).max().unwrap_or(0) + 1;
    for (key, value) in fields {
        let key = format!("{}:", key.replace('_', " "));
        match value {
            Value::Null => {}
            Value::String(text) => writeln!(out, "{key:<width$} {text}")?,
            Value::Bool(is) => writeln!(out, "{key:<width$} {}", if *is { "yes" } else { "no" })?,
            Value::Number(_) => match value.as_u64().filter(|_| key.ends_with(" bytes:")) {
                Some(bytes) => writeln!(out, "{key:<width$} {bytes} ({})", Human(bytes))?,
                None => writeln!(out, "{key:<width$} {value}")?,
            },
            Value::Object(fields) if key.ends_with("limits:") => {
                writeln!(out, "{key:<width$} {}", limits(fields))?;
            }
            Value::Array(_) | Value::Object(_) => writeln!(out, "{key:<width$} {value}")?,
        }
    }
    Ok(())
}

/// Limits, in the words that set them.
fn limits(limits: &Map<String, Value>) -> String {
    let word = |(key, value): (&String, &Value)| {
        let is_bytes = key.starts_with("bps") && !key.ends_with("_length");
        match value.as_u64().filter(|_| is_bytes) {
            Some(bytes) if bytes % (1 << 20) == 0 => format!("{key}={}M", bytes >> 20),
            Some(bytes) if bytes % (1 << 10) == 0 => format!("{key}={}K", bytes >> 10),
            _ => format!("{key}={value}"),
        }
    };
    let words: Vec<_> = limits.iter().map(word).collect();
    if words.is_empty() {
        return "none".to_owned();
    }
    words.join(" ")
}

/// All disks, and the groups that there are.
pub(crate) fn disks(out: &mut impl Write, value: &Value) -> io::Result<()> {
    let all = Disks::<Info>::deserialize(value)?;
    let row = |disk: &Info| {
        let state = match (disk.failed, disk.paused, disk.open, disk.connected) {
            (true, ..) => "failed",
            (_, true, ..) => "paused",
            (_, _, false, _) => "waits",
            (_, _, _, true) => "in use",
            (..) => "idle",
        };
        let socket = disk.socket.as_ref();
        [
            disk.name.clone(),
            Human(disk.size_bytes).to_string(),
            state.to_owned(),
            disk.group.clone().unwrap_or_else(|| "-".to_owned()),
            disk.image.display().to_string(),
            socket.map_or_else(|| "-".to_owned(), |path| path.display().to_string()),
        ]
    };
    let rows: Vec<_> = all.disks.iter().map(row).collect();
    let header = ["NAME", " SIZE", "STATE", "GROUP", "IMAGE", "SOCKET"];
    table(out, &header, &rows)?;
    if all.groups.is_empty() {
        return Ok(());
    }
    writeln!(out)?;
    let row = |group: &Group| [group.name.clone(), limits(&group.limits)];
    let rows: Vec<_> = all.groups.iter().map(row).collect();
    table(out, &["GROUP", "LIMITS"], &rows)
}

/// How far merges are.
pub(crate) fn jobs(out: &mut impl Write, value: &Value) -> io::Result<()> {
    let all = Jobs::deserialize(value)?;
    let row = |job: &Job| {
        [
            job.disk.clone(),
            job.command.clone(),
            job.state.clone(),
            Human(job.done_bytes).to_string(),
            Human(job.total_bytes).to_string(),
            job.kept.clone().unwrap_or_default(),
            job.error.clone().unwrap_or_default(),
        ]
    };
    let rows: Vec<_> = all.jobs.iter().map(row).collect();
    let header = [
        "DISK", "COMMAND", "STATE", " DONE", " OF", "KEPT AS", "ERROR",
    ];
    table(out, &header, &rows)
}

/// What is logged.
pub(crate) fn level(out: &mut impl Write, value: &Value) -> io::Result<()> {
    let Level { level, before } = Level::deserialize(value)?;
    if before == level {
        writeln!(out, "{level}")
    } else {
        writeln!(out, "{level} (before: {before})")
    }
}

/// What one disk did.
pub(crate) fn stats(out: &mut impl Write, value: &Value) -> io::Result<()> {
    let stats = DiskStats::deserialize(value)?;
    let row = |(name, kind): (&str, &KindStats)| {
        let time = |us: Option<u64>| us.map_or_else(|| "-".to_owned(), |us| Time(us).to_string());
        let share = |percent| time(kind.percentile_us(percent));
        [
            name.to_owned(),
            kind.requests.to_string(),
            kind.errors.to_string(),
            Human(kind.bytes).to_string(),
            time(kind.latency_us.checked_div(kind.requests)),
            share(50),
            share(99),
        ]
    };
    let rows: Vec<_> = stats.kinds().into_iter().map(row).collect();
    let header = [
        "KIND",
        " REQUESTS",
        " ERRORS",
        " BYTES",
        " MEAN",
        " P50",
        " P99",
    ];
    table(out, &header, &rows)?;
    writeln!(out)?;
    let mut rest = value.clone();
    if let Some(fields) = rest.as_object_mut() {
        fields.retain(|_, field| field.is_number());
    }
    object(out, &rest)
}

/// What all disks did.
pub(crate) fn all_stats(out: &mut impl Write, value: &Value) -> io::Result<()> {
    let all = Disks::<DiskStats>::deserialize(value)?;
    let row = |disk: &DiskStats| {
        let errors: u64 = disk.kinds().iter().map(|(_, kind)| kind.errors).sum();
        [
            disk.name.clone(),
            disk.read.requests.to_string(),
            Human(disk.read.bytes).to_string(),
            disk.write.requests.to_string(),
            Human(disk.write.bytes).to_string(),
            disk.flush.requests.to_string(),
            errors.to_string(),
            disk.in_flight_requests.to_string(),
        ]
    };
    let rows: Vec<_> = all.disks.iter().map(row).collect();
    let header = [
        "NAME",
        " READS",
        " READ",
        " WRITES",
        " WRITTEN",
        " FLUSHES",
        " ERRORS",
        " IN FLIGHT",
    ];
    table(out, &header, &rows)
}

/// A time in microseconds, with three digits at most and a unit.
pub(crate) struct Time(pub(crate) u64);

impl std::fmt::Display for Time {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            us @ 0..1000 => write!(f, "{us} us"),
            us @ 1000..10_000 => write!(f, "{}.{} ms", us / 1000, us % 1000 / 100),
            us @ 10_000..1_000_000 => write!(f, "{} ms", us / 1000),
            us => write!(f, "{}.{} s", us / 1_000_000, us % 1_000_000 / 100_000),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut out = Vec::new();
        let cell = |text: &str| text.to_owned();
        let rows = [[cell("a"), cell("1")], [cell("long"), cell("1000")]];
        table(&mut out, &["N", " C"], &rows).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "N        C\na        1\nlong  1000\n"
        );
    }

    #[test]
    fn whatever_a_daemon_returns_is_shown() {
        let mut out = Vec::new();
        let value = json!({"name": "a", "size_bytes": 2048, "open": true, "socket": null});
        object(&mut out, &value).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "name:       a\nopen:       yes\nsize bytes: 2048 (2 KiB)\n"
        );
    }

    #[test]
    fn limits_are_shown_in_the_words_that_set_them() {
        let shown = |value: Value| limits(value.as_object().unwrap());
        let some = json!({"iops_total": 2048, "bps_total": 3 << 20, "bps_total_max": 5 << 20,
            "bps_total_max_length": 1024});
        assert_eq!(
            shown(some),
            "bps_total=3M bps_total_max=5M bps_total_max_length=1024 iops_total=2048"
        );
        assert_eq!(
            shown(json!({"bps_total": 3 << 10, "bps_total_max": 4097})),
            "bps_total=3K bps_total_max=4097"
        );
        assert_eq!(shown(json!({})), "none");
    }

    #[test]
    fn times_have_a_unit() {
        let shown = [7, 999, 1500, 42_000, 1_200_000].map(|us| Time(us).to_string());
        assert_eq!(shown, ["7 us", "999 us", "1.5 ms", "42 ms", "1.2 s"]);
    }
}
