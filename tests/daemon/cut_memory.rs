//! Front ends that cut the files of what they share while it is in use: memory, the record of requests in flight, the dirty log.
//!
//! The session ends, the daemon lives and says why in one line, and nothing reaches the disk that the guest did not write.
//!
//! Whoever touches what is gone is killed by SIGBUS, this test too: after a cut it looks at nothing but what is left.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use vdi_tests::driver::{
    Base, Control, Descriptor, Driver, INDIRECT, Inflight, Layout, NEXT, Options, PATIENCE, Queue,
    Region, Request, UNTOUCHED, WRITE,
};
use vdi_tests::image::{Image, MIB};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server};
use vhost::vhost_user::message::{
    VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

const DISK: u64 = 32 * MIB;

/// What is on the first half of the disk; the other half is not allocated.
const OLD: u8 = 0x11;

/// What is in the guest's memory before it is cut.
const NEW: u8 = 0x22;

/// Memory for a load.
const LOADED: Region = Region::new(0, 64 * MIB);

/// Rings and what a driver looks at.
const KEPT: Region = Region::new(0, 16 * MIB);

/// What is cut, in the middle of its file.
const CUT: Region = Region {
    at: 16 * MIB,
    len_bytes: 16 * MIB,
    file_offset: 8192,
};

/// Cuts under load, for each of [`WAYS`].
const ROUNDS: usize = 12;

/// The engines and caches that data go through.
const WAYS: [&[&str]; 4] = [
    &["--engine", "io-uring"],
    &["--engine", "sync"],
    &["--cache", "direct"],
    &["--engine", "sync", "--cache", "direct"],
];

/// A daemon whose disk is [`OLD`] in its first half.
struct Bench {
    image: Image,
    server: Server,
    sessions: usize,
}

impl Bench {
    fn new(arguments: &[&str]) -> Self {
        let image = Image::by_qemu(DISK);
        let server = Launch::image(image.path())
            .args(["--num-queues", "2"])
            .args(arguments)
            .start();
        let mut driver = server.driver(&Options::new());
        for at in 0..DISK / 2 / MIB {
            driver.write(at * 2048, &[OLD; 1 << 20]);
        }
        driver.flush();
        drop(driver);
        Self {
            image,
            server,
            sessions: 0,
        }
    }

    fn driver(&self, options: &Options) -> Driver {
        self.server.driver(options)
    }

    /// The session ends by itself, and the daemon says that it is because of `what`; the next one finds the disk.
    fn expect_end(&mut self, control: &Control, what: &str) {
        expect_closed(control);
        self.sessions += 1;
        let log = self.expect_service();
        let said: Vec<_> = log
            .lines()
            .filter(|line| line.contains("is disconnected"))
            .collect();
        assert_eq!(said.len(), self.sessions, "{log}");
        assert!(said[self.sessions - 1].contains(what), "{log}");
        assert!(!log.contains("is stopped"), "{log}");
    }

    fn expect_service(&mut self) -> String {
        let mut driver = self.server.driver(&Options::new());
        let last = DISK / 2 / 512 - 8;
        assert!(driver.read(last, 4096) == [OLD; 4096]);
        drop(driver);
        assert!(self.server.is_alive());
        self.server.log()
    }

    /// The daemon ends well and the image is sound; what is on it.
    fn finish(self) -> Vec<u8> {
        let exit = self.server.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        qemu::expect_clean(self.image.path());
        vdi_tests::tool::vdi(vdi_tests::words!["check", self.image.path()]).expect_code(0);
        self.image.contents()
    }
}

fn expect_closed(control: &Control) {
    let mut socket = control.socket();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    match socket.read(&mut [0; 64]) {
        Ok(0) => {}
        Err(error) if error.raw_os_error() == Some(libc::ECONNRESET) => {}
        other => panic!("the session does not end: {other:?}"),
    }
}

fn two_regions() -> Options {
    Options::new().queues(2).memory(vec![KEPT, CUT])
}

fn memfd(len_bytes: u64) -> File {
    let file = File::from(memfd_create("cut", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len_bytes).unwrap();
    file
}

#[test]
fn memory_that_is_cut_while_idle_ends_the_session_at_the_next_kick() {
    for arguments in WAYS {
        let mut bench = Bench::new(arguments);
        // All of the file, or all of it that is shared.
        for (region, left) in [(KEPT, 0), (CUT, CUT.file_offset)] {
            let mut driver = bench.driver(&Options::new().memory(vec![region]));
            assert!(driver.read(0, 512) == [OLD; 512]);
            driver.memory.cut(region, left);
            driver.queue().kick();
            let what = format!(
                "the memory region of 16777216 bytes at {:#x} lies in a file that was cut to {left} bytes",
                region.at
            );
            bench.expect_end(&driver.control, &what);
        }
        bench.finish();
    }
}

/// Waits until all threads of the daemon sleep: after an answer a worker looks at its rings for a moment, and asks for a kick.
fn wait_for_sleep(server: &Server) {
    let start = Instant::now();
    let tasks = format!("/proc/{}/task", server.pid());
    let sleeps = |task: std::io::Result<std::fs::DirEntry>| {
        // One that has just ended is not listed the next time.
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat"));
        stat.is_ok_and(|stat| stat.rsplit_once(") ").unwrap().1.starts_with('S'))
    };
    while !std::fs::read_dir(&tasks).unwrap().all(sleeps) {
        assert!(start.elapsed() < PATIENCE, "the daemon never sleeps");
        std::thread::yield_now();
    }
}

#[test]
fn memory_that_is_cut_and_never_used_again_harms_nobody() {
    let mut bench = Bench::new(&[]);
    let mut driver = bench.driver(&Options::new().memory(vec![KEPT]));
    assert!(driver.read(0, 512) == [OLD; 512]);
    wait_for_sleep(&bench.server);
    driver.memory.cut(KEPT, 0);
    driver.control.stop(0).unwrap();
    drop(driver);
    let log = bench.expect_service();
    assert!(!log.contains("WARN"), "{log}");
    // A region that is taken away again.
    let mut driver = bench.driver(&two_regions());
    driver.memory.cut(CUT, 0);
    let message = driver.memory.message(CUT);
    driver.control.remove_region(&message).unwrap();
    assert!(driver.read(0, 512) == [OLD; 512]);
    drop(driver);
    bench.finish();
}

/// Every byte is what it was or what the guest wrote: nothing is torn between two, and there are no zeros but where
/// nothing was.
fn expect_old_or_new(disk: &[u8]) {
    let half = disk.len() / 2;
    let is_bad = |(at, byte): &(usize, &u8)| {
        let before = if *at < half { OLD } else { 0 };
        **byte != NEW && **byte != before
    };
    let mut bad = disk.iter().enumerate().filter(is_bad);
    if let Some((at, byte)) = bad.next() {
        let more = bad.count();
        panic!("byte {at} is {byte:#x}, which was never written, and {more} more are so");
    }
}

#[test]
fn memory_that_is_cut_under_load_ends_the_session_and_leaves_what_was_or_what_was_written() {
    let mut random = Random::printed();
    for arguments in WAYS {
        println!("{arguments:?}");
        let mut bench = Bench::new(arguments);
        for _ in 0..ROUNDS {
            let options = Options::new().queues(2).memory(vec![LOADED]);
            let mut driver = bench.driver(&options);
            // Where data begin, which have their pages for themselves.
            let mut at = LOADED.len_bytes / 2 + random.pick(&[0, 0, 1]);
            for queue in &mut driver.queues {
                for _ in 0..40 {
                    // All over the disk, but for what is read after each session.
                    let sector = 8 * random.within(0..DISK / 4096 - 64);
                    let sector = if sector + 256 > DISK / 1024 - 8 && sector < DISK / 1024 {
                        0
                    } else {
                        sector
                    };
                    let request = match random.within(0..3) {
                        0 => Request::read(sector, 131_072),
                        _ => Request::write(sector, vec![NEW; 131_072]),
                    };
                    let _token = queue.submit(&request, &Layout::framed().largest_at(at));
                    at += 131_072 + 4096;
                }
            }
            std::thread::sleep(Duration::from_micros(random.within(0..3000)));
            // The rings are at the beginning: with some of it left, the daemon may never come to what is gone.
            let left = *random.pick(&[0, 0, MIB, 33 * MIB, 36 * MIB]);
            driver.memory.cut(LOADED, left);
            driver.queues.iter_mut().for_each(Queue::kick);
            if left == 0 {
                expect_closed(&driver.control);
            } else {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let log = bench.expect_service();
        // To how many is chance, and not every session has a line.
        assert!(log.contains("bytes while it was in use"), "{log}");
        // Lines are few, however many sessions end so.
        assert!(log.matches("is disconnected").count() <= 10, "{log}");
        assert!(log.matches("a request failed").count() <= 10, "{log}");
        expect_old_or_new(&bench.finish());
    }
}

/// A request of which a part lies in [`CUT`].
struct Case {
    name: &'static str,
    arguments: &'static [&'static str],
    kind: u32,
    /// Where on the disk.
    sector: u64,
    /// What is in [`CUT`].
    part: Part,
}

enum Part {
    /// The data, which begin so far behind the beginning of a page.
    Data {
        behind: u64,
    },
    /// Half of the data; the other half is left.
    HalfOfData,
    Header,
    /// The half of the header that names the sector.
    HalfOfHeader,
    /// An indirect table.
    Table,
    /// The half of an indirect table that names the data and the status.
    HalfOfTable,
    Status,
}

const STORED: u64 = 2048;

const FREE: u64 = DISK / 1024 + 2048;

const DATA_BYTES: u32 = 65536;

const fn case(
    name: &'static str,
    arguments: &'static [&'static str],
    kind: u32,
    sector: u64,
    part: Part,
) -> Case {
    Case {
        name,
        arguments,
        kind,
        sector,
        part,
    }
}

const RING: &[&str] = WAYS[0];
const SYNC: &[&str] = WAYS[1];
const DIRECT: &[&str] = WAYS[2];
const DIRECT_SYNC: &[&str] = WAYS[3];
const DETECT: &[&str] = &["--detect-zeroes", "unmap"];
const PLAIN: Part = Part::Data { behind: 0 };
const ASKEW: Part = Part::Data { behind: 1 };

/// Every way in which a thread of the daemon, or the kernel for it, comes to what is gone.
const CASES: [Case; 26] = [
    case("overwrite", RING, VIRTIO_BLK_T_OUT, STORED, PLAIN),
    case("overwrite", SYNC, VIRTIO_BLK_T_OUT, STORED, PLAIN),
    case("overwrite", DIRECT, VIRTIO_BLK_T_OUT, STORED, PLAIN),
    case("overwrite askew", DIRECT, VIRTIO_BLK_T_OUT, STORED, ASKEW),
    case(
        "overwrite askew",
        DIRECT_SYNC,
        VIRTIO_BLK_T_OUT,
        STORED,
        ASKEW,
    ),
    case(
        "half an overwrite",
        RING,
        VIRTIO_BLK_T_OUT,
        STORED,
        Part::HalfOfData,
    ),
    case("first write", RING, VIRTIO_BLK_T_OUT, FREE, PLAIN),
    case("first write askew", DIRECT, VIRTIO_BLK_T_OUT, FREE, ASKEW),
    case(
        "write, looked at for zeros",
        DETECT,
        VIRTIO_BLK_T_OUT,
        STORED,
        PLAIN,
    ),
    case(
        "half a write, looked at for zeros",
        DETECT,
        VIRTIO_BLK_T_OUT,
        STORED,
        Part::HalfOfData,
    ),
    case("read", RING, VIRTIO_BLK_T_IN, STORED, PLAIN),
    case("read", SYNC, VIRTIO_BLK_T_IN, STORED, PLAIN),
    case("read askew", DIRECT, VIRTIO_BLK_T_IN, STORED, ASKEW),
    case("read of nothing", RING, VIRTIO_BLK_T_IN, FREE, PLAIN),
    case(
        "half a read of nothing",
        RING,
        VIRTIO_BLK_T_IN,
        FREE,
        Part::HalfOfData,
    ),
    case("id", RING, VIRTIO_BLK_T_GET_ID, 0, PLAIN),
    case("discard", RING, VIRTIO_BLK_T_DISCARD, 0, PLAIN),
    case(
        "half a segment",
        RING,
        VIRTIO_BLK_T_WRITE_ZEROES,
        0,
        Part::HalfOfData,
    ),
    case("write zeroes", RING, VIRTIO_BLK_T_WRITE_ZEROES, 0, PLAIN),
    case("header", RING, VIRTIO_BLK_T_OUT, STORED, Part::Header),
    case(
        "half a header",
        RING,
        VIRTIO_BLK_T_OUT,
        STORED,
        Part::HalfOfHeader,
    ),
    case("table", RING, VIRTIO_BLK_T_OUT, STORED, Part::Table),
    case(
        "half a table",
        RING,
        VIRTIO_BLK_T_OUT,
        STORED,
        Part::HalfOfTable,
    ),
    case(
        "status of a read",
        RING,
        VIRTIO_BLK_T_IN,
        STORED,
        Part::Status,
    ),
    case(
        "status of a write",
        RING,
        VIRTIO_BLK_T_OUT,
        STORED,
        Part::Status,
    ),
    case(
        "status of a flush",
        RING,
        VIRTIO_BLK_T_FLUSH,
        0,
        Part::Status,
    ),
];

fn descriptor(at: u64, len_bytes: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor {
        at,
        len_bytes,
        flags,
        next,
    }
}

impl Case {
    /// Where the daemon finds header, data (in two pieces), status and, if there is one, an indirect table.
    fn places(&self, driver: &Driver) -> ([u64; 4], Option<u64>) {
        let kept = driver.memory.allocate(MIB, 4096);
        let (kept, cut) = (kept.at(), CUT.at + MIB);
        let mut places = [
            kept,
            kept + 4096,
            kept + 4096 + u64::from(DATA_BYTES / 2),
            kept + 0x8_0000,
        ];
        let mut table = None;
        match self.part {
            Part::Data { behind } => {
                places[1] = cut + behind;
                places[2] = cut + behind + u64::from(DATA_BYTES / 2);
            }
            // Of a segment the half that says where it begins, or it would be of nothing.
            Part::HalfOfData if self.kind == VIRTIO_BLK_T_WRITE_ZEROES => places[1] = cut,
            Part::HalfOfData => places[2] = cut,
            Part::Header => places[0] = cut,
            // The border of what is left: it is in the middle of the header, or of the table.
            Part::HalfOfHeader => places[0] = CUT.at + 4096 - 8,
            Part::Table => table = Some(cut),
            Part::HalfOfTable => table = Some(CUT.at + 4096 - 16),
            Part::Status => places[3] = cut,
        }
        (places, table)
    }

    /// Writes the request into memory, cuts that, and shows it to the daemon; where its status is.
    fn run(&self, driver: &mut Driver) -> u64 {
        let ([header, front, back, status], table) = self.places(driver);
        let memory = driver.memory.clone();
        let kind = self.kind.to_le_bytes();
        memory.write(
            header,
            &[&kind[..], &[0; 4], &self.sector.to_le_bytes()].concat(),
        );
        let half = DATA_BYTES / 2;
        let mut len = half;
        match self.kind {
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                len = 8;
                let segment = [&STORED.to_le_bytes()[..], &128_u32.to_le_bytes(), &[0; 4]].concat();
                memory.write(front, &segment[..8]);
                memory.write(back, &segment[8..]);
            }
            VIRTIO_BLK_T_OUT => {
                memory.write(front, &vec![NEW; half as usize]);
                memory.write(back, &vec![NEW; half as usize]);
            }
            _ => {}
        }
        memory.write(status, &[UNTOUCHED]);
        let from_device = match self.kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID => WRITE,
            _ => 0,
        };
        let first = if table.is_some() { 0 } else { 64 };
        let chain = [
            descriptor(header, 16, NEXT, first + 1),
            descriptor(front, len, NEXT | from_device, first + 2),
            descriptor(back, len, NEXT | from_device, first + 3),
            descriptor(status, 1, WRITE, 0),
        ];
        let mut shown = chain.to_vec();
        if let Some(at) = table {
            let bytes: Vec<u8> = chain.iter().flat_map(|one| one.to_bytes()).collect();
            memory.write(at, &bytes);
            shown = vec![descriptor(at, 64, INDIRECT, 0)];
        }
        memory.cut(CUT, CUT.file_offset + 4096);
        driver.queue().offer_chain(64, &shown);
        status
    }
}

#[test]
fn no_part_of_a_request_that_is_cut_away_is_taken_for_zeros() {
    for case in CASES {
        println!("{}, {:?}", case.name, case.arguments);
        let mut bench = Bench::new(case.arguments);
        let mut driver = bench.driver(&two_regions());
        assert!(driver.queues[1].read(0, 512) == [OLD; 512]);
        let status = case.run(&mut driver);
        bench.expect_end(
            &driver.control,
            "the memory region of 16777216 bytes at 0x1000000",
        );
        let answered = driver.queues[0].ring().used_index() != 0;
        let succeeded = match case.part {
            Part::Status => true,
            _ => u32::from(driver.memory.read(status, 1)[0]) == VIRTIO_BLK_S_OK,
        };
        assert!(!(answered && succeeded), "{}", case.name);
        let disk = bench.finish();
        expect_old_or_new(&disk);
        // What a request got as far as that may be there, and nowhere else.
        let may_change = matches!(case.part, Part::HalfOfData | Part::Status);
        let place = usize::try_from(case.sector * 512).unwrap();
        let place = place..place + DATA_BYTES as usize;
        let stray = (0..)
            .zip(&disk)
            .find(|(at, byte)| **byte == NEW && !(may_change && place.contains(at)));
        assert_eq!(stray, None, "{}", case.name);
    }
}

/// A write is queued, a thread looks at another request in the page of the write's data and finds it gone, and only then the
/// kernel comes for the data: they are zeros, and must not hide what the parent has.
#[test]
fn zeros_in_the_place_of_data_do_not_become_visible() {
    let (parent, child) = (Bench::new(&[]), Image::nowhere());
    let parent_path = parent.image.path().to_owned();
    let Bench {
        image: _parent,
        server,
        ..
    } = parent;
    assert_eq!(server.terminate().code, Some(0));
    vdi_tests::tool::vdi(vdi_tests::words!["snapshot", parent_path, child.path()]).expect_code(0);
    let server = Launch::image(child.path())
        .args(["--cache", "direct", "--image-dir"])
        .arg(parent_path.parent().unwrap())
        .start();
    let mut bench = Bench {
        image: child,
        server,
        sessions: 0,
    };
    let mut driver = bench.driver(&two_regions());
    let memory = driver.memory.clone();
    let (kept, gone) = (memory.allocate(4096, 4096), CUT.at + MIB);
    let header = |sector: u64| {
        [
            &VIRTIO_BLK_T_OUT.to_le_bytes()[..],
            &[0; 4],
            &sector.to_le_bytes(),
        ]
        .concat()
    };
    kept.write(&header(STORED));
    memory.write(gone, &[NEW; 2048]);
    memory.write(gone + 2048, &header(STORED + 2048));
    let ring = driver.queue().ring();
    let chain = |first, header, data| {
        [
            descriptor(header, 16, NEXT, first + 1),
            descriptor(data, 2048, NEXT, first + 2),
            descriptor(kept.at() + 2048, 1, WRITE, 0),
        ]
    };
    for (first, header) in [(64, kept.at()), (80, gone + 2048)] {
        for (index, one) in (first..).zip(chain(first, header, gone)) {
            ring.set_descriptor(index, one);
        }
    }
    memory.cut(CUT, CUT.file_offset);
    driver.queue().offer_both(64, 80);
    bench.expect_end(&driver.control, "at 0x1000000");
    let mut driver = bench.driver(&Options::new());
    assert!(driver.read(STORED, 2 << 20) == vec![OLD; 2 << 20]);
    drop(driver);
    let exit = bench.server.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    vdi_tests::tool::vdi(vdi_tests::words!["check", bench.image.path()]).expect_code(0);
}

#[test]
fn the_record_of_requests_in_flight_can_be_cut() {
    for engine in ["io-uring", "sync"] {
        let mut bench = Bench::new(&["--engine", engine]);
        for under_load in [false, true] {
            let options = Options::new().queues(2).tracked();
            let mut driver = bench.driver(&options);
            let kept = driver.keep(&options);
            for queue in &mut driver.queues {
                queue.write(0, &[OLD; 4096]);
            }
            // A region of the front end's own: the daemon's cannot be cut.
            let own = driver.inflight.as_ref().unwrap();
            assert!(own.file.set_len(0).is_err());
            let len = own.message.mmap_size;
            let file = memfd(len);
            let region = |file: &File| Inflight {
                message: VhostUserInflight::new(len, 0, 2, 128),
                file: file.try_clone().unwrap(),
            };
            drop(driver.control);
            let mut kept = kept;
            *kept.inflight_mut().unwrap() = region(&file);
            let control = kept.reconnect(bench.server.socket(), Base::Used).unwrap();
            for queue in &mut driver.queues {
                queue.write(0, &[OLD; 4096]);
                for nth in (0..40).filter(|_| under_load) {
                    let write = Request::write(nth * 128, vec![NEW; 65536]);
                    let _token = queue.submit(&write, &Layout::framed());
                }
            }
            file.set_len(0).unwrap();
            let read = Request::read(0, 4096);
            let _token = driver.queues[1].submit(&read, &Layout::framed());
            bench.expect_end(&control, "the in-flight region of");
        }
        expect_old_or_new(&bench.finish());
    }
}

#[test]
fn a_record_of_requests_in_flight_that_is_cut_before_the_rings_start_starts_none() {
    let mut bench = Bench::new(&[]);
    let file = memfd(65536);
    let region = Inflight {
        message: VhostUserInflight::new(8192, 0, 1, 128),
        file: file.try_clone().unwrap(),
    };
    let mut options = Options::new();
    options.wanted.protocol |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    let mut control = bench.server.control(&options);
    control.set_inflight(&region).unwrap();
    let memory = vdi_tests::driver::Memory::new(&[KEPT]);
    control.set_memory(&memory.messages()).unwrap();
    file.set_len(0).unwrap();
    let queue = Queue::new(0, &memory, 128, true);
    assert!(control.start(&queue, 0).is_err());
    drop(control);
    let log = bench.expect_service();
    assert!(log.contains("cannot start in memory that is gone"), "{log}");
    bench.finish();
}

#[test]
fn the_dirty_log_can_be_cut() {
    const LOG_BYTES: u64 = 2 * 4096;
    for engine in ["io-uring", "sync"] {
        let mut bench = Bench::new(&["--engine", engine]);
        for under_load in [false, true] {
            let mut options = Options::new().queues(2);
            options.wanted.protocol |= VhostUserProtocolFeatures::LOG_SHMFD;
            let mut driver = bench.driver(&options);
            let log = memfd(LOG_BYTES);
            driver.control.set_log(&log, LOG_BYTES).unwrap();
            let all = driver.control.features() | VhostUserVirtioFeatures::LOG_ALL.bits();
            driver.control.accept(all).unwrap();
            for queue in &mut driver.queues {
                queue.write(0, &[OLD; 4096]);
                for nth in (0..40).filter(|_| under_load) {
                    let write = Request::write(nth * 128, vec![NEW; 65536]);
                    let _token = queue.submit(&write, &Layout::framed());
                }
            }
            log.set_len(0).unwrap();
            let read = Request::read(0, 4096);
            let _token = driver.queues[1].submit(&read, &Layout::framed());
            bench.expect_end(&driver.control, "the dirty log of 8192 bytes");
        }
        expect_old_or_new(&bench.finish());
    }
}

#[test]
fn a_bus_error_that_has_nothing_to_do_with_shared_memory_ends_the_daemon() {
    let bench = Bench::new(&[]);
    bench.server.signal(Signal::SIGBUS);
    let exit = bench.server.wait();
    assert_eq!(exit.signal, Some(Signal::SIGBUS as i32), "{}", exit.log);
}
