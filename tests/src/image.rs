//! Images to serve.
//!
//! Not a model of the format: fields are patched by their offsets in a file that nobody has open.
//!
//! Source: VirtualBox `VDICore.h` for the offsets.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use std::sync::Arc;

use tempfile::TempDir;
use vdi_core::{
    Access, ChainOptions, CreateOptions, Disk, HostFile, Locking, ModifiedParent, NewKind, Storage,
    find_chain,
};

use crate::qemu;
use crate::server::scratch;

/// Bytes in a block of most images.
pub const MIB: u64 = 1 << 20;

/// An image in a directory of its own, which vanishes with it.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    _directory: TempDir,
}

impl Image {
    /// A dynamic image as QEMU makes it: blocks of 1 MiB that begin at a multiple of 512.
    #[must_use]
    pub fn by_qemu(capacity_bytes: u64) -> Self {
        let image = Self::nowhere();
        qemu::create(&image.path, &capacity_bytes.to_string());
        image
    }

    /// An image as we make it.
    ///
    /// # Panics
    /// If it cannot be made.
    #[must_use]
    pub fn by_us(capacity_bytes: u64, block_size: u32, kind: NewKind) -> Self {
        let image = Self::nowhere();
        let uuid = None;
        let options = CreateOptions {
            capacity_bytes,
            block_size,
            kind,
            uuid,
        };
        vdi_core::create(&image.path, &options).expect("the options are legal");
        image
    }

    /// A path with nothing there.
    #[must_use]
    pub fn nowhere() -> Self {
        let directory = scratch();
        Self {
            path: directory.path().join("disk.vdi"),
            _directory: directory,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The first bytes that the core reads.
    ///
    /// # Panics
    /// If the image cannot be opened, or is shorter.
    #[must_use]
    pub fn start(&self, len_bytes: usize) -> Vec<u8> {
        let file = HostFile::open(&self.path, Access::ReadOnly, Locking::Locked);
        let file = Arc::new(file.expect("nobody has the image open"));
        let disk = Disk::open(file, Access::ReadOnly).expect("the image is sound");
        let mut data = vec![0; len_bytes];
        let range = disk.capacity().range_of_bytes(0..len_bytes as u64);
        disk.read_at(range.expect("it is long enough"), &mut data)
            .expect("it can be read");
        data
    }

    /// What the core reads, whatever the block size.
    ///
    /// # Panics
    /// If the image cannot be opened: nobody may be writing to it.
    #[must_use]
    pub fn contents(&self) -> Vec<u8> {
        let file = HostFile::open(&self.path, Access::ReadOnly, Locking::Locked);
        let file = Arc::new(file.expect("nobody writes to the image"));
        let disk = Disk::open(file, Access::ReadOnly).expect("the image is sound");
        let len = usize::try_from(disk.capacity().bytes()).expect("test disks are small");
        let mut bytes = vec![0; len];
        let whole = disk.capacity().whole();
        disk.read_at(whole, &mut bytes).expect("the image is sound");
        bytes
    }

    /// Overwrites bytes of the file.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn patch(&self, at: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(&self.path);
        let file = file.expect("the image is ours");
        file.write_all_at(bytes, at).expect("the image is ours");
    }

    /// Reads bytes of the file.
    ///
    /// # Panics
    /// If it is shorter.
    #[must_use]
    pub fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        let file = std::fs::File::open(&self.path).expect("the image is ours");
        file.read_exact_at(&mut bytes, at)
            .expect("the file is longer");
        bytes
    }
}

/// Writes to the disk that ends with the image at `path`; its parents are beside it.
///
/// # Panics
/// If it cannot be opened or written.
pub fn write_to(path: &Path, at: u64, bytes: &[u8]) {
    let options = ChainOptions {
        parents: Vec::new(),
        image_dirs: Vec::new(),
        locking: Locking::Locked,
        seen: Arc::default(),
    };
    let files = find_chain(path, Access::Writable, &options).expect("nobody has the image open");
    let storages = files
        .into_iter()
        .map(|file| Arc::new(file) as Arc<dyn Storage>);
    let disk = Disk::open_chain(storages.collect(), Access::Writable, ModifiedParent::Refuse);
    let disk = Arc::new(disk.expect("the image is sound"));
    let range = disk
        .capacity()
        .range_of_bytes(at..at + bytes.len() as u64)
        .expect("whole sectors of the disk");
    disk.write_at(range, bytes).expect("there is room");
    disk.close().expect("there is room");
    drop(disk);
    crate::tool::settle();
}

/// Whether all bytes are 0; fast also when nothing is optimised.
#[must_use]
pub fn are_zeros(bytes: &[u8]) -> bool {
    const ZEROS: [u8; 4096] = [0; 4096];
    bytes
        .chunks(ZEROS.len())
        .all(|part| part == &ZEROS[..part.len()])
}

/// Where header fields lie.
pub mod field {
    /// offBlocks, 4 bytes.
    pub const MAP_OFFSET: u64 = 0x154;
    /// offData, 4 bytes.
    pub const DATA_OFFSET: u64 = 0x158;
    /// cBlocks, 4 bytes.
    pub const BLOCKS_IN_IMAGE: u64 = 0x180;
    /// cbDisk, 8 bytes.
    pub const DISK_SIZE: u64 = 0x170;
    /// cBlocksAllocated, 4 bytes.
    pub const BLOCKS_ALLOCATED: u64 = 0x184;
    /// uuidModify, 16 bytes.
    pub const UUID_MODIFY: u64 = 0x198;
    /// `uuidImage`.
    pub const UUID_IMAGE: u64 = 0x188;
}
