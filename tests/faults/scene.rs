//! A daemon that serves an image on the recorded file system, a driver, and what the disk must read as.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nix::unistd::{Whence, lseek};
use tempfile::TempDir;
use vdi_tests::counts;
use vdi_tests::driver::{Driver, Layout, Options, PATIENCE, Request, Segment, Token};
use vdi_tests::image::{MIB, are_zeros};
use vdi_tests::qemu;
use vdi_tests::recorded::Recorded;
use vdi_tests::server::{Exit, Launch, Server};
use vdi_tests::simulated::Contents;
use vdi_tests::tool::{qemu_img, vdi};
use vdi_tests::words;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

/// The size of the disks.
pub(crate) const DISK: u64 = 160 * MIB;
/// Sectors of a block.
pub(crate) const BLOCK: u64 = 2048;
/// Where `uuid_modify` is in the file.
pub(crate) const AT_MARK: std::ops::Range<u64> = 0x198..0x1A8;
/// Where `blocks_allocated` is in the file.
pub(crate) const AT_COUNT: std::ops::Range<u64> = 0x184..0x188;
/// Where the map of a disk of QEMU's is in the file.
pub(crate) const MAP: std::ops::Range<u64> = 512..512 + 4 * (DISK / MIB);
/// Where its data are, for rules.
pub(crate) const DATA: std::ops::Range<u64> = 1536..u64::MAX;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
/// The image on the recorded file system.
pub(crate) const NAME: &str = "disk.vdi";

/// How data move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    pub(crate) cache: &'static str,
    pub(crate) engine: &'static str,
}

/// All the ways.
pub(crate) const MODES: [Mode; 4] = [
    Mode::new("writeback", "io-uring"),
    Mode::new("direct", "io-uring"),
    Mode::new("writeback", "sync"),
    Mode::new("direct", "sync"),
];

impl Mode {
    const fn new(cache: &'static str, engine: &'static str) -> Self {
        Self { cache, engine }
    }

    pub(crate) fn is_direct(self) -> bool {
        self.cache == "direct"
    }

    pub(crate) fn arguments(self) -> [&'static str; 4] {
        ["--cache", self.cache, "--engine", self.engine]
    }
}

/// An image as QEMU makes it.
pub(crate) fn new_image() -> Contents {
    static IMAGE: LazyLock<Contents> = LazyLock::new(|| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        qemu::create(&path, &DISK.to_string());
        Contents::load(&path).unwrap()
    });
    IMAGE.clone()
}

/// The fills that each sector may hold, one by each write that succeeded last or failed since.
#[derive(Debug, Default)]
pub(crate) struct Ledger(BTreeMap<u64, Vec<u8>>);

impl Ledger {
    fn note(&mut self, sector: u64, count: u64, fill: u8, status: u8) {
        for sector in sector..sector + count {
            let fills = self.0.entry(sector).or_insert_with(|| vec![0]);
            if status == OK {
                fills.clear();
            }
            fills.push(fill);
        }
    }

    fn knows(&self, block: u64) -> bool {
        let sectors = block * BLOCK..(block + 1) * BLOCK;
        self.0.range(sectors).next().is_some()
    }

    /// Bytes that the disk reads as from the sector on.
    fn check(&self, sector: u64, bytes: &[u8]) {
        let end = sector + bytes.len() as u64 / 512;
        if self.0.range(sector..end).next().is_none() {
            assert!(are_zeros(bytes), "{sector}..{end} were never written");
            return;
        }
        for (sector, bytes) in (sector..).zip(bytes.chunks(512)) {
            let fills = self.0.get(&sector).map_or(&[0][..], Vec::as_slice);
            let is_allowed = fills.iter().any(|&fill| bytes == [fill; 512]);
            assert!(
                is_allowed,
                "sector {sector} holds {:?}.., not one of {fills:?}",
                &bytes[..4]
            );
        }
    }
}

/// What a request is, so that it can be noted when it is answered.
pub(crate) struct Write {
    pub(crate) sector: u64,
    pub(crate) count: u64,
    pub(crate) fill: u8,
}

impl Write {
    /// 4 KiB somewhere in a block.
    pub(crate) fn in_block(block: u64, fill: u8) -> Self {
        let (sector, count) = (block * BLOCK + 24, 8);
        Self {
            sector,
            count,
            fill,
        }
    }

    fn request(&self) -> Request {
        let len = usize::try_from(self.count * 512).unwrap();
        Request::write(self.sector, vec![self.fill; len])
    }
}

/// The daemon at work.
pub(crate) struct Scene {
    pub(crate) mode: Mode,
    pub(crate) driver: Driver,
    pub(crate) server: Server,
    pub(crate) files: Recorded,
    pub(crate) ledger: Ledger,
}

impl Scene {
    /// Serves a new image.
    pub(crate) fn new(mode: Mode) -> Self {
        println!("{mode:?}");
        let files = Recorded::mount();
        files.put(NAME, new_image());
        Self::serving(mode, files, Ledger::default())
    }

    /// Serves the image that is there.
    pub(crate) fn serving(mode: Mode, files: Recorded, ledger: Ledger) -> Self {
        let launch = Launch::image(&files.path(NAME)).args(mode.arguments());
        let server = launch.args(["--num-queues", "2"]).start();
        let mut options = Options::new();
        options.wanted.protocol |= VhostUserProtocolFeatures::LOG_SHMFD;
        let driver = server.driver(&options);
        Self {
            mode,
            files,
            server,
            driver,
            ledger,
        }
    }

    /// Writes, and gives the status.
    pub(crate) fn write(&mut self, write: &Write) -> u8 {
        self.write_all(std::slice::from_ref(write))[0]
    }

    /// Writes that are all in flight together; gives their status.
    pub(crate) fn write_all(&mut self, writes: &[Write]) -> Vec<u8> {
        let requests: Vec<Request> = writes.iter().map(Write::request).collect();
        let layout = Layout::framed();
        let queue = self.driver.queue();
        let tokens = queue.submit_all(requests.iter().map(|request| (request, &layout)));
        let wait = |(write, token): (&Write, Token)| {
            let status = queue.wait(token).status;
            self.ledger
                .note(write.sector, write.count, write.fill, status);
            status
        };
        writes.iter().zip(tokens).map(wait).collect()
    }

    /// A write that must succeed.
    #[track_caller]
    pub(crate) fn write_ok(&mut self, block: u64, fill: u8) {
        let status = self.write(&Write::in_block(block, fill));
        assert_eq!(status, OK, "block {block}: {}", self.server.log());
    }

    /// A write that must fail.
    #[track_caller]
    pub(crate) fn write_fails(&mut self, block: u64, fill: u8) {
        assert_eq!(self.write(&Write::in_block(block, fill)), IO_ERROR);
    }

    /// Any request; gives the status.
    pub(crate) fn status_of(&mut self, request: &Request) -> u8 {
        let queue = self.driver.queue();
        queue.run(request, &Layout::framed()).status
    }

    #[track_caller]
    pub(crate) fn flush_ok(&mut self) {
        assert_eq!(self.status_of(&Request::flush()), OK);
    }

    #[track_caller]
    pub(crate) fn flush_fails(&mut self) {
        assert_eq!(self.status_of(&Request::flush()), IO_ERROR);
    }

    /// Discards a part of a block; gives the status.
    pub(crate) fn discard(&mut self, sector: u64, count: u32) -> u8 {
        let status = self.status_of(&Request::discard(&[Segment::new(sector, count)]));
        self.ledger.note(sector, count.into(), 0, status);
        status
    }

    /// Reads a whole block, which must hold what the ledger says.
    #[track_caller]
    pub(crate) fn read_ok(&mut self, block: u64) {
        let answer = self.driver.read(block * BLOCK, 1 << 20);
        self.ledger.check(block * BLOCK, &answer);
    }

    /// Reads all blocks that were ever written, and one that was not.
    #[track_caller]
    pub(crate) fn read_all_ok(&mut self) {
        let blocks = self.ledger.0.keys().map(|sector| sector / BLOCK);
        let mut blocks: Vec<u64> = blocks.chain([DISK / MIB - 1]).collect();
        blocks.dedup();
        for block in blocks {
            self.read_ok(block);
        }
    }

    #[track_caller]
    pub(crate) fn logged(&self, what: &str) {
        self.server.expect_log(what);
    }

    /// Waits until the daemon has made the image so long.
    #[track_caller]
    pub(crate) fn wait_for_len(&self, len: u64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.files.contents(NAME).len_bytes();
            if found >= len {
                return;
            }
            assert!(Instant::now() < deadline, "{found} bytes, not {len}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// W5 after a failure that is final: no change is taken any more, reads go on, and the log says why.
    #[track_caller]
    pub(crate) fn takes_no_more_writes(&mut self) {
        self.write_fails(1, 99);
        self.write_fails(150, 99);
        assert_eq!(self.discard(BLOCK, 16), IO_ERROR);
        self.flush_fails();
        self.read_all_ok();
        self.logged("takes no more writes");
    }

    /// Ends the daemon by a signal, and looks at what is left.
    pub(crate) fn terminate(self) -> (Left, Exit) {
        let Self {
            files,
            server,
            driver,
            ledger,
            mode,
        } = self;
        drop(driver);
        let exit = server.terminate();
        (Left::new(mode, files, ledger), exit)
    }

    /// A clean end: the image is exact.
    #[track_caller]
    pub(crate) fn end(mut self) -> Left {
        self.read_all_ok();
        let (left, exit) = self.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        left.check(&[0]);
        qemu::expect_clean(&left.path);
        left
    }

    /// A violent end: the image has at most leaks.
    pub(crate) fn killed(self) -> Left {
        let Self {
            files,
            server,
            driver,
            ledger,
            mode,
        } = self;
        let _exit = server.kill();
        drop(driver);
        let left = Left::new(mode, files, ledger);
        left.check(&[0, 3]);
        left
    }
}

/// An image that nobody serves.
pub(crate) struct Left {
    mode: Mode,
    files: Recorded,
    ledger: Ledger,
    path: std::path::PathBuf,
    _directory: TempDir,
}

impl Left {
    fn new(mode: Mode, files: Recorded, ledger: Ledger) -> Self {
        let (failed, short) = files.injected();
        counts::tell(&format!(
            "faults: {failed} calls failed, {short} were cut short"
        ));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        files.contents(NAME).save(&path).unwrap();
        Self {
            mode,
            files,
            ledger,
            path,
            _directory: directory,
        }
    }

    /// `vdi check` says one of these, and QEMU reads what may be there.
    #[track_caller]
    pub(crate) fn check(&self, codes: &[i32]) {
        let answer = vdi(words!["check", self.path]);
        let code = answer.code.unwrap();
        assert!(codes.contains(&code), "{answer:#?}");
        let raw = self.path.with_extension("raw");
        qemu_img(words!["convert", "-f", "vdi", "-O", "raw", self.path, raw]).expect_code(0);
        let file = std::fs::File::open(&raw).unwrap();
        let mut bytes = vec![0; 1 << 20];
        for block in 0..DISK / MIB {
            // QEMU leaves holes for zeros.
            let start = i64::try_from(block * MIB).unwrap();
            let data = lseek(&file, start, Whence::SeekData).unwrap_or(i64::MAX);
            if data >= start + (1 << 20) && !self.ledger.knows(block) {
                continue;
            }
            file.read_exact_at(&mut bytes, block * MIB).unwrap();
            self.ledger.check(block * BLOCK, &bytes);
        }
    }

    /// A new daemon serves it: all is as it was, and it takes writes.
    #[track_caller]
    pub(crate) fn lives_on(self) {
        let mut scene = Scene::serving(self.mode, self.files, self.ledger);
        scene.read_all_ok();
        for block in [0, 70, 140] {
            scene.write_ok(block, 222);
        }
        scene.flush_ok();
        let _left = scene.end();
    }
}

impl Left {
    /// The length of the image's file.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.files.contents(NAME).len_bytes()
    }

    /// Ends a rule; gives how often it was applied.
    pub(crate) fn lift(&self, rule: vdi_tests::recorded::RuleId) -> u64 {
        self.files.lift(rule)
    }
}

impl Scene {
    /// Serves a child of an image with data in its first eight blocks.
    pub(crate) fn over_a_parent(mode: Mode) -> Self {
        let mut parent = Self::new(mode);
        for block in 0..8 {
            parent.write_ok(block, 1);
        }
        let (left, _exit) = parent.terminate();
        let (base, child) = (left.files.path("base.vdi"), left.files.path(NAME));
        std::fs::rename(&child, &base).unwrap();
        vdi(words!["snapshot", base, child]).expect_code(0);
        Self::serving(mode, left.files, left.ledger)
    }
}
