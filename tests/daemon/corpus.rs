//! The corpus of real images, served by the daemon and read by a front end, to the sums that VirtualBox gave.
//!
//! Every image of every case, with its parents beside it. What the library and the tool make of them is in `tests/corpus.rs`.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use vdi_core::{Access, ChainOptions, Disk, Locking, ModifiedParent, Source, Storage, find_chain};
use vdi_tests::corpus::{CorpusImage, corpus, sha256_of_file};
use vdi_tests::driver::{Driver, Options};
use vdi_tests::image::MIB;
use vdi_tests::server::{Launch, scratch};
use vdi_tests::tool::settle;

/// Of a disk that is too large to be read, every so many MiB are read though nothing is there.
const SAMPLED: u64 = 9973;

/// Which MiB of the disk have something stored.
struct Stored(Disk);

impl Stored {
    fn of(path: &Path) -> Self {
        settle();
        let options = ChainOptions {
            parents: Vec::new(),
            image_dirs: Vec::new(),
            locking: Locking::ForceShare,
            seen: Arc::default(),
        };
        let files = find_chain(path, Access::ReadOnly, &options).unwrap();
        let storages = files
            .into_iter()
            .map(|file| Arc::new(file) as Arc<dyn Storage>);
        let disk = Disk::open_chain(storages.collect(), Access::ReadOnly, ModifiedParent::Refuse);
        Self(disk.unwrap())
    }

    fn is_in(&self, mib: u64) -> bool {
        let capacity = self.0.capacity();
        let end = capacity.bytes().min((mib + 1) * MIB);
        let range = capacity.range_of_bytes(mib * MIB..end).unwrap();
        let visit = self.0.lane().enter();
        let mut extents = self.0.map(range, &visit);
        extents.any(|extent| matches!(extent.source, Source::Stored { .. }))
    }
}

/// Serves an image and its parents, and reads it.
fn serve(name: &str, image: &CorpusImage, path: &Path, read: impl FnOnce(&mut Driver)) {
    let sums = |directory: &Path| -> Vec<_> {
        let files = fs::read_dir(directory)
            .unwrap()
            .map(|file| file.unwrap().path());
        files.map(|path| (sha256_of_file(&path), path)).collect()
    };
    let directory = path.parent().unwrap();
    let before = sums(directory);
    let server = Launch::image(path).start();
    let mut driver = server.driver(&Options::new());
    let capacity = driver.config().unwrap().capacity_sectors;
    assert_eq!(capacity * 512, image.virtual_size, "{name}");
    read(&mut driver);
    drop(driver);
    let exit = server.terminate();
    assert_eq!(exit.code, Some(0), "{name}: {}", exit.log);
    assert_eq!(sums(directory), before, "{name}: reading changed a file");
}

#[test]
fn every_image_of_the_corpus_is_served_to_its_sums() {
    let mut count = 0;
    for case in corpus() {
        for (depth, image) in case.images.iter().enumerate() {
            let directory = scratch();
            for parent in &case.images[..depth] {
                parent.unpack(directory.path());
            }
            let path = image.unpack(directory.path());
            let name = format!("{}/{}", case.name, image.file);
            let stored = Stored::of(&path);
            serve(&name, image, &path, |driver| {
                let read = |at: u64, buf: &mut [u8]| {
                    let len = u32::try_from(buf.len()).unwrap();
                    buf.copy_from_slice(&driver.read(at / 512, len));
                };
                let may_have_data = |mib: u64| mib.is_multiple_of(SAMPLED) || stored.is_in(mib);
                case.contents_of(image).verify(&name, read, may_have_data);
            });
            count += 1;
        }
    }
    assert_eq!(count, 55, "33 images alone and 10 chains of 22");
}
