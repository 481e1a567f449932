//! VirtualBox VDI disk images: where the bytes of a virtual disk are, and in
//! which order a file must be written so that no crash loses an answered write.
//!
//! The library moves no guest data and knows no guest, ring or thread. It
//! answers questions; the caller does the I/O in between:
//!
//! ```text
//! read    Disk::map ─► extents ─► the caller reads them
//! write   Disk::reserve ─► extents ─► the caller writes them ─► Disk::commit
//! flush   Disk::begin_flush ─► the caller syncs ─► Disk::end_flush
//! ```
//!
//! [`Disk::read_at`], [`Disk::write_at`] and [`Disk::flush`] do all of it for
//! programs that are content with blocking calls. [`convert`] and [`compare`] move whole disks, with
//! threads of their own.
//!
//! Inside, dependencies point one way: `units ← format ← header, block_map ←
//! image ← disk ← check ← repair, convert`.

#![forbid(unsafe_code)]

mod batch;
pub mod block_map;
pub mod chain;
pub mod check;
mod chores;
pub mod clone;
pub mod commit;
pub mod compact;
pub mod compare;
pub mod convert;
pub mod create;
mod crew;
pub mod disk;
mod entries;
pub mod format;
pub mod header;
mod holder;
mod holes;
mod image;
mod inside;
pub mod layout;
mod link;
mod lock;
pub mod rebase;
mod release;
pub mod repair;
mod reservation;
pub mod resize;
mod room;
pub mod set;
pub mod share;
pub mod storage;
pub mod units;
pub mod visit;
mod writer;

pub use chain::{ChainError, ChainOptions, SeenImages, find_chain, find_parent};
pub use create::{CreateError, CreateOptions, NewKind, create, create_child};
pub use crew::Threads;
pub use disk::{
    Disk, Extent, Extents, Fill, Flush, InPlace, ModifiedParent, ReadError, Reservation, Reserve,
    Source, Usage, WriteError, WriteExtent, Zeroing,
};
pub use header::{Header, HeaderError, ImageKind, ParentLink, Warning};
pub use holder::Holder;
pub use image::{Image, OpenError};
pub use inside::Inside;
pub use storage::{Access, FileError, HostFile, Locking, Storage};
pub use units::{
    BlockSize, Capacity, DiskBlock, FileBlock, FileOffset, SECTOR_SIZE, Sector, SectorRange,
};
pub use visit::{Lane, Visit};
