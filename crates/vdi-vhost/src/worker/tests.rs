//! Several disks at one worker, turn by turn. A write to a block for which nobody made room stays in flight until somebody does the
//! disk's chores, so what waits for it can be seen to wait.

mod floods;
mod left_behind;
mod limits;
mod marks;
mod waits;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::task::Waker;

use vdi_core::{
    Access, CreateOptions, Disk, HostFile, Locking, ModifiedParent, NewKind, Storage, create,
};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::clock::Moment;
use crate::command::{Ack, Setup, Takeover};
use crate::complaints::Complaints;
use crate::dirty::Guest;
use crate::fuzzing::{self, GuestMemory, Wishes};
use crate::image_file::ImageFile;
use crate::limits::{Group, Limits, Throttle};
use crate::memory::Memory;
use crate::portion;
use crate::queue::{BURST, Mode, Vring};
use crate::stats::{KindSnapshot, Stats};
use crate::workers::Served;

/// Where a queue's parts are in its share of the memory.
const SHARE: u64 = 0x8000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x4000;
const DATA: u64 = 0x5000;
const QUEUES: u64 = 2;
/// As many descriptors as fit before the available ring.
const QUEUE_SIZE: u16 = 256;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

/// A worker and the way to it.
struct Scene {
    worker: Worker,
    doorbell: Arc<Doorbell>,
    orders: Sender<Order>,
}

/// A disk with a seat, its guest, and two queues.
struct TestDisk {
    number: SeatNumber,
    disk: Arc<Disk>,
    memory: File,
    image: File,
    guest: Guest,
    kicks: Vec<EventFd>,
    stats: Arc<Stats>,
    throttle: Arc<Throttle>,
    taken: Vec<u16>,
}

impl Scene {
    fn new() -> Self {
        Self::with(EngineChoice::Sync)
    }

    fn with(engine: EngineChoice) -> Self {
        let (orders, inbox) = mpsc::channel();
        let doorbell = Arc::new(Doorbell::new().unwrap());
        let worker = Worker::new(engine, Arc::clone(&doorbell), inbox, None).unwrap();
        Self {
            worker,
            doorbell,
            orders,
        }
    }

    fn turn(&mut self) {
        self.doorbell.ring();
        assert!(self.worker.turn());
    }

    /// A turn up to the syncs.
    fn turn_until_syncs(&mut self) {
        self.worker.tools.engine.turn(Wait::No);
        self.worker.hear();
        self.worker.reap();
        self.worker.begin();
        self.worker.reap();
        self.worker.settle();
    }

    fn tell(&mut self, seat: SeatNumber, command: Command) -> Receiver<io::Result<()>> {
        let (ack, acknowledged): (Ack, _) = mpsc::channel();
        self.orders.send(Order { seat, command, ack }).unwrap();
        self.turn();
        acknowledged
    }

    /// Does what is due for a disk, and what is due then.
    fn do_chores(&mut self, disk: &TestDisk) {
        for _ in 0..5 {
            while disk.disk.do_chores().unwrap() {}
            self.turn();
        }
    }

    fn seat(&mut self, number: SeatNumber) -> TestDisk {
        self.seat_with(number, |file, _| ImageFile::buffered(file))
    }

    /// One whose data go past the page cache.
    fn direct_seat(&mut self, number: SeatNumber) -> TestDisk {
        self.seat_with(number, |file, disk| {
            ImageFile::direct(file, Access::Writable, disk.data_area()).unwrap()
        })
    }

    fn seat_with(
        &mut self,
        number: SeatNumber,
        image: impl FnOnce(File, &Disk) -> ImageFile,
    ) -> TestDisk {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.vdi");
        let options = CreateOptions {
            capacity_bytes: 64 << 20,
            block_size: 1 << 20,
            kind: NewKind::Dynamic,
            uuid: None,
        };
        create(&path, &options).unwrap();
        let file = Arc::new(HostFile::open(&path, Access::Writable, Locking::Locked).unwrap());
        let storage = Arc::clone(&file) as Arc<dyn Storage>;
        let disk = Disk::open_chain(vec![storage], Access::Writable, ModifiedParent::Refuse);
        let disk = Arc::new(disk.unwrap());
        disk.set_housekeeper(Waker::from(Arc::new(fuzzing::NoBell)));
        let wishes = Wishes {
            features: 1 << 32 | 1 << 9,
            access: Access::Writable,
            discards: true,
            detects_zeros: 0,
        };
        let device = fuzzing::device(&disk, &wishes);
        device.ack_features(wishes.features);
        let image = image(file.file().try_clone().unwrap(), &disk);
        let sync_file = image.file_for_syncs();
        let (stats, throttle) = (Arc::<Stats>::default(), Arc::<Throttle>::default());
        let served = Served {
            disk: Arc::clone(&disk),
            images: [image].into(),
            device: Arc::new(device),
            complaints: Arc::new(Complaints::default()),
            stats: Arc::clone(&stats),
            throttle: Arc::clone(&throttle),
        };
        let sit = Command::Sit(Box::new(served), sync_file);
        assert!(self.tell(number, sit).try_recv().unwrap().is_ok());
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(QUEUES * SHARE).unwrap();
        let guest = fuzzing::map(&GuestMemory {
            file: &memory,
            regions: &[[0, QUEUES * SHARE, 0]],
            log: None,
        });
        let mut disk = TestDisk {
            number,
            disk,
            memory,
            image: file.file().try_clone().unwrap(),
            guest,
            kicks: Vec::new(),
            stats,
            throttle,
            taken: Vec::new(),
        };
        for index in 0..2 {
            self.start(&mut disk, index, Vec::new());
        }
        disk
    }

    /// Starts a queue, or starts it again where it stopped.
    fn start(&mut self, disk: &mut TestDisk, index: u16, left_behind: Vec<u16>) {
        self.start_as(disk, index, left_behind, Mode::Running);
    }

    fn start_as(&mut self, disk: &mut TestDisk, index: u16, left_behind: Vec<u16>, mode: Mode) {
        let shared = GuestMemoryAtomic::new(Memory::clone(&disk.guest.memory));
        let vring = Vring::new(shared, QUEUE_SIZE).unwrap();
        vring.set_queue_size(QUEUE_SIZE);
        let base = SHARE * u64::from(index);
        let placed = vring.set_queue_info(base, base + AVAILABLE, base + USED);
        placed.unwrap();
        let place = usize::from(index);
        if disk.taken.len() == place {
            disk.taken.push(0);
            disk.kicks.push(fuzzing::eventfd());
        }
        {
            let mut state = vring.get_mut();
            let queue = state.get_queue_mut();
            queue.set_ready(true);
            queue.set_next_avail(disk.taken[place]);
            queue.set_next_used(disk.taken[place]);
        }
        let setup = Setup {
            index,
            vring,
            error_fd: Arc::new(Mutex::new(None)),
            mode,
            tracker: None,
            left_behind,
        };
        let heard = fuzzing::copy(&disk.kicks[place]).into();
        let start = Command::Start(Box::new(setup), Some(heard), disk.guest.clone());
        assert!(self.tell(disk.number, start).try_recv().unwrap().is_ok());
    }
}

impl TestDisk {
    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    /// Makes a request for the first 512 bytes of a block available.
    fn offer(&mut self, queue: usize, kind: u32, block: u64) {
        self.offer_many(queue, kind, block, 1);
    }

    /// Makes so many of them available at once.
    fn offer_many(&mut self, queue: usize, kind: u32, block: u64, count: u16) {
        let base = SHARE * queue as u64;
        let data_flags = if kind == IN { 3 } else { 1 };
        let chain = [(HEADER, 16, 1_u64), (DATA, 512, data_flags), (STATUS, 1, 2)];
        let header = u128::from(kind) | u128::from(block * 2048) << 64;
        self.put(base + HEADER, &header.to_le_bytes());
        self.put(base + STATUS, &[0xff]);
        for chain_nth in 0..count {
            let head = 3 * chain_nth;
            for (nth, (at, len, flags)) in (u64::from(head)..).zip(chain) {
                let rest = len | flags << 32 | (nth + 1) << 48;
                self.put(base + 16 * nth, &(base + at).to_le_bytes());
                self.put(base + 16 * nth + 8, &u64::to_le_bytes(rest));
            }
            let element = u64::from(self.taken[queue] % QUEUE_SIZE);
            self.put(base + AVAILABLE + 4 + 2 * element, &head.to_le_bytes());
            self.taken[queue] += 1;
        }
        self.put(base + AVAILABLE + 2, &self.taken[queue].to_le_bytes());
        self.kicks[queue].write(1).unwrap();
    }

    /// The used index.
    fn used(&self, queue: usize) -> u16 {
        let (mut used, base) = ([0; 2], SHARE * queue as u64);
        self.memory
            .read_exact_at(&mut used, base + USED + 2)
            .unwrap();
        u16::from_le_bytes(used)
    }

    /// Whether all that was offered is answered, and well.
    fn is_answered(&self, queue: usize) -> bool {
        let mut status = [0];
        self.memory
            .read_exact_at(&mut status, SHARE * queue as u64 + STATUS)
            .unwrap();
        let answered = self.used(queue) == self.taken[queue];
        assert!(!answered || status == [0], "{status:?}");
        answered
    }
}

#[test]
fn a_disk_that_has_to_wait_delays_no_other_disk_at_its_worker() {
    let mut scene = Scene::new();
    let (mut slow, mut other) = (scene.seat(0), scene.seat(5));
    slow.offer(0, OUT, 3);
    other.offer(0, IN, 3);
    scene.turn();
    assert!(!slow.is_answered(0) && other.is_answered(0));
    // The slow one's drain and its next command wait for its write.
    let stopped = scene.tell(0, Command::Stop(0));
    let resumed = scene.tell(0, Command::Resume(1));
    assert!(stopped.try_recv().is_err() && resumed.try_recv().is_err());
    let paused = scene.tell(5, Command::Pause(1));
    assert!(paused.try_recv().unwrap().is_ok());
    other.offer(0, IN, 4);
    scene.turn();
    assert!(other.is_answered(0) && !slow.is_answered(0));
    // The other one leaves, and nothing of it stays.
    let left = scene.tell(5, Command::Leave);
    assert!(left.try_recv().unwrap().is_ok());
    assert_eq!(Arc::strong_count(&other.disk), 1);
    assert!(stopped.try_recv().is_err());
    scene.do_chores(&slow);
    assert!(slow.is_answered(0));
    assert!(stopped.try_recv().unwrap().is_ok() && resumed.try_recv().unwrap().is_ok());
}

#[test]
fn a_disk_leaves_when_what_it_has_in_flight_is_answered() {
    let mut scene = Scene::new();
    let (mut leaving, mut other) = (scene.seat(0), scene.seat(1));
    leaving.offer(0, OUT, 0);
    scene.turn();
    let left = scene.tell(0, Command::Leave);
    other.offer(1, IN, 0);
    scene.turn();
    assert!(left.try_recv().is_err() && other.is_answered(1));
    scene.do_chores(&leaving);
    assert!(leaving.is_answered(0) && left.try_recv().unwrap().is_ok());
    // What its last turn answered is counted, too.
    assert_eq!(leaving.stats.snapshot().write.requests, 1);
    assert_eq!(Arc::strong_count(&leaving.disk), 1);
    // Its number is another disk's now.
    let mut next = scene.seat(0);
    next.offer(0, IN, 0);
    scene.turn();
    assert!(next.is_answered(0));
}

#[test]
fn a_seat_takes_no_more_chains_than_its_share_and_then_begins_with_the_queue_that_had_to_wait() {
    let mut scene = Scene::new();
    let mut disk = scene.seat(0);
    assert_eq!(scene.worker.tools.share, MAX_TRANSFERS);
    let _others: Vec<_> = (1..128).map(|number| scene.seat(number)).collect();
    assert_eq!(scene.worker.tools.share, LEAST_SHARE);
    // So that writes to fresh blocks need not wait.
    disk.offer(0, OUT, 0);
    scene.turn();
    scene.do_chores(&disk);
    assert!(disk.is_answered(0));
    scene.worker.tools.share = 1;
    let mut first = Vec::new();
    for block in 1..4 {
        disk.offer(0, OUT, 2 * block);
        disk.offer(1, OUT, 2 * block + 1);
        scene.turn();
        first.push([disk.is_answered(0), disk.is_answered(1)]);
        scene.turn();
        assert!(disk.is_answered(0) && disk.is_answered(1));
    }
    assert_eq!(first, [[true, false]; 3]);
    disk.offer(0, OUT, 10);
    disk.offer(1, OUT, 11);
    scene.turn();
    disk.offer(0, OUT, 12);
    scene.turn();
    assert!(!disk.is_answered(0) && disk.is_answered(1));
}

#[test]
fn idle_seats_are_not_looked_at() {
    let mut scene = Scene::new();
    let mut disks: Vec<_> = (0..8).map(|number| scene.seat(number)).collect();
    for _ in 0..2 {
        scene.turn();
    }
    assert!(scene.worker.seats.active.is_empty());
    disks[6].offer(1, IN, 0);
    scene.turn();
    assert!(disks[6].is_answered(1));
    assert_eq!(scene.worker.seats.active, [6]);
}

/// A second that a test chose.
fn limits(json: &str) -> Limits {
    serde_json::from_str(json).unwrap()
}

fn second(seconds: u64) -> Moment {
    Moment(seconds * 1_000_000_000)
}

impl Scene {
    /// Stops the clock at this time.
    fn set_clock(&mut self, now: Moment) {
        self.worker.tools.is_stopped = true;
        self.worker.tools.now = now;
    }
}

impl Scene {
    /// A disk with something on its second queue that a dead daemon left in flight, the same read again and again. The first burst
    /// is started again, and another chain is available. If `limited`, the other queue is held.
    fn seat_with_rest(&mut self, limited: bool) -> TestDisk {
        let mut disk = self.seat(0);
        self.set_clock(second(10));
        disk.offer(1, IN, 0);
        self.turn();
        assert!(self.tell(0, Command::Stop(1)).try_recv().unwrap().is_ok());
        if limited {
            let slow = limits(r#"{"iops_total": 1}"#);
            disk.throttle.set_limits(&slow);
            for held in [false, true] {
                disk.offer(0, IN, 0);
                self.turn();
                assert_ne!(disk.is_answered(0), held);
            }
        }
        self.start(&mut disk, 1, vec![0; usize::from(REST)]);
        disk.offer(1, IN, 0);
        assert_eq!(disk.used(1), 1 + BURST);
        disk
    }
}

/// Two bursts and a part of one.
const REST: u16 = 2 * BURST + 6;

/// Where large reads go in the guest's memory.
const LARGE: u64 = 1 << 20;

/// A window of a read.
const WINDOW: u64 = portion::TURN_BYTES;

impl Scene {
    /// Lets a disk's guest have so much memory from [`LARGE`] on, and marks what is written of it there: which pages those are.
    fn log_large(&mut self, disk: &mut TestDisk, len: u64) -> impl Fn() -> Vec<u64> + use<> {
        let (log, log_bytes) = (tempfile::tempfile().unwrap(), (LARGE + len) / 4096 / 8 + 1);
        log.set_len(log_bytes).unwrap();
        disk.memory.set_len(LARGE + len).unwrap();
        disk.guest = fuzzing::map(&GuestMemory {
            file: &disk.memory,
            regions: &[[0, LARGE + len, 0]],
            log: Some((log.try_clone().unwrap(), log_bytes)),
        });
        let command = Command::Guest(disk.guest.clone(), Takeover::WhenIdle);
        let told = self.tell(disk.number, command);
        assert!(told.try_recv().unwrap().is_ok());
        move || {
            let mut bits = vec![0; usize::try_from(log_bytes).unwrap()];
            log.read_exact_at(&mut bits, 0).unwrap();
            let pages = (0_u64..).zip(bits).flat_map(|(byte, bits)| {
                let pages = (0..8).filter(move |bit| bits >> bit & 1 == 1);
                pages.map(move |bit| 8 * byte + bit)
            });
            pages
                .filter_map(|page| page.checked_sub(LARGE / 4096))
                .collect()
        }
    }
}

impl TestDisk {
    /// Reads so much from a block on into the large memory.
    fn offer_large(&mut self, block: u64, len: u64) {
        self.offer_large_one(IN, block, len);
    }

    fn offer_large_one(&mut self, kind: u32, block: u64, len: u64) {
        self.offer(0, kind, block);
        self.put(16, &LARGE.to_le_bytes());
        self.put(24, &u32::try_from(len).unwrap().to_le_bytes());
    }
}

#[test]
fn a_load_is_counted_by_kind_with_the_time_from_taking_to_answering() {
    let mut scene = Scene::new();
    let mut disk = scene.seat(0);
    scene.set_clock(second(1));
    let flush = 4;
    for kind in [IN, IN, IN] {
        disk.offer(0, kind, 3);
        scene.turn();
    }
    // It waits for room in the image.
    disk.offer(0, OUT, 3);
    scene.turn();
    assert_eq!(disk.stats.snapshot().in_flight_requests, 1);
    scene.set_clock(second(1).plus(2_500_000));
    scene.do_chores(&disk);
    disk.offer(1, flush, 0);
    scene.turn();
    scene.turn();
    assert!(disk.is_answered(0) && disk.is_answered(1));
    let stats = disk.stats.snapshot();
    let of = |kind: &KindSnapshot| {
        let late = kind
            .latencies
            .iter()
            .rev()
            .find(|bucket| bucket.requests > 0);
        let slowest = late.map(|bucket| bucket.at_most_us);
        (
            kind.requests,
            kind.bytes,
            kind.errors,
            kind.latency_us,
            slowest,
        )
    };
    assert_eq!(of(&stats.read), (3, 1536, 0, 0, Some(Some(1))));
    assert_eq!(of(&stats.write), (1, 512, 0, 2500, Some(Some(3072))));
    assert_eq!(of(&stats.flush), (1, 0, 0, 0, Some(Some(1))));
    assert_eq!(of(&stats.discard), (0, 0, 0, 0, None));
    assert_eq!((stats.syncs, stats.failed_syncs), (1, 0));
    assert_eq!((stats.in_flight_requests, stats.refused_requests), (0, 0));
    // Numbers stay when the seat goes.
    assert!(scene.tell(0, Command::Leave).try_recv().unwrap().is_ok());
    assert_eq!(disk.stats.snapshot(), stats);
}

impl TestDisk {
    /// Reads so much so many times into the large memory, at once.
    fn offer_many_large(&mut self, len: u64, count: u16) {
        self.offer_many(0, IN, 0, count);
        for nth in 0..u64::from(count) {
            let descriptor = 16 * (3 * nth + 1);
            self.put(descriptor, &LARGE.to_le_bytes());
            self.put(descriptor + 8, &u32::try_from(len).unwrap().to_le_bytes());
        }
    }
}

#[test]
fn a_disk_that_waits_can_be_asked_how_it_is() {
    let mut scene = Scene::new();
    let mut disk = scene.seat(3);
    scene.set_clock(second(1));
    disk.offer(0, OUT, 3);
    scene.turn();
    let paused = scene.tell(3, Command::Pause(0));
    let waits = scene.tell(3, Command::Resume(1));
    scene.set_clock(second(2));
    let ask = |scene: &mut Scene, number| {
        let (answer, answers) = mpsc::channel();
        scene.tell(number, Command::Dump(answer));
        answers.try_recv().ok()
    };
    let dump = ask(&mut scene, 3).unwrap();
    assert!(paused.try_recv().is_err() && waits.try_recv().is_err());
    assert_eq!((dump.pending, dump.commands), (Some("pause"), 1));
    assert_eq!((dump.parked, dump.queues.len()), (1, 2));
    let [request] = &dump.oldest[..] else {
        panic!("one request: {dump:?}");
    };
    assert_eq!((request.stage, request.age_us), ("room", 1_000_000));
    assert!(ask(&mut scene, 0).is_none());
    scene.do_chores(&disk);
    assert!(disk.is_answered(0) && waits.try_recv().is_ok());
    // Never more than so many, the oldest ones.
    let mut disk = scene.seat(4);
    disk.offer_many(0, OUT, 9, 40);
    scene.turn();
    scene.turn();
    scene.set_clock(second(4));
    disk.offer(1, OUT, 9);
    scene.turn();
    let dump = ask(&mut scene, 4).unwrap();
    assert_eq!((dump.parked, dump.oldest.len()), (41, crate::dump::OLDEST));
    assert!(dump.oldest.iter().all(|request| request.queue == 0));
}
