//! Messages that are none: cut off, too long, unknown. The connection ends, and the next one is served.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vdi_tests::driver::feature;
use vdi_tests::driver::raw::{NEED_REPLY, REPLY, Reply, VERSION};
use vdi_tests::random::Random;
use vdi_tests::soon::soon;
use vhost::vhost_user::message::FrontendReq;

use crate::front_end::{Bench, code, memfd, memory_table, vring_state, words};

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
    }
}

#[test]
fn half_a_message_and_a_hang_up_do_not_delay_the_next_front_end() {
    let bench = Bench::new();
    let header = [code(FrontendReq::SET_FEATURES), VERSION, 8].map(u32::to_ne_bytes);
    for len in [1, 11] {
        // Whether the daemon gets to wait for the rest before the end.
        for pause_ms in [0, 50] {
            for shuts in [false, true] {
                soon(Duration::from_millis(500), || {
                    let mut silent = bench.negotiated();
                    silent.send_bytes(&header.concat()[..len]);
                    std::thread::sleep(Duration::from_millis(pause_ms));
                    let start = Instant::now();
                    if shuts {
                        silent.shut();
                        assert_eq!(silent.reply(), Reply::Closed);
                    }
                    drop(silent);
                    bench.expect_service();
                    start.elapsed()
                });
            }
        }
    }
    bench.expect_good_end();
}

#[test]
fn a_message_whose_header_comes_in_pieces_is_understood() {
    let bench = Bench::new();
    let get_features = [code(FrontendReq::GET_FEATURES), VERSION, 0].map(u32::to_ne_bytes);
    let limit = Duration::from_millis(500);
    soon(limit, || {
        let mut slow = bench.connect();
        let begun = Instant::now();
        for byte in get_features.concat() {
            slow.send_bytes(&[byte]);
            std::thread::sleep(Duration::from_millis(2));
        }
        let took = begun.elapsed();
        // A whole second is too long for the daemon.
        if took < limit {
            assert_ne!(slow.reply().expect_u64(), 0);
        }
        took
    });
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn thousands_of_connections_leave_a_daemon_that_serves_and_a_short_log() {
    const CONNECTIONS: usize = 4000;
    const AT_ONCE: usize = 64;
    let bench = Bench::new();
    let mut waiting = VecDeque::new();
    for nth in 0..CONNECTIONS {
        waiting.push_back(bench.connect());
        // The daemon serves the oldest; the others wait, and many go before it is their turn.
        if waiting.len() > AT_ONCE {
            let gone = if nth % 3 == 0 {
                waiting.pop_back()
            } else {
                waiting.pop_front()
            };
            drop(gone);
        }
    }
    drop(waiting);
    bench.expect_service();
    bench.expect_good_end();
}

#[test]
fn every_message_of_every_short_length_is_answered_or_ends_the_connection() {
    let bench = Bench::new();
    for request in 1..=44 {
        for len in [0, 1, 4, 7, 8, 9, 12, 16, 20, 32, 40, 41, 48] {
            let mut front_end = bench.negotiated();
            front_end.send(
                request,
                VERSION | NEED_REPLY,
                len,
                &vec![0xff; len as usize],
                &[],
            );
            front_end.shut();
            while !matches!(front_end.reply(), Reply::Closed) {}
        }
        bench.expect_service();
    }
    bench.expect_good_end();
}

#[test]
fn a_message_without_the_file_that_it_needs_is_refused() {
    let bench = Bench::new();
    // All else about them is as it should be.
    let region = [0, 4096, 0, 0];
    let one_queue = 1_u64 | 128 << 16;
    for (request, payload) in [
        (FrontendReq::SET_MEM_TABLE, memory_table(1, &[region])),
        (
            FrontendReq::ADD_MEM_REG,
            [words(&[0]), words(&region)].concat(),
        ),
        (FrontendReq::SET_LOG_BASE, words(&[4096, 0])),
        (FrontendReq::SET_INFLIGHT_FD, words(&[4096, 0, one_queue])),
        (FrontendReq::SET_VRING_KICK, words(&[0])),
        (FrontendReq::SET_VRING_CALL, words(&[0])),
        (FrontendReq::SET_VRING_ERR, words(&[0])),
        (FrontendReq::SET_DEVICE_STATE_FD, vring_state(1, 0)),
        (FrontendReq::SET_BACKEND_REQ_FD, Vec::new()),
    ] {
        bench.expect_refusal(request, &payload, &[]);
    }
    bench.expect_good_end();
}

#[test]
fn a_front_end_that_does_not_read_its_answers_does_not_keep_the_daemon_from_ending() {
    let bench = Bench::new();
    let deaf = bench.negotiated();
    let get_features = [code(FrontendReq::GET_FEATURES), VERSION, 0].map(u32::to_ne_bytes);
    deaf.send_until_full(&get_features.concat());
    let exit = bench.server.terminate();
    assert_eq!(exit.code, Some(0), "{}", exit.log);
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
