//! `vdi repair`: shows the plan of a repair, or carries it out.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use nix::sys::statvfs;
use vdi_core::check::{self, Report};
use vdi_core::repair::{self, BlockPlan, Plan, Unreadable};
use vdi_core::{Access, HostFile, Locking};

use super::check::exit_code;
use super::{Failure, done, output};
use crate::args::RepairArgs;
use crate::report;

/// Shows what is to be done; with `--apply` does it, and exits as a check does then.
pub(super) fn repair(args: &RepairArgs) -> Result<ExitCode, Failure> {
    let access = if args.apply {
        Access::Writable
    } else {
        Access::ReadOnly
    };
    let file = HostFile::open(&args.file, access, Locking::Locked)?;
    let mut out = output();
    let mut plan = plan(args, &file)?;
    report::repair(&mut out, &plan)?;
    if plan.is_empty() || !args.apply {
        write_verdict(&mut out, args, &plan)?;
        return done(out, exit_code(&plan.report));
    }
    expect_room(args, &file, &plan)?;
    if !args.no_backup {
        let kept = back_up(&args.file, &file).map_err(|source| Failure::BackUp {
            path: args.file.clone(),
            source,
        })?;
        writeln!(out, "header and map are kept in {}", kept.display())?;
    }
    loop {
        // Whoever watches sees the plan before it is carried out.
        out.flush()?;
        repair::apply(&file, &plan).map_err(|source| Failure::Repair {
            path: args.file.clone(),
            source,
        })?;
        if !plan.goes_on() {
            break;
        }
        plan = self::plan(args, &file)?;
        report::repair(&mut out, &plan)?;
        if plan.is_empty() {
            break;
        }
        expect_room(args, &file, &plan)?;
    }
    let result = check(args, &file)?;
    report::check(&mut out, &args.file, &result)?;
    done(out, exit_code(&result))
}

fn plan(args: &RepairArgs, file: &HostFile) -> Result<Plan, Failure> {
    let unreadable = if args.drop_unreadable {
        Unreadable::Drop
    } else {
        Unreadable::Keep
    };
    repair::plan(file, unreadable).map_err(|source| Failure::PlanRepair {
        path: args.file.clone(),
        source,
    })
}

/// An image may claim more blocks than any disk holds. A repair that ends for want of room does no harm, but
/// fills the file system first.
fn expect_room(args: &RepairArgs, file: &HostFile, plan: &Plan) -> Result<(), Failure> {
    let path = &args.file;
    let free = statvfs::fstatvfs(file.file())
        .map(|system| {
            system
                .blocks_available()
                .saturating_mul(system.fragment_size())
        })
        .map_err(|errno| Failure::Look {
            path: path.clone(),
            source: errno.into(),
        })?;
    let needed = plan.blocks.as_ref().map_or(0, BlockPlan::copied_bytes);
    if needed > free {
        let path = path.clone();
        return Err(Failure::NoRoomToRepair { path, needed, free });
    }
    Ok(())
}

fn check(args: &RepairArgs, file: &HostFile) -> Result<Report, Failure> {
    check::check(file).map_err(|source| Failure::Check {
        path: args.file.clone(),
        source,
    })
}

fn write_verdict(out: &mut impl Write, args: &RepairArgs, plan: &Plan) -> io::Result<()> {
    let path = args.file.display();
    match (plan.is_empty(), plan.left.is_empty()) {
        (true, true) => writeln!(out, "{path}: nothing to mend"),
        (true, false) => writeln!(out, "{path}: nothing can be mended"),
        (false, _) => writeln!(
            out,
            "{path}: nothing was changed; give --apply to do all that"
        ),
    }
}

/// Keeps header and map in a new file beside the image, where they are in the image; synced.
fn back_up(path: &Path, file: &HostFile) -> io::Result<PathBuf> {
    let seconds = SystemTime::UNIX_EPOCH
        .elapsed()
        .map_or(0, |since| since.as_secs());
    let (kept, copy) = new_file(path, seconds)?;
    repair::back_up(file, |at, bytes| copy.write_all_at(bytes, at.0))?;
    copy.sync_all()?;
    let directory = match kept.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()?;
    Ok(kept)
}

/// Two repairs may come in one second.
fn new_file(path: &Path, seconds: u64) -> io::Result<(PathBuf, File)> {
    let mut nth = 0;
    loop {
        let mut name = path.as_os_str().to_owned();
        name.push(format!("{}{seconds}", repair::BACK_UP_INFIX));
        if nth > 0 {
            name.push(format!("-{nth}"));
        }
        match File::create_new(&name) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && nth < 100 => nth += 1,
            made => return made.map(|file| (name.into(), file)),
        }
    }
}
