//! What both played front ends have: a connection by the `vhost` crate, guest memory, queues, and I/O that is verified.
//!
//! Every message is sent where the player says, unlike those of `vdi_tests::driver::Control`, which has an order of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use std::os::unix::net::UnixStream;

use vdi_tests::driver::{Layout, Memory, PATIENCE, Queue, Region, Request, feature};
use vdi_tests::image::MIB;
use vdi_tests::random::Random;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

/// Bytes of the configuration space that all front ends read.
pub(crate) const CONFIG_BYTES: u32 = 60;

/// Connects as soon as somebody listens; answers that do not come are errors.
pub(crate) fn connect(socket: &Path, max_queues: u64) -> Frontend {
    let deadline = Instant::now() + PATIENCE;
    let stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => panic!("nobody listens: {error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    Frontend::from_stream(stream, max_queues)
}

/// The guest's side: its memory and its driver's queues.
pub(crate) struct Guest {
    pub(crate) memory: Arc<Memory>,
    pub(crate) queues: Vec<Queue>,
}

impl Guest {
    /// Memory in two pieces, as below and above the hole that PCs have.
    pub(crate) fn new(queues: usize, size: u16, features: u64) -> Self {
        let memory = Memory::new(&[Region::new(0, 64 * MIB), Region::new(1 << 32, 64 * MIB)]);
        let event_index = features & feature::EVENT_IDX != 0;
        let queues = (0..queues)
            .map(|index| Queue::new(index, &memory, size, event_index))
            .collect();
        Self { memory, queues }
    }

    /// Writes on every queue and reads on another; how many bytes were verified.
    pub(crate) fn write_and_verify(&mut self, random: &mut Random) -> u64 {
        const LEN: u32 = 64 << 10;
        let mut verified = 0;
        for round in 0..8 {
            for index in 0..self.queues.len() {
                let sector = (round * self.queues.len() + index) as u64 * u64::from(LEN / 512);
                let data = random.bytes(LEN as usize);
                self.queues[index].write(sector, &data);
                let other = (index + 1) % self.queues.len();
                assert!(self.queues[other].read(sector, LEN) == data, "at {sector}");
                verified += u64::from(LEN);
            }
        }
        verified
    }

    /// Submits a write on every queue that the device does not get to see for now.
    pub(crate) fn expect_silence(&mut self, sector: u64) -> Vec<vdi_tests::driver::Token> {
        let submit = |queue: &mut Queue| {
            let at = sector + 8 * queue.index() as u64;
            queue.submit(&Request::write(at, vec![0x77; 4096]), &Layout::framed())
        };
        let tokens: Vec<_> = self.queues.iter_mut().map(submit).collect();
        std::thread::sleep(Duration::from_millis(50));
        for queue in &mut self.queues {
            assert!(queue.answered().is_empty(), "a paused queue answered");
        }
        tokens
    }
}

/// Reads the configuration space.
pub(crate) fn config(front_end: &mut Frontend, offset: u32) -> Vec<u8> {
    let none = [0; CONFIG_BYTES as usize];
    let flags = VhostUserConfigFlags::WRITABLE;
    let (_, bytes) = front_end
        .get_config(offset, CONFIG_BYTES, flags, &none)
        .unwrap();
    bytes
}
