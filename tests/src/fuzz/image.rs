//! The target for images: open, check, repair, read, write, discard and open again, over any bytes.
//!
//! What must hold, whatever the image says:
//!
//! - What opens keeps B1 and B2 and lies within its file, and reads as the format says.
//! - Opening for reading, reading, checking and planning write nothing.
//! - `check` finds corruption where `open` refuses, and none that harms a use where it does not.
//! - A repair loses nothing that can be read, even if it fails half way, and leaves no corruption but what it
//!   says; then the image opens.
//! - What was written is there after a close or a kill, and nothing else changed: on the disk or in what
//!   the file has besides.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use vdi_core::check::{Finding, Severity, check};
use vdi_core::repair::{BlockPlan, FieldValue, Plan, Unreadable, apply, plan};
use vdi_core::{Access, Disk, ModifiedParent, OpenError, Sector, Storage, Zeroing};

use super::expected::{Change, Expected, assert_reads};
use super::image_input::{Input, Operation};
use super::reference::{FREE, Reference, ZERO, held_bytes, is_same, is_zeros};
use crate::simulated::{Contents, Failure, Kind, Moment, SimulatedFile};

/// Blocks may be large; more than this takes too long.
const MOST_COPIED: u64 = 32 << 20;

/// Does all that to the image in some bytes.
///
/// # Panics
/// If a promise is broken.
pub fn run(bytes: &[u8]) {
    let input = Input::parse(bytes);
    let shape = Reference::of(input.file.clone());
    if shape.is_too_large() {
        return;
    }
    read_only(&input, &shape);
    repaired(&input, &shape);
    written(&input);
}

fn open(input: &Input, file: &Arc<SimulatedFile>, access: Access) -> Result<Arc<Disk>, OpenError> {
    let mut files = vec![Arc::clone(file) as Arc<dyn Storage>];
    if let Some(parent) = &input.parent {
        files.push(SimulatedFile::new(parent.clone()));
    }
    Disk::open_chain(files, access, ModifiedParent::Allow).map(Arc::new)
}

fn assert_untouched(file: &SimulatedFile, by: &str) {
    assert_eq!(file.done_since(Moment::START), [], "{by} writes");
}

/// What only looks at the image.
fn read_only(input: &Input, shape: &Reference) {
    let file = SimulatedFile::new(input.file.clone());
    let report = check(&*file);
    assert_untouched(&file, "check");
    for unreadable in [Unreadable::Keep, Unreadable::Drop] {
        let _plan = plan(&*file, unreadable);
        assert_untouched(&file, "plan");
    }
    let corrupt: Vec<&str> = match &report {
        Ok(report) => report
            .findings()
            .iter()
            .filter(|one| one.severity() == Severity::Corruption)
            .map(Finding::kind)
            .collect(),
        Err(_) => vec!["unknown"],
    };
    for access in [Access::ReadOnly, Access::Writable] {
        match open(input, &file, access) {
            Ok(disk) => {
                let unseen = corrupt.iter().find(|kind| !harmless(access).contains(kind));
                assert_eq!(
                    unseen, None,
                    "{access:?}: open accepts what check calls corrupt"
                );
                assert_sound(shape);
                let is_counted = u64::from(shape.blocks_allocated) <= shape.blocks;
                assert!(is_counted || access == Access::ReadOnly, "H3: {shape:?}");
                assert_reads(&disk, &Expected::of(input, shape), &BTreeSet::new());
            }
            Err(OpenError::NoParent { .. }) if input.parent.is_none() => {}
            Err(error) => assert_ne!(corrupt, [""; 0], "check finds nothing, but: {error}"),
        }
        // Opening for writing is not writing.
        assert_untouched(&file, "open");
    }
}

/// How many blocks may be behind what the numbers reach.
const MOST_AWAY: u64 = 1 << 15;

/// What may be wrong with an image that is opened: H3, and a count that the first write mends.
const fn harmless(access: Access) -> &'static [&'static str] {
    const FLAWS: &[&str] = &[
        "count-too-small",
        "count-too-large",
        "null-uuid",
        "map-in-header",
    ];
    match access {
        Access::ReadOnly => FLAWS,
        Access::Writable => FLAWS.split_at(1).0,
    }
}

/// Every block of the disk has storage, and none lies beyond it: only then may a stopped resize have left blocks behind
/// the numbers that the header reaches (B1), at most [`MOST_AWAY`].
fn is_full(shape: &Reference) -> bool {
    let disk_blocks = shape.disk_size.div_ceil(shape.block_size);
    (0..)
        .zip(shape.entries())
        .all(|(block, entry)| (block < disk_blocks) == (entry < ZERO))
}

/// B1 and B2 by another reader.
fn assert_sound(shape: &Reference) {
    let numbers = shape.blocks + if is_full(shape) { MOST_AWAY } else { 0 };
    assert!(shape.is_laid_out(), "{shape:?}");
    assert_eq!(shape.count_present(), shape.blocks, "the map is cut off");
    assert!(shape.blocks * shape.block_size >= shape.disk_size);
    let mut owned = BTreeSet::new();
    for (block, entry) in (0..).zip(shape.entries()) {
        if entry >= ZERO {
            continue;
        }
        assert!(u64::from(entry) < numbers, "B1: {block} in {entry}");
        assert!(owned.insert(entry), "B2: {entry} has two owners");
        let missing = shape.needed(block) - shape.present(block, entry);
        assert_eq!(missing, 0, "B1: {block} in {entry} is behind the end");
    }
}

/// Mends the image, and looks at what became of it.
fn repaired(input: &Input, shape: &Reference) {
    let unreadable = if input.flags.drops() {
        Unreadable::Drop
    } else {
        Unreadable::Keep
    };
    let file = SimulatedFile::new(input.file.clone());
    let Ok(mut next) = plan(&*file, unreadable) else {
        return;
    };
    let copied = |plan: &Plan| plan.blocks.as_ref().map_or(0, BlockPlan::copied_bytes);
    if copied(&next) > MOST_COPIED {
        return;
    }
    let mut plans = Vec::new();
    if input.flags.fails() {
        let kind = [Kind::Write, Kind::Sync, Kind::Punch, Kind::SetLen][input.fails_at % 4];
        file.fail(
            kind,
            0..u64::MAX,
            input.fails_at / 4,
            Failure::Clean(Errno::EIO),
        );
        let _may_fail = apply(&*file, &next);
        assert_kept(shape, &file.contents(), &[&next], unreadable);
        file.heal();
        let again = plan(&*file, unreadable).expect("it could be examined before");
        plans.push(std::mem::replace(&mut next, again));
        if copied(&next) > MOST_COPIED {
            return;
        }
    }
    apply(&*file, &next).expect("nothing fails");
    let done: Vec<&Plan> = plans.iter().chain([&next]).collect();
    assert_kept(shape, &file.contents(), &done, unreadable);
    let second = plan(&*file, unreadable).expect("it could be examined before");
    assert!(
        second.is_empty(),
        "{second:#?} is left to do after {next:#?}"
    );
    let is_corrupt = second.report.count_of(Severity::Corruption) > 0;
    let mut left = second.left.iter().map(|left| left.finding.severity());
    let is_left = left.any(|severity| severity == Severity::Corruption);
    assert_eq!(is_corrupt, is_left, "{second:#?}");
    if !is_corrupt {
        match open(input, &file, Access::Writable) {
            Ok(_) => assert_sound(&Reference::of(file.contents())),
            Err(OpenError::NoParent { .. }) if input.parent.is_none() => {}
            Err(error) => panic!("mended, but it does not open: {error}"),
        }
    }
}

/// M1: what could be read reads the same, and nothing else was touched where blocks are not (M3).
fn assert_kept(before: &Reference, after: &Contents, done: &[&Plan], unreadable: Unreadable) {
    let after = Reference::of(after.clone());
    if done.iter().all(|plan| plan.blocks.is_none()) {
        let mut fields: Vec<Range<u64>> = done
            .iter()
            .flat_map(|plan| &plan.fields)
            .map(|field| match field.to {
                FieldValue::Number { .. } => field.at.0..field.at.0 + 4,
                FieldValue::Uuid(_) => field.at.0..field.at.0 + 16,
            })
            .collect();
        fields.sort_by_key(|field| field.start);
        return assert_same_outside(before, &after, &fields);
    }
    assert_eq!(before.blocks, after.blocks);
    let (old, new) = (before.entries(), after.entries());
    assert_eq!(old.len(), new.len());
    for ((block, old), new) in (0..).zip(old).zip(new) {
        if old >= ZERO {
            assert_eq!(old, new, "the entry of {block}");
            continue;
        }
        let needed = before.needed(block);
        let present = before.present(block, old);
        if needed == 0 {
            continue;
        }
        if present == 0 {
            let is_right = match unreadable {
                Unreadable::Keep => new < ZERO && after.present(block, new) == 0,
                Unreadable::Drop => new == ZERO || new == old && after.present(block, new) == 0,
            };
            assert!(is_right, "{block} was unreadable in {old}, and is in {new}");
            continue;
        }
        assert!(
            new < ZERO,
            "{block} was kept in {old}, its entry is {new:#x}"
        );
        let (from, to) = (before.contents_of(old), after.contents_of(new));
        let stays = is_same((&before.contents, from), (&after.contents, to), present);
        assert!(
            stays,
            "{block} was kept in {old}, is in {new}, and is not the same"
        );
        let added = to + present..to + needed;
        assert!(
            is_zeros(&after.contents, &added),
            "{block} got another block's bytes"
        );
    }
}

fn assert_same_outside(before: &Reference, after: &Reference, fields: &[Range<u64>]) {
    let len = before.contents.len_bytes();
    assert_eq!(len, after.contents.len_bytes());
    let mut at = 0;
    for field in fields.iter().cloned().chain(std::iter::once(len..len)) {
        let gap = at..field.start.max(at);
        let stays = is_same(
            (&before.contents, gap.start),
            (&after.contents, gap.start),
            gap.end - gap.start,
        );
        assert!(stays, "{gap:?} was touched");
        at = field.end;
    }
}

/// Uses the disk, and sees that nothing else changed.
fn written(input: &Input) {
    let file = SimulatedFile::new(input.file.clone());
    let Ok(mut disk) = open(input, &file, Access::Writable) else {
        return;
    };
    let before = Reference::of(input.file.clone());
    let corruption = |file: &SimulatedFile| {
        let report = check(file).expect("what opens can be examined");
        report.count_of(Severity::Corruption)
    };
    let corrupt = corruption(&file);
    let mut expected = Expected::of(input, &before);
    if disk.capacity().sectors() == 0 {
        return;
    }
    for operation in &input.operations {
        match operation.kind % 12 {
            0 => {}
            9 => {
                disk.close().expect("nothing fails");
                disk = open(input, &file, Access::Writable).expect("a closed image opens");
            }
            10 => disk = open(input, &file, Access::Writable).expect("a killed one opens"),
            11 => disk.flush().expect("nothing fails"),
            kind => change(&disk, kind, *operation, &mut expected),
        }
    }
    if !input.flags.dies() {
        disk.close().expect("nothing fails");
    }
    drop(disk);
    let after = Reference::of(file.contents());
    assert_sound(&after);
    assert!(corruption(&file) <= corrupt);
    assert_rest_stays(&before, &after);
    let [_, uuid] = before.changing();
    if before.contents.bytes(uuid.clone()) != after.contents.bytes(uuid) {
        let named = after.entries().into_iter().filter(|&entry| entry < ZERO);
        let most = named.max();
        assert!(
            most < Some(after.blocks_allocated),
            "others would overwrite {most:?}"
        );
    }
    let disk = open(input, &file, Access::ReadOnly).expect("a used image opens");
    assert_reads(&disk, &expected, &after.sectors_held());
}

/// Writes, zeroes or discards.
fn change(disk: &Arc<Disk>, kind: u8, operation: Operation, expected: &mut Expected) {
    let sectors = disk.capacity().sectors();
    let size = expected.top.block_size / 512;
    let block = u64::from(operation.block) % sectors.div_ceil(size);
    let (first, count) = match kind {
        // Whole blocks.
        6..=8 => (block * size, (u64::from(operation.count) % 4 + 1) * size),
        _ => {
            let skip = u64::from(operation.sector) % size;
            (
                (block * size + skip).min(sectors - 1),
                u64::from(operation.count) % 64 + 1,
            )
        }
    };
    let count = count.min(sectors - first);
    let range = disk
        .capacity()
        .range(Sector(first), count)
        .expect("it was cut");
    let touched = first..first + count;
    let (how, becomes) = match kind {
        1 | 2 => {
            let byte = operation.count ^ operation.kind | 1;
            let data = vec![byte; usize::try_from(range.len_bytes()).expect("32 KiB at most")];
            disk.write_at(range, &data).expect("nothing fails");
            return expected.changes.push((touched, Change::Filled(byte)));
        }
        3 | 6 => (Zeroing::Keep, Change::Filled(0)),
        4 | 7 => (Zeroing::Release, Change::Filled(0)),
        _ => (Zeroing::Discard, Change::Discarded),
    };
    disk.zero_at(range, how).expect("nothing fails");
    expected.changes.push((touched, becomes));
}

/// All that is neither map nor block nor one of the two fields is as it was, and so are entries that no sector needs.
fn assert_rest_stays(before: &Reference, after: &Reference) {
    let [count, uuid] = before.changing();
    let used = before.sectors().div_ceil(before.block_size / 512);
    let end = before.contents.len_bytes();
    let kept = [
        0..count.start,
        count.end..uuid.start,
        uuid.end..before.map_at,
        before.map_at + 4 * used..before.end_of(0).min(end),
    ];
    for range in kept.into_iter().filter(|range| range.start < range.end) {
        let (start, len) = (range.start, range.end - range.start);
        let stays = is_same((&before.contents, start), (&after.contents, start), len);
        assert!(
            stays,
            "{range:?} was touched: {:?}",
            held_bytes(&before.contents, &range)
        );
    }
    let free = before.entries().iter().all(|&entry| entry == FREE);
    assert!(after.contents.len_bytes() >= before.map_end() || free);
}
