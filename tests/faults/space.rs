//! Real file systems that are full, and have space again.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use vdi_tests::driver::{Driver, Layout, Options, Request};
use vdi_tests::image::{MIB, are_zeros};
use vdi_tests::qemu;
use vdi_tests::server::{Launch, scratch};
use vdi_tests::tool::vdi;
use vdi_tests::words;

use crate::scene::{BLOCK, MODES, Mode, NAME, new_image};

/// What the file system holds.
const SPACE: u64 = 24 * MIB;
/// What is taken away from it at first.
const BALLAST: u64 = 8 * MIB;

/// A small file system, mounted until it is dropped.
struct Small {
    at: PathBuf,
    _directory: TempDir,
}

impl Small {
    /// One of a type; `None` where this process may not mount.
    fn mount(kind: &str) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("not run: mounting a {kind} file system needs root");
            return None;
        }
        let directory = scratch();
        let at = directory.path().join("mounted");
        std::fs::create_dir(&at).unwrap();
        let mut mount = Command::new("mount");
        if kind == "tmpfs" {
            let options = format!("size={SPACE}");
            mount.args(["-t", kind, "-o", &options, "none"]);
        } else {
            let disk = directory.path().join("disk");
            File::create(&disk).unwrap().set_len(SPACE).unwrap();
            run(Command::new("mkfs.ext4")
                .args(["-q", "-m", "0", "-O", "^has_journal"])
                .arg(&disk));
            mount.args(["-t", kind, "-o", "loop"]).arg(disk);
        }
        run(mount.arg(&at));
        Some(Self {
            at,
            _directory: directory,
        })
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _status = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}

fn write(driver: &mut Driver, block: u64, fill: u8) -> bool {
    let request = Request::write(block * BLOCK, vec![fill; 1 << 20]);
    driver.queue().run(&request, &Layout::framed()).status == 0
}

/// A whole block, if it holds one of these fills everywhere.
fn fill_of(driver: &mut Driver, block: u64) -> Option<u8> {
    let bytes = driver.read(block * BLOCK, 1 << 20);
    let is_uniform = bytes.chunks(4096).all(|part| part == &bytes[..4096]);
    is_uniform.then_some(bytes[0])
}

/// Fills it, makes space, goes on.
fn fill_and_free(mode: Mode, directory: &Path) {
    let path = directory.join(NAME);
    new_image().save(&path).unwrap();
    let ballast = directory.join("ballast");
    let len = usize::try_from(BALLAST).unwrap();
    std::fs::write(&ballast, vec![1; len]).unwrap();
    let server = Launch::image(&path).args(mode.arguments()).start();
    let mut driver = server.driver(&Options::new());
    let (kept, failed): (Vec<u64>, Vec<u64>) =
        (0..40).partition(|&block| write(&mut driver, block, 1));
    assert!((8..20).contains(&kept.len()), "{mode:?}: {kept:?}");
    for &block in &failed {
        assert!(
            are_zeros(&driver.read(block * BLOCK, 1 << 20)),
            "block {block}"
        );
    }
    assert!(
        write(&mut driver, kept[0], 2),
        "there is space for what has its block"
    );
    driver.flush();
    std::fs::remove_file(ballast).unwrap();
    let more: Vec<u64> = failed
        .iter()
        .copied()
        .take(5)
        .filter(|&block| write(&mut driver, block, 3))
        .collect();
    assert_eq!(more.len(), 5, "{mode:?}: {}", server.log());
    driver.flush();
    drop(driver);
    let exit = server.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert!(exit.log.contains("a request failed"), "{}", exit.log);
    assert!([0, 3].contains(&vdi(words!["check", path]).code.unwrap()));
    let server = Launch::image(&path).args(mode.arguments()).start();
    let mut driver = server.driver(&Options::new());
    assert_eq!(fill_of(&mut driver, kept[0]), Some(2));
    for (blocks, fill) in [(&kept[1..], 1), (&more[..], 3), (&failed[5..], 0)] {
        for &block in blocks {
            assert_eq!(fill_of(&mut driver, block), Some(fill), "block {block}");
        }
    }
    drop((driver, server));
    let elsewhere = tempfile::tempdir().unwrap();
    let copy = elsewhere.path().join(NAME);
    std::fs::copy(&path, &copy).unwrap();
    closes_exact(&copy);
}

#[test]
fn a_full_tmpfs_costs_the_writes_that_have_no_space_and_no_restart() {
    for mode in MODES {
        if let Some(small) = Small::mount("tmpfs") {
            fill_and_free(mode, &small.at);
        }
    }
}

#[test]
fn a_full_ext4_costs_the_writes_that_have_no_space_and_no_restart() {
    for mode in MODES {
        if let Some(small) = Small::mount("ext4") {
            fill_and_free(mode, &small.at);
        }
    }
}

/// Where the daemon closed without the space to fill the holes, another close with space does.
fn closes_exact(path: &Path) {
    let server = Launch::image(path).start();
    assert!(write(&mut server.driver(&Options::new()), 0, 9));
    assert_eq!(server.terminate().code, Some(0));
    vdi(words!["check", path]).expect_code(0);
    qemu::expect_clean(path);
}
