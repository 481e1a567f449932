//! How long a server takes to start, and how much memory it has when it is idle.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::back_end::{BackEnd, Programs, Server, Service};
use crate::cell::CellError;
use crate::client;
use crate::contents::{Contents, PAGE};
use crate::images::{self, ImageError};
use crate::lane::Lane;
use crate::record::Start;
use crate::workload::Waiting;

/// The disks that servers are started with.
pub(crate) const DISKS: [(u64, &str); 3] =
    [(4 << 30, "4 GiB"), (2 << 40, "2 TiB"), (64 << 40, "64 TiB")];

/// Makes an empty image of such a disk.
pub(crate) fn make_image(programs: &Programs, path: &Path, bytes: u64) -> Result<(), ImageError> {
    images::run(
        Command::new(&programs.vdi)
            .arg("create")
            .arg(path)
            .arg(bytes.to_string()),
    )
}

/// Starts a server on an empty image, reads a page, and looks at its memory.
pub(crate) fn measure(
    programs: &Programs,
    server: Server,
    image: &Path,
    disk_bytes: u64,
    round: u32,
) -> Result<Start, CellError> {
    let service = Service {
        server,
        image,
        direct: false,
        queues: 1,
        pinned: false,
    };
    let begin = Instant::now();
    let mut back_end = BackEnd::start(programs, &service)?;
    let greeted = client::greet(&mut back_end)?;
    let first_reply = begin.elapsed();
    let mut connection = greeted.start(1, 1, PAGE, Waiting::Calls)?;
    let contents = Contents::zeros(PAGE as u64);
    Lane::new(&mut connection.queues[0], &contents, Waiting::Calls).verify(vec![0])?;
    std::thread::sleep(Duration::from_millis(20));
    let idle_kib = back_end.resident_kib().unwrap_or_default();
    drop(connection);
    back_end.end()?;
    Ok(Start {
        server,
        disk_bytes,
        round,
        first_reply_ms: first_reply.as_secs_f64() * 1000.0,
        idle_kib,
    })
}
