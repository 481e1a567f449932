//! Setting what the header says of an image besides its contents.
//!
//! All of it lies in the file's first sector, so one write changes it: a crash leaves the old
//! fields or the new ones. Header bytes that are not understood stay as they are.

use std::io;

use uuid::Uuid;

use crate::format::RawHeader;
use crate::header::{Header, HeaderError};
use crate::storage::{Access, Storage};

/// VirtualBox cuts heads and sectors to what a BIOS knows.
const MOST_HEADS: u32 = 255;
const MOST_SECTORS: u32 = 63;

/// What to set; the others stay.
#[derive(Clone, Debug, Default)]
pub struct Fields {
    /// `szComment`.
    pub comment: Option<String>,
    /// `uuidCreate`. Children of the image do not find it by another one.
    pub uuid_image: Option<Uuid>,
    /// `uuidModify`. Children of the image take another one for a change of its contents.
    pub uuid_modify: Option<Uuid>,
    /// `LCHSGeometry`: cylinders, heads, sectors; zeros for none.
    pub lchs: Option<[u32; 3]>,
}

/// Sets fields of an image that nobody has open, and syncs it.
///
/// An image whose UUIDs are null can be opened again afterwards.
///
/// # Errors
/// If the image is none, or a value does not fit; then nothing is changed. Or if the host fails.
pub fn set(storage: &dyn Storage, fields: &Fields) -> Result<(), SetError> {
    let raw = RawHeader::read(storage).map_err(|source| SetError::Read { source })?;
    let mut raw = *Header::check(raw, Access::ReadOnly)?.raw();
    if let Some(comment) = &fields.comment {
        raw.comment = comment_bytes(comment)?;
    }
    for (field, uuid) in [
        (&mut raw.uuid_image, fields.uuid_image),
        (&mut raw.uuid_modify, fields.uuid_modify),
    ] {
        match uuid {
            Some(uuid) if uuid.is_nil() => return Err(SetError::NullUuid),
            Some(uuid) => *field = uuid.into(),
            None => {}
        }
    }
    if let Some(lchs @ [cylinders, heads, sectors]) = fields.lchs {
        if !raw.can_keep_lchs() {
            return Err(SetError::ShortHeader);
        }
        if heads > MOST_HEADS || sectors > MOST_SECTORS {
            return Err(SetError::Geometry {
                cylinders,
                heads,
                sectors,
            });
        }
        raw.lchs_geometry = lchs.map(Into::into);
    }
    raw.write(storage)
        .and_then(|()| storage.sync())
        .map_err(|source| SetError::Write { source })
}

fn comment_bytes(comment: &str) -> Result<[u8; 256], SetError> {
    let mut field = [0; 256];
    let (len_bytes, most) = (comment.len(), field.len() - 1);
    if comment.contains('\0') {
        return Err(SetError::CommentWithNul);
    }
    if len_bytes > most {
        return Err(SetError::CommentTooLong { len_bytes, most });
    }
    field[..len_bytes].copy_from_slice(comment.as_bytes());
    Ok(field)
}

/// Why fields could not be set.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum SetError {
    #[error("cannot read the image's header")]
    Read { source: io::Error },
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("the comment has {len_bytes} bytes, but the header has room for {most}")]
    CommentTooLong { len_bytes: usize, most: usize },
    #[error("the comment has a NUL, which would end it")]
    CommentWithNul,
    #[error("the null UUID names no image")]
    NullUuid,
    #[error("the image has a short header, which has no place for a geometry; convert it first")]
    ShortHeader,
    #[error(
        "the geometry {cylinders}/{heads}/{sectors} is not possible, \
         a BIOS knows at most {MOST_HEADS} heads and {MOST_SECTORS} sectors"
    )]
    Geometry {
        cylinders: u32,
        heads: u32,
        sectors: u32,
    },
    #[error("cannot write the image's header")]
    Write { source: io::Error },
}
