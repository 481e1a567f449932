//! What is wrong with an image.
//!
//! [`check`] looks at a [`RawHeader`] and the map as the file has them, so it can
//! examine what [`crate::Disk::open`] refuses. It reads header and map, never the
//! data, and writes nothing. It asks no parent: a differencing image is examined
//! by itself, and [`check_parents`] judges the links of its chain.
//!
//! Invariants:
//!
//! - **C1** Memory is bounded whatever the image says: a bit per file block that the
//!   map may name (below 2^30, as the map ends below 2^32) or that can be away, a piece of the map,
//!   and [`LISTED_PER_KIND`] findings of each kind; further ones are only counted.
//! - **C2** The map is examined only where the header's places and sizes can be
//!   believed; otherwise [`Report::map`] is `None`.
//!
//! Sources: VirtualBox `VDI.cpp` (`vdiValidateHeader`, `vdiDump`), QEMU `block/vdi.c`
//! (`vdi_co_check`). Where they differ, the stricter one counts.

mod away;
mod finding;
mod map;
mod parents;

use std::collections::BTreeMap;
use std::io;

pub use self::finding::{Finding, Severity};
pub use self::map::MapSummary;
use self::map::check_map;
pub(crate) use self::map::{Layout, for_each_entry};
pub use self::parents::check_parents;

use crate::format::{self, RawHeader};
use crate::header::{Header, HeaderError, flaws};
use crate::storage::Storage;
use crate::units::SECTOR_SIZE;

/// Findings of one kind that are listed; a broken map may have a million.
pub const LISTED_PER_KIND: usize = 20;

/// Why an image could not be examined.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// The host failed.
    #[error("the image cannot be read")]
    Read(#[source] io::Error),
    /// It is another format under the same signature.
    #[error("version is {major}.{minor}, but only 1.x and 0.2 exist")]
    Version {
        /// The version word's high half.
        major: u32,
        /// Its low half.
        minor: u32,
    },
}

/// What a check found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    listed: Vec<Finding>,
    counts: BTreeMap<&'static str, (Severity, u64)>,
    /// What the map says, if the header can be believed so far (C2).
    pub map: Option<MapSummary>,
    /// The length of the file.
    pub len_bytes: u64,
}

impl Report {
    /// The findings, at most [`LISTED_PER_KIND`] of a kind.
    pub fn findings(&self) -> &[Finding] {
        &self.listed
    }

    /// How many findings there are of each kind, listed or not.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.counts.iter().map(|(&kind, &(_, count))| (kind, count))
    }

    /// How many findings there are of one kind.
    pub fn count(&self, kind: &str) -> u64 {
        self.counts.get(kind).map_or(0, |&(_, count)| count)
    }

    /// How many findings have this severity.
    pub fn count_of(&self, severity: Severity) -> u64 {
        self.counts
            .values()
            .filter(|(of, _)| *of == severity)
            .map(|(_, count)| count)
            .sum()
    }

    /// The worst severity found.
    pub fn worst(&self) -> Option<Severity> {
        self.counts.values().map(|(severity, _)| *severity).max()
    }

    fn add(&mut self, finding: Finding) {
        let (_, count) = self
            .counts
            .entry(finding.kind())
            .or_insert((finding.severity(), 0));
        *count += 1;
        if *count <= LISTED_PER_KIND as u64 {
            self.listed.push(finding);
        }
    }

    fn add_unlisted(&mut self, kind: &'static str, severity: Severity, more: u64) {
        self.counts.entry(kind).or_insert((severity, 0)).1 += more;
    }
}

/// Examines an image, however broken.
///
/// # Errors
/// If it cannot be read, or is of another version of the format.
pub fn check(storage: &dyn Storage) -> Result<Report, CheckError> {
    let len_bytes = storage.len_bytes().map_err(CheckError::Read)?;
    let raw = RawHeader::read(storage).map_err(CheckError::Read)?;
    let mut report = Report {
        len_bytes,
        ..Report::default()
    };
    if let Some(layout) = check_header(&raw, &mut report)? {
        report.map = Some(check_map(storage, &layout, &mut report).map_err(CheckError::Read)?);
    }
    Ok(report)
}

/// Judges the header, and tells where the map is if that can be believed (C2).
fn check_header(raw: &RawHeader, report: &mut Report) -> Result<Option<Layout>, CheckError> {
    let least = if raw.is_version_0() {
        format::VERSION_0_MAP
    } else {
        format::HEADER_END_SHORT
    };
    if raw.is_vdi() && report.len_bytes < u64::from(least) {
        report.add(Finding::HeaderTruncated {
            len_bytes: report.len_bytes,
            least,
        });
        return Ok(None);
    }
    let mut layout = Layout::of(raw, report.len_bytes);
    for error in Header::broken_rules(raw) {
        match error {
            HeaderError::Version { major, minor } => {
                return Err(CheckError::Version { major, minor });
            }
            HeaderError::Signature { .. }
            | HeaderError::HeaderSize { .. }
            | HeaderError::MapOffset { .. }
            | HeaderError::DataOffset { .. }
            | HeaderError::BlockSize { .. }
            | HeaderError::BlockExtra { .. } => layout = None,
            HeaderError::ImageType { .. }
            | HeaderError::ImageFlags { .. }
            | HeaderError::LchsSectorSize { .. }
            | HeaderError::FixedChild { .. }
            | HeaderError::NoParentNamed
            | HeaderError::DiskSizeZero
            | HeaderError::TooFewBlocks { .. }
            | HeaderError::Flaw { .. } => {}
        }
        report.add(Finding::Header(error));
        if matches!(error, HeaderError::Signature { .. }) {
            return Ok(None);
        }
    }
    for flaw in flaws(raw) {
        report.add(Finding::Flaw(flaw));
    }
    let found = raw.legacy_sector_size.get();
    if found != 512 && !raw.is_version_0() {
        report.add(Finding::LegacySectorSize { found });
    }
    let disk_size = raw.disk_size.get();
    if !disk_size.is_multiple_of(SECTOR_SIZE) {
        report.add(Finding::OddDiskSize { disk_size });
    }
    Ok(layout)
}
