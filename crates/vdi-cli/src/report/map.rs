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

/// Writes the map from `start` on as JSON, an extent on a line. Nothing is collected: a map may be long. `files` are
/// the images of the disk, the top one first.
pub(crate) fn map_json(
    out: &mut impl Write,
    mut start: u64,
    extents: impl Iterator<Item = Extent>,
    files: &[PathBuf],
) -> io::Result<()> {
    let names: Vec<String> = names(files).collect();
    let mut row = vec![b'['];
    for (nth, extent) in extents.enumerate() {
        if nth > 0 {
            row.extend_from_slice(b",\n");
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
        serde_json::to_writer(&mut row, &entry)?;
        out.write_all(&row)?;
        row.clear();
        start += length;
    }
    row.extend_from_slice(b"]\n");
    out.write_all(&row)
}

fn names(files: &[PathBuf]) -> impl Iterator<Item = String> {
    files.iter().map(|path| path.display().to_string())
}

/// Writes the map from `start` on for people: behind what comes from a chain of images, the file that it is in.
pub(crate) fn map(
    out: &mut impl Write,
    mut start: u64,
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
    let mut row = Vec::new();
    for extent in extents {
        let (state, depth, at) = match extent.source {
            Source::Unallocated => ("unallocated", None, None),
            Source::Zero { depth } => ("zero", Some(depth), None),
            Source::Stored { depth, at } => ("stored", Some(depth), Some(at.0)),
        };
        let name = depth.and_then(|depth| names.get(depth));
        row.clear();
        row.extend_from_slice(&number(start));
        row.push(b' ');
        row.extend_from_slice(&number(extent.len_bytes));
        row.extend_from_slice(b"  ");
        row.extend_from_slice(state.as_bytes());
        row.resize(STATE_END, b' ');
        row.push(b' ');
        row.extend_from_slice(&at.map_or([b' '; NUMBER], number));
        row.extend_from_slice(b"  ");
        row.extend_from_slice(name.map_or("", String::as_str).as_bytes());
        row.truncate(row.trim_ascii_end().len());
        row.push(b'\n');
        out.write_all(&row)?;
        start += extent.len_bytes;
    }
    Ok(())
}

/// The width of a number: `0x` and the digits of 64 bits.
const NUMBER: usize = 18;
/// Where the widest state of a row ends.
const STATE_END: usize = NUMBER + 1 + NUMBER + 2 + 12;

/// A number as `{:>#18x}` has it. A map may have many millions of them, and most of its time went into `write!`.
fn number(value: u64) -> [u8; NUMBER] {
    let mut digits = [b' '; NUMBER];
    let mut left = value;
    let mut at = NUMBER;
    loop {
        at -= 1;
        digits[at] = b"0123456789abcdef"[(left % 16) as usize];
        left /= 16;
        if left == 0 {
            digits[at - 2..at].copy_from_slice(b"0x");
            return digits;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_as_the_standard_library_writes_them() {
        for value in [0, 9, 0x10, 0xfe_dc_ba_98, 1 << 60, u64::MAX] {
            assert_eq!(
                number(value).as_slice(),
                format!("{value:>#18x}").as_bytes()
            );
        }
    }
}
