//! The guest's memory of the target for requests: four regions of one file.
//!
//! ```text
//! file    | 0      | 1      | 2      | 3      |  32 KiB each
//! guest   | 0      | 1      |  gap | 2      |          ...         | 3      | end
//! ```
//!
//! Where the regions are is the input's choice. A *place* is a position in the file.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};

/// Bytes of a region.
pub(super) const REGION: usize = 32 << 10;
/// Bytes of the file.
pub(super) const ALL: usize = 4 * REGION;

/// What the guest sees and the device, once they have met.
pub(super) struct GuestMemory {
    file: File,
    bytes: Vec<u8>,
    /// Guest address, length, place.
    regions: Vec<[u64; 3]>,
}

impl GuestMemory {
    /// Regions as the input chooses; all of them low if a log must have a bit for every page.
    pub(super) fn new(choice: u8, is_low: bool) -> Self {
        let file: File = memfd_create("guest", MFdFlags::MFD_CLOEXEC)
            .expect("there is memory")
            .into();
        file.set_len(ALL as u64).expect("there is memory");
        let len = REGION as u64;
        let first = [0, 0x1000, 1 << 32, 1 << 33][usize::from(choice & 3)];
        let gap = [0, 0x1000, 0x10, 1 << 32][usize::from(choice >> 2 & 3)];
        // Its end is a number, too, so the last byte of all cannot be had.
        let last = [
            0_u64.wrapping_sub(len),
            0_u64.wrapping_sub(2 * len),
            1 << 62,
            1 << 63,
        ];
        let guest = [
            first,
            first + len,
            first + 2 * len + gap,
            if is_low {
                1 << 34
            } else {
                last[usize::from(choice >> 4 & 3)]
            },
        ];
        // Neighbours for the guest are none in the file.
        let order = [0, 2, 1, 3].map(|nth: u64| nth * len);
        let is_short = choice >> 6 & 1 != 0;
        let regions = guest.into_iter().zip(order).enumerate();
        let regions = regions.map(|(nth, (guest, place))| {
            let less = match nth {
                2 | 3 if is_short => 0x123,
                3 => 1,
                _ => 0,
            };
            [guest, len - less, place]
        });
        Self {
            file,
            bytes: vec![0; ALL],
            regions: regions.collect(),
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn regions(&self) -> &[[u64; 3]] {
        &self.regions
    }

    /// One byte behind the last region that is not the top one's.
    pub(super) fn end(&self) -> u64 {
        self.regions
            .iter()
            .map(|[at, len, _]| at + len)
            .max()
            .expect("there are four")
    }

    /// The guest address of the `linear`th byte of all regions in their order.
    pub(super) fn address(&self, linear: usize) -> u64 {
        let [at, ..] = self.regions[linear / REGION % 4];
        at + (linear % REGION) as u64
    }

    /// All bytes by place.
    pub(super) fn all(&self) -> &[u8] {
        &self.bytes
    }

    /// Where a guest address is.
    pub(super) fn place(&self, at: u64) -> Option<usize> {
        let region = self
            .regions
            .iter()
            .find(|[base, len, _]| (*base..base + len).contains(&at))?;
        usize::try_from(region[2] + (at - region[0])).ok()
    }

    /// Where some bytes are, if all of them are somewhere.
    pub(super) fn runs(&self, at: u64, len: u64) -> Option<Vec<Range<usize>>> {
        let runs = self.present(at, len);
        (super::device::total(&runs) == len).then_some(runs)
    }

    /// Where the first of some bytes are, up to those that are nowhere.
    pub(super) fn present(&self, at: u64, len: u64) -> Vec<Range<usize>> {
        let (mut at, mut left, mut runs) = (at, len, Vec::new());
        while left > 0 {
            let found = self
                .regions
                .iter()
                .find(|[base, len, _]| (*base..base + len).contains(&at));
            let Some([base, len, place]) = found else {
                break;
            };
            let count = left.min(base + len - at);
            let start = usize::try_from(place + (at - base)).expect("it is in the file");
            runs.push(start..start + usize::try_from(count).expect("it is in the file"));
            (at, left) = (at + count, left - count);
        }
        runs
    }

    /// Some bytes, if they are there.
    pub(super) fn bytes<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let runs = self.runs(at, N as u64)?;
        let mut bytes = runs
            .into_iter()
            .flat_map(|run| self.bytes[run].iter().copied());
        Some(std::array::from_fn(|_| bytes.next().expect("there are N")))
    }

    /// Writes as far as there is memory.
    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        let mut done = 0;
        for run in self.present(at, bytes.len() as u64) {
            let len = run.len();
            self.bytes[run].copy_from_slice(&bytes[done..done + len]);
            done += len;
        }
    }

    /// Shows the device what the guest wrote.
    pub(super) fn show(&self) {
        self.file
            .write_all_at(&self.bytes, 0)
            .expect("there is memory");
    }

    /// What is in memory now.
    pub(super) fn look(&self) -> Vec<u8> {
        let mut bytes = vec![0; ALL];
        self.file
            .read_exact_at(&mut bytes, 0)
            .expect("there is memory");
        bytes
    }

    /// The guest sees what the device wrote.
    pub(super) fn see(&mut self, bytes: Vec<u8>) {
        self.bytes = bytes;
    }

    /// A number as it is in memory now.
    pub(super) fn look_at_u16(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        let runs = self.present(at, 2);
        for (byte, place) in bytes.iter_mut().zip(runs.into_iter().flatten()) {
            let byte = std::slice::from_mut(byte);
            self.file
                .read_exact_at(byte, place as u64)
                .expect("there is memory");
        }
        u16::from_le_bytes(bytes)
    }
}
