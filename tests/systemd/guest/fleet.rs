//! One daemon for all disks.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use vdi_tests::driver::Options;

use super::{
    code, connect, create, edit, expect_clean, expect_contents, is_active, kill, number, property,
    rights, run, socket, under_load, wait_until,
};

const CONFIG: &str = "/etc/vdi-vhost/fleet.toml";
const A: &str = "vdi-vhost-fleet@a.service";
const B: &str = "vdi-vhost-fleet@b.service";

fn disk(name: &str) -> String {
    format!("[[disk]]\nname = \"{name}\"\nimage = \"/var/lib/vdi-vhost/{name}.vdi\"\n")
}

/// The file that the package brings, without what is tried here.
fn shipped() -> String {
    let text = fs::read_to_string(CONFIG).unwrap();
    let (shipped, _) = text.split_once("\n# tried\n").unwrap_or((&text, ""));
    shipped.to_owned()
}

/// The same with some more.
fn configure(more: &str) {
    fs::write(CONFIG, shipped() + "\n# tried\n" + more).unwrap();
}

fn expect_stopped(unit: &str) {
    assert_eq!(property(unit, "ActiveState"), "inactive");
    assert_eq!(property(unit, "Result"), "success");
}

/// The program that a unit's process runs.
fn program(unit: &str) -> String {
    let link = format!("/proc/{}/exe", number(unit, "MainPID"));
    fs::read_link(link).unwrap().display().to_string()
}

fn scrape(mut stream: impl Read + Write) -> String {
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}

#[test]
#[ignore = "in the guest"]
fn a_it_serves_as_installed_and_a_reload_adds_and_removes_disks() {
    let images = [create("vm1"), create("vm2")];
    // Sockets of single disks lie in the same directory, and stay as they are.
    run("systemctl start vdi-vhost@beside.socket");
    run("systemctl enable --now vdi-vhost-fleet@a");
    assert!(is_active(A));
    assert_eq!(rights(&socket("beside.sock")), "660,vdi-vhost,kvm");
    run("systemctl stop vdi-vhost@beside.socket");
    let status = property(A, "StatusText");
    assert!(status.starts_with("serving"), "{status}");
    configure(&(disk("vm1") + &disk("vm2")));
    run("systemctl reload vdi-vhost-fleet@a");
    let mut driver = connect("vm1", &Options::new());
    driver.write(0, &[1; 4096]);
    // What is wrong changes nothing.
    configure(&(disk("vm1") + "nonsense = 1\n"));
    assert_ne!(code("systemctl reload vdi-vhost-fleet@a"), 0);
    assert!(is_active(A));
    configure(&disk("vm1"));
    run("systemctl reload vdi-vhost-fleet@a");
    assert!(run("vdi ctl list").contains("vm1") && !run("vdi ctl list").contains("vm2"));
    assert_eq!(driver.read(0, 4096), [1; 4096]);
    // What makes files and sockets is let through to them.
    run("vdi ctl snapshot vm1 /var/lib/vdi-vhost/frozen.vdi");
    driver.write(8, &[2; 4096]);
    run("vdi ctl clone vm3 /var/lib/vdi-vhost/frozen.vdi /var/lib/vdi-vhost/vm3.vdi");
    assert_eq!(connect("vm3", &Options::new()).read(0, 4096), [1; 4096]);
    run("vdi ctl remove vm3");
    fs::remove_file(super::image("vm3")).unwrap();
    run("vdi ctl commit vm1");
    wait_until("it is merged", || run("vdi ctl jobs").contains("done"));
    assert_eq!(driver.read(0, 8192), [[1; 4096], [2; 4096]].concat());
    run("systemctl disable --now vdi-vhost-fleet@a");
    drop(driver);
    expect_stopped(A);
    for left in ["vm1.sock", "vm3.sock", "control.sock"] {
        assert!(!socket(left).exists(), "{left} stays");
    }
    images.iter().for_each(|image| expect_clean(image));
}

#[test]
#[ignore = "in the guest"]
fn a_newer_package_leaves_it_running_and_the_next_instance_takes_over_under_load() {
    let image = create("up");
    configure(&disk("up"));
    run("systemctl enable --now vdi-vhost-fleet@a");
    let pid = number(A, "MainPID");
    let disk = under_load(
        "up",
        &mut [
            &mut || {
                run("dpkg --install /job/newer.deb");
                assert_eq!((is_active(A), number(A, "MainPID")), (true, pid));
                assert_eq!(program(A), "/usr/bin/vdi-vhost (deleted)");
                run("systemctl start vdi-vhost-fleet@b");
                assert!(is_active(B));
                assert_eq!(program(B), "/usr/bin/vdi-vhost");
                wait_until("the old one ends", || !is_active(A));
                expect_stopped(A);
            },
            // A crash: the same command line begins by itself.
            &mut || kill(B),
            // And back again.
            &mut || {
                run("systemctl start vdi-vhost-fleet@a");
                wait_until("the old one ends", || !is_active(B));
                expect_stopped(B);
            },
        ],
    );
    assert!(is_active(A));
    run("systemctl disable --now vdi-vhost-fleet@a");
    expect_stopped(A);
    assert!(!socket("up.sock").exists());
    expect_contents(&image, &disk);
}

#[test]
#[ignore = "in the guest"]
fn metrics_are_on_a_socket_and_with_a_drop_in_on_a_port() {
    create("seen");
    // A line of the top, so it goes before the tables.
    let text = shipped();
    let with = |metrics: &str| {
        let line = format!("metrics = \"{metrics}\"\n");
        fs::write(CONFIG, line + &text + "\n# tried\n" + &disk("seen")).unwrap();
    };
    with("unix:/run/vdi-vhost/metrics.sock");
    run("systemctl start vdi-vhost-fleet@a");
    let page = scrape(UnixStream::connect(socket("metrics.sock")).unwrap());
    assert!(page.contains("\nvdi_vhost_disks 1\n"), "{page}");
    run("systemctl stop vdi-vhost-fleet@a");

    with("127.0.0.1:9187");
    edit(
        A,
        "[Service]\nPrivateNetwork=no\nRestrictAddressFamilies=AF_UNIX AF_INET\n",
    );
    run("systemctl start vdi-vhost-fleet@a");
    let page = scrape(TcpStream::connect("127.0.0.1:9187").unwrap());
    assert!(page.contains("\nvdi_vhost_disks 1\n"), "{page}");
    run("systemctl stop vdi-vhost-fleet@a");
    expect_stopped(A);
    fs::write(CONFIG, text).unwrap();
}
