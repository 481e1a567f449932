//! A disk as a guest sees it, and the doors to it.
//!
//! Reading is a question to the map and takes no lock. Writing is a conversation, see
//! [`crate::writer`] for its rules:
//!
//! ```text
//! reserve ─► Ready(Reservation) ─► the caller writes its extents ─► commit ─► answer
//!        └─► Parked: call again when the waker is woken
//! ```

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Wake, Waker};
use std::thread::Thread;

use crate::block_map::BlockMapEntry;
use crate::header::{Header, ImageKind, Warning};
use crate::image::{Image, OpenError, Place};
use crate::storage::{Access, Storage};
use crate::units::{Capacity, DataArea, DiskBlock, FileOffset, SectorRange, Span};
use crate::visit::{Lane, Visit, Visits};
use crate::writer::Writer;

pub use crate::image::ModifiedParent;
pub use crate::release::Zeroing;
pub use crate::reservation::{Fill, Flush, InPlace, Reservation, Reserve, WriteExtent};
pub use crate::writer::WriteError;

/// An open disk: a top image and the parents that show through it.
#[derive(Debug)]
pub struct Disk {
    /// The top image first, the base last.
    images: Vec<Arc<Image>>,
    pub(crate) writer: Option<Writer>,
    pub(crate) visits: Arc<Visits>,
    /// The blocking doors' own.
    lane: Lane,
}

/// How many images a disk may have: each costs a descriptor and a map in memory, and a read of
/// what none of them has asks all of them.
pub const MOST_IMAGES: usize = 256;

/// What an image takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blocks of the disk that have storage.
    pub allocated_blocks: u32,
    /// Blocks that lost theirs since the disk was opened.
    pub released_blocks: u64,
    /// Bytes that the file is known to have; of a disk that is only read, those that its header tells of.
    pub file_bytes: u64,
}

impl Disk {
    /// Opens the disk that one image file holds.
    ///
    /// # Errors
    /// If the image breaks a rule of the format or has a parent; see [`OpenError`].
    pub fn open(storage: Arc<dyn Storage>, access: Access) -> Result<Self, OpenError> {
        Self::open_chain(vec![storage], access, ModifiedParent::Refuse)
    }

    /// Opens the disk that a chain of image files holds: the top image first, each one's parent
    /// behind it. Parents are only read.
    ///
    /// # Errors
    /// If an image breaks a rule of the format or is not the parent of the one before it.
    pub fn open_chain(
        storages: Vec<Arc<dyn Storage>>,
        access: Access,
        modified: ModifiedParent,
    ) -> Result<Self, OpenError> {
        let mut storages = storages.into_iter();
        let top = storages.next().ok_or(OpenError::NoImage)?;
        if storages.len() >= MOST_IMAGES {
            return Err(OpenError::TooManyImages { most: MOST_IMAGES });
        }
        let top = open_top(top, access)?;
        let open = |storage| Ok(Arc::new(Image::open(storage, Access::ReadOnly)?.0));
        let parents: Vec<_> = storages.map(open).collect::<Result<_, OpenError>>()?;
        Self::put_together(top, &parents, modified)
    }

    /// Opens the top image of a disk over parents that are open already, the nearest first: many disks may
    /// have them, with one map in memory for all.
    ///
    /// # Errors
    /// Like [`Disk::open_chain`].
    pub fn open_over(
        top: Arc<dyn Storage>,
        access: Access,
        parents: &[Arc<Image>],
        modified: ModifiedParent,
    ) -> Result<Self, OpenError> {
        if parents.len() >= MOST_IMAGES {
            return Err(OpenError::TooManyImages { most: MOST_IMAGES });
        }
        Self::put_together(open_top(top, access)?, parents, modified)
    }

    fn put_together(
        (top, writer): (Image, Option<Writer>),
        parents: &[Arc<Image>],
        modified: ModifiedParent,
    ) -> Result<Self, OpenError> {
        let mut images = vec![Arc::new(top)];
        images.extend_from_slice(parents);
        for (child, parent) in images.iter().zip(&images[1..]) {
            child.check_parent(parent, modified)?;
        }
        if let Some(last) = images.last()
            && let ImageKind::Differencing(link) = last.header.kind()
        {
            let parent = link.uuid_image;
            return Err(OpenError::NoParent { parent });
        }
        let visits = Arc::<Visits>::default();
        let lane = visits.lane();
        Ok(Self {
            images,
            writer,
            visits,
            lane,
        })
    }

    pub(crate) fn top(&self) -> &Image {
        &self.images[0]
    }

    /// The images, the top one first.
    pub fn images(&self) -> &[Arc<Image>] {
        &self.images
    }

    /// The files of the images, the top one's first.
    pub(crate) fn storages(&self) -> impl Iterator<Item = &Arc<dyn Storage>> {
        self.images.iter().map(|image| &image.storage)
    }

    /// The headers of the images, the top one's first, as they were at open.
    pub fn headers(&self) -> impl ExactSizeIterator<Item = &Header> {
        self.images.iter().map(|image| &image.header)
    }

    /// The virtual size: the top image's, whatever its parents have.
    pub fn capacity(&self) -> Capacity {
        self.top().header.capacity()
    }

    /// What the disk was opened for.
    pub const fn access(&self) -> Access {
        match self.writer {
            Some(_) => Access::Writable,
            None => Access::ReadOnly,
        }
    }

    /// The top image's header as it was at open.
    pub fn header(&self) -> &Header {
        &self.top().header
    }

    /// The entries of the top image's map, one for each block of the disk.
    pub fn entries(&self) -> impl Iterator<Item = BlockMapEntry> {
        self.top().map.entries()
    }

    /// What is wrong with the images without harm to their readers.
    pub fn warnings(&self) -> impl Iterator<Item = Warning> {
        self.images.iter().flat_map(|image| image.header.warnings())
    }

    /// What the top image takes, now. It costs a few loads.
    pub fn usage(&self) -> Usage {
        let top = self.top();
        let as_opened = || top.area.end_of(top.header.blocks_allocated()).0;
        let writer = self.writer.as_ref();
        Usage {
            allocated_blocks: top.map.count_allocated(),
            released_blocks: top.map.count_released(),
            file_bytes: writer
                .map_or_else(as_opened, |writer| writer.known_len.load(Ordering::Relaxed)),
        }
    }

    /// Where the blocks lie in the top image's file.
    pub fn data_area(&self) -> DataArea {
        self.top().area
    }

    /// A way in for one more thread that serves requests.
    pub fn lane(&self) -> Lane {
        self.visits.lane()
    }

    /// Where the bytes of a range are now, in order, neighbours merged. What it says is good as
    /// long as the visit lasts.
    pub fn map<'d>(&'d self, range: SectorRange, _visit: &'d Visit) -> Extents<'d> {
        Extents::over(&self.images, range)
    }

    /// What the parents have where the top image's `block` is; depth 0 is the first parent.
    pub(crate) fn parents_of(&self, block: DiskBlock) -> Extents<'_> {
        let size = self.header().block_size();
        let left_bytes = self.capacity().bytes() - size.start_of(block);
        let len_bytes = left_bytes.min(u64::from(size.bytes()));
        self.parents_at(Span {
            block,
            skip_bytes: 0,
            len_bytes,
        })
    }

    /// The same for a part of a block.
    pub(crate) fn parents_at(&self, span: Span) -> Extents<'_> {
        let at = self.header().block_size().start_of(span.block) + span.skip_bytes;
        let end = at + span.len_bytes;
        Extents {
            images: &self.images[1..],
            at,
            end,
            next: None,
        }
    }

    /// The images' files, the top one's first, where the host has them.
    pub(crate) fn host_files(&self) -> impl Iterator<Item = Option<&File>> {
        self.images.iter().map(|image| image.storage.host_file())
    }

    /// Reads from one image's file.
    pub(crate) fn read_image(
        &self,
        depth: usize,
        buf: &mut [u8],
        at: FileOffset,
    ) -> Result<(), ReadError> {
        let read = self.images[depth].storage.read_exact_at(buf, at);
        read.map_err(|source| ReadError { at, source })
    }

    /// Reads a range into `buf`, which must have its length.
    ///
    /// # Errors
    /// If the host cannot read the file.
    ///
    /// # Panics
    /// If `buf` has another length than the range.
    pub fn read_at(&self, range: SectorRange, buf: &mut [u8]) -> Result<(), ReadError> {
        assert_eq!(
            buf.len() as u64,
            range.len_bytes(),
            "the buffer has the range's length"
        );
        let mut rest = buf;
        let visit = self.lane.enter();
        for extent in self.map(range, &visit) {
            let len = usize::try_from(extent.len_bytes).expect("an extent is inside the buffer");
            let (piece, behind) = rest.split_at_mut(len);
            match extent.source {
                Source::Unallocated | Source::Zero { .. } => piece.fill(0),
                Source::Stored { depth, at } => self.read_image(depth, piece, at)?,
            }
            rest = behind;
        }
        Ok(())
    }

    /// Writes `buf`, which must have the range's length, and does what chores that needs.
    ///
    /// # Errors
    /// See [`WriteError`].
    ///
    /// # Panics
    /// If `buf` has another length than the range.
    pub fn write_at(self: &Arc<Self>, range: SectorRange, buf: &[u8]) -> Result<(), WriteError> {
        assert_eq!(
            buf.len() as u64,
            range.len_bytes(),
            "the buffer has the range's length"
        );
        let reservation = self.blocking(|waker| self.reserve(range, &self.lane, waker))?;
        let mut rest = buf;
        for extent in reservation.extents() {
            let len = usize::try_from(extent.len_bytes).expect("an extent is inside the buffer");
            let (piece, behind) = rest.split_at(len);
            self.top()
                .storage
                .write_all_at(piece, extent.at)
                .map_err(|source| WriteError::Data { source })?;
            rest = behind;
        }
        self.finish_blocking(reservation)
    }

    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// See [`WriteError`].
    pub fn zero_at(self: &Arc<Self>, range: SectorRange, how: Zeroing) -> Result<(), WriteError> {
        let reservation =
            self.blocking(|waker| self.reserve_zeros(range, how, &self.lane, waker))?;
        for extent in reservation.zeros() {
            let storage = &self.top().storage;
            let zeroed = if reservation.keeps_space() {
                storage.zero(extent.at, extent.len_bytes)
            } else {
                storage.punch(extent.at, extent.len_bytes)
            };
            zeroed.map_err(|source| WriteError::Data { source })?;
        }
        self.finish_blocking(reservation)
    }

    /// Asks until it is not parked any more, and does the chores meanwhile.
    fn blocking(
        &self,
        ask: impl Fn(&Waker) -> Result<Reserve, WriteError>,
    ) -> Result<Reservation, WriteError> {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        loop {
            match ask(&waker)? {
                Reserve::Ready(reservation) => return Ok(reservation),
                Reserve::Parked => match self.do_chores() {
                    Ok(true) => {}
                    Ok(false) => std::thread::park(),
                    // Told by the next attempt, to whom it concerns.
                    Err(WriteError::NoSpace { .. }) => {}
                    Err(error) => return Err(error),
                },
            }
        }
    }

    fn finish_blocking(&self, reservation: Reservation) -> Result<(), WriteError> {
        self.fill_from_parents(&reservation)?;
        let mut written = vec![reservation];
        if written[0].needs_sync() {
            let flush = self.begin_data_sync();
            self.end_data_sync(flush, self.top().storage.sync(), &mut written)?;
        }
        self.commit(&mut written)
    }

    /// Copies what a reservation wants from the parents.
    pub(crate) fn fill_from_parents(&self, reservation: &Reservation) -> Result<(), WriteError> {
        let mut buf = Vec::new();
        for fill in reservation.fills() {
            let len = usize::try_from(fill.len_bytes).expect("a block fits in memory");
            buf.resize(len, 0);
            let from = &self.images[fill.depth].storage;
            let copied = from
                .read_exact_at(&mut buf, fill.from)
                .and_then(|()| self.top().storage.write_all_at(&buf, fill.to));
            copied.map_err(|source| WriteError::Data { source })?;
        }
        Ok(())
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// If the sync fails; the disk then refuses further writes (W5).
    pub fn flush(&self) -> Result<(), WriteError> {
        match self.begin_flush()? {
            None => Ok(()),
            Some(flush) => self.end_flush(flush, self.top().storage.sync()),
        }
    }
}

/// A thread that waits for its turn.
pub(crate) struct Unpark(pub(crate) Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The image that a disk's changes go to, and what it takes to change it.
fn open_top(
    storage: Arc<dyn Storage>,
    access: Access,
) -> Result<(Image, Option<Writer>), OpenError> {
    let (image, owners) = Image::open(storage, access)?;
    let writer = match access {
        Access::Writable => Some(Writer::new(&image, &owners)?),
        Access::ReadOnly => None,
    };
    Ok((image, writer))
}

/// A run of bytes with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How long it is, a multiple of 512.
    pub len_bytes: u64,
    /// Where its bytes are.
    pub source: Source,
}

/// Where an extent's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: no image has it, so it reads as zeros.
    Unallocated,
    /// Nowhere: written as zeros in the image of this depth.
    Zero {
        /// 0 for the top image, 1 for its parent, and so on.
        depth: usize,
    },
    /// In the file of the image of this depth.
    Stored {
        /// 0 for the top image, 1 for its parent, and so on.
        depth: usize,
        /// The first byte.
        at: FileOffset,
    },
}

/// The extents of a range, found as they are asked for.
#[derive(Debug)]
pub struct Extents<'d> {
    images: &'d [Arc<Image>],
    at: u64,
    end: u64,
    /// The start of the extent to give next, if the map was read that far.
    next: Option<Extent>,
}

impl<'d> Extents<'d> {
    /// What these images have of a range, the first one in front of the others.
    pub(crate) const fn over(images: &'d [Arc<Image>], range: SectorRange) -> Self {
        Self {
            images,
            at: range.start_bytes(),
            end: range.end_bytes(),
            next: None,
        }
    }

    /// The same, cut at the ends of blocks: for those who add it up.
    pub(crate) fn in_pieces(mut self) -> impl Iterator<Item = Extent> {
        std::iter::from_fn(move || self.step())
    }

    /// The longest run from here that every image answers as one.
    ///
    /// The first image that has something counts. A parent that is smaller than its child
    /// has nothing beyond its end.
    fn step(&mut self) -> Option<Extent> {
        if self.at >= self.end {
            return None;
        }
        let mut len_bytes = self.end - self.at;
        let mut source = Source::Unallocated;
        for (depth, image) in self.images.iter().enumerate() {
            let Some(span) = image.span(self.at, len_bytes) else {
                break;
            };
            len_bytes = span.len_bytes;
            source = match image.locate(span) {
                Place::Unallocated => continue,
                Place::Zero => Source::Zero { depth },
                Place::Stored(at) => Source::Stored { depth, at },
            };
            break;
        }
        self.at += len_bytes;
        Some(Extent { len_bytes, source })
    }
}

impl Iterator for Extents<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        let mut extent = self.next.take().or_else(|| self.step())?;
        while let Some(behind) = self.step() {
            if !extent.source.goes_on_as(extent.len_bytes, behind.source) {
                self.next = Some(behind);
                break;
            }
            extent.len_bytes += behind.len_bytes;
        }
        Some(extent)
    }
}

impl Source {
    /// Whether `behind` is where this goes on after `len_bytes`.
    fn goes_on_as(self, len_bytes: u64, behind: Self) -> bool {
        match (self, behind) {
            (Self::Unallocated, Self::Unallocated) => true,
            (Self::Zero { depth }, Self::Zero { depth: next }) => depth == next,
            (
                Self::Stored { depth, at },
                Self::Stored {
                    depth: next,
                    at: next_at,
                },
            ) => depth == next && at.plus(len_bytes) == next_at,
            (Self::Unallocated | Self::Zero { .. } | Self::Stored { .. }, _) => false,
        }
    }
}

/// A child and its parent know each other by UUID; VirtualBox never looks at the second one.
/// The host could not read what the map names.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the image's file at {at}")]
pub struct ReadError {
    /// Where the extent begins.
    pub at: FileOffset,
    /// The host's error.
    pub source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::{CreateOptions, NewKind, create};
    use crate::storage::{HostFile, Locking};
    use crate::units::Sector;

    fn open(path: &std::path::Path) -> Arc<Disk> {
        let file = HostFile::open(path, Access::Writable, Locking::Locked).unwrap();
        Arc::new(Disk::open(Arc::new(file), Access::Writable).unwrap())
    }

    #[test]
    fn what_is_written_is_read_before_and_after_a_clean_close() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.vdi");
        let options = CreateOptions {
            capacity_bytes: 5 << 20,
            block_size: 1 << 20,
            kind: NewKind::Dynamic,
            uuid: None,
        };
        create(&path, &options).unwrap();
        let mut expected = vec![0; 5 << 20];
        {
            let disk = open(&path);
            let range = disk.capacity().range(Sector(2047), 2050).unwrap();
            let data = vec![7; 2050 * 512];
            disk.write_at(range, &data).unwrap();
            expected[2047 * 512..][..data.len()].copy_from_slice(&data);
            let mut found = vec![1; 5 << 20];
            disk.read_at(disk.capacity().whole(), &mut found).unwrap();
            assert!(found == expected);
            disk.close().unwrap();
            assert!(matches!(
                disk.write_at(range, &data),
                Err(WriteError::Closed)
            ));
        }
        let disk = open(&path);
        assert_eq!(disk.header().blocks_allocated(), 3);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), (2 + 3) << 20);
        let mut found = vec![1; 5 << 20];
        disk.read_at(disk.capacity().whole(), &mut found).unwrap();
        assert!(found == expected);
        let extents: Vec<_> = disk
            .map(disk.capacity().whole(), &disk.lane().enter())
            .map(|extent| (extent.len_bytes, extent.source))
            .collect();
        let stored = Source::Stored {
            depth: 0,
            at: FileOffset(2 << 20),
        };
        assert_eq!(extents, [(3 << 20, stored), (2 << 20, Source::Unallocated)]);
    }

    /// A new image of 4 blocks of 1 MiB.
    fn image(dir: &std::path::Path, name: &str, kind: NewKind) -> std::path::PathBuf {
        let path = dir.join(name);
        let options = CreateOptions {
            capacity_bytes: 4 << 20,
            block_size: 1 << 20,
            kind,
            uuid: None,
        };
        create(&path, &options).unwrap();
        path
    }

    fn chain(paths: &[&std::path::Path]) -> Arc<Disk> {
        let accesses = std::iter::once(Access::Writable).chain(std::iter::repeat(Access::ReadOnly));
        let files = paths
            .iter()
            .zip(accesses)
            .map(|(path, access)| -> Arc<dyn Storage> {
                Arc::new(HostFile::open(path, access, Locking::Locked).unwrap())
            });
        let disk = Disk::open_chain(files.collect(), Access::Writable, ModifiedParent::Refuse);
        Arc::new(disk.unwrap())
    }

    fn contents(disk: &Disk) -> Vec<u8> {
        let mut found = vec![1; usize::try_from(disk.capacity().bytes()).unwrap()];
        disk.read_at(disk.capacity().whole(), &mut found).unwrap();
        found
    }

    #[test]
    fn a_write_over_a_parents_data_keeps_the_rest_of_the_block() {
        let dir = tempfile::tempdir().unwrap();
        let base = image(dir.path(), "base.vdi", NewKind::Dynamic);
        let parent = open(&base);
        let range =
            |disk: &Disk, start, count| disk.capacity().range(Sector(start), count).unwrap();
        parent
            .write_at(range(&parent, 0, 4096), &[5; 2 << 20])
            .unwrap();
        parent.close().unwrap();
        drop(parent);
        let link = open(&base).header().as_parent();
        let child = image(dir.path(), "child.vdi", NewKind::Differencing(link));
        let disk = chain(&[&child, &base]);
        let mut expected = vec![0; 4 << 20];
        expected[..2 << 20].fill(5);
        assert!(contents(&disk) == expected);
        // Over data, over nothing, and across both.
        for (start, count, byte) in [(3, 2, 7_u8), (6000, 10, 8), (4090, 12, 9)] {
            let data = vec![byte; count * 512];
            disk.write_at(range(&disk, start, count as u64), &data)
                .unwrap();
            expected[usize::try_from(start).unwrap() * 512..][..data.len()].copy_from_slice(&data);
        }
        assert!(contents(&disk) == expected);
        // Zeros hide the parent, wholly and in part.
        disk.zero_at(range(&disk, 0, 2048), Zeroing::Release)
            .unwrap();
        expected[..1 << 20].fill(0);
        disk.zero_at(range(&disk, 2100, 5), Zeroing::Release)
            .unwrap();
        expected[2100 * 512..2105 * 512].fill(0);
        assert!(contents(&disk) == expected);
        disk.close().unwrap();
        drop(disk);
        let disk = chain(&[&child, &base]);
        assert!(contents(&disk) == expected);
        assert_eq!(disk.header().blocks_allocated(), 2);
    }

    #[test]
    fn released_blocks_are_used_again_once_nobody_looks_at_them() {
        let dir = tempfile::tempdir().unwrap();
        let disk = open(&image(dir.path(), "a.vdi", NewKind::Dynamic));
        let whole = disk.capacity().whole();
        let visitor = disk.lane();
        for round in 1..20 {
            disk.write_at(whole, &vec![round; 4 << 20]).unwrap();
            let visit = visitor.enter();
            disk.zero_at(whole, Zeroing::Discard).unwrap();
            // The visit ends only now: what it knows was not given away before.
            drop(visit);
            assert!(contents(&disk).iter().all(|&byte| byte == 0));
        }
        disk.write_at(whole, &vec![99; 4 << 20]).unwrap();
        disk.close().unwrap();
        assert_eq!(
            std::fs::metadata(dir.path().join("a.vdi")).unwrap().len(),
            6 << 20
        );
    }

    /// A request asks for room, finds some of its blocks written by another when it asks again, and needs less.
    #[test]
    fn that_there_was_no_room_for_one_is_not_told_to_another_later() {
        let dir = tempfile::tempdir().unwrap();
        let disk = open(&image(dir.path(), "a.vdi", NewKind::Dynamic));
        let block = |nth: u64| disk.capacity().range(Sector(nth * 2048), 2048).unwrap();
        let data = vec![1; 1 << 20];
        disk.write_at(block(0), &data).unwrap();
        let state = || crate::writer::lock(&disk.writer.as_ref().unwrap().state);
        state().wants_blocks = 4;
        assert!(disk.do_chores().unwrap(), "three are left");
        assert!(state().no_room.is_some());
        for nth in 1..4 {
            disk.write_at(block(nth), &data).unwrap();
        }
        let lane = disk.lane();
        let visit = lane.enter();
        disk.zero_at(block(3), Zeroing::Discard).unwrap();
        while disk.do_chores().unwrap() {}
        let asked = disk.reserve(block(3), &lane, Waker::noop());
        assert!(matches!(asked, Ok(Reserve::Parked)), "{asked:?}");
        drop(visit);
        disk.write_at(block(3), &data).unwrap();
    }

    #[test]
    fn disks_over_one_parent_share_what_is_known_of_it_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let base = image(dir.path(), "base.vdi", NewKind::Dynamic);
        {
            let disk = chain(&[&base]);
            disk.write_at(disk.capacity().range(Sector(0), 1).unwrap(), &[7; 512])
                .unwrap();
            disk.close().unwrap();
        }
        let file = HostFile::open(&base, Access::ReadOnly, Locking::Locked).unwrap();
        let parent = Arc::new(Image::examine(Arc::new(file)).unwrap());
        let parents = [parent];
        let open = |name: &str| {
            let path = dir.path().join(name);
            crate::create_child(&path, parents[0].header(), 1 << 20, None).unwrap();
            let file = HostFile::open(&path, Access::Writable, Locking::Locked).unwrap();
            let (access, modified) = (Access::Writable, ModifiedParent::Refuse);
            Arc::new(Disk::open_over(Arc::new(file), access, &parents, modified).unwrap())
        };
        let (one, other) = (open("one.vdi"), open("other.vdi"));
        assert!(Arc::ptr_eq(&one.images()[1], &other.images()[1]));
        let second = one.capacity().range(Sector(1), 1).unwrap();
        one.write_at(second, &[9; 512]).unwrap();
        assert_eq!(contents(&one)[..1024], [[7; 512], [9; 512]].concat());
        assert_eq!(contents(&other)[..1024], [[7; 512], [0; 512]].concat());
    }
}
