//! One image file: its header and map in memory, and where its blocks are.

use std::io;
use std::sync::Arc;

use crate::block_map::{BlockMap, BlockMapEntry, MapError, Owners};
use crate::format::RawHeader;
use crate::header::{Header, HeaderError};
use crate::storage::{Access, Storage};
use crate::units::{DataArea, FileOffset, Span};

/// An image that keeps the invariants of [`Header`] and [`BlockMap`].
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) header: Header,
    pub(crate) map: BlockMap,
    pub(crate) area: DataArea,
}

impl Image {
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        access: Access,
    ) -> Result<(Self, Owners), OpenError> {
        let raw = RawHeader::read(&*storage).map_err(|source| OpenError::Read { source })?;
        let header = Header::check(raw, access)?;
        let (map, owners) = BlockMap::load(&*storage, &header)?;
        let area = header.data_area();
        Ok((
            Self {
                storage,
                header,
                map,
                area,
            },
            owners,
        ))
    }

    /// What the map says of a span, and where its bytes lie if it has storage.
    pub(crate) fn locate(&self, span: Span) -> Place {
        match self.map.get(span.block) {
            BlockMapEntry::Unallocated => Place::Unallocated,
            BlockMapEntry::Zero => Place::Zero,
            BlockMapEntry::Allocated(block) => {
                Place::Stored(self.area.contents_of(block).plus(span.skip_bytes))
            }
        }
    }
}

/// Where the bytes of a span are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Unallocated,
    Zero,
    Stored(FileOffset),
}

/// Why an image cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host could not read it.
    #[error("cannot read the image's header")]
    Read {
        /// The host's error.
        source: io::Error,
    },
    /// Its header breaks a rule.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// Its map breaks a rule.
    #[error(transparent)]
    Map(#[from] MapError),
}
