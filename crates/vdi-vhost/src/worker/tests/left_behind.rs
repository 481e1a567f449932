//! What a dead daemon left in flight.

use super::*;

#[test]
fn what_a_dead_daemon_left_in_flight_is_not_held() {
    let mut scene = Scene::new();
    let mut disk = scene.seat(0);
    scene.set_clock(second(10));
    disk.offer(1, IN, 0);
    scene.turn();
    let slow = limits(r#"{"iops_total": 1}"#);
    disk.throttle.set_limits(&slow);
    disk.offer(0, IN, 0);
    disk.offer(0, IN, 0);
    scene.turn();
    assert!(!disk.is_answered(0));
    assert!(scene.tell(0, Command::Stop(1)).try_recv().is_ok());
    scene.start(&mut disk, 1, vec![0]);
    scene.turn();
    assert!(!disk.is_answered(0));
    let stats = disk.stats.snapshot();
    assert_eq!((stats.restarted_requests, stats.read.requests), (1, 3));
}

#[test]
fn what_a_dead_daemon_left_is_answered_before_its_queue_ends_or_its_memory_changes() {
    type Ending = fn(&TestDisk) -> Command;
    let endings: [(Ending, u16); 3] = [
        (|_| Command::Pause(1), 0),
        (|_| Command::Stop(1), 0),
        // Goes on with what is new.
        (
            |disk| Command::Guest(disk.guest.clone(), Takeover::WhenIdle),
            1,
        ),
    ];
    for (ending, new) in endings {
        for limited in [false, true] {
            let mut scene = Scene::new();
            let disk = scene.seat_with_rest(limited);
            let ended = scene.tell(0, ending(&disk));
            assert_eq!(disk.used(1), 1 + 2 * BURST);
            assert!(ended.try_recv().is_err());
            assert_eq!(scene.worker.may_wait(), Wait::No);
            scene.turn();
            assert_eq!(disk.used(1), 1 + REST);
            assert!(ended.try_recv().unwrap().is_ok());
            scene.turn();
            let new = if limited { 0 } else { new };
            assert_eq!(disk.used(1), 1 + REST + new);
        }
    }
}

#[test]
fn a_queue_that_was_never_enabled_ends_without_what_a_dead_daemon_left() {
    let mut scene = Scene::new();
    let mut disk = scene.seat(0);
    assert!(scene.tell(0, Command::Stop(1)).try_recv().unwrap().is_ok());
    scene.start_as(&mut disk, 1, vec![0; usize::from(REST)], Mode::Paused);
    assert_eq!(scene.worker.may_wait(), Wait::Forever);
    assert!(scene.tell(0, Command::Stop(1)).try_recv().unwrap().is_ok());
    assert_eq!(disk.used(1), 0);
}

#[test]
fn what_a_dead_daemon_left_in_memory_that_is_gone_does_not_hold_its_queue_up() {
    crate::fault::catch().unwrap();
    let mut scene = Scene::new();
    let disk = scene.seat_with_rest(false);
    disk.memory.set_len(0).unwrap();
    let ended = scene.tell(0, Command::Stop(1));
    assert!(ended.try_recv().unwrap().is_ok());
}
