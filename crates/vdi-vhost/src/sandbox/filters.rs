//! Which system calls each kind of thread may make.
//!
//! Two filters stand behind each other:
//!
//! - [`DEADLY`]: what nothing in this program ever calls and an intruder wants (another program, another process's memory, a new socket).
//!   One try ends the process (SIGSYS), so that it is seen and cannot be repeated. No request is lost by that (promise "killed").
//! - Lists of what the kind of thread needs. Anything else fails with ENOSYS, which C libraries take for an old kernel and go
//!   another way; so a library that is not the one these lists were made with costs an error at worst, never the guest's disk.
//!
//! The lists are what all test suites did under `strace -f --decode-pids=comm`, thread by thread, on x86-64 with glibc 2.36, and what the same
//! functions call elsewhere: on aarch64, in musl, when the process aborts. They are checked the same way: the only call that may fail with
//! ENOSYS is clone3.
//!
//! A worker's frequent calls (io_uring_enter, preadv2, pwritev, futex, write) are listed without conditions on their arguments: for
//! such calls the kernel keeps a bitmap and runs no filter at all.
//!
//! Sources: seccomp(2), syscalls(2), the kernel's `kernel/seccomp.c` (`seccomp_cache_prepare`).

use std::collections::BTreeMap;

use nix::unistd::Pid;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
};

use crate::engine::EngineChoice;

/// What becomes of a call that is on no list.
const UNLISTED: SeccompAction = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());

/// A kind of thread, beside the control thread, which speaks to front ends, maps guest memory, starts and ends the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Serves queues.
    Worker,
    /// Does the image's chores.
    Housekeeper,
    /// Has files share extents.
    Sharer,
    /// Serves metrics.
    Metrics,
}

/// What every thread does: memory, waiting for each other, ending, hearing a signal, saying something on standard error.
const COMMON: &[i64] = &[
    // The allocator and thread stacks; mmap and mprotect have conditions.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    // Locks, channels, parking, time; the clock where the vDSO cannot read it.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    // The seeds of hash maps, and UUIDs.
    libc::SYS_getrandom,
    // The standard library learns about a thread's stack; the allocator, how many arenas are worth while.
    libc::SYS_sched_getaffinity,
    libc::SYS_getpid,
    libc::SYS_gettid,
    // Signal handlers: SIGTERM meets any thread, and a stack that overflows is told from other faults.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // Threads end, and the process, also by abort.
    libc::SYS_exit,
    libc::SYS_exit_group,
    // The log, and bells.
    libc::SYS_write,
    libc::SYS_close,
];

/// What is done to images that are open: data by the synchronous engine, metadata by the core.
const IMAGES: &[i64] = &[
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    // The file's length.
    libc::SYS_statx,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
];

/// How a worker calls guests (`ring::calls`), waits without io_uring, and sees whether an eventfd has room where there is no AIO.
const WAITS: &[i64] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    // They reach no file that is not open.
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
];

/// How metrics are served: to callers who come to a socket that listens, and who are waited for.
const METRICS: &[i64] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_accept4,
    libc::SYS_read,
    libc::SYS_recvfrom,
];

/// What the control thread does beyond what the others do.
const CONTROL: &[i64] = &[
    // Front ends: connections, messages, the signals' pipe.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_shutdown,
    libc::SYS_read,
    libc::SYS_eventfd2,
    // The in-flight region.
    libc::SYS_memfd_create,
    // What a descriptor is, what images are in a directory, where a file ends; how a file is cached.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_fstatfs,
    libc::SYS_getcwd,
    libc::SYS_fadvise64,
    // The socket goes away at the end.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    // Threads start.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
];

/// What the control thread of a process does whose disks come and go: it makes sockets in the file system, images, and names for
/// them. Where, landlock says.
const GROWING: &[i64] = &[
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_umask,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_link,
    libc::SYS_linkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
];

/// What nothing here ever calls, but for what is [`GROWING`] in a process whose disks come and go. `clone3` is not among them: its flags are out of a filter's sight, so it must seem not to
/// exist, and threads are made by `clone`.
const DEADLY: &[i64] = &[
    // Other programs and processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    // New ways out.
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    // Another identity, another view of the system.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_chroot,
    libc::SYS_pivot_root,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_open_by_handle_at,
    libc::SYS_personality,
    // The kernel's soft spots.
    libc::SYS_bpf,
    libc::SYS_userfaultfd,
    libc::SYS_perf_event_open,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
];

/// The filters, ready to be applied.
#[derive(Debug)]
pub(crate) struct Filters {
    grows: bool,
    deadly: BpfProgram,
    worker: BpfProgram,
    housekeeper: BpfProgram,
    sharer: BpfProgram,
    metrics: BpfProgram,
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

impl Filters {
    /// The filters for this process.
    pub(crate) fn new(engine: EngineChoice, grows: bool) -> Result<Self, Error> {
        let listed = |rules| compile(rules, UNLISTED, SeccompAction::Allow);
        let mut deadly = plain(&[DEADLY]);
        if grows {
            deadly.retain(|call, _| *call != libc::SYS_socket && !GROWING.contains(call));
        }
        let deadly = compile(deadly, SeccompAction::Allow, SeccompAction::KillProcess)?;
        Ok(Self {
            grows,
            deadly,
            worker: listed(worker(engine)?)?,
            housekeeper: listed(housekeeper()?)?,
            sharer: listed(sharer()?)?,
            metrics: listed(metrics()?)?,
        })
    }

    /// Filters the control thread's calls from now on, and those of all that it starts. It may bind these threads to CPUs.
    pub(crate) fn seal(&self, bound: &[Pid]) -> Result<(), Error> {
        let rules = control(self.grows, bound)?;
        apply_filter(&self.deadly)?;
        apply_filter(&compile(rules, UNLISTED, SeccompAction::Allow)?)
    }

    /// Filters this thread's calls from now on, and those of all that it starts.
    pub(crate) fn apply(&self, role: Role) -> Result<(), Error> {
        apply_filter(&self.deadly)?;
        apply_filter(match role {
            Role::Worker => &self.worker,
            Role::Housekeeper => &self.housekeeper,
            Role::Sharer => &self.sharer,
            Role::Metrics => &self.metrics,
        })
    }
}

fn compile(
    rules: Rules,
    unlisted: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, Error> {
    let architecture = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(rules, unlisted, listed, architecture)?;
    Ok(filter.try_into()?)
}

fn housekeeper() -> Result<Rules, Error> {
    let mut rules = common()?;
    rules.append(&mut plain(&[IMAGES]));
    Ok(rules)
}

/// Nothing else is done to files there.
fn sharer() -> Result<Rules, Error> {
    let mut rules = common()?;
    let share = i32::try_from(libc::FICLONERANGE).unwrap_or_default();
    rules.insert(libc::SYS_ioctl, one_of(1, &[share])?);
    Ok(rules)
}

fn metrics() -> Result<Rules, Error> {
    let mut rules = common()?;
    rules.append(&mut plain(&[METRICS]));
    rules.insert(libc::SYS_ioctl, blocking()?);
    Ok(rules)
}

fn common() -> Result<Rules, Error> {
    let mut rules = plain(&[COMMON]);
    // Memory is for data: nothing of it is ever made executable.
    let no_code = without_bits(2, libc::PROT_EXEC)?;
    rules.insert(libc::SYS_mmap, vec![no_code.clone()]);
    rules.insert(libc::SYS_mprotect, vec![no_code]);
    // abort() signals itself, and only this process.
    let own = u64::from(std::process::id());
    let to_self = SeccompRule::new(vec![equals(0, own)?])?;
    rules.insert(libc::SYS_tgkill, vec![to_self]);
    // The handler of SIGTERM tells the control thread through a connected pair.
    let connected = SeccompRule::new(vec![SeccompCondition::new(
        4,
        SeccompCmpArgLen::Qword,
        SeccompCmpOp::Eq,
        0,
    )?])?;
    rules.insert(libc::SYS_sendto, vec![connected]);
    // Copies of descriptors, a state that is loaded without waiting, locks on images, seals. F_GETFD: what the standard library does in debug builds before it closes.
    let commands = [
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
        libc::F_OFD_GETLK,
        libc::F_OFD_SETLK,
        libc::F_ADD_SEALS,
        libc::F_GET_SEALS,
    ];
    rules.insert(libc::SYS_fcntl, one_of(1, &commands)?);
    Ok(rules)
}

fn worker(engine: EngineChoice) -> Result<Rules, Error> {
    let mut rules = housekeeper()?;
    rules.append(&mut plain(&[WAITS]));
    if engine != EngineChoice::Sync {
        rules.insert(libc::SYS_io_uring_enter, Vec::new());
    }
    Ok(rules)
}

fn control(grows: bool, bound: &[Pid]) -> Result<Rules, Error> {
    let mut rules = housekeeper()?;
    rules.append(&mut plain(&[WAITS, CONTROL]));
    // Existing files are opened, none is emptied; nor made, unless snapshots are.
    let mut never = libc::O_TRUNC;
    if grows {
        rules.append(&mut plain(&[GROWING]));
        let domain = u64::from(libc::AF_UNIX.cast_unsigned());
        let local = SeccompRule::new(vec![equals(0, domain)?])?;
        rules.insert(libc::SYS_socket, vec![local]);
    } else {
        never |= libc::O_CREAT;
    }
    rules.insert(libc::SYS_openat, vec![without_bits(2, never)?]);
    rules.insert(libc::SYS_ioctl, blocking()?);
    // Workers that a disk has for its own run where that disk says; no other thread, and no other process.
    if !bound.is_empty() {
        let bound: Vec<_> = bound.iter().map(|thread| thread.as_raw()).collect();
        rules.insert(libc::SYS_sched_setaffinity, one_of(0, &bound)?);
    }
    // Threads of this process, never another process.
    let (flags, thread) = (SeccompCmpArgLen::Qword, libc::CLONE_THREAD);
    let thread = u64::from(thread.cast_unsigned());
    let is_thread = SeccompCondition::new(0, flags, SeccompCmpOp::MaskedEq(thread), thread)?;
    rules.insert(libc::SYS_clone, vec![SeccompRule::new(vec![is_thread])?]);
    // Their names, and their own filters, which can only take away.
    let names = [
        libc::PR_SET_NAME,
        libc::PR_SET_VMA,
        libc::PR_SET_NO_NEW_PRIVS,
    ];
    rules.insert(libc::SYS_prctl, one_of(0, &names)?);
    let filter = i32::try_from(libc::SECCOMP_SET_MODE_FILTER).unwrap_or_default();
    rules.insert(libc::SYS_seccomp, one_of(0, &[filter])?);
    Ok(rules)
}

/// Sockets block or do not.
fn blocking() -> Result<Vec<SeccompRule>, Error> {
    one_of(1, &[i32::try_from(libc::FIONBIO).unwrap_or_default()])
}

/// The calls, whatever their arguments.
fn plain(lists: &[&[i64]]) -> Rules {
    let numbers = lists.iter().copied().flatten();
    numbers.map(|number| (*number, Vec::new())).collect()
}

fn equals(argument: u8, value: u64) -> Result<SeccompCondition, Error> {
    let (width, equal) = (SeccompCmpArgLen::Dword, SeccompCmpOp::Eq);
    Ok(SeccompCondition::new(argument, width, equal, value)?)
}

fn one_of(argument: u8, values: &[i32]) -> Result<Vec<SeccompRule>, Error> {
    let rule = |value: &i32| {
        let condition = equals(argument, u64::from(value.cast_unsigned()))?;
        Ok(SeccompRule::new(vec![condition])?)
    };
    values.iter().map(rule).collect()
}

fn without_bits(argument: u8, bits: i32) -> Result<SeccompRule, Error> {
    let mask = SeccompCmpOp::MaskedEq(u64::from(bits.cast_unsigned()));
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, mask, 0)?;
    Ok(SeccompRule::new(vec![condition])?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crew::MOST_SPARE;

    const RING: [i64; 3] = [
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_register,
        libc::SYS_io_uring_enter,
    ];

    #[test]
    fn a_call_is_listed_once_and_never_both_needed_and_deadly() {
        let auto = EngineChoice::Auto;
        let others = [housekeeper(), sharer(), metrics()];
        for needed in [control(false, &[]), worker(auto)]
            .into_iter()
            .chain(others)
        {
            let needed = needed.unwrap();
            assert!(DEADLY.iter().all(|call| !needed.contains_key(call)));
        }
        let mut all = [COMMON, IMAGES, WAITS, CONTROL, DEADLY].concat();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn threads_are_bound_to_cpus_only_if_they_are_named() {
        let call = libc::SYS_sched_setaffinity;
        assert!(!control(true, &[]).unwrap().contains_key(&call));
        assert!(!worker(EngineChoice::Auto).unwrap().contains_key(&call));
        // The kernel takes programs of 4096 instructions.
        let most: Vec<_> = (0..i32::from(MOST_SPARE)).map(Pid::from_raw).collect();
        let rules = control(true, &most).unwrap();
        assert_eq!(rules[&call].len(), usize::from(MOST_SPARE));
        let program = compile(rules, UNLISTED, SeccompAction::Allow).unwrap();
        assert!(program.len() <= 4096, "{}", program.len());
    }

    #[test]
    fn rings_are_made_by_nobody_and_used_by_workers_alone() {
        let (sync, auto) = (EngineChoice::Sync, EngineChoice::Auto);
        let others = [housekeeper(), sharer(), metrics()];
        for rules in [control(false, &[]), worker(sync)]
            .into_iter()
            .chain(others)
        {
            let rules = rules.unwrap();
            assert!(RING.iter().all(|call| !rules.contains_key(call)));
        }
        let rules = worker(auto).unwrap();
        let allowed = RING.map(|call| rules.contains_key(&call));
        assert_eq!(allowed, [false, false, true]);
    }
}
