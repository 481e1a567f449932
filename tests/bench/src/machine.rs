//! Where and when something was measured.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::cpus;

/// A machine, its software and a day.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) date: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) kernel: String,
    pub(crate) file_system: String,
    pub(crate) qemu: String,
    pub(crate) fio: String,
    pub(crate) rounds: u32,
    pub(crate) seconds: f64,
}

impl Machine {
    /// This one, today.
    pub(crate) fn here(on_disk: &Path, rounds: u32, seconds: f64) -> Self {
        let cpu_info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu_info
            .lines()
            .find_map(|line| line.strip_prefix("model name"));
        let model = model.map_or("unknown", |model| {
            model.trim_start_matches(['\t', ' ', ':'])
        });
        Self {
            date: said("date", &["-u", "+%F"]),
            cpu: model.to_owned(),
            cpus: cpus::count(),
            kernel: said("uname", &["-sr"]),
            file_system: said("df", &["--output=fstype", &on_disk.display().to_string()]),
            qemu: said("qemu-storage-daemon", &["--version"]),
            fio: said("fio", &["--version"]),
            rounds,
            seconds,
        }
    }

    /// All of it in a sentence.
    pub(crate) fn sentence(&self) -> String {
        let Self {
            date,
            cpu,
            cpus,
            kernel,
            file_system,
            qemu,
            fio,
            rounds,
            seconds,
        } = self;
        let qemu = qemu.trim_start_matches("qemu-storage-daemon version ");
        let qemu = qemu.split(' ').next().unwrap_or(qemu);
        format!(
            "Measured on {date}: {cpus} CPUs ({cpu}), {kernel}, file system on the disk {file_system}, QEMU {qemu}, {fio}; \
             medians of {rounds} rounds of {seconds} s in which the servers take turns."
        )
    }
}

/// What a program says: its first line, or what stands below its heading.
fn said(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output();
    let text = output.map_or_else(
        |_| String::new(),
        |output| String::from_utf8_lossy(&output.stdout).into_owned(),
    );
    let mut lines = text.lines();
    let line = if program == "df" {
        lines.nth(1)
    } else {
        lines.next()
    };
    line.unwrap_or("unknown").trim().to_owned()
}
