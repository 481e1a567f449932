//! Messages that are well-formed and wrong: queues that do not exist, memory that lies, the wrong order. Each gets a
//! no or does no harm, and the next front end is served.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vdi_tests::driver::raw::{RawFrontEnd, Reply};
use vdi_tests::driver::{PATIENCE, feature};
use vdi_tests::image::MIB;
use vhost::vhost_user::message::FrontendReq;

use crate::front_end::{Bench, RegionWords, code, memfd, memory_table, vring_state, words};

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
fn protocol_features_that_are_not_offered_are_refused() {
    let bench = Bench::new();
    let mut front_end = bench.negotiated();
    let get = FrontendReq::GET_PROTOCOL_FEATURES;
    let offered = front_end.ask(code(get), &[], &[]).expect_u64();
    drop(front_end);
    for more in (0..64)
        .map(|bit| 1_u64 << bit)
        .filter(|bit| offered & bit == 0)
    {
        let all = (offered | more).to_ne_bytes();
        bench.expect_refusal(FrontendReq::SET_PROTOCOL_FEATURES, &all, &[]);
    }
    bench.expect_good_end();
}

#[test]
fn an_illegal_ring_size_is_refused() {
    let bench = Bench::new();
    for size in [0, 3, 5, 127, 2048, 32768, 32769, 65535, 65536, u32::MAX] {
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
fn the_way_back_is_closed_with_its_front_end() {
    let bench = Bench::new();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut front_end = bench.negotiated();
    let request = code(FrontendReq::SET_BACKEND_REQ_FD);
    let answer = front_end.ask(request, &[], &[theirs.as_raw_fd()]);
    assert_eq!(answer.expect_u64(), 0);
    drop((front_end, theirs));
    assert_eq!(ours.read(&mut [0; 12]).unwrap(), 0);
    bench.expect_service();
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
