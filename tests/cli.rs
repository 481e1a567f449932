//! The tool `vdi`: each verb, each option, each exit code, and what it says of hostile images.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tempfile::TempDir;
use vdi_tests::builder::image;
use vdi_tests::tool::{program, spawn, vdi};
use vdi_tests::words;

const MIB: u64 = 1 << 20;

fn scratch() -> TempDir {
    tempfile::tempdir().expect("there is room for temporary files")
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn info(path: &Path) -> serde_json::Value {
    vdi(words!["info", "--json", path]).expect_code(0).json()
}

/// A raw disk of 12 MiB with three islands of data.
fn raw_disk(directory: &Path) -> PathBuf {
    let path = directory.join("disk.raw");
    let file = fs::File::create(&path).unwrap();
    file.set_len(12 * MIB).unwrap();
    for (at, len, byte) in [
        (0, 512, 1),
        (5 * MIB + 512, 70_000, 2),
        (12 * MIB - 1, 1, 3),
    ] {
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![byte; len], at).unwrap();
    }
    path
}

#[test]
fn create_takes_the_size_either_way_and_rounds_it_up_to_sectors() {
    let directory = scratch();
    let path = directory.path().join("a.vdi");
    for (size, bytes) in [
        ("1", 512),
        ("513", 1024),
        ("10M", 10 * MIB),
        ("1.5MiB", MIB + MIB / 2),
        ("3 G", 3 << 30),
    ] {
        vdi(words!["create", path, size, "--force"]).expect_code(0);
        assert_eq!(info(&path)["virtual-size"], bytes, "{size}");
        vdi(words!["create", "--size", size, path, "--force"]).expect_code(0);
        assert_eq!(info(&path)["virtual-size"], bytes, "--size {size}");
        vdi(words!["check", path]).expect_code(0);
    }
}

#[test]
fn create_heeds_its_options() {
    let directory = scratch();
    let path = directory.path().join("a.vdi");
    let uuid = "706c398a-86ca-49e3-9a30-3cbc9073cd11";
    vdi(words![
        "create",
        "--fixed",
        "--block-size",
        "128k",
        "--uuid",
        uuid,
        path,
        "5M"
    ])
    .expect_code(0);
    let info = info(&path);
    let data = &info["format-specific"]["data"];
    assert_eq!(data["kind"], "fixed");
    assert_eq!(data["header"]["block-size"], 128 << 10);
    assert_eq!(data["header"]["uuid-image"], uuid);
    assert_eq!(data["blocks"]["allocated"], 40);
    assert!(
        info["actual-size"].as_u64().unwrap() >= 5 * MIB,
        "fixed reserves its space: {info}"
    );
}

#[test]
fn create_replaces_a_file_with_contents_only_by_force() {
    let directory = scratch();
    let path = directory.path().join("a.vdi");
    fs::write(&path, "precious").unwrap();
    let answer = vdi(words!["create", path, "1M"]).expect_code(1);
    assert!(
        answer.err.starts_with("vdi: error: ") && answer.err.contains("--force"),
        "{answer:#?}"
    );
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    vdi(words!["create", "--force", path, "1M"]).expect_code(0);
    assert_eq!(
        fs::metadata(&path).unwrap().mode() & 0o777,
        0o640,
        "its mode stays"
    );
    fs::write(&path, "").unwrap();
    vdi(words!["create", path, "1M"]).expect_code(0);
    assert_eq!(names(directory.path()), ["a.vdi"]);
}

#[test]
fn a_create_that_fails_leaves_nothing() {
    let directory = scratch();
    let path = directory.path().join("a.vdi");
    for size in ["0", "4P", "7E"] {
        let answer = vdi(words!["create", path, size]).expect_code(1);
        assert!(answer.err.contains("size is"), "{answer:#?}");
    }
    // More than the file system can hold.
    vdi(words!["create", "--fixed", path, "900T"]).expect_code(1);
    vdi(words!["create", directory.path().join("no/where"), "1M"]).expect_code(1);
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn bad_words_are_refused_with_exit_code_1_and_a_reason() {
    let cases: [(&[&str], &str); 12] = [
        (&[], "Usage"),
        (&["creat"], "create"),
        (&["create", "f"], "SIZE"),
        (&["create", "f", "ten"], "not a size"),
        (&["create", "f", "10MB"], "MiB"),
        (&["create", "f", "1M", "--size", "1M"], "cannot be used"),
        (&["create", "f", "1M", "--block-size", "3M"], "power of two"),
        (
            &[
                "create",
                "f",
                "1M",
                "--uuid",
                "00000000-0000-0000-0000-000000000000",
            ],
            "null",
        ),
        (&["convert", "a", "b"], "--output-format"),
        (&["convert", "-O", "qcow2", "a", "b"], "raw, vdi"),
        (&["convert", "-O", "raw", "--fixed", "a", "b"], "-O vdi"),
        (&["completions", "tcl"], "bash"),
    ];
    for (words, reason) in cases {
        let answer = vdi(words).expect_code(1);
        assert!(
            answer.err.contains(reason) && answer.out.is_empty(),
            "{words:?}: {answer:#?}"
        );
    }
}

#[test]
fn help_and_version_answer_on_standard_output() {
    let help = vdi(["--help"]).expect_code(0).out;
    for word in [
        "create",
        "info",
        "check",
        "map",
        "convert",
        "completions",
        "Examples:",
        "Exit codes:",
    ] {
        assert!(help.contains(word), "{word}");
    }
    for verb in [
        "create",
        "info",
        "check",
        "map",
        "convert",
        "snapshot",
        "compact",
        "resize",
        "set",
        "completions",
    ] {
        assert!(
            vdi([verb, "--help"])
                .expect_code(0)
                .out
                .contains("Usage: vdi "),
            "{verb}"
        );
    }
    assert!(vdi(["check", "--help"]).out.contains("Exit codes:"));
    let version = vdi(["--version"]).expect_code(0).out;
    assert_eq!(version.trim(), concat!("vdi ", env!("CARGO_PKG_VERSION")));
}

#[test]
fn completions_are_scripts_that_name_the_verbs() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = vdi(["completions", shell]).expect_code(0).out;
        for word in ["create", "convert", "force-share"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let directory = scratch();
    let script = directory.path().join("vdi.bash");
    fs::write(&script, vdi(["completions", "bash"]).out).unwrap();
    let parsed = Command::new("bash")
        .arg("-n")
        .arg(&script)
        .status()
        .unwrap();
    assert!(parsed.success());
}

#[test]
fn info_shows_people_what_the_image_is() {
    let directory = scratch();
    let path = directory.path().join("a.vdi");
    image()
        .with_comment("line 1\n\x1b[2J\"ü\"".as_bytes())
        .with_field("lchs_cylinders", 20)
        .with_field("lchs_heads", 16)
        .with_field("lchs_sectors", 63)
        .with_field("blocks_allocated", 9)
        .write(&path);
    let text = vdi(words!["info", path]).expect_code(0).out;
    for part in [
        "vdi 1.1, dynamic",
        "8 MiB (8388608 bytes)",
        "file of 3 MiB (3146752 bytes)",
        "1 MiB (1048576 bytes)",
        "3 allocated, 1 zero, 4 unallocated",
        "00001111-0000",
        "00002222-0000",
        r#"line 1\n\u{1b}[2J\"ü\""#,
        "20 cylinders, 16 heads, 63 sectors",
        "warning:",
        "blocks_allocated is 9",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let json = info(&path);
    assert_eq!(json["warnings"].as_array().unwrap().len(), 1);
    let data = &json["format-specific"]["data"];
    assert_eq!(data["comment"], "line 1\n\x1b[2J\"ü\"");
    assert_eq!(
        data["lchs-geometry"],
        serde_json::json!({"cylinders": 20, "heads": 16, "sectors": 63})
    );
    assert_eq!(
        json["actual-size"].as_u64(),
        Some(fs::metadata(&path).unwrap().blocks() * 512)
    );
    let chain = vdi(words!["info", "--json", "--backing-chain", path])
        .expect_code(0)
        .json();
    assert_eq!(chain, serde_json::json!([json]));
}

#[test]
fn info_says_which_blocks_a_stopped_resize_left_behind_the_numbers() {
    let directory = scratch();
    let path = directory.path().join("a.vdi");
    let full = image().with_blocks(3).with_entry(2, 2);
    full.with_entry(0, 3).with_len_change(1 << 20).write(&path);
    let json = info(&path);
    assert_eq!(json["format-specific"]["data"]["fragmentation"]["away"], 1);
    let warning = json["warnings"][0].as_str().unwrap();
    let text = vdi(words!["info", path]).expect_code(0).out;
    for part in ["1 of its blocks", "number of 3", "`vdi check`"] {
        assert!(warning.contains(part), "{part} is not in {warning}");
    }
    assert!(text.contains(warning), "{text}");
    vdi(words!["repair", "--apply", path]).expect_code(0);
    let json = info(&path);
    assert_eq!(json["format-specific"]["data"]["fragmentation"]["away"], 0);
    assert_eq!(json["warnings"], serde_json::json!([]));
}

#[test]
fn map_shows_every_part_of_the_disk_once() {
    let directory = scratch();
    let path = directory.path().join("a.vdi");
    image().write(&path);
    let map = vdi(words!["map", "--json", path]).expect_code(0).json();
    let extent = |start: u64, length: u64, present: bool, offset: Option<u64>| {
        let mut extent = serde_json::json!({
            "start": start * MIB, "length": length * MIB, "depth": 0, "present": present,
            "zero": offset.is_none(), "data": offset.is_some(), "compressed": false,
        });
        if let Some(offset) = offset {
            extent["offset"] = offset.into();
            extent["filename"] = path.to_str().into();
        }
        extent
    };
    let expected = [
        extent(0, 2, true, Some(1024)),
        extent(2, 1, false, None),
        extent(3, 1, true, None),
        extent(4, 1, true, Some(1024 + 2 * MIB)),
        extent(5, 3, false, None),
    ];
    assert_eq!(map, serde_json::json!(expected));
    let text = vdi(words!["map", path]).expect_code(0).out;
    let states: Vec<_> = text
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().nth(2).unwrap())
        .collect();
    assert_eq!(
        states,
        ["stored", "unallocated", "zero", "stored", "unallocated"]
    );
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let directory = scratch();
    let path = directory.path().join("a.vdi");
    let mut checkered = image().with_blocks(60_000);
    for block in (6..60_000).step_by(2) {
        checkered = checkered.with_entry(block, vdi_tests::builder::ZERO);
    }
    checkered.write(&path);
    let mut child = Command::new(program("vdi"))
        .args(words!["map", path])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert_eq!(err, "");
}

#[test]
fn convert_keeps_the_contents_and_leaves_zeros_out() {
    let directory = scratch();
    let name = |name: &str| directory.path().join(name);
    let raw = raw_disk(directory.path());
    vdi(words![
        "convert",
        "-f",
        "raw",
        "-O",
        "vdi",
        raw,
        name("d.vdi")
    ])
    .expect_code(0);
    assert_eq!(
        info(&name("d.vdi"))["format-specific"]["data"]["blocks"]["allocated"],
        3
    );
    vdi(words![
        "convert",
        "-O",
        "vdi",
        "--fixed",
        name("d.vdi"),
        name("f.vdi")
    ])
    .expect_code(0);
    assert_eq!(
        info(&name("f.vdi"))["format-specific"]["data"]["kind"],
        "fixed"
    );
    assert!(fs::metadata(name("f.vdi")).unwrap().blocks() * 512 >= 12 * MIB);
    vdi(words![
        "convert",
        "-O",
        "vdi",
        "--block-size",
        "128k",
        name("f.vdi"),
        name("s.vdi")
    ])
    .expect_code(0);
    // 1 + 2 + 1 blocks of 128 KiB: the island of 70 000 bytes begins at a block and ends in it.
    assert_eq!(
        info(&name("s.vdi"))["format-specific"]["data"]["blocks"]["allocated"],
        3
    );
    vdi(words![
        "convert",
        "-O",
        "raw",
        name("s.vdi"),
        name("back.raw")
    ])
    .expect_code(0);
    assert!(fs::read(&raw).unwrap() == fs::read(name("back.raw")).unwrap());
    // The islands and nothing else; the temporary files are gone.
    assert!(fs::metadata(name("back.raw")).unwrap().blocks() * 512 <= 256 << 10);
    assert!(
        fs::metadata(name("d.vdi")).unwrap().blocks() * 512 <= 512 << 10,
        "zeros in a block take no space"
    );
    assert_eq!(
        names(directory.path()),
        ["back.raw", "d.vdi", "disk.raw", "f.vdi", "s.vdi"]
    );
}

#[test]
fn a_source_is_never_guessed_to_be_raw_or_vdi() {
    let directory = scratch();
    let name = |name: &str| directory.path().join(name);
    let raw = raw_disk(directory.path());
    let answer = vdi(words!["convert", "-O", "vdi", raw, name("x.vdi")]).expect_code(1);
    assert!(
        answer.err.contains("signature") && answer.err.contains("-f raw"),
        "{answer:#?}"
    );
    assert!(!name("x.vdi").exists());
    // A guest that wrote a VDI header into its raw disk gets it back as data.
    image().write(&name("trap.raw"));
    vdi(words![
        "convert",
        "-f",
        "raw",
        "-O",
        "raw",
        name("trap.raw"),
        name("copy.raw")
    ])
    .expect_code(0);
    assert!(fs::read(name("trap.raw")).unwrap() == fs::read(name("copy.raw")).unwrap());
    vdi(words![
        "convert",
        "-f",
        "raw",
        "-O",
        "vdi",
        name("trap.raw"),
        name("copy.vdi")
    ])
    .expect_code(0);
    assert_eq!(
        info(&name("copy.vdi"))["virtual-size"],
        fs::metadata(name("trap.raw")).unwrap().len()
    );
}

#[test]
fn convert_refuses_to_destroy() {
    let directory = scratch();
    let name = |name: &str| directory.path().join(name);
    image().write(&name("a.vdi"));
    fs::hard_link(name("a.vdi"), name("link.vdi")).unwrap();
    std::os::unix::fs::symlink(name("a.vdi"), name("soft.vdi")).unwrap();
    for same in ["a.vdi", "link.vdi", "soft.vdi"] {
        let answer = vdi(words![
            "convert",
            "--force",
            "-O",
            "raw",
            name("a.vdi"),
            name(same)
        ])
        .expect_code(1);
        assert!(answer.err.contains("same file"), "{answer:#?}");
    }
    fs::write(name("old"), "precious").unwrap();
    let answer = vdi(words!["convert", "-O", "raw", name("a.vdi"), name("old")]).expect_code(1);
    assert!(answer.err.contains("--force"), "{answer:#?}");
    assert_eq!(fs::read(name("old")).unwrap(), b"precious");
    // A source that cannot be read in full leaves the old file, too.
    image().with_entry(5, 3).write(&name("broken.vdi"));
    vdi(words![
        "convert",
        "--force",
        "-O",
        "raw",
        name("broken.vdi"),
        name("old")
    ])
    .expect_code(1);
    assert_eq!(fs::read(name("old")).unwrap(), b"precious");
    vdi(words![
        "convert",
        "--force",
        "-O",
        "raw",
        name("a.vdi"),
        name("old")
    ])
    .expect_code(0);
    assert_eq!(fs::metadata(name("old")).unwrap().len(), 8 * MIB);
    vdi(words![
        "convert",
        "-O",
        "raw",
        name("a.vdi"),
        directory.path()
    ])
    .expect_code(1);
    assert_eq!(
        names(directory.path()),
        ["a.vdi", "broken.vdi", "link.vdi", "old", "soft.vdi"]
    );
}

#[test]
fn words_of_qemu_img_are_understood() {
    let directory = scratch();
    let name = |name: &str| directory.path().join(name);
    let (disk, child, new) = (name("disk.vdi"), name("child.vdi"), name("new.raw"));
    vdi(words!["create", "-q", "-f", "vdi", disk, "4M"]).expect_code(0);
    vdi(words!["snapshot", disk, child]).expect_code(0);
    for verb in ["info", "check", "map"] {
        let plain = vdi(words![verb, disk]).expect_code(0);
        let json = vdi(words![verb, "--json", disk]).expect_code(0);
        assert_ne!(plain.out, json.out);
        for (format, same) in [("human", &plain), ("json", &json)] {
            let answer = vdi(words![verb, "-f", "vdi", "--output", format, disk]).expect_code(0);
            assert_eq!(answer.out, same.out);
        }
        vdi(words![verb, "-f", "raw", disk]).expect_code(1);
    }
    let answer = vdi(words!["check", "-q", disk]).expect_code(0);
    assert_eq!(answer.out, "");
    vdi(words![
        "convert", "-p", "-W", "-m", "2", "-O", "raw", disk, new
    ])
    .expect_code(0);
    vdi(words!["compare", "-p", "-F", "raw", disk, new]).expect_code(0);
    vdi(words![
        "rebase", "-p", "-f", "vdi", "-F", "vdi", "-b", disk, child
    ])
    .expect_code(0);
    vdi(words!["commit", "-p", "-f", "vdi", child]).expect_code(0);
    let answer = vdi(words!["resize", "-q", "-f", "vdi", disk, "+1M"]).expect_code(0);
    assert_eq!(answer.out, "");
    let answer = vdi(words!["check", "-r", "all", disk]).expect_code(1);
    assert!(answer.err.contains("tip: `vdi repair"), "{answer:#?}");
}

#[test]
fn map_shows_the_part_of_the_disk_that_is_asked_for() {
    let directory = scratch();
    let path = directory.path().join("disk.vdi");
    image().write(&path);
    let part = |words: &[&str]| -> Vec<(u64, u64, bool)> {
        let words: Vec<_> = words.iter().map(std::ffi::OsStr::new).collect();
        let words = [words!["map", "--json", path].as_slice(), &words].concat();
        let ranges = vdi(words).expect_code(0).json();
        let number = |range: &serde_json::Value, key: &str| range[key].as_u64().unwrap();
        let ranges = ranges.as_array().unwrap().iter().map(|range| {
            let is_data = range["data"].as_bool().unwrap();
            (number(range, "start"), number(range, "length"), is_data)
        });
        ranges.collect()
    };
    assert_eq!(
        part(&["-s", "3584k", "-l", "1M"]),
        [(7 * MIB / 2, MIB / 2, false), (4 * MIB, MIB / 2, true)]
    );
    assert_eq!(part(&["--start-offset=7M"]), [(7 * MIB, MIB, false)]);
    assert_eq!(part(&["--max-length=2M"]), [(0, 2 * MIB, true)]);
    assert_eq!(part(&["-s", "8M"]), []);
    let answer = vdi(words!["map", "-s", "4M", "-l", "1M", path]).expect_code(0);
    assert!(answer.out.contains("0x400000"), "{answer:#?}");
}

/// What is named may be anybody's.
#[test]
fn names_in_answers_do_not_steer_the_terminal() {
    let directory = scratch();
    let path = directory.path().join("\u{1b}[31m\nred");
    let answer = vdi(words!["check", path]).expect_code(1);
    assert!(answer.err.contains("\\u{1b}[31m\\u{a}red"), "{answer:#?}");
    image().write(&path);
    let answer = vdi(words!["check", path]).expect_code(0);
    assert!(answer.out.contains("\\u{1b}[31m\\u{a}red"), "{answer:#?}");
    assert!(!answer.out.contains('\u{1b}'), "{answer:#?}");
}

/// Converts, is interrupted once it has begun, and answers; `None` if it was too quick.
fn interrupted_convert(raw: &Path, out: &Path) -> Option<String> {
    let mut child = spawn(
        Command::new(program("vdi"))
            .args(words![
                "convert", "--force", "-f", "raw", "-O", "vdi", raw, out
            ])
            .stderr(Stdio::piped()),
    );
    let start = Instant::now();
    while names(out.parent().unwrap()).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(60), "it begins");
        std::thread::sleep(Duration::from_millis(1));
    }
    let pid = Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    let mut err = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    let code = child.wait().unwrap().code();
    (code != Some(0)).then(|| {
        assert_eq!(code, Some(1), "{err}");
        err
    })
}

#[test]
fn a_convert_that_is_interrupted_leaves_nothing() {
    let (sources, results) = (scratch(), scratch());
    let (raw, out) = (
        sources.path().join("disk.raw"),
        results.path().join("disk.vdi"),
    );
    // Enough to take a while.
    let mut file = fs::File::create(&raw).unwrap();
    for _ in 0..200 {
        file.write_all(&[0x77; 1 << 20]).unwrap();
    }
    let err = (0..10).find_map(|_| {
        let _ = fs::remove_file(&out);
        interrupted_convert(&raw, &out)
    });
    let err = err.expect("of ten conversions one is caught at it");
    assert!(err.contains("interrupted"), "{err}");
    assert_eq!(names(results.path()), [""; 0]);
}

const MOST: u64 = 0xFFFF_FFFF;

/// A field, a bad value, and what an error about it must name.
const HOSTILE_FIELDS: [(&str, u64, &[&str]); 18] = [
    ("signature", 0, &["signature is 0x00000000", "0xbeda107f"]),
    ("version", 0, &["version is 0.0", "1.x"]),
    ("version", 0x0002_0001, &["version is 2.1", "1.x"]),
    ("header_size", 383, &["header_size is 383", "384"]),
    ("image_type", 0, &["image_type is 0", "1 (dynamic)"]),
    (
        "image_type",
        MOST,
        &["image_type is 4294967295", "4 (differencing)"],
    ),
    ("image_type", 4, &["differencing"]),
    ("image_flags", 4, &["image_flags is 0x4", "0x4"]),
    ("offset_bmap", 0, &["offset_bmap is 0", "456"]),
    ("offset_data", 0, &["offset_data is 0", "544"]),
    (
        "blocks_in_image",
        MOST,
        &["4294967295 entries", "offset_data is 1024"],
    ),
    ("blocks_in_image", 7, &["blocks_in_image is 7", "needs 8"]),
    ("disk_size", 0, &["disk_size is 0"]),
    (
        "disk_size",
        u64::MAX,
        &["disk_size 18446744073709551615", "blocks_in_image is 8"],
    ),
    ("block_size", 0, &["block_size is 0", "131072", "134217728"]),
    (
        "block_size",
        MOST,
        &["block_size is 4294967295", "134217728"],
    ),
    (
        "block_extra",
        MOST,
        &["block_extra is 4294967295", "power of two"],
    ),
    (
        "lchs_sector_size",
        MOST,
        &["LCHS sector size is 4294967295", "512"],
    ),
];

#[test]
fn hostile_headers_are_refused_with_field_value_and_limit() {
    let directory = scratch();
    let (path, out) = (
        directory.path().join("hostile.vdi"),
        directory.path().join("out.raw"),
    );
    for (field, value, parts) in HOSTILE_FIELDS {
        image().with_field(field, value).write(&path);
        for words in [
            words!["info", path].as_slice(),
            &words!["map", path],
            &words!["convert", "-O", "raw", path, out],
        ] {
            let answer = vdi(words).expect_code(1);
            assert!(
                answer.err.starts_with("vdi: error: ") && answer.err.lines().count() == 1,
                "{answer:#?}"
            );
            for part in parts {
                assert!(
                    answer.err.contains(part),
                    "{field} {value}: {part} is not in {answer:#?}"
                );
            }
        }
        let code = vdi(words!["check", path]).code;
        assert!(matches!(code, Some(0..=2)), "{field} {value}: {code:?}");
    }
    assert_eq!(names(directory.path()), ["hostile.vdi"]);
}

#[test]
fn hostile_maps_are_refused_with_block_value_and_limit() {
    let directory = scratch();
    let path = directory.path().join("hostile.vdi");
    for (builder, parts) in [
        (
            image().with_entry(2, 8),
            ["disk block 2", "file block 8", "blocks_in_image is 8"],
        ),
        (
            image().with_entry(2, 3),
            ["disk block 2", "file block 3", "3146752"],
        ),
        (
            image().with_shared_block(1, 2),
            ["disk block 2", "file block 1", "another"],
        ),
        (
            image().with_len_change(-3 * (1 << 20) - 500),
            ["524 bytes", "8 entries", "544"],
        ),
    ] {
        builder.write(&path);
        let answer = vdi(words!["info", path]).expect_code(1);
        for part in parts {
            assert!(answer.err.contains(part), "{part} is not in {answer:#?}");
        }
    }
}

#[test]
fn short_files_are_not_zeros() {
    let directory = scratch();
    let path = directory.path().join("short.vdi");
    image().write(&path);
    let whole = fs::read(&path).unwrap();
    for len in [
        0,
        1,
        63,
        64,
        67,
        68,
        72,
        455,
        456,
        471,
        472,
        511,
        512,
        543,
        544,
        1023,
        1024,
        1024 + (1 << 20),
    ] {
        fs::write(&path, &whole[..len]).unwrap();
        for verb in ["info", "map"] {
            vdi(words![verb, path]).expect_code(1);
        }
        vdi(words!["check", path]).expect_code(2);
    }
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let directory = scratch();
    let fifo = directory.path().join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    for path in [
        directory.path(),
        Path::new("/dev/null"),
        &fifo,
        &directory.path().join("nothing"),
    ] {
        for verb in ["info", "check", "map"] {
            let answer = vdi(words![verb, path]).expect_code(1);
            assert!(answer.err.starts_with("vdi: error: "), "{answer:#?}");
        }
    }
}

#[test]
fn progress_is_for_terminals_only() {
    let directory = scratch();
    let raw = raw_disk(directory.path());
    let answer = vdi(words![
        "convert",
        "-f",
        "raw",
        "-O",
        "vdi",
        raw,
        directory.path().join("a.vdi")
    ])
    .expect_code(0);
    assert_eq!((answer.out.as_str(), answer.err.as_str()), ("", ""));
}
