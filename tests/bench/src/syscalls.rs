//! Counts a server's system calls: with perf if it can, else with strace, which slows the server down far more.

use std::fs;
use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Why system calls were not counted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CounterError {
    #[error("{program} failed")]
    Run {
        program: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("{program} reports no count: {report}")]
    Report {
        program: &'static str,
        report: String,
    },
}

/// Something that counts the system calls of all threads of a process.
#[derive(Debug)]
pub(crate) struct Counter {
    program: &'static str,
    child: Child,
    report: tempfile::NamedTempFile,
}

/// The program that may count here, if there is one.
static PROGRAM: LazyLock<Option<&'static str>> = LazyLock::new(|| {
    let works = |program: &str, words: &[&str]| {
        let mut command = Command::new(program);
        command
            .args(words)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    if works("perf", &["stat", "-e", EVENT, "true"]) {
        Some("perf")
    } else {
        works("strace", &["-c", "true"]).then_some("strace")
    }
});

const EVENT: &str = "raw_syscalls:sys_enter";

impl Counter {
    /// Begins to count; nothing if no program can.
    pub(crate) fn attach(pid: Pid) -> Result<Option<Self>, CounterError> {
        let Some(program) = *PROGRAM else {
            return Ok(None);
        };
        let failed = |source| CounterError::Run { program, source };
        let report = tempfile::NamedTempFile::new().map_err(failed)?;
        let mut command = Command::new(program);
        match program {
            "perf" => command.args(["stat", "-x", ",", "-e", EVENT]),
            _ => command.args(["-c", "-f"]),
        };
        command.arg("-o").arg(report.path());
        command.arg("-p").arg(pid.to_string());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command.spawn().map_err(failed)?;
        // Neither says when it is ready.
        std::thread::sleep(Duration::from_millis(150));
        Ok(Some(Self {
            program,
            child,
            report,
        }))
    }

    /// Ends it; how many it counted.
    pub(crate) fn finish(mut self) -> Result<u64, CounterError> {
        let program = self.program;
        let failed = |source| CounterError::Run { program, source };
        let pid = i32::try_from(self.child.id()).expect("Linux has 22-bit process ids");
        kill(Pid::from_raw(pid), Signal::SIGINT).map_err(|errno| failed(errno.into()))?;
        self.child.wait().map_err(failed)?;
        let report = fs::read_to_string(self.report.path()).map_err(failed)?;
        let count = match program {
            "perf" => perf_count(&report),
            _ => strace_count(&report),
        };
        count.ok_or(CounterError::Report { program, report })
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let _may_be_gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// `1234,,raw_syscalls:sys_enter,...`
fn perf_count(report: &str) -> Option<u64> {
    let line = report.lines().find(|line| line.contains(EVENT))?;
    line.split(',').next()?.parse().ok()
}

/// `100.00    0.012345           9      1234         5 total`
fn strace_count(report: &str) -> Option<u64> {
    let line = report.lines().rev().find(|line| line.ends_with("total"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_found_in_reports() {
        let perf = "# started on Sun\n\n4711,,raw_syscalls:sys_enter,1234,100.00,,\n";
        assert_eq!(perf_count(perf), Some(4711));
        let strace = "% time seconds usecs/call calls errors syscall\n100.00    0.012345           9      1234         5 total\n";
        assert_eq!(strace_count(strace), Some(1234));
    }
}
