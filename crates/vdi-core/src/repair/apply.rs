//! Carrying out a plan, in an order that a crash may break anywhere (M1, M2).
//!
//! ```text
//! fields ─► dropped entries ─► sync ─► length, count ─► sync ─► { copies ─► sync ─► entries } … ─► sync ─► count, cut ─► sync
//! ```
//!
//! Entries are dropped first: the file may be lengthened, and copies written, to where they point.

use std::io;

use zerocopy::IntoBytes;

use super::blocks::{BlockPlan, Change, Target};
use super::{FieldChange, FieldValue, Plan};
use crate::format::{self, ENTRY_BYTES, RawHeader, RawUuid};
use crate::storage::Storage;
use crate::units::{DataArea, FileBlock, FileOffset};

/// Copies that share a sync.
const BATCH: usize = 64;
/// Bytes that are copied at a time.
const PIECE: usize = 1 << 20;

/// Why a repair stopped. What was done until then stays; another repair finishes it.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "the messages are the documentation; the fields are the values in them"
)]
pub enum ApplyError {
    #[error("cannot read the image; run the repair again when that is mended")]
    Read(#[source] io::Error),
    #[error(
        "cannot write to the image; nothing was lost: run the repair again when that is mended"
    )]
    Write(#[source] io::Error),
    #[error(
        "cannot copy disk block {block}; nothing was lost: run the repair again when that is mended"
    )]
    Copy { block: u32, source: io::Error },
    #[error("cannot sync the image; check it before it is used")]
    Sync(#[source] io::Error),
}

/// Does what a plan says. The image must be as it was when the plan was made, and nobody else may use it.
///
/// # Errors
/// See [`ApplyError`].
pub fn apply(storage: &dyn Storage, plan: &Plan) -> Result<(), ApplyError> {
    if plan.is_empty() {
        return Ok(());
    }
    let places = RawHeader::read(storage).map_err(ApplyError::Read)?.places();
    for field in &plan.fields {
        write_field(storage, field).map_err(ApplyError::Write)?;
    }
    let Some(blocks) = &plan.blocks else {
        return storage.sync().map_err(ApplyError::Sync);
    };
    let (dropped, copied) = blocks.dropped_and_copied();
    write_entries(storage, blocks, dropped)?;
    if !dropped.is_empty() {
        storage.sync().map_err(ApplyError::Sync)?;
    }
    if let Some((_, to)) = blocks.lengthen {
        storage.set_len(to).map_err(ApplyError::Write)?;
    }
    if let Some((_, to)) = blocks.raise_count {
        write_number(storage, to, places.blocks_allocated)?;
    }
    storage.sync().map_err(ApplyError::Sync)?;
    for batch in copied.chunks(BATCH) {
        change(storage, blocks, batch)?;
    }
    if blocks.set_count.is_none() && blocks.cut_to.is_none() {
        return match blocks.changes.is_empty() {
            true => Ok(()),
            false => storage.sync().map_err(ApplyError::Sync),
        };
    }
    // W1: the blocks given back have no owner on the disk either.
    storage.sync().map_err(ApplyError::Sync)?;
    if let Some((_, to)) = blocks.set_count {
        write_number(storage, to, places.blocks_allocated)?;
    }
    if let Some((_, to)) = blocks.cut_to {
        storage.set_len(to).map_err(ApplyError::Write)?;
    }
    storage.sync().map_err(ApplyError::Sync)
}

fn write_field(storage: &dyn Storage, change: &FieldChange) -> io::Result<()> {
    match change.to {
        FieldValue::Number { to, .. } => storage.write_all_at(&to.to_le_bytes(), change.at),
        FieldValue::Uuid(uuid) => storage.write_all_at(RawUuid::from(uuid).as_bytes(), change.at),
    }
}

fn write_number(storage: &dyn Storage, number: u32, at: FileOffset) -> Result<(), ApplyError> {
    let written = storage.write_all_at(&number.to_le_bytes(), at);
    written.map_err(ApplyError::Write)
}

/// Copies some blocks, and lets their entries name the copies when those are durable.
fn change(storage: &dyn Storage, blocks: &BlockPlan, batch: &[Change]) -> Result<(), ApplyError> {
    let len_bytes = storage.len_bytes().map_err(ApplyError::Read)?;
    for change in batch {
        if let Target::Copy(to) = change.to {
            let block = change.block;
            copy(storage, blocks.area, change.from, to, len_bytes)
                .map_err(|source| ApplyError::Copy { block, source })?;
        }
    }
    storage.sync().map_err(ApplyError::Sync)?;
    write_entries(storage, blocks, batch)
}

fn write_entries(
    storage: &dyn Storage,
    blocks: &BlockPlan,
    changes: &[Change],
) -> Result<(), ApplyError> {
    for change in changes {
        let entry = match change.to {
            Target::Copy(to) => to.get(),
            Target::Zero => format::ENTRY_ZERO,
        };
        let at = blocks.map_start.plus(u64::from(change.block) * ENTRY_BYTES);
        write_number(storage, entry, at)?;
    }
    Ok(())
}

/// Copies a file block with its private bytes; what the file does not have of it becomes zeros.
fn copy(
    storage: &dyn Storage,
    area: DataArea,
    from: FileBlock,
    to: FileBlock,
    len_bytes: u64,
) -> io::Result<()> {
    // A file block begins where those before it end.
    let (from, to) = (area.end_of(from.get()), area.end_of(to.get()));
    let stride = area.stride_bytes();
    let present = len_bytes.saturating_sub(from.0).min(stride);
    let mut piece = vec![0; PIECE];
    let mut done = 0;
    while done < present {
        let len = usize::try_from(present - done).unwrap_or(PIECE).min(PIECE);
        let piece = &mut piece[..len];
        storage.read_exact_at(piece, from.plus(done))?;
        if piece.iter().all(|&byte| byte == 0) {
            storage.punch(to.plus(done), len as u64)?;
        } else {
            storage.write_all_at(piece, to.plus(done))?;
        }
        done += len as u64;
    }
    if done < stride {
        storage.punch(to.plus(done), stride - done)?;
    }
    Ok(())
}

/// Gives the bytes of header and map, as far as the file has them, to `keep`, with the position of each
/// piece; zeros at the end of a piece of the map are given as well.
///
/// # Errors
/// If the image cannot be read, or `keep` fails.
pub fn back_up(
    storage: &dyn Storage,
    mut keep: impl FnMut(FileOffset, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let len_bytes = storage.len_bytes()?;
    let raw = RawHeader::read(storage)?;
    let header_end = size_of::<RawHeader>() as u64;
    let map_start = u64::from(raw.offset_bmap.get());
    let map_end = map_start + u64::from(raw.blocks_in_image.get()) * ENTRY_BYTES;
    let mut piece = vec![0; PIECE];
    for range in [0..header_end, map_start.max(header_end)..map_end] {
        let end = range.end.min(len_bytes);
        let mut at = range.start;
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            let piece = &mut piece[..len];
            storage.read_exact_at(piece, FileOffset(at))?;
            if piece.iter().any(|&byte| byte != 0) {
                keep(FileOffset(at), piece)?;
            }
            at += len as u64;
        }
    }
    Ok(())
}
