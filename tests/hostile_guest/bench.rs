//! A daemon and a driver for one hostile chain after another.

use std::time::Duration;

use vdi_tests::driver::{
    Buffer, Descriptor, Driver, Fate, NEXT, Options, PATIENCE, Region, UNTOUCHED, Used, WRITE,
    feature,
};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, Server};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_IN};

/// Descriptors in each queue.
pub(crate) const RING: u16 = 128;
/// Where hostile chains begin; ordinary requests use lower descriptors.
pub(crate) const FIRST: u16 = 64;
/// Far from any guest memory.
pub(crate) const NOWHERE: u64 = 0x7777_0000_0000;

/// Guest memory has a hole between these two regions.
pub(crate) const REGIONS: [Region; 2] =
    [Region::new(0, 64 * MIB), Region::new(128 * MIB, 64 * MIB)];
/// Where the first region ends.
pub(crate) const HOLE: u64 = 64 * MIB;

/// A served disk, a hostile queue (0) and a decent one (1).
pub(crate) struct Bench {
    pub(crate) driver: Driver,
    pub(crate) server: Server,
    pub(crate) header: Buffer,
    pub(crate) data: Buffer,
    pub(crate) status: Buffer,
    image: Image,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self::with(&[])
    }

    pub(crate) fn with(arguments: &[&str]) -> Self {
        let image = Image::by_qemu(64 * MIB);
        let server = Launch::image(image.path()).args(arguments).start();
        let options = Options::new()
            .queues(2)
            .queue_size(RING)
            .memory(REGIONS.to_vec());
        let mut driver = server.driver(&options);
        driver.queues[1].write(0, &[0x5a; 4096]);
        let memory = driver.memory.clone();
        let buffer = |len| memory.allocate(len, 4096);
        let bench = Self {
            header: buffer(4096),
            data: buffer(65536),
            status: buffer(4096),
            driver,
            server,
            image,
        };
        bench.set_header(VIRTIO_BLK_T_IN, 0);
        bench.untouch();
        bench
    }

    /// What the header's memory says.
    pub(crate) fn set_header(&self, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.header.write(&bytes);
    }

    fn untouch(&self) {
        self.data.write(&[UNTOUCHED; 65536]);
        self.status.write(&[UNTOUCHED; 16]);
    }

    /// A readable descriptor of the header.
    pub(crate) fn header(&self) -> Descriptor {
        readable(self.header.at(), 16)
    }

    /// A writable descriptor of the data.
    pub(crate) fn data(&self, len_bytes: u32) -> Descriptor {
        writable(self.data.at(), len_bytes)
    }

    /// A writable descriptor of the status.
    pub(crate) fn status(&self) -> Descriptor {
        writable(self.status.at(), 1)
    }

    /// The chain must come back with IOERR, its data untouched.
    pub(crate) fn expect_io_error(&mut self, chain: &[Descriptor]) {
        assert_eq!(
            u32::from(self.status_of(chain)),
            VIRTIO_BLK_S_IOERR,
            "{chain:x?}"
        );
        let data = self.data.read(65536);
        assert!(
            data.iter().all(|&byte| byte == UNTOUCHED),
            "data of a refused request"
        );
        self.expect_service();
    }

    /// The status with which the chain must come back.
    pub(crate) fn status_of(&mut self, chain: &[Descriptor]) -> u8 {
        self.untouch();
        self.driver.queues[0].offer_chain(FIRST, &linked(chain));
        match self.driver.queues[0].fate(PATIENCE) {
            Fate::Used(used) => {
                let all: u64 = chain.iter().map(|d| u64::from(d.len_bytes)).sum();
                assert!(
                    u64::from(used.len_bytes) <= all,
                    "{used:?} is longer than the chain"
                );
            }
            fate @ (Fate::Broken | Fate::Silence) => panic!("{fate:?} after {chain:x?}"),
        }
        self.status.read(1)[0]
    }

    /// What was offered must break the ring; then it is started anew.
    pub(crate) fn expect_broken(&mut self, offer: impl FnOnce(&mut Self)) {
        self.untouch();
        offer(self);
        assert_eq!(self.driver.queues[0].fate(PATIENCE), Fate::Broken);
        self.driver.queues[0].offer(0);
        let more = self.driver.queues[0].fate(Duration::from_millis(20));
        assert_eq!(more, Fate::Silence, "a broken ring goes on");
        self.expect_service();
        self.restart();
        self.expect_service();
    }

    /// The chain must break the ring.
    pub(crate) fn expect_chain_breaks(&mut self, chain: &[Descriptor]) {
        self.expect_broken(|bench| bench.driver.queues[0].offer_chain(FIRST, chain));
    }

    /// The chain must break the ring or come back; either way it does no harm.
    pub(crate) fn expect_survival(&mut self, chain: &[Descriptor]) -> Option<Used> {
        self.untouch();
        self.driver.queues[0].offer_chain(FIRST, chain);
        match self.driver.queues[0].fate(PATIENCE) {
            Fate::Used(used) => {
                self.expect_service();
                Some(used)
            }
            Fate::Broken => {
                self.restart();
                self.expect_service();
                None
            }
            Fate::Silence => panic!("nothing became of {chain:x?}"),
        }
    }

    /// Starts the hostile queue anew, empty, as after a reset of the device.
    pub(crate) fn restart(&mut self) {
        let _base = self.driver.control.stop(0).unwrap();
        let event_index = self.driver.control.features() & feature::EVENT_IDX != 0;
        let fresh = vdi_tests::driver::Queue::new(0, &self.driver.memory, RING, event_index);
        self.driver.queues[0] = fresh;
        self.driver
            .control
            .start(&self.driver.queues[0], 0)
            .unwrap();
    }

    /// The other queue is served, and the disk is as it was.
    pub(crate) fn expect_service(&mut self) {
        assert!(
            self.driver.queues[1].read(0, 4096) == [0x5a; 4096],
            "the disk changed"
        );
    }

    /// The daemon ends well, having logged little, and the image is clean.
    pub(crate) fn expect_good_end(self) {
        let Self {
            driver,
            server,
            image,
            ..
        } = self;
        drop(driver);
        let exit = server.terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        assert!(exit.log.len() < 65536, "it logged {} bytes", exit.log.len());
        vdi_tests::qemu::expect_clean(image.path());
    }
}

/// A descriptor that the device may read.
pub(crate) fn readable(at: u64, len_bytes: u32) -> Descriptor {
    Descriptor {
        at,
        len_bytes,
        flags: 0,
        next: 0,
    }
}

/// A descriptor that the device may write.
pub(crate) fn writable(at: u64, len_bytes: u32) -> Descriptor {
    Descriptor {
        at,
        len_bytes,
        flags: WRITE,
        next: 0,
    }
}

/// The same descriptors, each leading to the next one behind [`FIRST`].
pub(crate) fn linked(chain: &[Descriptor]) -> Vec<Descriptor> {
    linked_from(FIRST, chain)
}

/// The same descriptors, each leading to the next one behind `first`.
pub(crate) fn linked_from(first: u16, chain: &[Descriptor]) -> Vec<Descriptor> {
    let last = chain.len() - 1;
    let link = |(nth, descriptor): (usize, &Descriptor)| {
        let next = first + u16::try_from(nth + 1).unwrap();
        let leads_on = nth < last;
        Descriptor {
            flags: descriptor.flags | if leads_on { NEXT } else { 0 },
            next: if leads_on { next } else { descriptor.next },
            ..*descriptor
        }
    };
    chain.iter().enumerate().map(link).collect()
}
