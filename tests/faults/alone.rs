//! Failures that concern one request only: it gets an I/O error, the map stays as it was, and all goes on.

use nix::errno::Errno;
use vdi_tests::driver::{Request, Segment};
use vdi_tests::recorded::{Kind, Rule};

use crate::scene::{BLOCK, DATA, MODES, NAME, Scene, Write};

/// For each mode one.
const ERRNOS: [Errno; 4] = [Errno::ENOSPC, Errno::EIO, Errno::EIO, Errno::ENOSPC];

#[test]
fn a_failed_data_write_is_an_error_of_that_request_alone() {
    for (mode, errno) in MODES.into_iter().zip(ERRNOS) {
        let mut scene = Scene::new(mode);
        for block in 0..8 {
            scene.write_ok(block, 1);
        }
        scene.flush_ok();
        let rule = Rule::fail(Kind::Write, errno).within(DATA).times(1);
        let rule = scene.files.add(rule.after(5));
        // New blocks and old ones, all in flight together.
        let writes: Vec<Write> = (4..20).map(|block| Write::in_block(block, 2)).collect();
        let failed = scene.write_all(&writes);
        assert_eq!(failed.iter().filter(|&&status| status != 0).count(), 1);
        assert_eq!(scene.files.lift(rule), 1);
        scene.logged("a request failed");
        scene.read_all_ok();
        for block in 4..20 {
            scene.write_ok(block, 3);
        }
        scene.flush_ok();
        scene.end().lives_on();
    }
}

#[test]
fn while_no_data_can_be_written_reads_and_flushes_go_on_and_afterwards_writes() {
    for mode in MODES {
        let mut scene = Scene::new(mode);
        for block in 0..8 {
            scene.write_ok(block, 1);
        }
        let rule = scene
            .files
            .add(Rule::fail(Kind::Write, Errno::ENOSPC).within(DATA));
        for round in 0..30 {
            scene.write_fails(round % 4, 2);
            scene.write_fails(20 + round, 2);
            scene.flush_ok();
        }
        scene.read_all_ok();
        // A write in place through the page cache is tried at once, and then as any other.
        let met = scene.files.lift(rule);
        assert!((60..=90).contains(&met), "{met}");
        for block in (0..4).chain(20..50) {
            scene.read_ok(block);
            scene.write_ok(block, 4);
        }
        scene.killed().lives_on();
    }
}

#[test]
fn without_room_for_new_blocks_the_others_are_written_and_when_it_is_back_all_are() {
    for (mode, errno) in MODES.into_iter().zip(ERRNOS) {
        let mut scene = Scene::new(mode);
        // The first step has 64 blocks.
        for block in 0..20 {
            scene.write_ok(block, 1);
        }
        let rule = scene.files.add(Rule::fail(Kind::Truncate, errno));
        let mut failed = Vec::new();
        for block in 20..120 {
            if scene.write(&Write::in_block(block, 2)) != 0 {
                failed.push(block);
            }
        }
        assert!((20..80).contains(&failed.len()), "{failed:?}");
        scene.write_ok(3, 5);
        scene.flush_ok();
        scene.read_all_ok();
        scene.logged(&format!("/{NAME}: the image cannot take new data: "));
        assert!(scene.files.lift(rule) > 0);
        // What was begun before the host had room again may fail yet, and with it the first who waits for it.
        scene.write(&Write::in_block(failed[0], 6));
        for block in failed {
            scene.write_ok(block, 6);
        }
        scene.flush_ok();
        scene.end().lives_on();
    }
}

#[test]
fn a_read_that_the_host_fails_is_an_error_of_that_request_alone() {
    for mode in MODES {
        let mut scene = Scene::new(mode);
        for block in 0..8 {
            scene.write_ok(block, 1);
        }
        // Block 3 is the fourth in the file.
        let there = DATA.start + (3 << 20)..DATA.start + (4 << 20);
        for errno in [Errno::EIO, Errno::ENOSPC, Errno::ESTALE] {
            let rule = scene
                .files
                .add(Rule::fail(Kind::Read, errno).within(there.clone()));
            assert_eq!(scene.status_of(&Request::read(3 * BLOCK, 4096)), 1);
            assert_eq!(scene.status_of(&Request::read(4 * BLOCK - 64, 65536)), 1);
            for block in [0, 1, 2, 4, 5, 6, 7, 100] {
                scene.read_ok(block);
            }
            scene.write_ok(3, 2);
            assert!(scene.files.lift(rule) >= 2);
            scene.read_ok(3);
        }
        scene.logged("a request failed");
        scene.end().lives_on();
    }
}

#[test]
fn a_hole_that_cannot_be_punched_harms_nobody() {
    for mode in MODES {
        for errno in [Errno::EIO, Errno::ENOSPC, Errno::EOPNOTSUPP] {
            let mut scene = Scene::new(mode);
            for block in 0..8 {
                scene.write_ok(block, 1);
            }
            scene.flush_ok();
            let rule = scene.files.add(Rule::fail(Kind::Allocate, errno));
            // The entry says zeros, so the block reads so whatever became of its place.
            assert_eq!(scene.discard(2 * BLOCK, 2048), 0);
            scene.read_ok(2);
            let in_place = scene.discard(3 * BLOCK + 8, 64);
            assert_eq!(in_place == 0, errno == Errno::EOPNOTSUPP);
            let zeroes = Request::write_zeroes(&[Segment::new(4 * BLOCK + 500, 16)]);
            assert_eq!(scene.status_of(&zeroes) == 0, errno == Errno::EOPNOTSUPP);
            scene.read_all_ok();
            scene.flush_ok();
            assert!(scene.files.lift(rule) > 0);
            for block in (0..8).chain(60..100) {
                scene.write_ok(block, 7);
            }
            scene.end().lives_on();
        }
    }
}

#[test]
fn a_parent_that_cannot_be_read_is_an_error_of_the_writes_that_copy_from_it() {
    for mode in MODES {
        let mut scene = Scene::over_a_parent(mode);
        scene.write_ok(1, 2);
        let there = DATA.start + (3 << 20)..DATA.start + (4 << 20);
        let rule = Rule::fail(Kind::Read, Errno::EIO).within(there);
        let rule = scene.files.add(rule);
        scene.write_fails(3, 2);
        scene.write_ok(4, 2);
        scene.flush_ok();
        assert!(scene.files.lift(rule) > 0);
        scene.read_all_ok();
        scene.write_ok(3, 3);
        scene.read_all_ok();
        let (_left, exit) = scene.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
    }
}
