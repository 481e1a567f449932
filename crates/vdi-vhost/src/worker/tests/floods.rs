//! What disks do to each other at one worker when they are flooded.

use super::*;

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
