//! The disk grows while its guest uses it, by an operator's command.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use tempfile::TempDir;
use vdi_core::NewKind;
use vdi_tests::driver::{Driver, Layout, Options, PATIENCE, Request};
use vdi_tests::image::{Image, MIB};
use vdi_tests::load::{DISK_SECTORS, Load, Mix, disk_after};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server, wait_for_listener};
use vdi_tests::stop::StopOnDrop;
use vdi_tests::{qemu, tool};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// A daemon with a control socket.
struct Controlled {
    server: Server,
    control: PathBuf,
    _place: TempDir,
}

impl Controlled {
    fn start(image: &Image, arguments: &[&str]) -> Self {
        let place = tempfile::tempdir().unwrap();
        let control = place.path().join("control");
        let server = Launch::image(image.path())
            .arg("--control-socket")
            .arg(&control)
            .args(arguments)
            .start();
        wait_for_listener(&control);
        Self {
            server,
            control,
            _place: place,
        }
    }

    fn resize(&self, image: &Path, size: &str) -> tool::Answer {
        tool::vdi([
            "resize".as_ref(),
            "--online".as_ref(),
            self.control.as_os_str(),
            image.as_os_str(),
            size.as_ref(),
        ])
    }

    /// Sends a line; what comes back.
    fn say(&self, line: &str) -> String {
        let mut stream = UnixStream::connect(&self.control).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        let mut answer = String::new();
        let _len = BufReader::new(stream).read_line(&mut answer).unwrap();
        answer
    }
}

#[test]
fn a_disk_grows_under_load_and_its_front_end_is_told() {
    let mut random = Random::printed();
    for (block_size, cache) in [
        (1 << 20, "writeback"),
        (1 << 20, "direct"),
        (128 << 10, "writeback"),
    ] {
        let image = Image::by_us(DISK_SECTORS * 512, block_size, NewKind::Dynamic);
        let daemon = Controlled::start(&image, &["--cache", cache]);
        let mut options = Options::new().queues(2).tracked();
        options.wanted.protocol |= VhostUserProtocolFeatures::BACKEND_REQ;
        let mut driver = daemon.server.driver(&options);
        let mut told = driver.control.open_channel().unwrap();
        told.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut loads: Vec<_> = (0..2)
            .map(|_| Load::new(random.fork(), 2, Mix::Everything))
            .collect();
        let stop = AtomicBool::new(false);
        let Driver {
            queues, control, ..
        } = &mut driver;
        std::thread::scope(|scope| {
            let stop = &stop;
            let _stop = StopOnDrop::new(stop);
            for (queue, load) in queues.iter_mut().zip(&mut loads) {
                scope.spawn(move || load.run_until(queue, stop));
            }
            for (nth, size) in (1..).zip(["+10M", "2G", "+1T"]) {
                std::thread::sleep(Duration::from_millis(50));
                let grown = daemon.resize(image.path(), size).expect_code(0);
                assert!(grown.out.contains("was told"), "{grown:?}");
                let mut message = [0; 12];
                told.read_exact(&mut message).unwrap();
                assert_eq!(
                    message,
                    [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
                    "growth {nth}"
                );
                let config = control.config_bytes(0, 8).unwrap();
                let sectors = u64::from_le_bytes(config.try_into().unwrap());
                let expected = [DISK_SECTORS + 20480, 4 << 20, (4 << 20) + (2 << 30)];
                assert_eq!(sectors, expected[nth - 1]);
            }
        });
        // The new end can be used, and what lies behind it cannot.
        let end = (4 << 20) + (2 << 30);
        driver.write(end - 8, &[9; 4096]);
        assert_eq!(driver.read(end - 8, 4096), [9; 4096]);
        drop(driver);
        assert_eq!(daemon.server.terminate().code, Some(0));
        let disk = disk_after(&loads);
        assert!(image.start(disk.len()) == disk, "{block_size}, {cache}");
        if block_size == 1 << 20 {
            qemu::expect_clean(image.path());
        }
    }
}

#[test]
fn a_front_end_that_does_not_listen_does_not_hold_up_a_resize() {
    let image = Image::by_qemu(16 * MIB);
    let daemon = Controlled::start(&image, &[]);
    let mut options = Options::new();
    options.wanted.protocol |= VhostUserProtocolFeatures::BACKEND_REQ;
    let mut driver = daemon.server.driver(&options);
    let (_deaf, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    while theirs.write(&[0; 12]).is_ok() {}
    // Nothing about the descriptor says that sending must not wait.
    theirs.set_nonblocking(false).unwrap();
    let open = |f: &mut vhost::vhost_user::Frontend| f.set_backend_request_fd(&theirs);
    driver.control.within("SET_BACKEND_REQ_FD", open).unwrap();
    daemon.resize(image.path(), "+10M").expect_code(0);
    let config = driver.control.config_bytes(0, 8).unwrap();
    assert_eq!(u64::from_le_bytes(config.try_into().unwrap()), 26 * 2048);
}

#[test]
fn what_cannot_be_done_is_refused_and_the_disk_goes_on() {
    let image = Image::by_qemu(16 * MIB);
    let other = Image::by_qemu(16 * MIB);
    let daemon = Controlled::start(&image, &[]);
    let mut driver = daemon.server.driver(&Options::new());
    driver.write(0, &[1; 512]);
    let refused = daemon.resize(image.path(), "8M").expect_code(1);
    assert!(refused.err.contains("would shrink"), "{refused:?}");
    let refused = daemon.resize(other.path(), "32M").expect_code(1);
    assert!(
        refused.err.contains("is not what the daemon"),
        "{refused:?}"
    );
    let refused = daemon.resize(image.path(), "900P").expect_code(1);
    assert!(refused.err.contains("cannot have this size"), "{refused:?}");
    for (line, class) in [
        ("nonsense\n", "not-understood"),
        (
            "{\"version\": 9, \"execute\": \"info\"}\n",
            "not-understood",
        ),
        (&"x".repeat(100_000), "not-understood"),
    ] {
        let answer = daemon.say(line);
        assert!(answer.contains(class), "{answer}");
    }
    // Whoever says nothing is not waited for.
    let _silent = UnixStream::connect(&daemon.control).unwrap();
    assert_eq!(driver.read(0, 512), [1; 512]);
    let answer = daemon.say("{\"version\": 1, \"execute\": \"info\"}\n");
    assert!(answer.contains("\"size_bytes\":16777216"), "{answer}");
    assert!(answer.contains("\"open\":true"), "{answer}");
    assert_eq!(daemon.server.terminate().code, Some(0));
    assert!(!daemon.control.exists(), "the control socket stays behind");
}

/// What the host fails is counted, and seen where an operator looks.
#[test]
fn requests_that_the_host_fails_are_counted() {
    let image = Image::by_qemu(16 * MIB);
    let daemon = Controlled::start(&image, &[]);
    let mut driver = daemon.server.driver(&Options::new());
    driver.write(0, &[1; 65_536]);
    driver.flush();
    let info = "{\"version\": 1, \"execute\": \"info\"}\n";
    let before = daemon.say(info);
    assert!(
        before.contains("\"failed_requests\":0,\"failed\":false"),
        "{before}"
    );
    // Something else cuts the file.
    let file = std::fs::File::options()
        .write(true)
        .open(image.path())
        .unwrap();
    file.set_len(16_384).unwrap();
    for _ in 0..3 {
        let answer = driver
            .queue()
            .run(&Request::read(64, 4096), &Layout::framed());
        assert_ne!(answer.status, 0);
    }
    let after = daemon.say(info);
    assert!(after.contains("\"failed_requests\":3"), "{after}");
}
