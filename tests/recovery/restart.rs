//! A dead daemon's socket and locks are not in the way of the next one.

use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vdi_core::NewKind;
use vdi_tests::driver::{Layout, Options, Request};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, binary};

use crate::Place;

/// Not a measurement, which is `ci/restart-time`'s: only that nothing waits for a time-out, in a debug build on a busy
/// machine.
const SOON: Duration = Duration::from_secs(3);

#[test]
fn the_same_command_works_again_right_after_a_kill() {
    for cache in ["writeback", "direct"] {
        let image = Image::by_us(2 << 40, 1 << 20, NewKind::Dynamic);
        let place = Place::new();
        let launch = || Launch::image_at(image.path(), &place.socket()).args(["--cache", cache]);
        let mut server = launch().start();
        for round in 0..5 {
            let mut driver = server.driver(&Options::new());
            let data = vec![round; 1 << 20];
            let requests: Vec<_> = (0..16)
                .map(|nth| Request::write(nth * 2048, data.clone()))
                .collect();
            let layout = Layout::framed();
            let _tokens = driver
                .queue()
                .submit_all(requests.iter().map(|request| (request, &layout)));
            assert_eq!(server.kill().signal, Some(9));
            let _memory = driver.vanish();
            let before = Instant::now();
            server = launch().start();
            assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
        }
        assert_eq!(server.terminate().code, Some(0));
    }
}

#[test]
fn a_second_daemon_leaves_the_socket_and_the_image_of_a_living_one_alone() {
    let image = Image::by_qemu(16 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[3; 512]);
    let second = |path: &std::path::Path| {
        Command::new(binary("vdi-vhost"))
            .arg("--socket-path")
            .arg(path)
            .arg("--blk-file")
            .arg(image.path())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let refused = second(server.socket());
    assert_eq!(refused.status.code(), Some(1));
    let elsewhere = tempfile::tempdir().unwrap();
    let refused = second(&elsewhere.path().join("socket"));
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("is in use by another program"), "{said}");
    assert_eq!(driver.read(0, 512), [3; 512]);
    assert!(UnixStream::connect(server.socket()).is_ok());
}
