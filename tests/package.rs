//! The Debian package: what is in it, and that what is installed serves a disk as its units say.
//!
//! As root it is really installed and removed, unless this machine has one that somebody uses; else it is unpacked
//! beside. systemd itself runs on no machine that only runs tests: it judges the units, and the command line is started here.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;
use vdi_tests::driver::{Driver, Options};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, wait_for_listener};

const UNIT: &str = "lib/systemd/system/vdi-vhost@.service";

fn run(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().unwrap();
    let [out, err] = [&done.stdout, &done.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(done.status.success(), "{program} {arguments:?}: {out}{err}");
    out.into_owned()
}

/// A package, where it was unpacked.
struct Installed {
    root: PathBuf,
    is_real: bool,
    _place: TempDir,
}

impl Installed {
    fn new() -> Self {
        let ci = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/package");
        let package = run(ci.to_str().unwrap(), &["--debug"]);
        let package = package.trim_end();
        let place = tempfile::tempdir().unwrap();
        let is_root = nix::unistd::Uid::effective().is_root();
        let is_real = is_root && !Path::new("/usr/bin/vdi-vhost").exists();
        let root = if is_real {
            run("dpkg", &["--install", package]);
            PathBuf::from("/")
        } else {
            let root = place.path().join("root");
            run("dpkg-deb", &["--extract", package, root.to_str().unwrap()]);
            root
        };
        Self {
            root,
            is_real,
            _place: place,
        }
    }

    fn path(&self, of: &str) -> PathBuf {
        self.root.join(of)
    }

    fn remove(&mut self) {
        if std::mem::take(&mut self.is_real) {
            run("dpkg", &["--purge", "vdi-vhost"]);
        }
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        if self.is_real {
            let _ = Command::new("dpkg").args(["--purge", "vdi-vhost"]).output();
        }
    }
}

/// What a unit starts, with this image and these options in the place of the environment's.
fn command_line(unit: &str, image: &Path, options: &[&str]) -> Vec<String> {
    let line = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))
        .unwrap();
    let mut words = Vec::new();
    for word in line.split_whitespace() {
        match word {
            "${IMAGE}" => words.push(image.to_str().unwrap().to_owned()),
            "$OPTIONS" => words.extend(options.iter().map(|&word| word.to_owned())),
            _ => words.push(word.to_owned()),
        }
    }
    words
}

#[test]
fn it_is_installed_serves_a_disk_by_its_units_command_line_and_is_removed() {
    let mut installed = Installed::new();
    println!("installed for real: {}", installed.is_real);
    for file in [
        "usr/bin/vdi",
        "usr/bin/vdi-vhost",
        "usr/share/man/man1/vdi-vhost.1.gz",
        "usr/share/man/man1/vdi-convert.1.gz",
        "usr/share/bash-completion/completions/vdi",
        "usr/share/zsh/vendor-completions/_vdi-vhost",
        "usr/share/fish/vendor_completions.d/vdi.fish",
        "usr/share/doc/vdi-vhost/copyright",
        "usr/share/vdi-vhost/grafana/vdi-vhost.json",
        "lib/systemd/system/vdi-vhost@.socket",
        "lib/systemd/system/vdi-vhost-control@.socket",
    ] {
        let found = fs::metadata(installed.path(file)).unwrap();
        assert!(found.len() > 0, "{file} is empty");
    }
    // Management programs find the daemon by this.
    let descriptor = fs::read(installed.path("usr/share/qemu/vhost-user/50-vdi-vhost.json"));
    let descriptor: serde_json::Value = serde_json::from_slice(&descriptor.unwrap()).unwrap();
    assert_eq!(descriptor["type"], "block");
    let binary = descriptor["binary"].as_str().unwrap();
    let binary = installed.path(binary.trim_start_matches('/'));
    let capabilities = run(binary.to_str().unwrap(), &["--print-capabilities"]);
    assert!(capabilities.contains("\"block\""));

    let image = Image::by_qemu(8 * MIB);
    let unit = fs::read_to_string(installed.path(UNIT)).unwrap();
    let words = command_line(&unit, image.path(), &["--serial", "from-a-unit"]);
    assert_eq!(words[0], "/usr/bin/vdi-vhost");
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("disk.sock");
    let program = installed.path(words[0].trim_start_matches('/'));
    let server = Launch::installed(&program)
        .under(["systemd-socket-activate", "-l", socket.to_str().unwrap()])
        .args(&words[1..])
        .spawn();
    wait_for_listener(&socket);
    let mut driver = Driver::connect(&socket, &Options::new()).unwrap();
    driver.write(0, &[7; 512]);
    assert_eq!(driver.read(0, 512), [7; 512]);
    assert!(driver.queue().get_id().starts_with(b"from-a-unit"));
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));

    if installed.is_real {
        judge_units();
        installed.remove();
        assert!(!Path::new("/usr/bin/vdi-vhost").exists());
        assert!(!Path::new("/").join(UNIT).exists());
    }
}

/// systemd's own opinion: nothing misspelled, and little exposed.
fn judge_units() {
    for unit in [
        "vdi-vhost@disk.service",
        "vdi-vhost@disk.socket",
        "vdi-vhost-control@disk.socket",
    ] {
        let said = Command::new("systemd-analyze")
            .args(["verify", "--man=no", unit])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        let ours = said.lines().filter(|line| line.contains("vdi-vhost"));
        assert_eq!(ours.collect::<Vec<_>>(), [""; 0]);
    }
    // In tenths; 10 is no protection at all.
    run(
        "systemd-analyze",
        &[
            "security",
            "--offline=true",
            "--threshold=15",
            "vdi-vhost@disk.service",
        ],
    );
}
