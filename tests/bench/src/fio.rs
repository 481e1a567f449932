//! The limit: fio on a raw file by `io_uring`, with no guest, no protocol and no format between.

use std::io;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::cpus;
use crate::images::{BLOCK, Image};
use crate::workload::{Operation, Order, Workload};

/// Why fio did not measure.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FioError {
    #[error("fio cannot be started; is it installed?")]
    Start(#[source] io::Error),
    #[error("fio failed: {0}")]
    Failed(String),
    #[error("fio's report lacks {0}")]
    Report(&'static str),
}

/// What fio counted.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) requests: u64,
    pub(crate) iops: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// What its own thread took; what the kernel's helpers took for it is not known.
    pub(crate) cpu_us: f64,
}

/// Lets fio do to a raw file what the workload does to a disk.
pub(crate) fn run(
    workload: &Workload,
    image: &Image,
    direct: bool,
    measured: Duration,
) -> Result<Measured, FioError> {
    let mut fio = Command::new("fio");
    fio.args(arguments(workload, &image.path, direct, measured));
    fio.arg(format!("--size={}", image.end));
    let output = fio.stdin(Stdio::null()).output().map_err(FioError::Start)?;
    if !output.status.success() {
        return Err(failure(&output));
    }
    let report: Value = serde_json::from_slice(&output.stdout).map_err(|_| failure(&output))?;
    let job = report.pointer("/jobs/0").ok_or(FioError::Report("a job"))?;
    summary(workload, job)
}

fn arguments(workload: &Workload, file: &Path, direct: bool, measured: Duration) -> Vec<String> {
    let order = match (workload.operation, workload.order) {
        (Operation::Read, Order::Random) => "randread".to_owned(),
        (Operation::Read, Order::Sequential | Order::OnceEachBlock) => "read".to_owned(),
        (Operation::Mixed, _) => "randrw".to_owned(),
        (Operation::Write | Operation::WriteFlush, Order::Random) => "randwrite".to_owned(),
        (Operation::Write, Order::OnceEachBlock) => {
            // The beginning of each block: what lies between is skipped.
            format!("write:{}", BLOCK - workload.bytes as u64)
        }
        (Operation::Write | Operation::WriteFlush | Operation::Discard, _) => "write".to_owned(),
    };
    let mut arguments = vec![
        "--name=limit".to_owned(),
        "--ioengine=io_uring".to_owned(),
        "--thread=1".to_owned(),
        "--group_reporting=1".to_owned(),
        "--output-format=json".to_owned(),
        "--fallocate=none".to_owned(),
        "--norandommap=1".to_owned(),
        "--randrepeat=0".to_owned(),
        "--invalidate=0".to_owned(),
        "--rwmixread=70".to_owned(),
        format!("--filename={}", file.display()),
        format!("--rw={order}"),
        format!("--bs={}", workload.bytes),
        format!("--iodepth={}", workload.depth),
        format!("--numjobs={}", workload.queues),
        format!("--direct={}", u8::from(direct)),
        format!("--runtime={}ms", measured.as_millis()),
    ];
    if workload.operation == Operation::WriteFlush {
        arguments.push("--fdatasync=1".to_owned());
    }
    if !workload.runs_out() {
        arguments.push("--time_based=1".to_owned());
    }
    if workload.queues == 1 {
        arguments.push(format!("--cpus_allowed={}", cpus::of_server()));
    }
    arguments
}

fn failure(output: &Output) -> FioError {
    let said = [&output.stderr[..], &output.stdout[..]].concat();
    FioError::Failed(String::from_utf8_lossy(&said).into_owned())
}

fn summary(workload: &Workload, job: &Value) -> Result<Measured, FioError> {
    let number = |path: &str| job.pointer(path).and_then(Value::as_f64);
    let (mut requests, mut iops) = (0, 0.0);
    for side in ["read", "write"] {
        let count = job
            .pointer(&format!("/{side}/total_ios"))
            .and_then(Value::as_u64);
        requests += count.ok_or(FioError::Report("counts"))?;
        iops += number(&format!("/{side}/iops")).ok_or(FioError::Report("rates"))?;
    }
    let side = if matches!(workload.operation, Operation::Read | Operation::Mixed) {
        "read"
    } else {
        "write"
    };
    let percentile =
        |percent| number(&format!("/{side}/clat_ns/percentile/{percent}")).map(|ns| ns / 1000.0);
    let cpu = number("/usr_cpu")
        .zip(number("/sys_cpu"))
        .map(|(user, system)| user + system);
    // Percents of the time that all its threads had.
    let threads_us = iops.recip() * 1e6 * workload.queues as f64;
    Ok(Measured {
        requests,
        iops,
        p50_us: percentile("50.000000").ok_or(FioError::Report("latencies"))?,
        p99_us: percentile("99.000000").ok_or(FioError::Report("latencies"))?,
        cpu_us: cpu.ok_or(FioError::Report("CPU times"))? / 100.0 * threads_us,
    })
}
