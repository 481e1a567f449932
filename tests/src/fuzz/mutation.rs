//! Changes of an input by what its bytes mean: words of the header and entries of the map get values that have broken
//! parsers before.

use super::image_input::{HEADER, MAP, OPERATION_LEN, OPERATIONS};
use crate::random::Random;
use crate::simulated::index;

/// Entries that a map grows by at most.
const MOST_MORE: u64 = 9;

/// Changes something.
pub(super) fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.len() < MAP {
        bytes.resize(MAP, 0);
    }
    match random.within(0..16) {
        0 => bytes[index(random.within(0..HEADER as u64))] = some_byte(random),
        1 => {
            let value = hostile(bytes, random);
            put(bytes, 8, value);
        }
        2..4 => {
            let nth = index(random.within(0..8));
            let operation = random.bytes(OPERATION_LEN);
            let at = OPERATIONS + nth * OPERATION_LEN;
            bytes[at..at + OPERATION_LEN].copy_from_slice(&operation);
            // Small disks are the most likely.
            bytes[at + 3] = 0;
        }
        4..9 => {
            let nth = index(random.within(0..(MAP - HEADER) as u64 / 4));
            let value = hostile(bytes, random);
            put(bytes, HEADER + nth * 4, value);
        }
        9..13 => {
            let entries = (bytes.len() - MAP) / 4;
            if entries > 0 {
                let at = MAP + 4 * index(random.within(0..entries as u64));
                put(bytes, at, entry(entries, random));
            }
        }
        13 => {
            let more = random.within(0..MOST_MORE) * 4;
            let entries = (bytes.len() - MAP) / 4;
            for _ in 0..more / 4 {
                bytes.extend(entry(entries, random).to_le_bytes());
            }
        }
        14 => {
            let len = random.within(MAP as u64..bytes.len() as u64 + 1);
            bytes.truncate(index(len));
        }
        _ => {
            let at = index(random.within(0..bytes.len() as u64));
            bytes[at] ^= 1 << random.within(0..8);
        }
    }
}

fn some_byte(random: &mut Random) -> u8 {
    random.bytes(1)[0]
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// A number of a block that may be there, or a marker.
fn entry(entries: usize, random: &mut Random) -> u32 {
    let entries = u32::try_from(entries).unwrap_or(u32::MAX);
    match random.within(0..8) {
        0 => u32::MAX,
        1 => u32::MAX - 1,
        2 => entries,
        3 => 1 << random.within(0..32),
        _ => u32::try_from(random.within(0..u64::from(entries) + 2)).unwrap_or(0),
    }
}

/// A value that has broken a parser before.
fn hostile(bytes: &[u8], random: &mut Random) -> u32 {
    let words = (MAP - HEADER) as u64 / 4;
    let at = HEADER + 4 * index(random.within(0..words));
    let other = u32::from_le_bytes(*bytes[at..].first_chunk().expect("it is in the header"));
    let power = 1_u32 << random.within(0..32);
    match random.within(0..9) {
        0 => 0,
        1 => u32::MAX,
        2 => other.wrapping_add(1),
        3 => other.wrapping_sub(1),
        4 => power,
        5 => power.wrapping_sub(1),
        6 => other ^ power,
        7 => u32::try_from(random.within(0..5)).unwrap_or(0),
        _ => other,
    }
}
