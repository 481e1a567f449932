//! The walk through a map, right or wrong.
//!
//! It keeps C1 of [`super`]: a bit per file block that the map may name, one piece of
//! the map, and a few findings of each kind. A map is read once, or twice when blocks have
//! two owners, of which the first is then looked for.

use std::collections::BTreeMap;
use std::io;
use std::ops::ControlFlow;

use super::away::{Away, Behind};
use super::{Finding, LISTED_PER_KIND, Report, Severity};
use crate::format::{self, ENTRY_BYTES, RawHeader};
use crate::storage::Storage;
use crate::units::{BlockSize, Capacity, DataArea, DiskBlock, FileBlock, FileOffset};

/// Map entries read at a time: 256 KiB.
const CHUNK_ENTRIES: u32 = 64 << 10;

/// What the map says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapSummary {
    /// Entries that there should be.
    pub blocks_in_image: u32,
    /// Entries that name a file block.
    pub allocated: u32,
    /// Entries that say "zeros".
    pub zero: u32,
    /// Entries that say "nothing here".
    pub unallocated: u32,
    /// Where the last file block, counted or used, ends.
    pub data_end: u64,
}

/// Where map and data lie, by a header that can be believed so far.
pub(crate) struct Layout {
    pub(crate) map_start: FileOffset,
    pub(crate) blocks_in_image: u32,
    pub(crate) blocks_allocated: u32,
    pub(crate) block_size: BlockSize,
    pub(crate) area: DataArea,
    pub(crate) disk_size: u64,
    pub(crate) len_bytes: u64,
}

impl Layout {
    pub(crate) fn of(raw: &RawHeader, len_bytes: u64) -> Option<Self> {
        let block_size = BlockSize::new(raw.block_size.get())?;
        Some(Self {
            map_start: FileOffset(u64::from(raw.offset_bmap.get())),
            blocks_in_image: raw.blocks_in_image.get(),
            blocks_allocated: raw.blocks_allocated.get(),
            block_size,
            area: DataArea::new(raw.offset_data.get(), raw.block_extra.get(), block_size),
            disk_size: raw.disk_size.get(),
            len_bytes,
        })
    }

    /// Entries that the file has.
    fn entries(&self) -> u32 {
        let fit = self.len_bytes.saturating_sub(self.map_start.0) / ENTRY_BYTES;
        u32::try_from(fit)
            .unwrap_or(u32::MAX)
            .min(self.blocks_in_image)
    }

    /// File blocks that the file has at least a part of.
    pub(crate) fn covered(&self) -> u32 {
        let covered = self.area.blocks_covered(self.len_bytes);
        u32::try_from(covered).unwrap_or(u32::MAX)
    }

    /// What is missing, if the file ends inside the map.
    pub(crate) fn truncated(&self) -> Option<Finding> {
        let missing = self.blocks_in_image - self.entries();
        (missing > 0).then(|| Finding::MapTruncated {
            blocks_in_image: self.blocks_in_image,
            map_end: self.map_start.0 + u64::from(self.blocks_in_image) * ENTRY_BYTES,
            len_bytes: self.len_bytes,
            missing: u64::from(missing),
        })
    }

    /// Blocks of the disk that have a sector.
    fn disk_blocks(&self) -> u64 {
        let capacity = Capacity::from_bytes_rounded_down(self.disk_size);
        self.block_size.blocks_for(capacity.bytes())
    }

    /// How many bytes of its file block a disk block must find in the file.
    pub(crate) fn needed_bytes(&self, block: u32) -> u64 {
        let capacity = Capacity::from_bytes_rounded_down(self.disk_size);
        let start = self.block_size.start_of(DiskBlock::new(block));
        let behind = capacity.bytes().saturating_sub(start);
        behind.min(u64::from(self.block_size.bytes()))
    }

    /// That a disk block is kept where no file block can be, or where the file has none.
    pub(crate) fn misplaced(&self, block: u32, file_block: FileBlock) -> Finding {
        if file_block.get() >= self.blocks_in_image {
            return Finding::EntryOutOfRange {
                block,
                file_block: file_block.get(),
                blocks_in_image: self.blocks_in_image,
            };
        }
        let needed = self.needed_bytes(block);
        Finding::BlockBehindEnd {
            block,
            file_block: file_block.get(),
            block_end: self.area.contents_of(file_block).plus(needed).0,
            len_bytes: self.len_bytes,
        }
    }
}

pub(super) fn check_map(
    storage: &dyn Storage,
    layout: &Layout,
    report: &mut Report,
) -> io::Result<MapSummary> {
    let truncated = layout.truncated();
    let is_whole = truncated.is_none();
    if let Some(finding) = truncated {
        report.add(finding);
    }
    let mut scan = Scan::new(layout);
    for_each_entry(storage, layout, |block, entry| {
        scan.visit(block, entry, report);
        ControlFlow::Continue(())
    })?;
    let is_full = is_whole && !scan.has_open;
    let behind = std::mem::replace(&mut scan.behind, Behind::new());
    let away = behind.report(is_full, layout, report);
    report_shared(storage, layout, &scan, report)?;
    report_count(layout, &scan, report);
    if is_whole {
        report_unused(layout, &mut scan, away, report);
    }
    Ok(scan.summary)
}

/// Calls `visit` with every entry's index and value, until it breaks.
pub(crate) fn for_each_entry(
    storage: &dyn Storage,
    layout: &Layout,
    mut visit: impl FnMut(u32, u32) -> ControlFlow<()>,
) -> io::Result<()> {
    let entries = layout.entries();
    let mut buffer = Vec::new();
    let mut first = 0;
    while first < entries {
        let count = CHUNK_ENTRIES.min(entries - first);
        buffer.resize(count as usize * size_of::<u32>(), 0);
        let at = layout.map_start.plus(u64::from(first) * ENTRY_BYTES);
        storage.read_exact_at(&mut buffer, at)?;
        let (values, _) = buffer.as_chunks();
        for (block, value) in (first..).zip(values) {
            if visit(block, u32::from_le_bytes(*value)).is_break() {
                return Ok(());
            }
        }
        first += count;
    }
    Ok(())
}

/// What a walk through the map collects.
struct Scan<'a> {
    layout: &'a Layout,
    summary: MapSummary,
    /// A bit per file block: is it in an entry?
    used: Vec<u64>,
    /// The highest file block in an entry.
    highest: Option<u32>,
    /// Entries with higher numbers than there should be.
    behind: Behind,
    disk_blocks: u64,
    /// Some block of the disk has no storage, here or in QEMU, or a block behind the disk has some: nothing may be away
    /// (B1).
    has_open: bool,
    /// Later owners of a block that has one: disk block, file block.
    shared: Vec<(u32, u32)>,
    shared_count: u64,
}

impl<'a> Scan<'a> {
    fn new(layout: &'a Layout) -> Self {
        let summary = MapSummary {
            blocks_in_image: layout.blocks_in_image,
            ..MapSummary::default()
        };
        let words = layout.blocks_in_image.div_ceil(u64::BITS) as usize;
        Self {
            layout,
            summary,
            used: vec![0; words],
            highest: None,
            behind: Behind::new(),
            disk_blocks: layout.disk_blocks(),
            has_open: layout.block_size.blocks_for(layout.disk_size) > layout.disk_blocks(),
            shared: Vec::new(),
            shared_count: 0,
        }
    }

    fn visit(&mut self, block: u32, entry: u32, report: &mut Report) {
        let stored = FileBlock::new(entry);
        self.has_open |= (u64::from(block) < self.disk_blocks) != stored.is_some();
        let Some(file_block) = stored else {
            match entry {
                format::ENTRY_ZERO => self.summary.zero += 1,
                _ => self.summary.unallocated += 1,
            }
            return;
        };
        self.summary.allocated += 1;
        let blocks_in_image = self.layout.blocks_in_image;
        if entry >= blocks_in_image {
            self.behind.visit(self.layout, block, file_block);
            return;
        }
        let needed = self.layout.needed_bytes(block);
        let block_end = self.layout.area.contents_of(file_block).plus(needed).0;
        if needed > 0 && block_end > self.layout.len_bytes {
            report.add(self.layout.misplaced(block, file_block));
        }
        self.highest = self.highest.max(Some(entry));
        let (word, bit) = ((entry / u64::BITS) as usize, 1 << (entry % u64::BITS));
        if self.used[word] & bit == 0 {
            self.used[word] |= bit;
            return;
        }
        self.shared_count += 1;
        if self.shared.len() < LISTED_PER_KIND {
            self.shared.push((block, entry));
        }
    }

    /// How many of the first `count` file blocks are in an entry.
    fn used_below(&self, count: u32) -> u64 {
        let (words, bits) = ((count / u64::BITS) as usize, count % u64::BITS);
        let whole = self
            .used
            .iter()
            .take(words)
            .map(|word| u64::from(word.count_ones()));
        let rest = self
            .used
            .get(words)
            .map_or(0, |word| word & ((1 << bits) - 1));
        whole.sum::<u64>() + u64::from(rest.count_ones())
    }
}

/// Names both owners of the shared blocks: the map is walked again to find the first ones.
fn report_shared(
    storage: &dyn Storage,
    layout: &Layout,
    scan: &Scan<'_>,
    report: &mut Report,
) -> io::Result<()> {
    if scan.shared.is_empty() {
        return Ok(());
    }
    let mut first_owners: BTreeMap<u32, Option<u32>> = scan
        .shared
        .iter()
        .map(|&(_, file_block)| (file_block, None))
        .collect();
    let mut unknown = first_owners.len();
    for_each_entry(storage, layout, |block, entry| {
        if let Some(owner @ None) = first_owners.get_mut(&entry) {
            *owner = Some(block);
            unknown -= 1;
        }
        if unknown == 0 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    for &(second, file_block) in &scan.shared {
        // A map that changed between the walks (a live image) may have lost its first owner.
        let first = first_owners
            .get(&file_block)
            .copied()
            .flatten()
            .unwrap_or(second);
        report.add(Finding::SharedBlock {
            first,
            second,
            file_block,
        });
    }
    report.add_unlisted(
        "shared-block",
        Severity::Corruption,
        scan.shared_count - scan.shared.len() as u64,
    );
    Ok(())
}

fn report_count(layout: &Layout, scan: &Scan<'_>, report: &mut Report) {
    let (blocks_allocated, covered) = (layout.blocks_allocated, layout.covered());
    if let Some(highest) = scan.highest
        && highest >= blocks_allocated
    {
        report.add(Finding::CountTooSmall {
            blocks_allocated,
            highest,
        });
    }
    if blocks_allocated > covered && blocks_allocated <= layout.blocks_in_image {
        report.add(Finding::CountBehindEnd {
            blocks_allocated,
            len_bytes: layout.len_bytes,
            covered,
        });
    }
}

fn report_unused(layout: &Layout, scan: &mut Scan<'_>, away: Away, report: &mut Report) {
    let counted = layout.blocks_allocated.min(layout.covered());
    // What is away left a place behind.
    let count = (u64::from(counted) - scan.used_below(counted)).saturating_sub(away.count);
    if count > 0 {
        report.add(Finding::LeakedBlocks {
            count,
            blocks_allocated: layout.blocks_allocated,
        });
    }
    let end = counted
        .max(scan.highest.map_or(0, |highest| highest + 1))
        .max(away.end);
    let data_end = layout.area.end_of(end).0;
    scan.summary.data_end = data_end;
    if layout.len_bytes > data_end {
        report.add(Finding::TrailingBytes {
            count: layout.len_bytes - data_end,
            data_end,
        });
    }
}
