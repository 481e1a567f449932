//! The power is cut while the tool changes images: what the disk reads as stays the same throughout.

use std::ffi::OsStr;

use vdi_tests::image::MIB;
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::recorded::{Recorded, Recording};
use vdi_tests::simulated::{Contents, Moment, Oracle, for_each_seed};
use vdi_tests::tool::vdi;
use vdi_tests::words;

use crate::judge::Judge;
use crate::scenes::{BASE, PLAIN, Scene, TOP, fill, make, make_child};

/// Enough that all instants of a run are among them.
const INSTANTS: usize = 150;

/// Runs the tool, and gives what it did to the files.
fn recorded(files: &Recorded, words: &[&OsStr]) -> Recording {
    files.forget_the_past();
    vdi(words).expect_code(0);
    files.recording()
}

/// Cuts the power at any instant of a run after which a disk reads as it did before.
fn judge(
    scene: &str,
    recording: &Recording,
    from: Moment,
    names: &[&str],
    disk: Vec<u8>,
    random: &mut Random,
) {
    let oracle = Oracle::new(disk);
    let mut judge = Judge::new(scene, recording, names, &oracle);
    judge.cut((from, recording.end), INSTANTS, 5, random);
    judge.report(0);
}

/// A base that was written; gives what it reads as.
fn base(files: &Recorded, random: &mut Random) -> Vec<u8> {
    make(files, BASE, PLAIN.block, PLAIN.disk);
    let empty = vec![0; PLAIN.disk_len()];
    let (server, disk) = fill(files, &PLAIN, BASE, empty, 60, random);
    assert_eq!(server.terminate().code, Some(0));
    disk
}

/// A base that was written, and a child of it that a killed daemon wrote; gives what the child reads as.
fn family(files: &Recorded, random: &mut Random) -> Vec<u8> {
    let base = base(files, random);
    make_child(files, PLAIN.block);
    let (server, disk) = fill(files, &PLAIN, TOP, base, 60, random);
    let _exit = server.kill();
    disk
}

#[test]
fn a_cut_during_a_commit_leaves_the_child_as_it_reads() {
    for_each_seed(2, |mut random| {
        let files = Recorded::mount();
        let disk = family(&files, &mut random);
        let run = recorded(&files, &words!["commit", "-q", files.path(TOP)]);
        judge(
            "commit",
            &run,
            Moment::START,
            &[TOP, BASE],
            disk,
            &mut random,
        );
    });
}

#[test]
fn a_cut_during_a_snapshot_leaves_the_parent_and_a_child_or_none() {
    for_each_seed(2, |mut random| {
        let files = Recorded::mount();
        let disk = base(&files, &mut random);
        let (parent, child) = (files.path(BASE), files.path(TOP));
        let run = recorded(&files, &words!["snapshot", parent, child]);
        judge(
            "snapshot-parent",
            &run,
            Moment::START,
            &[BASE],
            disk.clone(),
            &mut random,
        );
        let mut named = Moment::START;
        while run.file(TOP, named).is_none() {
            named = named.next();
        }
        judge(
            "snapshot-child",
            &run,
            named,
            &[TOP, BASE],
            disk,
            &mut random,
        );
    });
}

#[test]
fn a_cut_during_a_resize_leaves_the_disk_with_one_of_both_sizes() {
    let scene = Scene {
        block: MIB,
        disk: 48 * MIB,
        ..PLAIN
    };
    for_each_seed(2, |mut random| {
        let files = Recorded::mount();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(TOP);
        qemu::create(&path, &scene.disk.to_string());
        files.put(TOP, Contents::load(&path).unwrap());
        let empty = vec![0; scene.disk_len()];
        let (server, mut disk) = fill(&files, &scene, TOP, empty, 30, &mut random);
        assert_eq!(server.terminate().code, Some(0));
        // The map has no room for so many entries: blocks make way.
        let run = recorded(&files, &words!["resize", files.path(TOP), "300M"]);
        judge(
            "grow",
            &run,
            Moment::START,
            &[TOP],
            disk.clone(),
            &mut random,
        );
        let top = files.path(TOP);
        let run = recorded(&files, &words!["resize", "--shrink", "--force", top, "7M"]);
        disk.truncate(7 << 20);
        judge("shrink", &run, Moment::START, &[TOP], disk, &mut random);
    });
}

#[test]
fn a_cut_during_a_compaction_leaves_the_disk_as_it_reads() {
    for_each_seed(2, |mut random| {
        let files = Recorded::mount();
        let disk = family(&files, &mut random);
        let run = recorded(&files, &words!["compact", files.path(TOP)]);
        judge(
            "compact",
            &run,
            Moment::START,
            &[TOP, BASE],
            disk,
            &mut random,
        );
    });
}
