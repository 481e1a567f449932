//! What the verbs answer: for people, and as JSON for programs.
//!
//! JSON keys are those of `qemu-img` where it has them; others follow its manner.
//! Names in the JSON output are stable: they may be added to, never changed.

mod info;
mod repair;

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use vdi_core::check::{Finding, MapSummary, Report, Severity};
use vdi_core::{Extent, Source};

pub(crate) use self::info::{Looked, info};
pub(crate) use self::repair::repair;

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
    let mut findings: Vec<&Finding> = report.findings().iter().collect();
    findings.sort_by_key(|finding| (Reverse(finding.severity()), finding.kind()));
    for of_kind in findings.chunk_by(|a, b| a.kind() == b.kind()) {
        let [first, ..] = of_kind else { continue };
        for finding in of_kind {
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
        (0, 0, 0) => writeln!(out, "{}: nothing is wrong", path.display()),
        (0, 0, _) => writeln!(out, "{}: nothing is wrong; notes: {notes}", path.display()),
        (0, ..) => writeln!(
            out,
            "{}: sound; leaks: {leaks}, notes: {notes}",
            path.display()
        ),
        _ => writeln!(
            out,
            "{}: corrupt; corruptions: {corruptions}, leaks: {leaks}, notes: {notes}",
            path.display()
        ),
    }
}

/// One extent of the disk, as `qemu-img map` has it.
#[derive(Debug, Serialize)]
struct MapEntry<'p> {
    start: u64,
    length: u64,
    depth: usize,
    /// The image itself says what is here; a parent of it need not be asked.
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    filename: Option<&'p str>,
}

/// Writes the map as JSON, an extent on a line. Nothing is collected: a map may be long. `files` are
/// the images of the disk, the top one first.
pub(crate) fn map_json(
    out: &mut impl Write,
    extents: impl Iterator<Item = Extent>,
    files: &[PathBuf],
) -> io::Result<()> {
    let names: Vec<String> = names(files).collect();
    write!(out, "[")?;
    let mut start = 0;
    for extent in extents {
        if start > 0 {
            writeln!(out, ",")?;
        }
        let (present, depth, offset) = match extent.source {
            Source::Unallocated => (false, 0, None),
            Source::Zero { depth } => (true, depth, None),
            Source::Stored { depth, at } => (true, depth, Some(at.0)),
        };
        let (zero, data) = (offset.is_none(), offset.is_some());
        let length = extent.len_bytes;
        let entry = MapEntry {
            start,
            length,
            depth,
            present,
            zero,
            data,
            compressed: false,
            offset,
            filename: offset.and_then(|_| names.get(depth)).map(String::as_str),
        };
        serde_json::to_writer(&mut *out, &entry)?;
        start += length;
    }
    writeln!(out, "]")
}

fn names(files: &[PathBuf]) -> impl Iterator<Item = String> {
    files.iter().map(|path| path.display().to_string())
}

/// Writes the map for people: behind what comes from a chain of images, the file that it is in.
pub(crate) fn map(
    out: &mut impl Write,
    extents: impl Iterator<Item = Extent>,
    files: &[PathBuf],
) -> io::Result<()> {
    let names: Vec<String> = match files {
        [_] => Vec::new(),
        chain => names(chain).collect(),
    };
    let title = if names.is_empty() { "" } else { "file" };
    let head = format!(
        "{:>18} {:>18}  {:<12} {:>18}  {title}",
        "start", "length", "state", "in the file at"
    );
    writeln!(out, "{}", head.trim_end())?;
    let mut start = 0;
    for extent in extents {
        let (state, depth, at) = match extent.source {
            Source::Unallocated => ("unallocated", None, String::new()),
            Source::Zero { depth } => ("zero", Some(depth), String::new()),
            Source::Stored { depth, at } => ("stored", Some(depth), format!("{:#x}", at.0)),
        };
        let name = depth
            .and_then(|depth| names.get(depth))
            .map_or("", String::as_str);
        let line = format!(
            "{start:>#18x} {:>#18x}  {state:<12} {at:>18}  {name}",
            extent.len_bytes
        );
        writeln!(out, "{}", line.trim_end())?;
        start += extent.len_bytes;
    }
    Ok(())
}
