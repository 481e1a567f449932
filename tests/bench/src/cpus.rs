//! Who runs where: the server on the first CPU that we may use, the client on the second.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::LazyLock;

/// The CPUs that we might use when the program began.
static ALL: LazyLock<CpuSet> =
    LazyLock::new(|| sched_getaffinity(Pid::from_raw(0)).expect("Linux tells a process its CPUs"));

/// The `nth` CPU, or the last one.
fn nth(nth: usize) -> usize {
    let ours = (0..CpuSet::count()).filter(|cpu| ALL.is_set(*cpu).is_ok_and(|set| set));
    ours.take(nth + 1).last().expect("we run somewhere")
}

/// The CPU that servers are pinned to.
pub(crate) fn of_server() -> usize {
    nth(0)
}

/// Has this thread run where the client does.
pub(crate) fn move_to_client_cpu() {
    run_on(&only(nth(1)));
}

/// Does something, such as starting a process, where servers run.
pub(crate) fn on_server_cpu<T>(then: impl FnOnce() -> T) -> T {
    run_on(&only(of_server()));
    let done = then();
    run_on(&ALL);
    done
}

/// Does something where any CPU may do it.
pub(crate) fn on_all_cpus<T>(then: impl FnOnce() -> T) -> T {
    run_on(&ALL);
    then()
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu).expect("it came out of a set");
    set
}

fn run_on(set: &CpuSet) {
    sched_setaffinity(Pid::from_raw(0), set).expect("a thread may choose among its CPUs");
}

/// How many there are for us.
pub(crate) fn count() -> usize {
    let all = 0..CpuSet::count();
    all.filter(|cpu| ALL.is_set(*cpu).is_ok_and(|set| set))
        .count()
}
