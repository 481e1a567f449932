//! What is left after a cut, and whether it is what may be left.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use vdi_core::{Access, Disk, ModifiedParent, Sector, Storage};
use vdi_tests::counts;
use vdi_tests::random::Random;
use vdi_tests::recorded::Recording;
use vdi_tests::simulated::{
    Contents, Crash, Cut, Moment, Oracle, Plain, Replay, SimulatedFile, percent, plain,
};
use vdi_tests::tool::{program, qemu_img, qemu_io};
use vdi_tests::words;

/// Blocks that are read after each cut, besides those of the last requests: all in small disks.
const MOST_BLOCKS: usize = 48;

/// How much was tried.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    pub(crate) cuts: u64,
    pub(crate) kills: u64,
    pub(crate) sectors: u64,
    pub(crate) by_qemu: u64,
}

/// A disk under a power cut.
pub(crate) struct Judge<'r> {
    pub(crate) scene: &'r str,
    pub(crate) recording: &'r Recording,
    /// The names of its images, the top one's first.
    pub(crate) names: &'r [&'r str],
    pub(crate) oracle: &'r Oracle,
    /// Of so many cuts one is shown to QEMU's tools too; 0 if they cannot read it.
    pub(crate) qemu_every: u64,
    pub(crate) count: Count,
    directory: PathBuf,
}

impl<'r> Judge<'r> {
    pub(crate) fn new(
        scene: &'r str,
        recording: &'r Recording,
        names: &'r [&'r str],
        oracle: &'r Oracle,
    ) -> Self {
        let directory = program("vdi").with_file_name("power-cuts").join(scene);
        Self {
            scene,
            recording,
            names,
            oracle,
            qemu_every: 0,
            count: Count::default(),
            directory,
        }
    }

    /// Cuts the power at `instants` moments between two, `each` times at each.
    pub(crate) fn cut(
        &mut self,
        (from, to): (Moment, Moment),
        instants: usize,
        each: usize,
        random: &mut Random,
    ) {
        let mut moments: Vec<Moment> = std::iter::successors(Some(from), |one| Some(one.next()))
            .take_while(|one| *one <= to)
            .collect();
        while moments.len() > instants {
            let nth = random.within(0..moments.len() as u64);
            moments.swap_remove(usize::try_from(nth).unwrap());
        }
        moments.sort_unstable();
        let files: Vec<u64> = self
            .names
            .iter()
            .map(|name| self.recording.file(name, to).unwrap())
            .collect();
        let mut replays: Vec<Replay<'_>> = files
            .iter()
            .map(|&file| Replay::new(self.recording.history(file)))
            .collect();
        for moment in moments {
            let points: Vec<_> = replays.iter_mut().map(|one| one.advance(moment)).collect();
            let kinds: Vec<Vec<Cut>> = points.iter().map(|one| one.cuts(each, random)).collect();
            for nth in 0..each.min(kinds[0].len()) {
                let chosen = |kinds: &Vec<Cut>| kinds.get(nth).copied().unwrap_or(Cut::Torn);
                let cuts: Vec<Cut> = kinds.iter().map(chosen).collect();
                let left = points
                    .iter()
                    .zip(&cuts)
                    .map(|(one, &cut)| one.cut(cut, random));
                self.judge(
                    &left.collect::<Vec<_>>(),
                    moment,
                    Crash::PowerCut,
                    &format!("{cuts:?}"),
                    random,
                );
                self.count.cuts += 1;
            }
            if self.count.cuts.is_multiple_of(7) {
                let left = files.iter().map(|&file| {
                    let history = self.recording.history(file);
                    history.killed_at(moment, random)
                });
                let left: Vec<Contents> = left.collect();
                self.judge(&left, moment, Crash::Kill, "killed", random);
                self.count.kills += 1;
            }
        }
    }

    fn judge(
        &mut self,
        left: &[Contents],
        moment: Moment,
        crash: Crash,
        how: &str,
        random: &mut Random,
    ) {
        match self.verify(left, moment, crash, random) {
            Ok(sectors) => self.count.sectors += sectors,
            Err(what) => self.fail(left, moment, &format!("{crash:?}, {how}: {what}")),
        }
        let is_shown = self.qemu_every > 0 && self.count.cuts.is_multiple_of(self.qemu_every);
        if is_shown && let Err(what) = self.verify_by_qemu(&left[0], moment, crash) {
            self.fail(left, moment, &format!("QEMU, {crash:?}, {how}: {what}"));
        }
    }

    /// P2 and P3; gives how many sectors were seen.
    fn verify(
        &self,
        left: &[Contents],
        moment: Moment,
        crash: Crash,
        random: &mut Random,
    ) -> Result<u64, String> {
        let images = left
            .iter()
            .map(Plain::parse)
            .collect::<Result<Vec<_>, _>>()?;
        if let Some(harm) = images.iter().find_map(Plain::harm) {
            return Err(harm);
        }
        let files = left
            .iter()
            .map(|one| SimulatedFile::new(one.clone()) as Arc<dyn Storage>);
        let disk = Disk::open_chain(files.collect(), Access::Writable, ModifiedParent::Refuse);
        let disk = disk.map_err(|error| format!("the core refuses it: {error}"))?;
        let size = images[0].block_size;
        let disk_len = self.oracle.now().len() as u64;
        if images[0].disk_size < disk_len {
            return Err(format!("the disk has {} bytes", images[0].disk_size));
        }
        let mut seen = 0;
        for block in self.blocks(&images[0], random) {
            let (start, end) = (block * size, ((block + 1) * size).min(disk_len));
            if start >= end {
                continue;
            }
            let found = plain::read(&images, start, end - start)?;
            let wrong = self.oracle.judge(start / 512, &found, moment, crash, |_| 0);
            if let Some(wrong) = wrong {
                return Err(wrong);
            }
            let range = disk
                .capacity()
                .range(Sector(start / 512), (end - start) / 512);
            let mut by_core = vec![1; found.len()];
            let read = disk.read_at(range.unwrap(), &mut by_core);
            read.map_err(|error| format!("the core cannot read it: {error}"))?;
            if by_core != found {
                return Err(format!(
                    "the core and the other reader differ in block {block}"
                ));
            }
            seen += (end - start) / 512;
        }
        drop(images);
        if percent(random, 4) {
            live_on(&Arc::new(disk), random)?;
        }
        Ok(seen)
    }

    /// The blocks to look at: those that were ever written and some others.
    fn blocks(&self, image: &Plain<'_>, random: &mut Random) -> BTreeSet<u64> {
        let per_block = image.block_size / 512;
        let mut blocks: Vec<u64> = self
            .oracle
            .touched()
            .map(|sector| sector / per_block)
            .collect();
        blocks.dedup();
        let all = (self.oracle.now().len() as u64).div_ceil(image.block_size);
        let stored: Vec<u64> = image.stored().filter(|block| *block < all).collect();
        blocks.extend((0..6).map(|_| random.within(0..all)));
        if !stored.is_empty() {
            blocks.extend((0..12).map(|_| *random.pick(&stored)));
        }
        while blocks.len() > MOST_BLOCKS {
            let nth = random.within(0..blocks.len() as u64);
            blocks.swap_remove(usize::try_from(nth).unwrap());
        }
        blocks.into_iter().collect()
    }

    fn verify_by_qemu(
        &mut self,
        left: &Contents,
        moment: Moment,
        crash: Crash,
    ) -> Result<(), String> {
        let directory = tempfile::tempdir().unwrap();
        let (path, raw) = (
            directory.path().join("cut.vdi"),
            directory.path().join("cut.raw"),
        );
        left.save(&path).unwrap();
        // Its check calls a count that is too large corrupt, and repairs nothing; a crash may leave such a one.
        let check = qemu_img(words!["check", "-f", "vdi", "--output", "json", path]);
        let errors = check.json()["corruptions"].as_u64().unwrap_or(0);
        let leaked = Plain::parse(left).unwrap();
        let is_exact = leaked.stored().count() == leaked.blocks_allocated as usize;
        if errors > u64::from(!is_exact) {
            return Err(format!("{check:?}"));
        }
        let convert = qemu_img(words!["convert", "-f", "vdi", "-O", "raw", path, raw]);
        if convert.code != Some(0) {
            return Err(format!("{convert:?}"));
        }
        let found = fs::read(&raw).unwrap();
        self.count.by_qemu += 1;
        let seen = &found[..self.oracle.now().len()];
        if let Some(wrong) = self.oracle.judge(0, seen, moment, crash, |_| 0) {
            return Err(wrong);
        }
        let image = Plain::parse(left)?;
        let stored: BTreeSet<u64> = image.stored().collect();
        let free = (0..seen.len() as u64 / image.block_size).find(|nth| !stored.contains(nth));
        let Some(at) = free.map(|block| block * image.block_size) else {
            return Ok(());
        };
        // QEMU takes a new block, which must be nobody's.
        qemu_io(&path, &[format!("write -P 171 {at} 4096")]);
        qemu_img(words!["convert", "-f", "vdi", "-O", "raw", path, raw]).expect_code(0);
        let mut expected = found;
        let at = usize::try_from(at).unwrap();
        expected[at..at + 4096].fill(171);
        let is_harmless = fs::read(&raw).unwrap() == expected;
        is_harmless
            .then_some(())
            .ok_or_else(|| "a write by QEMU changed other blocks".into())
    }

    /// Keeps what was found, and ends the test.
    fn fail(&self, left: &[Contents], moment: Moment, what: &str) -> ! {
        fs::create_dir_all(&self.directory).unwrap();
        for (name, contents) in self.names.iter().zip(left) {
            contents.save(&self.directory.join(name)).unwrap();
            let file = self.recording.file(name, moment).unwrap();
            let text = self.recording.history(file).tell_until(moment);
            fs::write(self.directory.join(format!("{name}.history")), text).unwrap();
        }
        panic!(
            "{}: at {moment:?}: {what}; the images are in {}",
            self.scene,
            self.directory.display()
        );
    }

    /// Says how much was tried.
    pub(crate) fn report(&self, requests: u64) {
        let Count {
            cuts,
            kills,
            sectors,
            by_qemu,
        } = self.count;
        counts::tell(&format!(
            "power cuts: {}: {requests} requests, {cuts} cuts, {kills} kills, {sectors} sectors verified, {by_qemu} cuts by \
             QEMU too, 0 losses",
            self.scene
        ));
    }
}

/// Life goes on after a cut: new blocks harm no old ones.
fn live_on(disk: &Arc<Disk>, random: &mut Random) -> Result<(), String> {
    let whole = disk.capacity().whole();
    // Enough to meet old blocks.
    let sectors = whole.count().min(6 << 11);
    let range = |start, count| disk.capacity().range(Sector(start), count).unwrap();
    let look = || {
        let mut found = vec![1; usize::try_from(sectors * 512).unwrap()];
        let read = disk.read_at(range(0, sectors), &mut found);
        read.map(|()| found).map_err(|error| error.to_string())
    };
    let mut expected = look()?;
    for _ in 0..8 {
        let sector = random.within(0..sectors);
        let data = random.bytes(512);
        let done = disk.write_at(range(sector, 1), &data);
        done.map_err(|error| format!("it takes no writes: {error}"))?;
        let at = usize::try_from(sector * 512).unwrap();
        expected[at..at + 512].copy_from_slice(&data);
    }
    let found = look()?;
    if found != expected {
        return Err("writes after the cut changed other sectors".into());
    }
    disk.close()
        .map_err(|error| format!("it cannot be closed: {error}"))?;
    if look()? != expected {
        return Err("a close after the cut changed sectors".into());
    }
    Ok(())
}
