//! The power is cut while the daemon serves.

use std::time::Duration;

use vdi_core::{CreateOptions, NewKind, create};
use vdi_tests::driver::{Options, feature};
use vdi_tests::random::Random;
use vdi_tests::recorded::{Effect, Kind, Recorded, Rule};
use vdi_tests::server::{Launch, Server};
use vdi_tests::simulated::{Moment, Oracle, for_each_seed};
use vdi_tests::tool::vdi;
use vdi_tests::words;

use crate::judge::Judge;
use crate::load::{Habits, Load};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
pub(crate) const TOP: &str = "top.vdi";
pub(crate) const BASE: &str = "base.vdi";

/// What happens in a scene.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    pub(crate) block: u64,
    pub(crate) disk: u64,
    pub(crate) arguments: &'static [&'static str],
    pub(crate) habits: Habits,
    pub(crate) requests: u64,
    /// Operations take up to this long, so that many are under way.
    pub(crate) slow: Duration,
    /// The features that the driver does without.
    pub(crate) without: u64,
    pub(crate) over_a_parent: bool,
    /// Each daemon is killed while it is idle; the next one goes on.
    pub(crate) killed: bool,
    /// Halfway the driver switches write-back off.
    pub(crate) switches: bool,
    pub(crate) instants: usize,
    pub(crate) qemu_every: u64,
}

pub(crate) const PLAIN: Scene = Scene {
    name: "plain",
    block: 128 * KIB,
    disk: 5 * MIB,
    arguments: &["--cache", "writeback"],
    habits: Habits::ALL,
    requests: 300,
    slow: Duration::ZERO,
    without: 0,
    over_a_parent: false,
    killed: false,
    switches: false,
    instants: 180,
    qemu_every: 0,
};

/// A new image on the recorded file system.
pub(crate) fn make(files: &Recorded, name: &str, block: u64, disk: u64) {
    let options = CreateOptions {
        capacity_bytes: disk,
        block_size: u32::try_from(block).unwrap(),
        kind: NewKind::Dynamic,
        uuid: None,
    };
    create(&files.path(name), &options).unwrap();
}

/// A child of [`BASE`], named [`TOP`].
pub(crate) fn make_child(files: &Recorded, block: u64) {
    let (base, top, size) = (files.path(BASE), files.path(TOP), block.to_string());
    vdi(words!["snapshot", "--block-size", size, base, top]).expect_code(0);
}

impl Scene {
    /// The bytes of the disk.
    pub(crate) fn disk_len(&self) -> usize {
        usize::try_from(self.disk).unwrap()
    }
}

/// Writes some of a disk that reads as `disk`; gives the daemon, idle, and what the disk reads as then.
pub(crate) fn fill(
    files: &Recorded,
    scene: &Scene,
    name: &str,
    disk: Vec<u8>,
    requests: u64,
    random: &mut Random,
) -> (Server, Vec<u8>) {
    let server = Launch::image(&files.path(name)).start();
    let driver = server.driver(&Options::new());
    let oracle = Oracle::new(disk);
    let random = random.fork();
    let mut load = Load::new(files, driver, oracle, Habits::ALL, scene.block, random);
    load.run(requests);
    let (driver, oracle) = load.end();
    drop(driver);
    (server, oracle.now().to_vec())
}

/// Uses a disk, with an end of the daemon in the middle.
pub(crate) fn play(scene: &Scene, random: &mut Random) {
    let files = Recorded::mount();
    make(&files, TOP, scene.block, scene.disk);
    let mut disk = vec![0; scene.disk_len()];
    let mut names = vec![TOP];
    if scene.over_a_parent {
        let (server, filled) = fill(&files, scene, TOP, disk, 60, random);
        assert_eq!(server.terminate().code, Some(0));
        disk = filled;
        std::fs::rename(files.path(TOP), files.path(BASE)).unwrap();
        make_child(&files, scene.block);
        names.push(BASE);
    }
    files.forget_the_past();
    if !scene.slow.is_zero() {
        for kind in [Kind::Write, Kind::Sync, Kind::Truncate, Kind::Read] {
            let _always = files.add(Rule::all(kind, Effect::Slow(scene.slow)));
        }
    }
    let mut oracle = Oracle::new(disk);
    let (mut answered, mut flushed) = (0, Vec::new());
    for _ in 0..2 {
        let launch = Launch::image(&files.path(TOP)).args(scene.arguments);
        let server = launch.args(["--num-queues", "2", "--workers", "2"]).start();
        let options = Options::new().queues(2).without(scene.without);
        let driver = server.driver(&options);
        let mut load = Load::new(
            &files,
            driver,
            oracle,
            scene.habits,
            scene.block,
            random.fork(),
        );
        if scene.killed {
            flushed.push(load.flush());
        }
        load.run(scene.requests / 4);
        if scene.switches {
            load.write_through_from_now_on();
        }
        load.run(scene.requests / 4);
        answered += load.answered;
        let (driver, known) = load.end();
        oracle = known;
        drop(driver);
        if scene.killed {
            let _exit = server.kill();
            continue;
        }
        let exit = server.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        let closed = files.note();
        oracle.flush(closed, files.note());
    }
    let recording = files.recording();
    let mut judge = Judge::new(scene.name, &recording, &names, &oracle);
    judge.qemu_every = scene.qemu_every;
    judge.cut((Moment::START, recording.end), scene.instants, 4, random);
    for moment in flushed {
        judge.cut((moment, moment), 1, 12, random);
    }
    judge.report(answered);
}

fn play_often(scene: &Scene) {
    for_each_seed(1, |mut random| play(scene, &mut random));
}

#[test]
fn a_cut_under_the_daemon_keeps_what_was_flushed_and_all_blocks_apart() {
    play_often(&PLAIN);
}

#[test]
fn so_it_does_with_direct_io_and_much_in_flight() {
    play_often(&Scene {
        name: "direct",
        arguments: &["--cache", "direct"],
        slow: Duration::from_millis(3),
        ..PLAIN
    });
}

#[test]
fn so_it_does_with_system_calls_only_and_zeros_detected() {
    play_often(&Scene {
        name: "system-calls",
        arguments: &["--engine", "sync", "--detect-zeroes", "unmap"],
        ..PLAIN
    });
}

#[test]
fn so_it_does_over_a_parent() {
    play_often(&Scene {
        name: "child",
        over_a_parent: true,
        slow: Duration::from_millis(1),
        ..PLAIN
    });
}

#[test]
fn so_it_does_over_a_parent_with_direct_io() {
    play_often(&Scene {
        name: "child-direct",
        over_a_parent: true,
        arguments: &["--cache", "direct"],
        slow: Duration::from_millis(2),
        ..PLAIN
    });
}

/// W4: every new block is one that was let go shortly before.
#[test]
fn so_it_does_while_blocks_are_used_again() {
    play_often(&Scene {
        name: "reuse",
        disk: 12 * 128 * KIB,
        habits: Habits {
            flushes: 4,
            discards: 25,
            zeroes: 10,
            ..Habits::ALL
        },
        requests: 400,
        ..PLAIN
    });
}

#[test]
fn so_it_does_while_the_file_grows_by_many_steps() {
    play_often(&Scene {
        name: "growth",
        disk: 320 * MIB,
        habits: Habits {
            flushes: 3,
            discards: 2,
            zeroes: 1,
            most_sectors: 4,
            spreads: true,
            ..Habits::ALL
        },
        requests: 2800,
        instants: 120,
        ..PLAIN
    });
}

#[test]
fn without_flushes_every_answered_write_is_there() {
    play_often(&Scene {
        name: "write-through",
        without: feature::FLUSH | feature::CONFIG_WCE,
        habits: Habits {
            flushes: 0,
            write_through: true,
            ..Habits::ALL
        },
        requests: 200,
        ..PLAIN
    });
}

/// P2: what a killed daemon wrote and nobody synced is covered by the next one's first flush.
#[test]
fn so_it_does_after_a_daemon_that_was_killed() {
    play_often(&Scene {
        name: "killed",
        habits: Habits {
            flushes: 3,
            ..Habits::ALL
        },
        killed: true,
        instants: 120,
        ..PLAIN
    });
}

#[test]
fn with_write_back_switched_off_every_answered_write_is_there() {
    play_often(&Scene {
        name: "switched",
        habits: Habits {
            flushes: 1,
            ..Habits::ALL
        },
        switches: true,
        requests: 200,
        instants: 100,
        ..PLAIN
    });
}

#[test]
fn qemu_reads_the_same_after_a_cut() {
    play_often(&Scene {
        name: "qemu",
        block: MIB,
        disk: 12 * MIB,
        requests: 200,
        instants: 80,
        qemu_every: 12,
        ..PLAIN
    });
}

/// The judge itself: it must see a lie.
#[test]
#[should_panic(expected = "write-through-lie")]
fn a_flush_that_covers_nothing_is_seen() {
    let mut random = Random::seeded(1);
    let lie = Habits {
        flushes: 0,
        write_through: true,
        ..Habits::ALL
    };
    // The daemon keeps writes in memory here, and the driver believes them to be durable.
    play(
        &Scene {
            name: "write-through-lie",
            habits: lie,
            ..PLAIN
        },
        &mut random,
    );
}
