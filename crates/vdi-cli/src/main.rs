//! `vdi`, the tool for VirtualBox VDI images.
//!
//! It turns words into calls of `vdi-core` and the results into words and an exit code.
//! All errors are printed here, with the whole line of their causes.

#![forbid(unsafe_code)]

mod args;
mod commands;
mod daemon;
mod new_file;
mod report;
mod size;
mod stats;
mod top;

use std::error::Error;
use std::io;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Verb, explain};
use crate::commands::Failure;
use crate::report::printable;

/// What `check` exits with when the image is corrupt, as `qemu-img check` does.
const EXIT_CORRUPT: u8 = 2;
/// What `check` exits with when space is leaked and nothing worse.
const EXIT_LEAKS: u8 = 3;
/// What `compare` exits with when the disks differ, as `qemu-img compare` does.
const EXIT_DIFFERENT: u8 = 1;
/// What `compare` exits with after an error.
const EXIT_NOT_COMPARED: u8 = 2;
/// What `ctl` and `top` exit with when no daemon answers, as opposed to one that refuses.
const EXIT_NO_ANSWER: u8 = 2;

fn main() -> ExitCode {
    let failed = match std::env::args_os().nth(1) {
        // Failure's 1 would be an answer.
        Some(verb) if verb == "compare" => ExitCode::from(EXIT_NOT_COMPARED),
        Some(_) | None => ExitCode::FAILURE,
    };
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let is_error = error.use_stderr();
            let verb = std::env::args_os().nth(1).unwrap_or_default();
            let verb = verb.to_string_lossy();
            // Where there is no one to read it, there is nothing to do about it.
            let _ = explain(error, &verb).print();
            // Not clap's 2, which would be a corrupt image.
            return if is_error { failed } else { ExitCode::SUCCESS };
        }
    };
    let speaks = matches!(cli.verb, Verb::Ctl(_) | Verb::Top(_));
    match commands::run(cli.verb) {
        Ok(code) => code,
        // The reader has seen enough (`vdi map | head`).
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => failed,
        Err(failure) => {
            eprintln!("vdi: error: {}", printable(&line_of_causes(&failure)));
            match failure {
                Failure::Daemon(error) if speaks && error.is_silence() => {
                    ExitCode::from(EXIT_NO_ANSWER)
                }
                _ => failed,
            }
        }
    }
}

fn line_of_causes(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}
