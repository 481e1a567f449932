//! The steps of a request's path, over and over, for a program that counts instructions: `ci/instructions` runs it under callgrind
//! with two numbers of rounds, and the difference is what the rounds cost.
//!
//! Not a measurement of time (`ci/bench` is), and nothing that a guest or the kernel does is counted.
//!
//! ```text
//! request_path STEP ROUNDS      a round is 32 requests, or look-ups
//! ```

#![expect(clippy::unwrap_used, reason = "nothing here goes on after a failure")]

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use vdi_core::{Access, CreateOptions, Disk, HostFile, Locking, NewKind, Sector, Storage, create};
use vdi_vhost::fuzzing::{Bench, GuestMemory, RingPlace, Wishes};

/// Requests of a round: what a worker takes in one go.
const ROUND: u16 = 32;
/// Bytes of a request, and of a block: the smallest, so that many can be allocated.
const LEN: u64 = 4096;
const BLOCK: u64 = 128 << 10;
/// Blocks of the disk, of which the first [`ROUND`] are allocated.
const BLOCKS: u64 = 32 << 10;
/// VIRTIO_F_VERSION_1, and VIRTIO_BLK_F_FLUSH, without which every write is synced.
const FEATURES: u64 = 1 << 32 | 1 << 9;

/// Where things are in guest memory.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADERS: u64 = 0x3000;
const STATUS: u64 = 0x4000;
const DATA: u64 = 0x10000;
const END: u64 = DATA + 32 * LEN;
const QUEUE_SIZE: u16 = 256;

/// `struct virtio_blk_req`'s type, and a descriptor's flags (virtio 1.2 sections 5.2.6 and 2.7.5).
const IN: u32 = 0;
const OUT: u32 = 1;
const UNKNOWN: u32 = 99;
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The driver: one ring whose chains stay as they are, but for their headers.
struct Driver {
    memory: File,
    bench: Bench,
    kind: u32,
    index: u16,
}

impl Driver {
    fn new(image: &Path, kind: u32) -> Self {
        let memory = tempfile::tempfile_in("/dev/shm").unwrap();
        memory.set_len(END).unwrap();
        let image = HostFile::open(image, Access::Writable, Locking::Locked).unwrap();
        let regions = [[0, END, 0]];
        let guest = GuestMemory {
            file: &memory,
            regions: &regions,
            log: None,
        };
        let wishes = Wishes {
            features: FEATURES,
            access: Access::Writable,
            discards: true,
            detects_zeros: 0,
        };
        let bench = Bench::new(&[Arc::new(image)], &guest, &wishes).unwrap();
        let mut driver = Self {
            memory,
            bench,
            kind,
            index: 0,
        };
        driver.lay_chains();
        let started = driver.bench.start(&RingPlace {
            size: QUEUE_SIZE,
            table: TABLE,
            available: AVAILABLE,
            used: USED,
            index: 0,
        });
        assert!(started, "the ring is right");
        driver
    }

    fn lay_chains(&mut self) {
        for nth in 0..ROUND {
            let data_flags = if self.kind == IN { NEXT | WRITE } else { NEXT };
            let wide = u64::from(nth);
            let chain = [
                (HEADERS + 16 * wide, 16, NEXT),
                (DATA + LEN * wide, LEN, data_flags),
                (STATUS + wide, 1, WRITE),
            ];
            for (first, (at, len, flags)) in (3 * nth..).zip(chain) {
                let next = u64::from(first + 1);
                let rest = len | u64::from(flags) << 32 | next << 48;
                let place = TABLE + 16 * u64::from(first);
                self.put(place, &at.to_le_bytes());
                self.put(place + 8, &rest.to_le_bytes());
            }
        }
        for element in 0..QUEUE_SIZE {
            let head = 3 * (element % ROUND);
            self.put(AVAILABLE + 4 + 2 * u64::from(element), &head.to_le_bytes());
        }
        self.put(DATA, &[7; 32 * 4096]);
    }

    /// Has [`ROUND`] requests done, each for a block of its own from `first` on.
    fn round(&mut self, first: u64) {
        let header = |block: u64| {
            let kind = u64::from(self.kind);
            let sector = block * BLOCK / 512;
            u128::from(kind) | u128::from(sector) << 64
        };
        let headers = (first..first + u64::from(ROUND)).map(header);
        let headers: Vec<u8> = headers.flat_map(u128::to_le_bytes).collect();
        self.put(HEADERS, &headers);
        self.index = self.index.wrapping_add(ROUND);
        self.put(AVAILABLE + 2, &self.index.to_le_bytes());
        self.bench.kick();
        for _ in 0..100 {
            self.bench.turn();
            if self.used() == self.index {
                return;
            }
        }
        panic!("{} of {} are answered", self.used(), self.index);
    }

    fn used(&self) -> u16 {
        let mut index = [0; 2];
        self.memory.read_exact_at(&mut index, USED + 2).unwrap();
        u16::from_le_bytes(index)
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    fn finish(self, status: u8) {
        let mut found = [0xff; 32];
        self.memory.read_exact_at(&mut found, STATUS).unwrap();
        assert_eq!(found, [status; 32]);
        self.bench.end(true).unwrap();
    }
}

/// An image whose first blocks are allocated.
fn image(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("a.vdi");
    let options = CreateOptions {
        capacity_bytes: BLOCKS * BLOCK,
        block_size: u32::try_from(BLOCK).unwrap(),
        kind: NewKind::Dynamic,
        uuid: None,
    };
    create(&path, &options).unwrap();
    let mut driver = Driver::new(&path, OUT);
    driver.round(0);
    driver.finish(0);
    path
}

fn serve(image: &Path, kind: u32, rounds: u64, first_of: impl Fn(u64) -> u64, status: u8) {
    let mut driver = Driver::new(image, kind);
    // What happens once, such as marking the image, happens here.
    driver.round(0);
    for round in 0..rounds {
        driver.round(first_of(round));
    }
    driver.finish(status);
}

/// Asks the map alone.
fn look_up(image: &Path, rounds: u64) {
    let file = HostFile::open(image, Access::ReadOnly, Locking::Locked).unwrap();
    let disk = Disk::open(Arc::new(file) as Arc<dyn Storage>, Access::ReadOnly).unwrap();
    let lane = disk.lane();
    for nth in 0..rounds * u64::from(ROUND) {
        let sector = Sector(nth % u64::from(ROUND) * BLOCK / 512);
        let range = disk.capacity().range(sector, LEN / 512).unwrap();
        let visit = lane.enter();
        for extent in disk.map(black_box(range), &visit) {
            black_box(extent);
        }
    }
}

fn main() {
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    let (Some(step), Some(rounds)) = (words.next(), words.next()) else {
        println!("ci/instructions counts the instructions of this program");
        return;
    };
    let rounds: u64 = rounds.parse().unwrap();
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let image = image(directory.path());
    let wide = u64::from(ROUND);
    match step.as_str() {
        "parse" => serve(&image, UNKNOWN, rounds, |_| 0, 2),
        "map" => look_up(&image, rounds),
        "read" => serve(&image, IN, rounds, |_| 0, 0),
        "read-nothing" => serve(&image, IN, rounds, |_| wide, 0),
        "write" => serve(&image, OUT, rounds, |_| 0, 0),
        "allocate" => serve(&image, OUT, rounds, |round| (round + 1) * wide, 0),
        other => panic!("there is no step {other}"),
    }
}
