//! `commit` by the control socket: an image is merged into its parent while its guest goes on.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;
use vdi_core::commit::live;
use vdi_core::{Access, HostFile, Locking};
use vdi_tests::driver::{Driver, Layout, Request};
use vdi_tests::load::{DISK_SECTORS, Load, Mix, disk_after};
use vdi_tests::operator::Desk;
use vdi_tests::random::Random;
use vdi_tests::server::scratch;
use vdi_tests::stop::StopOnDrop;
use vdi_tests::{tool, words};

/// Two images without anything in them, one the child of the other.
fn family() -> TempDir {
    let place = scratch();
    let (base, child) = (place.path().join("base.vdi"), place.path().join("d.vdi"));
    tool::vdi(words!["create", base, (DISK_SECTORS * 512).to_string()]).expect_code(0);
    tool::vdi(words!["snapshot", base, child]).expect_code(0);
    place
}

fn merging(place: &Path) -> PathBuf {
    place.join("d.vdi.merging")
}

/// What an image reads as by the tool, which leaves it alone.
fn contents(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("raw");
    tool::vdi(words!["convert", "--force", "-O", "raw", image, raw]).expect_code(0);
    fs::read(raw).unwrap()
}

/// How many requests so far, one at a time, and how long the slowest took.
fn read_on(driver: &mut Driver, stop: &AtomicBool) -> (u64, Duration) {
    let (mut count, mut slowest) = (0, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let token = driver
            .queue()
            .submit(&Request::read(count % 4096, 512), &Layout::framed());
        let _sector = driver.queue().wait(token).expect_ok();
        slowest = slowest.max(begun.elapsed());
        count += 1;
    }
    (count, slowest)
}

#[test]
fn a_disk_is_merged_into_its_parent_while_its_guest_writes() {
    let mut random = Random::printed();
    let place = family();
    let desk = Desk::open(place.path(), &["d"]);
    let mut driver = desk.driver("d");
    let mut loads: Vec<_> = (0..2)
        .map(|_| Load::new(random.fork(), 2, Mix::Everything))
        .collect();
    for _ in 0..3 {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let stop = &stop;
            let _stop = StopOnDrop::new(stop);
            for (queue, load) in driver.queues.iter_mut().zip(&mut loads) {
                scope.spawn(move || load.run_until(queue, stop));
            }
            std::thread::sleep(Duration::from_millis(100));
            let command = json!({"disk": "d"});
            let job = desk.ask("commit", &command).unwrap();
            assert!(job["state"] == "running" || job["state"] == "done", "{job}");
            // One at a time; and what is being merged is not frozen again.
            let busy = desk.ask("commit", &command);
            let to = json!({"disk": "d", "to": place.path().join("other.vdi")});
            let frozen = desk.ask("snapshot", &to);
            let job = desk.wait_for_job("d", "done");
            assert_eq!(job["done_bytes"], job["total_bytes"]);
            if busy.is_ok() || frozen.is_ok() {
                // It was over before.
                desk.wait_for_job("d", "done");
            }
        });
    }
    drop(driver);
    let exit = desk.server.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert!(!merging(place.path()).exists());
    let image = place.path().join("d.vdi");
    assert!(contents(&image) == disk_after(&loads));
    tool::vdi(words!["check", image]).expect_code(0);
}

#[test]
fn what_is_merged_is_in_the_parent_and_the_guest_hardly_waits() {
    let place = family();
    let desk = Desk::open(place.path(), &["d"]);
    let mut driver = desk.driver("d");
    for block in 0..24 {
        driver.write(block * 2048, &[7; 1 << 20]);
    }
    let stop = AtomicBool::new(false);
    let (count, slowest) = std::thread::scope(|scope| {
        let (stop, driver) = (&stop, &mut driver);
        let reads = scope.spawn(move || read_on(driver, stop));
        let stopping = StopOnDrop::new(stop);
        desk.ask("commit", &json!({"disk": "d"})).unwrap();
        desk.wait_for_job("d", "done");
        drop(stopping);
        reads.join().unwrap()
    });
    println!("{count} reads while 24 MiB were merged, the slowest took {slowest:?}");
    driver.write(3, &[9; 512]);
    drop(driver);
    assert_eq!(desk.server.terminate().code, Some(0));
    let base = place.path().join("base.vdi");
    assert!(contents(&base).iter().all(|byte| *byte == 7));
    tool::vdi(words!["check", base]).expect_code(0);
    let mut expected = vec![7; 24 << 20];
    expected[3 * 512..4 * 512].fill(9);
    assert!(contents(&place.path().join("d.vdi")) == expected);
}

#[test]
fn a_merge_that_is_cancelled_or_killed_leaves_all_there_and_is_taken_up_again() {
    let mut random = Random::printed();
    let place = family();
    let mut desk = Desk::open(place.path(), &["d"]);
    let mut load = [Load::new(random.fork(), 1, Mix::Everything)];
    for round in 0..6 {
        let mut driver = desk.driver("d");
        let mut left = 300;
        load[0].run(driver.queue(), || {
            left -= 1;
            left > 0
        });
        desk.ask("commit", &json!({"disk": "d"})).unwrap();
        std::thread::sleep(Duration::from_millis(random.within(0..40)));
        if round % 2 == 0 {
            let job = desk.ask("cancel", &json!({"disk": "d"})).unwrap();
            assert!(
                job["state"] == "cancelled" || job["state"] == "done",
                "{job}"
            );
            let mut left = 100;
            load[0].run(driver.queue(), || {
                left -= 1;
                left > 0
            });
        }
        let _exit = desk.server.kill();
        drop(driver);
        assert!(contents(&place.path().join("d.vdi")) == disk_after(&load));
        desk = Desk::open(place.path(), &["d"]);
    }
    desk.ask("commit", &json!({"disk": "d"})).unwrap();
    desk.wait_for_job("d", "done");
    assert!(!merging(place.path()).exists());
    assert_eq!(desk.server.terminate().code, Some(0));
    assert!(contents(&place.path().join("d.vdi")) == disk_after(&load));
}

#[test]
fn a_parent_that_others_use_is_not_changed() {
    let place = family();
    let path = |name: &str| place.path().join(name);
    tool::vdi(words!["snapshot", path("base.vdi"), path("e.vdi")]).expect_code(0);
    let desk = Desk::open(place.path(), &["d", "e"]);
    let (mut d, mut e) = (desk.driver("d"), desk.driver("e"));
    d.write(0, &[1; 512]);
    let commit = || desk.ask("commit", &json!({"disk": "d"}));
    let before = fs::read(path("base.vdi")).unwrap();
    assert_eq!(commit(), Err("not-possible".to_owned()));
    // Nor when the other's guest is away and its image let go of.
    let _base = e.control.stop(0).unwrap();
    let _base = e.control.stop(1).unwrap();
    assert_eq!(commit(), Err("not-possible".to_owned()));
    assert!(fs::read(path("base.vdi")).unwrap() == before);
    assert!(!merging(place.path()).exists());
    d.write(1, &[2; 512]);
    drop(e);
    desk.ask("remove", &json!({"disk": "e"})).unwrap();
    commit().unwrap();
    desk.wait_for_job("d", "done");
    assert_eq!(d.read(0, 1536), [[1; 512], [2; 512], [0; 512]].concat());
    // Whoever was made of the parent before is told.
    let e = json!({"name": "e", "image": path("e.vdi")});
    assert_eq!(desk.ask("add", &e), Err("not-open".to_owned()));
    assert_eq!(
        desk.ask("cancel", &json!({"disk": "d"})).unwrap()["state"],
        "done"
    );
}

#[test]
fn a_disk_that_is_frozen_after_a_merge_was_cancelled_can_be_merged_again() {
    let mut random = Random::printed();
    let place = family();
    let path = |name: &str| place.path().join(name);
    let desk = Desk::open(place.path(), &["d"]);
    let mut driver = desk.driver("d");
    let mut load = [Load::new(random.fork(), 1, Mix::Everything)];
    let mut some = |driver: &mut Driver| {
        let mut left = 300;
        load[0].run(driver.queue(), || {
            left -= 1;
            left > 0
        });
        disk_after(&load)
    };
    let command = json!({"disk": "d"});
    let mut cancel_one = |driver: &mut Driver| {
        let mut is_cancelled = false;
        while !is_cancelled {
            some(driver);
            desk.ask("commit", &command).unwrap();
            // It may be over before.
            is_cancelled = desk.ask("cancel", &command).unwrap()["state"] == "cancelled";
        }
        some(driver)
    };
    let frozen = cancel_one(&mut driver);
    let snapshot = json!({"disk": "d", "to": path("monday.vdi")});
    desk.ask("snapshot", &snapshot).unwrap();
    assert!(contents(&path("monday.vdi")) == frozen);
    // What the first one left is below the snapshot now, and the second one is not taken for it.
    cancel_one(&mut driver);
    assert!(path("d.vdi.merging").exists() && path("d.vdi.merging-2").exists());
    let _exit = desk.server.kill();
    drop(driver);
    let desk = Desk::open(place.path(), &["d"]);
    let mut driver = desk.driver("d");
    some(&mut driver);
    desk.ask("commit", &command).unwrap();
    desk.wait_for_job("d", "done");
    assert!(!path("d.vdi.merging-2").exists());
    let merged = some(&mut driver);
    desk.ask("commit", &command).unwrap();
    desk.wait_for_job("d", "done");
    drop(driver);
    assert_eq!(desk.server.terminate().code, Some(0));
    assert!(path("d.vdi.merging").exists() && !path("d.vdi.merging-2").exists());
    for image in ["d.vdi", "monday.vdi"] {
        assert!(contents(&path(image)) == merged, "{image}");
        tool::vdi(words!["check", path(image)]).expect_code(0);
    }
}

/// A merge that keeps what is merged: what the disk held then.
fn merge_and_keep(desk: &Desk, expected: &str) {
    let job = desk
        .ask("commit", &json!({"disk": "d", "keep": true}))
        .unwrap();
    // It may be over before it is told of.
    assert!(
        job["state"] == "done" || job["kept"] == json!(null),
        "{job}"
    );
    let job = desk.wait_for_job("d", "done");
    assert_eq!(job["kept"].as_str(), Some(expected));
}

#[test]
fn what_is_merged_is_kept_if_that_is_asked_and_valid_until_the_next_merge() {
    let place = family();
    let desk = Desk::open(place.path(), &["d"]);
    let mut driver = desk.driver("d");
    let path = |name: &str| place.path().join(name);
    let first = path("d.vdi.merged");
    driver.write(0, &[1; 4096]);
    merge_and_keep(&desk, first.to_str().unwrap());
    driver.write(0, &[2; 512]);
    assert!(!merging(place.path()).exists());
    let mut held = vec![0; usize::try_from(DISK_SECTORS * 512).unwrap()];
    held[..4096].fill(1);
    assert!(contents(&first) == held, "it is not what was frozen");
    tool::vdi(words!["check", first]).expect_code(0);
    // It is no part of the disk, and the next merge is not for it.
    let second = path("d.vdi.merged-2");
    merge_and_keep(&desk, second.to_str().unwrap());
    held[..512].fill(2);
    assert!(contents(&second) == held);
    let stale = tool::vdi(words!["convert", "-O", "raw", first, path("stale.raw")]);
    assert_ne!(stale.code, Some(0), "the parent is another one now");
    fs::remove_file(&first).unwrap();
    driver.write(8, &[3; 512]);
    desk.ask("commit", &json!({"disk": "d"})).unwrap();
    assert_eq!(desk.wait_for_job("d", "done")["kept"], json!(null));
    assert!(!first.exists() && second.exists());
    drop(driver);
    assert_eq!(desk.server.terminate().code, Some(0));
    held[8 * 512..9 * 512].fill(3);
    assert!(contents(&path("d.vdi")) == held);
}

#[test]
fn what_is_to_be_kept_stays_if_a_merge_ends_between_its_names() {
    let place = family();
    let path = |name: &str| place.path().join(name);
    let merged = path("d.vdi.merged");
    let mut desk = Desk::open(place.path(), &["d"]);
    let again = |desk: Desk| {
        let _exit = desk.server.kill();
        Desk::open(place.path(), &["d"])
    };
    let merge = |desk: &Desk| {
        desk.driver("d").write(0, &[1; 512]);
        desk.ask("commit", &json!({"disk": "d"})).unwrap();
        desk.wait_for_job("d", "done");
        assert!(merged.exists() && !merging(place.path()).exists());
    };
    // Before the disk did without it: it has both names, and is merged to the end.
    desk.driver("d").write(0, &[1; 512]);
    let mut is_cancelled = false;
    while !is_cancelled {
        desk.ask("commit", &json!({"disk": "d"})).unwrap();
        let ended = desk.ask("cancel", &json!({"disk": "d"})).unwrap();
        is_cancelled = ended["state"] == "cancelled";
    }
    desk = again(desk);
    fs::hard_link(merging(place.path()), &merged).unwrap();
    merge(&desk);
    fs::remove_file(&merged).unwrap();
    // After that: it takes its parent in any state, or is settled already.
    for is_settled in [false, true] {
        desk.driver("d").write(0, &[4; 512]);
        merge_and_keep(&desk, merged.to_str().unwrap());
        let _exit = desk.server.kill();
        if !is_settled {
            let image = HostFile::open(&merged, Access::Writable, Locking::Locked).unwrap();
            live::loosen(&image).unwrap();
        }
        fs::hard_link(&merged, merging(place.path())).unwrap();
        desk = Desk::open(place.path(), &["d"]);
        merge(&desk);
        let stale = tool::vdi(words!["convert", "-O", "raw", merged, path("stale.raw")]);
        assert_ne!(stale.code, Some(0), "it takes the parent as another one");
        fs::remove_file(&merged).unwrap();
    }
    // What is not of this disk is left alone.
    fs::write(merging(place.path()), "a note").unwrap();
    let refused = desk.ask("commit", &json!({"disk": "d"}));
    assert_eq!(refused, Err("not-possible".to_owned()));
}
