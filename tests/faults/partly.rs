//! Calls that do only a part, or are interrupted: nobody notices. And a file that somebody else cuts: an error, never zeros.

use nix::errno::Errno;
use vdi_tests::driver::Request;
use vdi_tests::recorded::{Effect, Kind, Rule};

use crate::scene::{BLOCK, DATA, MODES, NAME, Scene, Write};

/// Uses the disk in all ways, which must succeed.
fn use_it(scene: &mut Scene, fill: u8) {
    for block in [0, 1, 5, 80, 81, 140] {
        scene.write_ok(block, fill);
    }
    // Across blocks, odd at both ends.
    let large = Write {
        sector: 9 * BLOCK - 3,
        count: 2 * BLOCK + 5,
        fill,
    };
    assert_eq!(scene.write(&large), 0);
    assert_eq!(scene.discard(9 * BLOCK, 2048), 0);
    assert_eq!(scene.discard(10 * BLOCK + 3, 200), 0);
    scene.flush_ok();
    scene.read_all_ok();
}

/// Through io_uring it cannot be shown: there Linux completes short reads and writes on its own, and on FUSE begins them again
/// at the first byte (`fuse_direct_IO` leaves `ki_pos` as it was, seen with 6.18). `ring.rs` has its own tests.
#[test]
fn short_reads_and_writes_are_gone_on_with() {
    for mode in MODES {
        let mut scene = Scene::new(mode);
        // O_DIRECT is never cut inside a sector.
        let odd = if mode.is_direct() { 512 } else { 1009 };
        let metadata = Rule::all(Kind::Write, Effect::Short(1)).within(0..DATA.start);
        let mut rules = vec![scene.files.add(metadata)];
        let reads = Rule::all(Kind::Read, Effect::Short(3 * odd));
        let writes = Rule::all(Kind::Write, Effect::Short(3 * odd)).within(DATA);
        if mode.engine == "sync" {
            rules.push(scene.files.add(reads));
            rules.push(scene.files.add(writes));
        } else if !mode.is_direct() {
            // Such writes are plain system calls here too.
            rules.push(scene.files.add(writes));
        }
        for fill in 1..4 {
            use_it(&mut scene, fill);
        }
        for rule in rules {
            assert!(scene.files.lift(rule) > 0);
        }
        scene.end().lives_on();
    }
}

#[test]
fn interrupted_calls_are_made_again() {
    let kinds = [
        Kind::Read,
        Kind::Write,
        Kind::Truncate,
        Kind::Allocate,
        Kind::Sync,
    ];
    for mode in MODES {
        for errno in [Errno::EINTR, Errno::EAGAIN] {
            let mut scene = Scene::new(mode);
            for (kind, fill) in kinds.into_iter().zip(1..) {
                let rule = scene.files.add(Rule::fail(kind, errno).times(3));
                use_it(&mut scene, fill);
                // Once there is room, there is none to be made.
                assert!(
                    scene.files.lift(rule) > 0 || kind == Kind::Truncate,
                    "{kind:?}"
                );
            }
            scene.end().lives_on();
            let mut scene = Scene::new(mode);
            let rule = scene.files.add(Rule::fail(Kind::Truncate, errno).times(3));
            use_it(&mut scene, 1);
            assert_eq!(scene.files.lift(rule), 3);
            scene.end().lives_on();
        }
    }
}

#[test]
fn what_was_cut_off_the_file_is_an_error_and_never_zeros() {
    for mode in MODES {
        for odd in [0, 100] {
            let mut scene = Scene::new(mode);
            for block in 0..60 {
                scene.write_ok(block, 1);
            }
            scene.flush_ok();
            // Sixty blocks are more than half of the first 64, so the daemon has lengthened the file by as many, or does
            // it just now: then it has seen the whole length, and would lengthen what is cut meanwhile.
            scene.wait_for_len(DATA.start + (128 << 20));
            // Ten blocks are left, and a bit.
            let len = DATA.start + (10 << 20) + odd;
            scene.files.cut_short(NAME, len);
            for block in 0..10 {
                scene.read_ok(block);
            }
            for block in [10, 11, 30, 59] {
                let read = Request::read(block * BLOCK + 24, 4096);
                assert_eq!(scene.status_of(&read), 1, "block {block}");
            }
            scene.logged("a request failed");
            scene.write_ok(4, 2);
            scene.flush_ok();
            let (left, exit) = scene.terminate();
            assert_ne!(exit.code, Some(0), "{}", exit.log);
            assert!(
                exit.log.contains("something else has cut it"),
                "{}",
                exit.log
            );
            assert_eq!(
                left.len_bytes(),
                len,
                "it must not be lengthened over what is missing"
            );
        }
    }
}
