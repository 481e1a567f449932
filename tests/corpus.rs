//! The corpus of real images, made by VirtualBox and QEMU, against the library and the tool.
//!
//! Every image of every case, alone or with its parents beside it.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests fail the test as the tests do"
)]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use tempfile::TempDir;
use vdi_core::{
    Access, ChainOptions, Disk, Locking, ModifiedParent, OpenError, Sector, Source, Storage,
    find_chain,
};
use vdi_tests::corpus::{Contents, CorpusImage, Entry, corpus, sha256_of_file};
use vdi_tests::image::MIB;
use vdi_tests::tool::{settle, vdi};
use vdi_tests::words;

/// Calls `test` with every image, unpacked with its parents beside it.
fn covered(mut test: impl FnMut(&str, &CorpusImage, &Contents, &Path)) {
    let mut count = 0;
    for case in corpus() {
        for (depth, image) in case.images.iter().enumerate() {
            let directory = scratch();
            for parent in &case.images[..depth] {
                parent.unpack(directory.path());
            }
            let path = image.unpack(directory.path());
            let name = format!("{}/{}", case.name, image.file);
            test(&name, image, case.contents_of(image), &path);
            count += 1;
        }
    }
    assert_eq!(count, 55, "33 images alone and 10 chains of 22");
}

fn scratch() -> TempDir {
    tempfile::tempdir().expect("there is room for temporary files")
}

fn open(path: &Path, access: Access) -> Result<Arc<Disk>, OpenError> {
    settle();
    let options = ChainOptions {
        parents: Vec::new(),
        image_dirs: Vec::new(),
        locking: Locking::Locked,
        seen: Arc::default(),
    };
    let files = find_chain(path, access, &options).expect("the parents are beside it");
    let storages = files
        .into_iter()
        .map(|file| Arc::new(file) as Arc<dyn Storage>);
    Disk::open_chain(storages.collect(), access, ModifiedParent::Refuse).map(Arc::new)
}

fn read(disk: &Disk, at_bytes: u64, buf: &mut [u8]) {
    let at = at_bytes..at_bytes + buf.len() as u64;
    disk.read_at(disk.capacity().range_of_bytes(at).unwrap(), buf)
        .unwrap();
}

/// Whether the map has something stored in this MiB of the disk.
fn has_data(disk: &Disk, mib: u64) -> bool {
    let end = disk.capacity().bytes().min((mib + 1) * MIB);
    let range = disk.capacity().range_of_bytes(mib * MIB..end).unwrap();
    disk.map(range, &disk.lane().enter())
        .any(|extent| matches!(extent.source, Source::Stored { .. }))
}

fn verify(name: &str, contents: &Contents, disk: &Disk) {
    contents.verify(
        name,
        |at, buf| read(disk, at, buf),
        |mib| has_data(disk, mib),
    );
}

#[test]
fn every_image_reads_to_its_sums() {
    covered(|name, image, contents, path| {
        let disk = open(path, Access::ReadOnly).unwrap();
        assert_eq!(disk.capacity().bytes(), image.virtual_size, "{name}");
        verify(name, contents, &disk);
    });
}

#[test]
fn every_image_is_exported_to_its_sums() {
    covered(|name, image, contents, path| {
        let raw_path = path.with_extension("raw");
        vdi(words!["convert", "-O", "raw", path, raw_path]).expect_code(0);
        let raw = fs::File::open(&raw_path).unwrap();
        let metadata = raw.metadata().unwrap();
        assert_eq!(metadata.len(), image.virtual_size, "{name}");
        contents.verify(
            name,
            |at, buf| raw.read_exact_at(buf, at).unwrap(),
            |_| false,
        );
        // No data lie elsewhere: what is not zero takes all the space there is.
        let most = contents.nonzero_mib.len() as u64 * MIB + (64 << 10);
        assert!(
            metadata.blocks() * 512 <= most,
            "{name}: {} bytes used",
            metadata.blocks() * 512
        );
    });
}

#[test]
fn every_image_survives_the_way_to_fixed_and_back() {
    covered(|name, image, contents, path| {
        if image.virtual_size > 256 * MIB {
            return;
        }
        let (fixed, dynamic) = (path.with_extension("fixed"), path.with_extension("dynamic"));
        vdi(words!["convert", "-O", "vdi", "--fixed", path, fixed]).expect_code(0);
        vdi(words![
            "convert",
            "-O",
            "vdi",
            "--block-size",
            "256k",
            fixed,
            dynamic
        ])
        .expect_code(0);
        for copy in [&fixed, &dynamic] {
            vdi(words!["check", copy]).expect_code(0);
            verify(name, contents, &open(copy, Access::ReadOnly).unwrap());
        }
    });
}

#[test]
fn every_image_can_be_written_and_the_rest_of_it_stays() {
    covered(|name, _, contents, path| {
        let last = open(path, Access::ReadOnly).unwrap().capacity().sectors() - 1;
        let mut before = Vec::new();
        {
            let disk = open(path, Access::Writable).unwrap();
            for sector in [0, last] {
                let range = disk.capacity().range(Sector(sector), 1).unwrap();
                let mut old = vec![0; 512];
                disk.read_at(range, &mut old).unwrap();
                before.push((range, old));
                disk.write_at(range, &[0x5A; 512]).unwrap();
            }
            disk.close().unwrap();
        }
        let disk = open(path, Access::Writable).unwrap();
        for (range, old) in before {
            let mut found = vec![0; 512];
            disk.read_at(range, &mut found).unwrap();
            assert_eq!(found, [0x5A; 512], "{name}");
            // Put back what was there: now all sums must be right again.
            disk.write_at(range, &old).unwrap();
        }
        disk.close().unwrap();
        drop(disk);
        verify(name, contents, &open(path, Access::ReadOnly).unwrap());
        let checked = vdi(words!["check", "--json", path]);
        assert_eq!(checked.json()["corruptions"], 0, "{name}: {checked:#?}");
    });
}

#[test]
fn info_says_what_the_makers_said() {
    covered(|name, image, _, path| {
        let info = vdi(words!["info", "--json", path]).expect_code(0).json();
        assert_eq!(info["virtual-size"], image.virtual_size, "{name}");
        assert_eq!(info["format"], "vdi");
        let data = &info["format-specific"]["data"];
        assert_eq!(data["file-length"], image.file_size, "{name}");
        let blocks = &data["blocks"];
        assert_eq!(blocks["allocated"], image.map.allocated, "{name}");
        assert_eq!(blocks["zero"], image.map.zero, "{name}");
        assert_eq!(blocks["unallocated"], image.map.free, "{name}");
        let expected = serde_json::json!({
            "version": image.version,
            "header-size": image.header_size,
            "image-type": image.image_type,
            "image-flags": image.image_flags,
            "offset-bmap": image.offset_bmap,
            "offset-data": image.offset_data,
            "disk-size": image.disk_size_field,
            "block-size": image.block_size,
            "block-extra": image.block_extra,
            "blocks-in-image": image.blocks_in_image,
            "blocks-allocated": image.blocks_allocated,
            "uuid-image": image.uuid_image,
            "uuid-modify": image.uuid_modify,
            "uuid-parent": image.uuid_parent,
            "uuid-parent-modify": image.uuid_parent_modify,
        });
        assert_eq!(data["header"], expected, "{name}");
    });
}

#[test]
fn map_says_what_the_makers_said() {
    let mut compared = 0;
    covered(|name, image, _, path| {
        let Some(entries) = &image.map_entries else {
            return;
        };
        if image.image_type == 4 {
            return; // Its map shows its parents, too.
        }
        let map = vdi(words!["map", "--json", path]).expect_code(0).json();
        let extents = map.as_array().unwrap();
        let found = |at: u64| extent_at(extents, at);
        for (index, entry) in (0..).zip(entries) {
            let at = index * u64::from(image.block_size);
            let (present, stored) = match entry {
                Entry::Marker(state) => (state == "ZERO", None),
                Entry::Block(block) => (true, Some(offset_of(image, *block))),
            };
            let (extent, into) = found(at);
            assert_eq!(extent["present"], present, "{name}: block {index}");
            assert_eq!(extent["data"], stored.is_some(), "{name}: block {index}");
            assert_eq!(
                extent["offset"].as_u64().map(|offset| offset + into),
                stored,
                "{name}: block {index}"
            );
            compared += 1;
        }
        let end = extents
            .last()
            .map(|last| last["start"].as_u64().unwrap() + last["length"].as_u64().unwrap());
        assert_eq!(end, Some(image.virtual_size), "{name}");
    });
    assert!(compared > 200, "{compared} entries");
}

/// The extent with the byte `at` in it, and how far in it that is.
fn extent_at(extents: &[Value], at: u64) -> (&Value, u64) {
    let start = |extent: &Value| extent["start"].as_u64().unwrap();
    let index = extents.partition_point(|extent| start(extent) <= at) - 1;
    (&extents[index], at - start(&extents[index]))
}

fn offset_of(image: &CorpusImage, block: u32) -> u64 {
    let stride = u64::from(image.block_extra) + u64::from(image.block_size);
    u64::from(image.offset_data) + u64::from(block) * stride + u64::from(image.block_extra)
}

#[test]
fn nothing_that_only_reads_changes_a_byte() {
    covered(|name, image, _, path| {
        let touched = || {
            let metadata = fs::metadata(path).unwrap();
            (
                metadata.modified().unwrap(),
                metadata.ctime(),
                metadata.ctime_nsec(),
                metadata.len(),
            )
        };
        let before = touched();
        drop(open(path, Access::ReadOnly));
        vdi(words!["info", path]);
        vdi(words!["info", "--json", "--backing-chain", "-U", path]);
        vdi(words!["check", path]);
        vdi(words!["check", "--json", path]);
        vdi(words!["map", path]);
        vdi(words!["map", "--json", path]);
        let raw = path.with_extension("raw");
        vdi(words!["convert", "-O", "raw", path, raw]);
        assert_eq!(touched(), before, "{name}");
        assert_eq!(sha256_of_file(path), image.sha256, "{name}");
    });
}

/// What the check says of images that are not as tidy as the others.
#[test]
fn check_finds_no_corruption_in_what_virtualbox_and_qemu_made() {
    let untidy = [
        ("leaked-block", "leaked-blocks", 3),
        ("trailing-bytes", "trailing-bytes", 3),
        ("unaligned-disk-size", "odd-disk-size", 0),
    ];
    for case in corpus() {
        for image in &case.images {
            let directory = scratch();
            let path = image.unpack(directory.path());
            let (mut kinds, code) = match untidy.iter().find(|(name, ..)| *name == case.name) {
                Some((_, kind, code)) => (vec![*kind], *code),
                None => (vec![], 0),
            };
            if image.file != case.images[0].file {
                // It was unpacked alone.
                kinds.push("parent-missing");
            }
            let report = vdi(words!["check", "--json", path])
                .expect_code(code)
                .json();
            let found: Vec<_> = report["findings"]
                .as_array()
                .unwrap()
                .iter()
                .map(|finding| finding["kind"].as_str().unwrap())
                .collect();
            assert_eq!(found, kinds, "{}/{}", case.name, image.file);
            assert_eq!(
                report["allocated-clusters"], image.map.allocated,
                "{}",
                case.name
            );
        }
    }
}
