//! How the bytes of an input become messages of a front end, right and wrong ones.
//!
//! A record of 24 bytes is a message:
//!
//! ```text
//! 0  number of the message    1  flags, what is wrong with its length    2  descriptors    3  how much is wrong
//! 4  twenty bytes that say what is in it
//! ```
//!
//! Missing bytes are zeros: every input means something.

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use crate::driver::feature;
use crate::driver::raw::{NEED_REPLY, VERSION};
use crate::random::Random;

/// Bytes of a message in an input.
pub(super) const RECORD: usize = 24;
/// Messages of one input: their answers have room in the socket.
pub(super) const MOST_MESSAGES: usize = 48;
/// Where the front end says that guest memory begins in its own addresses.
const OWN: u64 = 0x7000_0000_0000;
/// Bytes of the guest's memory.
pub(super) const MEMORY: u64 = 64 << 10;
/// Where the second ring is.
pub(super) const SECOND: u64 = 0x8000;

/// Kinds of descriptors that a message may bring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Memory,
    Event,
    Short,
    EmptyPipe,
    FullPipe,
    PipeEnd,
    Socket,
    Null,
    Huge,
    Zeros,
    Directory,
    FullEvent,
}

const KINDS: [Kind; 12] = [
    Kind::Memory,
    Kind::Event,
    Kind::Short,
    Kind::EmptyPipe,
    Kind::FullPipe,
    Kind::PipeEnd,
    Kind::Socket,
    Kind::Null,
    Kind::Huge,
    Kind::Zeros,
    Kind::Directory,
    Kind::FullEvent,
];

/// A message as it is sent.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) code: u32,
    pub(super) flags: u32,
    /// What the header says.
    pub(super) len: u32,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<Kind>,
    /// Whether what follows still begins where a message does.
    pub(super) is_framed: bool,
}

/// The messages of an input.
pub(super) fn parse(bytes: &[u8]) -> Vec<Message> {
    let records = bytes.chunks(RECORD).take(MOST_MESSAGES);
    let records = records.map(|bytes| {
        let mut record = [0; RECORD];
        record[..bytes.len()].copy_from_slice(bytes);
        message(record)
    });
    records.collect()
}

fn message(record: [u8; RECORD]) -> Message {
    let [code, how, which, much, rest @ ..] = record;
    let code = u32::from(code) % 56;
    let flags = match how & 3 {
        0 => VERSION,
        1 => VERSION | NEED_REPLY,
        2 => VERSION | NEED_REPLY,
        _ => much.into(),
    };
    let mut payload = payload(code, &rest);
    let right = payload.len();
    match how >> 2 & 7 {
        5 => payload.truncate(usize::from(much) % (right + 1)),
        6 => payload.extend(vec![much; usize::from(much)]),
        _ => {}
    }
    let mut len = u32::try_from(payload.len()).expect("it is short");
    let mut is_framed = true;
    if how >> 2 & 7 == 7 {
        len = u32::from(much) << (rest[0] % 24);
        is_framed = false;
    }
    let expected = usual_fds(code, &rest);
    let fds = match how >> 5 {
        0..4 => expected,
        4 => Vec::new(),
        5 => vec![KINDS[usize::from(which) % KINDS.len()]],
        6 => vec![KINDS[usize::from(which) % KINDS.len()]; expected.len()],
        _ => vec![KINDS[usize::from(which >> 4) % KINDS.len()]; usize::from(which & 15)],
    };
    Message {
        code,
        flags,
        len,
        payload,
        fds,
        is_framed,
    }
}

/// The descriptors that a message brings if all is right.
fn usual_fds(code: u32, rest: &[u8]) -> Vec<Kind> {
    match code {
        5 => vec![Kind::Memory; usize::from(rest[0]) % 4],
        37 => vec![Kind::Memory],
        12..15 if rest[1] & 1 == 0 => vec![Kind::Event],
        6 | 32 => vec![Kind::Zeros],
        21 => vec![Kind::Socket],
        42 => vec![Kind::EmptyPipe],
        _ => Vec::new(),
    }
}

fn long(rest: &[u8], at: usize) -> u64 {
    rest.get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn word(rest: &[u8], at: usize) -> u32 {
    rest.get(at..)
        .and_then(<[u8]>::first_chunk)
        .map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// One of some usual numbers, or any.
fn pick(rest: &[u8], usual: &[u64]) -> u64 {
    match usual.get(usize::from(rest[0])) {
        Some(number) => *number,
        None => long(rest, 1),
    }
}

/// What the message says if its length is right.
fn payload(code: u32, rest: &[u8; RECORD - 4]) -> Vec<u8> {
    match code {
        2 => longs(&[pick(rest, &features())]),
        16 => longs(&[pick(rest, &[protocol(), protocol() & !8, 8, 0])]),
        5 => {
            let count = u32::from(rest[0]);
            let mut bytes = [count.to_ne_bytes(), [0; 4]].concat();
            for nth in 0..u64::from(count % 10) {
                bytes.extend(longs(&region(&rest[1..], nth)));
            }
            bytes
        }
        37 | 38 => longs(&[&[0], &region(rest, u64::from(rest[8] % 4))[..]].concat()),
        8..12 | 18 => ring_message(code, rest),
        12..15 => {
            let no_descriptor = u64::from(rest[1] & 1) << 8;
            longs(&[u64::from(rest[0]) | no_descriptor | u64::from(rest[2]) << 9])
        }
        24 | 25 => config(rest),
        31 | 32 => {
            let size = pick(rest, &[0x8000, 0x1000, 0x10_0000]);
            let mut bytes = longs(&[size, u64::from(rest[9]) * 8]);
            bytes.extend((u16::from(rest[10]) % 300).to_ne_bytes());
            bytes.extend((u16::from(rest[11]) * 16 % 2000).to_ne_bytes());
            bytes.extend([0; 4]);
            bytes
        }
        6 => longs(&[pick(rest, &[0x1000, 0x8000, 8, 0]), u64::from(rest[9]) * 8]),
        42 => words(&[rest[0].into(), rest[1].into()]),
        1 | 3 | 4 | 15 | 17 | 21 | 34 | 36 | 43 => Vec::new(),
        _ => rest[..usize::from(rest[0]) % rest.len()].to_vec(),
    }
}

fn longs(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|one| one.to_ne_bytes()).collect()
}

fn words(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|one| one.to_ne_bytes()).collect()
}

/// A message about a ring: its number and another one, or where it is.
fn ring_message(code: u32, rest: &[u8]) -> Vec<u8> {
    let index = if rest[0] < 250 {
        rest[0].into()
    } else {
        word(rest, 8)
    };
    match (code, rest[1]) {
        (8, nth) => {
            let sizes = [16, 4, 0, 1024, 3, 2048];
            let size = sizes.get(usize::from(nth)).copied();
            words(&[index, size.unwrap_or_else(|| word(rest, 2))])
        }
        (9, flags) => {
            let second = if rest[0] & 1 == 0 { 0 } else { SECOND };
            let far = if rest[3] == 255 { long(rest, 8) } else { 0 };
            let at = |place: u64, by: u8| {
                let by = u64::from(by) * 0x40 + u64::from(by & 1);
                (OWN + second + place + by).wrapping_add(far)
            };
            let parts = [
                at(0, rest[4]),
                at(0x2000, rest[5]),
                at(0x1000, rest[6]),
                u64::from(rest[7]) << 8,
            ];
            [words(&[rest[0].into(), flags.into()]), longs(&parts)].concat()
        }
        (_, 255) => words(&[index, word(rest, 4)]),
        (_, number) => words(&[index, number.into()]),
    }
}

/// A message about the configuration space.
fn config(rest: &[u8]) -> Vec<u8> {
    let one_of = |usual: &[u32], nth: usize, at: usize| {
        let usual = usual.get(usize::from(rest[nth])).copied();
        usual.unwrap_or_else(|| word(rest, at))
    };
    let size = one_of(&[60, 1, 256, 0, 8, 4096], 0, 4);
    let offset = one_of(&[0, 32, 0x100, 0x120, 59], 1, 8);
    let mut bytes = words(&[offset, size, rest[2].into()]);
    let len = usize::try_from(size.min(512)).expect("it is short");
    bytes.resize(bytes.len() + len, rest[3]);
    bytes
}

/// Guest address, length, own address, offset in the file.
fn region(rest: &[u8], nth: u64) -> [u64; 4] {
    let byte = |at: usize| u64::from(rest.get(at).copied().unwrap_or(0));
    let (moved, cut, offset) = (byte(0), byte(1), byte(2));
    let guest = match byte(3) {
        0 => nth * MEMORY,
        1 => u64::MAX - MEMORY,
        other => other << 56,
    };
    let mut region = [
        guest.wrapping_add(moved * 0x100),
        MEMORY,
        OWN + nth * MEMORY,
        offset << 8,
    ];
    match byte(4) {
        0 => region[1] -= cut,
        1 => region[1] = long(rest, 8),
        2 => region[2] = long(rest, 8),
        3 => region[3] = long(rest, 8),
        _ => region[1] = cut << 12,
    }
    region
}

fn features() -> [u64; 6] {
    let log = 1 << 26;
    let all = feature::USUAL | feature::PROTOCOL_FEATURES;
    [
        all,
        all | log,
        all & !feature::PROTOCOL_FEATURES,
        feature::VERSION_1,
        0,
        u64::MAX,
    ]
}

pub(super) fn protocol() -> u64 {
    let all = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::DEVICE_STATE;
    all.bits()
}

fn record(code: u8, rest: &[u8]) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    (record[0], record[1]) = (code, 1);
    record[4..4 + rest.len()].copy_from_slice(rest);
    record
}

/// Sizes, places and descriptors of a ring, in the order of `codes`.
fn ring(nth: u8, codes: &[u8]) -> Vec<[u8; RECORD]> {
    let enabled = |code: u8| if code == 18 { 1 } else { 0 };
    codes
        .iter()
        .map(|code| record(*code, &[nth, enabled(*code)]))
        .collect()
}

/// Inputs to begin with: what QEMU, Cloud Hypervisor and Firecracker say, in their order, and what else there is.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let begin = [3, 1, 15, 16, 17, 36].map(|code| record(code, &[]));
    let one = |code: u8, rest: &[u8]| record(code, rest);
    let qemu = [
        vec![
            one(24, &[]),
            one(2, &[]),
            one(31, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1]),
            one(32, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 1]),
        ],
        vec![one(21, &[]), one(5, &[1])],
        ring(0, &[8, 10, 9, 12, 13, 14, 18]),
        ring(1, &[8, 10, 9, 12, 13, 14, 18]),
        vec![one(25, &[1, 1, 1, 1]), one(24, &[])],
        ring(0, &[18, 11]),
        ring(1, &[11]),
    ];
    let cloud_hypervisor = [
        vec![
            one(2, &[]),
            one(24, &[0, 2]),
            one(37, &[]),
            one(31, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
        ],
        ring(0, &[8, 9, 10, 13, 12, 14, 18]),
        vec![
            one(37, &[0, 0, 0, 0, 0, 0, 0, 0, 1]),
            one(38, &[0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ],
        vec![
            one(6, &[1]),
            one(2, &[1]),
            one(42, &[0, 0]),
            one(43, &[]),
            one(42, &[1, 0]),
            one(43, &[]),
        ],
        ring(0, &[11]),
    ];
    let firecracker = [
        vec![one(2, &[2]), one(24, &[]), one(5, &[1])],
        ring(0, &[8, 9, 10, 13, 12]),
        vec![one(24, &[]), one(34, &[]), one(4, &[])],
    ];
    let all = [
        qemu.to_vec(),
        cloud_hypervisor.to_vec(),
        firecracker.to_vec(),
    ];
    let mut seeds = Vec::new();
    for parts in all {
        let body: Vec<_> = begin.into_iter().chain(parts.concat()).collect();
        for end in 1..=body.len() {
            seeds.push(body[..end].concat());
        }
    }
    let mut random = Random::seeded(13);
    for nth in 0..60 {
        let mut seed = seeds[nth].clone();
        (0..4).for_each(|_| mutate(&mut seed, &mut random));
        seeds.push(seed);
    }
    seeds
}

/// Changes an input a little, by messages.
pub(super) fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    let count = (bytes.len() / RECORD).min(MOST_MESSAGES);
    bytes.truncate(count * RECORD);
    let small = |random: &mut Random, end: usize| {
        usize::try_from(random.within(0..end as u64)).expect("few")
    };
    let codes = [
        1, 2, 3, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 21, 24, 25, 31, 32, 34, 36, 37, 38,
        42, 43,
    ];
    let at = small(random, count + 1) * RECORD;
    match random.within(0..9) {
        0..2 => {
            let mut new = record(*random.pick(&codes), &[]);
            let len = small(random, 13);
            for byte in &mut new[4..4 + len] {
                *byte = u8::try_from(random.within(0..4)).expect("few");
            }
            bytes.splice(at..at, new);
        }
        2 => {
            bytes.splice(at..at, random.bytes(RECORD));
        }
        3 if at < bytes.len() => {
            bytes.drain(at..at + RECORD);
        }
        4 if at < bytes.len() => {
            let again = bytes[at..at + RECORD].to_vec();
            let to = small(random, count + 1) * RECORD;
            bytes.splice(to..to, again);
        }
        5 if at < bytes.len() => {
            // Something is wrong with its length, its flags or its descriptors.
            let nth = 1 + small(random, 3);
            bytes[at + nth] = random.bytes(1)[0];
        }
        _ if at < bytes.len() => {
            let nth = at + small(random, RECORD);
            bytes[nth] = match random.within(0..3) {
                0 => *random.pick(&[0, 1, 2, 3, 255, 254, 128]),
                1 => bytes[nth].wrapping_add(1),
                _ => random.bytes(1)[0],
            };
        }
        _ => bytes.extend(record(*random.pick(&codes), &[])),
    }
}
