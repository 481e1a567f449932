//! A disk as a picture: what its reader sees, and for each image what it has of the disk and where in
//! its file that lies.
//!
//! ```text
//!  the disk   ▁▃█████▅▂     colour: the image it comes from; height: the share with storage
//!  an image   ▁▃██  ▅▂      pale: hidden by a child
//!             \ \/  /       from a place on the disk to its place in the file
//!  its file   ██████        colour: the place on the disk, so an even ramp is a file in order
//! ```
//!
//! The picture is of a size that has a limit, whatever the image: [`MOST_CELLS`] per strip, and two strips
//! and as many links for each of [`MOST_LANES`](super::picture::MOST_LANES) images.

mod parts;

use std::io;
use std::ops::Range;

use vdi_core::layout::{DiskCells, FileCell, FileCells, FirstStored, Grid, Shown};
use vdi_core::{FileOffset, Image};

use self::parts::{Area, Canvas, LEFT, PLOT, Swatch, ramp};
use super::picture::{Lane, Scene, clipped, range_text, share};
use crate::size::Human;

/// Most cells of a strip: each is four pixels wide then.
const MOST_CELLS: u32 = 235;
const DISK_HEIGHT: f64 = 56.0;
const LANE_HEIGHT: f64 = 26.0;
const LINKS_HEIGHT: f64 = 46.0;
/// A block in a cell of terabytes is this high.
const LEAST_HEIGHT: f64 = 4.0;
/// Names in tooltips, of which there are many.
const TIP_NAME: usize = 40;

/// Draws a disk.
///
/// # Errors
/// If the host does not say how long a file is.
pub(crate) fn svg(scene: &Scene<'_>) -> io::Result<String> {
    let grid = scene.disk_grid(MOST_CELLS);
    let lanes = scene.lanes();
    let seen = DiskCells::of(scene.images, scene.capacity(), grid);
    let mut canvas = Canvas::default();
    heading(&mut canvas, scene, &lanes[0]);
    let is_chain = lanes.len() > 1;
    canvas.y += 34.0;
    let y = canvas.y;
    canvas.text(LEFT, y - 8.0, "b", "The disk");
    canvas.text(LEFT + PLOT, y - 8.0, "m e", &totals(&lanes, &seen));
    disk_strip(&mut canvas, &lanes, &seen, &seen, DISK_HEIGHT);
    canvas.axis(y + DISK_HEIGHT, grid.len(), |at| x_of(at, grid.len()));
    canvas.y += DISK_HEIGHT + 24.0;
    for (nth, lane) in lanes.iter().enumerate() {
        panel(&mut canvas, scene, (nth, lane), &seen, is_chain)?;
    }
    footer(&mut canvas, is_chain);
    Ok(canvas.finish(&format!("Layout of {}", lanes[0].name)))
}

fn heading(canvas: &mut Canvas, scene: &Scene<'_>, top: &Lane) {
    let header = scene.images[0].header();
    canvas.text(LEFT, 38.0, "h", &clipped(&top.name, 64));
    let images = match scene.images.len() {
        1 => String::new(),
        count => format!(", {count} images"),
    };
    let text = format!(
        "{} of disk, {}{images}, blocks of {}, UUID {}",
        Human(header.capacity().bytes()),
        header.kind(),
        Human(u64::from(header.block_size().bytes())),
        header.uuid_image()
    );
    canvas.text(LEFT, 60.0, "m", &text);
    canvas.y = 74.0;
}

/// How much of the disk has data, is zeros, or is nowhere.
fn totals(lanes: &[Lane], seen: &DiskCells) -> String {
    let (mut data, mut zero) = (0, 0);
    for nth in 0..seen.grid().cells() {
        for lane in lanes {
            let shown = lane.shown(seen.cell(nth));
            data += shown.data_bytes;
            zero += shown.zero_bytes;
        }
    }
    let rest = seen.grid().len() - data - zero;
    let [data, zero, rest] = [data, zero, rest].map(Human);
    format!("{data} of data, {zero} of zeros without storage, {rest} unallocated")
}

/// One image: what it has of the disk, what its file has, and links between the two.
fn panel(
    canvas: &mut Canvas,
    scene: &Scene<'_>,
    (nth, lane): (usize, &Lane),
    seen: &DiskCells,
    is_chain: bool,
) -> io::Result<()> {
    let grid = seen.grid();
    let file = match lane.image(scene) {
        Some(image) => Some((image, FileCells::of(image, grid, MOST_CELLS)?)),
        None => None,
    };
    canvas.y += 28.0;
    let y = canvas.y - 8.0;
    if is_chain {
        let at = Area {
            x: LEFT,
            y: y - 10.0,
            width: 14.0,
            height: 12.0,
        };
        canvas.rect(&format!("i{nth}"), at);
        canvas.text(LEFT + 20.0, y, "b", &clipped(&lane.name, 60));
    } else {
        canvas.text(LEFT, y, "b", "The file");
    }
    if let Some((_, file)) = &file {
        canvas.text(LEFT + PLOT, y, "m e", &spread(file));
    }
    if is_chain {
        let own = DiskCells::of(&scene.images[lane.depths.clone()], scene.capacity(), grid);
        lane_strip(canvas, (nth, lane), &own, seen);
        canvas.y += LANE_HEIGHT;
    }
    if let Some((image, file)) = &file {
        let band = Area {
            x: LEFT,
            y: canvas.y,
            width: PLOT,
            height: 5.0,
        };
        canvas.filled("url(#ramp)", band);
        canvas.y += 5.0;
        links(canvas, &FileView::new(image, file), grid.len());
        canvas.y += LINKS_HEIGHT;
        file_strip(canvas, &FileView::new(image, file), grid.len());
        canvas.y += LANE_HEIGHT + 22.0;
    }
    Ok(())
}

fn spread(file: &FileCells) -> String {
    let spread = file.spread();
    let blocks = match spread.allocated {
        0 => "no block in use".to_owned(),
        1 => "1 block".to_owned(),
        allocated => format!(
            "{allocated} blocks, {:.1} % fragmented",
            spread.fragmented_percent()
        ),
    };
    let unused = match u64::from(spread.holes) + spread.tail {
        0 => String::new(),
        unused => format!(", {unused} unused"),
    };
    format!("file of {}: {blocks}{unused}", Human(file.file_bytes()))
}

/// A part of a bar: its class and the share of the cell that it has.
type Part = (String, f64);

/// The strip of what a reader sees: the images' shares on top of each other, then the zeros.
fn disk_strip(canvas: &mut Canvas, lanes: &[Lane], seen: &DiskCells, of: &DiskCells, height: f64) {
    strip(canvas, of.grid(), height, |nth, range| {
        let len = range.end - range.start;
        let mut parts = Vec::new();
        let mut tip = range_text(range);
        let mut zero = 0;
        for (index, lane) in lanes.iter().enumerate() {
            let shown = lane.shown(seen.cell(nth));
            zero += shown.zero_bytes;
            if shown.data_bytes > 0 {
                parts.push((format!("i{index}"), share(shown.data_bytes, len)));
                let name = clipped(&lane.name, TIP_NAME);
                tip += &format!("\n{} from {name}", Human(shown.data_bytes));
            }
        }
        if zero > 0 {
            parts.push(("zero".to_owned(), share(zero, len)));
            tip += &format!("\n{} of zeros without storage", Human(zero));
        }
        (parts, tip)
    });
}

/// The strip of what an image has, the hidden part pale.
fn lane_strip(
    canvas: &mut Canvas,
    (index, lane): (usize, &Lane),
    own: &DiskCells,
    seen: &DiskCells,
) {
    let class = format!("i{index}");
    strip(canvas, own.grid(), LANE_HEIGHT, |nth, range| {
        let len = range.end - range.start;
        let sum = |of: fn(&Shown) -> u64| own.cell(nth).iter().map(of).sum::<u64>();
        let data = sum(|shown| shown.data_bytes);
        let zero = sum(|shown| shown.zero_bytes);
        let shown = lane.shown(seen.cell(nth));
        let hidden = data.saturating_sub(shown.data_bytes);
        let mut tip = range_text(range);
        let mut parts = Vec::new();
        for (class, bytes, words) in [
            (class.clone(), shown.data_bytes, "of data that shows"),
            (format!("{class} hid"), hidden, "of data hidden by children"),
            ("zero".to_owned(), shown.zero_bytes, "of zeros that show"),
            (
                "zero hid".to_owned(),
                zero.saturating_sub(shown.zero_bytes),
                "of zeros hidden by children",
            ),
        ] {
            if bytes > 0 {
                parts.push((class, share(bytes, len)));
                tip += &format!("\n{} {words}", Human(bytes));
            }
        }
        (parts, tip)
    });
}

/// A strip of bars; cells without any are one track.
fn strip(
    canvas: &mut Canvas,
    grid: Grid,
    height: f64,
    mut bar: impl FnMut(usize, &Range<u64>) -> (Vec<Part>, String),
) {
    let y = canvas.y;
    let track = Area {
        x: LEFT,
        y,
        width: PLOT,
        height,
    };
    canvas.rect("track", track);
    for nth in 0..grid.cells() {
        let range = grid.range(nth);
        let (parts, tip) = bar(nth, &range);
        if parts.is_empty() {
            continue;
        }
        let ends = [range.start, range.end];
        let [x, end] = ends.map(|at| x_of(at, grid.len()).round());
        let width = with_gap(end - x);
        canvas.with_tip(&tip, |canvas| {
            let mut top = y + height;
            for (class, part) in parts {
                // The least is seen, too.
                let height = (part * height).max(LEAST_HEIGHT);
                top = (top - height).max(y);
                let at = Area {
                    x,
                    y: top,
                    width,
                    height,
                };
                canvas.rect(&class, at);
            }
        });
    }
}

/// A file, and where its parts lie on a line.
struct FileView<'a> {
    image: &'a Image,
    file: &'a FileCells,
    /// What the whole line is.
    len_bytes: u64,
}

impl<'a> FileView<'a> {
    fn new(image: &'a Image, file: &'a FileCells) -> Self {
        let area = image.header().data_area();
        let last = area.start().0;
        let end = file.grid().len().saturating_mul(area.stride_bytes());
        let len_bytes = file.file_bytes().max(last).max(end.saturating_add(last));
        Self {
            image,
            file,
            len_bytes,
        }
    }

    /// Where the first `blocks` end.
    fn end_of(&self, blocks: u64) -> FileOffset {
        let area = self.image.header().data_area();
        let len = blocks.saturating_mul(area.stride_bytes());
        FileOffset(area.start().0.saturating_add(len))
    }

    fn x_of(&self, at: FileOffset) -> f64 {
        x_of(at.0, self.len_bytes)
    }

    /// The line's part that some blocks have.
    fn x_of_blocks(&self, blocks: &Range<u64>) -> Range<f64> {
        self.x_of(self.end_of(blocks.start))..self.x_of(self.end_of(blocks.end))
    }

    /// The disk's part that a block has.
    fn on_disk(&self, stored: FirstStored, disk_bytes: u64) -> Range<u64> {
        let size = self.image.header().block_size();
        let start = size.start_of(stored.disk_block);
        let end = start.saturating_add(u64::from(size.bytes()));
        start..end.min(disk_bytes).max(start)
    }
}

fn links(canvas: &mut Canvas, view: &FileView<'_>, disk_bytes: u64) {
    let y = canvas.y;
    for stored in view.file.firsts().iter().flatten() {
        let on_disk = view.on_disk(*stored, disk_bytes);
        let from = x_of(on_disk.start, disk_bytes)..x_of(on_disk.end, disk_bytes);
        let nth = u64::from(stored.file_block.get());
        let to = view.x_of_blocks(&(nth..nth + 1));
        let wide = |range: Range<f64>| range.start..range.end.max(range.start + 1.0);
        let colour = ramp(on_disk.start, disk_bytes);
        canvas.link(&colour, wide(from), wide(to), y..y + LINKS_HEIGHT);
    }
}

fn file_strip(canvas: &mut Canvas, view: &FileView<'_>, disk_bytes: u64) {
    let (y, height) = (canvas.y, LANE_HEIGHT);
    let track = Area {
        x: LEFT,
        y,
        width: PLOT,
        height,
    };
    canvas.rect("track", track);
    let start = view.image.header().data_area().start();
    let tip = format!("header and map: {}", range_text(&(0..start.0)));
    canvas.with_tip(&tip, |canvas| {
        let width = (view.x_of(start) - LEFT).max(1.0);
        canvas.rect("meta", Area { width, ..track });
    });
    let grid = view.file.grid();
    for (nth, cell) in view.file.cells().iter().enumerate() {
        let Some(first) = cell.first else { continue };
        let blocks = grid.range(nth);
        let x = view.x_of_blocks(&blocks);
        let x = x.start.round()..x.end.round();
        let on_disk = view.on_disk(first, disk_bytes);
        let filled =
            (share(u64::from(cell.used), blocks.end - blocks.start) * height).max(LEAST_HEIGHT);
        let at = Area {
            x: x.start,
            y: y + height - filled,
            width: with_gap(x.end - x.start),
            height: filled,
        };
        canvas.with_tip(&file_tip(view, cell, &blocks, &on_disk), |canvas| {
            canvas.filled(&ramp(on_disk.start, disk_bytes), at);
        });
    }
    canvas.axis(y + height, view.len_bytes, |at| x_of(at, view.len_bytes));
}

fn file_tip(
    view: &FileView<'_>,
    cell: &FileCell,
    blocks: &Range<u64>,
    on_disk: &Range<u64>,
) -> String {
    let bytes = view.end_of(blocks.start).0..view.end_of(blocks.end).0;
    let count = blocks.end - blocks.start;
    format!(
        "{} of the file\n{} of {count} blocks in use, {} runs begin here\nfirst from {} of the disk",
        range_text(&bytes),
        cell.used,
        cell.runs,
        range_text(on_disk)
    )
}

fn footer(canvas: &mut Canvas, is_chain: bool) {
    canvas.y += 30.0;
    let mut entries = vec![
        (
            Swatch::Ramp,
            "place on the disk, from start to end".to_owned(),
        ),
        (Swatch::Class("track"), "unallocated or unused".to_owned()),
        (Swatch::Class("zero"), "zeros, without storage".to_owned()),
        (Swatch::Class("meta"), "header and map".to_owned()),
    ];
    if is_chain {
        entries.push((
            Swatch::Class("i0 hid"),
            "pale: hidden by a child".to_owned(),
        ));
    }
    canvas.legend(&entries);
    canvas.y += 22.0;
}

fn x_of(at: u64, len: u64) -> f64 {
    LEFT + share(at, len) * PLOT
}

/// Bars that are wide enough stand apart.
fn with_gap(width: f64) -> f64 {
    if width > 12.0 {
        width - 1.0
    } else {
        width.max(0.6)
    }
}
