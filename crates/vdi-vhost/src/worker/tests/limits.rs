//! Disks that are held by limits.

use super::*;

/// Limits by QEMU's names.
#[test]
fn a_disk_that_is_held_delays_no_other_disk_at_its_worker_and_goes_on_when_it_is_time() {
    let mut scene = Scene::new();
    let (mut flooded, mut other) = (scene.seat(0), scene.seat(1));
    scene.set_clock(second(10));
    flooded
        .throttle
        .set_limits(&limits(r#"{"iops_total": 10}"#));
    // The bucket holds one; the next goes over its brim.
    for _ in 0..2 {
        flooded.offer(0, IN, 0);
        scene.turn();
        assert!(flooded.is_answered(0));
    }
    flooded.offer(0, IN, 0);
    flooded.offer(1, IN, 0);
    for _ in 0..100 {
        other.offer(0, IN, 0);
        scene.turn();
        assert!(other.is_answered(0));
        assert!(!flooded.is_answered(0) && !flooded.is_answered(1));
    }
    // It waits for the time, and for nothing else.
    assert!(
        matches!(scene.worker.may_wait(), Wait::AtMost(time) if time == Duration::from_millis(100))
    );
    scene.set_clock(second(10).plus(99_999_999));
    scene.turn();
    assert!(!flooded.is_answered(0) && !flooded.is_answered(1));
    scene.set_clock(second(10).plus(100_000_000));
    scene.turn();
    assert!(flooded.is_answered(0) != flooded.is_answered(1));
    // The queue that had to wait comes first.
    let (first, last) = if flooded.is_answered(0) {
        (0, 1)
    } else {
        (1, 0)
    };
    flooded.offer(first, IN, 0);
    scene.set_clock(second(10).plus(200_000_000));
    scene.turn();
    assert!(flooded.is_answered(last) && !flooded.is_answered(first));
    scene.set_clock(second(11));
    scene.turn();
    assert!(flooded.is_answered(0) && flooded.is_answered(1));
    assert_eq!(scene.worker.may_wait(), Wait::Forever);
    let stats = flooded.stats.snapshot();
    assert_eq!((stats.read.requests, stats.throttled_requests), (5, 3));
    assert_eq!(stats.throttled_us, 1_000_000);
    assert_eq!(other.stats.snapshot().throttled_requests, 0);
}

#[test]
fn a_disk_that_is_held_obeys_at_once() {
    let mut scene = Scene::new();
    let mut disk = scene.seat(0);
    scene.set_clock(second(10));
    let slow = limits(r#"{"iops_total": 1}"#);
    disk.throttle.set_limits(&slow);
    for queue in [0, 1] {
        disk.offer(queue, IN, 0);
        scene.turn();
    }
    assert!(disk.is_answered(0) && !disk.is_answered(1));
    let done = |acknowledged: Receiver<io::Result<()>>| {
        let done = acknowledged.try_recv();
        assert!(done.unwrap().is_ok());
    };
    done(scene.tell(0, Command::Pause(1)));
    scene.turn();
    // Nothing is held that may not go on anyway.
    assert_eq!(scene.worker.may_wait(), Wait::Forever);
    done(scene.tell(0, Command::Resume(1)));
    let same = Command::Guest(disk.guest.clone(), Takeover::WhenIdle);
    done(scene.tell(0, same));
    scene.turn();
    assert!(!disk.is_answered(1));
    assert!(matches!(scene.worker.may_wait(), Wait::AtMost(_)));
    // New limits are heeded as soon as it looks, a tenth of a second later at most.
    disk.throttle.set_limits(&Limits::default());
    scene.set_clock(second(10).plus(100_000_000));
    scene.turn();
    assert!(disk.is_answered(1));
    disk.throttle.set_limits(&slow);
    for queue in [0, 0, 1] {
        disk.offer(queue, IN, 0);
        scene.turn();
    }
    assert!(!disk.is_answered(1));
    done(scene.tell(0, Command::Stop(1)));
    done(scene.tell(0, Command::Leave));
    assert_eq!(Arc::strong_count(&disk.disk), 1);
    assert_eq!(disk.stats.snapshot().read.requests, 3);
}

#[test]
fn disks_of_a_group_share_its_limit_at_one_worker() {
    let mut scene = Scene::new();
    let mut disks = [scene.seat(0), scene.seat(1)];
    scene.set_clock(second(10));
    let limits = limits(r#"{"iops_total": 10}"#);
    let group = Arc::new(Group::new("tenants".to_owned(), &limits));
    for disk in &disks {
        disk.throttle.set_group(Some(Arc::clone(&group)));
    }
    for step in 0..40 {
        scene.set_clock(second(10).plus(step * 100_000_000));
        for disk in &mut disks {
            if disk.is_answered(0) {
                disk.offer(0, IN, 0);
            }
        }
        scene.turn();
    }
    let reads = disks.map(|disk| disk.stats.snapshot().read.requests);
    assert_eq!(reads.iter().sum::<u64>(), 41);
    assert!(reads[0].abs_diff(reads[1]) <= 1, "{reads:?}");
}
