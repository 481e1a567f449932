//! How the bytes of an input become a guest, and what it does.
//!
//! ```text
//!   0  what the device is, what was negotiated, shape of the memory, place of the ring
//!  16  steps of 16 bytes: kind, seven bytes that say how, eight that are numbers
//! ```
//!
//! Missing bytes are zeros: every input means something.

use crate::random::Random;

/// Bytes of a step, and of what comes before the first.
pub(super) const STEP: usize = 16;

/// Steps of one input.
const MOST_STEPS: usize = 64;

/// Kinds of requests: `VIRTIO_BLK_T_*`. Some are legal, some come with the barrier bit, some nobody knows.
pub(super) const REQUESTS: [u32; 12] = [0, 1, 4, 8, 11, 13, 0, 1, 1 << 31, 1 << 31 | 1, 14, 2];

/// What the first bytes say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape([u8; STEP]);

impl Shape {
    pub(super) const READ_ONLY: u8 = 1;
    pub(super) const PARENT: u8 = 2;
    pub(super) const NO_DISCARD: u8 = 4;
    pub(super) const EVENT_INDEX: u8 = 8;
    pub(super) const NO_FLUSH: u8 = 16;
    pub(super) const LOG: u8 = 32;
    pub(super) const KILLED: u8 = 64;

    pub(super) const fn has(self, flag: u8) -> bool {
        self.0[0] & flag != 0
    }

    /// Whether written zeros are looked for, as the daemon is asked.
    pub(super) const fn detects_zeros(self) -> u8 {
        self.0[1] % 3
    }

    pub(super) fn queue_size(self) -> u16 {
        // 16 if nothing is said.
        1 << ((u32::from(self.0[2]) + 4) % 9)
    }

    pub(super) const fn memory(self) -> u8 {
        self.0[3]
    }

    pub(super) const fn index(self) -> u16 {
        u16::from_le_bytes([self.0[4], self.0[5]])
    }

    /// Where one of the three parts of the ring is, by default one behind the other at the start of memory.
    pub(super) fn ring_part(self, nth: usize) -> usize {
        let moved = u16::from_le_bytes([self.0[6 + 2 * nth], self.0[7 + 2 * nth]]);
        [0, 0x1000, 0x1800][nth] + usize::from(moved) * 2
    }
}

/// A step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step(pub(super) [u8; STEP]);

/// What is done in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A chain is made and put into the available ring.
    Chain,
    /// What is there is shown to the device, which does it.
    Run,
    /// The same while somebody writes to the memory.
    Race,
    /// Some bytes of memory are written.
    Poke,
    /// A descriptor is written.
    Descriptor,
    /// Any head is put into the available ring.
    Head,
    /// The available index jumps.
    Jump,
    /// What the driver says about calls.
    Calls,
    /// The cache mode is set.
    Writeback,
    /// The device gets its memory anew.
    Memory,
    /// The ring stops and starts again.
    Restart,
    /// From now on the image cannot grow, or not be written at all.
    Seal,
}

impl Step {
    pub(super) const fn kind(self) -> Kind {
        match self.0[0] % 24 {
            0..8 => Kind::Chain,
            8..14 => Kind::Run,
            14 => Kind::Race,
            15 => Kind::Poke,
            16 => Kind::Descriptor,
            17 => Kind::Head,
            18 => Kind::Jump,
            19 => Kind::Calls,
            20 => Kind::Writeback,
            21 => Kind::Memory,
            22 => Kind::Restart,
            _ => Kind::Seal,
        }
    }

    pub(super) const fn byte(self, nth: usize) -> u8 {
        self.0[nth]
    }

    pub(super) const fn half(self, nth: usize) -> u16 {
        u16::from_le_bytes([self.0[nth], self.0[nth + 1]])
    }

    pub(super) fn word(self, nth: usize) -> u32 {
        u32::from(self.half(nth)) | u32::from(self.half(nth + 2)) << 16
    }

    pub(super) fn long(self, nth: usize) -> u64 {
        u64::from(self.word(nth)) | u64::from(self.word(nth + 4)) << 32
    }
}

/// What an input means.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) shape: Shape,
    pub(super) steps: Vec<Step>,
}

impl Input {
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let block = |bytes: &[u8]| {
            let mut block = [0; STEP];
            block[..bytes.len()].copy_from_slice(bytes);
            block
        };
        let mut blocks = bytes.chunks(STEP).map(block);
        let shape = Shape(blocks.next().unwrap_or_default());
        let steps = blocks.take(MOST_STEPS).map(Step).collect();
        Self { shape, steps }
    }
}

/// Inputs to begin with: requests of every kind, in every way they are cut, whole and broken.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut random = Random::seeded(11);
    let mut seeds = Vec::new();
    for round in 0..120_u8 {
        let mut shape = [0; STEP];
        shape[0] = random.bytes(1)[0] & if round % 8 == 0 { 0xFF } else { 0xFE };
        shape[1] = round;
        shape[2] = round % 9;
        shape[3] = random.bytes(1)[0];
        shape[4..6].copy_from_slice(&random.bytes(2));
        let mut bytes = shape.to_vec();
        for nth in 0..random.within(2..14) {
            let step = if nth % 3 == 2 {
                run()
            } else {
                chain(&mut random)
            };
            bytes.extend(step);
        }
        bytes.extend(run());
        seeds.push(bytes);
    }
    // Chains about as long as they may be, and a table in a table.
    for more in 1000..1030_u16 {
        let mut step = [0; STEP];
        (step[1], step[4], step[5], step[6], step[7]) = (1, 1, 8, 21, 1);
        step[8..10].copy_from_slice(&more.to_le_bytes());
        seeds.push([[0; STEP], step, run()].concat());
    }
    let mut step = [0; STEP];
    (step[1], step[4], step[5], step[6]) = (1, 1, 8, 9);
    seeds.push([[0; STEP], step, run()].concat());
    seeds
}

const fn run() -> [u8; STEP] {
    let mut step = [0; STEP];
    step[0] = 8;
    step
}

/// A request, probably a legal one.
fn chain(random: &mut Random) -> [u8; STEP] {
    let mut step = [0; STEP];
    step.copy_from_slice(&random.bytes(STEP));
    step[0] = 0;
    step[1] %= 12;
    step[3] %= 0x90;
    step[4] %= 20;
    if random.within(0..4) != 0 {
        step[6] = 0;
    }
    step
}

/// Changes an input a little, by steps.
pub(super) fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let steps = bytes.len().saturating_sub(1) / STEP;
    bytes.resize(STEP * (steps.min(MOST_STEPS) + 1), 0);
    let at = |random: &mut Random| {
        let nth = random.within(0..steps.clamp(1, MOST_STEPS) as u64);
        STEP * (1 + usize::try_from(nth).expect("few"))
    };
    match random.within(0..12) {
        0 => {
            let nth = usize::try_from(random.within(0..STEP as u64)).expect("few");
            bytes[nth] = random.bytes(1)[0];
        }
        1..4 => {
            let (at, step) = (at(random).min(bytes.len()), chain(random));
            bytes.splice(at..at, step);
        }
        4..6 => {
            let at = at(random).min(bytes.len());
            bytes.splice(at..at, run());
        }
        6 => {
            let mut step = random.bytes(STEP);
            step[0] = u8::try_from(random.within(8..24)).expect("few");
            let at = at(random).min(bytes.len());
            bytes.splice(at..at, step);
        }
        7 if steps > 0 => {
            let at = at(random);
            bytes.drain(at..at + STEP);
        }
        8 if steps > 0 => {
            let (from, to) = (at(random), at(random));
            let step = bytes[from..from + STEP].to_vec();
            bytes.splice(to..to, step);
        }
        9 if steps > 0 => {
            // A request that is broken in one way.
            let at = at(random);
            bytes[at + 6] = u8::try_from(random.within(0..32)).expect("few");
            bytes[at + 7] = random.bytes(1)[0];
        }
        _ if steps > 0 => {
            let at = at(random) + usize::try_from(random.within(0..STEP as u64)).expect("few");
            let edge = *random.pick(&[0, 1, 2, 0x7F, 0x80, 0xFE, 0xFF]);
            bytes[at] = if random.within(0..2) == 0 {
                edge
            } else {
                random.bytes(1)[0]
            };
        }
        _ => bytes.extend(chain(random)),
    }
}
