//! A merge under a disk that is used (`vdi_core::commit::live`): whoever has it open goes on reading with the parent's map of before, and after a
//! power cut at any instant it reads as before.

use std::ops::ControlFlow;
use std::sync::Arc;

use vdi_core::commit::live;
use vdi_core::rebase::rebase_unsafe;
use vdi_core::{Access, Disk, Image, ModifiedParent, Storage};
use vdi_tests::simulated::for_each_seed;

use crate::crashes::{World, chain, crash_everywhere, open, read};

const REFUSE: ModifiedParent = ModifiedParent::Refuse;

/// The second image of a chain goes into the third.
fn merge(storages: &[Arc<dyn Storage>]) {
    live::loosen(&*storages[1]).unwrap();
    let mut all = |_, _| ControlFlow::Continue(());
    let merged = live::merge(&storages[1..], REFUSE, &mut all).unwrap();
    assert!(merged.is_some());
}

/// The chain that the top has: with what is merged, or without it.
fn of_top(storages: &[Arc<dyn Storage>]) -> Vec<Arc<dyn Storage>> {
    match Disk::open_chain(storages.to_vec(), Access::ReadOnly, REFUSE) {
        Ok(_) => storages.to_vec(),
        Err(_) => vec![Arc::clone(&storages[0]), Arc::clone(&storages[2])],
    }
}

#[test]
fn whoever_has_the_disk_open_reads_the_same_during_a_merge_and_after_it() {
    let mut merged = 0;
    for_each_seed(40, |mut random| {
        let world = World::new(chain(3, &mut random));
        let storages = world.storages();
        let disk = open(&storages, Access::ReadOnly);
        let read = || {
            let mut found = vec![1; usize::try_from(disk.capacity().bytes()).unwrap()];
            disk.read_at(disk.capacity().whole(), &mut found).unwrap();
            found
        };
        let expected = read();
        live::loosen(&*storages[1]).unwrap();
        let mut look = |_, _| {
            assert!(read() == expected, "it reads something else during it");
            ControlFlow::Continue(())
        };
        // A parent that would have to grow is refused.
        if live::merge(&storages[1..], REFUSE, &mut look).is_ok() {
            merged += 1;
            assert!(read() == expected, "it reads something else after it");
        }
    });
    assert!(merged > 5, "{merged}");
}

#[test]
fn a_live_merge_that_the_power_ends_harms_nothing_and_is_completed() {
    let mut merged = 0;
    for_each_seed(12, |mut random| {
        let images = chain(3, &mut random);
        let world = World::new(images.clone());
        let child = open(&world.storages()[1..], Access::ReadOnly);
        let parent = Image::examine(Arc::clone(&world.storages()[2])).unwrap();
        // One that would have to grow is refused.
        if live::check(child.header(), &parent).is_err() {
            return;
        }
        merged += 1;
        let expected = read(&world.storages());
        let look = |storages: &[Arc<dyn Storage>]| {
            let found = read(&of_top(storages));
            assert!(found == expected, "the disk reads something else");
        };
        let verb = |storages: &[Arc<dyn Storage>]| {
            if of_top(storages).len() == storages.len() {
                merge(storages);
                let parent = open(&storages[2..], Access::ReadOnly);
                rebase_unsafe(&*storages[0], &parent).unwrap();
            }
        };
        let is_done = |storages: &[Arc<dyn Storage>]| assert_eq!(of_top(storages).len(), 2);
        crash_everywhere(images, &mut random, verb, look, is_done);
    });
    assert!(merged > 2, "{merged}");
}
