//! A disk as strips of characters: what its reader sees, and what its files have in their order.
//!
//! A cell's shade is the share of it that has storage. With colours, a cell of the disk has the colour of the
//! image that most of it comes from, and a cell of a file that of the place on the disk. Without, digits say the same: below
//! the disk's strip the image, and in the file's strip the place, from 0 at the disk's start to 9 at its end.

use std::io::{self, Write};

use vdi_core::layout::{DiskCells, FileCells, Grid};

use super::picture::{Lane, Scene, clipped, share, thousandths};
use crate::size::Human;

/// What the terminal can show.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terminal {
    pub(crate) columns: u16,
    pub(crate) shades: Shades,
    pub(crate) colours: Colours,
}

/// Which characters stand for shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shades {
    Blocks,
    Ascii,
}

/// Whether colours are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Colours {
    Ansi256,
    None,
}

/// The lanes' colours, the zeros' and those of the places on the disk, in the palette of 256.
const LANES: [u8; 6] = [32, 214, 36, 175, 117, 166];
const GREY: u8 = 245;
const PLACES: [u8; 10] = [97, 61, 62, 68, 74, 73, 72, 78, 149, 185];

/// What stands in front of a strip's cells.
const LABEL: usize = 10;
const MOST_COLUMNS: u16 = 240;
const DISK_ROWS: u32 = 4;
const FILE_ROWS: u32 = 2;

/// A cell to be printed.
#[derive(Debug, Clone, Copy)]
struct Drawn {
    shade: char,
    colour: u8,
    /// What says without colours what the colour says.
    digit: char,
}

impl Terminal {
    fn cells(self) -> u32 {
        let columns = usize::from(self.columns.clamp(40, MOST_COLUMNS));
        u32::try_from(columns - LABEL - 3).expect("there are few columns")
    }

    fn edge(self) -> char {
        match self.shades {
            Shades::Blocks => '│',
            Shades::Ascii => '|',
        }
    }

    fn zero(self) -> char {
        match self.shades {
            Shades::Blocks => '·',
            Shades::Ascii => '.',
        }
    }

    fn ramp(self) -> [char; 4] {
        match self.shades {
            Shades::Blocks => ['░', '▒', '▓', '█'],
            Shades::Ascii => ['-', '+', '=', '#'],
        }
    }

    fn shade(self, part: f64) -> char {
        let [quarter, half, most, all] = self.ramp();
        match part {
            _ if part <= 0.25 => quarter,
            _ if part <= 0.5 => half,
            _ if part <= 0.75 => most,
            _ => all,
        }
    }

    fn paint(self, out: &mut impl Write, colour: u8, text: &str) -> io::Result<()> {
        match self.colours {
            Colours::Ansi256 => write!(out, "\x1b[38;5;{colour}m{text}\x1b[0m"),
            Colours::None => write!(out, "{text}"),
        }
    }

    fn name(self, name: &str) -> String {
        let name = match self.shades {
            Shades::Blocks => name.to_owned(),
            Shades::Ascii => name.replace(|c: char| !c.is_ascii(), "?"),
        };
        clipped(&name, 32).replace(
            '…',
            if self.shades == Shades::Ascii {
                "~"
            } else {
                "…"
            },
        )
    }
}

/// Draws a disk.
///
/// # Errors
/// If the host does not say how long a file is, or the output fails.
pub(crate) fn strip(out: &mut impl Write, scene: &Scene<'_>, term: Terminal) -> io::Result<()> {
    let lanes = scene.lanes();
    let grid = scene.disk_grid(term.cells() * DISK_ROWS);
    let seen = DiskCells::of(scene.images, scene.capacity(), grid);
    writeln!(
        out,
        "{}: {} of disk",
        term.name(&lanes[0].name),
        Human(grid.len())
    )?;
    let cells: Vec<_> = (0..grid.cells())
        .map(|nth| disk_cell(&lanes, &seen, nth, term))
        .collect();
    let start_of = |nth| Human(grid.range(nth).start).to_string();
    let digits = if lanes.len() > 1 {
        Digits::Below
    } else {
        Digits::None
    };
    rows(out, &cells, start_of, digits, term)?;
    legend(out, &lanes, &seen, term)?;
    for lane in &lanes {
        file(out, scene, lane, grid, term)?;
    }
    let places: Vec<_> = (0..10)
        .map(|place| Drawn {
            shade: term.ramp()[3],
            colour: PLACES[place],
            digit: digit(place),
        })
        .collect();
    write!(out, "{:LABEL$} ", "")?;
    cells_of_row(out, &places, 1, Digits::Instead, term)?;
    writeln!(
        out,
        " place on the disk, start to end; blank: unused; in order if it only rises"
    )
}

fn digit(number: usize) -> char {
    u32::try_from(number)
        .ok()
        .and_then(|number| char::from_digit(number, 10))
        .unwrap_or('+')
}

/// A cell of the disk, or nothing if it has neither data nor zeros.
fn disk_cell(lanes: &[Lane], seen: &DiskCells, nth: usize, term: Terminal) -> Option<Drawn> {
    let range = seen.grid().range(nth);
    let shown: Vec<_> = lanes
        .iter()
        .map(|lane| lane.shown(seen.cell(nth)))
        .collect();
    let data: u64 = shown.iter().map(|shown| shown.data_bytes).sum();
    let zero: u64 = shown.iter().map(|shown| shown.zero_bytes).sum();
    let most = (0..lanes.len()).rev().max_by_key(|&lane| {
        let shown = shown[lane];
        if data > 0 {
            shown.data_bytes
        } else {
            shown.zero_bytes
        }
    })?;
    let (shade, colour) = match (data, zero) {
        (0, 0) => return None,
        (0, _) => (term.zero(), GREY),
        _ => (
            term.shade(share(data, range.end - range.start)),
            LANES[most],
        ),
    };
    Some(Drawn {
        shade,
        colour,
        digit: digit(most),
    })
}

/// Which images there are, and what the shades mean.
fn legend(
    out: &mut impl Write,
    lanes: &[Lane],
    seen: &DiskCells,
    term: Terminal,
) -> io::Result<()> {
    for (nth, lane) in lanes.iter().enumerate() {
        let shown = (0..seen.grid().cells()).map(|cell| lane.shown(seen.cell(cell)));
        let (data, zero) = shown.fold((0, 0), |(data, zero), shown| {
            (data + shown.data_bytes, zero + shown.zero_bytes)
        });
        write!(out, "{:LABEL$} ", "")?;
        let is_numbered = lanes.len() > 1 && term.colours == Colours::None;
        let swatch = if is_numbered {
            format!("{nth} ")
        } else {
            format!("{0}{0}", term.ramp()[3])
        };
        term.paint(out, LANES[nth], &swatch)?;
        let (name, data, zero) = (term.name(&lane.name), Human(data), Human(zero));
        writeln!(out, " {name} shows {data} of data, {zero} of zeros")?;
    }
    let ramp: String = term.ramp().into_iter().collect();
    writeln!(
        out,
        "{:LABEL$} {ramp} share with data; {} zeros without storage; blank: unallocated",
        "",
        term.zero()
    )
}

/// The file of an image, if the lane is of one only.
fn file(
    out: &mut impl Write,
    scene: &Scene<'_>,
    lane: &Lane,
    disk: Grid,
    term: Terminal,
) -> io::Result<()> {
    let Some(image) = lane.image(scene) else {
        return Ok(());
    };
    let file = FileCells::of(image, disk, term.cells() * FILE_ROWS)?;
    let spread = file.spread();
    let unused = u64::from(spread.holes) + spread.tail;
    writeln!(
        out,
        "{}: file of {}; blocks: {} used, {unused} unused; {:.1} % fragmented",
        term.name(&lane.name),
        Human(file.file_bytes()),
        spread.allocated,
        spread.fragmented_percent()
    )?;
    let size = image.header().block_size();
    let grid = file.grid();
    let cells: Vec<_> = file
        .cells()
        .iter()
        .enumerate()
        .map(|(nth, cell)| {
            let blocks = grid.range(nth);
            let first = cell.first?;
            let place = thousandths(size.start_of(first.disk_block), disk.len()) / 100;
            let place = place.min(PLACES.len() - 1);
            Some(Drawn {
                shade: term.shade(share(u64::from(cell.used), blocks.end - blocks.start)),
                colour: PLACES[place],
                digit: digit(place),
            })
        })
        .collect();
    let area = image.header().data_area();
    let start_of = |nth| {
        let before = grid.range(nth).start.saturating_mul(area.stride_bytes());
        Human(area.start().0.saturating_add(before)).to_string()
    };
    rows(out, &cells, start_of, Digits::Instead, term)
}

/// Where digits stand if there are no colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Digits {
    None,
    Below,
    Instead,
}

/// Prints cells in rows, each row's start in front of it.
fn rows(
    out: &mut impl Write,
    cells: &[Option<Drawn>],
    start_of: impl Fn(usize) -> String,
    digits: Digits,
    term: Terminal,
) -> io::Result<()> {
    let width = usize::try_from(term.cells()).expect("there are few columns");
    // Few cells are as wide as there is room for.
    let times = (width / cells.len().max(1)).max(1);
    let edge = term.edge();
    for (row, of_row) in cells.chunks(width).enumerate() {
        write!(out, "{:>LABEL$} {edge}", start_of(row * width))?;
        cells_of_row(out, of_row, times, digits, term)?;
        writeln!(out, "{edge}")?;
        if digits == Digits::Below && term.colours == Colours::None {
            write!(out, "{:>LABEL$} {edge}", "image")?;
            cells_of_row(out, of_row, times, Digits::Instead, term)?;
            writeln!(out, "{edge}")?;
        }
    }
    Ok(())
}

fn cells_of_row<'c>(
    out: &mut impl Write,
    cells: impl IntoIterator<Item = &'c (impl Copy + Into<Option<Drawn>> + 'c)>,
    times: usize,
    digits: Digits,
    term: Terminal,
) -> io::Result<()> {
    for &cell in cells {
        match cell.into() {
            None => write!(out, "{:times$}", "")?,
            Some(cell) => {
                let is_digit = digits == Digits::Instead && term.colours == Colours::None;
                let shown = if is_digit { cell.digit } else { cell.shade };
                term.paint(out, cell.colour, &shown.to_string().repeat(times))?;
            }
        }
    }
    Ok(())
}
