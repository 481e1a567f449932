//! Compaction and resize, stopped at every instant: the image opens and reads as before, or has its new size.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use vdi_core::check::check;
use vdi_core::compact::{self, Equal};
use vdi_core::resize::{self, ResizeStep};
use vdi_core::{Capacity, Disk, Sector, Zeroing};
use vdi_tests::random::Random;
use vdi_tests::simulated::chain::{contents, open_chain};
use vdi_tests::simulated::layout::{FREE, ZERO};
use vdi_tests::simulated::{
    Built, Chain, Contents, Cut, Failure, Kind, Layout, Moment, SimulatedFile, for_each_seed,
    percent,
};

const BLOCK: u32 = 128 << 10;

/// The files of a disk that somebody is about to change.
struct Patient {
    top: Arc<SimulatedFile>,
    parents: Vec<Arc<SimulatedFile>>,
    disk: Vec<u8>,
}

impl Patient {
    /// A chain of which some blocks hold zeros only, or the same as the parents.
    fn any(random: &mut Random) -> Self {
        let chain = loop {
            let chain = Chain::any(&[BLOCK, BLOCK, 2 * BLOCK], random);
            if chain.top().offset_bmap.is_multiple_of(4) {
                break chain;
            }
        };
        println!("{chain:?}");
        let Built { top, parents, .. } = chain.build(random);
        let top = SimulatedFile::new(top);
        let disk = Arc::new(open_chain(&top, &parents).unwrap());
        let block = chain.top().block_size as usize;
        let mut bytes = contents(&disk);
        for (nth, data) in bytes.chunks_mut(block).enumerate() {
            match random.within(0..4) {
                0 => data.fill(0),
                1 => {}
                _ => continue,
            }
            let sector = Sector((nth * block) as u64 / 512);
            let range = disk.capacity().range(sector, data.len() as u64 / 512);
            disk.write_at(range.unwrap(), data).unwrap();
        }
        if percent(random, 50) {
            disk.close().unwrap();
        }
        Self {
            top: SimulatedFile::new(top.contents()),
            parents,
            disk: bytes,
        }
    }

    fn open(&self) -> Arc<Disk> {
        Arc::new(open_chain(&self.top, &self.parents).unwrap())
    }

    fn opened(&self, left: Contents) -> Vec<u8> {
        contents(&self.reopened(&SimulatedFile::new(left)))
    }

    fn reopened(&self, top: &Arc<SimulatedFile>) -> Arc<Disk> {
        let disk = open_chain(top, &self.parents);
        Arc::new(disk.unwrap_or_else(|error| panic!("P3: {error}")))
    }

    /// Looks at what a stop at any instant would have left.
    fn at_every_stop(&self, random: &mut Random, judge: impl Fn(&[u8], Moment)) {
        self.left_by_every_stop(random, |left, moment, _| {
            judge(&self.opened(left), moment);
        });
    }

    fn left_by_every_stop(
        &self,
        random: &mut Random,
        mut judge: impl FnMut(Contents, Moment, &mut Random),
    ) {
        let history = self.top.history();
        for moment in history.moments() {
            let killed = history.killed_at(moment, random);
            judge(killed, moment, random);
            let point = history.at(moment);
            for cut in point.cuts(4, random) {
                let left = point.cut(cut, random);
                judge(left, moment, random);
            }
        }
        for parent in &self.parents {
            assert_eq!(parent.done_since(Moment::START), []);
        }
    }
}

#[test]
fn compaction_stopped_at_any_instant_changes_nothing_that_is_read() {
    let mut done = 0;
    for_each_seed(25, |mut random| {
        let patient = Patient::any(&mut random);
        let disk = patient.open();
        let equal = *random.pick(&[Equal::Zeros, Equal::ZerosAndParent]);
        let Ok(plan) = compact::plan(&disk, equal, &mut |_, _| ()) else {
            return;
        };
        if compact::apply(&disk, &plan).is_err() {
            return;
        }
        done += 1;
        let len = patient.top.contents().len_bytes();
        assert!(len <= plan.file_bytes_before);
        patient.at_every_stop(&mut random, |found, moment| {
            let same = found.len() == patient.disk.len();
            let wrong = (0..found.len() / 512).find(|nth| {
                let sector = nth * 512..nth * 512 + 512;
                found[sector.clone()] != patient.disk[sector]
            });
            assert!(same && wrong.is_none(), "sector {wrong:?} at {moment:?}");
        });
    });
    assert!(done > 10, "most images can be compacted: {done}");
}

#[test]
fn a_resize_stopped_at_any_instant_leaves_the_old_size_or_the_new_one() {
    let mut done = 0;
    for_each_seed(24, |mut random| {
        let patient = Patient::any(&mut random);
        let disk = patient.open();
        let old = patient.disk.len() as u64;
        let new = match random.within(0..3) {
            0 => old / 512 * random.within(1..100) / 100 * 512,
            1 => old + 512 * random.within(1..2000),
            // So many that the map needs the room of some blocks.
            _ => old + u64::from(BLOCK) * random.within(100..600),
        };
        let to = Capacity::from_bytes_rounded_down(new.max(512));
        let Ok(plan) = resize::plan(&disk, to) else {
            return;
        };
        if resize::apply(&disk, &plan).is_err() {
            return;
        }
        done += 1;
        let kept = usize::try_from(old.min(to.bytes())).unwrap();
        assert_eq!(patient.open().capacity(), to);
        patient.at_every_stop(&mut random, |found, moment| {
            let len = found.len() as u64;
            assert!(len == old || len == to.bytes(), "{len} bytes at {moment:?}");
            let wrong = (0..kept / 512).find(|nth| {
                let sector = nth * 512..nth * 512 + 512;
                found[sector.clone()] != patient.disk[sector]
            });
            assert_eq!(wrong, None, "sector at {moment:?}");
            let grown = &found[usize::try_from(old.min(len)).unwrap()..];
            assert!(grown.iter().all(|&byte| byte == 0), "at {moment:?}");
        });
    });
    assert!(done > 8, "most images can be resized: {done}");
}

/// A full image, or one of which few blocks are open, with little or no room behind its map.
fn full_patient(random: &mut Random) -> Patient {
    let blocks = u32::try_from(random.within(1..9)).unwrap();
    let cut = *random.pick(&[0, 0, 512, 70_000]);
    let mut top = Layout::plain(BLOCK, u64::from(blocks * BLOCK) - cut);
    top.header_size = 0x190;
    top.block_extra = *random.pick(&[0, 0, 512]);
    let beyond_disk = *random.pick(&[0, 0, 0, 2]);
    let entries = top.entries.len() + beyond_disk;
    top.entries.resize(entries, FREE);
    let entries = blocks + u32::try_from(beyond_disk).unwrap() + *random.pick(&[0, 0, 0, 1, 9]);
    top.offset_data = top.offset_bmap + 4 * entries;
    top = top.with_blocks(blocks);
    let mut layouts = Vec::new();
    match random.within(0..4) {
        0 => top.image_type = 2,
        1 => {
            top.image_type = 4;
            top.parent = Some(2);
            let mut parent = Layout::plain(BLOCK, u64::from(10 * BLOCK)).with_blocks(10);
            parent.uuid = 2;
            layouts.push(parent);
        }
        _ => {}
    }
    let open = *random.pick(&[0, 0, 0, 1, 2]);
    for _ in 0..open {
        top.entries[usize::try_from(random.within(0..u64::from(blocks))).unwrap()] =
            *random.pick(&[FREE, ZERO]);
    }
    layouts.insert(0, top);
    let chain = Chain { layouts };
    println!("{chain:?}");
    let Built { top, parents, disk } = chain.build(random);
    let top = SimulatedFile::new(top);
    Patient { top, parents, disk }
}

/// Whether VirtualBox and QEMU open and write what is left without harm, going by the header in it:
/// they give the next new block the number `blocks_allocated`. Says whether blocks are away.
fn others_are_safe(left: &Contents) -> bool {
    let word = |at: u64| {
        let bytes = left.bytes(at..at + 4);
        u32::from_le_bytes(*bytes.first_chunk().unwrap())
    };
    let [map, data, size, block, extra, in_image, count] =
        [0x154, 0x158, 0x170, 0x178, 0x17C, 0x180, 0x184]
            .map(word)
            .map(u64::from);
    let size = size | u64::from(word(0x174)) << 32;
    assert!(map + 4 * in_image <= data && map + 4 * in_image <= left.len_bytes());
    assert!(count <= in_image && in_image * block >= size);
    let disk_blocks = size.div_ceil(block);
    let map = left.bytes(map..map + 4 * in_image);
    let (map, _) = map.as_chunks();
    let entries = map.iter().map(|&entry| u32::from_le_bytes(entry));
    let (mut owned, mut is_full, mut highest) = (HashSet::new(), true, 0);
    for (nth, entry) in (0..).zip(entries) {
        if entry >= ZERO {
            is_full &= nth >= disk_blocks;
            continue;
        }
        assert!(owned.insert(entry), "B2: {entry}");
        assert!(nth < disk_blocks, "a block that no sector needs");
        let end = data + u64::from(entry) * (block + extra) + extra;
        assert!(
            end + block.min(size - nth * block) <= left.len_bytes(),
            "{nth} in {entry}"
        );
        highest = highest.max(u64::from(entry) + 1);
    }
    assert!(
        highest <= count || is_full,
        "the next new block overwrites one"
    );
    highest > in_image
}

/// W1, B1: there is no number for a block that makes way, and nobody is harmed.
#[test]
fn a_full_image_whose_growth_is_stopped_at_any_instant_is_whole_for_everybody() {
    let (mut away, mut in_two_steps) = (0, 0);
    for_each_seed(60, |mut random| {
        let patient = full_patient(&mut random);
        let old = patient.disk.len() as u64;
        // The last one takes so many blocks that it is done in two steps.
        let more = *random.pick(&[1, 1, 300, 300, 34_000]);
        let to = Capacity::from_bytes_rounded_down(
            old + 512 * random.within(0..9) + more * u64::from(BLOCK),
        );
        let disk = patient.open();
        let plan = resize::plan(&disk, to).unwrap();
        resize::apply(&disk, &plan).unwrap();
        assert!(!others_are_safe(&patient.top.contents()));
        patient.left_by_every_stop(&mut random, |left, moment, random| {
            if others_are_safe(&left) {
                away += 1;
            }
            in_two_steps += u32::from(more == 34_000);
            let file = SimulatedFile::new(left);
            let disk = patient.reopened(&file);
            let len = disk.capacity().bytes();
            assert!(len == old || len == to.bytes(), "{len} bytes at {moment:?}");
            assert_front(&disk, &patient.disk, moment);
            if percent(random, 10) {
                live_on(&patient, &file, &disk, random);
            }
        });
    });
    println!("{away} stops with blocks away");
    assert!(away > 0 && in_two_steps > 0, "{away} {in_two_steps}");
}

/// B1: the entry that sent a block away may be lost, and then its old place counts.
/// The larger map takes the place of blocks, which are copied, and is written: any of that may find no space. What it
/// took must be nobody's trailing bytes then, nor a count of leaked blocks.
#[test]
fn a_growth_that_finds_no_space_gives_back_what_it_took() {
    for_each_seed(1, |mut random| {
        let layout = Layout::plain(BLOCK, 20 * u64::from(BLOCK)).with_blocks(9);
        let (first, expected) = layout.build(&mut random);
        let to = Capacity::from_bytes_rounded_down(u64::from(BLOCK) << 20);
        for after in 0.. {
            let file = SimulatedFile::new(first.clone());
            let disk = Arc::new(open_chain(&file, &[]).unwrap());
            let plan = resize::plan(&disk, to).unwrap();
            let full = Failure::Clean(Errno::ENOSPC);
            file.fail(Kind::Write, 1024..u64::MAX, after, full);
            let resized = resize::apply(&disk, &plan);
            file.heal();
            let report = check(&*file).unwrap();
            assert_eq!(report.worst(), None, "write {after}: {report:#?}");
            if resized.is_ok() {
                assert!(after > 10, "only {after} writes");
                break;
            }
            let disk = Arc::new(open_chain(&file, &[]).unwrap());
            assert!(contents(&disk) == expected, "write {after}");
            let plan = resize::plan(&disk, to).unwrap();
            resize::apply(&disk, &plan).unwrap();
            assert_eq!(check(&*file).unwrap().worst(), None, "write {after}");
        }
    });
}

#[test]
fn a_kill_while_a_block_is_away_and_a_power_cut_after_it_lose_nothing() {
    for_each_seed(3, |mut random| {
        let mut top = Layout::plain(BLOCK, u64::from(3 * BLOCK));
        top.offset_data = top.offset_bmap + 12;
        let (contents, disk) = top.with_blocks(3).build(&mut random);
        let (top, parents) = (SimulatedFile::new(contents), Vec::new());
        let patient = Patient { top, parents, disk };
        let larger = Capacity::from_bytes_rounded_down(300 * u64::from(BLOCK));
        let disk = patient.open();
        let plan = resize::plan(&disk, larger).unwrap();
        // All of the entry is written, and nothing comes after it.
        let killed = Failure::Short(Errno::EIO, 4);
        patient.top.fail(Kind::Write, 512..524, 0, killed);
        resize::apply(&disk, &plan).unwrap_err();
        assert!(others_are_safe(&patient.top.contents()), "a block is away");
        let disk = patient.reopened(&patient.top);
        let range = disk.capacity().range(Sector(0), 1).unwrap();
        disk.write_at(range, &patient.disk[..512]).unwrap();
        patient.left_by_every_stop(&mut random, |left, moment, _| {
            others_are_safe(&left);
            let disk = patient.reopened(&SimulatedFile::new(left));
            assert_front(&disk, &patient.disk, moment);
        });
    });
}

/// B1: as long as one block is open, somebody may want a number for it. A map of so many entries takes two
/// blocks, and there is one number.
#[test]
fn blocks_are_away_only_when_every_block_has_storage() {
    const BLOCKS: u32 = 33_000;
    let mut random = Random::seeded(1);
    let mut top = Layout::plain(BLOCK, u64::from(BLOCKS) * u64::from(BLOCK));
    top.offset_data = top.offset_bmap + 4 * BLOCKS;
    let (mut contents, _) = top.build(&mut random);
    // The blocks are holes in the file but for their first bytes.
    for number in 0..BLOCKS - 1 {
        contents.write(512 + 4 * u64::from(number), &number.to_le_bytes());
    }
    contents.write(0x184, &(BLOCKS - 1).to_le_bytes());
    let mut disk = vec![0; 4 * BLOCK as usize];
    for (number, block) in (0..).zip(disk.chunks_mut(BLOCK as usize)) {
        block[..512].fill(u8::try_from(number).unwrap() + 1);
        contents.write(top.file_block(number).start, &block[..512]);
    }
    contents.set_len(top.end_of(BLOCKS - 1));
    let (top, parents) = (SimulatedFile::new(contents), Vec::new());
    let patient = Patient { top, parents, disk };
    let before = patient.open();
    let to = before.capacity().bytes() + u64::from(BLOCK);
    let plan = resize::plan(&before, Capacity::from_bytes_rounded_down(to)).unwrap();
    assert!(matches!(
        plan.step,
        ResizeStep::Grow {
            vacated: 2,
            filled: 1
        }
    ));
    resize::apply(&before, &plan).unwrap();
    let mut away = 0;
    let history = patient.top.history();
    for moment in history.moments() {
        let left = history.killed_at(moment, &mut random);
        away += u32::from(others_are_safe(&left));
        let disk = patient.reopened(&SimulatedFile::new(left));
        assert_front(&disk, &patient.disk, moment);
    }
    assert!(away > 0);
}

/// The disk begins so, and has zeros behind.
fn assert_front(disk: &Disk, expected: &[u8], moment: Moment) {
    let len = disk
        .capacity()
        .bytes()
        .min(expected.len() as u64 + (1 << 20));
    let mut found = vec![1; usize::try_from(len).unwrap()];
    let range = disk.capacity().range(Sector(0), len / 512).unwrap();
    disk.read_at(range, &mut found).unwrap();
    let (front, behind) = found.split_at(expected.len());
    assert!(front == expected, "at {moment:?}");
    assert!(behind == vec![0; behind.len()], "at {moment:?}");
}

/// After the stop a block is let go and sectors are written, and the power is cut or the disk closed.
fn live_on(patient: &Patient, file: &Arc<SimulatedFile>, disk: &Arc<Disk>, random: &mut Random) {
    let mut expected = patient.disk.clone();
    let (sectors, per_block) = (expected.len() as u64 / 512, u64::from(BLOCK) / 512);
    let first = random.within(0..sectors) / per_block * per_block;
    let released = first..(first + per_block).min(sectors);
    let start = random.within(0..sectors);
    let written = start..(start + random.within(1..600)).min(sectors);
    let in_bytes = |sectors: &Range<u64>| {
        let bytes = |sector: u64| usize::try_from(sector * 512).unwrap();
        bytes(sectors.start)..bytes(sectors.end)
    };
    let range = |sectors: &Range<u64>| {
        let range = disk.capacity();
        range
            .range(Sector(sectors.start), sectors.end - sectors.start)
            .unwrap()
    };
    disk.zero_at(range(&released), Zeroing::Release).unwrap();
    expected[in_bytes(&released)].fill(0);
    assert!(
        !others_are_safe(&file.contents()),
        "B1: home before the first change"
    );
    let bytes = random.bytes(in_bytes(&written).len());
    disk.write_at(range(&written), &bytes).unwrap();
    expected[in_bytes(&written)].copy_from_slice(&bytes);
    disk.flush().unwrap();
    let history = file.history();
    let left = history.at(history.now()).cut(Cut::Nothing, random);
    assert!(!others_are_safe(&left));
    assert_front(
        &patient.reopened(&SimulatedFile::new(left)),
        &expected,
        history.now(),
    );
    disk.close().unwrap();
    assert!(!others_are_safe(&file.contents()));
    let disk = patient.reopened(&SimulatedFile::new(file.contents()));
    assert_front(&disk, &expected, history.now());
}
