//! Changing how a child names its parent: one write inside the header's first sector, so that
//! a crash leaves the old link or the new one.
//!
//! Only headers of version 1 have all of the fields.

use std::io;
use std::mem::offset_of;

use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::format::{self, RawHeader, RawUuid};
use crate::header::ParentLink;
use crate::storage::Storage;
use crate::units::FileOffset;

/// Where the link ends; what lies behind differs between headers.
const LINK_END: usize = offset_of!(RawHeader, lchs_geometry);

const _: () = assert!(LINK_END <= 512);

/// Whether the image has a parent, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    Base,
    ChildOf(ParentLink),
}

/// Switches the link, durably, after all that was written before.
pub(crate) fn switch(storage: &dyn Storage, link: Link) -> io::Result<()> {
    storage.sync()?;
    let mut raw = RawHeader::read(storage)?;
    let (image_type, parent) = match link {
        Link::Base => {
            let none = ParentLink {
                uuid_image: Uuid::nil(),
                uuid_modify: Uuid::nil(),
            };
            (format::TYPE_DYNAMIC, none)
        }
        Link::ChildOf(parent) => (format::TYPE_DIFFERENCING, parent),
    };
    raw.image_type = image_type.into();
    raw.uuid_parent = RawUuid::from(parent.uuid_image);
    raw.uuid_parent_modify = RawUuid::from(parent.uuid_modify);
    storage.write_all_at(&raw.as_bytes()[..LINK_END], FileOffset(0))?;
    storage.sync()
}
