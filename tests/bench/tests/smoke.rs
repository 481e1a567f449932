//! The benchmark runs with every kind of server, and notices wrong answers. How fast anything is, is not asked.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

/// Runs the benchmark for an instant on small disks.
fn bench(directory: &Path, words: &[&str]) -> Output {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_vdi-bench"));
    bench.args(["--media", "tmpfs", "--size-mib", "8"]);
    bench.args(["--rounds", "1", "--seconds", "0.2", "--directory"]);
    bench.arg(directory).args(words);
    bench.output().expect("it was built for this test")
}

/// A program of this workspace, beside the benchmark.
fn beside(name: &str) -> String {
    let path = Path::new(env!("CARGO_BIN_EXE_vdi-bench")).with_file_name(name);
    assert!(
        path.exists(),
        "{} is not built; run `cargo build --workspace --bins` first",
        path.display()
    );
    path.display().to_string()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn every_server_answers_every_request_right() {
    let _built = (beside("vdi"), beside("vdi-vhost"));
    let directory = tempfile::tempdir().expect("a directory can be made");
    let records = directory.path().join("records");
    let path = records.display().to_string();
    let words = [
        "--workloads",
        "mixed-4k-qd32,chainread-4k-qd32",
        "--records",
        &path,
    ];
    let output = bench(directory.path(), &words);
    assert!(output.status.success(), "{}", said(&output));

    let records = fs::read_to_string(&records).expect("there are records");
    let records = records
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("lines of JSON"));
    let loads: Vec<_> = records.filter(|record| record["kind"] == "load").collect();
    for server in [
        "vdi-vhost",
        "qsd-vdi",
        "qsd-vdi-uring",
        "qsd-raw",
        "qsd-qcow2",
        "fio",
    ] {
        let mut its = loads.iter().filter(|load| load["server"] == server);
        assert!(
            its.any(|load| load["requests"].as_u64() > Some(0)),
            "{server}"
        );
    }
    for kept in ["results.md", "results.svg"] {
        let text = fs::read_to_string(directory.path().join(kept)).expect("results are kept");
        assert!(text.contains("mixed-4k-qd32"), "{kept}: {text}");
    }
}

#[test]
fn a_server_that_reads_wrong_data_is_not_measured() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let empty = directory.path().join("empty.vdi");
    let made = Command::new(beside("vdi"))
        .arg("create")
        .arg(&empty)
        .arg("8M")
        .status();
    assert!(made.expect("vdi runs").success());
    // It serves an empty image, whatever it is asked for: --socket-path PATH --blk-file IMAGE.
    let liar = directory.path().join("liar");
    let script = format!(
        "#!/bin/sh\nexec {} \"$1\" \"$2\" \"$3\" {}\n",
        beside("vdi-vhost"),
        empty.display()
    );
    fs::write(&liar, script).expect("the directory is ours");
    fs::set_permissions(&liar, fs::Permissions::from_mode(0o755)).expect("the file is ours");

    let liar = liar.display().to_string();
    let words = [
        "--workloads",
        "randread-4k-qd32",
        "--servers",
        "other",
        "--other",
        &liar,
    ];
    let output = bench(directory.path(), &words);
    assert!(!output.status.success());
    assert!(
        said(&output).contains("reads as 0x0000000000000000"),
        "{}",
        said(&output)
    );
}
