//! The power goes at any instant of a merge, a flatten or a rebase: the child reads as before, with
//! its parents and no allowance made for them, and the same again completes it.

use std::io;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use vdi_core::{
    Access, CreateOptions, Disk, FileOffset, ModifiedParent, NewKind, Sector, Storage, Zeroing,
    check, commit, rebase,
};
use vdi_tests::random::Random;
use vdi_tests::simulated::{
    Contents, Failure, Kind, Moment, SimulatedFile, for_each_seed, percent,
};

const BLOCK: u64 = 128 << 10;
/// Instants at which a run is cut, and how often at each.
const MOST_INSTANTS: usize = 40;
const CUTS: usize = 3;

/// Files that are used together, and the instants between any two operations.
#[derive(Debug)]
pub(crate) struct World {
    files: Vec<Arc<SimulatedFile>>,
    instants: Mutex<Vec<Vec<Moment>>>,
}

/// One of its files.
#[derive(Debug)]
struct Traced {
    world: Arc<World>,
    nth: usize,
}

impl World {
    pub(crate) fn new(contents: Vec<Contents>) -> Arc<Self> {
        Arc::new(Self {
            files: contents.into_iter().map(SimulatedFile::new).collect(),
            instants: Mutex::new(Vec::new()),
        })
    }

    pub(crate) fn storages(self: &Arc<Self>) -> Vec<Arc<dyn Storage>> {
        let traced = (0..self.files.len()).map(|nth| -> Arc<dyn Storage> {
            Arc::new(Traced {
                world: Arc::clone(self),
                nth,
            })
        });
        traced.collect()
    }

    fn contents(&self) -> Vec<Contents> {
        self.files.iter().map(|file| file.contents()).collect()
    }

    fn note(&self) {
        let now = self.files.iter().map(|file| file.now()).collect();
        self.instants.lock().unwrap().push(now);
    }

    /// What the files may be after a power cut at some of the instants.
    fn after_crashes(&self, random: &mut Random) -> Vec<Vec<Contents>> {
        let histories: Vec<_> = self.files.iter().map(|file| file.history()).collect();
        let mut instants = self.instants.lock().unwrap().clone();
        while instants.len() > MOST_INSTANTS {
            let nth = random.within(0..instants.len() as u64);
            instants.swap_remove(usize::try_from(nth).unwrap());
        }
        let mut worlds = Vec::new();
        for instant in instants {
            for _ in 0..CUTS {
                let files = histories.iter().zip(&instant).map(|(history, moment)| {
                    let point = history.at(*moment);
                    let cuts = point.cuts(6, random);
                    point.cut(*random.pick(&cuts), random)
                });
                worlds.push(files.collect());
            }
        }
        worlds
    }
}

impl Traced {
    fn file(&self) -> &SimulatedFile {
        &self.world.files[self.nth]
    }

    fn noted(&self, result: io::Result<()>) -> io::Result<()> {
        self.world.note();
        result
    }
}

impl Storage for Traced {
    fn read_exact_at(&self, buf: &mut [u8], at: FileOffset) -> io::Result<()> {
        self.file().read_exact_at(buf, at)
    }

    fn write_all_at(&self, buf: &[u8], at: FileOffset) -> io::Result<()> {
        self.noted(self.file().write_all_at(buf, at))
    }

    fn len_bytes(&self) -> io::Result<u64> {
        self.file().len_bytes()
    }

    fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        self.noted(self.file().set_len(len_bytes))
    }

    fn punch(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        self.noted(self.file().punch(at, len_bytes))
    }

    fn zero(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        self.noted(self.file().zero(at, len_bytes))
    }

    fn reserve(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
        self.noted(self.file().reserve(at, len_bytes))
    }

    fn sync(&self) -> io::Result<()> {
        self.noted(self.file().sync())
    }
}

pub(crate) fn open(storages: &[Arc<dyn Storage>], access: Access) -> Arc<Disk> {
    Arc::new(Disk::open_chain(storages.to_vec(), access, ModifiedParent::Refuse).unwrap())
}

pub(crate) fn read(storages: &[Arc<dyn Storage>]) -> Vec<u8> {
    let disk = open(storages, Access::ReadOnly);
    let mut found = vec![1; usize::try_from(disk.capacity().bytes()).unwrap()];
    disk.read_at(disk.capacity().whole(), &mut found).unwrap();
    found
}

/// Writes and zeroes here and there.
fn scribble(disk: &Arc<Disk>, random: &mut Random) {
    let size = u64::from(disk.header().block_size().bytes()) / 512;
    let sectors = disk.capacity().sectors();
    for _ in 0..random.within(2..9) {
        let (start, count) = if percent(random, 50) {
            let start = random.within(0..sectors) / size * size;
            (start, random.within(1..3) * size)
        } else {
            (random.within(0..sectors), random.within(1..size))
        };
        let count = count.min(sectors - start);
        let range = disk.capacity().range(Sector(start), count).unwrap();
        match random.within(0..5) {
            0 => disk.zero_at(range, Zeroing::Release).unwrap(),
            1 => disk
                .write_at(range, &vec![0; usize::try_from(count * 512).unwrap()])
                .unwrap(),
            _ => {
                let data = random.bytes(usize::try_from(count * 512).unwrap());
                disk.write_at(range, &data).unwrap();
            }
        }
    }
}

/// A new image of some size and block size, with something in it; `behind` are its parents.
fn image(behind: &[Contents], random: &mut Random) -> Contents {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("new.vdi");
    let kind = match World::new(behind.to_vec()).storages().as_slice() {
        [] if percent(random, 20) => NewKind::Fixed,
        [] => NewKind::Dynamic,
        parents => NewKind::Differencing(open(parents, Access::ReadOnly).header().as_parent()),
    };
    let options = CreateOptions {
        capacity_bytes: random.within(8..13) * BLOCK + random.within(0..4) * 512,
        block_size: *random.pick(&[128 << 10, 128 << 10, 256 << 10]),
        kind,
        uuid: None,
    };
    vdi_core::create(&path, &options).unwrap();
    let mut contents = Contents::default();
    contents.write(0, &std::fs::read(&path).unwrap());
    if options.kind != NewKind::Fixed && percent(random, 25) {
        contents = of_version_0(&contents);
    }
    let mut all = vec![contents];
    all.extend_from_slice(behind);
    let world = World::new(all);
    let disk = open(&world.storages(), Access::Writable);
    scribble(&disk, random);
    disk.close().unwrap();
    world.files[0].contents()
}

/// An empty image with the header of version 0, and entries enough for any child to be merged into it.
fn of_version_0(new: &Contents) -> Contents {
    const ENTRIES: u32 = 13;
    let mut old = Contents::default();
    old.write(0, &new.bytes(0..0x44));
    old.write(0x44, &2_u32.to_le_bytes());
    // Type, flags and comment; size and block size; image, modify and parent.
    for (to, from) in [
        (0x48, 0x4C..0x154),
        (0x160, 0x170..0x17C),
        (0x174, 0x188..0x1B8),
    ] {
        old.write(to, &new.bytes(from));
    }
    old.write(0x16C, &ENTRIES.to_le_bytes());
    old.write(0x1A4, &[0xFF; 4 * ENTRIES as usize]);
    old
}

/// A chain, the top image first.
pub(crate) fn chain(depth: u64, random: &mut Random) -> Vec<Contents> {
    let mut images = Vec::new();
    for _ in 0..depth {
        images.insert(0, image(&images, random));
    }
    images
}

/// Runs `verb`, cuts the power everywhere, and looks at all that may be left with `look`.
pub(crate) fn crash_everywhere(
    images: Vec<Contents>,
    random: &mut Random,
    verb: impl Fn(&[Arc<dyn Storage>]),
    look: impl Fn(&[Arc<dyn Storage>]),
    is_done: impl Fn(&[Arc<dyn Storage>]),
) {
    let world = World::new(images);
    verb(&world.storages());
    let end = World::new(world.contents());
    look(&end.storages());
    is_done(&end.storages());
    for left in world.after_crashes(random) {
        let left = World::new(left);
        look(&left.storages());
        verb(&left.storages());
        look(&left.storages());
        is_done(&left.storages());
    }
}

#[test]
fn a_merge_that_the_power_ends_harms_nothing_and_is_completed() {
    for_each_seed(12, |mut random| {
        let depth = random.within(2..4);
        let images = chain(depth, &mut random);
        let expected = read(&World::new(images.clone()).storages());
        let look = |storages: &[Arc<dyn Storage>]| {
            assert!(read(storages) == expected, "the child reads something else");
        };
        let verb = |storages: &[Arc<dyn Storage>]| {
            commit::commit(storages, ModifiedParent::Refuse, &mut |_, _| ()).unwrap();
        };
        let is_done = |storages: &[Arc<dyn Storage>]| {
            let child = open(storages, Access::ReadOnly);
            assert_eq!(child.header().blocks_allocated(), 0);
            let parent = read(&storages[1..]);
            assert!(
                parent[..expected.len()] == expected,
                "the parent lacks something"
            );
        };
        crash_everywhere(images, &mut random, verb, look, is_done);
    });
}

/// The child's chain, or the child alone if it has no parent any more.
fn of_child(storages: &[Arc<dyn Storage>]) -> &[Arc<dyn Storage>] {
    let alone = Disk::open(Arc::clone(&storages[0]), Access::ReadOnly).is_ok();
    if alone { &storages[..1] } else { storages }
}

#[test]
fn a_flatten_that_the_power_ends_harms_nothing_and_is_completed() {
    for_each_seed(12, |mut random| {
        let depth = random.within(2..4);
        let images = chain(depth, &mut random);
        let expected = read(&World::new(images.clone()).storages());
        let look = |storages: &[Arc<dyn Storage>]| {
            assert!(
                read(of_child(storages)) == expected,
                "the child reads something else"
            );
        };
        let verb = |storages: &[Arc<dyn Storage>]| match rebase::flatten(
            &open(of_child(storages), Access::Writable),
            &mut |_, _| (),
        ) {
            Ok(_) | Err(rebase::RebaseError::NoParent) => {}
            Err(error) => panic!("{error}"),
        };
        let is_done = |storages: &[Arc<dyn Storage>]| assert_eq!(of_child(storages).len(), 1);
        crash_everywhere(images, &mut random, verb, look, is_done);
    });
}

#[test]
fn a_rebase_that_the_power_ends_harms_nothing_and_is_completed() {
    for_each_seed(12, |mut random| {
        let depth = random.within(1..4);
        let mut images = chain(depth, &mut random);
        let old_len = images.len();
        let expected = read(&World::new(images.clone()).storages());
        // The new parent lies behind the old chain.
        images.push(image(&[], &mut random));
        // `open_chain` refuses a parent that is not the child's, so one of the two chains opens.
        let of_child = |storages: &[Arc<dyn Storage>]| {
            let new = vec![Arc::clone(&storages[0]), Arc::clone(&storages[old_len])];
            let opened = Disk::open_chain(new.clone(), Access::ReadOnly, ModifiedParent::Refuse);
            match opened {
                Ok(_) => new,
                Err(_) => storages[..old_len].to_vec(),
            }
        };
        let look = |storages: &[Arc<dyn Storage>]| {
            assert!(
                read(&of_child(storages)) == expected,
                "the child reads something else"
            );
        };
        let verb = |storages: &[Arc<dyn Storage>]| {
            let child = open(&of_child(storages), Access::Writable);
            if child.header().kind() == vdi_core::ImageKind::Fixed {
                return;
            }
            let parent = open(&storages[old_len..], Access::ReadOnly);
            rebase::rebase(&child, &parent, &mut |_, _| ()).unwrap();
        };
        let is_done = |storages: &[Arc<dyn Storage>]| {
            let is_fixed = open(&of_child(storages), Access::ReadOnly).header().kind()
                == vdi_core::ImageKind::Fixed;
            let new = Arc::ptr_eq(
                &of_child(storages)[of_child(storages).len() - 1],
                &storages[old_len],
            );
            assert!(new || is_fixed);
        };
        crash_everywhere(images, &mut random, verb, look, is_done);
    });
}

#[test]
fn a_merge_or_a_flatten_that_finds_the_host_full_leaves_no_room_behind() {
    let mut failed = 0;
    for_each_seed(24, |mut random| {
        let world = World::new(chain(2, &mut random));
        let storages = world.storages();
        let expected = read(&storages);
        let is_merge = percent(&mut random, 50);
        let written = usize::from(is_merge);
        let disk = open(&storages[written..], Access::ReadOnly);
        let data = disk.header().data_area().start().0..u64::MAX;
        let after = usize::try_from(random.within(0..3)).unwrap();
        world.files[written].fail(Kind::Write, data, after, Failure::Clean(Errno::ENOSPC));
        let is_done = if is_merge {
            commit::commit(&storages, ModifiedParent::Refuse, &mut |_, _| ()).is_ok()
        } else {
            rebase::flatten(&open(&storages, Access::Writable), &mut |_, _| ()).is_ok()
        };
        if is_done {
            return;
        }
        failed += 1;
        assert!(
            read(&storages) == expected,
            "the child reads something else"
        );
        let report = check::check(&*storages[written]).unwrap();
        let left: Vec<_> = report.counts().collect();
        assert_eq!(left, []);
    });
    assert!(failed > 4, "{failed}");
}
