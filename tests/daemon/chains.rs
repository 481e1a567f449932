//! Differencing images: children over their parents, which are only read.

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vdi_core::{Access, CreateOptions, Disk, HostFile, Locking, NewKind};
use vdi_tests::driver::{Driver, Layout, Options, Queue, Request, Segment};
use vdi_tests::image::{MIB, are_zeros};
use vdi_tests::random::Random;
use vdi_tests::server::{Exit, Launch, scratch};
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

const DISK: u64 = 16 * MIB;
const LEN: usize = 16 << 20;

/// A parent of which every other block has data, and a child that is still empty.
struct Family {
    directory: TempDir,
    parent: PathBuf,
    child: PathBuf,
    disk: Vec<u8>,
}

fn create(path: &Path, block_size: u32, kind: NewKind) {
    let options = CreateOptions {
        capacity_bytes: DISK,
        block_size,
        kind,
        uuid: None,
    };
    vdi_core::create(path, &options).unwrap();
}

impl Family {
    /// With the parent in a directory of that name below the child's.
    fn new(parent_directory: &str, block_size: u32) -> Self {
        let directory = scratch();
        let beside = directory.path().join(parent_directory);
        std::fs::create_dir_all(&beside).unwrap();
        let (parent, child) = (
            beside.join("parent.vdi"),
            directory.path().join("child.vdi"),
        );
        create(&parent, 1 << 20, NewKind::Dynamic);
        let disk = fill(&parent);
        let link = {
            let file = HostFile::open(&parent, Access::ReadOnly, Locking::ForceShare).unwrap();
            let disk = Disk::open(std::sync::Arc::new(file), Access::ReadOnly).unwrap();
            disk.header().as_parent()
        };
        create(&child, block_size, NewKind::Differencing(link));
        Self {
            directory,
            parent,
            child,
            disk,
        }
    }

    fn refused(&self, arguments: &[&str]) -> Exit {
        let exit = Launch::image(&self.child).args(arguments).run();
        assert_eq!(exit.code, Some(1), "{}", exit.log);
        exit
    }
}

/// Writes every other MiB of a disk, through a daemon; gives what it holds then.
fn fill(image: &Path) -> Vec<u8> {
    let server = Launch::image(image).start();
    let mut driver = server.driver(&Options::new());
    let mut random = Random::seeded(5);
    let mut disk = vec![0; LEN];
    for block in (0..16).step_by(2) {
        let data = random.bytes(1 << 20);
        driver.write(block as u64 * 2048, &data);
        disk[block << 20..][..1 << 20].copy_from_slice(&data);
    }
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    disk
}

fn read_all(driver: &mut Driver) -> Vec<u8> {
    let parts = (0..4).map(|nth| driver.read(nth * 8192, 4 << 20));
    parts.collect::<Vec<_>>().concat()
}

#[test]
fn a_parent_is_found_beside_its_child_and_where_the_arguments_say() {
    let beside = Family::new(".", 1 << 20);
    let away = Family::new("away", 1 << 20);
    let directory = away.directory.path().join("away");
    let (file, directory) = (away.parent.to_str().unwrap(), directory.to_str().unwrap());
    for (family, arguments) in [
        (&beside, vec![]),
        (&away, vec!["--parent", file]),
        (&away, vec!["--image-dir", directory]),
    ] {
        let server = Launch::image(&family.child).args(&arguments).start();
        let found = read_all(&mut server.driver(&Options::new()));
        assert!(found == family.disk, "{arguments:?}");
    }
}

#[test]
fn a_child_without_its_parent_is_refused() {
    let family = Family::new("away", 1 << 20);
    let exit = family.refused(&[]);
    assert!(exit.log.contains("child.vdi"), "{}", exit.log);
    assert!(exit.log.contains("--parent"), "{}", exit.log);
}

#[test]
fn a_child_of_a_modified_parent_is_refused_unless_that_is_allowed() {
    let family = Family::new(".", 1 << 20);
    let server = Launch::image(&family.parent).start();
    server.driver(&Options::new()).write(2048, &[7; 512]);
    assert_eq!(server.terminate().code, Some(0));
    let exit = family.refused(&[]);
    assert!(exit.log.contains("--allow-modified-parent"), "{}", exit.log);
    let server = Launch::image(&family.child)
        .arg("--allow-modified-parent")
        .start();
    assert_eq!(server.driver(&Options::new()).read(2048, 512), [7; 512]);
}

/// Writes pieces of its own in every block, many at once; gives them.
fn write_pieces(queue: &mut Queue, queues: u64) -> Vec<(u64, Vec<u8>)> {
    let mut random = Random::seeded(queue.index() as u64 + 20);
    let pieces: Vec<(u64, Vec<u8>)> = (0..200)
        .map(|nth| {
            let piece = (nth * queues + queue.index() as u64) * 80;
            let bytes = usize::try_from(random.within(1..81)).unwrap() * 512;
            (piece, random.bytes(bytes))
        })
        .collect();
    for part in pieces.chunks(24) {
        let requests = part.iter();
        let requests: Vec<Request> = requests
            .map(|(sector, data)| Request::write(*sector, data.clone()))
            .collect();
        let layout = Layout::framed();
        let tokens = queue.submit_all(requests.iter().map(|request| (request, &layout)));
        for token in tokens {
            let _none = queue.wait(token).expect_ok();
        }
    }
    pieces
}

#[test]
fn writes_at_depth_copy_the_rest_of_each_block_and_leave_the_parent_alone() {
    for (mode, block_size) in [
        (["--cache", "writeback"], 1 << 20),
        (["--cache", "direct"], 2 << 20),
        (["--engine", "sync"], 128 << 10),
    ] {
        let family = Family::new(".", block_size);
        let parent = std::fs::read(&family.parent).unwrap();
        let mut expected = family.disk.clone();
        let launch = || Launch::image(&family.child).args(mode);
        let server = launch().args(["--num-queues", "2"]).start();
        let mut driver = server.driver(&Options::new().queues(2));
        let written: Vec<(u64, Vec<u8>)> = std::thread::scope(|scope| {
            let queues = driver.queues.iter_mut();
            let threads: Vec<_> = queues
                .map(|queue| scope.spawn(move || write_pieces(queue, 2)))
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        for (sector, data) in written {
            let at = usize::try_from(sector * 512).unwrap();
            expected[at..at + data.len()].copy_from_slice(&data);
        }
        assert!(read_all(&mut driver) == expected, "{mode:?}");
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
        let server = launch().arg("--read-only").start();
        let found = read_all(&mut server.driver(&Options::new()));
        assert!(found == expected, "{mode:?}, read again");
        let after = std::fs::read(&family.parent).unwrap();
        assert!(parent == after, "the parent was changed, {mode:?}");
    }
}

#[test]
fn zeros_hide_the_parent_and_a_discard_never_shows_old_data_of_the_child() {
    for mode in [
        ["--cache", "writeback"],
        ["--cache", "direct"],
        ["--engine", "sync"],
    ] {
        let family = Family::new(".", 1 << 20);
        let parent = std::fs::read(&family.parent).unwrap();
        let server = Launch::image(&family.child).args(mode).start();
        let mut driver = server.driver(&Options::new());
        let mut expected = family.disk.clone();
        let mut zero = |driver: &mut Driver, request: &Request, sector: usize, sectors: usize| {
            let answer = driver.queue().run(request, &Layout::framed());
            assert_eq!(u32::from(answer.status), VIRTIO_BLK_S_OK);
            expected[sector * 512..][..sectors * 512].fill(0);
        };
        // Whole blocks and parts of them, over the parent's data and over nothing.
        for (sector, sectors) in [(0, 2048), (4096 + 3, 50), (2048, 9), (8192 - 100, 200)] {
            let segment = Segment::new(sector, sectors);
            let segment = if sector % 2 == 0 {
                segment
            } else {
                segment.unmap()
            };
            let request = Request::write_zeroes(&[segment]);
            let at = usize::try_from(sector).unwrap();
            zero(&mut driver, &request, at, sectors as usize);
        }
        driver.write(12288 + 5, &[1; 4096]);
        let request = Request::discard(&[Segment::new(12288, 2048)]);
        zero(&mut driver, &request, 12288, 2048);
        assert!(are_zeros(&driver.read(12288, 1 << 20)));
        assert!(read_all(&mut driver) == expected, "{mode:?}");
        // Part of a block that only the parent has: old data or zeros.
        let request = Request::discard(&[Segment::new(16384, 8)]);
        let answer = driver.queue().run(&request, &Layout::framed());
        assert_eq!(u32::from(answer.status), VIRTIO_BLK_S_OK);
        let found = driver.read(16384, 4096);
        let old = &expected[16384 * 512..][..4096];
        assert!(found == old || are_zeros(&found));
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
        assert!(parent == std::fs::read(&family.parent).unwrap());
    }
}
