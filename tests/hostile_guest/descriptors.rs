//! A front end that takes all the files that the daemon may have open: others wait, and nothing ends.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use serde_json::json;
use tempfile::TempDir;
use vdi_tests::driver::raw::RawFrontEnd;
use vdi_tests::driver::{Driver, Options, PATIENCE};
use vdi_tests::server::{Launch, Server, scratch, wait_for_listener};
use vdi_tests::{operator, qemu};
use vhost::vhost_user::message::FrontendReq;

use crate::front_end::{code, negotiate, words};

/// How many files the daemon may have open.
const LIMIT: usize = 200;

/// Two disks of one daemon that may not have many files open.
struct Narrow {
    server: Server,
    place: TempDir,
}

impl Narrow {
    fn start() -> Self {
        let place = scratch();
        let mut text = "control-socket = \"control\"\nsocket-dir = \".\"\n".to_owned();
        for disk in ["a", "b"] {
            let image = place.path().join(disk).with_extension("vdi");
            qemu::create(&image, "8M");
            text += &format!("[[disk]]\nname = \"{disk}\"\nimage = {image:?}\nnum-queues = 256\n");
        }
        let file = place.path().join("fleet.toml");
        fs::write(&file, text).unwrap();
        let server = Launch::bare()
            .arg("--config")
            .arg(&file)
            .inspectable()
            .under(["prlimit", &format!("--nofile={LIMIT}:{LIMIT}")])
            .spawn();
        let control = place.path().join("control");
        wait_for_listener(&control);
        assert_eq!(operator::names(&control), ["a", "b"]);
        Self { server, place }
    }

    fn open_files(&self) -> usize {
        let path = format!("/proc/{}/fd", self.server.pid());
        fs::read_dir(path).unwrap().count()
    }

    /// A front end of disk `a` that leaves so many files to all others.
    fn greedy(&self, leaves: usize) -> RawFrontEnd {
        let mut front_end = RawFrontEnd::connect(&self.place.path().join("a.sock")).unwrap();
        negotiate(&mut front_end);
        let event = EventFd::new().unwrap();
        let fds = [event.as_fd().as_raw_fd()];
        let mut kinds = [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_ERR]
            .into_iter()
            .flat_map(|request| (0..256).map(move |queue| (request, queue)));
        // Those of front ends that have just gone are given back meanwhile.
        for _ in 0..5 {
            while self.open_files() + leaves < LIMIT {
                let (request, queue) = kinds.next().unwrap();
                let answer = front_end.ask(code(request), &words(&[queue]), &fds);
                assert_eq!(answer.expect_u64(), 0);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        front_end
    }
}

#[test]
fn a_front_end_that_takes_all_descriptors_ends_nobody_else() {
    let daemon = Narrow::start();
    let socket = daemon.place.path().join("b.sock");
    let control = daemon.place.path().join("control");
    let mut b = Driver::connect(&socket, &Options::new()).unwrap();
    b.write(0, &[7; 512]);
    drop(b);
    let log = || daemon.server.log();
    // Whoever comes gets to where the next descriptor is missing: at the door, and at some steps behind it.
    for leaves in 0..4 {
        let greedy = daemon.greedy(leaves);
        let others: Vec<_> = [&socket, &control]
            .into_iter()
            .map(|path| UnixStream::connect(path).unwrap())
            .collect();
        std::thread::sleep(Duration::from_millis(400));
        drop((greedy, others));
        // The next one is served as soon as there is something to serve him with.
        let deadline = Instant::now() + PATIENCE;
        let mut b = loop {
            match Driver::connect(&socket, &Options::new()) {
                Ok(driver) => break driver,
                Err(error) => assert!(Instant::now() < deadline, "{error}: {}", log()),
            }
        };
        assert_eq!(b.read(0, 512), [7; 512], "{leaves} left");
        let info = operator::ask(&control, "info", &json!({"disk": "b"}));
        assert!(info.is_ok(), "{info:?}");
    }
    // Who of them gets how far is a matter of moments.
    assert!(log().contains("Too many open files"), "{}", log());
    assert!(log().len() < 65_536, "it logged {} bytes", log().len());
    assert_eq!(daemon.server.terminate().code, Some(0));
}
