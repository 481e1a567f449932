//! A driver that others wrote, `blkio`: reads, writes, flushes, discards and zeros on queues that are called and queues that
//! poll. It is what QEMU's `virtio-blk-vhost-user` block driver stands on.
//!
//! Its memory is a memfd, which is read and written here by way of `/proc`.

use std::fs::{File, OpenOptions};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use vdi_tests::counts::{FrontEnd, crate_version};
use vdi_tests::driver::PATIENCE;
use vdi_tests::image::{Image, MIB, are_zeros};
use vdi_tests::qemu;
use vdi_tests::random::Random;
use vdi_tests::server::Launch;

const SLOT: usize = 65536;
const DEPTH: usize = 16;

/// A connected driver; its first half of memory is for writes, its second for reads.
struct Other {
    _blkio: Blkio,
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    memory: File,
}

impl Other {
    fn connect(socket: &str, calling: i32, polling: i32) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", socket).unwrap();
        blkio.connect().unwrap();
        assert_eq!(blkio.get_u64("capacity").unwrap(), 16 * MIB);
        blkio.set_i32("num-queues", calling).unwrap();
        blkio.set_i32("num-poll-queues", polling).unwrap();
        let started = blkio.start().unwrap();
        let region = blkio.alloc_mem_region(2 * DEPTH * SLOT).unwrap();
        blkio.map_mem_region(&region).unwrap();
        let path = format!("/proc/self/fd/{}", region.fd);
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let queues = started
            .queues
            .into_iter()
            .chain(started.poll_queues)
            .collect();
        Self {
            _blkio: blkio,
            queues,
            region,
            memory,
        }
    }

    /// Writes slots of the disk and reads them back, `DEPTH` at a time, all on one queue.
    fn write_and_read(&mut self, queue: usize, slots: &[u64], random: &mut Random) {
        for batch in slots.chunks(DEPTH) {
            let data = random.bytes(batch.len() * SLOT);
            self.memory.write_all_at(&data, 0).unwrap();
            let (addr, depth) = (self.region.addr, DEPTH);
            let queue = &mut self.queues[queue];
            for (nth, slot) in batch.iter().enumerate() {
                let buffer = (addr + nth * SLOT) as *const u8;
                queue.write(slot * SLOT as u64, buffer, SLOT, nth, ReqFlags::empty());
            }
            finish(queue, batch.len());
            queue.flush(0, ReqFlags::empty());
            finish(queue, 1);
            for (nth, slot) in batch.iter().enumerate() {
                let buffer = (addr + (depth + nth) * SLOT) as *mut u8;
                queue.read(slot * SLOT as u64, buffer, SLOT, nth, ReqFlags::empty());
            }
            finish(queue, batch.len());
            let mut back = vec![0; data.len()];
            self.memory
                .read_exact_at(&mut back, (DEPTH * SLOT) as u64)
                .unwrap();
            assert!(back == data, "slots {batch:?} read back differently");
        }
    }
}

impl Other {
    /// Has a range of slots read as zeros, by a discard or a write-zeroes.
    fn expect_zeros_after(&mut self, queue: usize, slot: u64, how: Zeros) {
        let (at, len) = (slot * SLOT as u64, SLOT as u64);
        let buffer = (self.region.addr + DEPTH * SLOT) as *mut u8;
        let queue = &mut self.queues[queue];
        match how {
            Zeros::Discard => queue.discard(at, len, 0, ReqFlags::empty()),
            Zeros::Write => queue.write_zeroes(at, len, 0, ReqFlags::NO_UNMAP),
            Zeros::WriteAndUnmap => queue.write_zeroes(at, len, 0, ReqFlags::empty()),
        }
        finish(queue, 1);
        queue.read(at, buffer, SLOT, 0, ReqFlags::empty());
        finish(queue, 1);
        let mut back = vec![1; SLOT];
        self.memory
            .read_exact_at(&mut back, (DEPTH * SLOT) as u64)
            .unwrap();
        assert!(are_zeros(&back), "slot {slot} after {how:?}");
    }
}

/// What makes zeros.
#[derive(Debug, Clone, Copy)]
enum Zeros {
    Discard,
    Write,
    WriteAndUnmap,
}

/// Waits for so many requests, each of which must succeed.
#[expect(
    unsafe_code,
    reason = "blkio gives completions as uninitialised memory"
)]
fn finish(queue: &mut Blkioq, count: usize) {
    let mut left: Duration = PATIENCE;
    let mut completions: Vec<MaybeUninit<Completion>> = Vec::new();
    completions.resize_with(count, MaybeUninit::uninit);
    let done = queue.do_io(&mut completions, count, Some(&mut left), None);
    assert_eq!(done.expect("blkio waits without error"), count);
    for completion in &completions {
        // SAFETY: do_io returned the length of the slice, and initialises that many.
        let completion = unsafe { completion.assume_init_ref() };
        assert_eq!(completion.ret, 0, "request {}", completion.user_data);
    }
}

#[test]
fn blkio_does_all_it_can_on_1_to_4_queues_that_call_or_poll() {
    for (calling, polling) in [(1, 0), (0, 1), (2, 0), (4, 0), (2, 2)] {
        let image = Image::by_qemu(16 * MIB);
        let server = Launch::image(image.path())
            .args(["--num-queues", "4"])
            .start();
        let mut random = Random::seeded(8);
        let mut other = Other::connect(server.socket().to_str().unwrap(), calling, polling);
        let queues = other.queues.len() as u64;
        for queue in 0..queues {
            let slots: Vec<u64> = (0..16 * MIB / SLOT as u64)
                .filter(|slot| slot % queues == queue)
                .collect();
            other.write_and_read(usize::try_from(queue).unwrap(), &slots, &mut random);
        }
        // The image's blocks are of 1 MiB: one goes wholly, others in part.
        for queue in 0..other.queues.len() {
            let slot = queue as u64 * 32;
            for whole in slot..slot + 16 {
                other.expect_zeros_after(queue, whole, Zeros::Discard);
            }
            other.expect_zeros_after(queue, slot + 16, Zeros::Write);
            other.expect_zeros_after(queue, slot + 17, Zeros::WriteAndUnmap);
        }
        drop(other);
        assert_eq!(server.terminate().code, Some(0));
        qemu::expect_clean(image.path());
    }
    let [blkio, driver] = ["blkio", "virtio-driver"].map(crate_version);
    let row = FrontEnd {
        name: "blkio",
        version: &format!("blkio {blkio}, virtio-driver {driver}"),
        features: "1, 2 and 4 queues that call, 1 and 2 that poll",
        verified: "read, write, flush, discard, write-zeroes with and without unmap",
    };
    row.tell();
}
