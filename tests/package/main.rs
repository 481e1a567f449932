//! The Debian package: what is in it, and that what is installed serves a disk as its units say.
//!
//! As root it is really installed and removed, unless this machine has one that somebody uses; else it is unpacked
//! beside. systemd itself runs on no machine that only runs tests: it judges the units, and the command line is started here (and in a
//! guest by a systemd that runs: `systemd/main.rs`).

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

mod documents;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use tempfile::TempDir;
use vdi_tests::driver::{Driver, Options};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, scratch, wait_for_listener};

const UNIT: &str = "lib/systemd/system/vdi-vhost@.service";
const FLEET_UNIT: &str = "lib/systemd/system/vdi-vhost-fleet@.service";

fn run(program: &str, arguments: &[&str]) -> String {
    let done = Command::new(program).args(arguments).output().unwrap();
    let [out, err] = [&done.stdout, &done.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(done.status.success(), "{program} {arguments:?}: {out}{err}");
    out.into_owned()
}

/// The package of this build.
static PACKAGE: LazyLock<PathBuf> = LazyLock::new(|| {
    let ci = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/package");
    let package = run(ci.to_str().unwrap(), &["--debug"]);
    PathBuf::from(package.trim_end())
});

/// Unpacks it.
fn unpack(to: &Path) {
    let package = PACKAGE.to_str().unwrap();
    run("dpkg-deb", &["--extract", package, to.to_str().unwrap()]);
}

/// The package, where it was unpacked.
struct Installed {
    root: PathBuf,
    is_real: bool,
    _place: TempDir,
}

impl Installed {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let is_root = nix::unistd::Uid::effective().is_root();
        let is_real = is_root && !Path::new("/usr/bin/vdi-vhost").exists();
        let root = if is_real {
            run("dpkg", &["--install", PACKAGE.to_str().unwrap()]);
            PathBuf::from("/")
        } else {
            let root = place.path().join("root");
            unpack(&root);
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
        "usr/lib/tmpfiles.d/vdi-vhost.conf",
        "etc/vdi-vhost/fleet.toml",
        "usr/share/doc/vdi-vhost/docs/fleet.md",
    ] {
        let found = fs::metadata(installed.path(file)).unwrap();
        assert!(found.len() > 0, "{file} is empty");
    }
    let manual = installed.path("usr/share/man");
    for page in ["vdi-vhost", "vdi", "vdi-ctl-clone"] {
        let found = run("man", &["-M", manual.to_str().unwrap(), "-w", page]);
        assert!(found.ends_with(&format!("man1/{page}.1.gz\n")), "{found}");
    }
    // Debian's opinion of the whole: no errors, no warnings.
    let strict = ["--no-cfg", "--allow-root", "--fail-on", "error,warning"];
    let package = PACKAGE.to_str().unwrap();
    run("lintian", &[&strict[..], &[package]].concat());

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
    serves_a_fleet_that_goes_over(&installed);

    if installed.is_real {
        judge_units();
        installed.remove();
        for file in ["/usr/bin/vdi-vhost", "/etc/vdi-vhost/fleet.toml"] {
            assert!(!Path::new(file).exists());
        }
        assert!(!Path::new("/").join(UNIT).exists());
    }
}

/// The fleet's unit with its configuration, in a place of the test's: the second one takes over from the first.
fn serves_a_fleet_that_goes_over(installed: &Installed) {
    let place = scratch();
    let path = |name: &str| place.path().join(name);
    let here = place.path().to_str().unwrap();
    let moved = |text: &str| {
        text.replace("/run/vdi-vhost", here)
            .replace("/var/lib/vdi-vhost", here)
            .replace("/etc/vdi-vhost", here)
    };
    let unit = fs::read_to_string(installed.path(FLEET_UNIT)).unwrap();
    let words = command_line(&moved(&unit), Path::new(""), &[]);
    let program = installed.path(words[0].trim_start_matches('/'));
    let start = || Launch::installed(&program).args(&words[1..]).spawn();
    let tool = installed.path("usr/bin/vdi");
    let image = path("vm1.vdi");
    run(
        tool.to_str().unwrap(),
        &["create", image.to_str().unwrap(), "8M"],
    );

    // As it is installed it serves nothing, and waits for commands.
    let config = fs::read_to_string(installed.path("etc/vdi-vhost/fleet.toml")).unwrap();
    let config = moved(&config);
    fs::write(path("fleet.toml"), &config).unwrap();
    let nothing = start();
    wait_for_listener(&path("control.sock"));
    assert_eq!(nothing.terminate().code, Some(0));

    // The first of its examples.
    let example = config.replacen("# [[disk]]\n# name", "[[disk]]\nname", 1);
    let example = example.replacen("# image = ", "image = ", 1);
    fs::write(path("fleet.toml"), example).unwrap();
    let before = start();
    wait_for_listener(&path("vm1.sock"));
    let mut driver = Driver::connect(&path("vm1.sock"), &Options::new()).unwrap();
    driver.write(0, &[7; 512]);
    let after = start();
    let exit = before.wait();
    assert_eq!(exit.code, Some(0), "{}{}", exit.log, after.log());
    let mut driver = Driver::connect(&path("vm1.sock"), &Options::new()).unwrap();
    assert_eq!(driver.read(0, 512), [7; 512]);
    drop(driver);
    assert_eq!(after.terminate().code, Some(0));
}

/// systemd's own opinion: nothing misspelled, and little exposed.
fn judge_units() {
    for unit in [
        "vdi-vhost@disk.service",
        "vdi-vhost@disk.socket",
        "vdi-vhost-control@disk.socket",
        "vdi-vhost-fleet@a.service",
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
    for unit in ["vdi-vhost@disk.service", "vdi-vhost-fleet@a.service"] {
        let strict = ["--offline=true", "--threshold=15"];
        run(
            "systemd-analyze",
            &[&["security"], &strict[..], &[unit]].concat(),
        );
    }
}
