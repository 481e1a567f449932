//! What `info` answers: a disk's header, its blocks by state, and what the host gave it.

use std::error::Error;
use std::fmt;
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use vdi_core::block_map::BlockMapEntry;
use vdi_core::format::RawHeader;
use vdi_core::layout::{Shown, Spread};
use vdi_core::{Image, ImageKind};

use super::picture::printable;
use crate::line_of_causes;
use crate::size::Human;

/// What `info` shows of an image.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Looked {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    actual_size: u64,
    cluster_size: u32,
    #[serde(flatten)]
    parent: Option<Backing>,
    format_specific: Specific,
    warnings: Vec<String>,
}

/// Where the parent's file was found.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Backing {
    backing_filename: String,
    full_backing_filename: String,
    backing_filename_format: &'static str,
}

/// What only a VDI image has.
#[derive(Debug, Serialize)]
struct Specific {
    r#type: &'static str,
    data: SpecificData,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct SpecificData {
    version: String,
    kind: String,
    file_length: u64,
    comment: String,
    blocks: Blocks,
    fragmentation: Fragmentation,
    #[serde(skip_serializing_if = "Option::is_none")]
    shown: Option<ShownBytes>,
    #[serde(skip)]
    has_parent: bool,
    lchs_geometry: Option<Geometry>,
    header: HeaderFields,
}

/// The blocks of the disk by their state.
#[derive(Debug, Default, Serialize)]
struct Blocks {
    allocated: u64,
    zero: u64,
    unallocated: u64,
}

impl Blocks {
    fn count(image: &Image) -> Self {
        let mut blocks = Self::default();
        for entry in image.entries() {
            match entry {
                BlockMapEntry::Allocated(_) => blocks.allocated += 1,
                BlockMapEntry::Zero => blocks.zero += 1,
                BlockMapEntry::Unallocated => blocks.unallocated += 1,
            }
        }
        blocks
    }
}

/// How the blocks are spread over the file, in the words of [`vdi_core::layout`].
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Fragmentation {
    runs: u32,
    fragmented_clusters: u32,
    fragmented_percent: f64,
    holes: u32,
    tail: u64,
    /// Blocks that a stopped resize left behind the last number.
    away: u32,
}

impl From<Spread> for Fragmentation {
    fn from(spread: Spread) -> Self {
        Self {
            runs: spread.runs,
            fragmented_clusters: spread.fragmented(),
            // Two decimals; more are noise.
            fragmented_percent: (spread.fragmented_percent() * 100.0).round() / 100.0,
            holes: spread.holes,
            tail: spread.tail,
            away: spread.away,
        }
    }
}

/// How much of the disk an image of its chain answers for.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct ShownBytes {
    data: u64,
    zero: u64,
}

#[derive(Debug, Serialize)]
struct Geometry {
    cylinders: u32,
    heads: u32,
    sectors: u32,
}

impl Geometry {
    fn of(raw: &RawHeader) -> Option<Self> {
        let [cylinders, heads, sectors] = &raw.lchs_geometry;
        let (cylinders, heads, sectors) = (cylinders.get(), heads.get(), sectors.get());
        let is_set = raw.has_lchs() && (cylinders, heads, sectors) != (0, 0, 0);
        is_set.then_some(Self {
            cylinders,
            heads,
            sectors,
        })
    }
}

/// The header's fields as they are in the file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct HeaderFields {
    version: String,
    header_size: u32,
    image_type: u32,
    image_flags: u32,
    offset_bmap: u32,
    offset_data: u32,
    disk_size: u64,
    block_size: u32,
    block_extra: u32,
    blocks_in_image: u32,
    blocks_allocated: u32,
    uuid_image: String,
    uuid_modify: String,
    uuid_parent: String,
    uuid_parent_modify: String,
}

impl HeaderFields {
    fn of(raw: &RawHeader) -> Self {
        Self {
            version: format!("{:#010x}", raw.version.get()),
            header_size: raw.header_size.get(),
            image_type: raw.image_type.get(),
            image_flags: raw.image_flags.get(),
            offset_bmap: raw.offset_bmap.get(),
            offset_data: raw.offset_data.get(),
            disk_size: raw.disk_size.get(),
            block_size: raw.block_size.get(),
            block_extra: raw.block_extra.get(),
            blocks_in_image: raw.blocks_in_image.get(),
            blocks_allocated: raw.blocks_allocated.get(),
            uuid_image: raw.uuid_image.get().to_string(),
            uuid_modify: raw.uuid_modify.get().to_string(),
            uuid_parent: raw.uuid_parent.get().to_string(),
            uuid_parent_modify: raw.uuid_parent_modify.get().to_string(),
        }
    }
}

/// What makes an image one to be mended, though it can be used.
fn warnings(image: &Image, spread: Spread) -> Vec<String> {
    let of_header = image.header().warnings().map(|warning| warning.to_string());
    let away = (spread.away > 0).then(|| {
        let Spread { away, .. } = spread;
        let last = image.header().blocks_in_image();
        format!(
            "{away} of its blocks are behind the last number of {last} (blocks_in_image): a resize was stopped"
        )
    });
    let all = of_header.chain(away);
    all.map(|warning| format!("{warning}; see `vdi check`"))
        .collect()
}

impl Looked {
    /// Looks at an image in a file of that length; its map is walked.
    pub(crate) fn new(
        path: &Path,
        image: &Image,
        len_bytes: u64,
        on_host_bytes: u64,
    ) -> io::Result<Self> {
        let raw = image.header().raw();
        let version = raw.version.get();
        let spread = Spread::of(image)?;
        let data = SpecificData {
            version: format!("{}.{}", version >> 16, version & 0xFFFF),
            kind: image.header().kind().to_string(),
            file_length: len_bytes,
            comment: raw.comment(),
            blocks: Blocks::count(image),
            fragmentation: spread.into(),
            shown: None,
            has_parent: matches!(image.header().kind(), ImageKind::Differencing(_)),
            lchs_geometry: Geometry::of(raw),
            header: HeaderFields::of(raw),
        };
        Ok(Self {
            filename: path.display().to_string(),
            format: "vdi",
            virtual_size: image.header().capacity().bytes(),
            actual_size: on_host_bytes,
            cluster_size: raw.block_size.get(),
            parent: None,
            format_specific: Specific {
                r#type: "vdi",
                data,
            },
            warnings: warnings(image, spread),
        })
    }

    /// Says what readers of the chain's disk get from this image.
    pub(crate) fn shows(&mut self, shown: Shown) {
        self.format_specific.data.shown = Some(ShownBytes {
            data: shown.data_bytes,
            zero: shown.zero_bytes,
        });
    }

    /// Says where the parent's file is.
    pub(crate) fn parent_is(&mut self, path: &Path) {
        let name = path.display().to_string();
        self.parent = Some(Backing {
            backing_filename: name.clone(),
            full_backing_filename: name,
            backing_filename_format: "vdi",
        });
    }

    /// Says what is wrong, though the image can be looked at.
    pub(crate) fn warn(&mut self, error: &dyn Error) {
        self.warnings.push(line_of_causes(error));
    }
}

/// Writes what `info` found for people, an empty line between the images of a chain.
pub(crate) fn info(out: &mut impl Write, chain: &[Looked]) -> io::Result<()> {
    for (depth, looked) in chain.iter().enumerate() {
        if depth > 0 {
            writeln!(out)?;
        }
        one(out, looked)?;
    }
    Ok(())
}

fn one(out: &mut impl Write, looked: &Looked) -> io::Result<()> {
    let data = &looked.format_specific.data;
    let size = |bytes: u64| format!("{} ({bytes} bytes)", Human(bytes));
    let mut line = |name: &str, value: &str| writeln!(out, "{name:<14} {value}");
    line("image:", &printable(&looked.filename))?;
    line("format:", &format!("vdi {}, {}", data.version, data.kind))?;
    line("virtual size:", &size(looked.virtual_size))?;
    let (used, len) = (Human(looked.actual_size), size(data.file_length));
    line("disk usage:", &format!("{used}, file of {len}"))?;
    line("block size:", &size(u64::from(looked.cluster_size)))?;
    line("blocks:", &data.blocks.to_string())?;
    line("fragmentation:", &data.fragmentation.to_string())?;
    if let Some(shown) = &data.shown {
        line("shows:", &shown.to_string())?;
    }
    if !data.comment.is_empty() {
        // It is the image's, not ours: nothing in it shall steer a terminal.
        line("comment:", &data.comment.escape_debug().to_string())?;
    }
    line("image UUID:", &data.header.uuid_image)?;
    line("modify UUID:", &data.header.uuid_modify)?;
    if data.has_parent {
        line("parent UUID:", &data.header.uuid_parent)?;
        let file = looked
            .parent
            .as_ref()
            .map(|p| p.full_backing_filename.as_str());
        // It may have been found in a directory of somebody else's.
        line("parent:", &printable(file.unwrap_or("not found")))?;
    }
    match &data.lchs_geometry {
        Some(geometry) => line("geometry:", &geometry.to_string())?,
        None => line("geometry:", "not set")?,
    }
    let header = &data.header;
    let (size, flags, extra) = (header.header_size, header.image_flags, header.block_extra);
    line(
        "header:",
        &format!("{size} bytes, flags {flags:#x}, {extra} private bytes before each block"),
    )?;
    line(
        "map:",
        &format!(
            "at {}, of {} entries",
            header.offset_bmap, header.blocks_in_image
        ),
    )?;
    line(
        "data:",
        &format!(
            "at {}, counted as {} blocks",
            header.offset_data, header.blocks_allocated
        ),
    )?;
    for warning in &looked.warnings {
        line("warning:", warning)?;
    }
    Ok(())
}

impl fmt::Display for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            allocated,
            zero,
            unallocated,
        } = self;
        write!(
            f,
            "{allocated} allocated, {zero} zero, {unallocated} unallocated"
        )
    }
}

impl fmt::Display for Fragmentation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            runs,
            fragmented_clusters: _,
            fragmented_percent: percent,
            holes,
            tail,
            away: _,
        } = self;
        let word = if *runs == 1 { "run" } else { "runs" };
        write!(
            f,
            "{percent:.1} % ({runs} {word}); unused in the file: {holes} between blocks, {tail} behind them"
        )
    }
}

impl fmt::Display for ShownBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (data, zero) = (Human(self.data), Human(self.zero));
        write!(f, "{data} of data, {zero} of zeros; children hide the rest")
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            cylinders,
            heads,
            sectors,
        } = self;
        write!(f, "{cylinders} cylinders, {heads} heads, {sectors} sectors")
    }
}
