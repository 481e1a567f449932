//! Rings that a front end sets up wrongly, or changes while they run: each such message is refused, and the log says why, once.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Instant;

use nix::sys::eventfd::EventFd;
use vdi_tests::driver::PATIENCE;
use vdi_tests::driver::raw::{RawFrontEnd, VERSION};
use vdi_tests::image::MIB;
use vhost::vhost_user::message::FrontendReq;

use crate::front_end::{Bench, code, memfd, memory_table, vring_state, words};

/// Where the rings of these tests are: the table, the used ring, the available ring, no log.
const PLACES: [u64; 4] = [0x1000, 0x2000, 0x3000, 0];

fn addresses(places: [u64; 4]) -> Vec<u8> {
    [vring_state(0, 0), words(&places)].concat()
}

fn expect_done(front_end: &mut RawFrontEnd, request: FrontendReq, payload: &[u8], fds: &[RawFd]) {
    let answer = front_end.ask(code(request), payload, fds);
    assert_eq!(answer.expect_u64(), 0, "{request:?}");
}

/// A front end with 1 MiB of memory, and a ring of 128 that it has not placed yet.
fn with_memory(bench: &Bench) -> RawFrontEnd {
    let (mut front_end, memory) = (bench.negotiated(), memfd(MIB));
    let table = memory_table(1, &[[0, MIB, 0, 0]]);
    let fds = [memory.as_raw_fd()];
    expect_done(&mut front_end, FrontendReq::SET_MEM_TABLE, &table, &fds);
    let size = vring_state(0, 128);
    expect_done(&mut front_end, FrontendReq::SET_VRING_NUM, &size, &[]);
    front_end
}

fn kick(front_end: &mut RawFrontEnd, event: &EventFd) -> bool {
    let fds = [event.as_fd().as_raw_fd()];
    let answer = front_end.ask(code(FrontendReq::SET_VRING_KICK), &words(&[0]), &fds);
    !answer.refuses()
}

/// The same, and the ring runs.
fn running(bench: &Bench) -> RawFrontEnd {
    let mut front_end = with_memory(bench);
    let places = addresses(PLACES);
    expect_done(&mut front_end, FrontendReq::SET_VRING_ADDR, &places, &[]);
    assert!(kick(&mut front_end, &EventFd::new().unwrap()));
    front_end
}

#[test]
fn ring_addresses_outside_memory_or_misaligned_are_refused() {
    let bench = Bench::new();
    // The first byte is in the memory and the last is not: that is known when the ring starts.
    for (places, is_known_at_once) in [
        ([u64::MAX, 0x2000, 0x3000, 0], true),
        ([0x1000, 0xffff_ffff_ffff_f000, 0x3000, 0], true),
        ([0x1000, 0x2000, MIB, 0], true),
        ([0x1001, 0x2000, 0x3000, 0], true),
        ([0x1000, 0x2001, 0x3000, 0], true),
        ([0x1000, 0x2000, 0x3001, 0], true),
        ([MIB - 16, 0x2000, 0x3000, 0], false),
        ([0x1000, MIB - 8, 0x3000, 0], false),
        ([0x1000, 0x2000, MIB - 2, 0], false),
    ] {
        let mut front_end = with_memory(&bench);
        let set = FrontendReq::SET_VRING_ADDR;
        let is_refused = front_end.ask(code(set), &addresses(places), &[]).refuses();
        assert_eq!(is_refused, is_known_at_once, "{places:x?}");
        let starts = !is_refused && kick(&mut front_end, &EventFd::new().unwrap());
        assert!(!starts, "{places:x?}");
        drop(front_end);
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn a_ring_that_was_never_placed_does_not_start() {
    let bench = Bench::new();
    // There is memory at address 0, where its parts would be.
    let mut front_end = with_memory(&bench);
    assert!(!kick(&mut front_end, &EventFd::new().unwrap()));
    drop(front_end);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn a_ring_is_looked_for_in_the_memory_that_there_is_now() {
    let bench = Bench::new();
    let mut front_end = with_memory(&bench);
    let places = addresses(PLACES);
    expect_done(&mut front_end, FrontendReq::SET_VRING_ADDR, &places, &[]);
    // The front end has the same memory in the same place, and the guest sees it elsewhere.
    let (table, memory) = (memory_table(1, &[[1 << 32, MIB, 0, 0]]), memfd(MIB));
    let fds = [memory.as_raw_fd()];
    expect_done(&mut front_end, FrontendReq::SET_MEM_TABLE, &table, &fds);
    expect_done(&mut front_end, FrontendReq::SET_VRING_ADDR, &places, &[]);
    assert!(kick(&mut front_end, &EventFd::new().unwrap()));
    // One that runs may be told the same again.
    expect_done(&mut front_end, FrontendReq::SET_VRING_ADDR, &places, &[]);
    drop(front_end);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn memory_is_gone_with_its_front_end() {
    let bench = Bench::new();
    drop(with_memory(&bench));
    // Not for the next one to put a ring there.
    let mut next = bench.negotiated();
    let set = code(FrontendReq::SET_VRING_ADDR);
    assert!(next.ask(set, &addresses(PLACES), &[]).refuses());
    drop(next);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn a_running_ring_is_not_changed() {
    let bench = Bench::new();
    for (request, payload) in [
        (FrontendReq::SET_VRING_NUM, vring_state(0, 64)),
        (FrontendReq::SET_VRING_BASE, vring_state(0, 1)),
        (
            FrontendReq::SET_VRING_ADDR,
            addresses([0x4000, 0x5000, 0x6000, 0]),
        ),
    ] {
        let mut front_end = running(&bench);
        let answer = front_end.ask(code(request), &payload, &[]);
        assert!(answer.refuses(), "{request:?}");
        drop(front_end);
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn a_base_that_no_split_ring_has_is_refused() {
    let bench = Bench::new();
    for base in [65_536, 70_000, u32::MAX] {
        bench.expect_refusal(FrontendReq::SET_VRING_BASE, &vring_state(0, base), &[]);
    }
    bench.expect_good_end();
}

#[test]
fn a_file_that_is_no_eventfd_is_refused_for_kicks_calls_and_errors() {
    let bench = Bench::new();
    let (regular, (read, write)) = (memfd(4096), std::io::pipe().unwrap());
    for fd in [regular.as_raw_fd(), read.as_raw_fd(), write.as_raw_fd()] {
        for request in [
            FrontendReq::SET_VRING_KICK,
            FrontendReq::SET_VRING_CALL,
            FrontendReq::SET_VRING_ERR,
        ] {
            // All else is as it should be.
            let mut front_end = with_memory(&bench);
            let places = addresses(PLACES);
            expect_done(&mut front_end, FrontendReq::SET_VRING_ADDR, &places, &[]);
            let answer = front_end.ask(code(request), &words(&[0]), &[fd]);
            assert!(answer.refuses(), "{request:?}");
            drop(front_end);
        }
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn why_a_front_end_is_disconnected_is_told_in_one_line() {
    let bench = Bench::new();
    let lines = |what: &str| {
        let log = bench.server.log();
        log.lines().filter(|line| line.contains(what)).count()
    };
    let why = "the front end is disconnected: ";
    bench.expect_refusal(FrontendReq::SET_VRING_NUM, &vring_state(0, 3), &[]);
    assert_eq!(lines(why), 1);
    assert_eq!(lines("queue 0 cannot have 3 entries"), 1);
    let half = "the front end sent half a message";
    let mut silent = bench.negotiated();
    silent.send_bytes(&VERSION.to_ne_bytes());
    let deadline = Instant::now() + PATIENCE;
    while lines(half) == 0 {
        assert!(Instant::now() < deadline, "{}", bench.server.log());
    }
    drop(silent);
    bench.expect_service();
    assert_eq!((lines(why), lines(half)), (1, 1));
    bench.expect_good_end();
}
