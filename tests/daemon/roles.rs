//! What each kind of thread of the running daemon may still do: its own calls and no others', those that need arguments with none but
//! these, and in a process whose disks come and go as much as that takes.
//!
//! By a debugger, as in `sandbox`: without root nothing is tested.

use std::fs;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;

use nix::libc;
use vdi_tests::driver::{Driver, Options};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, Server, scratch, wait_for_listener};
use vdi_tests::{operator, qemu};

use crate::sandbox::intruder::{Outcome, Puppet, failed, worked};
use crate::sandbox::is_root;

/// A descriptor that nobody has.
const NONE: u64 = u32::MAX as u64;

/// Standard error, which everybody has.
const LOG: u64 = 2;

const CONTROL: &str = "vdi-vhost";
const SESSION: &str = "session-disk";
const WORKER: &str = "worker-0";
const HOUSEKEEPER: &str = "housekeeper-0";
const SHARER: &str = "sharer-0";
const METRICS: &str = "metrics";
const ALL: [&str; 6] = [CONTROL, SESSION, WORKER, HOUSEKEEPER, SHARER, METRICS];

/// Calls that fail with EBADF where they may be made, and who may make them.
const CALLS: [(i64, &[&str]); 9] = [
    (libc::SYS_close, &ALL),
    (libc::SYS_pwrite64, &[CONTROL, SESSION, WORKER, HOUSEKEEPER]),
    (
        libc::SYS_fdatasync,
        &[CONTROL, SESSION, WORKER, HOUSEKEEPER],
    ),
    (libc::SYS_epoll_ctl, &[CONTROL, SESSION, WORKER]),
    (libc::SYS_io_uring_enter, &[WORKER]),
    (libc::SYS_accept4, &[CONTROL, SESSION, METRICS]),
    (libc::SYS_recvmsg, &[CONTROL, SESSION]),
    (libc::SYS_getdents64, &[CONTROL, SESSION]),
    (libc::SYS_ioctl, &[SHARER]),
];

/// A daemon that has a thread of each kind, and a driver that has used it.
fn with_all_threads(image: &Image) -> (Server, Driver) {
    let launch = Launch::image(image.path());
    let metrics = format!("unix:{}.metrics", launch.socket().display());
    let server = launch
        .args(["--workers", "1", "--engine", "io-uring"])
        .args(["--metrics", &metrics])
        .start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 512]);
    (server, driver)
}

#[test]
fn each_kind_of_thread_makes_its_own_calls_and_no_others() {
    if !is_root() {
        return;
    }
    let image = Image::by_qemu(16 * MIB);
    let (server, mut driver) = with_all_threads(&image);
    for name in ALL {
        let thread = Puppet::seize(&server, name);
        for (number, who) in CALLS {
            let delete = libc::EPOLL_CTL_DEL.cast_unsigned().into();
            let arguments = match number {
                libc::SYS_epoll_ctl => [NONE, delete, NONE, 0],
                libc::SYS_ioctl => [NONE, libc::FICLONERANGE, 0, 0],
                _ => [NONE, 0, 0, 0],
            };
            let expected = if who.contains(&name) {
                libc::EBADF
            } else {
                libc::ENOSYS
            };
            let outcome = thread.call(number, arguments);
            assert_eq!(outcome, failed(expected), "{name}, call {number}");
        }
        thread.release();
    }
    assert_eq!(driver.read(0, 512), [1; 512]);
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
}

fn bits(flags: i32) -> u64 {
    flags.cast_unsigned().into()
}

#[test]
fn calls_that_are_needed_are_made_with_no_other_arguments_than_are_needed() {
    if !is_root() {
        return;
    }
    let image = Image::by_qemu(16 * MIB);
    let (server, mut driver) = with_all_threads(&image);
    let own = u64::from(std::process::id());
    for name in ALL {
        let thread = Puppet::seize(&server, name);
        let expect_none = |what: &str, outcome: Outcome| {
            assert_eq!(outcome, failed(libc::ENOSYS), "{name}: {what}");
        };
        let signal = thread.call(libc::SYS_tgkill, [own, own, 0]);
        expect_none("another process's signal", signal);
        let at = thread.bytes(&[0; 16]);
        let sent = thread.call(libc::SYS_sendto, [NONE, at, 1, 0, at, 16]);
        expect_none("a datagram to an address", sent);
        let owner = thread.call(libc::SYS_fcntl, [LOG, bits(libc::F_SETOWN), own]);
        expect_none("signals to another process", owner);
        let typed = thread.call(libc::SYS_ioctl, [LOG, libc::TIOCSTI, at]);
        expect_none("input of a terminal", typed);
        let process = thread.call(libc::SYS_clone, [bits(libc::SIGCHLD)]);
        expect_none("a process", process);
        let dumpable = [bits(libc::PR_SET_DUMPABLE), 1, 0, 0, 0];
        expect_none("core dumps", thread.call(libc::SYS_prctl, dumpable));
        let strict = thread.call(libc::SYS_seccomp, [0, 0, 0]);
        expect_none("the strict mode of seccomp", strict);
        let bound = thread.call(libc::SYS_sched_setaffinity, [0, 8, at]);
        expect_none("another CPU", bound);
        let emptied = thread.open(image.path(), libc::O_RDWR | libc::O_TRUNC);
        expect_none("an empty image", emptied);
        thread.release();
    }
    assert_eq!(driver.read(0, 512), [1; 512]);
    drop(driver);
    assert_eq!(server.terminate().code, Some(0));
}

/// `struct sockaddr_un`.
fn address(name: &[u8]) -> Vec<u8> {
    let family = libc::AF_UNIX.to_ne_bytes();
    [&family[..2], name].concat()
}

/// A new socket of that kind, bound or connected to an address.
fn socket(thread: &Puppet, number: i64, name: &[u8]) -> Outcome {
    let made = [bits(libc::AF_UNIX), bits(libc::SOCK_STREAM), 0];
    let Outcome::Returned(fd @ 0..) = thread.call(libc::SYS_socket, made) else {
        panic!("no socket can be made");
    };
    let address = address(name);
    let at = thread.bytes(&address);
    let outcome = thread.call(number, [fd.cast_unsigned(), at, address.len() as u64]);
    assert!(worked(&thread.call(libc::SYS_close, [fd.cast_unsigned()])));
    outcome
}

#[test]
fn a_process_whose_disks_come_and_go_makes_each_thing_in_its_place_alone() {
    if !is_root() {
        return;
    }
    let place = scratch();
    let path = |name: &str| place.path().join(name);
    for directory in ["images", "sockets"] {
        fs::create_dir(path(directory)).unwrap();
    }
    qemu::create(&path("images/disk.vdi"), "8M");
    let text = "control-socket = \"control\"\nsocket-dir = \"sockets\"\nimage-dirs = [\"images\"]\nspare-workers = 1\n\
                [[disk]]\nname = \"disk\"\nimage = \"images/disk.vdi\"\n";
    fs::write(path("fleet.toml"), text).unwrap();
    let server = Launch::bare()
        .arg("--config")
        .arg(path("fleet.toml"))
        .spawn();
    wait_for_listener(&path("control"));
    // Once it answers, it is in its sandbox.
    assert_eq!(operator::names(&path("control")), ["disk"]);
    let name = format!("vdi-test-{}", std::process::id());
    let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
    let _listener = UnixListener::bind_addr(&abstract_name).unwrap();

    let control = Puppet::seize(&server, CONTROL);
    let refused = failed(libc::EACCES);
    let make = libc::O_CREAT | libc::O_RDWR;
    assert!(worked(&control.open(&path("images/new"), make)));
    assert!(worked(&control.open(&path("fleet.toml"), libc::O_RDONLY)));
    for (closed, flags) in [
        (path("fleet.toml").as_path(), libc::O_RDWR),
        (&path("new"), make),
        (&path("sockets/new"), make),
        (Path::new("/etc/passwd"), libc::O_RDONLY),
    ] {
        assert_eq!(control.open(closed, flags), refused, "{}", closed.display());
    }
    let bind = |name: &str| {
        let path = path(name);
        socket(&control, libc::SYS_bind, path.as_os_str().as_bytes())
    };
    assert!(worked(&bind("sockets/more.sock")));
    assert_eq!(bind("images/more.sock"), refused);
    let stranger = [&[0], name.as_bytes()].concat();
    let connected = socket(&control, libc::SYS_connect, &stranger);
    assert_eq!(connected, failed(libc::EPERM), "somebody else's socket");
    let (internet, stream) = (bits(libc::AF_INET), bits(libc::SOCK_STREAM));
    let missing = failed(libc::ENOSYS);
    assert_eq!(
        control.call(libc::SYS_socket, [internet, stream, 0]),
        missing
    );
    let mask = control.bytes(&1_u64.to_ne_bytes());
    // Only the threads that disks may have for their own; this one is not.
    assert_eq!(
        control.call(libc::SYS_sched_setaffinity, [0, 8, mask]),
        missing
    );
    control.release();
    for name in [WORKER, HOUSEKEEPER] {
        let thread = Puppet::seize(&server, name);
        let made = [bits(libc::AF_UNIX), stream, 0];
        assert_eq!(thread.call(libc::SYS_socket, made), missing, "{name}");
        thread.release();
    }
    assert_eq!(server.terminate().code, Some(0));
}
