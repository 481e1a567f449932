//! Mending what [`crate::check`] finds: a plan, and its application.
//!
//! [`plan()`] looks at a [`RawHeader`] and the map as the file has them and writes nothing;
//! [`apply()`] carries out what it gave. Not a search for lost data: what no entry names is free space.
//!
//! Invariants:
//!
//! - **M1** What could be read reads the same, after every step and every crash: a block is copied, and
//!   the copy durable, before an entry names it, and no copy goes where an entry points. No block gets
//!   another owner's bytes, and none that cannot be read starts to read as zeros unless
//!   [`Unreadable::Drop`] asks for it.
//! - **M2** A plan made after a crash finishes what was begun: nothing depends on the first one.
//! - **M3** Where the header is not right, or cannot be made right without a guess, no block is touched.
//! - **M4** Memory is bounded: two bits per file block that the map may name and [`MOST_CHANGES`] entries.
//!   What is beyond that is for the next plan ([`Plan::goes_on`]).
//!
//! Sources: VirtualBox `VDI.cpp` (`vdiRepair`, which throws the second owner's data away; we keep them
//! for both), QEMU `block/vdi.c` (`vdi_open`, for what it refuses).

mod apply;
mod blocks;

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use uuid::Uuid;

pub use self::apply::{ApplyError, apply, back_up};
use self::blocks::Survey;
pub use self::blocks::{BlockPlan, Change, Target, Why};
use crate::check::{self, CheckError, Finding, Layout, Report};
use crate::format::{self, RawHeader};
use crate::header::{Header, HeaderError, Warning};
use crate::storage::Storage;
use crate::units::FileOffset;

/// Entries that one plan changes: 16 MiB of memory.
pub const MOST_CHANGES: usize = 1 << 20;

/// What stands between the image's name and a number in the name of a copy of header and map ([`back_up`]). It has the image's
/// UUID and none of its blocks, so nobody who looks for an image may take it for one.
pub const BACK_UP_INFIX: &str = ".vdi-repair-";

/// Whether a file is a copy of header and map, by its name.
pub(crate) fn is_back_up(path: &Path) -> bool {
    let name = path
        .file_name()
        .map(OsStr::to_string_lossy)
        .unwrap_or_default();
    let number = name.rsplit_once(BACK_UP_INFIX).map(|(_, number)| number);
    number.is_some_and(|number| {
        let mut bytes = number.bytes();
        !number.is_empty() && bytes.all(|byte| byte.is_ascii_digit() || byte == b'-')
    })
}

/// What becomes of blocks that lie wholly behind the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// They are left as they are, and the image stays damaged.
    Keep,
    /// They read as zeros from now on.
    Drop,
}

/// A field of the header that changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FieldChange {
    /// VirtualBox's or our name of it.
    pub field: &'static str,
    /// Where it lies.
    pub at: FileOffset,
    /// What it becomes.
    pub to: FieldValue,
}

/// What a field becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldValue {
    /// A number that is known to be right.
    Number {
        /// What is there now.
        from: u32,
        /// What is right.
        to: u32,
    },
    /// A new random UUID.
    Uuid(Uuid),
}

/// What is not mended, and why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    /// What is wrong.
    pub finding: Finding,
    /// Why it stays so.
    pub why: &'static str,
}

/// What a repair does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is wrong now.
    pub report: Report,
    /// Fields of the header, the first thing to be done.
    pub fields: Vec<FieldChange>,
    /// What happens to the blocks; `None` if they are not touched (M3).
    pub blocks: Option<BlockPlan>,
    /// What stays as it is; of blocks that cannot be read only a few are named.
    pub left: Vec<Left>,
    /// Blocks that are not named there.
    pub left_unnamed: u64,
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.fields.is_empty() && self.blocks.as_ref().is_none_or(BlockPlan::is_empty)
    }

    /// Whether another plan must follow this one (M4).
    pub fn goes_on(&self) -> bool {
        self.blocks.as_ref().is_some_and(|blocks| blocks.goes_on)
    }
}

/// Why no plan could be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The image could not be examined.
    #[error(transparent)]
    Check(#[from] CheckError),
    /// The host failed.
    #[error("the image cannot be read")]
    Read(#[source] io::Error),
}

/// Finds out what there is to mend.
///
/// # Errors
/// If the image cannot be read, or is of another version of the format.
pub fn plan(storage: &dyn Storage, unreadable: Unreadable) -> Result<Plan, PlanError> {
    plan_at_most(storage, unreadable, MOST_CHANGES)
}

fn plan_at_most(
    storage: &dyn Storage,
    unreadable: Unreadable,
    most_changes: usize,
) -> Result<Plan, PlanError> {
    let report = check::check(storage)?;
    let mut raw = RawHeader::read(storage).map_err(PlanError::Read)?;
    let mut plan = Plan {
        fields: Vec::new(),
        blocks: None,
        left_unnamed: 0,
        left: report.findings().iter().filter_map(left_always).collect(),
        report,
    };
    let too_short = plan.report.count("header-truncated") > 0;
    if !raw.is_vdi() || too_short {
        return Ok(plan);
    }
    plan.fields = mend_header(&mut raw, plan.report.len_bytes);
    let mut is_right = true;
    for error in Header::broken_rules(&raw) {
        is_right = false;
        let finding = Finding::Header(error);
        let why = why_not(&error);
        plan.left.push(Left { finding, why });
    }
    is_right &= plan.report.count("map-in-header") == 0;
    let map_is_whole = plan.report.count("map-truncated") == 0;
    if let Some(layout) = Layout::of(&raw, plan.report.len_bytes)
        && is_right
        && map_is_whole
    {
        // A header that had to be mended first hid this from the check.
        if let Some(finding) = layout.truncated() {
            let why = MAP_LOST;
            plan.left.push(Left { finding, why });
            return Ok(plan);
        }
        let survey =
            Survey::of(storage, &layout, unreadable, most_changes).map_err(PlanError::Read)?;
        let survey = survey.that_knows(&plan.report);
        let (blocks, left, unnamed) = survey.plan(storage).map_err(PlanError::Read)?;
        plan.left.extend(left);
        plan.left.extend(leaks(&plan.report, &blocks));
        plan.left_unnamed = unnamed;
        plan.blocks = Some(blocks);
    }
    Ok(plan)
}

/// Space that is not given back.
fn leaks(report: &Report, blocks: &BlockPlan) -> Vec<Left> {
    let Some(why) = blocks.keeps_space else {
        return Vec::new();
    };
    let is_leak = |finding: &&Finding| {
        let (leaked, trailing) = ("leaked-blocks", "trailing-bytes");
        [leaked, trailing].contains(&finding.kind())
    };
    let leaks = report.findings().iter().filter(is_leak).cloned();
    leaks.map(|finding| Left { finding, why }).collect()
}

const MAP_LOST: &str = "nobody knows what the missing entries said; restore the image from a copy";

/// What no repair can mend; the header's broken rules are judged after it is mended.
fn left_always(finding: &Finding) -> Option<Left> {
    let why = match finding {
        Finding::HeaderTruncated { .. } => "most of the image is missing; restore it from a copy",
        Finding::MapTruncated { .. } => MAP_LOST,
        Finding::OddDiskSize { .. } => "harmless, and any other size would be a guess",
        Finding::Header(error @ HeaderError::Signature { .. }) => why_not(error),
        Finding::Flaw(Warning::MapInHeader { .. }) => {
            "entries are part of the header, so blocks are not touched; convert the image"
        }
        Finding::ParentMissing { .. }
        | Finding::ParentAmbiguous { .. }
        | Finding::WrongParent { .. }
        | Finding::ParentModified { .. }
        | Finding::ParentLoop { .. }
        | Finding::ChainTooLong { .. } => "it is the chain that is wrong, not this image",
        Finding::Header(_)
        | Finding::Flaw(Warning::CountTooLarge { .. } | Warning::NullUuid { .. })
        | Finding::LegacySectorSize { .. }
        | Finding::EntryOutOfRange { .. }
        | Finding::BlocksAway { .. }
        | Finding::BlockBehindEnd { .. }
        | Finding::SharedBlock { .. }
        | Finding::CountTooSmall { .. }
        | Finding::LeakedBlocks { .. }
        | Finding::TrailingBytes { .. }
        | Finding::CountBehindEnd { .. } => return None,
    };
    let finding = finding.clone();
    Some(Left { finding, why })
}

/// Why a broken rule of the header stays broken.
const fn why_not(error: &HeaderError) -> &'static str {
    match error {
        HeaderError::Signature { .. } | HeaderError::Version { .. } => "this is no VDI image",
        HeaderError::MapOffset { .. } | HeaderError::DataOffset { .. } => {
            "header, map and data overlap, and which of the places is wrong cannot be known; \
             blocks are not touched"
        }
        HeaderError::NoParentNamed => {
            "which image is the parent cannot be known; blocks are not touched"
        }
        HeaderError::HeaderSize { .. }
        | HeaderError::ImageType { .. }
        | HeaderError::ImageFlags { .. }
        | HeaderError::LchsSectorSize { .. }
        | HeaderError::FixedChild { .. }
        | HeaderError::DiskSizeZero
        | HeaderError::BlockSize { .. }
        | HeaderError::BlockExtra { .. }
        | HeaderError::TooFewBlocks { .. }
        | HeaderError::Flaw { .. } => {
            "what is right cannot be deduced from the rest; blocks are not touched"
        }
    }
}

/// Where the fields lie that are deduced, in version 1.
const HEADER_SIZE: FileOffset = FileOffset(0x48);
const LEGACY_SECTOR_SIZE: FileOffset = FileOffset(0x168);
const LCHS_SECTOR_SIZE: FileOffset = FileOffset(0x1D4);
/// From `uuid_modify` back to `uuid_image`, in both versions.
const UUID_BYTES: u64 = 16;

/// Mends what is unambiguous, in `raw` too.
fn mend_header(raw: &mut RawHeader, len_bytes: u64) -> Vec<FieldChange> {
    let mut changes = Vec::new();
    let first_other = raw.offset_bmap.get().min(raw.offset_data.get());
    let ends = format::HEADER_START + format::HEADER_SIZE_LONG;
    let has_long = first_other >= ends && len_bytes >= u64::from(ends);
    if first_other < format::HEADER_END_SHORT && !raw.is_version_0() {
        // The fields may be map or data.
        return changes;
    }
    let mut number = |field, at, from, to| {
        let to = FieldValue::Number { from, to };
        changes.push(FieldChange { field, at, to });
    };
    if !raw.is_version_0() {
        let header_size = raw.header_size.get();
        if header_size < format::HEADER_SIZE_SHORT {
            // The long header is there if its last field is what it must be.
            let is_long = has_long && raw.lchs_sector_size.get() == 512;
            let right = if is_long {
                format::HEADER_SIZE_LONG
            } else {
                format::HEADER_SIZE_SHORT
            };
            number("header_size", HEADER_SIZE, header_size, right);
            raw.header_size = right.into();
        }
        let lchs = raw.lchs_sector_size.get();
        if Header::has_wrong_lchs(raw) && has_long {
            number("LCHS sector size", LCHS_SECTOR_SIZE, lchs, 512);
            raw.lchs_sector_size = 512.into();
        }
        let legacy = raw.legacy_sector_size.get();
        if legacy != 512 {
            number("legacy sector size", LEGACY_SECTOR_SIZE, legacy, 512);
            raw.legacy_sector_size = 512.into();
        }
    }
    let uuid_modify = raw.places().uuid_modify;
    for flaw in crate::header::flaws(raw) {
        let Warning::NullUuid { field } = flaw else {
            continue;
        };
        let at = match field {
            "uuid_image" => FileOffset(uuid_modify.0 - UUID_BYTES),
            _ => uuid_modify,
        };
        let to = FieldValue::Uuid(Uuid::new_v4());
        changes.push(FieldChange { field, at, to });
    }
    changes
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::create::{CreateOptions, NewKind, create_in};
    use crate::storage::{Access, HostFile, Locking};

    #[test]
    fn a_back_up_is_known_by_its_name() {
        for name in ["a.vdi.vdi-repair-1795800000", ".vdi-repair-1-2"] {
            assert!(is_back_up(Path::new(name)), "{name}");
        }
        for name in ["a.vdi-repair-1.vdi", "a.vdi-repair-", "a.vdi", ".."] {
            assert!(!is_back_up(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn a_field_behind_the_end_of_the_file_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.vdi");
        let options = CreateOptions {
            capacity_bytes: 1 << 20,
            block_size: 1 << 20,
            kind: NewKind::Dynamic,
            uuid: None,
        };
        create_in(&File::create_new(&path).unwrap(), &options).unwrap();
        let file = HostFile::open(&path, Access::Writable, Locking::Locked).unwrap();
        // In the middle of the LCHS geometry, whose sector size then seems to be 0.
        file.set_len(0x1D0).unwrap();
        let plan = plan(&file, Unreadable::Drop).unwrap();
        assert_eq!(plan.fields, []);
        assert_eq!(plan.report.count("lchs-sector-size"), 1);
        let mut left = plan.left.iter().map(|left| left.finding.kind());
        assert!(left.any(|kind| kind == "lchs-sector-size"));
    }

    /// M4: 9 of 12 blocks need a copy, and two file blocks are holes.
    #[test]
    fn plans_that_hold_two_changes_each_mend_any_number_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.vdi");
        let options = CreateOptions {
            capacity_bytes: 12 << 17,
            block_size: 128 << 10,
            kind: NewKind::Dynamic,
            uuid: None,
        };
        let file = File::create_new(&path).unwrap();
        create_in(&file, &options).unwrap();
        for (nth, entry) in [4_u32, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 0]
            .into_iter()
            .enumerate()
        {
            let at = (1 << 20) + 4 * nth as u64;
            file.write_all_at(&entry.to_le_bytes(), at).unwrap();
        }
        file.set_len((2 << 20) + (5 << 17)).unwrap();
        file.write_all_at(&[7; 9], (2 << 20) + (4 << 17)).unwrap();
        let file = HostFile::open(&path, Access::Writable, Locking::Locked).unwrap();
        let mut rounds = 0;
        loop {
            let plan = plan_at_most(&file, Unreadable::Keep, 2).unwrap();
            let blocks = plan.blocks.as_ref().unwrap();
            assert!(blocks.changes.len() <= 2);
            apply(&file, &plan).unwrap();
            rounds += 1;
            if !plan.goes_on() {
                break;
            }
        }
        assert_eq!(rounds, 5);
        assert_eq!(check::check(&file).unwrap().worst(), None);
    }
}
