//! Small objects in the guest's memory: descriptors, ring elements, status bytes.
//!
//! Nearly every one lies in one region, and is then found by one look at the regions; `vm-memory`'s own `Bytes` cuts every
//! access into slices first, which costs several times as much. An object across a border of regions goes that way.
//!
//! Not here: data (`ring`), and what objects mean (`chain`, `request`, `queue`).
//!
//! - **R3** An object is read once; the guest may change it while that happens, and never after.

use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileMemory,
};

use crate::memory::Memory;

/// Reads an object.
pub(crate) fn read<T: ByteValued>(
    memory: &Memory,
    at: GuestAddress,
) -> Result<T, GuestMemoryError> {
    if let Ok(slice) = memory.get_slice(at, size_of::<T>())
        && let Ok(place) = slice.get_ref::<T>(0)
    {
        return Ok(place.load());
    }
    memory.read_obj(at)
}

/// Writes an object.
pub(crate) fn write<T: ByteValued>(
    memory: &Memory,
    at: GuestAddress,
    value: T,
) -> Result<(), GuestMemoryError> {
    if let Ok(slice) = memory.get_slice(at, size_of::<T>())
        && let Ok(place) = slice.get_ref::<T>(0)
    {
        place.store(value);
        return Ok(());
    }
    memory.write_obj(value, at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::tests::memory;

    #[test]
    fn objects_are_found_within_regions_and_across_their_border() {
        let memory = memory();
        let border = 0x8_0000;
        for at in [
            0,
            0x1001,
            border - 8,
            border - 4,
            border - 1,
            border,
            2 * border - 8,
        ] {
            let at = GuestAddress(at);
            write(&memory, at, 0x0123_4567_89ab_cdef_u64).unwrap();
            assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0x0123_4567_89ab_cdef);
            assert_eq!(read::<u64>(&memory, at).unwrap(), 0x0123_4567_89ab_cdef);
            write(&memory, at, 0_u64).unwrap();
            assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
        }
        for at in [2 * border - 7, 2 * border, u64::MAX - 3] {
            assert!(read::<u64>(&memory, GuestAddress(at)).is_err());
            assert!(write(&memory, GuestAddress(at), 0_u64).is_err());
        }
    }
}
