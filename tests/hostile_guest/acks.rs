//! REPLY_ACK, negotiated alone: a message that asks for an answer gets one, which says whether it was done, and one that does not
//! ask gets none.
//!
//! Source: QEMU `docs/interop/vhost-user.rst`, `VHOST_USER_PROTOCOL_F_REPLY_ACK`.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use nix::sys::eventfd::EventFd;
use vdi_tests::driver::raw::{NEED_REPLY, REPLY, RawFrontEnd, Reply, VERSION};
use vdi_tests::driver::{Options, feature};
use vdi_tests::image::MIB;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

use crate::front_end::{Bench, code, memfd, memory_table, vring_state, words};

/// A connection with these protocol features and no others.
fn negotiated(bench: &Bench, protocol: VhostUserProtocolFeatures) -> RawFrontEnd {
    let mut front_end = bench.connect();
    let features = feature::PROTOCOL_FEATURES | feature::VERSION_1;
    send(&mut front_end, FrontendReq::GET_FEATURES, &[], &[]);
    assert_eq!(front_end.reply().expect_u64() & features, features);
    send(&mut front_end, FrontendReq::GET_PROTOCOL_FEATURES, &[], &[]);
    let offered = front_end.reply().expect_u64();
    assert_eq!(offered & protocol.bits(), protocol.bits());
    let bits = protocol.bits().to_ne_bytes();
    let set = FrontendReq::SET_PROTOCOL_FEATURES;
    send(&mut front_end, set, &bits, &[]);
    front_end
}

fn send(front_end: &mut RawFrontEnd, request: FrontendReq, payload: &[u8], fds: &[RawFd]) {
    let len = u32::try_from(payload.len()).unwrap();
    front_end.send(code(request), VERSION, len, payload, fds);
}

/// That nothing was answered that was not taken: the next answer is to this.
fn expect_no_more(front_end: &mut RawFrontEnd) {
    for flags in [VERSION, VERSION | NEED_REPLY] {
        front_end.send(code(FrontendReq::GET_FEATURES), flags, 0, &[], &[]);
        match front_end.reply() {
            Reply::Message { request, .. } => {
                assert_eq!(request, code(FrontendReq::GET_FEATURES));
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A message's payload and files.
type Said = (FrontendReq, Vec<u8>, Vec<RawFd>);

/// All that a front end says to start a ring of 8 and to stop it, of what has no answer of its own.
fn messages(memory: RawFd, event: RawFd) -> Vec<Said> {
    let features = (feature::PROTOCOL_FEATURES | feature::VERSION_1).to_ne_bytes();
    let table = memory_table(1, &[[0, MIB, 0x7000_0000, 0]]);
    let (first, none) = (words(&[0]), Vec::new);
    let used = 0x7000_2000;
    let places = words(&[0x7000_0000, used, 0x7000_1000, 0]);
    vec![
        (FrontendReq::SET_OWNER, none(), none_of()),
        (FrontendReq::SET_FEATURES, features.to_vec(), none_of()),
        (FrontendReq::SET_MEM_TABLE, table, vec![memory]),
        (FrontendReq::SET_VRING_NUM, vring_state(0, 8), none_of()),
        (
            FrontendReq::SET_VRING_ADDR,
            [vring_state(0, 0), places].concat(),
            none_of(),
        ),
        (FrontendReq::SET_VRING_BASE, vring_state(0, 0), none_of()),
        (FrontendReq::SET_VRING_ERR, first.clone(), vec![event]),
        (FrontendReq::SET_VRING_CALL, first.clone(), vec![event]),
        (FrontendReq::SET_VRING_KICK, first, vec![event]),
        (FrontendReq::SET_VRING_ENABLE, vring_state(0, 1), none_of()),
        (FrontendReq::SET_VRING_ENABLE, vring_state(0, 0), none_of()),
        (FrontendReq::RESET_OWNER, none(), none_of()),
    ]
}

const fn none_of() -> Vec<RawFd> {
    Vec::new()
}

#[test]
fn each_message_that_asks_for_an_answer_gets_one_and_no_other_does() {
    let bench = Bench::new();
    let (memory, event) = (memfd(MIB), EventFd::new().unwrap());
    let messages = messages(memory.as_raw_fd(), event.as_fd().as_raw_fd());
    let mut front_end = negotiated(&bench, VhostUserProtocolFeatures::REPLY_ACK);
    for (request, payload, fds) in &messages {
        let answer = front_end.ask(code(*request), payload, fds);
        let good = Reply::Message {
            request: code(*request),
            flags: VERSION | REPLY,
            payload: words(&[0]),
        };
        assert_eq!(answer, good, "{request:?}");
        expect_no_more(&mut front_end);
        send(&mut front_end, *request, payload, fds);
        expect_no_more(&mut front_end);
    }
    // What is not done is answered, too.
    let refused = front_end.ask(code(FrontendReq::SET_VRING_NUM), &vring_state(0, 3), &[]);
    assert_ne!(refused.expect_u64(), 0);
    drop(front_end);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn without_the_feature_nobody_is_answered_who_asks() {
    let bench = Bench::new();
    let (memory, event) = (memfd(MIB), EventFd::new().unwrap());
    let mut front_end = negotiated(&bench, VhostUserProtocolFeatures::empty());
    for (request, payload, fds) in messages(memory.as_raw_fd(), event.as_fd().as_raw_fd()) {
        let len = u32::try_from(payload.len()).unwrap();
        front_end.send(code(request), VERSION | NEED_REPLY, len, &payload, &fds);
        expect_no_more(&mut front_end);
    }
    drop(front_end);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn a_front_end_that_waits_for_each_answer_needs_no_other_feature() {
    let bench = Bench::new();
    let options = Options::new().without_protocol(!VhostUserProtocolFeatures::REPLY_ACK);
    let mut driver = bench.server.driver(&options);
    driver.write(8, &[7; 512]);
    assert_eq!(driver.read(8, 512), [7; 512]);
    let base = driver.control.stop(0).unwrap();
    driver.control.start(&driver.queues[0], base).unwrap();
    assert_eq!(driver.read(8, 512), [7; 512]);
    drop(driver);
    bench.expect_good_end();
}
