//! What disks do to each other at one worker when they are flooded.

use super::*;

#[test]
fn a_flooded_disk_gets_no_more_than_a_burst_between_two_requests_of_another() {
    let mut scene = Scene::new();
    let (mut flooded, mut other) = (scene.seat(0), scene.seat(1));
    for queue in 0..2 {
        flooded.offer_many(queue, IN, 0, 80);
    }
    // How many they are is seen when they are taken.
    for expected in [2, 3, 4, 5, 5] {
        other.offer(0, IN, 0);
        scene.turn();
        assert!(other.is_answered(0));
        let answered = flooded.stats.snapshot().read.requests;
        assert_eq!(answered, (expected * u64::from(BURST)).min(2 * 80));
    }
}

#[test]
fn disks_that_are_flooded_with_small_requests_take_turns_and_delay_no_other() {
    let mut scene = Scene::new();
    let mut flooded = [scene.seat(0), scene.seat(1), scene.seat(2)];
    let mut other = scene.seat(3);
    // That they are flooded is seen by a burst.
    for count in [BURST, 2 * BURST] {
        flooded
            .iter_mut()
            .for_each(|disk| disk.offer_many(0, IN, 0, count));
        if count == BURST {
            scene.turn();
        }
    }
    let reads = |disks: &[TestDisk]| -> Vec<u64> {
        let reads = disks.iter().map(|disk| disk.stats.snapshot().read.requests);
        reads.collect()
    };
    let mut before = reads(&flooded);
    let mut whose = Vec::new();
    for _ in 0..6 {
        other.offer(0, IN, 0);
        let worker = &mut scene.worker;
        worker.tools.engine.turn(Wait::No);
        worker.tools.begin_turn();
        worker.hear();
        worker.begin();
        assert!(other.is_answered(0), "it goes first");
        worker.settle();
        let now = reads(&flooded);
        let took: Vec<_> = now
            .iter()
            .zip(&before)
            .map(|(now, before)| now - before)
            .collect();
        assert_eq!(took.iter().sum::<u64>(), u64::from(BURST), "{took:?}");
        whose.push(took.iter().position(|took| *took > 0));
        before = now;
    }
    // None had two turns before each had one.
    for three in whose.chunks(3) {
        let mut three = three.to_vec();
        three.sort_unstable();
        assert_eq!(three, [Some(0), Some(1), Some(2)], "{whose:?}");
    }
}

#[test]
fn many_disks_that_ask_for_little_leave_a_turn_to_one_that_asks_for_much() {
    let mut scene = Scene::new();
    let mut large = scene.seat(0);
    let mut small: Vec<_> = (1..=40).map(|number| scene.seat(number)).collect();
    let _marked = scene.log_large(&mut large, 1 << 20);
    large.offer_many_large(1 << 20, 1);
    scene.turn();
    for _ in 0..3 {
        large.offer_many_large(1 << 20, 1);
        small.iter_mut().for_each(|disk| disk.offer(0, IN, 0));
        scene.turn();
        assert!(large.is_answered(0));
        assert!(small.iter().all(|disk| disk.is_answered(0)));
    }
}

#[test]
fn a_limited_queue_that_is_full_is_charged_for_what_it_took_alone() {
    let mut scene = Scene::new();
    let mut disk = scene.seat(0);
    scene.set_clock(second(1));
    // Eleven may come at once.
    disk.throttle.set_limits(&limits(r#"{"iops_total": 100}"#));
    // All of the disk, so often that no more is taken meanwhile.
    let (discard, segments, sectors) = (11_u32, 64, (64_u64 << 20) / 512);
    disk.offer_many(0, IN, 0, 2);
    let table: Vec<u8> = std::iter::repeat_n([0, sectors], segments)
        .flatten()
        .flat_map(u64::to_le_bytes)
        .collect();
    let (header, data) = (HEADER + 0x100, DATA + 0x800);
    disk.put(header, &discard.to_le_bytes());
    disk.put(data, &table);
    disk.put(0, &header.to_le_bytes());
    disk.put(16, &data.to_le_bytes());
    let readable_to_next = 1024_u64 | 1 << 32 | 2 << 48;
    disk.put(24, &readable_to_next.to_le_bytes());
    scene.turn();
    assert_eq!(disk.used(0), 0, "it takes some turns");
    for _ in 0..2 * segments {
        scene.turn();
    }
    assert!(disk.is_answered(0), "the read behind it is held");
}

#[test]
fn disks_that_move_much_share_what_a_turn_moves_and_delay_no_other() {
    let mut scene = Scene::new();
    let (mut one, mut two, mut other) = (scene.seat(0), scene.seat(1), scene.seat(2));
    for disk in [&mut one, &mut two] {
        let _marked = scene.log_large(disk, 1 << 20);
        // How large they are is not known before.
        disk.offer_many_large(1 << 20, 1);
    }
    scene.turn();
    for disk in [&mut one, &mut two] {
        disk.offer_many_large(1 << 20, 40);
    }
    let reads = |disk: &TestDisk| disk.stats.snapshot().read.requests - 1;
    let per_turn = portion::TURN_BYTES >> 20;
    // Whoever has little to do in between takes nobody's place.
    for turn in 1..=12 {
        other.offer(0, IN, 0);
        scene.turn();
        assert!(other.is_answered(0));
        let (one, two) = (reads(&one), reads(&two));
        assert_eq!(one + two, turn * per_turn);
        assert!(one.abs_diff(two) <= per_turn, "{one}, {two}");
    }
    // Alone it has all of a turn, and all is answered in the end.
    for _ in 0..80 {
        scene.turn();
    }
    assert!(one.is_answered(0) && two.is_answered(0));
}

#[test]
fn of_the_first_large_requests_after_small_ones_a_turn_moves_no_more_than_of_others() {
    let mut scene = Scene::new();
    let (mut disk, mut other) = (scene.seat(0), scene.seat(1));
    let _marked = scene.log_large(&mut disk, 1 << 20);
    disk.offer(0, IN, 0);
    scene.turn();
    disk.offer_many_large(1 << 20, BURST);
    for turn in 1..=u64::from(BURST) {
        other.offer(0, IN, 0);
        scene.turn();
        assert!(other.is_answered(0));
        let answered = disk.stats.snapshot().read.requests - 1;
        assert_eq!(answered, turn * (portion::TURN_BYTES >> 20));
    }
    assert!(disk.is_answered(0));
}

#[test]
fn a_request_that_is_larger_than_a_turn_moves_turn_by_turn() {
    let mut scene = Scene::new();
    let (mut disk, mut other) = (scene.seat(0), scene.seat(1));
    let turns = 4;
    let len = turns * portion::TURN_BYTES;
    let _marked = scene.log_large(&mut disk, len);
    // Blocks are given to it first.
    disk.offer_large_one(OUT, 0, len);
    while !disk.is_answered(0) {
        scene.turn();
        scene.do_chores(&disk);
    }
    for kind in [IN, OUT] {
        disk.offer_large_one(kind, 0, len);
        for _ in 0..turns {
            assert!(!disk.is_answered(0));
            other.offer(0, IN, 0);
            scene.turn();
            assert!(other.is_answered(0));
        }
        assert!(disk.is_answered(0));
    }
}

#[test]
fn a_disk_that_asks_for_little_is_answered_before_others_move_theirs() {
    let mut scene = Scene::new();
    let (mut large, mut small) = (scene.seat(0), scene.seat(1));
    let _marked = scene.log_large(&mut large, 1 << 20);
    large.offer_many_large(1 << 20, 1);
    scene.turn();
    for _ in 0..2 {
        large.offer_many_large(1 << 20, 1);
        small.offer(0, IN, 0);
        let worker = &mut scene.worker;
        worker.tools.engine.turn(Wait::No);
        worker.tools.begin_turn();
        worker.hear();
        worker.begin();
        assert!(!large.is_answered(0) && small.is_answered(0));
        worker.settle();
        assert!(large.is_answered(0));
    }
}

#[test]
fn a_small_request_is_done_at_once_whatever_others_moved() {
    let mut scene = Scene::with(EngineChoice::IoUring);
    let mut disk = scene.seat(0);
    disk.offer(0, OUT, 3);
    while !disk.is_answered(0) {
        scene.turn();
        scene.do_chores(&disk);
    }
    for kind in [IN, OUT] {
        disk.offer(0, kind, 3);
        let worker = &mut scene.worker;
        worker.tools.engine.turn(Wait::No);
        (worker.tools.inline_left, worker.tools.turn_left) = (0, 0);
        worker.hear();
        worker.begin();
        worker.settle();
        assert!(disk.is_answered(0));
    }
}
