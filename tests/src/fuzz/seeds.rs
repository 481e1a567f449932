//! Inputs to begin with: the corpus of real images, and images of every shape that is legal.

use tempfile::tempdir;

use super::image_input::encode;
use crate::corpus::corpus;
use crate::random::Random;
use crate::simulated::{Contents, Layout};

/// How often images are made up.
const MADE: u64 = 60;

/// What is used of a real image: header and map are at the start.
const HEAD: usize = 3 << 20;

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let mut random = Random::seeded(7);
    let mut files = real_images();
    for _ in 0..MADE {
        let sizes = [128 << 10, 128 << 10, 256 << 10, 1 << 20];
        files.push(Layout::any(&sizes, &mut random).build(&mut random).0);
    }
    for uuid in 1..9 {
        let mut layout = Layout::any(&[128 << 10, 512 << 10], &mut random);
        layout.parent = Some(uuid);
        layout.image_type = 4;
        files.push(layout.build(&mut random).0);
    }
    let used = files.iter().map(|file| {
        let mut how = random.bytes(64);
        // Few flags, and disks are small.
        how[0] &= 0x0B;
        how[3..5].fill(0);
        for operation in how[16..].chunks_mut(6) {
            operation[3] = 0;
        }
        encode(&how, file)
    });
    used.collect()
}

fn real_images() -> Vec<Contents> {
    let directory = tempdir().expect("there is room for temporary files");
    let mut files = Vec::new();
    for case in corpus() {
        for image in &case.images {
            let path = image.unpack(directory.path());
            files.push(head_of(&path).expect("it was just unpacked"));
        }
    }
    files
}

fn head_of(path: &std::path::Path) -> std::io::Result<Contents> {
    use std::io::Read;
    let file = std::fs::File::open(path)?;
    let len = file.metadata()?.len();
    let mut head = Vec::new();
    file.take(HEAD as u64).read_to_end(&mut head)?;
    let mut contents = Contents::default();
    contents.write(0, &head);
    contents.set_len(len);
    Ok(contents)
}
