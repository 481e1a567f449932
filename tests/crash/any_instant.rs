//! Random use of a disk, stopped at every instant, in every way.
//!
//! The power cuts leave out maps whose offset is no multiple of 4. There an entry may lie across the
//! boundary of two sectors, and no order of writes keeps a cut from tearing it.

use std::sync::Arc;

use vdi_core::{Access, Disk, Sector, Storage};
use vdi_tests::random::Random;
use vdi_tests::simulated::chain::{contents, open_chain};
use vdi_tests::simulated::{
    Built, Chain, Contents, Crash, Cut, Found, Habits, Layout, Moment, Operation, Oracle,
    SimulatedFile, Workload, for_each_seed, percent,
};

const SIZES: [u32; 3] = [128 << 10, 128 << 10, 256 << 10];

const HABITS: Habits = Habits {
    most_sectors: 300,
    most_in_flight: 6,
    gives_up: true,
    zeros: true,
};

/// Uses a disk for a while, with closes and deaths between.
fn used(chain: &Chain, steps: u64, random: &mut Random) -> Workload {
    let Built { top, parents, disk } = chain.build(random);
    let file = SimulatedFile::new(top);
    let layout = chain.top().clone();
    let mut workload = Workload::open(file, parents, layout, disk, HABITS, random.fork());
    for _ in 0..steps {
        match random.within(0..120) {
            0 => workload.close_and_reopen(),
            1 => workload.die_and_reopen(),
            _ => workload.step(),
        }
    }
    if percent(random, 50) {
        workload.close_and_reopen();
    }
    workload
}

/// A crash, and what is known of the image that it hit.
pub(crate) struct Scene<'w> {
    pub(crate) layout: &'w Layout,
    pub(crate) parents: &'w [Arc<SimulatedFile>],
    pub(crate) oracle: &'w Oracle,
    /// From when on no harm may come to the image from others. (One that was made with
    /// too small a count is mended by the first write.)
    pub(crate) harmless_from: Moment,
}

impl<'w> Scene<'w> {
    fn of(workload: &'w Workload, start: &Contents, end: Moment) -> Self {
        let was_harmless = Found::within(start, &workload.layout).harm(&workload.layout);
        let harmless_from = match was_harmless {
            None => Moment::START,
            Some(_) => workload.first_write_ever.unwrap_or(end),
        };
        Self {
            layout: &workload.layout,
            parents: &workload.parents,
            oracle: &workload.oracle,
            harmless_from,
        }
    }

    /// P3: what is left is an image that others may write, that opens again for writing, and that reads
    /// as it may. Gives the bytes that it reads as.
    pub(crate) fn check(&self, left: &Contents, moment: Moment, crash: Crash) -> Vec<u8> {
        let image = Found::within(left, self.layout);
        if moment >= self.harmless_from {
            let harm = image.harm(self.layout);
            assert_eq!(harm, None, "W1, B2: {crash:?} at {moment:?}");
        }
        let file = SimulatedFile::new(left.clone());
        let disk = open_chain(&file, self.parents);
        let disk = disk.unwrap_or_else(|error| panic!("P3: {crash:?} at {moment:?}: {error}"));
        let found = contents(&disk);
        let cut_of = |sector| image.cut_of(sector, self.layout);
        let wrong = self.oracle.judge(0, &found, moment, crash, cut_of);
        assert_eq!(wrong, None, "{crash:?} at {moment:?}");
        found
    }

    /// Life goes on after the crash.
    fn live_on(&self, left: Contents, disk: Vec<u8>, random: &mut Random) {
        let file = SimulatedFile::new(left);
        let (parents, layout) = (self.parents.to_vec(), self.layout.clone());
        let mut workload = Workload::open(file, parents, layout, disk, HABITS, random.fork());
        for _ in 0..25 {
            workload.step();
        }
        workload.close_and_reopen();
        workload.check_all();
    }
}

#[test]
fn a_kill_at_any_instant_loses_nothing_that_was_answered() {
    for_each_seed(15, |mut random| {
        let chain = Chain::any(&SIZES, &mut random);
        println!("{chain:?}");
        let workload = used(&chain, 120, &mut random);
        let history = workload.file.history();
        let scene = Scene::of(&workload, history.start(), history.now());
        for moment in history.moments() {
            let left = history.killed_at(moment, &mut random);
            let disk = scene.check(&left, moment, Crash::Kill);
            if percent(&mut random, 3) {
                scene.live_on(left, disk, &mut random);
            }
        }
    });
}

#[test]
fn a_power_cut_at_any_instant_keeps_what_was_flushed_and_all_blocks_apart() {
    for_each_seed(15, |mut random| {
        let chain = loop {
            let chain = Chain::any(&SIZES, &mut random);
            if chain.top().offset_bmap.is_multiple_of(4) {
                break chain;
            }
        };
        println!("{chain:?}");
        let workload = used(&chain, 120, &mut random);
        let history = workload.file.history();
        let scene = Scene::of(&workload, history.start(), history.now());
        for moment in history.moments() {
            let point = history.at(moment);
            for cut in point.cuts(4, &mut random) {
                let left = point.cut(cut, &mut random);
                let disk = scene.check(&left, moment, Crash::PowerCut);
                if percent(&mut random, 1) {
                    scene.live_on(left, disk, &mut random);
                }
            }
        }
    });
}

/// W1 where room is made many times: the steps are at least 64 MiB.
#[test]
fn room_that_is_made_in_steps_always_covers_every_entry() {
    for_each_seed(2, |mut random| {
        let layout = Layout::plain(128 << 10, 1300 * (128 << 10));
        let file = SimulatedFile::new(layout.build(&mut random).0);
        let storage = Arc::clone(&file) as Arc<dyn Storage>;
        let disk = Arc::new(Disk::open(storage, Access::Writable).unwrap());
        for _ in 0..1500 {
            let sector = Sector(random.within(0..disk.capacity().sectors()));
            let range = disk.capacity().range(sector, 1).unwrap();
            disk.write_at(range, &[1; 512]).unwrap();
            if percent(&mut random, 30) {
                disk.do_chores().unwrap();
            }
        }
        let history = file.history();
        let lengths = history.since(Moment::START).filter_map(Operation::new_len);
        assert!(lengths.count() > 2, "room was made in steps");
        for moment in history.moments() {
            if !percent(&mut random, 5) {
                continue;
            }
            let point = history.at(moment);
            for cut in [Cut::Nothing, Cut::Everything, Cut::Torn, Cut::Torn] {
                let left = point.cut(cut, &mut random);
                let harm = Found::within(&left, &layout).harm(&layout);
                assert_eq!(harm, None, "{cut:?} at {moment:?}");
            }
        }
    });
}
