//! Failures that are final (W5): a sync or a metadata write fails; the image takes no more writes, reads go on, and the next
//! daemon finds it sound.

use nix::errno::Errno;
use vdi_tests::driver::Request;
use vdi_tests::recorded::{Kind, Rule};

use crate::scene::{AT_COUNT, AT_MARK, MAP, MODES, Scene, Write};

/// For each mode one.
const ERRNOS: [Errno; 4] = [Errno::ENOSPC, Errno::EIO, Errno::EIO, Errno::ENOSPC];

#[test]
fn after_a_failed_map_write_no_more_writes_are_taken() {
    for (mode, errno) in MODES.into_iter().zip(ERRNOS) {
        let mut scene = Scene::new(mode);
        for block in 0..8 {
            scene.write_ok(block, 1);
        }
        scene.flush_ok();
        let rule = scene
            .files
            .add(Rule::fail(Kind::Write, errno).within(MAP).times(1));
        scene.write_fails(20, 2);
        assert_eq!(scene.files.lift(rule), 1);
        scene.takes_no_more_writes();
        scene.killed().lives_on();
    }
}

#[test]
fn after_a_failed_header_write_no_more_writes_are_taken() {
    for mode in MODES {
        for (place, errno) in [(AT_MARK, Errno::EIO), (AT_COUNT, Errno::ENOSPC)] {
            let mut scene = Scene::new(mode);
            let rule = Rule::fail(Kind::Write, errno).within(place).times(1);
            let rule = scene.files.add(rule);
            scene.write_fails(3, 1);
            assert_eq!(scene.files.lift(rule), 1);
            scene.takes_no_more_writes();
            let (left, exit) = scene.terminate();
            assert_ne!(exit.code, Some(0), "{}", exit.log);
            left.check(&[0, 3]);
            left.lives_on();
        }
    }
}

#[test]
fn after_a_failed_flush_no_more_writes_are_taken_and_no_flush_succeeds() {
    for (mode, errno) in MODES.into_iter().zip(ERRNOS) {
        let mut scene = Scene::new(mode);
        for block in 0..8 {
            scene.write_ok(block, 1);
        }
        scene.flush_ok();
        scene.write_ok(2, 2);
        let rule = scene.files.add(Rule::fail(Kind::Sync, errno).times(1));
        scene.flush_fails();
        assert_eq!(scene.files.lift(rule), 1);
        scene.takes_no_more_writes();
        let (left, exit) = scene.terminate();
        assert_ne!(exit.code, Some(0), "{}", exit.log);
        left.check(&[0, 3]);
        left.lives_on();
    }
}

#[test]
fn after_a_failed_sync_of_new_room_no_more_writes_are_taken() {
    for mode in MODES {
        let mut scene = Scene::new(mode);
        // The first sync is that of the mark (W6), the second that of the room (W1).
        let rule = Rule::fail(Kind::Sync, Errno::EIO).after(1).times(1);
        let rule = scene.files.add(rule);
        scene.write_fails(3, 1);
        assert_eq!(scene.files.lift(rule), 1);
        scene.takes_no_more_writes();
        scene.killed().lives_on();
    }
}

#[test]
fn written_through_a_write_whose_sync_fails_is_an_error() {
    for mode in MODES {
        let mut scene = Scene::new(mode);
        scene.driver.set_writeback(false).unwrap();
        scene.write_ok(1, 1);
        let rule = scene.files.add(Rule::fail(Kind::Sync, Errno::EIO).times(1));
        scene.write_fails(1, 2);
        assert_eq!(scene.files.lift(rule), 1);
        scene.takes_no_more_writes();
        scene.killed().lives_on();
    }
}

/// A guest may switch its cache mode as often as it likes.
#[test]
fn that_earlier_writes_cannot_be_made_durable_is_said_a_few_times() {
    let mut scene = Scene::new(MODES[0]);
    scene.write_ok(0, 1);
    let rule = scene.files.add(Rule::fail(Kind::Sync, Errno::EIO));
    for _ in 0..100 {
        scene.driver.set_writeback(false).unwrap();
    }
    let (left, exit) = scene.terminate();
    let said = exit.log.matches("cannot make earlier writes durable");
    assert!((1..=10).contains(&said.count()), "{}", exit.log);
    assert!(left.lift(rule) > 0);
    left.lives_on();
}

/// All who wait when it happens get an answer.
#[test]
fn a_failure_that_is_final_answers_all_who_are_in_flight() {
    for mode in MODES {
        for (kind, place) in [(Kind::Write, MAP), (Kind::Sync, 0..u64::MAX)] {
            let mut scene = Scene::new(mode);
            scene.write_ok(0, 1);
            let rule = scene.files.add(Rule::fail(kind, Errno::EIO).within(place));
            let writes: Vec<Write> = (0..40).map(|nth| Write::in_block(nth * 3, 2)).collect();
            let answers = scene.write_all(&writes);
            assert!(answers.iter().all(|status| *status <= 1), "{answers:?}");
            assert_eq!(scene.status_of(&Request::flush()), 1);
            assert!(scene.files.lift(rule) > 0);
            scene.takes_no_more_writes();
            scene.killed().lives_on();
        }
    }
}

/// A close that cannot be made durable is not called one.
#[test]
fn a_daemon_that_cannot_sync_at_its_end_says_so() {
    for mode in MODES {
        let mut scene = Scene::new(mode);
        scene.write_ok(0, 1);
        let rule = scene.files.add(Rule::fail(Kind::Sync, Errno::EIO));
        let (left, exit) = scene.terminate();
        assert_ne!(exit.code, Some(0), "{}", exit.log);
        assert!(exit.log.contains("could not be closed"), "{}", exit.log);
        left.check(&[0, 3]);
        assert!(left.lift(rule) > 0);
        left.lives_on();
    }
}

/// W2: without the sync the write must not show.
#[test]
fn a_failed_sync_of_a_copy_of_a_parents_data_is_final() {
    for mode in MODES {
        let mut scene = Scene::over_a_parent(mode);
        scene.write_ok(1, 2);
        let rule = scene.files.add(Rule::fail(Kind::Sync, Errno::EIO).times(1));
        scene.write_fails(3, 2);
        assert_eq!(scene.files.lift(rule), 1);
        scene.takes_no_more_writes();
        scene.read_ok(3);
    }
}
