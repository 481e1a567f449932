//! File systems that a test mounts, where it may: of a kind, or of a size, that the host's own is not.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::words;

/// How often something is tried that may be busy.
const MOST_TRIES: u32 = 500;

/// A file system that is mounted as long as this lives.
#[derive(Debug)]
pub struct Mounted {
    /// Where.
    pub at: PathBuf,
}

impl Mounted {
    /// Mounts with these words of `mount(8)`.
    ///
    /// # Errors
    /// The host's complaint if it cannot.
    ///
    /// # Panics
    /// If there is such a directory already.
    pub fn new(at: PathBuf, words: &[&OsStr]) -> Result<Self, String> {
        fs::create_dir(&at).expect("the place to mount at is new");
        let mut mount = Command::new("mount");
        succeed(mount.args(words).arg(&at))?;
        Ok(Self { at })
    }

    /// Makes and mounts one of a kind in a file, with more words for its `mkfs`. Its name is the kind's.
    ///
    /// # Errors
    /// The host's complaint if it cannot.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn made(
        directory: &Path,
        kind: &str,
        len_bytes: u64,
        words: &[&str],
    ) -> Result<Self, String> {
        let image = directory.join(format!("{kind}.img"));
        let file = File::create(&image).and_then(|file| file.set_len(len_bytes));
        file.map_err(|error| error.to_string())?;
        let mut mkfs = Command::new(format!("mkfs.{kind}"));
        succeed(mkfs.args(["-q"]).args(words).arg(&image))?;
        Self::new(directory.join(kind), &words!["-o", "loop", image])
    }

    /// Mounts it again after what a power cut leaves was brought about.
    ///
    /// # Errors
    /// The host's complaint if it cannot.
    pub fn again(self, directory: &Path, kind: &str) -> Result<Self, String> {
        let at = self.at.clone();
        // What a killed process has in flight keeps it busy for a moment.
        let mut gone = succeed(Command::new("umount").arg(&at));
        for _ in 0..MOST_TRIES {
            if gone.is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
            gone = succeed(Command::new("umount").arg(&at));
        }
        gone?;
        std::mem::forget(self);
        fs::remove_dir(&at).map_err(|error| error.to_string())?;
        let image = directory.join(format!("{kind}.img"));
        Self::new(at, &words!["-o", "loop", image])
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _gone = succeed(Command::new("umount").arg(&self.at));
    }
}

/// Runs a program.
///
/// # Errors
/// Its complaint if it is not there or fails.
pub fn succeed(command: &mut Command) -> Result<(), String> {
    command
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let name = command.get_program().display().to_string();
    let output = command
        .output()
        .map_err(|error| format!("{name}: {error}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    output.status.success().then_some(()).ok_or(complaint)
}

/// How much space the file system of `at` has left, all written.
///
/// # Panics
/// If the host cannot say.
#[must_use]
pub fn free_bytes(at: &Path) -> u64 {
    succeed(Command::new("sync").arg("-f").arg(at)).expect("a file system can be synced");
    let found = nix::sys::statvfs::statvfs(at).expect("a file system has a size");
    found.blocks_free() * found.fragment_size()
}
