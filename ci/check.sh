#!/usr/bin/env bash
# Reads the code without running it: format, lints, documentation and shell scripts, all with warnings as errors.
set -euo pipefail
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
cd "$root"

say "cargo fmt --check"
cargo fmt --all -- --check
# No member of the workspace.
cargo fmt --manifest-path tests/fuzz/Cargo.toml -- --check

say "cargo clippy"
cargo clippy --locked --workspace --all-targets -- -D warnings

say "cargo doc"
# Written for those who read the code, so private items are in it and may be linked to.
RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --workspace --no-deps --document-private-items

say "shellcheck"
has shellcheck || die "shellcheck is missing; run ci/setup"
mapfile -t scripts < <(grep -rlE '^#!.*sh$|^# shellcheck shell=' ci .ci)
shellcheck "${scripts[@]}"
echo "${#scripts[@]} scripts"
