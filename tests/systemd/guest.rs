//! What is tried inside of the guest, where this program runs as root and may do as it likes.

mod fleet;
mod installed;
mod removed;
mod single;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::Value;
use vdi_tests::driver::{Base, Driver, Kept, Options};
use vdi_tests::load::{DISK_SECTORS, Load, Mix, disk_after};
use vdi_tests::random::Random;
use vdi_tests::stop::StopOnDrop;

/// Where the units have images and sockets.
const IMAGES: &str = "/var/lib/vdi-vhost";
const SOCKETS: &str = "/run/vdi-vhost";

/// How long anything may take on an emulated processor.
const PATIENCE: Duration = Duration::from_secs(30);

fn output(line: &str) -> Output {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words).output().unwrap()
}

/// What a command line wrote, which must end with 0.
#[track_caller]
fn run(line: &str) -> String {
    let done = output(line);
    let [out, err] = [&done.stdout, &done.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(done.status.success(), "{line}: {out}{err}");
    out.into_owned()
}

/// Its exit code.
fn code(line: &str) -> i32 {
    output(line).status.code().unwrap()
}

#[track_caller]
fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What systemd knows of a unit.
fn property(unit: &str, name: &str) -> String {
    run(&format!("systemctl show -P {name} {unit}"))
        .trim_end()
        .to_owned()
}

fn number(unit: &str, name: &str) -> i32 {
    property(unit, name).parse().unwrap()
}

fn is_active(unit: &str) -> bool {
    property(unit, "ActiveState") == "active"
}

/// All that the journal has of a unit's own processes.
fn journal(unit: &str) -> Vec<Value> {
    run("journalctl --sync");
    let lines = run(&format!(
        "journalctl --no-pager -o json _SYSTEMD_UNIT={unit}"
    ));
    lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn messages(unit: &str) -> String {
    let entries = journal(unit);
    let messages = entries.iter().map(|entry| entry["MESSAGE"].as_str());
    messages
        .map(|text| text.unwrap().to_owned() + "\n")
        .collect()
}

/// A drop-in for a unit, as `systemctl edit` makes it, until a reboot.
fn edit(unit: &str, text: &str) {
    let place = Path::new("/run/systemd/system").join(format!("{unit}.d"));
    fs::create_dir_all(&place).unwrap();
    fs::write(place.join("override.conf"), text).unwrap();
    run("systemctl daemon-reload");
}

fn image(disk: &str) -> PathBuf {
    Path::new(IMAGES).join(format!("{disk}.vdi"))
}

fn socket(name: &str) -> PathBuf {
    Path::new(SOCKETS).join(name)
}

/// Makes an image for a disk as the README does.
fn create(disk: &str) -> PathBuf {
    let image = image(disk);
    let size = DISK_SECTORS * 512;
    run(&format!("vdi create {} {size}", image.display()));
    run(&format!("chown vdi-vhost: {}", image.display()));
    image
}

#[track_caller]
fn expect_clean(image: &Path) {
    run(&format!("vdi check {}", image.display()));
}

/// A file's mode, owner and group.
fn rights(path: &Path) -> String {
    run(&format!("stat -c %a,%U,%G {}", path.display()))
        .trim_end()
        .to_owned()
}

fn connect(disk: &str, options: &Options) -> Driver {
    Driver::connect(&socket(&format!("{disk}.sock")), options).unwrap()
}

fn signal(unit: &str, signal: Signal) {
    let pid = Pid::from_raw(number(unit, "MainPID"));
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// Kills a daemon as only a bug or the kernel does, and waits until systemd has started it again.
fn kill(unit: &str) {
    let (pid, restarts) = (number(unit, "MainPID"), number(unit, "NRestarts"));
    signal(unit, Signal::SIGKILL);
    wait_until("it is started again", || {
        number(unit, "NRestarts") > restarts && is_active(unit)
    });
    assert_ne!(number(unit, "MainPID"), pid);
}

/// A load that verifies all it reads on a disk of zeros, while `events` happen; after each the front end comes back. What the disk holds then.
fn under_load(disk: &str, events: &mut [&mut dyn FnMut()]) -> Vec<u8> {
    let options = Options::new().tracked();
    let mut driver = connect(disk, &options);
    let kept: Kept = driver.keep(&options);
    let mut load = Load::new(Random::printed(), 1, Mix::Everything);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (stop, load) = (&stop, &mut load);
        let _stop = StopOnDrop::new(stop);
        let queue = &mut driver.queues[0];
        scope.spawn(move || load.run(queue, || !stop.load(Ordering::Relaxed)));
        for event in events {
            std::thread::sleep(Duration::from_millis(300));
            event();
            let socket = socket(&format!("{disk}.sock"));
            driver.control = kept.reconnect(&socket, Base::Used).unwrap();
        }
        std::thread::sleep(Duration::from_millis(300));
    });
    assert!(load.answered > 0 && load.verified_bytes > 0);
    disk_after(&[load])
}

/// Demands that an image holds this, and nothing is wrong with it.
#[track_caller]
fn expect_contents(image: &Path, disk: &[u8]) {
    expect_clean(image);
    let raw = "/var/tmp/raw";
    run(&format!(
        "vdi convert --force -O raw {} {raw}",
        image.display()
    ));
    assert!(fs::read(raw).unwrap() == disk, "{}", image.display());
}
