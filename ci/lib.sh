# shellcheck shell=bash
# What every script in ci/ shares: where things are, how to speak and how to fail. It is sourced, never run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Everything that is made once and kept: the guest's kernel and its initramfs. `cargo clean` empties it.
# shellcheck disable=SC2034  # used by the scripts that source this file
guest_dir=$root/target/guest

# The tools that mke2fs, sfdisk and friends ship with live in sbin, which a plain user's PATH leaves out.
PATH=$PATH:/usr/sbin:/sbin

# No script ends without a word.
set -E
trap 'echo "$0: line $LINENO: failed: $BASH_COMMAND" >&2' ERR

say() { printf '\n== %s\n' "$*"; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Ends the process $1 and returns when it is gone: SIGTERM, then after $2 seconds SIGKILL. False if SIGKILL was needed.
stop_process() {
    local pid=$1 seconds=$2
    kill -TERM "$pid" 2>/dev/null || return 0
    for _ in $(seq $((seconds * 20))); do
        kill -0 "$pid" 2>/dev/null || return 0
        sleep 0.05
    done
    kill -KILL "$pid" 2>/dev/null
    return 1
}

# Waits until the socket $1 exists, for $2 seconds, while the process $3 lives.
wait_for_socket() {
    local socket=$1 seconds=$2 pid=$3
    for _ in $(seq $((seconds * 20))); do
        [ -S "$socket" ] && return 0
        kill -0 "$pid" 2>/dev/null || return 1
        sleep 0.05
    done
    return 1
}
