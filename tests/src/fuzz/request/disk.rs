//! The disk of the target for requests: its images' files, and a model of what it holds.
//!
//! 145 blocks of 128 KiB, the last one cut off; a few of them have storage, in a child or its parent, or are zeros. It is
//! larger than what is done of a request in one go.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vdi_core::{Access, Disk, HostFile, Locking, Sector};

/// Sectors of the disk.
pub(super) const SECTORS: u64 = (18 << 11) + 3;

const BLOCK_BYTES: u64 = 128 << 10;
const BLOCK_SECTORS: u64 = BLOCK_BYTES / 512;
const BLOCKS: u64 = SECTORS.div_ceil(BLOCK_SECTORS);
const MAP_AT: u64 = 512;
const DATA_AT: u64 = 2048;
const FREE: u32 = 0xFFFF_FFFF;
const ZERO: u32 = 0xFFFF_FFFE;

/// The contents of a sector.
type Contents = Vec<u8>;

/// What an image says of a block: it has storage, it is zeros, or nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Stored,
    Zeros,
    Nowhere,
}

/// Which image: 0 is the top.
fn kept(depth: usize, block: u64) -> Kept {
    match (depth, block % 12) {
        (0, 0) | (1, 3) => Kept::Stored,
        (1, 5) if block < 30 => Kept::Stored,
        (0, 5) => Kept::Zeros,
        _ => Kept::Nowhere,
    }
}

/// What a sector of a block with storage holds: something at the ends of the block, zeros between.
fn stored(depth: usize, sector: u64) -> Option<Contents> {
    let within = sector % BLOCK_SECTORS;
    let marked = within < 2 || within == BLOCK_SECTORS - 1;
    let byte = sector.wrapping_mul(7).to_le_bytes()[0] ^ if depth == 0 { 0x5A } else { 0xC3 };
    marked.then(|| vec![byte | 1; 512])
}

fn file_in_memory() -> File {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    memfd_create("image", flags)
        .expect("there is memory")
        .into()
}

/// An image's file, as it is before anything is written.
fn image(depth: usize, has_parent: bool) -> File {
    let file = file_in_memory();
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).expect("there is memory");
    let word = |at: u64, value: u64| put(at, &value.to_le_bytes()[..4]);
    let name = |depth: usize| [0x11 + u8::try_from(depth).expect("few"); 16];
    word(0x40, 0xBEDA_107F);
    word(0x44, 0x0001_0001);
    word(0x48, 0x180);
    word(0x4C, if has_parent { 4 } else { 1 });
    word(0x154, MAP_AT);
    word(0x158, DATA_AT);
    word(0x168, 512);
    put(0x170, &(SECTORS * 512).to_le_bytes());
    word(0x178, BLOCK_BYTES);
    word(0x180, BLOCKS);
    put(0x188, &name(depth));
    put(0x198, &name(depth));
    if has_parent {
        put(0x1A8, &name(depth + 1));
    }
    let mut count = 0;
    let mut map = Vec::new();
    for block in 0..BLOCKS {
        let entry = match kept(depth, block) {
            Kept::Zeros => ZERO,
            Kept::Nowhere => FREE,
            Kept::Stored => {
                let at = DATA_AT + count * BLOCK_BYTES;
                for within in [0, 1, BLOCK_SECTORS - 1] {
                    if let Some(bytes) = stored(depth, block * BLOCK_SECTORS + within) {
                        put(at + within * 512, &bytes);
                    }
                }
                count += 1;
                u32::try_from(count - 1).expect("few")
            }
        };
        map.extend(entry.to_le_bytes());
    }
    put(MAP_AT, &map);
    word(0x184, count);
    file.set_len(DATA_AT + count * BLOCK_BYTES)
        .expect("there is memory");
    file
}

/// The files of a disk, the top image's first.
#[derive(Debug)]
pub(in crate::fuzz) struct Images {
    files: Vec<File>,
}

impl Images {
    pub(in crate::fuzz) fn new(has_parent: bool) -> Self {
        let mut files = vec![image(0, has_parent)];
        if has_parent {
            files.push(image(1, false));
        }
        Self { files }
    }

    /// The file of the top image.
    pub(in crate::fuzz) fn top(&self) -> &File {
        &self.files[0]
    }

    /// Where the top image can be opened.
    pub(in crate::fuzz) fn path(&self) -> PathBuf {
        path(&self.files[0])
    }

    pub(in crate::fuzz) fn open(&self, access: Access) -> Vec<Arc<HostFile>> {
        let open = |(nth, file): (usize, &File)| {
            let access = if nth == 0 { access } else { Access::ReadOnly };
            let file = HostFile::open(&path(file), access, Locking::Locked);
            Arc::new(file.expect("nobody else has the file"))
        };
        self.files.iter().enumerate().map(open).collect()
    }
}

fn path(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// What the disk may hold.
pub(super) struct Model {
    has_parent: bool,
    /// What a sector may hold, if it was changed: anything if the list is empty.
    changed: HashMap<u64, Vec<Contents>>,
}

impl Model {
    pub(super) fn new(has_parent: bool) -> Self {
        Self {
            has_parent,
            changed: HashMap::new(),
        }
    }

    fn initial(&self, sector: u64) -> Contents {
        let block = sector / BLOCK_SECTORS;
        let depths = if self.has_parent { 0..2 } else { 0..1 };
        for depth in depths {
            match kept(depth, block) {
                Kept::Stored => return stored(depth, sector).unwrap_or_else(zeros),
                Kept::Zeros => break,
                Kept::Nowhere => {}
            }
        }
        zeros()
    }

    /// What a sector may hold: anything if the list is empty.
    fn allowed(&self, sector: u64) -> Vec<Contents> {
        let changed = self.changed.get(&sector).cloned();
        changed.unwrap_or_else(|| vec![self.initial(sector)])
    }

    /// Panics unless a sector may read like this.
    pub(super) fn assert_may_be(&self, sector: u64, found: &[u8], by: &str) {
        let allowed = self.allowed(sector);
        assert!(
            allowed.is_empty() || allowed.iter().any(|allowed| allowed == found),
            "{by}: sector {sector} begins with {:x?}, not one of {:x?}",
            &found[..4],
            allowed.iter().map(|one| &one[..4]).collect::<Vec<_>>()
        );
    }

    /// The sector holds this, or may.
    pub(super) fn put(&mut self, sector: u64, contents: Contents, certain: bool) {
        let mut allowed = Vec::new();
        if !certain {
            allowed = self.allowed(sector);
            if allowed.is_empty() {
                return;
            }
        }
        if !allowed.contains(&contents) {
            allowed.push(contents);
        }
        self.changed.insert(sector, allowed);
    }

    /// The sectors are zeros, or may be.
    pub(super) fn put_zeros(&mut self, sectors: Range<u64>, certain: bool) {
        sectors.for_each(|sector| self.put(sector, zeros(), certain));
    }

    /// The sectors may hold anything.
    pub(super) fn forget(&mut self, sectors: Range<u64>) {
        for sector in sectors {
            self.changed.insert(sector, Vec::new());
        }
    }

    /// Reads what was changed and what lies beside it.
    pub(super) fn assert_reads(&self, disk: &Disk) {
        let blocks = self.changed.keys().map(|sector| sector / BLOCK_SECTORS);
        let mut blocks: Vec<u64> = blocks.flat_map(|block| [block, block + 1]).collect();
        blocks.extend([0, 3, 5, BLOCKS - 1]);
        blocks.sort_unstable();
        blocks.dedup();
        for block in blocks.into_iter().filter(|block| *block < BLOCKS) {
            let first = block * BLOCK_SECTORS;
            let count = BLOCK_SECTORS.min(SECTORS - first);
            let range = disk.capacity().range(Sector(first), count);
            let mut found = vec![0xEE; usize::try_from(count * 512).expect("a block")];
            disk.read_at(range.expect("it is on the disk"), &mut found)
                .expect("what opens lies in its file");
            for (sector, found) in (first..).zip(found.chunks(512)) {
                self.assert_may_be(sector, found, "in the end");
            }
        }
    }
}

fn zeros() -> Contents {
    vec![0; 512]
}
