//! The bytes of the format: field layout, markers, sizes.
//!
//! [`RawHeader`] is what the file says, right or wrong; nothing here judges it.
//! [`crate::header::Header`] exists only if all of it makes sense.
//!
//! Source: VirtualBox `VDICore.h` (`VDIPREHEADER`, `VDIHEADER1PLUS`,
//! `VDIDISKGEOMETRY`, `VDIIMAGEBLOCKPOINTER`), checked against images that
//! VirtualBox 7.2 and QEMU 10.0 wrote.

use std::io;

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::storage::Storage;
use crate::units::FileOffset;

/// `VDI_IMAGE_SIGNATURE`.
pub const SIGNATURE: u32 = 0xBEDA_107F;
/// `VDI_IMAGE_VERSION`: 1.1, the only version written today.
pub const VERSION_1_1: u32 = 0x0001_0001;
/// The version word of 2006's format, which has another header.
pub const VERSION_0: u32 = 0x0000_0002;

/// Where the header begins, right behind the pre-header.
pub const HEADER_START: u32 = 0x48;
/// `header_size` of the short header, which has no LCHS geometry.
pub const HEADER_SIZE_SHORT: u32 = 0x180;
/// `header_size` of the long header ("1 plus").
pub const HEADER_SIZE_LONG: u32 = 0x190;
/// Where the shortest header of version 1 ends, and the first place for a map.
pub const HEADER_END_SHORT: u32 = HEADER_START + HEADER_SIZE_SHORT;

/// `VDI_IMAGE_BLOCK_FREE`: nothing here; in a child the parent shows through.
pub const ENTRY_FREE: u32 = 0xFFFF_FFFF;
/// `VDI_IMAGE_BLOCK_ZERO`: zeros without storage; in a child it hides the parent.
pub const ENTRY_ZERO: u32 = 0xFFFF_FFFE;
/// Bytes of a map entry.
pub const ENTRY_BYTES: u64 = 4;

/// `VDI_IMAGE_TYPE_NORMAL`: dynamic.
pub const TYPE_DYNAMIC: u32 = 1;
/// `VDI_IMAGE_TYPE_FIXED`.
pub const TYPE_FIXED: u32 = 2;
/// `VDI_IMAGE_TYPE_UNDO`: never written by a known release; a base like any other.
pub const TYPE_UNDO: u32 = 3;
/// `VDI_IMAGE_TYPE_DIFF`: differencing.
pub const TYPE_DIFFERENCING: u32 = 4;

/// The bits of `image_flags` that VirtualBox lets pass: it shifts the word left by
/// 8, so that bits 24-31 fall out, and knows what then are bits 8, 16 and 17.
pub const FLAGS_ACCEPTED: u32 = 0xFF00_0301;

/// Where `blocks_allocated` (`cBlocksAllocated`) lies in a header of version 1.
pub const AT_BLOCKS_ALLOCATED: FileOffset = FileOffset(0x184);
/// Where `uuid_modify` (`uuidModify`) lies in a header of version 1.
pub const AT_UUID_MODIFY: FileOffset = FileOffset(0x198);

/// A UUID as the file has it: the first three groups little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(transparent)]
pub struct RawUuid([u8; 16]);

impl RawUuid {
    /// The UUID in the order that its text form has.
    pub const fn get(self) -> Uuid {
        Uuid::from_bytes_le(self.0)
    }
}

impl From<Uuid> for RawUuid {
    fn from(uuid: Uuid) -> Self {
        Self(uuid.to_bytes_le())
    }
}

/// The pre-header and the longest header known of version 1, as they are in the file.
///
/// The last four fields exist only where `header_size` says so; in an image
/// with the short header they are whatever lies there.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct RawHeader {
    /// `szFileInfo`: for the eye only.
    pub text: [u8; 64],
    /// `u32Signature`.
    pub signature: U32,
    /// `u32Version`: major in the high, minor in the low half.
    pub version: U32,
    /// `cbHeader`: bytes from 0x48 on.
    pub header_size: U32,
    /// `u32Type`.
    pub image_type: U32,
    /// `fFlags`.
    pub image_flags: U32,
    /// `szComment`: UTF-8, may lack its NUL.
    pub comment: [u8; 256],
    /// `offBlocks`: where the map begins.
    pub offset_bmap: U32,
    /// `offData`: where file block 0 begins.
    pub offset_data: U32,
    /// `LegacyGeometry`: cylinders, heads, sectors; unused.
    pub legacy_geometry: [U32; 3],
    /// `LegacyGeometry.cbSector`: VirtualBox never reads it, QEMU insists on 512.
    pub legacy_sector_size: U32,
    /// `u32Dummy`: once the BIOS translation mode.
    pub unused: U32,
    /// `cbDisk`: virtual size in bytes.
    pub disk_size: U64,
    /// `cbBlock`: bytes of disk contents in a block.
    pub block_size: U32,
    /// `cbBlockExtra`: private bytes before each block.
    pub block_extra: U32,
    /// `cBlocks`: entries in the map.
    pub blocks_in_image: U32,
    /// `cBlocksAllocated`: blocks in use, and the number that others give to the next.
    pub blocks_allocated: U32,
    /// `uuidCreate`.
    pub uuid_image: RawUuid,
    /// `uuidModify`.
    pub uuid_modify: RawUuid,
    /// `uuidLinkage`: the parent's `uuid_image`.
    pub uuid_parent: RawUuid,
    /// `uuidParentModify`: the parent's `uuid_modify`.
    pub uuid_parent_modify: RawUuid,
    /// `LCHSGeometry`: cylinders, heads, sectors; long header only.
    pub lchs_geometry: [U32; 3],
    /// `LCHSGeometry.cbSector`; long header only.
    pub lchs_sector_size: U32,
}

const _: () = assert!(size_of::<RawHeader>() == (HEADER_START + HEADER_SIZE_LONG) as usize);
const _: () =
    assert!(std::mem::offset_of!(RawHeader, blocks_allocated) as u64 == AT_BLOCKS_ALLOCATED.0);
const _: () = assert!(std::mem::offset_of!(RawHeader, uuid_modify) as u64 == AT_UUID_MODIFY.0);

impl RawHeader {
    /// Reads what a file has at its start; behind the end of a short file are zeros.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(storage: &dyn Storage) -> io::Result<Self> {
        let mut raw = Self::new_zeroed();
        let bytes = raw.as_mut_bytes();
        let len = usize::try_from(storage.len_bytes()?)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        storage.read_exact_at(&mut bytes[..len], FileOffset(0))?;
        Ok(raw)
    }

    /// Whether the file begins as a VDI does.
    pub const fn is_vdi(&self) -> bool {
        self.signature.get() == SIGNATURE
    }

    /// Whether the LCHS fields belong to the header.
    pub const fn has_lchs(&self) -> bool {
        self.header_size.get() >= HEADER_SIZE_LONG
    }

    /// The comment up to its NUL, or all of it; what is not UTF-8 is replaced.
    pub fn comment(&self) -> String {
        let end = self
            .comment
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(self.comment.len());
        String::from_utf8_lossy(&self.comment[..end]).into_owned()
    }

    /// Where the map ends, if the fields are to be believed.
    pub const fn map_end(&self) -> u64 {
        self.offset_bmap.get() as u64 + self.blocks_in_image.get() as u64 * ENTRY_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_stored_in_mixed_endian_order() {
        let uuid: Uuid = "706c398a-86ca-49e3-9a30-3cbc9073cd11".parse().unwrap();
        let stored = [
            0x8A, 0x39, 0x6C, 0x70, 0xCA, 0x86, 0xE3, 0x49, 0x9A, 0x30, 0x3C, 0xBC, 0x90, 0x73,
            0xCD, 0x11,
        ];
        assert_eq!(RawUuid::from(uuid), RawUuid(stored));
        assert_eq!(RawUuid(stored).get(), uuid);
    }

    #[test]
    fn a_comment_without_nul_ends_with_its_field() {
        let mut raw = RawHeader::new_zeroed();
        raw.comment = [b'x'; 256];
        assert_eq!(raw.comment().len(), 256);
        raw.comment[3] = 0;
        assert_eq!(raw.comment(), "xxx");
    }
}
