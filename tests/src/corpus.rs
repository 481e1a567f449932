//! The corpus: real images by VirtualBox and QEMU, and the sums of what they hold.
//!
//! Nothing here uses `vdi-core`: what a test compares with must not come from what it tests.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::image::MIB;

/// A case of the corpus: an image, or a chain of them.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of data/manifest.json")]
pub struct Case {
    pub name: String,
    pub kind: String,
    pub images: Vec<CorpusImage>,
    pub contents: Vec<Contents>,
    pub qemu_10_0: String,
}

/// An image of the corpus, as its makers describe it.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of data/manifest.json")]
pub struct CorpusImage {
    pub file: String,
    pub archive: String,
    pub sha256: String,
    pub file_size: u64,
    pub version: String,
    pub header_size: u32,
    pub image_type: u32,
    pub image_flags: u32,
    pub disk_size_field: u64,
    pub virtual_size: u64,
    pub block_size: u32,
    pub block_extra: u32,
    pub blocks_in_image: u32,
    pub blocks_allocated: u32,
    pub offset_bmap: u32,
    pub offset_data: u32,
    pub uuid_image: String,
    pub uuid_modify: String,
    pub uuid_parent: String,
    pub uuid_parent_modify: String,
    pub map: MapCounts,
    pub map_entries: Option<Vec<Entry>>,
}

/// How many entries of each state a map has.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of data/manifest.json")]
pub struct MapCounts {
    pub allocated: u64,
    pub zero: u64,
    pub free: u64,
}

/// A map entry.
#[derive(Debug, Deserialize, Clone, PartialEq, Eq)]
#[serde(untagged)]
pub enum Entry {
    /// A file block.
    Block(u32),
    /// `FREE` or `ZERO`.
    Marker(String),
}

/// What the disk of an image and its parents holds.
#[derive(Debug, Deserialize)]
#[expect(missing_docs, reason = "the fields are those of data/manifest.json")]
pub struct Contents {
    pub upto: String,
    pub virtual_size: u64,
    pub nonzero_mib: Vec<(u64, String)>,
    pub sha256: Option<String>,
}

/// All cases of the corpus.
///
/// # Panics
/// If the manifest is not there or not as it should be.
pub fn corpus() -> Vec<Case> {
    #[derive(Deserialize)]
    struct Manifest {
        cases: Vec<Case>,
    }
    let text = fs::read_to_string(data().join("manifest.json"))
        .expect("the manifest is in the repository");
    let manifest: Manifest = serde_json::from_str(&text).expect("the manifest is JSON");
    manifest.cases
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data")
}

impl Case {
    /// What is at the end of the chain.
    pub fn leaf(&self) -> &CorpusImage {
        self.images.last().expect("a chain has images")
    }

    /// The sums of the disk that ends with `image`.
    pub fn contents_of(&self, image: &CorpusImage) -> &Contents {
        self.contents
            .iter()
            .find(|contents| contents.upto == image.file)
            .expect("every image has contents")
    }
}

impl CorpusImage {
    /// Unpacks the image into a directory, with holes where it has zeros.
    ///
    /// # Panics
    /// If the archive is damaged.
    pub fn unpack(&self, directory: &Path) -> PathBuf {
        let path = directory.join(&self.file);
        let archive =
            File::open(data().join(&self.archive)).expect("the archive is in the repository");
        let mut source = zstd::Decoder::new(archive).expect("it is a zstd archive");
        let mut file = File::create(&path).expect("the directory is ours");
        let mut step = vec![0; 64 << 10];
        let mut len_bytes = 0;
        loop {
            let count = fill(&mut source, &mut step);
            if step[..count].iter().any(|&byte| byte != 0) {
                file.seek(SeekFrom::Start(len_bytes)).expect("it is a file");
                file.write_all(&step[..count]).expect("there is room");
            }
            len_bytes += count as u64;
            if count < step.len() {
                break;
            }
        }
        file.set_len(len_bytes).expect("there is room");
        assert_eq!(len_bytes, self.file_size, "{}", self.archive);
        path
    }
}

/// Reads until `buf` is full or nothing is left; tells how much was read.
fn fill(source: &mut impl Read, buf: &mut [u8]) -> usize {
    let mut count = 0;
    while count < buf.len() {
        match source
            .read(&mut buf[count..])
            .expect("the archive is sound")
        {
            0 => break,
            more => count += more,
        }
    }
    count
}

/// The SHA-256 of some bytes as text.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// The SHA-256 of a file as text.
///
/// # Panics
/// If it cannot be read.
pub fn sha256_of_file(path: &Path) -> String {
    let mut file = File::open(path).expect("the file is there");
    let mut hash = Sha256::new();
    let mut step = vec![0; 1 << 20];
    loop {
        let count = fill(&mut file, &mut step);
        hash.update(&step[..count]);
        if count < step.len() {
            return hex(&hash.finalize());
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Contents {
    /// Compares a disk with the sums. `read` fills a buffer from a position; `may_have_data`
    /// tells whether a step of 1 MiB need be read at all, for disks too large to read.
    ///
    /// # Panics
    /// If the disk differs.
    pub fn verify(
        &self,
        name: &str,
        mut read: impl FnMut(u64, &mut [u8]),
        mut may_have_data: impl FnMut(u64) -> bool,
    ) {
        let mut whole = Sha256::new();
        let mut sums = self.nonzero_mib.iter().peekable();
        let mut buf = vec![0; usize::try_from(MIB).expect("1 MiB")];
        for index in 0..self.virtual_size.div_ceil(MIB) {
            let sum = sums.next_if(|(of, _)| *of == index).map(|(_, sum)| sum);
            if self.sha256.is_none() && sum.is_none() && !may_have_data(index) {
                continue;
            }
            let len = usize::try_from(MIB.min(self.virtual_size - index * MIB)).expect("1 MiB");
            let step = &mut buf[..len];
            step.fill(0xEE);
            read(index * MIB, step);
            match sum {
                Some(sum) => assert_eq!(&sha256(step), sum, "{name}: MiB {index}"),
                None => assert!(
                    step.iter().all(|&byte| byte == 0),
                    "{name}: MiB {index} must be zeros"
                ),
            }
            if self.sha256.is_some() {
                whole.update(&*step);
            }
        }
        assert_eq!(sums.next(), None, "{name}: all sums were used");
        if let Some(sum) = &self.sha256 {
            assert_eq!(&hex(&whole.finalize()), sum, "{name}");
        }
    }
}
