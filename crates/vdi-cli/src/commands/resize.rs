//! `vdi resize`: the plan, and its two permissions.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use vdi_core::Capacity;
use vdi_core::resize::{self, ResizeError, ResizePlan, ResizeStep};

use super::{Failure, done, open_to_change, output};
use crate::args::ResizeArgs;
use crate::daemon;
use crate::size::Human;

/// Why a size that is possible is not given.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("{} has {from} bytes, and the size asked for is not possible", path.display())]
    NoSuchSize { path: PathBuf, from: u64 },
    #[error("{} is not what the daemon at {} serves, which is {}", path.display(), socket.display(), served.display())]
    OtherImage {
        path: PathBuf,
        socket: PathBuf,
        served: PathBuf,
    },
    #[error("{} has {from} bytes and would get smaller, {to}; give --shrink to cut its end off", path.display())]
    Smaller { path: PathBuf, from: u64, to: u64 },
    #[error(
        "{lost_bytes} bytes of data that are not zeros lie behind byte {to} of {} and would be lost; \
         give --force, too, to lose them",
        path.display()
    )]
    LosesData {
        path: PathBuf,
        to: u64,
        lost_bytes: u64,
    },
}

pub(super) fn run(args: &ResizeArgs) -> Result<ExitCode, Failure> {
    if let Some(socket) = &args.online {
        return run_online(args, socket);
    }
    let failed = |source: ResizeError| Failure::Resize {
        path: args.file.clone(),
        source,
    };
    let disk = open_to_change(&args.file, &args.chain, args.dry_run)?;
    let from = disk.capacity().bytes();
    let to = args.size.from(from).ok_or_else(|| Refused::NoSuchSize {
        path: args.file.clone(),
        from,
    })?;
    if to < from && !args.shrink {
        let path = args.file.clone();
        return Err(Refused::Smaller { path, from, to }.into());
    }
    let plan = resize::plan(&disk, Capacity::from_bytes_rounded_down(to)).map_err(failed)?;
    let mut out = output();
    if !args.quiet {
        print_plan(&mut out, args, &plan)?;
        out.flush()?;
    }
    if let ResizeStep::Shrink { lost_bytes, .. } = plan.step
        && lost_bytes > 0
        && !args.force
    {
        let path = args.file.clone();
        return Err(Refused::LosesData {
            path,
            to,
            lost_bytes,
        }
        .into());
    }
    if !args.dry_run {
        resize::apply(&disk, &plan).map_err(failed)?;
    }
    done(out, ExitCode::SUCCESS)
}

/// Has the daemon do it.
fn run_online(args: &ResizeArgs, socket: &Path) -> Result<ExitCode, Failure> {
    let info = daemon::info(socket)?;
    let identity = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino()));
    let is_same = matches!((identity(&args.file), identity(&info.image)), (Ok(a), Ok(b)) if a == b);
    if !is_same {
        return Err(Refused::OtherImage {
            path: args.file.clone(),
            socket: socket.to_owned(),
            served: info.image,
        }
        .into());
    }
    let from = info.size_bytes;
    let to = args.size.from(from).ok_or_else(|| Refused::NoSuchSize {
        path: args.file.clone(),
        from,
    })?;
    let now = daemon::resize(socket, to)?.size_bytes;
    let mut out = output();
    if args.quiet {
        return done(out, ExitCode::SUCCESS);
    }
    writeln!(
        out,
        "{}: grew from {from} to {now} bytes ({}); a front end that listens for changes was told",
        args.file.display(),
        Human(now)
    )?;
    done(out, ExitCode::SUCCESS)
}

fn print_plan(out: &mut impl Write, args: &ResizeArgs, plan: &ResizePlan) -> Result<(), Failure> {
    let name = args.file.display();
    let (from, to) = (plan.from.bytes(), plan.to.bytes());
    match &plan.step {
        ResizeStep::Nothing => writeln!(out, "{name}: has {from} bytes already")?,
        ResizeStep::Grow { vacated, filled } => {
            writeln!(
                out,
                "{name}: grows from {from} to {to} bytes ({})",
                Human(to)
            )?;
            if *vacated > 0 {
                writeln!(
                    out,
                    "  the place of the first {vacated} blocks of the file goes to the map"
                )?;
            }
            if *filled > 0 {
                writeln!(out, "  {filled} blocks without storage get some")?;
            }
        }
        ResizeStep::Shrink { cut, lost_bytes } => {
            writeln!(
                out,
                "{name}: shrinks from {from} to {to} bytes ({})",
                Human(to)
            )?;
            let blocks = cut.len();
            writeln!(
                out,
                "  {blocks} blocks with storage are cut; {lost_bytes} bytes of data are lost"
            )?;
        }
    }
    Ok(())
}
