//! A header that makes sense.
//!
//! Invariants, established by [`Header::check`]:
//!
//! - **H1** The map ends at or before the data area, and begins behind the header's
//!   first 456 bytes.
//! - **H2** `blocks_in_image` blocks hold the whole disk.
//! - **H3** In an image opened for writing no UUID is null, `blocks_allocated` is
//!   not above `blocks_in_image`, and the map begins behind the long header if there is one:
//!   else a change of an entry could make the LCHS sector size wrong.
//!
//! The checks are VirtualBox's, in its order (`VDI.cpp`, `vdiValidateHeader`), so that
//! what it opens is opened and what it rejects is rejected; H3 alone is softer for
//! reading, because nothing of the contents depends on it.

use std::fmt;

use uuid::Uuid;

use crate::format::{self, RawHeader};
use crate::storage::Access;
use crate::units::{BlockSize, Capacity, DataArea, FileOffset};

/// What kind of image it is, as far as its use depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// Blocks get storage when they are first written.
    Dynamic,
    /// All blocks had their storage from the start.
    Fixed,
    /// What it does not have shows through from its parent.
    Differencing(ParentLink),
}

/// How a child names its parent: nothing but UUIDs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParentLink {
    /// The parent's `uuid_image`.
    pub uuid_image: Uuid,
    /// The parent's `uuid_modify` when the child was made; null if the child does not know.
    pub uuid_modify: Uuid,
}

impl fmt::Display for ImageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dynamic => "dynamic",
            Self::Fixed => "fixed",
            Self::Differencing(_) => "differencing",
        })
    }
}

/// A header of which every invariant holds.
#[derive(Clone, Debug)]
pub struct Header {
    raw: RawHeader,
    kind: ImageKind,
    block_size: BlockSize,
}

impl Header {
    /// Judges a header for a use.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn check(raw: RawHeader, access: Access) -> Result<Self, HeaderError> {
        if let Some(error) = Self::broken_rules(&raw).next() {
            return Err(error);
        }
        let found = raw.block_size.get();
        let block_size = BlockSize::new(found).ok_or(HeaderError::BlockSize { found })?;
        let link = ParentLink {
            uuid_image: raw.uuid_parent.get(),
            uuid_modify: raw.uuid_parent_modify.get(),
        };
        // VirtualBox treats any image that names a parent as its child.
        let kind = match raw.image_type.get() {
            _ if !link.uuid_image.is_nil() => ImageKind::Differencing(link),
            format::TYPE_FIXED => ImageKind::Fixed,
            _ => ImageKind::Dynamic,
        };
        if let (Access::Writable, Some(flaw)) = (access, flaws(&raw).next()) {
            return Err(HeaderError::Flaw { flaw });
        }
        Ok(Self {
            raw,
            kind,
            block_size,
        })
    }

    /// All the rules that a header breaks, in VirtualBox's order. Behind a wrong signature
    /// or version the others mean nothing.
    pub fn broken_rules(raw: &RawHeader) -> impl Iterator<Item = HeaderError> + '_ {
        RULES.iter().filter_map(|rule| rule(raw).err())
    }

    /// Whether the LCHS geometry is there and its sector size is not what it must be.
    pub(crate) fn has_wrong_lchs(raw: &RawHeader) -> bool {
        let has_lchs = raw.has_lchs() && raw.version.get() == format::VERSION_1_1;
        has_lchs && raw.lchs_sector_size.get() != 512
    }

    /// What is wrong with the header without a harm to readers (H3).
    pub fn warnings(&self) -> impl Iterator<Item = Warning> {
        flaws(&self.raw)
    }

    /// The fields as the file has them.
    pub const fn raw(&self) -> &RawHeader {
        &self.raw
    }

    /// Dynamic or fixed.
    pub const fn kind(&self) -> ImageKind {
        self.kind
    }

    /// The virtual size: `disk_size` without a partial last sector, as VirtualBox shows it.
    pub const fn capacity(&self) -> Capacity {
        Capacity::from_bytes_rounded_down(self.raw.disk_size.get())
    }

    /// Whether a partial last sector, which QEMU rounds up, is in a block that no whole sector is in: it has no storage
    /// here, and QEMU may give it some.
    pub(crate) fn ends_in_a_block_of_qemu(&self) -> bool {
        let blocks_for = |bytes| self.block_size.blocks_for(bytes);
        blocks_for(self.raw.disk_size.get()) > blocks_for(self.capacity().bytes())
    }

    /// Bytes of disk contents in a block.
    pub const fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Entries in the map.
    pub const fn blocks_in_image(&self) -> u32 {
        self.raw.blocks_in_image.get()
    }

    /// The count of blocks in use, as the file had it when it was opened.
    pub const fn blocks_allocated(&self) -> u32 {
        self.raw.blocks_allocated.get()
    }

    /// Where the map begins.
    pub fn map_start(&self) -> FileOffset {
        FileOffset(u64::from(self.raw.offset_bmap.get()))
    }

    /// Where the blocks lie.
    pub fn data_area(&self) -> DataArea {
        DataArea::new(
            self.raw.offset_data.get(),
            self.raw.block_extra.get(),
            self.block_size,
        )
    }

    /// What a child made now has to say of this image.
    pub const fn as_parent(&self) -> ParentLink {
        ParentLink {
            uuid_image: self.uuid_image(),
            uuid_modify: self.raw.uuid_modify.get(),
        }
    }

    /// What names this image.
    pub const fn uuid_image(&self) -> Uuid {
        self.raw.uuid_image.get()
    }
}

type Rule = fn(&RawHeader) -> Result<(), HeaderError>;

/// H1, H2 and what VirtualBox asks for besides, in its order.
const RULES: [Rule; 13] = [
    check_signature,
    check_version,
    check_header_size,
    check_map_offset,
    check_data_offset,
    check_type,
    check_flags,
    check_lchs,
    check_parent,
    check_disk_size,
    check_block_size,
    check_block_extra,
    check_block_count,
];

fn check_signature(raw: &RawHeader) -> Result<(), HeaderError> {
    let found = raw.signature.get();
    ensure(raw.is_vdi(), HeaderError::Signature { found })
}

fn check_version(raw: &RawHeader) -> Result<(), HeaderError> {
    let (major, minor) = (raw.version.get() >> 16, raw.version.get() & 0xFFFF);
    ensure(
        major == 1 || raw.is_version_0(),
        HeaderError::Version { major, minor },
    )
}

fn check_header_size(raw: &RawHeader) -> Result<(), HeaderError> {
    let (found, least) = (raw.header_size.get(), format::HEADER_SIZE_SHORT);
    ensure(
        found >= least || raw.is_version_0(),
        HeaderError::HeaderSize { found, least },
    )
}

fn check_map_offset(raw: &RawHeader) -> Result<(), HeaderError> {
    let (found, least) = (raw.offset_bmap.get(), format::HEADER_END_SHORT);
    ensure(
        found >= least || raw.is_version_0(),
        HeaderError::MapOffset { found, least },
    )
}

fn check_data_offset(raw: &RawHeader) -> Result<(), HeaderError> {
    let (found, map_end) = (raw.offset_data.get(), raw.map_end());
    let blocks_in_image = raw.blocks_in_image.get();
    ensure(
        u64::from(found) >= map_end,
        HeaderError::DataOffset {
            found,
            blocks_in_image,
            map_end,
        },
    )
}

fn check_type(raw: &RawHeader) -> Result<(), HeaderError> {
    match raw.image_type.get() {
        format::TYPE_DYNAMIC
        | format::TYPE_UNDO
        | format::TYPE_FIXED
        | format::TYPE_DIFFERENCING => Ok(()),
        found => Err(HeaderError::ImageType { found }),
    }
}

fn check_flags(raw: &RawHeader) -> Result<(), HeaderError> {
    let found = raw.image_flags.get();
    let refused = found & !format::FLAGS_ACCEPTED;
    ensure(refused == 0, HeaderError::ImageFlags { found, refused })
}

fn check_lchs(raw: &RawHeader) -> Result<(), HeaderError> {
    let found = raw.lchs_sector_size.get();
    let is_wrong = Header::has_wrong_lchs(raw);
    ensure(!is_wrong, HeaderError::LchsSectorSize { found })
}

fn check_parent(raw: &RawHeader) -> Result<(), HeaderError> {
    let parent = raw.uuid_parent.get();
    match (raw.image_type.get(), parent.is_nil()) {
        (format::TYPE_DIFFERENCING, true) => Err(HeaderError::NoParentNamed),
        (format::TYPE_FIXED, false) => Err(HeaderError::FixedChild { parent }),
        _ => Ok(()),
    }
}

fn check_disk_size(raw: &RawHeader) -> Result<(), HeaderError> {
    ensure(raw.disk_size.get() != 0, HeaderError::DiskSizeZero)
}

fn check_block_size(raw: &RawHeader) -> Result<(), HeaderError> {
    let found = raw.block_size.get();
    ensure(
        BlockSize::new(found).is_some(),
        HeaderError::BlockSize { found },
    )
}

fn check_block_extra(raw: &RawHeader) -> Result<(), HeaderError> {
    let found = raw.block_extra.get();
    let legal = found == 0 || (found > 1 && found.is_power_of_two());
    ensure(legal, HeaderError::BlockExtra { found })
}

fn check_block_count(raw: &RawHeader) -> Result<(), HeaderError> {
    let (blocks_in_image, disk_size) = (raw.blocks_in_image.get(), raw.disk_size.get());
    // Without a block size nothing can be said about their number.
    let Some(block_size) = BlockSize::new(raw.block_size.get()) else {
        return Ok(());
    };
    let needed = block_size.blocks_for(disk_size);
    ensure(
        u64::from(blocks_in_image) >= needed,
        HeaderError::TooFewBlocks {
            blocks_in_image,
            disk_size,
            block_size: block_size.bytes(),
            needed,
        },
    )
}

fn ensure(holds: bool, broken: HeaderError) -> Result<(), HeaderError> {
    if holds { Ok(()) } else { Err(broken) }
}

/// What breaks H3.
pub(crate) fn flaws(raw: &RawHeader) -> impl Iterator<Item = Warning> + use<> {
    let (blocks_allocated, blocks_in_image) =
        (raw.blocks_allocated.get(), raw.blocks_in_image.get());
    [
        (blocks_allocated > blocks_in_image).then_some(Warning::CountTooLarge {
            blocks_allocated,
            blocks_in_image,
        }),
        raw.uuid_image.get().is_nil().then_some(Warning::NullUuid {
            field: "uuid_image",
        }),
        raw.uuid_modify.get().is_nil().then_some(Warning::NullUuid {
            field: "uuid_modify",
        }),
        has_map_in_lchs(raw).then_some(Warning::MapInHeader {
            offset_bmap: raw.offset_bmap.get(),
            header_end: LONG_END,
        }),
    ]
    .into_iter()
    .flatten()
}

const LONG_END: u32 = format::HEADER_START + format::HEADER_SIZE_LONG;

/// Whether entries are bytes of the LCHS geometry, too. VirtualBox reads such an image, and writes
/// its header over the entries when it closes it.
const fn has_map_in_lchs(raw: &RawHeader) -> bool {
    let at = raw.offset_bmap.get();
    // Further ahead it breaks H1.
    raw.has_lchs() && at >= format::HEADER_END_SHORT && at < LONG_END
}

/// Something wrong with an image that may still be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Warning {
    /// VirtualBox refuses such an image.
    #[error(
        "blocks_allocated is {blocks_allocated}, more than the {blocks_in_image} of blocks_in_image"
    )]
    CountTooLarge {
        /// What was found.
        blocks_allocated: u32,
        /// The limit.
        blocks_in_image: u32,
    },
    /// VirtualBox refuses such an image.
    #[error("{field} is null")]
    NullUuid {
        /// Which of the UUIDs.
        field: &'static str,
    },
    /// Whoever writes the one damages the other.
    #[error(
        "offset_bmap is {offset_bmap}, so the map begins inside the header, whose LCHS geometry ends at {header_end}"
    )]
    MapInHeader {
        /// What was found.
        offset_bmap: u32,
        /// The limit.
        header_end: u32,
    },
}

/// The rule that a header breaks. Field names are VirtualBox's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum HeaderError {
    #[error(
        "signature is {found:#010x}, but a VDI image has {:#010x} at byte 64; \
         is it another format? (`vdi convert -f raw` imports a raw image)",
        format::SIGNATURE
    )]
    Signature { found: u32 },
    #[error("version is {major}.{minor}, but only 1.x and 0.2 exist")]
    Version { major: u32, minor: u32 },
    #[error("header_size is {found}, less than the {least} of the shortest header")]
    HeaderSize { found: u32, least: u32 },
    #[error("offset_bmap is {found}, inside the header, which ends at {least}")]
    MapOffset { found: u32, least: u32 },
    #[error(
        "offset_data is {found}, but the map with its {blocks_in_image} entries \
         (blocks_in_image) ends at {map_end}; header, map and data must not overlap"
    )]
    DataOffset {
        found: u32,
        blocks_in_image: u32,
        map_end: u64,
    },
    #[error(
        "image_type is {found}, but only 1 (dynamic), 2 (fixed), 3 (undo) and 4 (differencing) exist"
    )]
    ImageType { found: u32 },
    #[error("image_flags is {found:#x}, of which the bits {refused:#x} have no meaning")]
    ImageFlags { found: u32, refused: u32 },
    #[error("the LCHS sector size is {found}, but must be 512")]
    LchsSectorSize { found: u32 },
    #[error(
        "image_type is 2 (fixed), but uuid_parent names the parent {parent}; a fixed image has no parent"
    )]
    FixedChild { parent: Uuid },
    #[error("image_type is 4 (differencing), but uuid_parent is null, so no parent can be found")]
    NoParentNamed,
    #[error("disk_size is 0")]
    DiskSizeZero,
    #[error(
        "block_size is {found}, but must be a power of two from {} (128 KiB) to {} (128 MiB)",
        BlockSize::MIN,
        BlockSize::MAX
    )]
    BlockSize { found: u32 },
    #[error("block_extra is {found}, but must be 0 or a power of two from 2 on")]
    BlockExtra { found: u32 },
    #[error(
        "blocks_in_image is {blocks_in_image}, but disk_size {disk_size} needs {needed} blocks \
         of {block_size} bytes"
    )]
    TooFewBlocks {
        blocks_in_image: u32,
        disk_size: u64,
        block_size: u32,
        needed: u64,
    },
    #[error("{flaw}; open it read-only, or run `vdi check`")]
    Flaw { flaw: Warning },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::{CreateOptions, NewKind, new_header};

    fn good() -> RawHeader {
        let options = CreateOptions {
            capacity_bytes: 10 << 20,
            block_size: 1 << 20,
            kind: NewKind::Dynamic,
            uuid: None,
        };
        new_header(&options).unwrap()
    }

    fn error_of(change: impl FnOnce(&mut RawHeader)) -> HeaderError {
        let mut raw = good();
        change(&mut raw);
        Header::check(raw, Access::Writable).unwrap_err()
    }

    #[test]
    fn each_rule_of_virtualbox_is_checked() {
        assert!(Header::check(good(), Access::Writable).is_ok());
        assert_eq!(
            error_of(|h| h.signature = 1.into()),
            HeaderError::Signature { found: 1 }
        );
        assert_eq!(
            error_of(|h| h.version = 0x0002_0003.into()),
            HeaderError::Version { major: 2, minor: 3 }
        );
        assert_eq!(
            error_of(|h| h.header_size = 0x17F.into()),
            HeaderError::HeaderSize {
                found: 0x17F,
                least: 0x180
            }
        );
        assert_eq!(
            error_of(|h| h.offset_bmap = 455.into()),
            HeaderError::MapOffset {
                found: 455,
                least: 456
            }
        );
        assert!(matches!(
            error_of(|h| h.offset_data = ((1 << 20) + 39).into()),
            HeaderError::DataOffset { .. }
        ));
        assert!(matches!(
            error_of(|h| h.blocks_in_image = u32::MAX.into()),
            HeaderError::DataOffset { .. }
        ));
        for found in [0, 5, u32::MAX] {
            assert_eq!(
                error_of(|h| h.image_type = found.into()),
                HeaderError::ImageType { found }
            );
        }
        assert!(matches!(
            error_of(|h| h.image_flags = 2.into()),
            HeaderError::ImageFlags { refused: 2, .. }
        ));
        assert_eq!(
            error_of(|h| h.lchs_sector_size = 0.into()),
            HeaderError::LchsSectorSize { found: 0 }
        );
        assert_eq!(
            error_of(|h| h.disk_size = 0.into()),
            HeaderError::DiskSizeZero
        );
    }

    #[test]
    fn each_rule_about_sizes_is_checked() {
        for found in [0, 1, 3, 64 << 10, 256 << 20] {
            assert_eq!(
                error_of(|h| h.block_size = found.into()),
                HeaderError::BlockSize { found }
            );
        }
        for found in [1, 3, 513] {
            assert_eq!(
                error_of(|h| h.block_extra = found.into()),
                HeaderError::BlockExtra { found }
            );
        }
        assert!(matches!(
            error_of(|h| h.blocks_in_image = 0.into()),
            HeaderError::TooFewBlocks { needed: 10, .. }
        ));
        assert!(matches!(
            error_of(|h| h.disk_size = ((10 << 20) + 1).into()),
            HeaderError::TooFewBlocks { .. }
        ));
        assert!(matches!(
            error_of(|h| h.disk_size = u64::MAX.into()),
            HeaderError::TooFewBlocks { .. }
        ));
        assert_eq!(
            error_of(|h| h.image_type = 4.into()),
            HeaderError::NoParentNamed
        );
    }

    #[test]
    fn an_image_that_names_a_parent_is_its_child_unless_it_is_fixed() {
        for image_type in [1, 3, 4] {
            let mut raw = good();
            raw.image_type = image_type.into();
            raw.uuid_parent = Uuid::max().into();
            let header = Header::check(raw, Access::Writable).unwrap();
            assert!(
                matches!(header.kind(), ImageKind::Differencing(link) if link.uuid_image == Uuid::max())
            );
        }
        let error = error_of(|h| {
            h.image_type = 2.into();
            h.uuid_parent = Uuid::max().into();
        });
        assert_eq!(
            error,
            HeaderError::FixedChild {
                parent: Uuid::max()
            }
        );
    }

    #[test]
    fn what_virtualbox_accepts_is_accepted() {
        let accepted: [fn(&mut RawHeader); 7] = [
            |h| h.version = 0x0001_0000.into(),
            |h| h.version = 0x0001_0002.into(),
            |h| h.header_size = u32::MAX.into(),
            |h| h.image_type = 3.into(),
            |h| h.image_flags = 0xFF00_0301.into(),
            |h| h.disk_size = ((10 << 20) - 1).into(),
            |h| h.legacy_sector_size = 0.into(),
        ];
        for change in accepted {
            let mut raw = good();
            change(&mut raw);
            assert!(Header::check(raw, Access::Writable).is_ok(), "{raw:?}");
        }
    }

    #[test]
    fn the_short_header_has_no_lchs_sector_size() {
        let mut raw = good();
        raw.header_size = 0x180.into();
        raw.lchs_sector_size = 77.into();
        assert!(Header::check(raw, Access::Writable).is_ok());
    }

    #[test]
    fn a_flaw_that_harms_no_reader_is_a_warning_to_readers_only() {
        let flawed: [fn(&mut RawHeader); 4] = [
            |h| h.offset_bmap = 0x1D7.into(),
            |h| h.uuid_image = Uuid::nil().into(),
            |h| h.uuid_modify = Uuid::nil().into(),
            |h| h.blocks_allocated = 11.into(),
        ];
        for change in flawed {
            let mut raw = good();
            change(&mut raw);
            assert!(matches!(
                Header::check(raw, Access::Writable),
                Err(HeaderError::Flaw { .. })
            ));
            assert_eq!(
                Header::check(raw, Access::ReadOnly)
                    .unwrap()
                    .warnings()
                    .count(),
                1
            );
        }
    }

    #[test]
    fn an_odd_disk_size_is_rounded_down() {
        let mut raw = good();
        raw.disk_size = (5 * 512 + 300).into();
        assert_eq!(
            Header::check(raw, Access::Writable)
                .unwrap()
                .capacity()
                .sectors(),
            5
        );
    }
}
