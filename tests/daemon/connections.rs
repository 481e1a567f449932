//! One front end after another, and front ends that vanish.

use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use vdi_tests::driver::{Driver, Layout, Options, Request};
use vdi_tests::image::{Image, MIB};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::server::Launch;

#[test]
fn one_front_end_after_another_is_served() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    for nth in 0..20_u8 {
        let mut driver = server.driver(&Options::new());
        let expected = if nth == 0 { 0 } else { nth - 1 };
        assert_eq!(driver.read(0, 512), [expected; 512]);
        driver.write(0, &[nth; 512]);
    }
}

#[test]
fn a_front_end_that_comes_early_waits_until_the_first_has_gone() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    let mut first = server.driver(&Options::new());
    first.write(0, &[1; 512]);
    let waiting = UnixStream::connect(server.socket()).unwrap();
    for _ in 0..20 {
        assert_eq!(first.read(0, 512), [1; 512]);
    }
    drop(first);
    let mut second = Driver::on_socket(waiting, &Options::new()).unwrap();
    assert_eq!(second.read(0, 512), [1; 512]);
}

#[test]
fn a_front_end_that_vanishes_with_requests_in_flight_leaves_right_data_and_a_daemon_that_serves() {
    let image = Image::by_qemu(64 * MIB);
    for cache in ["writeback", "direct"] {
        let server = Launch::image(image.path()).args(["--cache", cache]).start();
        let mut random = Random::printed();
        for round in 1..=15_u8 {
            let mut driver = server.driver(&Options::new());
            let answered = driver
                .queue()
                .run(&Request::write(0, vec![round; 65536]), &Layout::framed());
            assert_eq!(answered.status, 0);
            for nth in 0..30 {
                let sector = 2048 + nth * 256;
                let request = match nth % 2 {
                    0 => Request::write(sector, vec![round; 131_072]),
                    _ => Request::read(sector - 256, 131_072),
                };
                driver.queue().submit(&request, &Layout::framed());
            }
            std::thread::sleep(Duration::from_micros(random.within(0..3000)));
            drop(driver);
            let mut driver = server.driver(&Options::new());
            assert!(
                driver.read(0, 65536) == vec![round; 65536],
                "an answered write is lost"
            );
            for nth in (0..30).step_by(2) {
                let data = driver.read(2048 + nth * 256, 131_072);
                let foreign = data.iter().find(|&&byte| byte > round);
                assert_eq!(foreign, None, "write {nth} of round {round}");
            }
        }
        assert_eq!(server.terminate().code, Some(0));
        qemu::expect_clean(image.path());
    }
}

#[test]
fn a_front_end_that_vanishes_at_any_step_of_its_start_leaves_a_daemon_that_serves() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    drop(UnixStream::connect(server.socket()).unwrap());
    drop(server.control(&Options::new()));
    let mut control = server.control(&Options::new());
    let memory = vdi_tests::driver::Memory::new(&Options::new().memory);
    control.set_memory(&memory.messages()).unwrap();
    drop(control);
    let mut control = server.control(&Options::new());
    control.set_memory(&memory.messages()).unwrap();
    control
        .within("SET_VRING_NUM", |f| {
            vhost::VhostBackend::set_vring_num(f, 0, 64)
        })
        .unwrap();
    drop(control);
    server.driver(&Options::new()).write(0, &[1; 512]);
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    let image = Image::by_qemu(8 * MIB);
    let launch = Launch::image(image.path());
    drop(UnixListener::bind(launch.socket()).unwrap());
    assert!(launch.socket().exists());
    let server = launch.start();
    server.driver(&Options::new()).write(0, &[1; 512]);
}

#[test]
fn a_socket_that_somebody_listens_on_is_left_alone() {
    let (image, other) = (Image::by_qemu(8 * MIB), Image::by_qemu(8 * MIB));
    let server = Launch::image(image.path()).start();
    let socket = server.socket().to_owned();
    let exit = Launch::image_at(other.path(), &socket).run();
    assert_ne!(exit.code, Some(0));
    assert!(exit.log.contains(socket.to_str().unwrap()), "{}", exit.log);
    server.driver(&Options::new()).write(0, &[1; 512]);
}

#[test]
fn a_file_in_the_place_of_the_socket_is_left_alone() {
    let image = Image::by_qemu(8 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let launch = Launch::image_at(image.path(), &socket);
    std::fs::write(&socket, "precious").unwrap();
    let exit = launch.run();
    assert_ne!(exit.code, Some(0));
    assert!(exit.log.contains(socket.to_str().unwrap()), "{}", exit.log);
    assert_eq!(std::fs::read(&socket).unwrap(), b"precious");
}

#[test]
fn the_socket_is_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    let mode = std::fs::metadata(server.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// A shell that moves its standard input to file descriptor 3.
const INPUT_TO_3: [&str; 3] = ["sh", "-c", "exec \"$0\" \"$@\" 3<&0 </dev/null"];

fn with_fd_3(image: &Image, input: std::os::fd::OwnedFd) -> Launch {
    Launch::bare()
        .under(INPUT_TO_3)
        .input(input)
        .args(["--fd", "3", "--blk-file"])
        .arg(image.path())
}

#[test]
fn a_listening_socket_may_be_inherited() {
    let image = Image::by_qemu(8 * MIB);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = with_fd_3(&image, listener.into()).spawn();
    for nth in 0..2_u8 {
        let mut driver = Driver::connect(&path, &Options::new()).unwrap();
        assert_eq!(driver.read(0, 512), [nth; 512]);
        driver.write(0, &[nth + 1; 512]);
    }
    assert_eq!(server.terminate().code, Some(0));
}

#[test]
fn a_connected_socket_may_be_inherited_and_its_end_is_the_daemons_end() {
    let image = Image::by_qemu(8 * MIB);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = with_fd_3(&image, theirs.into()).spawn();
    let mut driver = Driver::on_socket(ours, &Options::new()).unwrap();
    driver.write(0, &[1; 512]);
    assert_eq!(driver.read(0, 512), [1; 512]);
    drop(driver);
    assert_eq!(server.wait().code, Some(0));
    qemu::expect_clean(image.path());
}
