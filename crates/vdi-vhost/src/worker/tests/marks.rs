//! What large reads mark in the dirty log.

use super::*;

#[test]
fn what_a_large_read_wrote_is_marked_window_by_window() {
    let mut scene = Scene::new();
    let mut disk = scene.seat(0);
    let len = 2 * WINDOW + 8192;
    let marked = scene.log_large(&mut disk, len);
    disk.offer_large(0, len);
    let mut so_far = Vec::new();
    for _ in 0..3 {
        assert!(!disk.is_answered(0));
        scene.turn();
        so_far.push(marked());
    }
    assert!(disk.is_answered(0));
    let windows = [0, WINDOW, len].map(|bytes| (0..bytes / 4096).collect::<Vec<_>>());
    assert!(so_far == windows, "{:?}", so_far.iter().map(Vec::len));
}

#[test]
fn a_read_that_fails_is_marked_as_far_as_it_may_have_come() {
    let mut scene = Scene::new();
    let mut disk = scene.seat(0);
    disk.offer(0, OUT, 1);
    scene.turn();
    scene.do_chores(&disk);
    assert!(disk.is_answered(0));
    let marked = scene.log_large(&mut disk, 3 * WINDOW);
    disk.image.set_len(4096).unwrap();
    disk.offer_large(0, 3 * WINDOW);
    for _ in 0..4 {
        scene.turn();
    }
    assert_eq!(disk.used(0), disk.taken[0]);
    let mut status = [0];
    disk.memory.read_exact_at(&mut status, STATUS).unwrap();
    assert_eq!(status, [1]);
    // The block is the second MiB, and the second window; the third was not begun.
    assert!(marked().into_iter().eq(0..2 * WINDOW / 4096));
}
