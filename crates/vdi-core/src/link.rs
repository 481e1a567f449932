//! Changing how a child names its parent: one write inside the header's first sector, so that
//! a crash leaves the old link or the new one.
//!
//! A header of version 0 has no place for the state of the parent that the child knows; its children
//! take any.

use std::io;

use uuid::Uuid;

use crate::format::{self, RawHeader, RawUuid};
use crate::header::ParentLink;
use crate::storage::Storage;

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
    raw.write(storage)?;
    storage.sync()
}
