//! The verbs on the corpus's chains, compared with the sums that came with them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use vdi_tests::corpus::{Case, Contents, corpus};
use vdi_tests::image::MIB;
use vdi_tests::tool::{qemu_img, vdi};
use vdi_tests::words;

/// A case's images in a directory of their own, the base first.
pub(crate) struct Chain {
    pub(crate) case: Case,
    pub(crate) directory: TempDir,
    pub(crate) images: Vec<PathBuf>,
}

impl Chain {
    pub(crate) fn unpack(case: Case) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let unpacked = case
            .images
            .iter()
            .map(|image| image.unpack(directory.path()));
        Self {
            images: unpacked.collect(),
            case,
            directory,
        }
    }

    pub(crate) fn named(name: &str) -> Self {
        let found = corpus().into_iter().find(|case| case.name == name);
        Self::unpack(found.unwrap())
    }

    pub(crate) fn child(&self) -> &Path {
        self.images.last().unwrap()
    }

    pub(crate) fn parent(&self) -> &Path {
        &self.images[self.images.len() - 2]
    }

    pub(crate) fn contents(&self) -> &Contents {
        self.case.contents_of(self.case.leaf())
    }

    pub(crate) fn verify_child(&self) {
        self.verify(self.child(), self.contents());
    }

    /// Whether an image reads as these sums say, perhaps with zeros behind.
    pub(crate) fn verify(&self, image: &Path, contents: &Contents) {
        let raw = self.directory.path().join("found.raw");
        vdi(words!["convert", "-q", "--force", "-O", "raw", image, raw]).expect_code(0);
        let file = File::open(&raw).unwrap();
        assert!(file.metadata().unwrap().len() >= contents.virtual_size);
        let read = |at, buf: &mut [u8]| file.read_exact_at(buf, at).unwrap();
        contents.verify(&self.case.name, read, |_| true);
        fs::remove_file(raw).unwrap();
    }
}

pub(crate) fn chains() -> impl Iterator<Item = Chain> {
    let cases = corpus().into_iter().filter(|case| case.images.len() > 1);
    cases.map(Chain::unpack)
}

#[test]
fn a_merged_child_reads_as_before_and_so_does_its_parent() {
    let mut count = 0;
    for chain in chains() {
        let size_before = size_of(chain.parent());
        let said = vdi(words!["commit", chain.child()]).expect_code(0).out;
        let changed = !said.contains(": 0 blocks written, 0 made zeros");
        assert_eq!(said.contains("other children of"), changed, "{said}");
        let larger = chain.contents().virtual_size > size_before;
        assert_eq!(said.contains("has grown"), larger, "{said}");
        chain.verify_child();
        chain.verify(chain.parent(), chain.contents());
        for image in [chain.child(), chain.parent()] {
            vdi(words!["check", image]).expect_code(0);
        }
        let info = vdi(words!["info", "--json", chain.child()])
            .expect_code(0)
            .json();
        let blocks = &info["format-specific"]["data"]["blocks"];
        assert_eq!(blocks["allocated"], 0, "{info}");
        // Nothing is left to do, so nothing changes.
        let parent = fs::read(chain.parent()).unwrap();
        vdi(words!["commit", "-q", chain.child()]).expect_code(0);
        assert!(
            fs::read(chain.parent()).unwrap() == parent,
            "{}",
            chain.case.name
        );
        chain.verify_child();
        count += 1;
    }
    assert_eq!(count, 10, "all chains of the corpus");
}

fn size_of(image: &Path) -> u64 {
    let info = vdi(words!["info", "--json", image]).expect_code(0).json();
    info["virtual-size"].as_u64().unwrap()
}

#[test]
fn a_chain_can_be_merged_image_by_image() {
    let mut chain = Chain::named("chain-4");
    let contents = chain.case.images.len() - 1;
    while chain.images.len() > 1 {
        vdi(words!["commit", "-q", chain.child()]).expect_code(0);
        fs::remove_file(chain.images.pop().unwrap()).unwrap();
    }
    let leaf = &chain.case.images[contents];
    chain.verify(&chain.images[0], chain.case.contents_of(leaf));
}

#[test]
fn a_merge_makes_siblings_invalid() {
    let chain = Chain::named("diff-partial-writes");
    let sibling = chain.directory.path().join("elsewhere");
    fs::create_dir(&sibling).unwrap();
    let sibling = sibling.join("sibling.vdi");
    fs::copy(chain.child(), &sibling).unwrap();
    let read = || vdi(words!["map", "--parent", chain.parent(), sibling]);
    read().expect_code(0);
    vdi(words!["commit", "-q", chain.child()]).expect_code(0);
    let refused = read().expect_code(1);
    assert!(
        refused
            .err
            .contains("was modified after its child was made"),
        "{refused:#?}"
    );
}

#[test]
fn an_image_without_a_parent_is_not_merged_or_flattened() {
    let chain = Chain::named("chain-4");
    for verb in ["commit", "flatten"] {
        let refused = vdi(words![verb, chain.images[0]]).expect_code(1);
        assert!(refused.err.contains("no parent"), "{refused:#?}");
    }
}

#[test]
fn a_flat_image_needs_no_parent() {
    for chain in chains() {
        vdi(words!["flatten", chain.child()]).expect_code(0);
        for parent in &chain.images[..chain.images.len() - 1] {
            fs::remove_file(parent).unwrap();
        }
        chain.verify_child();
        vdi(words!["check", chain.child()]).expect_code(0);
        if u64::from(chain.case.leaf().block_size) == MIB {
            let raw = chain.directory.path().join("qemu.raw");
            qemu_img(words![
                "convert",
                "-f",
                "vdi",
                "-O",
                "raw",
                chain.child(),
                raw
            ])
            .expect_code(0);
            let file = File::open(&raw).unwrap();
            let read = |at, buf: &mut [u8]| file.read_exact_at(buf, at).unwrap();
            chain.contents().verify("by qemu", read, |_| true);
        }
    }
}

#[test]
fn a_rebased_image_reads_as_before() {
    for chain in chains() {
        // Every ancestor in turn, from the nearest to the base.
        for ancestor in chain.images[..chain.images.len() - 1].iter().rev() {
            vdi(words!["rebase", "-b", ancestor, chain.child()]).expect_code(0);
            chain.verify_child();
        }
        // An image that has nothing to do with it, and data where the child has none.
        let other = chain.directory.path().join("other.vdi");
        let raw = chain.directory.path().join("other.raw");
        fs::write(&raw, vec![0xA5; 3 << 20]).unwrap();
        vdi(words![
            "convert", "-q", "-f", "raw", "-O", "vdi", raw, other
        ])
        .expect_code(0);
        vdi(words!["rebase", "-b", other, chain.child()]).expect_code(0);
        for old in &chain.images[..chain.images.len() - 1] {
            fs::remove_file(old).unwrap();
        }
        chain.verify_child();
        vdi(words!["check", chain.child()]).expect_code(0);
        vdi(words!["rebase", "-q", "-b", "", chain.child()]).expect_code(0);
        fs::remove_file(other).unwrap();
        chain.verify_child();
    }
}

#[test]
fn an_unsafe_rebase_changes_the_name_of_the_parent_only() {
    let chain = Chain::named("diff-partial-writes");
    let copy = chain.directory.path().join("copy.vdi");
    vdi(words!["convert", "-q", "-O", "vdi", chain.parent(), copy]).expect_code(0);
    // Its parent is not even there.
    fs::remove_file(chain.parent()).unwrap();
    let before = fs::read(chain.child()).unwrap();
    vdi(words!["rebase", "--unsafe", "-b", copy, chain.child()]).expect_code(0);
    let after = fs::read(chain.child()).unwrap();
    assert!(before[..0x1A8] == after[..0x1A8] && before[0x1C8..] == after[0x1C8..]);
    chain.verify_child();
}

#[test]
fn no_image_becomes_its_own_ancestor() {
    let chain = Chain::named("chain-4");
    for (child, parent) in [(1, 3), (2, 2), (0, 3)] {
        for words in [["-q"].as_slice(), &["-q", "--unsafe"]] {
            let (child, parent) = (&chain.images[child], &chain.images[parent]);
            let before = fs::read(child).unwrap();
            let mut all = words!["rebase", "-b", parent, child].to_vec();
            all.extend(words.iter().map(std::ffi::OsStr::new));
            let refused = vdi(all).expect_code(1);
            assert!(refused.err.contains("as an ancestor"), "{refused:#?}");
            assert!(fs::read(child).unwrap() == before);
        }
    }
}
