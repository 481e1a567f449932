//! What the verbs answer: for people, and as JSON for programs.
//!
//! JSON keys are those of `qemu-img` where it has them; others follow its manner.
//! Names in the JSON output are stable: they may be added to, never changed.

mod control;
mod dump;
mod info;
mod map;
mod picture;
mod repair;
mod strip;
mod svg;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use vdi_core::check::{Finding, MapSummary, Report, Severity};

pub(crate) use self::control::{Time, all_stats, disks, jobs, level, object, stats};
pub(crate) use self::dump::dump;
pub(crate) use self::info::{Looked, info};
pub(crate) use self::map::{map, map_json};
pub(crate) use self::picture::{Scene, printable};
pub(crate) use self::repair::repair;
pub(crate) use self::strip::{Colours, Shades, Terminal, strip};
pub(crate) use self::svg::svg;

/// Writes `value` as JSON for people and programs alike.
pub(crate) fn json(out: &mut impl Write, value: &(impl Serialize + ?Sized)) -> io::Result<()> {
    serde_json::to_writer_pretty(&mut *out, value)?;
    writeln!(out)
}

/// What `check` shows of an image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Checked {
    filename: String,
    format: &'static str,
    check_errors: u32,
    corruptions: u64,
    leaks: u64,
    notes: u64,
    #[serde(flatten)]
    map: Option<CheckedMap>,
    findings: Vec<FindingEntry>,
    counts: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct CheckedMap {
    total_clusters: u32,
    allocated_clusters: u32,
    image_end_offset: u64,
}

#[derive(Debug, Serialize)]
struct FindingEntry {
    kind: &'static str,
    severity: String,
    message: String,
    advice: &'static str,
}

impl Checked {
    pub(crate) fn new(path: &Path, report: &Report) -> Self {
        let entry = |finding: &Finding| FindingEntry {
            kind: finding.kind(),
            severity: finding.severity().to_string(),
            message: finding.to_string(),
            advice: finding.advice(),
        };
        Self {
            filename: path.display().to_string(),
            format: "vdi",
            check_errors: 0,
            corruptions: report.count_of(Severity::Corruption),
            leaks: report.count_of(Severity::Leak),
            notes: report.count_of(Severity::Note),
            map: report.map.map(|map| CheckedMap {
                total_clusters: map.blocks_in_image,
                allocated_clusters: map.allocated,
                image_end_offset: map.data_end,
            }),
            findings: report.findings().iter().map(entry).collect(),
            counts: report.counts().collect(),
        }
    }
}

/// Writes what `check` found for people: the findings of a kind together, the worst first.
pub(crate) fn check(out: &mut impl Write, path: &Path, report: &Report) -> io::Result<()> {
    let name = printable(&path.display().to_string());
    let mut findings: Vec<&Finding> = report.findings().iter().collect();
    findings.sort_by_key(|finding| (Reverse(finding.severity()), finding.kind()));
    for of_kind in findings.chunk_by(|a, b| a.kind() == b.kind()) {
        let [first, ..] = of_kind else { continue };
        for finding in of_kind {
            let finding = printable(&finding.to_string());
            writeln!(out, "{}: {finding}", first.severity())?;
        }
        let more = report.count(first.kind()) - of_kind.len() as u64;
        if more > 0 {
            writeln!(out, "{}: {more} more like these", first.severity())?;
        }
        writeln!(out, "  {}", first.advice())?;
    }
    if let Some(map) = report.map {
        let MapSummary {
            blocks_in_image,
            allocated,
            zero,
            unallocated,
            ..
        } = map;
        writeln!(
            out,
            "{blocks_in_image} blocks: {allocated} allocated, {zero} zero, {unallocated} unallocated"
        )?;
    } else {
        writeln!(
            out,
            "the map was not examined, since the header does not say where it is"
        )?;
    }
    let [corruptions, leaks, notes] = [Severity::Corruption, Severity::Leak, Severity::Note]
        .map(|severity| report.count_of(severity));
    match (corruptions, leaks, notes) {
        (0, 0, 0) => writeln!(out, "{name}: nothing is wrong"),
        (0, 0, _) => writeln!(out, "{name}: nothing is wrong; notes: {notes}"),
        (0, ..) => writeln!(out, "{name}: sound; leaks: {leaks}, notes: {notes}"),
        _ => writeln!(
            out,
            "{name}: corrupt; corruptions: {corruptions}, leaks: {leaks}, notes: {notes}"
        ),
    }
}
