//! What `map` answers: the extents of a disk, as a table and as JSON.

use std::io::{self, Write};
use std::path::PathBuf;

use serde::Serialize;
use vdi_core::{Extent, Source};

use super::picture::printable;

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
        chain => names(chain).map(|name| printable(&name)).collect(),
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
