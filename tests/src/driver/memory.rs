//! Guest memory: memfd-backed regions, and an allocator for buffers in them.
//!
//! Not a guest: nothing here knows descriptors or rings. Every region has its own memfd, so a range that
//! crosses the border of two neighbouring regions is contiguous for the guest and nowhere else.
//!
//! - A [`Buffer`] is the only owner of its range until it is dropped.
//! - [`Memory::allocate`] never crosses a border; [`Memory::claim`] may.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, RwLock};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap,
};

/// Where a region lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub at: u64,
    /// Length in bytes.
    pub len_bytes: u64,
    /// Where in its memfd the region begins, a multiple of the page size.
    pub file_offset: u64,
}

impl Region {
    /// A region at the start of its memfd.
    #[must_use]
    pub const fn new(at: u64, len_bytes: u64) -> Self {
        Self {
            at,
            len_bytes,
            file_offset: 0,
        }
    }

    fn range(self) -> Range<u64> {
        self.at..self.at + self.len_bytes
    }
}

/// The memory that the driver and the device share.
#[derive(Debug)]
pub struct Memory {
    map: RwLock<GuestMemoryMmap>,
    regions: Mutex<Vec<Region>>,
    /// Start to end of each free range; none crosses a border.
    free: Mutex<BTreeMap<u64, u64>>,
}

impl Memory {
    /// Makes the regions, which must be in order of their addresses.
    #[must_use]
    pub fn new(regions: &[Region]) -> Arc<Self> {
        let mapped = regions.iter().map(|&region| map_region(region)).collect();
        let map = GuestMemoryMmap::from_regions(mapped).expect("the regions are in order");
        let free = regions
            .iter()
            .map(|region| (region.range().start, region.range().end))
            .collect();
        Arc::new(Self {
            map: RwLock::new(map),
            regions: Mutex::new(regions.to_vec()),
            free: Mutex::new(free),
        })
    }

    /// Adds a region to the driver's side; the device learns of it by another message.
    pub fn add(&self, region: Region) {
        let mut map = self.map.write().expect("no test thread panicked here");
        *map = map
            .insert_region(Arc::new(map_region(region)))
            .expect("the new region overlaps none");
        self.regions.lock().expect("no panic").push(region);
        let mut free = self.free.lock().expect("no panic");
        free.insert(region.range().start, region.range().end);
    }

    /// Takes a region away from the driver's side. All of it must be free.
    pub fn remove(&self, region: Region) {
        let range = region.range();
        let end = self
            .free
            .lock()
            .expect("no panic")
            .remove(&range.start)
            .expect("the region is free");
        assert_eq!(end, range.end, "a buffer in the region is still in use");
        let mut map = self.map.write().expect("no panic");
        let (rest, _) = map
            .remove_region(GuestAddress(region.at), region.len_bytes)
            .expect("the region exists");
        *map = rest;
        self.regions
            .lock()
            .expect("no panic")
            .retain(|&r| r != region);
    }

    /// What the vhost-user messages say about every region.
    #[must_use]
    pub fn messages(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let map = self.map.read().expect("no panic");
        map.iter()
            .map(|region| {
                VhostUserMemoryRegionInfo::from_guest_region(region).expect("it has a memfd")
            })
            .collect()
    }

    /// What the vhost-user messages say about one region.
    ///
    /// # Panics
    /// If there is no such region.
    #[must_use]
    pub fn message(&self, region: Region) -> VhostUserMemoryRegionInfo {
        self.messages()
            .into_iter()
            .find(|message| message.guest_phys_addr == region.at)
            .expect("the region exists")
    }

    /// Cuts the file of a region. Whoever touches what is gone is killed.
    ///
    /// # Panics
    /// If there is no such region.
    pub fn cut(&self, region: Region, len_bytes: u64) {
        let map = self.map.read().expect("no panic");
        let found = map.find_region(GuestAddress(region.at));
        let file = found.and_then(|region| region.file_offset());
        let file = file.expect("the region exists and has a memfd").file();
        file.set_len(len_bytes).expect("the memfd is ours");
    }

    /// Takes `len_bytes` bytes that lie in one region.
    ///
    /// # Panics
    /// If there is no room.
    #[must_use]
    pub fn allocate(self: &Arc<Self>, len_bytes: u64, align: u64) -> Buffer {
        let mut free = self.free.lock().expect("no panic");
        let len = len_bytes.max(1).next_multiple_of(align); // so that no splinters are left over
        let (start, end, at) = free
            .iter()
            .find_map(|(&start, &end)| {
                let at = start.next_multiple_of(align);
                (at.checked_add(len)? <= end).then_some((start, end, at))
            })
            .unwrap_or_else(|| panic!("no {len} free bytes are left in guest memory"));
        take(&mut free, start..end, at..at + len);
        self.buffer(at, len)
    }

    /// Takes exactly the given range, which may cross borders.
    ///
    /// # Panics
    /// If any of it is in use or is no memory.
    #[must_use]
    pub fn claim(self: &Arc<Self>, at: u64, len_bytes: u64) -> Buffer {
        let mut free = self.free.lock().expect("no panic");
        for part in self.cut_at_borders(at..at + len_bytes) {
            let (&start, &end) = free
                .range(..=part.start)
                .next_back()
                .expect("the range is memory");
            assert!(part.end <= end, "{part:x?} is in use or is no memory");
            take(&mut free, start..end, part);
        }
        self.buffer(at, len_bytes)
    }

    fn buffer(self: &Arc<Self>, at: u64, len_bytes: u64) -> Buffer {
        Buffer {
            memory: Arc::clone(self),
            at,
            len_bytes,
        }
    }

    fn cut_at_borders(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let regions = self.regions.lock().expect("no panic");
        regions
            .iter()
            .map(|region| {
                let region = region.range();
                region.start.max(range.start)..region.end.min(range.end)
            })
            .filter(|part| !part.is_empty())
            .collect()
    }

    fn release(&self, range: Range<u64>) {
        let parts = self.cut_at_borders(range);
        let borders: Vec<u64> = {
            let regions = self.regions.lock().expect("no panic");
            regions.iter().map(|region| region.at).collect()
        };
        let mut free = self.free.lock().expect("no panic");
        for mut part in parts {
            if let Some((&before, &end)) = free.range(..part.start).next_back()
                && end == part.start
                && !borders.contains(&part.start)
            {
                free.remove(&before);
                part.start = before;
            }
            if !borders.contains(&part.end)
                && let Some(end) = free.remove(&part.end)
            {
                part.end = end;
            }
            free.insert(part.start, part.end);
        }
    }

    /// The address in this process, which is what ring addresses are given in.
    #[must_use]
    pub fn user_address(&self, at: u64) -> u64 {
        let map = self.map.read().expect("no panic");
        map.get_host_address(GuestAddress(at))
            .expect("the address is memory") as u64
    }

    /// Writes bytes.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        let map = self.map.read().expect("no panic");
        map.write_slice(bytes, GuestAddress(at))
            .expect("the range is memory");
    }

    /// Reads bytes.
    #[must_use]
    pub fn read(&self, at: u64, len_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        let map = self.map.read().expect("no panic");
        map.read_slice(&mut bytes, GuestAddress(at))
            .expect("the range is memory");
        bytes
    }

    /// Reads a little-endian word that the device may be writing.
    #[must_use]
    pub fn load_u16(&self, at: u64) -> u16 {
        let map = self.map.read().expect("no panic");
        u16::from_le(
            map.load(GuestAddress(at), Ordering::Acquire)
                .expect("the address is memory"),
        )
    }

    /// Writes a little-endian word that the device may be reading.
    pub fn store_u16(&self, at: u64, value: u16) {
        let map = self.map.read().expect("no panic");
        map.store(value.to_le(), GuestAddress(at), Ordering::Release)
            .expect("the address is memory");
    }
}

/// A range of guest memory that is given back when dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Arc<Memory>,
    at: u64,
    len_bytes: u64,
}

impl Buffer {
    /// Guest physical address.
    #[must_use]
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Writes from the start of the buffer.
    pub fn write(&self, bytes: &[u8]) {
        assert!(
            bytes.len() as u64 <= self.len_bytes,
            "the buffer is smaller"
        );
        self.memory.write(self.at, bytes);
    }

    /// Reads from the start of the buffer.
    #[must_use]
    pub fn read(&self, len_bytes: usize) -> Vec<u8> {
        assert!(len_bytes as u64 <= self.len_bytes, "the buffer is smaller");
        self.memory.read(self.at, len_bytes)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.memory.release(self.at..self.at + self.len_bytes);
    }
}

fn map_region(region: Region) -> GuestRegionMmap {
    let memfd = memfd_create("guest-memory", MFdFlags::MFD_CLOEXEC).expect("a memfd can be made");
    let file = File::from(memfd);
    file.set_len(region.file_offset + region.len_bytes)
        .expect("the memfd can be lengthened");
    GuestRegionMmap::from_range(
        GuestAddress(region.at),
        usize::try_from(region.len_bytes).expect("64-bit hosts only"),
        Some(FileOffset::new(file, region.file_offset)),
    )
    .expect("the memfd can be mapped")
}

fn take(free: &mut BTreeMap<u64, u64>, from: Range<u64>, part: Range<u64>) {
    free.remove(&from.start);
    if from.start < part.start {
        free.insert(from.start, part.start);
    }
    if part.end < from.end {
        free.insert(part.end, from.end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;

    #[test]
    fn a_dropped_buffer_is_free_again_and_free_ranges_merge() {
        let memory = Memory::new(&[Region::new(0, 4 * PAGE)]);
        let all: Vec<Buffer> = (0..4).map(|_| memory.allocate(PAGE, PAGE)).collect();
        drop(all);
        assert_eq!(memory.allocate(4 * PAGE, PAGE).at(), 0);
    }

    #[test]
    fn an_allocation_never_crosses_a_border_but_a_claim_may() {
        let memory = Memory::new(&[Region::new(0, PAGE), Region::new(PAGE, 4 * PAGE)]);
        assert_eq!(memory.allocate(2 * PAGE, 1).at(), PAGE);
        let across = memory.claim(PAGE - 8, 16);
        across.write(b"0123456789abcdef");
        assert_eq!(across.read(16), b"0123456789abcdef");
        drop(across);
        assert_eq!(memory.allocate(4 * PAGE, 1).at(), PAGE);
    }
}
