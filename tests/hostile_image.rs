//! Images that mean harm: every word of the header and of the map with every value that has broken
//! a parser before, and random bytes. Whatever is done with one ends with success or an error with a type, soon
//! and in little memory (P4). What is opened keeps the invariants of header and map.
//!
//! What such an image reads as, and that a repair of it loses nothing, is looked at in `fuzz/image.rs` of the library of
//! these tests.
//!
//! Memory is counted by the allocator of this program, time by the clock. One case runs at a time.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use vdi_core::check::{Severity, check};
use vdi_core::convert::{self, CopyOptions, Destination, End, RawDisk, Sharing};
use vdi_core::repair::{BlockPlan, Unreadable, apply, plan};
use vdi_core::{Access, Disk, ModifiedParent, Source, Storage, Threads, Zeroing};
use vdi_tests::builder::ZERO;
use vdi_tests::random::Random;
use vdi_tests::simulated::{Contents, Layout, SimulatedFile, for_each_seed, percent};

/// Counts what the program has, and the most that it had.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[expect(
    unsafe_code,
    reason = "an allocator is asked for memory in no safe way"
)]
// SAFETY: all is done by the system's allocator; counting touches no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, memory: Memory) -> *mut u8 {
        count(memory.size());
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(memory) }
    }

    unsafe fn alloc_zeroed(&self, memory: Memory) -> *mut u8 {
        count(memory.size());
        // SAFETY: the caller keeps the promises of `alloc_zeroed`.
        unsafe { System.alloc_zeroed(memory) }
    }

    unsafe fn dealloc(&self, at: *mut u8, memory: Memory) {
        LIVE.fetch_sub(memory.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the promises of `dealloc`.
        unsafe { System.dealloc(at, memory) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(more: usize) {
    let live = LIVE.fetch_add(more, Ordering::Relaxed) + more;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

/// What a header may make us take without a map in the file: a bit for each of its 2^30 file blocks
/// at most, and what is done meanwhile.
const MOST_MEMORY: usize = (128 << 20) + (64 << 20);
/// A case takes milliseconds. Time that others take on this machine does not count.
const MOST_TIME: Duration = Duration::from_secs(5);

/// A file in memory shall not become larger by a repair.
const MOST_COPIED: u64 = 8 << 20;

/// The numbers of this program are those of one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// What the threads of this program have worked.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
        .unwrap()
        .into()
}

/// Runs something in the time and memory that are enough for any image.
fn bounded<T>(what: &str, act: impl FnOnce() -> T) -> T {
    bounded_by(MOST_MEMORY, what, act)
}

/// Runs something in a little time and `most_memory` bytes.
fn bounded_by<T>(most_memory: usize, what: &str, act: impl FnOnce() -> T) -> T {
    let before = LIVE.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let start = now();
    let result = act();
    let (took, peak) = (now() - start, PEAK.load(Ordering::Relaxed));
    let memory = peak.saturating_sub(before);
    assert!(took < MOST_TIME, "{what} took {took:?}");
    assert!(memory < most_memory, "{what} took {memory} bytes");
    result
}

/// An image and its parents, and where the first map is.
#[derive(Clone)]
struct Chain {
    images: Vec<Contents>,
    map_at: u64,
    entries: u64,
}

fn chain(random: &mut Random) -> Chain {
    let layout = Layout::any(&[128 << 10, 256 << 10], random);
    let mut images = vec![layout.build(random).0];
    let depth = *random.pick(&[0, 0, 1, 2]);
    for _ in 0..depth {
        let parent = Layout::any(&[128 << 10, 512 << 10], random).build(random).0;
        let child = images.last_mut().unwrap();
        child.write(0x4C, &4_u32.to_le_bytes());
        child.write(0x1A8, &parent.bytes(0x188..0x1A8));
        images.push(parent);
    }
    // The child's parent must have a name.
    for image in &mut images {
        if image.bytes(0x188..0x198) == [0; 16] {
            image.write(0x188, &random.bytes(16));
        }
    }
    Chain {
        images,
        map_at: layout.offset_bmap.into(),
        entries: layout.entries.len() as u64,
    }
}

/// Where the words of a header are that mean something.
fn words_of_header() -> impl Iterator<Item = u64> {
    (0x40..0x54).chain(0x154..0x1D8).step_by(4)
}

fn word(contents: &Contents, at: u64) -> u32 {
    u32::from_le_bytes(contents.bytes(at..at + 4).try_into().unwrap())
}

/// A value that has broken a parser before, in place of `old`.
fn hostile(contents: &Contents, old: u32, random: &mut Random) -> u32 {
    let length = u32::try_from(contents.len_bytes()).unwrap();
    let power = 1_u32 << random.within(0..32);
    match random.within(0..12) {
        0 => 0,
        1 => u32::MAX,
        2 => u32::MAX - 1,
        3 => old.wrapping_add(1),
        4 => old.wrapping_sub(1),
        5 => power,
        6 => power.wrapping_sub(1),
        7 => length.wrapping_add(*random.pick(&[0, 1, u32::MAX])),
        8 => old ^ power,
        9 => 2,
        10 => {
            let words: Vec<u64> = words_of_header().collect();
            word(contents, *random.pick(&words))
        }
        _ => u32::try_from(random.number() >> 32).unwrap(),
    }
}

/// Changes a word of the header or the map, the length, or some bits.
fn mutate(image: &mut Contents, map: (u64, u64), random: &mut Random) {
    let (map_at, entries) = map;
    let words: Vec<u64> = words_of_header().collect();
    let at = match random.within(0..10) {
        0..5 => *random.pick(&words),
        5..8 => map_at + 4 * random.within(0..entries),
        8 => {
            let boundary = *random.pick(&[0, 0x48, 0x1C8, 0x1D8, map_at, map_at + 4 * entries]);
            let len = boundary + random.within(0..3);
            image.set_len(len.saturating_sub(1).min(image.len_bytes()));
            return;
        }
        _ => {
            for _ in 0..random.within(1..9) {
                let at = random.within(0..map_at + 4 * entries);
                let byte = image.bytes(at..at + 1)[0];
                image.write(at, &[byte ^ (1 << random.within(0..8))]);
            }
            return;
        }
    };
    let new = hostile(image, word(image, at), random);
    image.write(at, &new.to_le_bytes());
}

fn storages(images: &[Contents]) -> Vec<Arc<dyn Storage>> {
    let storage = |image: &Contents| SimulatedFile::new(image.clone()) as Arc<dyn Storage>;
    images.iter().map(storage).collect()
}

/// Opens a chain, if it can be opened.
fn open(storages: Vec<Arc<dyn Storage>>, access: Access) -> Option<Arc<Disk>> {
    let disk = bounded("open", || {
        Disk::open_chain(storages, access, ModifiedParent::Allow)
    });
    disk.ok().map(Arc::new)
}

/// The invariants of a header and map that were opened, by another reader: H1, H3, B1 and B2.
fn assert_laid_out(image: &Contents, access: Access) {
    const VERSION_0: u32 = 2;
    if word(image, 0x44) == VERSION_0 {
        return; // It has other fields; the model tests know them.
    }
    let [map, data, blocks, count] =
        [0x154, 0x158, 0x180, 0x184].map(|at| u64::from(word(image, at)));
    let map_end = map + 4 * blocks;
    assert!(0x1C8 <= map && map_end <= data, "H1: {map}, {data}");
    assert!(map_end <= image.len_bytes(), "the map is cut off");
    assert!(count <= blocks || access == Access::ReadOnly, "H3: {count}");
    // Only where every block of the disk has storage, and none lies beyond it, may a stopped resize have left blocks
    // behind what the numbers reach.
    let disk_size = u64::from(word(image, 0x170)) | u64::from(word(image, 0x174)) << 32;
    let disk_blocks = disk_size.div_ceil(u64::from(word(image, 0x178)));
    let entries = || (map..map_end).step_by(4).map(|at| word(image, at));
    let is_full = (0..)
        .zip(entries())
        .all(|(block, entry)| (block < disk_blocks) == (entry < ZERO));
    let numbers = blocks + if is_full { 1 << 15 } else { 0 };
    let mut owned = HashSet::new();
    for entry in entries() {
        if entry < ZERO {
            assert!(u64::from(entry) < numbers, "B1: {entry}");
            assert!(owned.insert(entry), "B2: {entry}");
        }
    }
}

/// Reads a little of every extent; there are no more than blocks in the maps.
fn read_all(disk: &Arc<Disk>) {
    let mut at = 0;
    let mut buf = vec![0; 512];
    let visit = disk.lane().enter();
    for extent in disk.map(disk.capacity().whole(), &visit) {
        let end = at + extent.len_bytes;
        if matches!(extent.source, Source::Stored { .. }) {
            for first in [at, end - 512] {
                let range = disk.capacity().range_of_bytes(first..first + 512);
                let read = disk.read_at(range.unwrap(), &mut buf);
                read.expect("a block of an image that opens lies in its file");
            }
        }
        at = end;
    }
    assert_eq!(at, disk.capacity().bytes());
}

/// Writes here and there; what was opened for that is no worse afterwards.
fn write_some(disk: Arc<Disk>, top: &SimulatedFile, random: &mut Random) {
    let sectors = disk.capacity().sectors();
    if sectors == 0 {
        return;
    }
    let before = check(top).unwrap().count_of(Severity::Corruption);
    for _ in 0..4 {
        let start = vdi_core::Sector(random.within(0..sectors));
        let range = disk.capacity().range(start, 1).unwrap();
        if percent(random, 50) {
            disk.write_at(range, &[7; 512]).unwrap();
        } else {
            disk.zero_at(range, Zeroing::Release).unwrap();
        }
    }
    disk.flush().unwrap();
    drop(disk);
    let report = check(top).unwrap();
    // Too small a count stays as it is until a block is allocated.
    let after = report.count_of(Severity::Corruption);
    assert!(after <= before, "{report:#?}");
}

/// Does to a chain what the tool does.
fn use_it(chain: &Chain, raw: &Path, random: &mut Random) {
    if let Some(disk) = open(storages(&chain.images), Access::ReadOnly) {
        for image in &chain.images {
            assert_laid_out(image, Access::ReadOnly);
        }
        bounded("reading", || read_all(&disk));
        if disk.capacity().bytes() < 4 << 20 && percent(random, 10) {
            bounded("converting", || convert_to(raw, &disk));
        }
    }
    let top = SimulatedFile::new(chain.images[0].clone());
    let mut files = storages(&chain.images);
    files[0] = Arc::clone(&top) as Arc<dyn Storage>;
    if let Some(disk) = open(files, Access::Writable) {
        assert_laid_out(&chain.images[0], Access::Writable);
        bounded("writing", || write_some(disk, &top, random));
    }
    for image in &chain.images {
        let _verdict = bounded("checking", || check(&*SimulatedFile::new(image.clone())));
        for unreadable in [Unreadable::Keep, Unreadable::Drop] {
            let file = SimulatedFile::new(image.clone());
            bounded("repairing", || repair(&file, unreadable));
        }
    }
}

fn convert_to(raw: &Path, disk: &Arc<Disk>) {
    let _gone = std::fs::remove_file(raw);
    let to = RawDisk::create(raw, disk.capacity()).unwrap();
    let mut go_on = |_| std::ops::ControlFlow::Continue(());
    let from = End::Image(Arc::clone(disk));
    let options = CopyOptions {
        threads: Threads::TO_COPY,
        sharing: Sharing::Auto,
    };
    convert::copy(&from, Destination::Raw(to), options, &mut go_on).unwrap();
}

/// A repair leaves nothing that another one would do, and an image that had no header left opens, or
/// the repair says why not.
fn repair(file: &Arc<SimulatedFile>, unreadable: Unreadable) {
    let Ok(first) = plan(&**file, unreadable) else {
        return;
    };
    // The plan says how much it copies: up to what the disk claims to have. Who asks for that gets it.
    let copied = first.blocks.as_ref().map_or(0, BlockPlan::copied_bytes);
    if copied > MOST_COPIED {
        return;
    }
    apply(&**file, &first).unwrap();
    let second = plan(&**file, unreadable).unwrap();
    assert!(second.is_empty(), "{second:#?}");
    let corrupt = second.report.count_of(Severity::Corruption) > 0;
    assert_eq!(
        corrupt,
        second
            .left
            .iter()
            .any(|left| left.finding.severity() == Severity::Corruption)
    );
}

#[test]
fn no_hostile_image_breaks_the_library() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("raw");
    for_each_seed(60, |mut random| {
        let sound = chain(&mut random);
        for nth in 0..50 {
            let mut hostile = sound.clone();
            for _ in 0..*random.pick(&[1, 1, 1, 2, 4]) {
                let depth = random.within(0..hostile.images.len() as u64);
                let image = &mut hostile.images[usize::try_from(depth).unwrap()];
                mutate(image, (sound.map_at, sound.entries), &mut random);
            }
            println!("case {nth}");
            use_it(&hostile, &raw, &mut random);
        }
    });
}

/// Each word of a header, alone, with each of the values that are worst.
#[test]
fn no_word_of_a_header_breaks_the_library() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("raw");
    let mut random = Random::seeded(1);
    let sound = chain(&mut random);
    for at in words_of_header() {
        let old = word(&sound.images[0], at);
        let (more, less) = (old.wrapping_add(1), old.wrapping_sub(1));
        for new in [
            0,
            1,
            more,
            less,
            1 << 20,
            1 << 30,
            1 << 31,
            u32::MAX - 1,
            u32::MAX,
        ] {
            println!("{at:#x}: {old:#x} becomes {new:#x}");
            let mut hostile = sound.clone();
            hostile.images[0].write(at, &new.to_le_bytes());
            use_it(&hostile, &raw, &mut random);
        }
    }
}

/// An image whose map has `blocks` entries, all of them a hole.
fn with_huge_map(blocks: u32) -> (Layout, Contents) {
    let mut layout = Layout::plain(1 << 20, 1 << 23);
    layout.entries.clear();
    let mut image = layout.build(&mut Random::seeded(1)).0;
    image.write(0x158, &(layout.offset_bmap + blocks * 4).to_le_bytes());
    image.write(0x170, &(u64::from(blocks) << 20).to_le_bytes());
    image.write(0x180, &blocks.to_le_bytes());
    image.write(0x184, &1_u32.to_le_bytes());
    image.set_len(1 << 50);
    (layout, image)
}

/// A map of 4 million entries that all name one block, in a file that is nothing but a hole.
#[test]
fn a_sparse_image_with_a_huge_map_costs_little() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let blocks = 1_u32 << 22;
    let (_, image) = with_huge_map(blocks);
    let opened = bounded_by(2 << 20, "opening", || {
        open(storages(std::slice::from_ref(&image)), Access::ReadOnly)
    });
    assert!(opened.is_none());
    let file = SimulatedFile::new(image);
    let report = bounded_by(2 << 20, "checking", || check(&*file)).unwrap();
    // A few entries are the layout's own.
    assert!(report.count("shared-block") > u64::from(blocks) - 1000);
    let plan = bounded_by(64 << 20, "planning", || plan(&*file, Unreadable::Keep)).unwrap();
    assert!(plan.goes_on() && !plan.is_empty());
}

/// Each of a million entries is wrong, and each in its own way.
#[test]
fn a_map_of_nonsense_is_counted_and_not_listed() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let blocks = 1_u32 << 20;
    let (layout, mut image) = with_huge_map(blocks);
    let entries = (0..blocks).flat_map(|block| (blocks + block).to_le_bytes());
    let entries: Vec<u8> = entries.collect();
    image.write(layout.offset_bmap.into(), &entries);
    let file = SimulatedFile::new(image);
    let report = bounded_by(2 << 20, "checking", || check(&*file)).unwrap();
    assert_eq!(report.count("entry-out-of-range"), u64::from(blocks));
    assert!(report.findings().len() < 100);
}
