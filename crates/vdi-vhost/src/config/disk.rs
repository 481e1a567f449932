//! One disk as it is written down, in the file or by a command, and as it is served.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vdi_core::{Access, ModifiedParent};

use super::threads::{ThreadsError, own_workers};
use crate::args::{Args, Cache, MAX_QUEUES};
use crate::cpus::CpuList;
use crate::crew::Staffing;
use crate::device::{DetectZeroes, Discard, SERIAL_BYTES, Serial};
use crate::limits::Limits;

/// Characters of the longest name of a disk: it is a part of a socket's name, of which the kernel takes 107 bytes.
const LONGEST_NAME: usize = 64;

/// What the only disk of a command line is called.
const ONLY: &str = "disk";

/// One disk to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskOptions {
    /// What operators call it.
    pub(crate) name: String,
    /// The top image.
    pub(crate) image: PathBuf,
    /// Where front ends connect, if that is a path.
    pub(crate) socket: Option<PathBuf>,
    pub(crate) access: Access,
    pub(crate) num_queues: u16,
    pub(crate) cache: Cache,
    pub(crate) parents: Vec<PathBuf>,
    pub(crate) image_dirs: Vec<PathBuf>,
    pub(crate) modified: ModifiedParent,
    pub(crate) discard: Discard,
    pub(crate) detect_zeroes: DetectZeroes,
    pub(crate) serial: Option<Serial>,
    /// It is opened when its first queue starts.
    pub(crate) incoming: bool,
    /// What it may do.
    pub(crate) limits: Limits,
    /// Whom it shares limits with.
    pub(crate) group: Option<String>,
    /// Threads that serve no other disk, if it has some.
    pub(crate) own_workers: Option<Staffing>,
}

/// A disk as it is written down; what is missing is as in the defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct DiskTable {
    name: Option<String>,
    image: Option<PathBuf>,
    socket: Option<PathBuf>,
    read_only: Option<bool>,
    num_queues: Option<u16>,
    cache: Option<Cache>,
    parents: Option<Vec<PathBuf>>,
    image_dirs: Option<Vec<PathBuf>>,
    allow_modified_parent: Option<bool>,
    discard: Option<Discard>,
    detect_zeroes: Option<DetectZeroes>,
    #[serde(default, deserialize_with = "serial", serialize_with = "serial_text")]
    serial: Option<Serial>,
    incoming: Option<bool>,
    /// All of the disk's own, or all of the defaults'.
    limits: Option<Limits>,
    /// Empty: none, whatever the defaults say.
    group: Option<String>,
    /// Threads of its own; 0: none, whatever the defaults say. Not written if there are none, for daemons that know of none.
    #[serde(skip_serializing_if = "Option::is_none")]
    workers: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    worker_cpus: Option<CpuList>,
}

/// Why a disk cannot be served as it is written down.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("the disk has no `{what}`")]
    Missing { what: &'static str },
    #[error(
        "a disk cannot be called {name:?}; take up to {LONGEST_NAME} letters, digits, `-`, `_` and `.`, no `.` in front"
    )]
    Name { name: String },
    #[error("num-queues is {found}; it can be 1 to {MAX_QUEUES}")]
    Queues { found: u16 },
    #[error("the disk names no `socket`, and there is no `socket-dir` to make one in")]
    NoSocket,
    #[error("{} is no absolute path", path.display())]
    Relative { path: PathBuf },
    #[error("the disk cannot have workers of its own")]
    OwnWorkers(#[source] ThreadsError),
}

impl DiskOptions {
    /// The one disk of a command line, if there is one.
    pub(crate) fn of(args: &Args) -> Option<Self> {
        Some(Self {
            name: ONLY.to_owned(),
            image: args.blk_file.clone()?,
            socket: args.socket_path.clone(),
            access: access(args.read_only),
            num_queues: args.num_queues,
            cache: args.cache,
            parents: args.parents.clone(),
            image_dirs: args.image_dirs.clone(),
            modified: modified(args.allow_modified_parent),
            discard: args.discard,
            detect_zeroes: args.detect_zeroes,
            serial: args.serial.clone(),
            incoming: args.incoming,
            limits: Limits::default(),
            group: None,
            own_workers: None,
        })
    }
}

impl DiskTable {
    /// A disk as it is served, with nothing left to defaults.
    pub(crate) fn of(disk: &DiskOptions) -> Self {
        let all = |paths: &[PathBuf]| Some(paths.iter().map(|path| absolute(path)).collect());
        Self {
            name: Some(disk.name.clone()),
            image: Some(absolute(&disk.image)),
            socket: disk.socket.as_deref().map(absolute),
            read_only: Some(disk.access == Access::ReadOnly),
            num_queues: Some(disk.num_queues),
            cache: Some(disk.cache),
            parents: all(&disk.parents),
            image_dirs: all(&disk.image_dirs),
            allow_modified_parent: Some(disk.modified == ModifiedParent::Allow),
            discard: Some(disk.discard),
            detect_zeroes: Some(disk.detect_zeroes),
            serial: disk.serial.clone(),
            incoming: Some(disk.incoming),
            limits: Some(disk.limits),
            group: Some(disk.group.clone().unwrap_or_default()),
            workers: disk.own_workers.as_ref().map(Staffing::small_count),
            worker_cpus: disk.own_workers.as_ref().and_then(|own| own.cpus.clone()),
        }
    }

    /// The same with this serial number.
    pub(crate) fn with_serial(self, serial: &Serial) -> Self {
        let serial = Some(serial.clone());
        Self { serial, ..self }
    }

    /// The same under these limits, and those of this group.
    pub(crate) fn limited(self, limits: Limits, group: Option<&str>) -> Self {
        let limits = Some(limits);
        let group = Some(group.unwrap_or_default().to_owned());
        Self {
            limits,
            group,
            ..self
        }
    }

    /// The disk that is meant, with these for what is not said.
    pub(crate) fn resolve(
        self,
        defaults: &Self,
        socket_dir: Option<&Path>,
    ) -> Result<DiskOptions, DiskError> {
        let name = self.name.ok_or(DiskError::Missing { what: "name" })?;
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty()
            || name.len() > LONGEST_NAME
            || name.starts_with('.')
            || !name.chars().all(fits)
        {
            return Err(DiskError::Name { name });
        }
        let in_dir = || socket_dir.map(|dir| dir.join(format!("{name}.sock")));
        let socket = self.socket.or_else(in_dir).ok_or(DiskError::NoSocket)?;
        let found = self.num_queues.or(defaults.num_queues);
        let num_queues = found.unwrap_or(MAX_QUEUES);
        if !(1..=MAX_QUEUES).contains(&num_queues) {
            return Err(DiskError::Queues { found: num_queues });
        }
        let own_workers = own_workers(
            (self.workers, self.worker_cpus),
            (defaults.workers, defaults.worker_cpus.as_ref()),
            num_queues,
        );
        let image = self.image.ok_or(DiskError::Missing { what: "image" })?;
        let yes = |own: Option<bool>, default: Option<bool>| own.or(default).unwrap_or(false);
        let list = |own: Option<_>, default: &Option<Vec<PathBuf>>| {
            own.or_else(|| default.clone()).unwrap_or_default()
        };
        Ok(DiskOptions {
            image,
            socket: Some(socket),
            access: access(yes(self.read_only, defaults.read_only)),
            num_queues,
            cache: self.cache.or(defaults.cache).unwrap_or(Cache::Writeback),
            parents: list(self.parents, &defaults.parents),
            image_dirs: list(self.image_dirs, &defaults.image_dirs),
            modified: modified(yes(
                self.allow_modified_parent,
                defaults.allow_modified_parent,
            )),
            discard: self.discard.or(defaults.discard).unwrap_or(Discard::Unmap),
            detect_zeroes: self
                .detect_zeroes
                .or(defaults.detect_zeroes)
                .unwrap_or(DetectZeroes::Off),
            serial: self.serial.or_else(|| defaults.serial.clone()),
            incoming: yes(self.incoming, defaults.incoming),
            limits: self.limits.or(defaults.limits).unwrap_or_default(),
            group: self
                .group
                .or_else(|| defaults.group.clone())
                .filter(|group| !group.is_empty()),
            own_workers: own_workers.map_err(DiskError::OwnWorkers)?,
            name,
        })
    }

    /// The files of parents that are named.
    pub(crate) fn parent_files(&self) -> &[PathBuf] {
        self.parents.as_deref().unwrap_or_default()
    }

    /// Refuses paths that depend on where the process is.
    pub(crate) fn refuse_relative(&self) -> Result<(), DiskError> {
        let lists = self.parents.iter().chain(&self.image_dirs).flatten();
        let mut all = self.image.iter().chain(&self.socket).chain(lists);
        all.try_for_each(|path| refuse_relative(path))
    }

    /// Makes paths that are relative begin at `dir`.
    pub(super) fn anchor(&mut self, dir: &Path) {
        let lists = self.parents.iter_mut().chain(&mut self.image_dirs);
        let own = self.image.iter_mut().chain(&mut self.socket);
        own.chain(lists.flatten())
            .for_each(|path| *path = dir.join(&*path));
    }
}

/// The same path from any directory.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Refuses a path that depends on where the process is.
pub(crate) fn refuse_relative(path: &Path) -> Result<(), DiskError> {
    if path.is_absolute() {
        return Ok(());
    }
    let path = path.to_owned();
    Err(DiskError::Relative { path })
}

fn access(read_only: bool) -> Access {
    if read_only {
        Access::ReadOnly
    } else {
        Access::Writable
    }
}

fn modified(allow: bool) -> ModifiedParent {
    if allow {
        ModifiedParent::Allow
    } else {
        ModifiedParent::Refuse
    }
}

fn serial<'de, D: Deserializer<'de>>(source: D) -> Result<Option<Serial>, D::Error> {
    let Some(text) = Option::<String>::deserialize(source)? else {
        return Ok(None);
    };
    let wrong = || {
        let limit =
            format!("a serial number has at most {SERIAL_BYTES} printable ASCII characters");
        serde::de::Error::custom(limit)
    };
    Serial::new(&text).map(Some).ok_or_else(wrong)
}

#[expect(clippy::ref_option, reason = "serde says so")]
fn serial_text<S: Serializer>(serial: &Option<Serial>, to: S) -> Result<S::Ok, S::Error> {
    serial.as_ref().map(Serial::text).serialize(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_a_socket_needs_a_directory_for_one() {
        let table = || DiskTable {
            name: Some("a".to_owned()),
            image: Some("/a".into()),
            ..DiskTable::default()
        };
        let none = DiskTable::default();
        assert_eq!(
            table().resolve(&none, None).unwrap_err(),
            DiskError::NoSocket
        );
        let disk = table().resolve(&none, Some(Path::new("/run"))).unwrap();
        assert_eq!(disk.socket, Some("/run/a.sock".into()));
    }
}
