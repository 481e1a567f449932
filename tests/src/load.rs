//! Random reads and writes at depth on one queue, verified against a byte array.
//!
//! Queues share blocks and no sectors: each has every so-many-th stripe of the disk, and a stripe is no multiple of a
//! block. Requests in flight never overlap, so the array is what the disk must hold at every answer.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::driver::{Layout, Queue, Request, Segment, Token};
use crate::image::MIB;
use crate::random::Random;

/// The disk that is needed.
pub const DISK_SECTORS: u64 = 24 * MIB / 512;
/// No multiple of a block, so that the stripes of different queues share blocks.
const STRIPE_SECTORS: u64 = 320;
const DEPTH: usize = 32;
/// How many requests make a load.
const LEAST: u64 = 100;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mix {
    /// Reads and writes.
    ReadsAndWrites,
    /// Flushes, write-zeroes and discards too.
    Everything,
}

/// One queue's part of the disk.
#[derive(Debug)]
pub struct Load {
    model: Vec<u8>,
    random: Random,
    queues: u64,
    mix: Mix,
    busy: Vec<(Token, Range<u64>)>,
    reads: HashMap<Token, Vec<u8>>,
    /// Requests that were answered.
    pub answered: u64,
    /// Bytes that were read and compared.
    pub verified_bytes: u64,
}

impl Load {
    /// A load on one of `queues` queues, over a disk of zeros.
    #[must_use]
    pub fn new(random: Random, queues: usize, mix: Mix) -> Self {
        Self {
            model: vec![0; bytes(0..DISK_SECTORS).end],
            random,
            queues: queues as u64,
            mix,
            busy: Vec::new(),
            reads: HashMap::new(),
            answered: 0,
            verified_bytes: 0,
        }
    }

    /// Goes on as long as `go_on` says, then waits for the last answer.
    ///
    /// # Panics
    /// If a request fails or a byte is wrong.
    pub fn run(&mut self, queue: &mut Queue, mut go_on: impl FnMut() -> bool) {
        while go_on() {
            self.run_on(queue);
        }
        while !self.busy.is_empty() {
            self.finish_one(queue);
        }
    }

    /// Goes on until it is told to stop, and until [`LEAST`] requests were answered: on a busy machine it is a load too.
    ///
    /// # Panics
    /// As [`Self::run`].
    pub fn run_until(&mut self, queue: &mut Queue, stop: &AtomicBool) {
        let least = self.answered + LEAST;
        while !stop.load(Ordering::Relaxed) || self.answered < least {
            self.run_on(queue);
        }
        while !self.busy.is_empty() {
            self.finish_one(queue);
        }
    }

    fn run_on(&mut self, queue: &mut Queue) {
        if self.busy.len() == DEPTH {
            self.finish_one(queue);
        }
        self.start_one(queue);
    }

    fn start_one(&mut self, queue: &mut Queue) {
        let range = self.range(queue.index() as u64);
        let overlaps =
            |(_, busy): &(Token, Range<u64>)| busy.start < range.end && range.start < busy.end;
        if self.busy.iter().any(overlaps) {
            return;
        }
        let layouts = [
            Layout::framed(),
            Layout::framed().indirect(),
            Layout::data_every(65536),
            Layout::whole(),
            Layout::framed().misaligned(3),
        ];
        let layout = self.random.pick(&layouts).clone();
        let len = u32::try_from((range.end - range.start) * 512).expect("a stripe is short");
        let kinds = match self.mix {
            Mix::ReadsAndWrites => 3,
            Mix::Everything => 6,
        };
        let token = match self.random.within(0..kinds) {
            0 => {
                let token = queue.submit(&Request::read(range.start, len), &layout);
                self.reads
                    .insert(token, self.model[bytes(range.clone())].to_vec());
                token
            }
            4 => queue.submit(&Request::flush(), &Layout::framed()),
            5 => {
                self.model[bytes(range.clone())].fill(0);
                let segment = Segment::new(range.start, len / 512).unmap();
                queue.submit(&Request::write_zeroes(&[segment]), &Layout::framed())
            }
            _ => {
                let data = self.random.bytes(len as usize);
                self.model[bytes(range.clone())].copy_from_slice(&data);
                queue.submit(&Request::write(range.start, data), &layout)
            }
        };
        self.busy.push((token, range));
    }

    fn finish_one(&mut self, queue: &mut Queue) {
        let (token, answer) = queue.wait_any();
        let at = self.busy.iter().position(|(busy, _)| *busy == token);
        let (_, range) = self
            .busy
            .swap_remove(at.expect("only what was asked is answered"));
        let data = answer.expect_ok();
        self.answered += 1;
        if let Some(expected) = self.reads.remove(&token) {
            assert!(
                data == expected,
                "queue {}: sectors {range:?} differ",
                queue.index()
            );
            self.verified_bytes += data.len() as u64;
        }
    }

    fn range(&mut self, queue: u64) -> Range<u64> {
        let stripes = DISK_SECTORS / STRIPE_SECTORS / self.queues;
        let stripe = self.random.within(0..stripes) * self.queues + queue;
        let longest = *self.random.pick(&[1, 8, 8, 64, STRIPE_SECTORS]);
        let count = self.random.within(1..longest + 1);
        let offset = self.random.within(0..STRIPE_SECTORS - count + 1);
        let start = stripe * STRIPE_SECTORS + offset;
        start..start + count
    }
}

/// What the disk must hold after these loads, of queue 0 first.
#[must_use]
pub fn disk_after(loads: &[Load]) -> Vec<u8> {
    let mut disk = vec![0; bytes(0..DISK_SECTORS).end];
    let stripe_bytes = bytes(0..STRIPE_SECTORS).end;
    for (nth, stripe) in disk.chunks_mut(stripe_bytes).enumerate() {
        let model = &loads[nth % loads.len()].model;
        let start = nth * stripe_bytes;
        stripe.copy_from_slice(&model[start..start + stripe.len()]);
    }
    disk
}

fn bytes(sectors: Range<u64>) -> Range<usize> {
    let at = |sector: u64| usize::try_from(sector * 512).expect("64-bit hosts only");
    at(sectors.start)..at(sectors.end)
}
