//! The state of a disk for people: whatever a daemon tells of it, and no more lines than somebody reads at night.

use std::io::{self, Write};

use serde_json::{Map, Value};

use super::control::{Time, object, table};

/// Most rows of a table.
const MOST_ROWS: usize = 32;

/// Most threads that are shown one by one.
const MOST_THREADS: usize = 16;

/// What `dump` returns.
pub(crate) fn dump(out: &mut impl Write, value: &Value) -> io::Result<()> {
    let (control, threads) = (&value["control"], &value["threads"]);
    part(out, value, &["control", "threads"])?;
    writeln!(out, "\nCONTROL")?;
    if control.is_null() {
        writeln!(
            out,
            "busy with a command or a message, which may be what hangs"
        )?;
    } else {
        part(out, control, &["image"])?;
    }
    if !control["image"].is_null() {
        writeln!(out, "\nIMAGE")?;
        part(out, &control["image"], &[])?;
    }
    let threads = threads.as_array().map_or(&[][..], Vec::as_slice);
    // Those that do not answer are looked for first.
    let (silent, others): (Vec<_>, Vec<_>) = threads
        .iter()
        .filter(|thread| thread["silent"] == true || !thread["seat"].is_null())
        .partition(|thread| thread["silent"] == true);
    let told = silent.len() + others.len();
    for thread in silent.into_iter().chain(others).take(MOST_THREADS) {
        write!(out, "\nTHREAD {}", thread["thread"])?;
        match thread["cpus"].as_str() {
            Some(cpus) => writeln!(out, ", CPU {cpus}")?,
            None => writeln!(out)?,
        }
        if thread["silent"] == true {
            writeln!(
                out,
                "silent: it does something that takes its time, which may be what hangs"
            )?;
        } else {
            part(out, &thread["seat"], &[])?;
        }
    }
    if let more @ 1.. = told.saturating_sub(MOST_THREADS) {
        writeln!(out, "\n{more} more threads have something of the disk")?;
    }
    let (without, all) = (threads.len() - told, threads.len());
    writeln!(out, "\n{without} of {all} threads have nothing of the disk")
}

/// An object without some of its fields: first those that are one value, then those that are many.
fn part(out: &mut impl Write, value: &Value, without: &[&str]) -> io::Result<()> {
    let fields = value.as_object().into_iter().flatten();
    let fields = fields.filter(|(key, _)| !without.contains(&key.as_str()));
    let (many, one): (Vec<_>, Vec<_>) = fields.partition(|(_, value)| value.is_array());
    let one: Map<String, Value> = one
        .into_iter()
        .map(|(key, value)| match time(key, value) {
            Some((key, time)) => (key.to_owned(), time.into()),
            None => (key.clone(), value.clone()),
        })
        .collect();
    object(out, &one.into())?;
    for (key, rows) in many {
        let rows = rows.as_array().map_or(&[][..], Vec::as_slice);
        if !rows.is_empty() {
            writeln!(out, "{}:", key.replace('_', " "))?;
            list(out, rows)?;
        }
    }
    Ok(())
}

/// Objects of one kind, below each other; the queue is what people look for first.
fn list(out: &mut impl Write, rows: &[Value]) -> io::Result<()> {
    let keys = rows[0].as_object().into_iter().flat_map(Map::keys);
    let mut keys: Vec<&str> = keys.map(String::as_str).collect();
    keys.sort_by_key(|key| *key != "queue");
    let name = |&key: &&str| {
        let is_number = rows.iter().any(|row| row[key].is_number());
        let space = if is_number { " " } else { "" };
        let key = key.strip_suffix("_us").unwrap_or(key);
        format!("{space}{}", key.replace('_', " ").to_uppercase())
    };
    let header: Vec<String> = keys.iter().map(name).collect();
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let row =
        |row: &Value| -> Vec<String> { keys.iter().map(|key| cell(key, &row[*key])).collect() };
    let shown: Vec<_> = rows.iter().take(MOST_ROWS).map(row).collect();
    table(out, &header, &shown)?;
    match rows.len().saturating_sub(MOST_ROWS) {
        0 => Ok(()),
        more => writeln!(out, "and {more} more"),
    }
}

fn cell(key: &str, value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(is) => if *is { "yes" } else { "no" }.to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            time(key, value).map_or_else(|| value.to_string(), |(_, time)| time)
        }
    }
}

/// A time is told with its unit, which its name ends in.
fn time<'a>(key: &'a str, value: &Value) -> Option<(&'a str, String)> {
    let key = key.strip_suffix("_us")?;
    Some((key, Time(value.as_u64()?).to_string()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shown(value: &Value) -> String {
        let mut out = Vec::new();
        dump(&mut out, value).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn what_hangs_is_named_and_times_have_a_unit() {
        let request = json!({"age_us": 1_500_000, "kind": "write", "queue": 3});
        let seat = json!({"oldest": [request], "parked": 1, "sync_age_us": 2000, "queues": []});
        let value = json!({
            "name": "a",
            "limits": {"iops_total": 5},
            "control": null,
            "threads": [
                {"thread": 0, "silent": false, "seat": null},
                {"thread": 1, "silent": false, "seat": seat},
                {"thread": 2, "silent": true, "seat": null},
            ],
        });
        let expected = "\
limits: iops_total=5
name:   a

CONTROL
busy with a command or a message, which may be what hangs

THREAD 2
silent: it does something that takes its time, which may be what hangs

THREAD 1
parked:   1
sync age: 2.0 ms
oldest:
QUEUE    AGE  KIND
    3  1.5 s  write

1 of 3 threads have nothing of the disk
";
        assert_eq!(shown(&value), expected);
    }

    #[test]
    fn nobody_has_to_read_more_than_there_is_time_for() {
        let queues: Vec<_> = (0..256).map(|queue| json!({"queue": queue})).collect();
        let thread = |thread| {
            let seat = json!({"queues": queues, "oldest": queues});
            json!({"thread": thread, "silent": false, "seat": seat})
        };
        let threads: Vec<_> = (0..256).map(thread).collect();
        let control = json!({"rings": queues});
        let text = shown(&json!({"name": "a", "control": control, "threads": threads}));
        assert!(text.contains("and 224 more\n"), "{text}");
        assert!(text.contains("240 more threads have something of the disk"));
        assert!(text.lines().count() < 1300, "{}", text.lines().count());
    }
}
