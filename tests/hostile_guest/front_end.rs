//! A daemon, and front ends that say to it what `vhost` would not.

use std::fs::File;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vdi_tests::driver::raw::{RawFrontEnd, VERSION};
use vdi_tests::driver::{Options, PATIENCE, feature};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, Server};
use vhost::vhost_user::message::FrontendReq;

pub(crate) fn code(request: FrontendReq) -> u32 {
    request.into()
}

/// A daemon that one rude front end after another talks to.
pub(crate) struct Bench {
    pub(crate) server: Server,
    open_before: usize,
    _image: Image,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let image = Image::by_qemu(8 * MIB);
        let server = Launch::image(image.path())
            .inspectable()
            .args(["--num-queues", "16"])
            .start();
        server.driver(&Options::new()).write(0, &[0x5a; 512]);
        let mut bench = Self {
            server,
            open_before: 0,
            _image: image,
        };
        bench.open_before = bench.settled();
        bench
    }

    /// Number of files that the daemon has open once it waits for a connection.
    fn settled(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        let mut last = self.open_files();
        loop {
            std::thread::sleep(Duration::from_millis(10));
            let now = self.open_files();
            if now == last && (self.open_before == 0 || now <= self.open_before) {
                return now;
            }
            if Instant::now() > deadline {
                return now;
            }
            last = now;
        }
    }

    fn open_files(&self) -> usize {
        let path = format!("/proc/{}/fd", self.server.pid());
        std::fs::read_dir(path).unwrap().count()
    }

    pub(crate) fn connect(&self) -> RawFrontEnd {
        RawFrontEnd::connect(self.server.socket()).unwrap()
    }

    /// A front end that has negotiated, so that every further message is answered.
    pub(crate) fn negotiated(&self) -> RawFrontEnd {
        let mut front_end = self.connect();
        negotiate(&mut front_end);
        front_end
    }

    /// The message must be refused, and the next front end served.
    pub(crate) fn expect_refusal(&self, request: FrontendReq, payload: &[u8], fds: &[RawFd]) {
        let mut front_end = self.negotiated();
        let answer = front_end.ask(code(request), payload, fds);
        assert!(answer.refuses(), "{request:?} {payload:x?}: {answer:?}");
        drop(front_end);
        self.expect_service();
    }

    pub(crate) fn expect_service(&self) {
        assert_eq!(
            self.server.driver(&Options::new()).read(0, 512),
            [0x5a; 512]
        );
    }

    /// The daemon runs, leaked no file and logged little.
    pub(crate) fn expect_good_end(self) {
        let open = self.settled();
        assert!(
            open <= self.open_before,
            "{} files are open, not {}",
            open,
            self.open_before
        );
        let exit = self.server.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        assert!(exit.log.len() < 65536, "it logged {} bytes", exit.log.len());
    }
}

pub(crate) fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `struct vhost_vring_state`.
pub(crate) fn vring_state(index: u32, number: u32) -> Vec<u8> {
    [index.to_ne_bytes(), number.to_ne_bytes()].concat()
}

/// Guest address, size, user address, offset in the file.
pub(crate) type RegionWords = [u64; 4];

pub(crate) fn memory_table(count: u32, regions: &[RegionWords]) -> Vec<u8> {
    let mut bytes = [count.to_ne_bytes(), [0; 4]].concat();
    bytes.extend(regions.iter().flat_map(|region| words(region)));
    bytes
}

pub(crate) fn memfd(len_bytes: u64) -> File {
    let file = File::from(memfd_create("region", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len_bytes).unwrap();
    file
}

/// Accepts all protocol features, so that no message is refused for want of one, and every further one is answered.
pub(crate) fn negotiate(front_end: &mut RawFrontEnd) {
    let features = feature::PROTOCOL_FEATURES | feature::VERSION_1;
    let quiet = |front_end: &mut RawFrontEnd, request, payload: &[u8]| {
        let len = u32::try_from(payload.len()).unwrap();
        front_end.send(code(request), VERSION, len, payload, &[]);
    };
    quiet(front_end, FrontendReq::SET_OWNER, &[]);
    quiet(front_end, FrontendReq::GET_FEATURES, &[]);
    let offered = front_end.reply().expect_u64();
    assert_eq!(offered & features, features);
    quiet(front_end, FrontendReq::GET_PROTOCOL_FEATURES, &[]);
    let bits = front_end.reply().expect_u64().to_ne_bytes();
    quiet(front_end, FrontendReq::SET_PROTOCOL_FEATURES, &bits);
    let answer = front_end.ask(
        code(FrontendReq::SET_FEATURES),
        &features.to_ne_bytes(),
        &[],
    );
    assert_eq!(answer.expect_u64(), 0);
}
