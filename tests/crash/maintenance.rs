//! Compaction and resize, stopped at every instant: the image opens and reads as before, or has its new size.

use std::sync::Arc;

use vdi_core::compact::{self, Equal};
use vdi_core::resize;
use vdi_core::{Capacity, Disk, Sector};
use vdi_tests::random::Random;
use vdi_tests::simulated::chain::{contents, open_chain};
use vdi_tests::simulated::{Built, Chain, Contents, Moment, SimulatedFile, for_each_seed, percent};

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
        let disk = open_chain(&SimulatedFile::new(left), &self.parents);
        contents(&disk.unwrap_or_else(|error| panic!("P3: {error}")))
    }

    /// Looks at what a stop at any instant would have left.
    fn at_every_stop(&self, random: &mut Random, judge: impl Fn(&[u8], Moment)) {
        let history = self.top.history();
        for moment in history.moments() {
            let killed = history.killed_at(moment, random);
            judge(&self.opened(killed), moment);
            let point = history.at(moment);
            for cut in point.cuts(4, random) {
                judge(&self.opened(point.cut(cut, random)), moment);
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
