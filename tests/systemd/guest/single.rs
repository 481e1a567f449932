//! A daemon for each disk.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use vdi_tests::driver::{Driver, Layout, Options, Request, Segment};

use super::{
    IMAGES, SOCKETS, code, connect, create, edit, expect_clean, expect_contents, image, is_active,
    journal, kill, messages, number, output, property, rights, run, socket, under_load, wait_until,
};

/// Both sockets of a disk.
fn sockets(disk: &str) -> String {
    format!("vdi-vhost@{disk}.socket vdi-vhost-control@{disk}.socket")
}

/// Makes them; the name of the service that they start.
fn listen(disk: &str) -> String {
    run(&format!("systemctl start {}", sockets(disk)));
    format!("vdi-vhost@{disk}.service")
}

fn stop(disk: &str) {
    run(&format!("systemctl stop {}", sockets(disk)));
    let unit = format!("vdi-vhost@{disk}.service");
    assert_eq!(property(&unit, "ActiveState"), "inactive");
    assert_eq!(property(&unit, "Result"), "success");
    for name in [format!("{disk}.sock"), format!("{disk}.control")] {
        assert!(!socket(&name).exists(), "{name} stays");
    }
}

/// All kinds of requests.
fn use_it(driver: &mut Driver) {
    driver.write(0, &[7; 4096]);
    driver.flush();
    assert_eq!(driver.read(0, 4096), [7; 4096]);
    let discard = Request::discard(&[Segment::new(0, 2048)]);
    drop(driver.queue().run(&discard, &Layout::whole()).expect_ok());
    driver.write(4096, &[8; 65536]);
    driver.flush();
    assert_eq!(driver.read(4096, 65536), [8; 65536]);
}

#[test]
#[ignore = "in the guest"]
fn a_front_end_that_connects_starts_the_daemon_and_a_stop_leaves_a_clean_image() {
    let image = create("disk1");
    let unit = listen("disk1");
    assert!(!is_active(&unit));
    assert_eq!(rights(&socket("disk1.sock")), "660,vdi-vhost,kvm");
    assert_eq!(rights(&socket("disk1.control")), "600,vdi-vhost,vdi-vhost");
    let mut driver = connect("disk1", &Options::new());
    use_it(&mut driver);
    assert!(is_active(&unit));
    let status = property(&unit, "StatusText");
    assert!(status.starts_with("serving "), "{status}");
    let info = run("vdi ctl --socket /run/vdi-vhost/disk1.control info");
    assert!(info.contains("disk1.vdi"), "{info}");

    let process = Path::new("/proc").join(property(&unit, "MainPID"));
    let read = |name: &str| fs::read_to_string(process.join(name)).unwrap();
    let status = read("status");
    for line in [
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
    ] {
        assert!(status.contains(line), "no {line}: {status}");
    }
    assert!(!status.contains("Uid:\t0"));
    assert_eq!(read("oom_score_adj"), "-500\n");
    let said = messages(&unit);
    for fallback in ["io_uring cannot", "no landlock"] {
        assert!(!said.contains(fallback), "{said}");
    }
    assert!(run(&format!("ls -l {}/fd", process.display())).contains("[io_uring]"));

    // A stop of the service alone: whoever connects has it started again.
    drop(driver);
    run(&format!("systemctl stop {unit}"));
    expect_clean(&image);
    let mut driver = connect("disk1", &Options::new());
    assert_eq!(driver.read(4096, 65536), [8; 65536]);
    assert!(is_active(&unit));
    // And with its front end there.
    stop("disk1");
    drop(driver);
    run(&format!("systemctl enable {}", sockets("disk1")));
    let wanted = run("systemctl show -P Wants sockets.target");
    assert!(wanted.contains("vdi-vhost@disk1.socket"), "{wanted}");
    run(&format!("systemctl disable {}", sockets("disk1")));
    expect_clean(&image);
}

/// Has a daemon's first thread, which serves front ends and operators, stand still while all others go on, until the daemon is dead.
fn hang(unit: &str) {
    let pid = Pid::from_raw(number(unit, "MainPID"));
    ptrace::seize(pid, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(pid).unwrap();
    wait_until("it is dead", || {
        let seen = waitpid(pid, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)).unwrap();
        matches!(seen, WaitStatus::Signaled(..) | WaitStatus::Exited(..))
    });
}

#[test]
#[ignore = "in the guest"]
fn a_hanging_daemon_is_killed_by_the_watchdog_and_started_again() {
    let image = create("hangs");
    for unit in ["vdi-vhost@hangs.service", "vdi-vhost-fleet@a.service"] {
        let shipped = run(&format!("systemctl cat {unit}"));
        assert!(shipped.contains("\nWatchdogSec=60s\n"), "{unit}: {shipped}");
    }
    edit("vdi-vhost@hangs.service", "[Service]\nWatchdogSec=4s\n");
    let unit = listen("hangs");
    let disk = under_load(
        "hangs",
        &mut [&mut || {
            let pid = number(&unit, "MainPID");
            // Beats keep it alive for longer than they may stay away.
            std::thread::sleep(Duration::from_secs(5));
            assert_eq!(number(&unit, "MainPID"), pid);
            hang(&unit);
            wait_until("it is started again", || {
                number(&unit, "NRestarts") == 1 && is_active(&unit)
            });
        }],
    );
    let all = run(&format!("journalctl --no-pager -u {unit}"));
    assert!(all.contains("Watchdog timeout"), "{all}");
    assert!(all.contains("result 'watchdog'"), "{all}");
    stop("hangs");
    expect_contents(&image, &disk);
}

#[test]
#[ignore = "in the guest"]
fn a_killed_daemon_is_started_again_and_goes_on_with_its_guests_requests() {
    let image = create("killed");
    let unit = listen("killed");
    let disk = under_load("killed", &mut [&mut || kill(&unit), &mut || kill(&unit)]);
    stop("killed");
    expect_contents(&image, &disk);
}

#[test]
#[ignore = "in the guest"]
fn it_is_active_when_it_is_ready_and_not_before() {
    create("late");
    let late = "ExecStart=/bin/sh -c 'sleep 2; exec /usr/bin/vdi-vhost --blk-file /var/lib/vdi-vhost/late.vdi'";
    edit(
        "vdi-vhost@late.service",
        &format!("[Service]\nExecStart=\n{late}\n"),
    );
    let unit = listen("late");
    let before = Instant::now();
    run(&format!("systemctl start --no-block {unit}"));
    while before.elapsed() < Duration::from_millis(1500) {
        assert_eq!(property(&unit, "ActiveState"), "activating");
        std::thread::sleep(Duration::from_millis(100));
    }
    wait_until("it is ready", || is_active(&unit));
    assert!(before.elapsed() > Duration::from_secs(2));
    stop("late");
}

#[test]
#[ignore = "in the guest"]
fn one_that_cannot_serve_is_never_active_and_says_why() {
    // On an emulated processor five starts take longer than the ten seconds in which there may be no more.
    edit(
        "vdi-vhost@missing.service",
        "[Unit]\nStartLimitIntervalSec=5min\nStartLimitBurst=5\n",
    );
    let unit = listen("missing");
    assert_ne!(code(&format!("systemctl start {unit}")), 0);
    wait_until("systemd gives it up", || {
        property(&unit, "ActiveState") == "failed"
            && property("vdi-vhost@missing.socket", "ActiveState") == "failed"
    });
    let entries = journal(&unit);
    let of_error = entries.iter().filter(|entry| entry["PRIORITY"] == "3");
    let said: Vec<_> = of_error
        .map(|entry| entry["MESSAGE"].as_str().unwrap())
        .collect();
    assert!(said[0].contains("cannot open"), "{said:?}");
    // As the troubleshooting page has it.
    let image = create("missing");
    run("systemctl reset-failed vdi-vhost@missing.* vdi-vhost-control@missing.socket");
    listen("missing");
    use_it(&mut connect("missing", &Options::new()));
    stop("missing");
    expect_clean(&image);
}

#[test]
#[ignore = "in the guest"]
fn the_journal_has_priorities_names_and_units() {
    create("told");
    let unit = listen("told");
    drop(connect("told", &Options::new()));
    stop("told");
    let entries = journal(&unit);
    assert!(!entries.is_empty());
    for entry in &entries {
        assert_eq!(entry["PRIORITY"], "6", "{entry}");
        assert_eq!(entry["SYSLOG_IDENTIFIER"], "vdi-vhost");
        assert_eq!(entry["_COMM"], "vdi-vhost");
        let message = entry["MESSAGE"].as_str().unwrap();
        assert!(
            !message.starts_with('<') && !message.contains('\u{1b}'),
            "{message}"
        );
    }
    assert!(
        entries[0]["MESSAGE"]
            .as_str()
            .unwrap()
            .starts_with("serving ")
    );
}

#[test]
#[ignore = "in the guest"]
fn the_sandbox_lets_a_child_of_a_golden_image_be_served_past_the_page_cache_and_grow() {
    fs::create_dir_all("/srv/golden").unwrap();
    let golden = "/srv/golden/golden.vdi";
    run(&format!("vdi create {golden} 24M"));
    run(&format!("chmod 444 {golden}"));
    let child = image("child");
    run(&format!("vdi snapshot {golden} {}", child.display()));
    run(&format!("chown vdi-vhost: {}", child.display()));
    let options = format!("OPTIONS=--parent {golden} --cache direct --serial from-a-file\n");
    fs::write("/etc/vdi-vhost/child.conf", options).unwrap();
    let unit = listen("child");
    let mut driver = connect("child", &Options::new());
    use_it(&mut driver);
    assert!(driver.queue().get_id().starts_with(b"from-a-file"));
    let tell = |words: &str| output(&format!("vdi ctl --socket {SOCKETS}/child.control {words}"));
    assert!(tell("resize disk +8M").status.success());
    driver.write(50_000, &[9; 4096]);
    assert_eq!(driver.read(50_000, 4096), [9; 4096]);
    // It makes no files, and says so.
    for words in [
        format!("snapshot disk {IMAGES}/frozen.vdi"),
        "commit disk".to_owned(),
    ] {
        let refused = String::from_utf8(tell(&words).stderr).unwrap();
        assert!(refused.contains("makes no files"), "{refused}");
    }
    drop(driver);
    stop("child");
    run(&format!("vdi check --parent {golden} {}", child.display()));
    let said = messages(&unit);
    assert!(
        !said.contains("not permitted") && !said.contains("denied"),
        "{said}"
    );
    fs::remove_file("/etc/vdi-vhost/child.conf").unwrap();
}
