//! `vdi compare`: whether two disks are the same, in the words of `qemu-img compare`.

use std::io::Write;
use std::ops::ControlFlow;
use std::process::ExitCode;

use vdi_core::Threads;
use vdi_core::compare::{self, Comparison, Strictness};

use crate::EXIT_DIFFERENT;
use crate::args::CompareArgs;
use crate::commands::{Failure, done, open_end, output};

pub(super) fn compare(args: &CompareArgs) -> Result<ExitCode, Failure> {
    let first = open_end(&args.first, args.first_format, &args.open)?;
    let second = open_end(&args.second, args.second_format, &args.open)?;
    let strictness = if args.strict {
        Strictness::SizesAndStorage
    } else {
        Strictness::Contents
    };
    let threads = args.threads.or(Threads::of_this_host());
    let compared = compare::compare(&first, &second, strictness, threads, &mut |_| {
        ControlFlow::Continue(())
    });
    let compared = compared.map_err(|source| Failure::Compare {
        first: args.first.clone(),
        second: args.second.clone(),
        source,
    })?;
    let mut out = output();
    if !args.quiet {
        // Like qemu-img only if the sizes have a part in the answer.
        let shorter = first.capacity().min(second.capacity()).bytes();
        let differs_before = match compared {
            Comparison::Different { at_bytes } => at_bytes < shorter,
            Comparison::Sizes | Comparison::Storage { .. } => true,
            Comparison::Same => false,
        };
        if first.capacity() != second.capacity() && !differs_before {
            writeln!(out, "Warning: Image size mismatch!")?;
        }
        match compared {
            Comparison::Same => writeln!(out, "Images are identical.")?,
            Comparison::Different { at_bytes } => {
                writeln!(out, "Content mismatch at offset {at_bytes}!")?;
            }
            Comparison::Sizes => writeln!(out, "Strict mode: Image size mismatch!")?,
            Comparison::Storage { at_bytes } => {
                writeln!(out, "Strict mode: Offset {at_bytes} block status mismatch!")?;
            }
        }
    }
    let code = match compared {
        Comparison::Same => ExitCode::SUCCESS,
        Comparison::Different { .. } | Comparison::Sizes | Comparison::Storage { .. } => {
            ExitCode::from(EXIT_DIFFERENT)
        }
    };
    done(out, code)
}
