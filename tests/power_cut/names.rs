//! The power is cut, or the daemon killed, while an operator has images change their names: the disk is always there under its
//! name, with all that it may hold, and the command can be given again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use tempfile::TempDir;
use vdi_core::chain::{ChainOptions, SeenImages, find_chain};
use vdi_core::{Access, Disk, HostFile, Locking, ModifiedParent, Storage};
use vdi_tests::operator::Desk;
use vdi_tests::random::Random;
use vdi_tests::recorded::{Recorded, Recording};
use vdi_tests::simulated::{Contents, Crash, Moment, Oracle, Replay, for_each_seed};

use crate::load::{Habits, Load};
use crate::scenes::{BASE, PLAIN, TOP, fill, make, make_child};

/// Moments that are looked at besides those of the commands.
const OTHERS: usize = 20;

/// Moments of commands that are looked at.
const MOST: usize = 100;

/// What is merged and kept.
const KEPT: &str = "top.vdi.merged";

/// What the disk must read as, and what else must be there.
struct Told<'o> {
    oracle: &'o Oracle,
    /// Images that were frozen, to be kept or to be merged: their names, when that was asked and done, and what they hold.
    frozen: Vec<Frozen>,
}

/// What was asked of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Snapshot,
    Commit,
    CommitAndKeep,
}

struct Frozen {
    what: Asked,
    name: String,
    asked: Moment,
    answered: Moment,
    holds: Vec<u8>,
}

/// A directory as a crash leaves it, by moments that go forward.
struct Wreck<'r> {
    recording: &'r Recording,
    replays: BTreeMap<u64, Replay<'r>>,
}

impl<'r> Wreck<'r> {
    const fn new(recording: &'r Recording) -> Self {
        Self {
            recording,
            replays: BTreeMap::new(),
        }
    }

    fn left(&mut self, moment: Moment, crash: Crash, random: &mut Random) -> TempDir {
        let names = match crash {
            Crash::Kill => self.recording.names(moment),
            Crash::PowerCut => self.recording.names_after_cut(moment, random),
        };
        let directory = tempfile::tempdir().unwrap();
        let mut saved = BTreeMap::new();
        for (name, file) in names {
            let path = directory.path().join(name);
            match saved.get(&file) {
                Some(first) => fs::hard_link(first, &path).unwrap(),
                None => self
                    .contents(file, moment, crash, random)
                    .save(&path)
                    .unwrap(),
            }
            saved.insert(file, path);
        }
        directory
    }

    fn contents(
        &mut self,
        file: u64,
        moment: Moment,
        crash: Crash,
        random: &mut Random,
    ) -> Contents {
        let history = self.recording.history(file);
        if crash == Crash::Kill {
            return history.killed_at(moment, random);
        }
        let replay = self.replays.entry(file);
        let point = replay
            .or_insert_with(|| Replay::new(history))
            .advance(moment);
        let cuts = point.cuts(4, random);
        point.cut(*random.pick(&cuts), random)
    }
}

/// The files of an image and its parents, locked.
fn chain_of(image: &Path) -> Result<Vec<HostFile>, String> {
    let options = ChainOptions {
        parents: Vec::new(),
        image_dirs: Vec::new(),
        locking: Locking::Locked,
        seen: Arc::<SeenImages>::default(),
    };
    let found = find_chain(image, Access::Writable, &options);
    found.map_err(|error| format!("{}: {error}", image.display()))
}

/// What the disk reads as whose top image this is.
fn read(image: &Path) -> Result<Vec<u8>, String> {
    let told = |error: &dyn std::error::Error| format!("{}: {error}", image.display());
    let files = chain_of(image)?;
    let storages = files
        .into_iter()
        .map(|file| Arc::new(file) as Arc<dyn Storage>);
    let disk = Disk::open_chain(storages.collect(), Access::Writable, ModifiedParent::Refuse);
    let disk = disk.map_err(|error| told(&error))?;
    let mut found = vec![1; usize::try_from(disk.capacity().bytes()).unwrap()];
    let all = disk.read_at(disk.capacity().whole(), &mut found);
    all.map_err(|error| told(&error))?;
    Ok(found)
}

impl Told<'_> {
    fn verify(&self, left: &Path, moment: Moment, crash: Crash) -> Result<(), String> {
        let found = read(&left.join(TOP))?;
        if let Some(wrong) = self.oracle.judge(0, &found, moment, crash, |_| 0) {
            return Err(wrong);
        }
        for frozen in self.frozen.iter().filter(|one| one.answered < moment) {
            let (kept, frozen) = (frozen.kept(), &frozen.holds);
            if let Some(kept) = kept
                && read(&left.join(kept))? != *frozen
            {
                return Err(format!("{kept} does not hold what was frozen"));
            }
        }
        let mut kept = self.frozen.iter();
        if kept.any(|one| one.what == Asked::CommitAndKeep) {
            has_a_name(left)?;
        }
        let known: BTreeSet<String> = [TOP, BASE, "top.vdi.new-child", KEPT]
            .into_iter()
            .map(str::to_owned)
            .chain(self.frozen.iter().map(|one| one.name.clone()))
            .collect();
        for entry in fs::read_dir(left).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if !known.contains(&name) {
                return Err(format!("nobody knows what {name} is"));
            }
        }
        Ok(())
    }

    /// The command that was under way is given again to a daemon that finds what was left.
    fn again(&self, left: &Path, frozen: &Frozen, moment: Moment) -> Result<(), String> {
        let to = left.join(&frozen.name);
        // Done, if it is a file of its own.
        let was_done = to.exists() && !is_one_file(&to, &left.join(TOP));
        let desk = Desk::open(left, &["top"]);
        let mut driver = desk.driver("top");
        let read = |driver: &mut vdi_tests::driver::Driver| {
            let bytes = u32::try_from(self.oracle.now().len()).unwrap();
            driver.read(0, bytes)
        };
        let found = read(&mut driver);
        if let Some(wrong) = self.oracle.judge(0, &found, moment, Crash::Kill, |_| 0) {
            return Err(wrong);
        }
        let answer = match frozen.what {
            Asked::Snapshot => desk.ask("snapshot", &json!({"disk": "top", "to": to})),
            Asked::Commit => desk.ask("commit", &json!({"disk": "top"})),
            Asked::CommitAndKeep => desk.ask("commit", &json!({"disk": "top", "keep": true})),
        };
        match (&answer, was_done && frozen.what == Asked::Snapshot) {
            (Ok(_), false) => {}
            (Err(class), true) if class == "not-possible" => {}
            _ => return Err(format!("again: {answer:?}, and it was done: {was_done}")),
        }
        if frozen.what != Asked::Snapshot {
            let kept = desk.wait_for_job("top", "done")["kept"].clone();
            if to.exists() {
                return Err("what was merged is left".to_owned());
            }
            if frozen.what == Asked::CommitAndKeep {
                let kept = Path::new(kept.as_str().unwrap());
                // What was frozen at first, if that was not merged to its end.
                let holds = self::read(kept)?;
                if holds != found && holds != frozen.holds {
                    return Err("what was kept does not hold what was frozen".to_owned());
                }
                // The last one, or another if that had all but lost its first name.
                let first = left.join(KEPT);
                if kept != first && !first.exists() {
                    return Err(format!("{} has a number", kept.display()));
                }
            }
        }
        if read(&mut driver) != found {
            return Err("the guest sees something else after it".to_owned());
        }
        driver.write(0, &[7; 512]);
        let leftover = left.join("top.vdi.new-child");
        if answer.is_ok() && leftover.exists() {
            return Err("a half of a snapshot is left".to_owned());
        }
        drop(driver);
        let exit = desk.server.terminate();
        (exit.code == Some(0)).then_some(()).ok_or(exit.log)
    }

    fn moments(&self, end: Moment, random: &mut Random) -> Vec<Moment> {
        let all = std::iter::successors(Some(Moment::START.next()), |one| Some(one.next()))
            .take_while(|one| *one <= end);
        let of_commands = |moment: &Moment| {
            let during = |one: &Frozen| one.asked <= *moment && *moment <= one.answered.next();
            self.frozen.iter().any(during)
        };
        let (mut chosen, others): (Vec<_>, Vec<_>) = all.partition(of_commands);
        while chosen.len() > MOST {
            let nth = random.within(0..chosen.len() as u64);
            chosen.swap_remove(usize::try_from(nth).unwrap());
        }
        chosen.extend((0..OTHERS).map(|_| *random.pick(&others)));
        chosen.sort_unstable();
        chosen
    }
}

/// What the disk does without, and has its first name still, must have the one that it keeps.
fn has_a_name(left: &Path) -> Result<(), String> {
    let (merging, top) = (left.join("top.vdi.merging"), left.join(TOP));
    if !merging.exists() || is_one_file(&merging, &top) {
        return Ok(());
    }
    let is_used = chain_of(&top)?.len() > 2;
    let kept = left.join(KEPT);
    match is_used || kept.exists() && is_one_file(&merging, &kept) {
        true => Ok(()),
        false => Err("what is to be kept would be removed".to_owned()),
    }
}

impl Frozen {
    /// Where it is in the end, if anywhere.
    fn kept(&self) -> Option<&str> {
        match self.what {
            Asked::Snapshot => Some(&self.name),
            Asked::Commit => None,
            Asked::CommitAndKeep => Some(KEPT),
        }
    }
}

fn is_one_file(one: &Path, other: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(one).unwrap().ino() == fs::metadata(other).unwrap().ino()
}

/// Freezes a disk twice while it is used, and looks at what crashes leave.
fn play(over_a_parent: bool, random: &mut Random) {
    let files = Recorded::mount();
    let mut disk = vec![0; PLAIN.disk_len()];
    if over_a_parent {
        make(&files, BASE, PLAIN.block, PLAIN.disk);
        let (server, filled) = fill(&files, &PLAIN, BASE, disk, 60, random);
        assert_eq!(server.terminate().code, Some(0));
        disk = filled;
        make_child(&files, PLAIN.block);
    } else {
        make(&files, TOP, PLAIN.block, PLAIN.disk);
    }
    files.forget_the_past();
    let desk = Desk::open(files.directory(), &["top"]);
    let (oracle, fork) = (Oracle::new(disk), random.fork());
    let driver = desk.driver("top");
    let mut load = Load::new(&files, driver, oracle, Habits::ALL, PLAIN.block, fork);
    let mut frozen = Vec::new();
    for nth in 0..2 {
        load.run(60);
        let name = format!("top-{nth}.vdi");
        let asked = files.note();
        let to = files.path(&name);
        desk.ask("snapshot", &json!({"disk": "top", "to": to}))
            .unwrap();
        let answered = files.note();
        // All that was answered before is durable in the image that is frozen.
        load.oracle.flush(asked, answered);
        let holds = load.oracle.now().to_vec();
        frozen.push(Frozen {
            what: Asked::Snapshot,
            name,
            asked,
            answered,
            holds,
        });
    }
    load.run(60);
    let (driver, oracle) = load.end();
    let _exit = desk.server.kill();
    drop(driver);
    let oracle = &oracle;
    judge(&files.recording(), &Told { oracle, frozen }, random);
}

/// Merges a disk into its parent while it is used, and looks at what crashes leave.
fn play_merge(what: Asked, random: &mut Random) {
    let files = Recorded::mount();
    make(&files, BASE, PLAIN.block, PLAIN.disk);
    let disk = vec![0; PLAIN.disk_len()];
    let (server, disk) = fill(&files, &PLAIN, BASE, disk, 60, random);
    assert_eq!(server.terminate().code, Some(0));
    make_child(&files, PLAIN.block);
    let (server, disk) = fill(&files, &PLAIN, TOP, disk, 60, random);
    assert_eq!(server.terminate().code, Some(0));
    files.forget_the_past();
    let desk = Desk::open(files.directory(), &["top"]);
    let (oracle, fork) = (Oracle::new(disk), random.fork());
    let driver = desk.driver("top");
    let mut load = Load::new(&files, driver, oracle, Habits::ALL, PLAIN.block, fork);
    load.run(40);
    let asked = files.note();
    let keep = what == Asked::CommitAndKeep;
    desk.ask("commit", &json!({"disk": "top", "keep": keep}))
        .unwrap();
    // All that was answered before is durable in what is frozen.
    load.oracle.flush(asked, files.note());
    let holds = load.oracle.now().to_vec();
    load.run(80);
    desk.wait_for_job("top", "done");
    let answered = files.note();
    load.run(40);
    let (driver, oracle) = load.end();
    let _exit = desk.server.kill();
    drop(driver);
    let frozen = vec![Frozen {
        what,
        name: "top.vdi.merging".to_owned(),
        asked,
        answered,
        holds,
    }];
    let oracle = &oracle;
    judge(&files.recording(), &Told { oracle, frozen }, random);
}

/// Makes clones, and looks at what crashes leave: nothing of that name, or a child that reads as its parent.
fn play_clones(random: &mut Random) {
    let files = Recorded::mount();
    make(&files, BASE, PLAIN.block, PLAIN.disk);
    let disk = vec![0; PLAIN.disk_len()];
    let (server, disk) = fill(&files, &PLAIN, BASE, disk, 60, random);
    assert_eq!(server.terminate().code, Some(0));
    files.forget_the_past();
    let desk = Desk::open(files.directory(), &[]);
    let mut clones = Vec::new();
    for nth in 0..3 {
        let name = format!("clone-{nth}.vdi");
        let add = json!({"name": format!("d{nth}"), "image": files.path(&name)});
        let asked = files.note();
        let of = files.path(BASE);
        desk.ask("clone", &json!({"of": of, "add": add})).unwrap();
        clones.push((name, asked, files.note()));
    }
    let _exit = desk.server.kill();
    let recording = files.recording();
    let mut wreck = Wreck::new(&recording);
    let (mut absent, mut early) = (0, 0);
    let all = std::iter::successors(Some(Moment::START.next()), |one| Some(one.next()));
    for moment in all.take_while(|one| *one <= recording.end) {
        for crash in [Crash::PowerCut, Crash::PowerCut, Crash::Kill] {
            let left = wreck.left(moment, crash, random);
            for (name, asked, answered) in &clones {
                let image = left.path().join(name);
                if !image.exists() {
                    assert!(
                        moment <= *answered,
                        "{crash:?} at {moment:?}: {name} is lost"
                    );
                    absent += 1;
                    continue;
                }
                assert!(moment >= *asked);
                early += u32::from(moment < *answered);
                let found = read(&image);
                let found = found.unwrap_or_else(|what| panic!("{crash:?} at {moment:?}: {what}"));
                assert!(
                    found == disk,
                    "{crash:?} at {moment:?}: {name} reads otherwise"
                );
            }
        }
    }
    assert!(absent > 0 && early > 0, "{absent} {early}");
}

fn judge(recording: &Recording, told: &Told<'_>, random: &mut Random) {
    let mut wreck = Wreck::new(recording);
    let mut last = (BTreeMap::new(), 0);
    for moment in told.moments(recording.end, random) {
        for crash in [
            Crash::PowerCut,
            Crash::PowerCut,
            Crash::PowerCut,
            Crash::Kill,
        ] {
            let left = wreck.left(moment, crash, random);
            let verified = told.verify(left.path(), moment, crash);
            verified.unwrap_or_else(|what| panic!("{crash:?} at {moment:?}: {what}"));
        }
        let during = |one: &&Frozen| one.asked <= moment && moment <= one.answered.next();
        let Some(frozen) = told.frozen.iter().find(during) else {
            continue;
        };
        // Once for each step that names take, and now and then.
        let names = recording.names(moment);
        last.1 += 1;
        if names != last.0 || last.1 > 20 {
            last = (names, 0);
            let left = wreck.left(moment, Crash::Kill, random);
            let done = told.again(left.path(), frozen, moment);
            done.unwrap_or_else(|what| panic!("killed at {moment:?}: {what}"));
        }
    }
}

#[test]
fn a_crash_during_a_live_snapshot_leaves_the_disk_under_its_name_and_the_command_can_be_given_again()
 {
    for_each_seed(1, |mut random| {
        play(false, &mut random);
        play(true, &mut random);
    });
}

#[test]
fn a_crash_during_a_live_commit_leaves_the_disk_as_it_reads_and_the_command_can_be_given_again() {
    for_each_seed(1, |mut random| play_merge(Asked::Commit, &mut random));
}

#[test]
fn a_crash_during_a_live_commit_that_keeps_what_is_merged_leaves_one_name_of_it_or_both() {
    for_each_seed(1, |mut random| {
        play_merge(Asked::CommitAndKeep, &mut random);
    });
}

#[test]
fn a_crash_while_a_clone_is_made_leaves_nothing_of_its_name_or_all_of_it() {
    for_each_seed(1, |mut random| play_clones(&mut random));
}
