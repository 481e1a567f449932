//! `vdi check`: what is wrong with an image, and the exit code for it.

use std::process::ExitCode;

use vdi_core::check::{self, Report, Severity};

use super::{Failure, chain_options, done, locking, no_chain, open_file, output};
use crate::args::CheckArgs;
use crate::report;
use crate::{EXIT_CORRUPT, EXIT_LEAKS};

pub(super) fn run(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let file = open_file(&args.file, &args.open)?;
    let mut found = check::check(&file).map_err(|source| Failure::Check {
        path: args.file.clone(),
        source,
    })?;
    let options = chain_options(&args.open.chain, locking(&args.open));
    check::check_parents(&args.file, &options, &mut found)
        .map_err(|error| no_chain(&args.file, error))?;
    let mut out = output();
    if args.quiet && !args.output.is_json() {
        return done(out, exit_code(&found));
    }
    if args.output.is_json() {
        report::json(&mut out, &report::Checked::new(&args.file, &found))?;
    } else {
        report::check(&mut out, &args.file, &found)?;
    }
    done(out, exit_code(&found))
}

/// What a check's result is for programs.
pub(super) fn exit_code(found: &Report) -> ExitCode {
    match found.worst() {
        Some(Severity::Corruption) => ExitCode::from(EXIT_CORRUPT),
        Some(Severity::Leak) => ExitCode::from(EXIT_LEAKS),
        Some(Severity::Note) | None => ExitCode::SUCCESS,
    }
}
