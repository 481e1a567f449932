//! The guest's memory as this process sees it: regions that the front end shares, mapped and checked.
//!
//! A set of regions is immutable. A change makes a new [`Memory`], which the workers take over by an
//! acknowledged command; a region is unmapped when the last [`Memory`] that holds it goes away.
//!
//! Invariants of a [`Memory`]:
//!
//! - **M1** Regions are not empty and do not overlap, neither in guest-physical nor in front-end addresses, and no region's
//!   end overflows.
//! - **M2** A region's file was large enough for it when it was mapped. A front end that shrinks the file later ends its
//!   own session, and nothing else (`fault`): a region that is lost ([`Region::is_lost`]) may read as zeros.
//!
//! Source: vhost-user protocol, "Memory region description".

use std::fs::File;
use std::io;
use std::os::linux::fs::MetadataExt;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize, MemoryRegionAddress, MmapRegion, VolatileMemory,
    VolatileSlice,
};

use crate::fault::{Account, TooMany, Watch};

/// Most regions at once: what vhost in the kernel allows, so front ends already live with it.
pub(crate) const MAX_REGIONS: usize = 509;

/// All of the guest's memory, by guest-physical address.
pub(crate) type Memory = GuestRegionCollection<Region>;

/// One shared region.
///
/// Our own type rather than `GuestRegionMmap`, because a region may begin anywhere in its file, and a
/// mapping only at a multiple of the (huge) page size.
#[derive(Debug)]
pub(crate) struct Region {
    /// Ends before the mapping does.
    watch: Watch,
    mapping: MmapRegion<()>,
    /// Bytes of the mapping before the region.
    skip: usize,
    len: usize,
    guest_base: GuestAddress,
    front_end_base: u64,
}

/// Why a region cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    /// More than [`MAX_REGIONS`].
    #[error("the front end shares {count} memory regions, at most {MAX_REGIONS} are supported")]
    TooMany { count: usize },
    /// M1.
    #[error("the memory region of {len:#x} bytes at {base:#x} wraps around or is too large to map")]
    Overflow { base: u64, len: u64 },
    /// Nothing could be said of its last byte.
    #[error("the memory region at {base:#x} is empty")]
    Empty { base: u64 },
    /// M1.
    #[error("the memory region of {len:#x} bytes at {base:#x} overlaps another one")]
    Overlap { base: u64, len: u64 },
    /// M2.
    #[error("the memory region at {base:#x} ends at byte {end} of a file of {file_len} bytes")]
    FileTooShort { base: u64, end: u64, file_len: u64 },
    /// REM_MEM_REG names what was never added.
    #[error("there is no memory region of {len:#x} bytes at {base:#x}")]
    NoSuchRegion { base: u64, len: u64 },
    /// The kernel refused.
    #[error("cannot map the memory region at {base:#x}")]
    Map {
        base: u64,
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// Its front end has its share.
    #[error("the memory region at {base:#x} cannot be watched")]
    Watch {
        base: u64,
        #[source]
        source: TooMany,
    },
    /// The kernel refused.
    #[error("cannot examine the file of the memory region at {base:#x}")]
    Examine {
        base: u64,
        #[source]
        source: io::Error,
    },
}

impl Region {
    /// Maps a region that the front end described, in the session that has this account.
    pub(crate) fn map(
        region: &VhostUserMemoryRegion,
        file: File,
        account: &Account,
    ) -> Result<Self, MemoryError> {
        let VhostUserMemoryRegion {
            guest_phys_addr,
            memory_size,
            user_addr,
            mmap_offset,
        } = *region;
        let overflow = MemoryError::Overflow {
            base: guest_phys_addr,
            len: memory_size,
        };
        if memory_size == 0 {
            let base = guest_phys_addr;
            return Err(MemoryError::Empty { base });
        }
        let ends = [guest_phys_addr, user_addr, mmap_offset].map(|at| at.checked_add(memory_size));
        let ([Some(_), Some(_), Some(end)], Ok(len)) = (ends, usize::try_from(memory_size)) else {
            return Err(overflow);
        };
        let metadata = file.metadata().map_err(|source| MemoryError::Examine {
            base: guest_phys_addr,
            source,
        })?;
        if metadata.st_size() < end {
            let file_len = metadata.st_size();
            return Err(MemoryError::FileTooShort {
                base: guest_phys_addr,
                end,
                file_len,
            });
        }
        // On hugetlbfs the block size is the page size, and a mapping must begin and end at multiples of it. What
        // is mapped beyond the region is never touched.
        let page = metadata.st_blksize().max(4096);
        let skip = mmap_offset % page;
        let map_len = (memory_size + skip).checked_next_multiple_of(page);
        let map_len = map_len.map(usize::try_from);
        let sizes = (map_len, usize::try_from(page), usize::try_from(skip));
        let (Some(Ok(map_len)), Ok(page_len), Ok(skip_len)) = sizes else {
            return Err(overflow);
        };
        let mapping = MmapRegion::from_file(FileOffset::new(file, mmap_offset - skip), map_len)
            .map_err(|source| MemoryError::Map {
                base: guest_phys_addr,
                source,
            })?;
        let start = mapping.as_ptr() as usize;
        let watch = Watch::over(start..start + map_len, page_len, account);
        Ok(Self {
            watch: watch.map_err(|source| MemoryError::Watch {
                base: guest_phys_addr,
                source,
            })?,
            mapping,
            skip: skip_len,
            len,
            guest_base: GuestAddress(guest_phys_addr),
            front_end_base: user_addr,
        })
    }

    /// Whether this memory, or other memory of the same session, is not what it was: zeros may have taken its place.
    pub(crate) fn is_lost(&self) -> bool {
        self.watch.account().is_lost()
    }

    /// How many bytes the file has, if the region reaches beyond them.
    pub(crate) fn cut_at(&self) -> Option<u64> {
        let file = self.mapping.file_offset()?;
        let end = file.start() + (self.skip + self.len) as u64;
        let file_len = file.file().metadata().ok()?.st_size();
        (file_len < end).then_some(file_len)
    }

    fn overlaps(&self, other: &Self) -> bool {
        let apart = |a: u64, b: u64| {
            a.abs_diff(b)
                >= if a < b {
                    self.len as u64
                } else {
                    other.len as u64
                }
        };
        !(apart(self.guest_base.0, other.guest_base.0)
            && apart(self.front_end_base, other.front_end_base))
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.len as GuestUsize
    }

    fn start_addr(&self) -> GuestAddress {
        self.guest_base
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> AccessResult<VolatileSlice<'_, BS<'_, ()>>> {
        let outside = || vm_memory::GuestMemoryError::InvalidBackendAddress;
        let offset = usize::try_from(offset.0).map_err(|_| outside())?;
        let end = offset.checked_add(count).ok_or_else(outside)?;
        if end > self.len {
            return Err(outside());
        }
        Ok(VolatileMemory::get_slice(
            &self.mapping,
            self.skip + offset,
            count,
        )?)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// Memory of exactly these regions.
pub(crate) fn from_regions(regions: Vec<Arc<Region>>) -> Result<Memory, MemoryError> {
    if regions.len() > MAX_REGIONS {
        return Err(MemoryError::TooMany {
            count: regions.len(),
        });
    }
    let mut regions = regions;
    regions.sort_by_key(|region| region.guest_base);
    for (index, region) in regions.iter().enumerate() {
        if regions[..index]
            .iter()
            .any(|before| before.overlaps(region))
        {
            let (base, len) = (region.guest_base.0, region.len as u64);
            return Err(MemoryError::Overlap { base, len });
        }
    }
    if regions.is_empty() {
        return Ok(Memory::new());
    }
    Memory::from_arc_regions(regions).map_err(|_| MemoryError::Overlap { base: 0, len: 0 })
}

/// `memory` and one more region.
pub(crate) fn with_region(memory: &Memory, region: Region) -> Result<Memory, MemoryError> {
    if memory.num_regions() >= MAX_REGIONS {
        return Err(MemoryError::TooMany {
            count: memory.num_regions() + 1,
        });
    }
    let (base, len) = (region.guest_base.0, region.len as u64);
    if memory.iter().any(|before| before.overlaps(&region)) {
        return Err(MemoryError::Overlap { base, len });
    }
    memory
        .insert_region(Arc::new(region))
        .map_err(|_| MemoryError::Overlap { base, len })
}

/// `memory` without the region that the front end describes.
pub(crate) fn without_region(
    memory: &Memory,
    region: &VhostUserMemoryRegion,
) -> Result<Memory, MemoryError> {
    let (base, len) = (region.guest_phys_addr, region.memory_size);
    match memory.find_region(GuestAddress(base)) {
        Some(found) if found.front_end_base == region.user_addr => memory
            .remove_region(GuestAddress(base), len)
            .map(|(rest, _)| rest)
            .map_err(|_| MemoryError::NoSuchRegion { base, len }),
        _ => Err(MemoryError::NoSuchRegion { base, len }),
    }
}

/// Whether zeros may have taken the place of what the front end shares.
pub(crate) fn is_lost(memory: &Memory) -> bool {
    // One region speaks for all.
    memory.iter().next().is_some_and(Region::is_lost)
}

/// Whether an error says that there is no memory to move data from or to.
pub(crate) fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// Has the front end's session look whether what it shares is still there.
pub(crate) fn suspect(memory: &Memory) {
    if let Some(region) = memory.iter().next() {
        region.watch.account().suspect();
    }
}

/// Where the last region ends.
pub(crate) fn end(memory: &Memory) -> u64 {
    let end = |region: &Region| region.guest_base.0 + region.len as u64;
    memory.iter().map(end).max().unwrap_or(0)
}

/// Where an address of the front end's own address space lies in the guest's memory.
pub(crate) fn from_front_end(memory: &Memory, address: u64) -> Option<GuestAddress> {
    memory.iter().find_map(|region| {
        let offset = address.checked_sub(region.front_end_base)?;
        (offset < region.len as u64).then(|| GuestAddress(region.guest_base.0 + offset))
    })
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn region(guest: u64, len: u64, front_end: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, len, front_end, offset)
    }

    fn own(region: &VhostUserMemoryRegion, file: File) -> Result<Region, MemoryError> {
        Region::map(region, file, &Account::default())
    }

    fn map(guest: u64, len: u64, front_end: u64) -> Arc<Region> {
        let region = region(guest, len, front_end, 0);
        Arc::new(own(&region, file(len)).unwrap())
    }

    #[test]
    fn a_region_may_begin_anywhere_in_its_file() {
        use std::os::unix::fs::FileExt;
        let file = file(0x3000);
        file.write_all_at(b"here", 0x1234).unwrap();
        let region = own(&region(0x8000, 0x1000, 0, 0x1234), file).unwrap();
        let memory = from_regions(vec![Arc::new(region)]).unwrap();
        let mut found = [0; 4];
        memory.read_slice(&mut found, GuestAddress(0x8000)).unwrap();
        assert_eq!(&found, b"here");
        assert!(memory.read_slice(&mut found, GuestAddress(0x8ffd)).is_err());
        assert!(memory.read_slice(&mut found, GuestAddress(0x7fff)).is_err());
        // What is mapped beyond the region stays out of reach, even for those who do not ask for its length.
        let region = memory.iter().next().unwrap();
        assert!(region.get_slice(MemoryRegionAddress(0xfff), 2).is_err());
        assert!(region.get_slice(MemoryRegionAddress(u64::MAX), 2).is_err());
    }

    #[test]
    fn a_region_longer_than_its_file_is_refused() {
        let refused = own(&region(0, 0x2000, 0, 0), file(0x1000));
        assert!(matches!(refused, Err(MemoryError::FileTooShort { .. })));
        let refused = own(&region(0, 0x1000, 0, 1), file(0x1000));
        assert!(matches!(refused, Err(MemoryError::FileTooShort { .. })));
    }

    #[test]
    fn an_empty_region_is_refused() {
        // Its mapping is not empty, since it begins within a page.
        let refused = own(&region(0, 0, 0, 1), file(0x1000));
        assert!(matches!(refused, Err(MemoryError::Empty { .. })));
    }

    #[test]
    fn a_region_that_wraps_around_is_refused() {
        for bad in [
            region(u64::MAX - 10, 0x1000, 0, 0),
            region(0, 0x1000, u64::MAX - 10, 0),
            region(0, 0x1000, 0, u64::MAX - 10),
        ] {
            let refused = own(&bad, file(0x1000));
            assert!(matches!(refused, Err(MemoryError::Overflow { .. })));
        }
    }

    #[test]
    fn regions_that_overlap_are_refused() {
        let guest = vec![map(0, 0x2000, 0x10000), map(0x1000, 0x1000, 0x20000)];
        assert!(matches!(
            from_regions(guest),
            Err(MemoryError::Overlap { .. })
        ));
        let front_end = vec![map(0, 0x2000, 0x10000), map(0x2000, 0x1000, 0x11000)];
        assert!(matches!(
            from_regions(front_end),
            Err(MemoryError::Overlap { .. })
        ));
        let memory = from_regions(vec![map(0, 0x2000, 0x10000)]).unwrap();
        // Overlaps among front-end addresses are nobody's business but ours.
        for (guest, front_end) in [(0x1000, 0), (0x2000, 0x11fff)] {
            let other = own(&region(guest, 0x1000, front_end, 0), file(0x1000)).unwrap();
            let refused = with_region(&memory, other);
            assert!(matches!(refused, Err(MemoryError::Overlap { .. })));
        }
    }

    #[test]
    fn regions_come_and_go_and_translate() {
        let memory = from_regions(vec![map(0x2000, 0x1000, 0x10000)]).unwrap();
        let more = own(&region(0, 0x2000, 0x20000, 0), file(0x2000)).unwrap();
        let memory = with_region(&memory, more).unwrap();
        assert_eq!(from_front_end(&memory, 0x10010), Some(GuestAddress(0x2010)));
        assert_eq!(from_front_end(&memory, 0x21fff), Some(GuestAddress(0x1fff)));
        assert_eq!(from_front_end(&memory, 0x22000), None);
        assert!(without_region(&memory, &region(0, 0x1000, 0x20000, 0)).is_err());
        assert!(without_region(&memory, &region(0, 0x2000, 0x30000, 0)).is_err());
        let memory = without_region(&memory, &region(0, 0x2000, 0x20000, 0)).unwrap();
        assert_eq!(from_front_end(&memory, 0x20000), None);
    }

    #[test]
    fn no_more_regions_are_taken_than_are_offered() {
        const LEN: u64 = 0x1000;
        let (file, account) = (file(LEN), Account::default());
        let nth = |nth: u64| {
            let region = region(nth * LEN, LEN, nth * LEN, 0);
            Region::map(&region, file.try_clone().unwrap(), &account).unwrap()
        };
        let mut memory = Memory::new();
        for one in 0..MAX_REGIONS as u64 {
            memory = with_region(&memory, nth(one)).unwrap();
        }
        let refused = with_region(&memory, nth(MAX_REGIONS as u64));
        assert!(matches!(refused, Err(MemoryError::TooMany { .. })));
        let all = (0..=MAX_REGIONS as u64).map(nth).map(Arc::new);
        let refused = from_regions(all.collect());
        assert!(matches!(refused, Err(MemoryError::TooMany { .. })));
    }

    /// What is at the beginning of the first region; touches it.
    fn touch(memory: &Memory) -> [u8; 4] {
        memory
            .read_obj(memory.iter().next().unwrap().start_addr())
            .unwrap()
    }

    #[test]
    fn memory_that_is_cut_is_lost_to_its_own_session_and_to_no_other() {
        use std::os::unix::fs::FileExt;
        let bell = crate::fault::catch().unwrap();
        let (cut, whole) = (Account::default(), Account::default());
        let map = |guest, account: &Account| {
            let file = file(0x2000);
            file.write_all_at(b"here", 0).unwrap();
            let own = file.try_clone().unwrap();
            let region = Region::map(&region(guest, 0x2000, guest, 0), own, account);
            (file, Arc::new(region.unwrap()))
        };
        let (file, first) = map(0, &cut);
        let (_file, second) = map(0x2000, &cut);
        let (_other, other) = map(0, &whole);
        let sound = from_regions(vec![Arc::clone(&second)]).unwrap();
        let lost = from_regions(vec![first, second]).unwrap();
        let other = from_regions(vec![other]).unwrap();
        assert_eq!(touch(&lost), *b"here");
        assert!(!is_lost(&lost));

        file.set_len(0).unwrap();
        assert_eq!(touch(&lost), [0; 4]);
        assert!(is_lost(&lost) && is_lost(&sound));
        assert!(cut.take_suspicion());
        assert!(bell.read().is_ok());
        // What such a session maps later is as good as gone, so that nobody who has old memory too takes it for whole.
        assert!(is_lost(&from_regions(vec![map(0, &cut).1]).unwrap()));

        assert!(!is_lost(&other) && !whole.is_lost());
        assert!(!whole.take_suspicion());
        assert_eq!(touch(&other), *b"here");
        // Whoever comes next to the same disk has an account without a mark.
        assert!(!is_lost(
            &from_regions(vec![map(0, &Account::default()).1]).unwrap()
        ));
    }

    #[test]
    fn a_suspicion_is_the_session_s_whose_memory_it_is() {
        let (own, other) = (Account::default(), Account::default());
        let region = Region::map(&region(0, 0x1000, 0, 0), file(0x1000), &own);
        suspect(&from_regions(vec![Arc::new(region.unwrap())]).unwrap());
        suspect(&Memory::new());
        assert!(own.take_suspicion() && !other.take_suspicion());
        assert!(!own.is_lost());
        assert!(is_missing(&io::Error::from_raw_os_error(libc::EFAULT)));
        assert!(!is_missing(&io::Error::from_raw_os_error(libc::EIO)));
    }
}
