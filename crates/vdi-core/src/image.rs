//! One image file: its header and map in memory, and where its blocks are.

use std::io;
use std::sync::Arc;

use crate::block_map::{BlockMap, BlockMapEntry, MapError, Owners};
use crate::format::RawHeader;
use crate::header::{Header, HeaderError, ImageKind};
use crate::storage::{Access, Storage};
use crate::units::{DataArea, FileOffset, Span};
use uuid::Uuid;

/// An image that keeps the invariants of [`Header`] and [`BlockMap`].
#[derive(Debug)]
pub struct Image {
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

    /// Opens an image by itself, to look at it: its contents may need parents, which are not asked for.
    ///
    /// # Errors
    /// If it breaks a rule of the format.
    pub fn examine(storage: Arc<dyn Storage>) -> Result<Self, OpenError> {
        Ok(Self::open(storage, Access::ReadOnly)?.0)
    }

    /// The header as it was at open.
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The entries of the map, one for each block.
    pub fn entries(&self) -> impl Iterator<Item = BlockMapEntry> {
        self.map.entries()
    }

    /// Whether `parent` is the image that this one names, and as it was then.
    ///
    /// # Errors
    /// If this is no child, or the child of another, or the parent was modified.
    pub fn check_parent(&self, parent: &Self, modified: ModifiedParent) -> Result<(), OpenError> {
        let ImageKind::Differencing(link) = self.header.kind() else {
            return Err(OpenError::NotAChild);
        };
        let found = parent.header.uuid_image();
        if found != link.uuid_image {
            return Err(OpenError::WrongParent {
                wanted: link.uuid_image,
                found,
            });
        }
        let found = parent.header.raw().uuid_modify.get();
        let known = link.uuid_modify;
        if modified == ModifiedParent::Refuse && !known.is_nil() && found != known {
            return Err(OpenError::ParentModified {
                parent: link.uuid_image,
                known,
                found,
            });
        }
        Ok(())
    }

    /// The part of one block from the disk's byte `at` on, of at most `most_bytes`; `None`
    /// beyond the end of this image.
    pub(crate) fn span(&self, at: u64, most_bytes: u64) -> Option<Span> {
        let left = self.header.capacity().bytes().checked_sub(at)?;
        let len_bytes = most_bytes.min(left);
        let span = self.header.block_size().span_at(at)?;
        let len_bytes = len_bytes.min(span.len_bytes);
        (len_bytes > 0).then_some(Span { len_bytes, ..span })
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

/// What to do about a parent that was changed after its child was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModifiedParent {
    /// Refuse: the child's contents are most likely nonsense.
    Refuse,
    /// Use it all the same, as VirtualBox does.
    Allow,
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
    /// An empty chain.
    #[error("a disk needs at least one image")]
    NoImage,
    /// More images than [`crate::disk::MOST_IMAGES`].
    #[error("the chain has more than {most} images; merge some of them first")]
    TooManyImages {
        /// The limit.
        most: usize,
    },
    /// The last image of the chain is a child.
    #[error("the image is a child of {parent}, which was not given")]
    NoParent {
        /// The parent's `uuid_image`.
        parent: Uuid,
    },
    /// An image was given behind one that has no parent.
    #[error("a parent was given for an image that has none")]
    NotAChild,
    /// An image was given that is not the parent of the one before it.
    #[error("the child's uuid_parent is {wanted}, but the parent given has the uuid_image {found}")]
    WrongParent {
        /// The child's `uuid_parent`.
        wanted: Uuid,
        /// The `uuid_image` found.
        found: Uuid,
    },
    /// The parent was written after its child was made.
    #[error(
        "the parent {parent} was modified after its child was made (its uuid_modify is {found}, the child \
         knows {known}), so the child's contents are unreliable; use --allow-modified-parent to take it as it is"
    )]
    ParentModified {
        /// The parent's `uuid_image`.
        parent: Uuid,
        /// The child's `uuid_parent_modify`.
        known: Uuid,
        /// The parent's `uuid_modify`.
        found: Uuid,
    },
}
