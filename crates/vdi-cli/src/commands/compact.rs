//! `vdi compact`: the plan, and what it saved.

use std::io::Write;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use vdi_core::compact::{self, CompactError, CompactPlan, Equal};

use super::{Failure, done, open_to_change, output};
use crate::args::CompactArgs;
use crate::size::Human;

pub(super) fn run(args: &CompactArgs) -> Result<ExitCode, Failure> {
    let failed = |source: CompactError| Failure::Compact {
        path: args.file.clone(),
        source,
    };
    let disk = open_to_change(&args.file, &args.chain, args.dry_run)?;
    let equal = if args.same_as_parent {
        Equal::ZerosAndParent
    } else {
        Equal::Zeros
    };
    let bar = if args.quiet {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(0)
    };
    bar.set_style(
        ProgressStyle::with_template("{wide_bar} {pos}/{len} blocks {eta}")
            .expect("the template is right"),
    );
    let planned = compact::plan(&disk, equal, &mut |done, of| {
        bar.set_length(of.into());
        bar.set_position(done.into());
    });
    bar.finish_and_clear();
    let plan = planned.map_err(failed)?;
    let mut out = output();
    if !args.quiet {
        print_plan(&mut out, args, &plan)?;
        out.flush()?;
    }
    if args.dry_run || plan.is_empty() {
        return done(out, ExitCode::SUCCESS);
    }
    compact::apply(&disk, &plan).map_err(failed)?;
    if !args.quiet {
        let path = args.file.clone();
        let after = std::fs::metadata(&path).map_err(|source| Failure::Look { path, source })?;
        let saved = plan.file_bytes_before.saturating_sub(after.len());
        writeln!(out, "done; the file is {} shorter", Human(saved))?;
    }
    done(out, ExitCode::SUCCESS)
}

fn print_plan(out: &mut impl Write, args: &CompactArgs, plan: &CompactPlan) -> Result<(), Failure> {
    let name = args.file.display();
    if plan.is_empty() {
        writeln!(out, "{name}: is compact already")?;
        return Ok(());
    }
    writeln!(out, "{name}: {} blocks have storage", plan.blocks_before)?;
    writeln!(out, "  {} of zeros are released", plan.zeros.len())?;
    if args.same_as_parent {
        let same = plan.same_as_parent.len();
        writeln!(
            out,
            "  {same} that are the same as in the parent are released"
        )?;
    }
    writeln!(out, "  {} move to the front", plan.moves)?;
    let (before, after) = (plan.file_bytes_before, plan.file_bytes_after);
    writeln!(
        out,
        "  the file gets {} shorter: {before} bytes before, {after} after",
        Human(before.saturating_sub(after))
    )?;
    Ok(())
}
