//! DEVICE_STATE: what a front end loads is heeded as long as the front end is there, and is waited for a little while.

use std::io::{PipeReader, PipeWriter, Write, pipe};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vdi_tests::driver::raw::{NEED_REPLY, RawFrontEnd, VERSION};
use vdi_tests::soon::soon;
use vhost::vhost_user::message::FrontendReq;

use crate::front_end::{Bench, code, vring_state};

/// Direction and phase of a state that is loaded while the device is stopped.
const LOAD: [u32; 2] = [1, 0];

/// A front end that has begun to load a state.
fn loading(bench: &Bench) -> (RawFrontEnd, PipeWriter) {
    let (read, write): (PipeReader, PipeWriter) = pipe().unwrap();
    let mut front_end = bench.negotiated();
    let payload = LOAD.map(u32::to_ne_bytes).concat();
    let request = code(FrontendReq::SET_DEVICE_STATE_FD);
    let answer = front_end.ask(request, &payload, &[read.as_raw_fd()]);
    // Bit 8 says that no other file is given.
    assert_eq!(answer.expect_u64(), 1 << 8);
    (front_end, write)
}

fn check(front_end: &mut RawFrontEnd) -> bool {
    let answer = front_end.ask(code(FrontendReq::CHECK_DEVICE_STATE), &[], &[]);
    !answer.refuses()
}

#[test]
fn a_state_may_end_a_little_after_it_is_asked_for() {
    let bench = Bench::new();
    let request = code(FrontendReq::CHECK_DEVICE_STATE);
    let limit = Duration::from_millis(700);
    soon(limit, || {
        let (mut front_end, state) = loading(&bench);
        let begun = Instant::now();
        front_end.send(request, VERSION | NEED_REPLY, 0, &[], &[]);
        std::thread::sleep(Duration::from_millis(200));
        drop(state);
        let took = begun.elapsed();
        let answer = front_end.reply().expect_u64();
        // A whole second is too long for the daemon.
        assert!(answer == 0 || took >= limit, "{answer} after {took:?}");
        took
    });
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn a_state_that_does_not_end_is_not_waited_for_long() {
    let bench = Bench::new();
    let (mut front_end, _state) = loading(&bench);
    let start = Instant::now();
    assert!(!check(&mut front_end));
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(front_end);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn a_state_that_was_begun_is_forgotten_with_its_front_end() {
    let bench = Bench::new();
    let (front_end, mut state) = loading(&bench);
    state.write_all(b"another device's").unwrap();
    drop(front_end);
    let mut next = bench.negotiated();
    assert!(check(&mut next));
    // What this one loads is heeded.
    let payload = vring_state(LOAD[0], LOAD[1]);
    let (read, mut write) = pipe().unwrap();
    write.write_all(b"another device's").unwrap();
    let request = code(FrontendReq::SET_DEVICE_STATE_FD);
    let answer = next.ask(request, &payload, &[read.as_raw_fd()]);
    assert_eq!(answer.expect_u64(), 1 << 8);
    assert!(!check(&mut next));
    drop(next);
    bench.expect_service();
    bench.expect_good_end();
}
