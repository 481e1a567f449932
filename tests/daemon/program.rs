//! The daemon as a program: its arguments, its exit codes, its signals.
//!
//! Source: QEMU `docs/interop/vhost-user.rst`, "Backend program conventions".

use std::time::Duration;

use nix::sys::signal::Signal;
use vdi_tests::driver::Options;
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Exit, Launch};
use vdi_tests::soon::soon;

fn expect_refusal(exit: &Exit, named: &str) {
    assert!(exit.code.is_some_and(|code| code != 0), "{exit:?}");
    assert!(
        exit.log.contains(named),
        "{named} is not named: {}",
        exit.log
    );
    assert!(!exit.log.contains("panicked"), "{}", exit.log);
}

#[test]
fn print_capabilities_prints_json_and_ignores_every_other_argument() {
    for arguments in [
        &["--print-capabilities"][..],
        &["--print-capabilities", "--blk-file", "/does/not/exist"],
        &[
            "--socket-path",
            "/does/not/exist/socket",
            "--read-only",
            "--print-capabilities",
        ],
    ] {
        let exit = Launch::bare().args(arguments).run();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        let json: serde_json::Value = serde_json::from_str(&exit.output).unwrap();
        assert_eq!(json["type"], "block");
        let features = json["features"].as_array().unwrap();
        assert!(features.contains(&"read-only".into()));
        assert!(features.contains(&"blk-file".into()));
    }
}

#[test]
fn arguments_that_make_no_sense_are_refused_by_name() {
    let image = Image::by_qemu(MIB);
    let path = image.path().to_str().unwrap();
    for (arguments, named) in [
        (&["--no-such-option"][..], "--no-such-option"),
        (&["--blk-file", path], "--socket-path"),
        (
            &["--blk-file", path, "--socket-path", "/tmp/x", "--fd", "3"],
            "--fd",
        ),
        (&["--blk-file", path, "--fd", "77"], "77"),
        (
            &[
                "--socket-path",
                "/does/not/exist/socket",
                "--blk-file",
                path,
            ],
            "/does/not/exist/socket",
        ),
    ] {
        expect_refusal(&Launch::bare().args(arguments).run(), named);
    }
    for (option, value) in [
        ("--cache", "unsafe"),
        ("--num-queues", "0"),
        ("--num-queues", "100000"),
    ] {
        expect_refusal(
            &Launch::image(image.path()).args([option, value]).run(),
            option,
        );
    }
}

#[test]
fn an_image_that_cannot_be_served_is_refused_by_name_and_left_alone() {
    let image = Image::by_qemu(MIB);
    let missing = image.path().with_extension("missing");
    expect_refusal(&Launch::image(&missing).run(), missing.to_str().unwrap());
    assert!(!missing.exists());

    let no_vdi = image.path().with_extension("text");
    std::fs::write(&no_vdi, "no image".repeat(100)).unwrap();
    expect_refusal(&Launch::image(&no_vdi).run(), no_vdi.to_str().unwrap());
    assert_eq!(
        std::fs::read(&no_vdi).unwrap(),
        "no image".repeat(100).as_bytes()
    );

    let directory = image.path().parent().unwrap();
    expect_refusal(&Launch::image(directory).run(), directory.to_str().unwrap());
}

#[test]
fn sigterm_and_sigint_end_an_idle_daemon_at_once() {
    let image = Image::by_qemu(MIB);
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        for connected in [false, true] {
            soon(Duration::from_secs(1), || {
                let server = Launch::image(image.path()).start();
                let driver = connected.then(|| server.driver(&Options::new()));
                server.signal(signal);
                let exit = server.wait();
                assert_eq!(exit.code, Some(0), "{}", exit.log);
                drop(driver);
                exit.took
            });
        }
    }
}

#[test]
fn the_socket_is_removed_at_the_end() {
    let image = Image::by_qemu(MIB);
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("socket");
    let server = Launch::image_at(image.path(), &socket).start();
    assert!(socket.exists());
    assert_eq!(server.terminate().code, Some(0));
    assert!(!socket.exists());
}

#[test]
fn an_idle_daemon_uses_no_processor_time() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 512]);
    driver.flush();
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.pid())).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        let number = |nth: usize| fields[nth].parse::<u64>().unwrap();
        number(11) + number(12)
    };
    // What the write left to do is done at some time.
    soon(Duration::from_millis(20), || {
        let before = ticks();
        std::thread::sleep(Duration::from_millis(500));
        Duration::from_millis((ticks() - before) * 10)
    });
}

#[test]
fn more_files_are_opened_than_the_soft_limit_allows() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path())
        .args(["--num-queues", "64"])
        .under(["prlimit", "--nofile=64:1024"])
        .start();
    // Each queue has three descriptors.
    let mut driver = server.driver(&Options::new().queues(64));
    driver.queues[63].write(0, &[1; 512]);
    assert_eq!(driver.read(0, 512), [1; 512]);
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
}
