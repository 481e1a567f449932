//! A file that appears under its name only when it is complete.
//!
//! It is made under another name in the same directory and renamed at the end, so
//! that neither an error nor a crash leaves half a file under the name, and an old
//! file of that name stays whole until the new one is.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use vdi_core::{Access, FileError, HostFile, Locking};

/// What to do with a file that has the name already. Empty files are always replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    /// Unless the user gives `--force`, which this verb has.
    Keep,
    /// Whatever the user says.
    KeepAlways,
    Replace,
}

/// How much of the name the file has while it is made, for those who look for what a crash left.
const MOST_KNOWN: usize = 100;

/// A file being made; dropped, it is gone.
#[derive(Debug)]
pub(crate) struct NewFile {
    temporary: PathBuf,
    destination: PathBuf,
    /// The file to be replaced, kept open and locked so that nobody begins to use it.
    old: Option<HostFile>,
}

/// Why a file cannot be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NewFileError {
    #[error("{} exists and has {len_bytes} bytes; give --force to replace it", path.display())]
    Exists { path: PathBuf, len_bytes: u64 },
    #[error("{} exists and has {len_bytes} bytes; choose another name", path.display())]
    Taken { path: PathBuf, len_bytes: u64 },
    #[error("{} names no file", path.display())]
    NoName { path: PathBuf },
    #[error("{} cannot be replaced", path.display())]
    Replace { path: PathBuf, source: FileError },
    #[error("{} cannot be looked at", path.display())]
    Look { path: PathBuf, source: io::Error },
    #[error("{} cannot be given its name", path.display())]
    Publish { path: PathBuf, source: io::Error },
}

impl NewFile {
    /// Prepares to make `path`; so far only a name is chosen.
    pub(crate) fn beside(path: &Path, existing: Existing) -> Result<Self, NewFileError> {
        let look = |source| NewFileError::Look {
            path: path.to_owned(),
            source,
        };
        // What a symbolic link points to is replaced, not the link.
        let (destination, old) = match fs::canonicalize(path) {
            Ok(real) => {
                let old =
                    HostFile::open(&real, Access::Writable, Locking::Locked).map_err(|source| {
                        NewFileError::Replace {
                            path: path.to_owned(),
                            source,
                        }
                    })?;
                (real, Some(old))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => (path.to_owned(), None),
            Err(error) => return Err(look(error)),
        };
        if let Some(old) = &old {
            let len_bytes = old.file().metadata().map_err(look)?.len();
            let path = path.to_owned();
            match existing {
                Existing::Keep if len_bytes > 0 => {
                    return Err(NewFileError::Exists { path, len_bytes });
                }
                Existing::KeepAlways if len_bytes > 0 => {
                    return Err(NewFileError::Taken { path, len_bytes });
                }
                Existing::Keep | Existing::KeepAlways | Existing::Replace => {}
            }
        }
        let Some(name) = destination.file_name() else {
            return Err(NewFileError::NoName {
                path: path.to_owned(),
            });
        };
        // A name may be as long as the file system lets it, and what is added must not make it longer.
        let known = &name.as_bytes()[..name.len().min(MOST_KNOWN)];
        let mut hidden = OsString::from(".");
        hidden.push(OsStr::from_bytes(known));
        hidden.push(format!(".{}.new", Uuid::new_v4().simple()));
        Ok(Self {
            temporary: destination.with_file_name(hidden),
            destination,
            old,
        })
    }

    /// Where to make the file.
    pub(crate) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Gives the finished file its name, durably.
    pub(crate) fn publish(self) -> Result<(), NewFileError> {
        self.rename().map_err(|source| NewFileError::Publish {
            path: self.destination.clone(),
            source,
        })
    }

    fn rename(&self) -> io::Result<()> {
        if let Some(old) = &self.old {
            fs::set_permissions(&self.temporary, old.file().metadata()?.permissions())?;
        }
        match self.old {
            Some(_) => fs::rename(&self.temporary, &self.destination)?,
            None => self.link()?,
        }
        let directory = match self.destination.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)?.sync_all()
    }

    /// Takes a name that was free, unless somebody else took it meanwhile.
    fn link(&self) -> io::Result<()> {
        match fs::hard_link(&self.temporary, &self.destination) {
            Ok(()) => fs::remove_file(&self.temporary),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error),
            // This file system has no links.
            Err(_) => fs::rename(&self.temporary, &self.destination),
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // After the rename there is nothing of that name; before it, there is nothing to
        // be done about a failure.
        let _ = fs::remove_file(&self.temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<OsString> {
        fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect()
    }

    #[test]
    fn nothing_has_the_name_until_the_end_and_nothing_is_left_of_a_failure() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let new = NewFile::beside(&path, Existing::Keep).unwrap();
        fs::write(new.path(), "half").unwrap();
        assert!(!path.exists());
        drop(new);
        assert!(names(directory.path()).is_empty());
        let new = NewFile::beside(&path, Existing::Keep).unwrap();
        fs::write(new.path(), "whole").unwrap();
        new.publish().unwrap();
        assert_eq!(names(directory.path()), ["image"]);
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole");
    }

    #[test]
    fn a_file_with_contents_is_replaced_only_on_demand() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        fs::write(&path, "").unwrap();
        assert!(NewFile::beside(&path, Existing::Keep).is_ok());
        fs::write(&path, "old").unwrap();
        let error = NewFile::beside(&path, Existing::Keep).unwrap_err();
        assert!(matches!(error, NewFileError::Exists { len_bytes: 3, .. }));
        assert!(NewFile::beside(&path, Existing::Replace).is_ok());
    }

    #[test]
    fn a_name_that_somebody_took_meanwhile_is_left_to_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let new = NewFile::beside(&path, Existing::Replace).unwrap();
        fs::write(new.path(), "ours").unwrap();
        fs::write(&path, "theirs").unwrap();
        assert!(new.publish().is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
        assert_eq!(names(directory.path()), ["image"]);
    }

    #[test]
    fn the_longest_name_can_be_had() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("n".repeat(255));
        let new = NewFile::beside(&path, Existing::Keep).unwrap();
        fs::write(new.path(), "whole").unwrap();
        new.publish().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "whole");
    }

    #[test]
    fn a_symbolic_link_stays_one() {
        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        fs::write(&real, "old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let new = NewFile::beside(&link, Existing::Replace).unwrap();
        fs::write(new.path(), "new").unwrap();
        new.publish().unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(&real).unwrap(), "new");
    }
}
