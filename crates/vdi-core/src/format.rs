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

/// Where version 0 has its map: right behind its header.
pub const VERSION_0_MAP: u32 = 0x1A4;

/// Where the fields lie that change while an image is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// `cBlocksAllocated`.
    pub blocks_allocated: FileOffset,
    /// `uuidModify`.
    pub uuid_modify: FileOffset,
}

const PLACES_1: Places = Places {
    blocks_allocated: FileOffset(0x184),
    uuid_modify: FileOffset(0x198),
};
const PLACES_0: Places = Places {
    blocks_allocated: FileOffset(0x170),
    uuid_modify: FileOffset(0x184),
};

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

/// The pre-header and the longest header known of version 1, as they are in the file
/// ([`RawHeader::read`] gives a header of version 0 the same form).
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
const _: () = assert!(
    std::mem::offset_of!(RawHeader, blocks_allocated) as u64 == PLACES_1.blocks_allocated.0
);
const _: () =
    assert!(std::mem::offset_of!(RawHeader, uuid_modify) as u64 == PLACES_1.uuid_modify.0);

/// `VDIHEADER0` behind its pre-header, as it is in the file.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader0 {
    text: [u8; 64],
    signature: U32,
    version: U32,
    image_type: U32,
    image_flags: U32,
    comment: [u8; 256],
    legacy_geometry: [U32; 3],
    legacy_sector_size: U32,
    disk_size: U64,
    block_size: U32,
    blocks_in_image: U32,
    blocks_allocated: U32,
    uuid_image: RawUuid,
    uuid_modify: RawUuid,
    uuid_parent: RawUuid,
}

const _: () = assert!(size_of::<RawHeader0>() == VERSION_0_MAP as usize);
const _: () = assert!(
    std::mem::offset_of!(RawHeader0, blocks_allocated) as u64 == PLACES_0.blocks_allocated.0
);
const _: () =
    assert!(std::mem::offset_of!(RawHeader0, uuid_modify) as u64 == PLACES_0.uuid_modify.0);

impl RawHeader0 {
    /// The same in the words of version 1: what version 0 fixes is filled in.
    fn as_version_1(&self) -> RawHeader {
        let map_end =
            u64::from(VERSION_0_MAP) + u64::from(self.blocks_in_image.get()) * ENTRY_BYTES;
        RawHeader {
            text: self.text,
            signature: self.signature,
            version: self.version,
            header_size: (VERSION_0_MAP - HEADER_START).into(),
            image_type: self.image_type,
            image_flags: self.image_flags,
            comment: self.comment,
            offset_bmap: VERSION_0_MAP.into(),
            // Where it does not fit it is below the map's end, which no header may have.
            offset_data: u32::try_from(map_end).unwrap_or(0).into(),
            legacy_geometry: self.legacy_geometry,
            legacy_sector_size: self.legacy_sector_size,
            unused: 0.into(),
            disk_size: self.disk_size,
            block_size: self.block_size,
            block_extra: 0.into(),
            blocks_in_image: self.blocks_in_image,
            blocks_allocated: self.blocks_allocated,
            uuid_image: self.uuid_image,
            uuid_modify: self.uuid_modify,
            uuid_parent: self.uuid_parent,
            uuid_parent_modify: RawUuid::new_zeroed(),
            lchs_geometry: [0.into(); 3],
            lchs_sector_size: 0.into(),
        }
    }

    /// What version 0 has of a header in the words of version 1.
    const fn of(raw: &RawHeader) -> Self {
        Self {
            text: raw.text,
            signature: raw.signature,
            version: raw.version,
            image_type: raw.image_type,
            image_flags: raw.image_flags,
            comment: raw.comment,
            legacy_geometry: raw.legacy_geometry,
            legacy_sector_size: raw.legacy_sector_size,
            disk_size: raw.disk_size,
            block_size: raw.block_size,
            blocks_in_image: raw.blocks_in_image,
            blocks_allocated: raw.blocks_allocated,
            uuid_image: raw.uuid_image,
            uuid_modify: raw.uuid_modify,
            uuid_parent: raw.uuid_parent,
        }
    }
}

/// One write of a header lies in the first sector, which no crash tears.
const _: () = assert!(size_of::<RawHeader>() <= 512);

impl RawHeader {
    /// Reads what a file has at its start; behind the end of a short file are zeros.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(storage: &dyn Storage) -> io::Result<Self> {
        Self::read_with(storage.len_bytes()?, |buf, at| {
            storage.read_exact_at(buf, at)
        })
    }

    /// The same for a file of `len_bytes` that only `read` can read.
    pub(crate) fn read_with(
        len_bytes: u64,
        read: impl FnOnce(&mut [u8], FileOffset) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut raw = Self::new_zeroed();
        let bytes = raw.as_mut_bytes();
        let len = usize::try_from(len_bytes)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        read(&mut bytes[..len], FileOffset(0))?;
        if raw.is_vdi() && raw.is_version_0() {
            let (old, _) =
                RawHeader0::read_from_prefix(raw.as_bytes()).expect("it is the shorter one");
            return Ok(old.as_version_1());
        }
        Ok(raw)
    }

    /// Writes it back in the form that its version has, without what that form has no place for: one
    /// write inside the first sector, so that a crash leaves the old header or this one.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write(&self, storage: &dyn Storage) -> io::Result<()> {
        let start = FileOffset(0);
        if self.is_version_0() {
            return storage.write_all_at(RawHeader0::of(self).as_bytes(), start);
        }
        let end = if self.can_keep_lchs() {
            size_of::<Self>()
        } else {
            HEADER_END_SHORT as usize
        };
        storage.write_all_at(&self.as_bytes()[..end], start)
    }

    /// Whether it has a place for the LCHS geometry on which the map does not lie (VirtualBox
    /// lets it).
    pub(crate) const fn can_keep_lchs(&self) -> bool {
        self.has_lchs() && self.offset_bmap.get() >= HEADER_START + HEADER_SIZE_LONG
    }

    /// Whether it has the oldest header, here in the words of version 1.
    pub const fn is_version_0(&self) -> bool {
        self.version.get() == VERSION_0
    }

    /// Where the fields lie that change while the image is written.
    pub const fn places(&self) -> Places {
        if self.is_version_0() {
            PLACES_0
        } else {
            PLACES_1
        }
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
