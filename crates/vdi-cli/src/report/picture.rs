//! What the pictures of a disk have in common, on a terminal and as SVG: which images get a
//! colour of their own, where the pictures' cells lie, and names that are safe to show.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vdi_core::layout::{Grid, Shown};
use vdi_core::{Capacity, Image};

use crate::size::Human;

/// So many colours can be told apart; what is deeper shares the last one.
pub(crate) const MOST_LANES: usize = 6;

/// A disk to be drawn: its images, the top one first, and their files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scene<'a> {
    pub(crate) images: &'a [Arc<Image>],
    pub(crate) files: &'a [PathBuf],
}

/// Images with a colour: one, or all the deepest.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) depths: Range<usize>,
    pub(crate) name: String,
}

impl Scene<'_> {
    pub(crate) fn capacity(&self) -> Capacity {
        self.images[0].header().capacity()
    }

    /// Cells for the disk: of whole blocks, and at most so many.
    pub(crate) fn disk_grid(&self, most_cells: u32) -> Grid {
        let sizes = self.images.iter().map(|image| image.header().block_size());
        let unit = sizes.map(vdi_core::BlockSize::bytes).min();
        let unit = unit.expect("a disk has an image");
        Grid::new(self.capacity().bytes(), u64::from(unit), most_cells)
    }

    pub(crate) fn lanes(&self) -> Vec<Lane> {
        let count = self.images.len();
        let own = if count > MOST_LANES {
            MOST_LANES - 1
        } else {
            count
        };
        let one = |depth: usize| Lane {
            depths: depth..depth + 1,
            name: short_name(&self.files[depth]),
        };
        let mut lanes: Vec<Lane> = (0..own).map(one).collect();
        if own < count {
            let name = format!("{} older images", count - own);
            lanes.push(Lane {
                depths: own..count,
                name,
            });
        }
        lanes
    }
}

impl Lane {
    /// The only image of the lane.
    pub(crate) fn image<'a>(&self, scene: &Scene<'a>) -> Option<&'a Image> {
        (self.depths.len() == 1).then(|| &*scene.images[self.depths.start])
    }

    /// What shows of the lane's images in a cell.
    pub(crate) fn shown(&self, cell: &[Shown]) -> Shown {
        let sum = |of: fn(&Shown) -> u64| cell[self.depths.clone()].iter().map(of).sum();
        Shown {
            data_bytes: sum(|shown| shown.data_bytes),
            zero_bytes: sum(|shown| shown.zero_bytes),
        }
    }
}

/// The part that something is of a whole, from 0 to 1.
pub(crate) fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    // What this loses is far below a pixel.
    (part as f64 / whole as f64).min(1.0)
}

/// The same in thousandths.
pub(crate) fn thousandths(part: u64, whole: u64) -> usize {
    let scaled = u128::from(part.min(whole)) * 1000 / u128::from(whole.max(1));
    usize::try_from(scaled).expect("it is at most 1000")
}

/// A file's name, without its directories.
pub(crate) fn short_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    printable(&name.to_string_lossy())
}

/// A text in which nothing steers a terminal or turns the direction of what stands beside it, and whose
/// every character XML allows: file names are other people's.
pub(crate) fn printable(text: &str) -> String {
    let is_unsafe = |c: char| {
        c.is_control()
            || matches!(c,
                '\u{061C}' | '\u{200E}' | '\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2066}'..='\u{2069}'
                | '\u{FFFE}' | '\u{FFFF}')
    };
    let mut shown = String::new();
    for c in text.chars() {
        if is_unsafe(c) {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// A text of at most `most` characters, with its middle left out if need be.
pub(crate) fn clipped(text: &str, most: usize) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    let front = most / 2;
    let behind = most - front - 1;
    let head = text.chars().take(front);
    let tail = text.chars().skip(count - behind);
    head.chain(['…']).chain(tail).collect()
}

/// A range of bytes for people.
pub(crate) fn range_text(range: &Range<u64>) -> String {
    format!("{} to {}", Human(range.start), Human(range.end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_steer_what_shows_it() {
        assert_eq!(printable("a\u{1b}[31mb\n"), "a\\u{1b}[31mb\\u{a}");
        assert_eq!(printable("gpj.\u{202e}idv"), "gpj.\\u{202e}idv");
        assert_eq!(printable("\"Müller's\" <é>\\"), "\"Müller's\" <é>\\");
    }

    #[test]
    fn a_long_name_keeps_its_ends() {
        assert_eq!(clipped("short.vdi", 9), "short.vdi");
        assert_eq!(clipped("0123456789.vdi", 9), "0123….vdi");
    }
}
