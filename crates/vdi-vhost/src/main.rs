//! The daemon's program; all of it is in the library, where fuzzers and benchmarks reach it, too.

use std::process::ExitCode;

fn main() -> ExitCode {
    vdi_vhost::main()
}
