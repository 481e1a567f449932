//! What lies where: how an image's blocks are spread over its file, and how much of each image of
//! a chain shows.
//!
//! The words, here and wherever they are printed:
//!
//! - A *run* is blocks with storage, in the disk's order, each kept right behind the one before. Blocks without
//!   storage between them do not end it: who reads the disk in order reads the file in order. The
//!   fewest runs that there can be is one.
//! - A block is *fragmented* if it begins a run and is not the first: `qemu-img check` counts its
//!   "fragmented clusters" like this.
//! - A *hole* is a file block in front of the last one in use that no block of the disk uses; the *tail* are those behind it.
//! - An image *shows* what a reader of the disk gets from it; its children hide the rest.
//!
//! Only maps are asked, each once or twice; nothing is printed. Memory is as the caller's cells, whatever the map's
//! length.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::disk::{Extents, Source};
use crate::image::Image;
use crate::units::{Capacity, DiskBlock, FileBlock};

/// How an image's blocks are spread over its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spread {
    /// Blocks of the disk that have storage.
    pub allocated: u32,
    /// Runs that they form.
    pub runs: u32,
    /// File blocks between them that no block of the disk uses.
    pub holes: u32,
    /// File blocks behind them.
    pub tail: u64,
    /// Blocks that are kept behind the numbers that the header knows, where a stopped resize left them
    /// ([`crate::block_map`], B1).
    pub away: u32,
}

impl Spread {
    /// Looks at all of an image.
    ///
    /// # Errors
    /// If the host does not say how long the file is.
    pub fn of(image: &Image) -> io::Result<Self> {
        Ok(FileCells::of(image, Grid::new(0, 1, 1), 1)?.spread)
    }

    /// Blocks that are not kept right behind the one before.
    pub const fn fragmented(self) -> u32 {
        self.runs.saturating_sub(1)
    }

    /// Of a hundred blocks with storage, how many are fragmented.
    pub fn fragmented_percent(self) -> f64 {
        match self.allocated {
            0 => 0.0,
            allocated => f64::from(self.fragmented()) * 100.0 / f64::from(allocated),
        }
    }
}

/// A length in cells of one size; the last one may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    len: u64,
    cell: u64,
}

impl Grid {
    /// Cells of whole `unit`s for `len`, as small as they can be if they are to be `most_cells` at most.
    ///
    /// # Panics
    /// If `unit` or `most_cells` is 0.
    pub fn new(len: u64, unit: u64, most_cells: u32) -> Self {
        let units = len.div_ceil(unit).div_ceil(u64::from(most_cells)).max(1);
        let cell = unit.saturating_mul(units);
        Self { len, cell }
    }

    /// How many cells there are.
    pub fn cells(self) -> usize {
        let cells = self.len.div_ceil(self.cell);
        usize::try_from(cells).expect("there are at most 2^32 cells")
    }

    /// What the cells divide.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// Whether there is no cell.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// What the `nth` cell has of it.
    pub fn range(self, nth: usize) -> Range<u64> {
        let at = |nth: u64| nth.saturating_mul(self.cell);
        let (start, end) = (at(nth as u64), at(nth as u64 + 1));
        start..end.min(self.len)
    }

    /// The cell that has `at`.
    fn cell_of(self, at: u64) -> Option<usize> {
        (at < self.len).then(|| usize::try_from(at / self.cell).expect("a cell's number fits"))
    }
}

/// A way along a grid, step by step: nobody has to look for the cells, of which there may be as many steps as a map has entries.
struct Walk {
    grid: Grid,
    at: u64,
    nth: usize,
}

impl Walk {
    const fn along(grid: Grid) -> Self {
        Self {
            grid,
            at: 0,
            nth: 0,
        }
    }

    /// Goes on by `len`, and calls `visit` with each cell that has some of that, and how much.
    fn step(&mut self, len: u64, mut visit: impl FnMut(usize, u64)) {
        let end = self.at.saturating_add(len).min(self.grid.len);
        while self.at < end {
            let cell_end = self.grid.range(self.nth).end;
            let to = end.min(cell_end);
            visit(self.nth, to - self.at);
            self.at = to;
            self.nth += usize::from(to == cell_end);
        }
    }
}

/// What shows of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// Bytes that are read from its file.
    pub data_bytes: u64,
    /// Bytes that it says are zeros.
    pub zero_bytes: u64,
}

/// A disk in cells of bytes: how much of each shows from which image.
#[derive(Debug)]
pub struct DiskCells {
    grid: Grid,
    images: usize,
    shown: Vec<Shown>,
}

impl DiskCells {
    /// Looks at a disk of `capacity` and these images, the top one first. With one of them alone it is what
    /// that one has, hidden or not.
    pub fn of(images: &[Arc<Image>], capacity: Capacity, grid: Grid) -> Self {
        let mut shown = vec![Shown::default(); grid.cells() * images.len()];
        let mut walk = Walk::along(grid);
        for extent in Extents::over(images, capacity.whole()).in_pieces() {
            walk.step(extent.len_bytes, |nth, bytes| match extent.source {
                Source::Unallocated => {}
                Source::Zero { depth } => shown[nth * images.len() + depth].zero_bytes += bytes,
                Source::Stored { depth, .. } => {
                    shown[nth * images.len() + depth].data_bytes += bytes;
                }
            });
        }
        let images = images.len();
        Self {
            grid,
            images,
            shown,
        }
    }

    /// How the disk is divided.
    pub const fn grid(&self) -> Grid {
        self.grid
    }

    /// What shows in the `nth` cell of each image, the top one's first.
    pub fn cell(&self, nth: usize) -> &[Shown] {
        &self.shown[nth * self.images..][..self.images]
    }
}

/// What shows of each image of a chain, the top one first.
pub fn shown(images: &[Arc<Image>]) -> Vec<Shown> {
    let Some(top) = images.first() else {
        return Vec::new();
    };
    let capacity = top.header().capacity();
    let grid = Grid::new(capacity.bytes(), capacity.bytes().max(1), 1);
    if grid.is_empty() {
        return vec![Shown::default(); images.len()];
    }
    DiskCells::of(images, capacity, grid).cell(0).to_vec()
}

/// A file in cells of blocks: which have owners, and where on the disk those are.
#[derive(Debug)]
pub struct FileCells {
    grid: Grid,
    cells: Vec<FileCell>,
    firsts: Vec<Option<FirstStored>>,
    spread: Spread,
    file_bytes: u64,
}

/// Some neighbouring blocks of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileCell {
    /// How many of them a block of the disk uses.
    pub used: u32,
    /// Runs that begin among them.
    pub runs: u32,
    /// What the first one in use keeps.
    pub first: Option<FirstStored>,
}

/// A block, and where it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstStored {
    /// On the disk.
    pub disk_block: DiskBlock,
    /// In the file.
    pub file_block: FileBlock,
}

impl FileCells {
    /// Looks at an image, whose file gets `most_cells` at most.
    ///
    /// # Errors
    /// If the host does not say how long the file is.
    ///
    /// # Panics
    /// If `most_cells` is 0.
    pub fn of(image: &Image, disk: Grid, most_cells: u32) -> io::Result<Self> {
        let owned_end = image.map.owned_end();
        let blocks_in_image = image.header.blocks_in_image();
        let file_bytes = image.storage.len_bytes()?;
        let covered = image.area.blocks_covered(file_bytes);
        let blocks = covered.max(u64::from(owned_end));
        let grid = Grid::new(blocks, 1, most_cells);
        let mut cells = vec![FileCell::default(); grid.cells()];
        let mut firsts = vec![None; disk.cells()];
        let mut spread = Spread::default();
        let mut last = None;
        for (file_block, disk_block) in image.map.allocated() {
            let stored = FirstStored {
                disk_block,
                file_block,
            };
            let goes_on = last.is_some_and(|last: FileBlock| last.is_before(file_block));
            last = Some(file_block);
            spread.allocated += 1;
            spread.runs += u32::from(!goes_on);
            spread.away += u32::from(file_block.get() >= blocks_in_image);
            let nth = grid.cell_of(u64::from(file_block.get()));
            let cell = &mut cells[nth.expect("it is below owned_end")];
            cell.used += 1;
            cell.runs += u32::from(!goes_on);
            if cell.first.is_none_or(|first| file_block < first.file_block) {
                cell.first = Some(stored);
            }
            let start = image.header.block_size().start_of(disk_block);
            if let Some(nth) = disk.cell_of(start) {
                firsts[nth].get_or_insert(stored);
            }
        }
        // B2: no two of them have the same place.
        spread.holes = owned_end - spread.allocated;
        spread.tail = blocks - u64::from(owned_end);
        Ok(Self {
            grid,
            cells,
            firsts,
            spread,
            file_bytes,
        })
    }

    /// How the file's blocks are divided.
    pub const fn grid(&self) -> Grid {
        self.grid
    }

    /// The cells, in the file's order.
    pub fn cells(&self) -> &[FileCell] {
        &self.cells
    }

    /// The first block with storage that begins in each cell of the disk.
    pub fn firsts(&self) -> &[Option<FirstStored>] {
        &self.firsts
    }

    /// How long the file is.
    pub const fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// How the blocks are spread.
    pub const fn spread(&self) -> Spread {
        self.spread
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_whole_units_and_cover_the_length_in_order() {
        let parts = |grid: Grid| {
            (0..grid.cells())
                .map(|nth| grid.range(nth))
                .collect::<Vec<_>>()
        };
        assert_eq!(parts(Grid::new(10, 1, 4)), [0..3, 3..6, 6..9, 9..10]);
        assert_eq!(parts(Grid::new(10, 4, 100)), [0..4, 4..8, 8..10]);
        assert_eq!(parts(Grid::new(0, 4, 100)), [] as [Range<u64>; 0]);
        let huge = Grid::new(u64::MAX, 1 << 20, 3);
        assert_eq!(huge.cells(), 3);
        assert_eq!(huge.range(2).end, u64::MAX);
        assert_eq!(huge.cell_of(u64::MAX - 1), Some(2));
        assert_eq!(huge.cell_of(u64::MAX), None);
    }

    #[test]
    fn steps_are_shared_out_among_the_cells_that_they_touch() {
        let mut walk = Walk::along(Grid::new(100, 1, 10));
        let mut step = |len| {
            let mut got = Vec::new();
            walk.step(len, |nth, len| got.push((nth, len)));
            got
        };
        assert_eq!(step(15), [(0, 10), (1, 5)]);
        assert_eq!(step(0), []);
        assert_eq!(step(27), [(1, 5), (2, 10), (3, 10), (4, 2)]);
        assert_eq!(step(8), [(4, 8)]);
        assert_eq!(
            step(45),
            (5..10)
                .map(|nth| (nth, if nth == 9 { 5 } else { 10 }))
                .collect::<Vec<_>>()
        );
        assert_eq!(
            step(200),
            [(9, 5)],
            "what lies behind the end is in no cell"
        );
        assert_eq!(step(u64::MAX), []);
    }
}
