//! What the daemon can no longer do once it serves, whoever makes it try.
//!
//! A debugger stands in for the intruder: threads of the running daemon are stopped, made to call what their program never
//! would, and let go on. Only root may do that to a daemon in its sandbox; without root those tests say so and do nothing.
//!
//! Not here: that everything else works in the sandbox, which is on in all other tests.
//!
//! Sources: ptrace(2), seccomp(2), landlock(7), proc_pid_status(5).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use vdi_tests::driver::{Driver, Options, PATIENCE};
use vdi_tests::image::{Image, MIB};
use vdi_tests::qemu;
use vdi_tests::server::{Launch, Server, scratch};
use vdi_tests::stop::StopOnDrop;

/// The user `nobody`.
const NOBODY: u32 = 65534;

const AS_NOBODY: [&str; 4] = [
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
];

/// CAP_DAC_OVERRIDE alone.
const OPEN_ANY_FILE: u64 = 1 << 1;

pub(crate) fn is_root() -> bool {
    let root = fs::metadata("/proc/self").unwrap().uid() == 0;
    if !root {
        eprintln!("not root: not tested");
    }
    root
}

/// The status of every thread, by its name.
pub(crate) fn statuses(server: &Server) -> BTreeMap<String, BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    tasks
        .filter_map(|task| {
            // A session's thread may be at its end.
            let status = fs::read_to_string(task.unwrap().path().join("status")).ok()?;
            let fields: BTreeMap<_, _> = status
                .lines()
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
                .collect();
            Some((fields["Name"].clone(), fields))
        })
        .collect()
}

fn capabilities(status: &BTreeMap<String, String>, set: &str) -> u64 {
    u64::from_str_radix(&status[set], 16).unwrap()
}

/// How many descriptors of a file the daemon has.
fn descriptors(server: &Server, path: &Path) -> usize {
    let entries = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    entries
        .filter(|entry| {
            fs::read_link(entry.as_ref().unwrap().path()).is_ok_and(|link| link == path)
        })
        .count()
}

/// A turn with the image, and one more for which it has to be opened again.
fn use_twice(server: &Server) {
    for turn in 1..=2 {
        let mut driver = server.driver(&Options::new());
        assert_eq!(driver.read(0, 512), [turn - 1; 512]);
        driver.write(0, &[turn; 512]);
        driver.flush();
        driver.control.stop(0).unwrap();
    }
}

#[test]
fn every_thread_of_a_busy_daemon_is_confined() {
    let image = Image::by_qemu(64 * MIB);
    for engine in ["auto", "sync"] {
        let server = Launch::image(image.path())
            .args(["--workers", "2", "--engine", engine])
            .start();
        let mut driver = server.driver(&Options::new().queues(2));
        let stop = AtomicBool::new(false);
        let statuses = std::thread::scope(|scope| {
            let _at_the_end = StopOnDrop::new(&stop);
            for (nth, queue) in (0_u64..).zip(&mut driver.queues) {
                let stop = &stop;
                scope.spawn(move || {
                    for block in (nth..64).step_by(2).cycle() {
                        queue.write(block * 2048, &[1; 4096]);
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                    }
                });
            }
            statuses(&server)
        });
        let names: Vec<_> = statuses.keys().map(String::as_str).collect();
        let of = |kind: &str| [0, 1].map(|nth| format!("{kind}-{nth}"));
        let others = ["session-disk", "vdi-vhost"].map(str::to_owned);
        let mut expected = [others, of("housekeeper"), of("sharer"), of("worker")].concat();
        expected.sort_unstable();
        assert_eq!(names, expected);
        for (name, status) in &statuses {
            assert_eq!(status["NoNewPrivs"], "1", "{name}");
            assert_eq!(status["Seccomp"], "2", "{name}");
            // The deadly calls, its own.
            assert_eq!(status["Seccomp_filters"], "2", "{name}");
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                assert_eq!(capabilities(status, set), 0, "{name}: {set}");
            }
        }
        let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
        let cores = limits.lines().find(|line| line.contains("core file size"));
        let words: Vec<_> = cores.unwrap().split_whitespace().collect();
        assert_eq!(words[4..6], ["0", "0"]);
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
    }
}

#[test]
fn without_the_sandbox_the_log_warns_of_it_once() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path())
        .args(["--sandbox", "off"])
        .start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 512]);
    for (name, status) in statuses(&server) {
        assert_eq!(status["Seccomp"], "0", "{name}");
        assert_eq!(status["NoNewPrivs"], "0", "{name}");
    }
    drop(driver);
    let log = server.terminate().log;
    let warnings: Vec<_> = log.lines().filter(|line| line.contains("WARN")).collect();
    assert!(
        matches!(warnings[..], [one] if one.contains("--sandbox off")),
        "{log}"
    );
}

/// Gives a file or directory to [`NOBODY`], and to nobody else.
fn give_away(path: &Path) {
    let mode = if path.is_dir() { 0o700 } else { 0o600 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
}

#[test]
fn an_ordinary_user_serves_his_images_with_everything_on() {
    if !is_root() {
        return; // All other tests are this test then.
    }
    for options in [
        &["--cache", "writeback"][..],
        &["--cache", "direct"],
        &["--engine", "sync", "--detect-zeroes", "unmap"],
    ] {
        let image = Image::by_qemu(16 * MIB);
        let directory = tempfile::tempdir().unwrap();
        for path in [
            image.path(),
            image.path().parent().unwrap(),
            directory.path(),
        ] {
            give_away(path);
        }
        let socket = directory.path().join("socket");
        let server = Launch::image_at(image.path(), &socket)
            .args(options)
            .under(AS_NOBODY)
            .start();
        use_twice(&server);
        let mut driver = server.driver(&Options::new());
        driver.write(8, &[3; 512]);
        let own = format!("/proc/{}", server.pid());
        // Root owns what shows the memory of a process that cannot be dumped.
        assert_eq!(fs::metadata(format!("{own}/mem")).unwrap().uid(), 0);
        for (name, status) in statuses(&server) {
            assert!(status["Uid"].starts_with("65534"), "{name}");
            assert_eq!(status["Seccomp"], "2", "{name}");
        }
        // The core's, the data's (two if direct), and the worker's own for syncs.
        let expected = if options.contains(&"direct") { 4 } else { 3 };
        assert_eq!(descriptors(&server, image.path()), expected, "{options:?}");
        drop(driver);
        let exit = server.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        assert!(!socket.exists());
        qemu::expect_clean(image.path());
    }
}

#[test]
fn root_serves_another_users_image_by_the_one_capability_that_this_takes() {
    if !is_root() {
        return;
    }
    let image = Image::by_qemu(16 * MIB);
    give_away(image.path());
    give_away(image.path().parent().unwrap());
    let server = Launch::image(image.path()).start();
    use_twice(&server);
    let mut driver = server.driver(&Options::new());
    driver.write(8, &[3; 512]);
    for (name, status) in statuses(&server) {
        for set in ["CapPrm", "CapEff"] {
            assert_eq!(capabilities(&status, set), OPEN_ANY_FILE, "{name}: {set}");
        }
        for set in ["CapInh", "CapBnd", "CapAmb"] {
            assert_eq!(capabilities(&status, set), 0, "{name}: {set}");
        }
    }
    assert_eq!(descriptors(&server, image.path()), 3);
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
    qemu::expect_clean(image.path());
}

#[test]
fn capabilities_that_were_inherited_are_dropped_too() {
    if !is_root() {
        return;
    }
    let inherits = ["--inh-caps=+chown", "--ambient-caps=+chown"];
    for (sandbox, is_kept) in [("off", true), ("on", false)] {
        let image = Image::by_qemu(8 * MIB);
        let directory = tempfile::tempdir().unwrap();
        let images = image.path().parent().unwrap();
        for path in [image.path(), images, directory.path()] {
            give_away(path);
        }
        let socket = directory.path().join("socket");
        let server = Launch::image_at(image.path(), &socket)
            .args(["--sandbox", sandbox])
            .under(AS_NOBODY.iter().chain(&inherits))
            .start();
        let _driver = server.driver(&Options::new());
        for (name, status) in statuses(&server) {
            for set in ["CapInh", "CapAmb", "CapPrm", "CapEff"] {
                let is_there = capabilities(&status, set) != 0;
                assert_eq!(is_there, is_kept, "{sandbox}, {name}: {set}");
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod intruder {
    use std::ffi::CString;
    use std::fs::File;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::FileExt;
    use std::time::{Duration, Instant};

    use nix::libc;
    use nix::sys::ptrace;
    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    use nix::unistd::Pid;

    use super::*;

    const PAGE: u64 = 4096;

    /// How a forbidden call ended.
    #[derive(Debug, PartialEq, Eq)]
    pub(crate) enum Outcome {
        Returned(i64),
        Killed(Signal),
    }

    /// A thread of the daemon that is made to do what its program would not.
    pub(crate) struct Puppet {
        thread: Pid,
        memory: File,
        /// As it was found, waiting in a system call.
        found: libc::user_regs_struct,
    }

    impl Puppet {
        /// Stops a thread while it waits in a system call, which it can make again without harm.
        pub(crate) fn seize(server: &Server, name: &str) -> Self {
            const SYSCALL: [u8; 2] = [0x0f, 0x05];
            let thread = statuses(server)[name]["Pid"].parse().unwrap();
            let thread = Pid::from_raw(thread);
            let path = format!("/proc/{}/task/{thread}/mem", server.pid());
            let memory = File::options().read(true).write(true).open(path).unwrap();
            let deadline = Instant::now() + PATIENCE;
            loop {
                ptrace::attach(thread).unwrap();
                let stopped = waitpid(thread, Some(WaitPidFlag::__WALL)).unwrap();
                assert_eq!(stopped, WaitStatus::Stopped(thread, Signal::SIGSTOP));
                let found = ptrace::getregs(thread).unwrap();
                let mut instruction = [0; 2];
                memory
                    .read_exact_at(&mut instruction, found.rip - 2)
                    .unwrap();
                // What a call returns that was interrupted; one that was done must not be done again.
                let waits = matches!(found.rax.cast_signed(), -4 | -516..=-512);
                if instruction == SYSCALL && waits {
                    return Self {
                        thread,
                        memory,
                        found,
                    };
                }
                assert!(Instant::now() < deadline, "{name} waits in no system call");
                ptrace::detach(thread, None).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        }

        /// Puts a path where the thread can find it: below its stack.
        pub(crate) fn path(&self, path: &Path) -> u64 {
            let path = CString::new(path.as_os_str().as_bytes()).unwrap();
            self.bytes(path.as_bytes_with_nul())
        }

        /// The same for any bytes.
        pub(crate) fn bytes(&self, bytes: &[u8]) -> u64 {
            let at = self.found.rsp - 2 * PAGE;
            self.memory.write_all_at(bytes, at).unwrap();
            at
        }

        /// Has it call the kernel.
        pub(crate) fn call<const N: usize>(&self, number: i64, arguments: [u64; N]) -> Outcome {
            let mut all = [0; 6];
            all[..N].copy_from_slice(&arguments);
            let mut registers = self.found;
            registers.rip -= 2;
            registers.rax = number.cast_unsigned();
            registers.orig_rax = u64::MAX; // It is in no call any more.
            [
                registers.rdi,
                registers.rsi,
                registers.rdx,
                registers.r10,
                registers.r8,
                registers.r9,
            ] = all;
            ptrace::setregs(self.thread, registers).unwrap();
            ptrace::step(self.thread, None).unwrap();
            match waitpid(self.thread, Some(WaitPidFlag::__WALL)).unwrap() {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => {}
                WaitStatus::Signaled(_, signal, core) => {
                    assert!(!core, "a core was dumped");
                    return Outcome::Killed(signal);
                }
                other => panic!("{other:?}"),
            }
            let result = ptrace::getregs(self.thread).unwrap().rax;
            Outcome::Returned(result.cast_signed())
        }

        pub(crate) fn open(&self, path: &Path, flags: i32) -> Outcome {
            let (at, flags) = (self.path(path), u64::from(flags.cast_unsigned()));
            let directory = libc::AT_FDCWD.cast_unsigned();
            self.call(libc::SYS_openat, [u64::from(directory), at, flags, 0o600])
        }

        /// Lets it go on with what it waited for.
        pub(crate) fn release(self) {
            let mut registers = self.found;
            registers.rip -= 2;
            registers.rax = self.found.orig_rax;
            registers.orig_rax = u64::MAX;
            ptrace::setregs(self.thread, registers).unwrap();
        }
    }

    impl Drop for Puppet {
        /// A daemon with a thread that is still traced would never be seen to end.
        fn drop(&mut self) {
            let _may_be_gone = ptrace::detach(self.thread, None);
        }
    }

    pub(crate) fn failed(errno: i32) -> Outcome {
        Outcome::Returned(-i64::from(errno))
    }

    pub(crate) fn worked(outcome: &Outcome) -> bool {
        matches!(outcome, Outcome::Returned(0..))
    }

    /// A daemon that serves an image beside another file, and has a worker.
    fn serving(image: &Image, sandbox: &str) -> (Server, Driver) {
        let launch = Launch::image(image.path()).args(["--sandbox", sandbox]);
        let metrics = format!("unix:{}.metrics", launch.socket().display());
        let options = ["--workers", "1", "--metrics", &metrics];
        let server = launch.args(options).start();
        let mut driver = server.driver(&Options::new());
        driver.write(0, &[1; 512]);
        driver.flush();
        (server, driver)
    }

    #[test]
    fn a_file_that_is_not_the_image_cannot_be_opened_or_made_by_the_running_daemon() {
        if !is_root() {
            return;
        }
        let image = Image::by_qemu(16 * MIB);
        let (server, mut driver) = serving(&image, "on");
        let neighbour = image.path().with_extension("neighbour");
        fs::write(&neighbour, "secret").unwrap();
        let new = image.path().with_extension("new");
        let outside = Path::new("/etc/passwd");

        let control = Puppet::seize(&server, "vdi-vhost");
        assert!(worked(&control.open(image.path(), libc::O_RDWR)));
        for path in [&neighbour, outside, Path::new("/dev/null")] {
            assert_eq!(control.open(path, libc::O_RDONLY), failed(libc::EACCES));
        }
        let make = libc::O_CREAT | libc::O_WRONLY;
        assert_eq!(control.open(&new, make), failed(libc::ENOSYS));
        let directory = image.path().parent().unwrap();
        let read = libc::O_RDONLY | libc::O_DIRECTORY;
        assert_eq!(control.open(directory, read), failed(libc::EACCES));
        let at = control.path(&neighbour);
        let removed = control.call(libc::SYS_unlink, [at]);
        assert_eq!(removed, failed(libc::EACCES));
        // Where the socket is, things can be removed, and nothing else.
        let beside = server.socket().with_extension("neighbour");
        fs::write(&beside, "secret").unwrap();
        assert_eq!(control.open(&beside, libc::O_RDONLY), failed(libc::EACCES));
        control.release();

        for name in ["worker-0", "housekeeper-0"] {
            let thread = Puppet::seize(&server, name);
            // Not even the image: they have it open.
            for path in [image.path(), outside] {
                let opened = thread.open(path, libc::O_RDONLY);
                assert_eq!(opened, failed(libc::ENOSYS), "{name}");
            }
            thread.release();
        }
        assert_eq!(driver.read(0, 512), [1; 512]);
        driver.write(8, &[2; 512]);
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
        assert!(neighbour.exists() && !new.exists());
        qemu::expect_clean(image.path());
    }

    #[test]
    fn an_image_that_is_served_read_only_cannot_be_opened_for_more() {
        if !is_root() {
            return;
        }
        let image = Image::by_qemu(16 * MIB);
        let server = Launch::image(image.path()).arg("--read-only").start();
        // Then it is in its sandbox.
        let _driver = server.driver(&Options::new());
        let control = Puppet::seize(&server, "vdi-vhost");
        assert!(worked(&control.open(image.path(), libc::O_RDONLY)));
        let opened = control.open(image.path(), libc::O_RDWR);
        assert_eq!(opened, failed(libc::EACCES));
        control.release();
        assert_eq!(server.terminate().code, Some(0));
    }

    #[test]
    fn parents_and_where_they_are_looked_for_can_only_be_read_by_the_running_daemon() {
        if !is_root() {
            return;
        }
        let directory = scratch();
        let (parent, child) = (
            directory.path().join("parent.vdi"),
            directory.path().join("child.vdi"),
        );
        qemu::create(&parent, "16M");
        let made = vdi_tests::tool::vdi(vdi_tests::words!["snapshot", parent, child]);
        made.expect_code(0);
        let server = Launch::image(&child).start();
        use_twice(&server);
        let control = Puppet::seize(&server, "vdi-vhost");
        assert!(worked(&control.open(&child, libc::O_RDWR)));
        assert!(worked(&control.open(&parent, libc::O_RDONLY)));
        assert_eq!(control.open(&parent, libc::O_RDWR), failed(libc::EACCES));
        assert!(worked(&control.open(directory.path(), libc::O_RDONLY)));
        control.release();
        assert_eq!(server.terminate().code, Some(0));
    }

    #[test]
    fn a_parent_that_is_named_can_only_be_read_and_its_neighbours_not_even_that() {
        if !is_root() {
            return;
        }
        let (elsewhere, here) = (scratch(), scratch());
        let (parent, child) = (
            elsewhere.path().join("parent.vdi"),
            here.path().join("child.vdi"),
        );
        qemu::create(&parent, "16M");
        let neighbour = elsewhere.path().join("neighbour");
        fs::write(&neighbour, "secret").unwrap();
        let made = vdi_tests::tool::vdi(vdi_tests::words!["snapshot", parent, child]);
        made.expect_code(0);
        let launch = Launch::image(&child).args(["--parent"]).arg(&parent);
        let server = launch.start();
        use_twice(&server);
        let control = Puppet::seize(&server, "vdi-vhost");
        assert!(worked(&control.open(&parent, libc::O_RDONLY)));
        assert_eq!(control.open(&parent, libc::O_RDWR), failed(libc::EACCES));
        let opened = control.open(&neighbour, libc::O_RDONLY);
        assert_eq!(opened, failed(libc::EACCES));
        control.release();
        assert_eq!(server.terminate().code, Some(0));
    }

    #[test]
    fn nothing_is_made_executable_and_no_thread_makes_a_ring_in_the_running_daemon() {
        if !is_root() {
            return;
        }
        let image = Image::by_qemu(16 * MIB);
        let (server, mut driver) = serving(&image, "on");
        let bits = |flags: i32| u64::from(flags.cast_unsigned());
        let private = bits(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        for name in ["vdi-vhost", "worker-0", "housekeeper-0"] {
            let thread = Puppet::seize(&server, name);
            let map = |protection: i32| {
                let arguments = [0, PAGE, bits(protection), private, u64::MAX, 0];
                thread.call(libc::SYS_mmap, arguments)
            };
            let (data, code) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_EXEC);
            assert!(worked(&map(data)), "{name}");
            assert_eq!(map(libc::PROT_READ | code), failed(libc::ENOSYS), "{name}");
            let own_stack = [thread.found.rsp & !(PAGE - 1), PAGE, bits(data | code)];
            let changed = thread.call(libc::SYS_mprotect, own_stack);
            assert_eq!(changed, failed(libc::ENOSYS), "{name}");
            let scratch = thread.path(Path::new(""));
            let made = thread.call(libc::SYS_io_uring_setup, [8, scratch]);
            assert_eq!(made, failed(libc::ENOSYS), "{name}");
            if name != "vdi-vhost" {
                let cloned = thread.call(libc::SYS_clone, [bits(libc::SIGCHLD)]);
                assert_eq!(cloned, failed(libc::ENOSYS), "{name}");
            }
            thread.release();
        }
        assert_eq!(driver.read(0, 512), [1; 512]);
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
    }

    /// What an intruder would try first, in which thread.
    const DEADLY: [(&str, &str, i64); 9] = [
        ("a program", "vdi-vhost", libc::SYS_execve),
        ("a socket", "vdi-vhost", libc::SYS_socket),
        ("a socket", "worker-0", libc::SYS_socket),
        ("another process's memory", "worker-0", libc::SYS_ptrace),
        ("another process's end", "housekeeper-0", libc::SYS_kill),
        ("a namespace", "worker-0", libc::SYS_unshare),
        ("a program", "session-disk", libc::SYS_execve),
        ("a socket", "housekeeper-0", libc::SYS_socket),
        ("a socket", "metrics", libc::SYS_socket),
    ];

    fn try_it(thread: &Puppet, number: i64) -> Outcome {
        let internet = libc::AF_INET.cast_unsigned().into();
        let stream = libc::SOCK_STREAM.cast_unsigned().into();
        let own = u64::from(std::process::id());
        match number {
            libc::SYS_execve => thread.call(number, [thread.path(Path::new("/bin/true")), 0, 0]),
            libc::SYS_socket => thread.call(number, [internet, stream, 0]),
            libc::SYS_ptrace => {
                let attach = libc::PTRACE_SEIZE.into();
                thread.call(number, [attach, own, 0, 0])
            }
            libc::SYS_kill => thread.call(number, [own, 0]),
            _ => thread.call(number, [libc::CLONE_NEWUTS.cast_unsigned().into()]),
        }
    }

    #[test]
    fn a_try_at_another_program_socket_process_or_namespace_ends_the_running_daemon_at_once() {
        if !is_root() {
            return;
        }
        for (what, name, number) in DEADLY {
            let image = Image::by_qemu(16 * MIB);
            let (server, _driver) = serving(&image, "on");
            let outcome = try_it(&Puppet::seize(&server, name), number);
            assert_eq!(outcome, Outcome::Killed(Signal::SIGSYS), "{what}, {name}");
            if name != "vdi-vhost" {
                let exit = server.wait(); // The main thread's end is the process's, and was told to the debugger.
                assert_eq!(exit.signal, Some(Signal::SIGSYS as i32), "{what}, {name}");
            }
            let next = Launch::image(image.path()).start();
            assert_eq!(next.driver(&Options::new()).read(0, 512), [1; 512]);
        }
    }

    #[test]
    fn without_the_sandbox_all_of_that_works() {
        if !is_root() {
            return;
        }
        let image = Image::by_qemu(16 * MIB);
        let (server, mut driver) = serving(&image, "off");
        let outside = Path::new("/etc/passwd");
        for name in ["vdi-vhost", "worker-0", "housekeeper-0"] {
            let thread = Puppet::seize(&server, name);
            assert!(worked(&thread.open(outside, libc::O_RDONLY)), "{name}");
            for (what, _, number) in DEADLY {
                let harmless = ![libc::SYS_execve, libc::SYS_ptrace].contains(&number);
                assert!(!harmless || worked(&try_it(&thread, number)), "{what}");
            }
            thread.release();
        }
        assert_eq!(driver.read(0, 512), [1; 512]);
        drop(driver);
        assert_eq!(server.terminate().code, Some(0));
    }
}
