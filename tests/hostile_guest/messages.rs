//! A front end that sends what it must not: it gets a no or is cut off, and the next one is served.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vdi_tests::driver::raw::{NEED_REPLY, REPLY, RawFrontEnd, Reply, VERSION};
use vdi_tests::driver::{Options, PATIENCE, feature};
use vdi_tests::image::{Image, MIB};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

fn code(request: FrontendReq) -> u32 {
    request.into()
}

struct Bench {
    server: Server,
    open_before: usize,
    _image: Image,
}

impl Bench {
    fn new() -> Self {
        let image = Image::by_qemu(8 * MIB);
        let server = Launch::image(image.path()).start();
        server.driver(&Options::new()).write(0, &[0x5a; 512]);
        let mut bench = Self {
            server,
            open_before: 0,
            _image: image,
        };
        bench.open_before = bench.settled();
        bench
    }

    /// Number of files that the daemon has open once it waits for a connection.
    fn settled(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        let mut last = self.open_files();
        loop {
            std::thread::sleep(Duration::from_millis(10));
            let now = self.open_files();
            if now == last && (self.open_before == 0 || now <= self.open_before) {
                return now;
            }
            if Instant::now() > deadline {
                return now;
            }
            last = now;
        }
    }

    fn open_files(&self) -> usize {
        let path = format!("/proc/{}/fd", self.server.pid());
        std::fs::read_dir(path).unwrap().count()
    }

    fn connect(&self) -> RawFrontEnd {
        RawFrontEnd::connect(self.server.socket()).unwrap()
    }

    /// A front end that has negotiated, so that every further message is answered.
    fn negotiated(&self) -> RawFrontEnd {
        let mut front_end = self.connect();
        let protocol = VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        let features = feature::PROTOCOL_FEATURES | feature::VERSION_1;
        let quiet = |front_end: &mut RawFrontEnd, request, payload: &[u8]| {
            let len = u32::try_from(payload.len()).unwrap();
            front_end.send(code(request), VERSION, len, payload, &[]);
        };
        quiet(&mut front_end, FrontendReq::SET_OWNER, &[]);
        quiet(&mut front_end, FrontendReq::GET_FEATURES, &[]);
        let offered = front_end.reply().expect_u64();
        assert_eq!(offered & features, features);
        let bits = protocol.bits().to_ne_bytes();
        quiet(&mut front_end, FrontendReq::GET_PROTOCOL_FEATURES, &[]);
        let _offered = front_end.reply().expect_u64();
        quiet(&mut front_end, FrontendReq::SET_PROTOCOL_FEATURES, &bits);
        let answer = front_end.ask(
            code(FrontendReq::SET_FEATURES),
            &features.to_ne_bytes(),
            &[],
        );
        assert_eq!(answer.expect_u64(), 0);
        front_end
    }

    /// The message must be refused, and the next front end served.
    fn expect_refusal(&self, request: FrontendReq, payload: &[u8], fds: &[RawFd]) {
        let mut front_end = self.negotiated();
        let answer = front_end.ask(code(request), payload, fds);
        assert!(answer.refuses(), "{request:?} {payload:x?}: {answer:?}");
        drop(front_end);
        self.expect_service();
    }

    fn expect_service(&self) {
        assert_eq!(
            self.server.driver(&Options::new()).read(0, 512),
            [0x5a; 512]
        );
    }

    /// The daemon runs, leaked no file and logged little.
    fn expect_good_end(self) {
        let open = self.settled();
        assert!(
            open <= self.open_before,
            "{} files are open, not {}",
            open,
            self.open_before
        );
        let exit = self.server.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        assert!(exit.log.len() < 65536, "it logged {} bytes", exit.log.len());
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `struct vhost_vring_state`.
fn vring_state(index: u32, number: u32) -> Vec<u8> {
    [index.to_ne_bytes(), number.to_ne_bytes()].concat()
}

/// Guest address, size, user address, offset in the file.
type RegionWords = [u64; 4];

fn memory_table(count: u32, regions: &[RegionWords]) -> Vec<u8> {
    let mut bytes = [count.to_ne_bytes(), [0; 4]].concat();
    bytes.extend(regions.iter().flat_map(|region| words(region)));
    bytes
}

fn memfd(len_bytes: u64) -> File {
    let file = File::from(memfd_create("region", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len_bytes).unwrap();
    file
}

#[test]
fn a_truncated_message_ends_the_connection_only() {
    let bench = Bench::new();
    for len in [1, 11] {
        let mut front_end = bench.connect();
        front_end.send_bytes(&[1; 12][..len]);
        front_end.shut();
        assert_eq!(front_end.reply(), Reply::Closed);
        bench.expect_service();
    }
    for len in [0, 3, 7] {
        let mut front_end = bench.negotiated();
        front_end.send(
            code(FrontendReq::SET_FEATURES),
            VERSION,
            8,
            &[0; 8][..len],
            &[],
        );
        front_end.shut();
        assert_eq!(front_end.reply(), Reply::Closed);
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn a_message_that_never_ends_does_not_keep_the_daemon_from_serving_or_ending() {
    let set_features = code(FrontendReq::SET_FEATURES);
    let header = [set_features, VERSION, 8].map(u32::to_ne_bytes).concat();
    for len in [1, 11, 12] {
        let bench = Bench::new();
        let mut silent = bench.connect();
        silent.send_bytes(&header[..len]);
        bench.expect_service();
        drop(silent);
        let mut silent = bench.negotiated();
        silent.send_bytes(&header[..len]);
        let exit = bench.server.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        assert!(
            exit.took < Duration::from_secs(3),
            "it took {:?} to end",
            exit.took
        );
    }
}

#[test]
fn a_front_end_that_does_not_read_its_answers_does_not_keep_the_daemon_from_ending() {
    let bench = Bench::new();
    let deaf = bench.negotiated();
    let get_features = [code(FrontendReq::GET_FEATURES), VERSION, 0].map(u32::to_ne_bytes);
    deaf.send_until_full(&get_features.concat());
    let exit = bench.server.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
    assert!(
        exit.took < Duration::from_secs(3),
        "it took {:?} to end",
        exit.took
    );
}

#[test]
fn a_message_of_another_length_than_its_type_has_is_refused() {
    let bench = Bench::new();
    for (request, len) in [
        (FrontendReq::SET_FEATURES, 4),
        (FrontendReq::SET_FEATURES, 16),
        (FrontendReq::SET_VRING_NUM, 4),
        (FrontendReq::SET_VRING_ADDR, 8),
        (FrontendReq::SET_MEM_TABLE, 0),
        (FrontendReq::SET_MEM_TABLE, 4),
        (FrontendReq::GET_CONFIG, 4),
    ] {
        bench.expect_refusal(request, &vec![0; len], &[]);
    }
    bench.expect_good_end();
}

#[test]
fn a_message_that_claims_to_be_huge_ends_the_connection() {
    let bench = Bench::new();
    for claimed in [4097, 1 << 20, u32::MAX] {
        let mut front_end = bench.negotiated();
        front_end.send(
            code(FrontendReq::SET_MEM_TABLE),
            VERSION | NEED_REPLY,
            claimed,
            &[0; 64],
            &[],
        );
        front_end.shut();
        assert!(front_end.reply().refuses(), "{claimed}");
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn an_unknown_request_is_refused() {
    let bench = Bench::new();
    for request in [0, 45, 100, 255, u32::MAX] {
        let mut front_end = bench.negotiated();
        let answer = front_end.ask(request, &[0; 8], &[]);
        assert!(answer.refuses(), "{request}: {answer:?}");
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn a_message_of_another_version_or_that_says_it_is_an_answer_is_refused() {
    let bench = Bench::new();
    for flags in [0, 2, 3, VERSION | REPLY, 0xffff_fff1] {
        let mut front_end = bench.negotiated();
        let features = feature::VERSION_1.to_ne_bytes();
        front_end.send(
            code(FrontendReq::SET_FEATURES),
            flags | NEED_REPLY,
            8,
            &features,
            &[],
        );
        front_end.shut();
        assert!(front_end.reply().refuses(), "flags {flags:#x}");
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn features_that_are_not_offered_are_refused() {
    let bench = Bench::new();
    for features in [
        feature::RING_PACKED,
        feature::NOTIFICATION_DATA,
        1 << 63,
        u64::MAX,
    ] {
        let all = features | feature::VERSION_1;
        bench.expect_refusal(FrontendReq::SET_FEATURES, &all.to_ne_bytes(), &[]);
    }
    bench.expect_good_end();
}

#[test]
fn an_illegal_ring_size_is_refused() {
    let bench = Bench::new();
    for size in [0, 3, 5, 127, 32769, 65535, 65536, u32::MAX] {
        bench.expect_refusal(FrontendReq::SET_VRING_NUM, &vring_state(0, size), &[]);
    }
    bench.expect_good_end();
}

#[test]
fn a_queue_that_does_not_exist_is_refused_in_every_message() {
    let bench = Bench::new();
    let file = memfd(4096);
    for index in [255, 256, 65536, u32::MAX] {
        for request in [
            FrontendReq::SET_VRING_NUM,
            FrontendReq::SET_VRING_BASE,
            FrontendReq::SET_VRING_ENABLE,
        ] {
            bench.expect_refusal(request, &vring_state(index, 1), &[]);
        }
        let address = [vring_state(index, 0), words(&[0; 4])].concat();
        bench.expect_refusal(FrontendReq::SET_VRING_ADDR, &address, &[]);
    }
    for request in [
        FrontendReq::SET_VRING_KICK,
        FrontendReq::SET_VRING_CALL,
        FrontendReq::SET_VRING_ERR,
    ] {
        bench.expect_refusal(request, &255_u64.to_ne_bytes(), &[file.as_raw_fd()]);
    }
    let mut front_end = bench.negotiated();
    let answer = front_end.ask(code(FrontendReq::GET_VRING_BASE), &vring_state(255, 0), &[]);
    assert!(
        matches!(answer, Reply::Closed | Reply::Message { .. }),
        "{answer:?}"
    );
    drop(front_end);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn ring_addresses_outside_memory_or_misaligned_are_refused_or_break_the_ring_only() {
    let bench = Bench::new();
    let file = memfd(MIB);
    for addresses in [
        [u64::MAX, 0, 0, 0],
        [0x1000, 0xffff_ffff_ffff_f000, 0x3000, 0],
        [MIB - 16, 0x2000, 0x3000, 0],
        [0x1000, MIB - 8, 0x3000, 0],
        [0x1000, 0x2000, MIB - 2, 0],
        [0x1001, 0x2000, 0x3000, 0],
        [0x1000, 0x2001, 0x3001, 0],
    ] {
        let mut front_end = bench.negotiated();
        let table = memory_table(1, &[[0, MIB, 0, 0]]);
        let answer = front_end.ask(
            code(FrontendReq::SET_MEM_TABLE),
            &table,
            &[file.as_raw_fd()],
        );
        assert_eq!(answer.expect_u64(), 0);
        let answer = front_end.ask(code(FrontendReq::SET_VRING_NUM), &vring_state(0, 128), &[]);
        assert_eq!(answer.expect_u64(), 0);
        // Table, used ring, available ring, log.
        let payload = [vring_state(0, 0), words(&addresses)].concat();
        let refused = front_end
            .ask(code(FrontendReq::SET_VRING_ADDR), &payload, &[])
            .refuses();
        if !refused {
            let kick = nix::sys::eventfd::EventFd::new().unwrap();
            kick.write(1).unwrap();
            let started = front_end.ask(
                code(FrontendReq::SET_VRING_KICK),
                &0_u64.to_ne_bytes(),
                &[std::os::fd::AsFd::as_fd(&kick).as_raw_fd()],
            );
            let enabled =
                front_end.ask(code(FrontendReq::SET_VRING_ENABLE), &vring_state(0, 1), &[]);
            std::thread::sleep(Duration::from_millis(5));
            println!("{addresses:x?}: {started:?} {enabled:?}");
        }
        drop(front_end);
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn memory_tables_that_lie_are_refused() {
    let bench = Bench::new();
    let (one, other) = (memfd(MIB), memfd(MIB));
    let two = [one.as_raw_fd(), other.as_raw_fd()];
    let lies: [(&str, Vec<u8>, usize); 12] = [
        (
            "larger than its file",
            memory_table(1, &[[0, 2 * MIB, 0, 0]]),
            1,
        ),
        (
            "beyond its file by its offset",
            memory_table(1, &[[0, MIB, 0, 4096]]),
            1,
        ),
        (
            "an offset that overflows",
            memory_table(1, &[[0, MIB, 0, u64::MAX - 4095]]),
            1,
        ),
        ("no length", memory_table(1, &[[0, 0, 0, 0]]), 1),
        ("all addresses", memory_table(1, &[[0, u64::MAX, 0, 0]]), 1),
        (
            "guest addresses that overflow",
            memory_table(1, &[[u64::MAX - 4095, MIB, 0, 0]]),
            1,
        ),
        (
            "user addresses that overflow",
            memory_table(1, &[[0, MIB, u64::MAX - 4095, 0]]),
            1,
        ),
        (
            "overlapping",
            memory_table(2, &[[0, MIB, 0, 0], [MIB / 2, MIB, 4 * MIB, 0]]),
            2,
        ),
        (
            "the same twice",
            memory_table(2, &[[0, MIB, 0, 0], [0, MIB, 0, 0]]),
            2,
        ),
        (
            "more files than regions",
            memory_table(1, &[[0, MIB, 0, 0]]),
            2,
        ),
        (
            "more regions than files",
            memory_table(2, &[[0, MIB, 0, 0], [MIB, MIB, MIB, 0]]),
            1,
        ),
        (
            "a count that is not there",
            memory_table(200, &[[0, MIB, 0, 0]]),
            1,
        ),
    ];
    for (name, table, files) in lies {
        println!("{name}");
        bench.expect_refusal(FrontendReq::SET_MEM_TABLE, &table, &two[..files]);
    }
    bench.expect_good_end();
}

#[test]
fn regions_that_cannot_be_added_or_removed_are_refused() {
    let bench = Bench::new();
    let file = memfd(MIB);
    let fd = [file.as_raw_fd()];
    let region = |region: RegionWords| [words(&[0]), words(&region)].concat();
    for lie in [
        [0, 2 * MIB, 0, 0],
        [0, 0, 0, 0],
        [u64::MAX - 4095, MIB, 0, 0],
        [0, MIB, 0, u64::MAX],
    ] {
        bench.expect_refusal(FrontendReq::ADD_MEM_REG, &region(lie), &fd);
    }
    bench.expect_refusal(FrontendReq::ADD_MEM_REG, &region([0, MIB, 0, 0]), &[]);
    bench.expect_refusal(FrontendReq::REM_MEM_REG, &region([0, MIB, 0, 0]), &[]);
    let mut front_end = bench.negotiated();
    let add = |front_end: &mut RawFrontEnd, words| {
        front_end.ask(code(FrontendReq::ADD_MEM_REG), &region(words), &fd)
    };
    assert_eq!(add(&mut front_end, [0, MIB, 0, 0]).expect_u64(), 0);
    assert!(add(&mut front_end, [MIB / 2, MIB, 8 * MIB, 0]).refuses());
    drop(front_end);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn a_file_that_is_no_memory_is_refused() {
    let bench = Bench::new();
    let directory = File::open("/").unwrap();
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    let read_only = File::open("/proc/self/exe").unwrap();
    for file in [directory, null, read_only] {
        let table = memory_table(1, &[[0, 4096, 0, 0]]);
        bench.expect_refusal(FrontendReq::SET_MEM_TABLE, &table, &[file.as_raw_fd()]);
    }
    bench.expect_good_end();
}

#[test]
fn messages_out_of_order_are_refused_or_harmless() {
    let bench = Bench::new();
    let file = memfd(4096);
    let fd = file.as_raw_fd();
    let early: [(FrontendReq, Vec<u8>, Vec<RawFd>); 8] = [
        (FrontendReq::GET_VRING_BASE, vring_state(0, 0), vec![]),
        (FrontendReq::SET_VRING_ENABLE, vring_state(0, 1), vec![]),
        (FrontendReq::SET_VRING_ENABLE, vring_state(0, 7), vec![]),
        (FrontendReq::SET_VRING_KICK, words(&[0]), vec![fd]),
        (
            FrontendReq::SET_VRING_ADDR,
            [vring_state(0, 0), words(&[0; 4])].concat(),
            vec![],
        ),
        (FrontendReq::RESET_OWNER, vec![], vec![]),
        (FrontendReq::SET_OWNER, vec![], vec![]),
        (FrontendReq::SET_VRING_BASE, vring_state(0, 70_000), vec![]),
    ];
    for (request, payload, fds) in early {
        let mut front_end = bench.negotiated();
        let answer = front_end.ask(code(request), &payload, &fds);
        assert_ne!(answer, Reply::Silence, "{request:?}");
        drop(front_end);
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn a_kick_file_that_is_no_eventfd_does_no_harm() {
    let bench = Bench::new();
    let regular = memfd(4096);
    let (pipe, closed) = std::io::pipe().unwrap();
    drop(closed);
    for fd in [regular.as_raw_fd(), pipe.as_raw_fd()] {
        let mut front_end = bench.negotiated();
        let memory = memfd(MIB);
        let table = memory_table(1, &[[0, MIB, 0, 0]]);
        let ask = |front_end: &mut RawFrontEnd, request, payload: &[u8], fds: &[RawFd]| {
            front_end.ask(code(request), payload, fds)
        };
        let set = ask(
            &mut front_end,
            FrontendReq::SET_MEM_TABLE,
            &table,
            &[memory.as_raw_fd()],
        );
        assert_eq!(set.expect_u64(), 0);
        ask(
            &mut front_end,
            FrontendReq::SET_VRING_NUM,
            &vring_state(0, 128),
            &[],
        );
        let addresses = [vring_state(0, 0), words(&[0x1000, 0x4000, 0x3000, 0])].concat();
        ask(&mut front_end, FrontendReq::SET_VRING_ADDR, &addresses, &[]);
        ask(
            &mut front_end,
            FrontendReq::SET_VRING_CALL,
            &words(&[0]),
            &[fd],
        );
        ask(
            &mut front_end,
            FrontendReq::SET_VRING_KICK,
            &words(&[0]),
            &[fd],
        );
        ask(
            &mut front_end,
            FrontendReq::SET_VRING_ENABLE,
            &vring_state(0, 1),
            &[],
        );
        std::thread::sleep(Duration::from_millis(20));
        drop(front_end);
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn files_that_no_message_asked_for_are_closed() {
    let bench = Bench::new();
    let file = memfd(4096);
    for count in [1, 8, 32] {
        let fds = vec![file.as_raw_fd(); count];
        for request in [
            FrontendReq::GET_FEATURES,
            FrontendReq::SET_VRING_NUM,
            FrontendReq::SET_VRING_KICK,
        ] {
            let mut front_end = bench.negotiated();
            let answer = front_end.ask(code(request), &vring_state(0, 128), &fds);
            assert_ne!(answer, Reply::Silence);
            drop(front_end);
        }
    }
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn random_bytes_end_the_connection_only() {
    let bench = Bench::new();
    let mut random = Random::printed();
    for round in 0..200 {
        let mut front_end = if round % 2 == 0 {
            bench.connect()
        } else {
            bench.negotiated()
        };
        let len = usize::try_from(random.within(12..300)).unwrap();
        let mut bytes = random.bytes(len);
        if round % 4 > 1 && len > 12 {
            // A header that makes sense, so that the payload is looked at.
            let request = u32::try_from(random.within(1..45)).unwrap();
            bytes[..4].copy_from_slice(&request.to_ne_bytes());
            bytes[4..8].copy_from_slice(&VERSION.to_ne_bytes());
            bytes[8..12].copy_from_slice(&u32::try_from(len - 12).unwrap().to_ne_bytes());
        }
        front_end.send_bytes(&bytes);
        front_end.shut();
        while !matches!(front_end.reply(), Reply::Closed) {}
    }
    bench.expect_service();
    bench.expect_good_end();
}
