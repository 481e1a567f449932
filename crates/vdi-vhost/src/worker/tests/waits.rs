//! What is done on the worker's own time, and what it waits for.

use super::*;

#[test]
fn a_sync_that_anybody_at_any_disk_would_wait_for_is_not_done_on_the_threads_time() {
    let mut scene = Scene::new();
    let (mut disk, mut other) = (scene.seat(0), scene.seat(1));
    disk.offer(0, FLUSH, 0);
    other.offer(0, IN, 0);
    scene.turn_until_syncs();
    assert!(other.is_answered(0) && !disk.is_answered(0));
    assert_eq!(scene.worker.others(), Others::NoneKnown);
    // Chains that came meanwhile.
    other.offer(0, IN, 0);
    assert_eq!(scene.worker.others(), Others::Wait);
    scene.worker.sync();
    scene.turn();
    assert!(disk.is_answered(0) && other.is_answered(0));
    // Both want one, and what else was asked for is answered before.
    disk.offer(0, OUT, 0);
    other.offer(0, OUT, 0);
    for one in [&disk, &other] {
        scene.do_chores(one);
    }
    disk.offer(0, FLUSH, 0);
    other.offer(0, FLUSH, 0);
    other.offer(1, IN, 0);
    scene.turn_until_syncs();
    assert_eq!(scene.worker.others(), Others::Wait);
    assert!(other.is_answered(1) && !other.is_answered(0) && !disk.is_answered(0));
    scene.worker.sync();
    scene.turn();
    assert!(other.is_answered(0) && disk.is_answered(0));
}

#[test]
fn a_sync_that_a_transfer_or_the_rest_of_a_read_would_wait_for_is_not_done_on_the_threads_time() {
    let mut scene = Scene::with(EngineChoice::IoUring);
    let (mut disk, mut other) = (scene.seat(0), scene.seat(1));
    other.offer(0, OUT, 3);
    while !other.is_answered(0) {
        scene.turn();
        scene.do_chores(&other);
    }
    let _marked = scene.log_large(&mut other, 2 * WINDOW);
    disk.offer(0, FLUSH, 0);
    // Not a small one, which would be done at once all the same.
    other.offer_large(3, 64 << 10);
    scene.worker.tools.inline_left = 0;
    scene.turn_until_syncs();
    assert_eq!(scene.worker.tools.engine.in_flight(), 1);
    assert_eq!(scene.worker.others(), Others::Wait);
    while !(disk.is_answered(0) && other.is_answered(0)) {
        scene.turn();
    }
    disk.offer(0, FLUSH, 0);
    // Zeros, which need no transfers.
    other.offer_large(8, 2 * WINDOW);
    scene.turn_until_syncs();
    assert_eq!(scene.worker.tools.engine.in_flight(), 0);
    assert_eq!(scene.worker.others(), Others::Wait);
}

#[test]
fn a_write_into_fresh_room_is_kept_until_the_end_of_the_turn_if_it_is_alone() {
    let mut scene = Scene::with(EngineChoice::IoUring);
    let (mut disk, mut other) = (scene.direct_seat(0), scene.direct_seat(1));
    // The first ones have room made.
    for one in [&mut disk, &mut other] {
        one.offer(0, OUT, 0);
        while !one.is_answered(0) {
            scene.turn();
            scene.do_chores(one);
        }
    }
    let kept = |scene: &Scene| {
        scene
            .worker
            .seats
            .any_active(|seat| seat.wants_waits() == 1)
    };
    disk.offer(0, OUT, 1);
    scene.turn_until_syncs();
    assert!(kept(&scene));
    assert_eq!(scene.worker.tools.engine.in_flight(), 0);
    assert_eq!(scene.worker.others(), Others::NoneKnown);
    // Another disk's is a reason to hold nobody up.
    other.offer(0, OUT, 1);
    scene.turn_until_syncs();
    assert_eq!(scene.worker.tools.engine.in_flight(), 0);
    assert_eq!(scene.worker.others(), Others::Wait);
    scene.worker.sync();
    assert!(!kept(&scene));
    assert_eq!(scene.worker.tools.engine.in_flight(), 2);
    while !(disk.is_answered(0) && other.is_answered(0)) {
        scene.turn();
    }
    // Two of one disk, and one over what is there.
    disk.offer(0, OUT, 2);
    disk.offer(1, OUT, 3);
    scene.turn_until_syncs();
    assert_eq!(scene.worker.tools.engine.in_flight(), 2);
    while !(disk.is_answered(0) && disk.is_answered(1)) {
        scene.turn();
    }
    disk.offer(0, OUT, 2);
    scene.turn_until_syncs();
    assert_eq!(scene.worker.tools.engine.in_flight(), 1);
    while !disk.is_answered(0) {
        scene.turn();
    }
}

#[test]
fn a_worker_looks_for_the_end_of_a_transfer_unless_it_is_in_the_way() {
    let mut scene = Scene::with(EngineChoice::IoUring);
    let mut disk = scene.seat(0);
    disk.offer(0, OUT, 1);
    while !disk.is_answered(0) {
        scene.turn();
        scene.do_chores(&disk);
    }
    let _marked = scene.log_large(&mut disk, 32 << 10);
    for is_in_the_way in [true, false] {
        // Small enough to be looked for, too large to be done at once whatever else moved.
        disk.offer_large(1, 32 << 10);
        scene.worker.tools.inline_left = 0;
        scene.turn_until_syncs();
        assert!(scene.worker.tools.engine.has_unsubmitted());
        scene.worker.patience_with_transfer = Patience::new(Waits::ForTransfer);
        if is_in_the_way {
            scene.worker.patience_with_transfer.is_in_the_way();
        }
        let found = scene.worker.finds_more();
        // What is looked for must have been handed over; the wait does it else.
        assert_eq!(scene.worker.tools.engine.has_unsubmitted(), is_in_the_way);
        assert!(!(found && is_in_the_way));
        while !disk.is_answered(0) {
            scene.turn();
        }
    }
}
