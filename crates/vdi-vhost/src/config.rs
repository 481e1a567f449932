//! Which disks are served, and how: what the command line, the configuration file and an operator's command say.
//!
//! ```toml
//! control-socket = "/run/vdi-vhost/control.sock"
//! metrics = "127.0.0.1:9187"
//! socket-dir = "/run/vdi-vhost"         # a disk that names no socket gets NAME.sock here
//! image-dirs = ["/var/lib/vdi-vhost"]   # disks may be added from here while the daemon runs, and made here by snapshots
//!
//! workers = 4                           # threads that serve all disks
//! worker-cpus = "0-3"
//! spare-workers = 2                     # threads that disks may have for their own which are added while the daemon runs
//!
//! [defaults]                            # of all disks, also of those that are added later
//! cache = "direct"
//! parents = ["/var/lib/vdi-vhost/golden.vdi"]
//!
//! [[group]]                             # of disks that share limits (`limits`)
//! name = "tenant-1"
//! limits = { iops_total = 10000 }
//!
//! [[disk]]
//! name = "web-1"
//! image = "/var/lib/vdi-vhost/web-1.vdi"
//! group = "tenant-1"
//! limits = { iops_total = 2000, iops_total_max = 8000 }
//!
//! [[disk]]
//! name = "database"
//! image = "/var/lib/vdi-vhost/database.vdi"
//! workers = 2                           # threads that serve this disk alone
//! worker-cpus = "4-5"
//! ```
//!
//! Relative paths in the file are relative to the file's own directory. What is wrong is told with its line.

use std::collections::BTreeSet;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::Spanned;
use vdi_core::{Access, ModifiedParent};

use crate::args::{Args, Cache, MAX_QUEUES};
use crate::cpus::{CpuError, CpuList};
use crate::crew::{MOST_SPARE, Staffing};
use crate::device::{DetectZeroes, Discard, SERIAL_BYTES, Serial};
use crate::groups::{GroupError, GroupTable};
use crate::limits::Limits;
use crate::metrics::{Audience, Endpoint};

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

/// The configuration file.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    control_socket: Option<PathBuf>,
    metrics: Option<Endpoint>,
    #[serde(default)]
    metrics_public: bool,
    socket_dir: Option<PathBuf>,
    #[serde(default)]
    image_dirs: Vec<PathBuf>,
    workers: Option<Spanned<u16>>,
    worker_cpus: Option<Spanned<CpuList>>,
    spare_workers: Option<Spanned<u16>>,
    #[serde(default)]
    defaults: DiskTable,
    #[serde(default)]
    group: Vec<Spanned<GroupTable>>,
    #[serde(default)]
    disk: Vec<Spanned<DiskTable>>,
}

/// What a process serves.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Where operators send commands.
    pub(crate) control_socket: Option<PathBuf>,
    /// Where metrics are, and for whom.
    pub(crate) metrics: Option<(Endpoint, Audience)>,
    /// Where the sockets of disks are made that name none.
    pub(crate) socket_dir: Option<PathBuf>,
    /// Where images may be that are opened or made later.
    pub(crate) image_dirs: Vec<PathBuf>,
    /// Threads for all disks, and for those that are added.
    pub(crate) threads: Threads,
    /// Of disks that are added.
    pub(crate) defaults: DiskTable,
    /// Of disks that share limits.
    pub(crate) groups: Vec<GroupTable>,
    /// Those that are served from the start.
    pub(crate) disks: Vec<DiskOptions>,
    /// Where it comes from, if that is a file; then disks come and go.
    pub(crate) file: Option<PathBuf>,
}

/// Which threads a process starts, but for those of the disks that are served from the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Threads {
    /// How many serve all disks that have none of their own, if that is said.
    pub(crate) shared: Option<u16>,
    /// Where those run.
    pub(crate) cpus: Option<CpuList>,
    /// How many wait for disks that want some of their own.
    pub(crate) spare: u16,
}

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is no configuration: {message}", path.display())]
    Syntax { path: PathBuf, message: String },
    #[error("{}, line {line}", path.display())]
    Disk {
        path: PathBuf,
        line: usize,
        #[source]
        source: DiskError,
    },
    #[error("{}, line {line}", path.display())]
    Threads {
        path: PathBuf,
        line: usize,
        #[source]
        source: ThreadsError,
    },
    #[error("{}, line {line}", path.display())]
    Group {
        path: PathBuf,
        line: usize,
        #[source]
        source: GroupError,
    },
    #[error("{}, line {line}: a disk called {name} or with the same image or socket is there already", path.display())]
    Twice {
        path: PathBuf,
        line: usize,
        name: String,
    },
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

/// Why there cannot be such threads.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ThreadsError {
    #[error("`{what}` is {found}; it can be {least} to {most}")]
    Count {
        what: &'static str,
        found: u16,
        least: u16,
        most: u16,
    },
    #[error(
        "`workers` is {found}, but the disk has {queues} queues, which is the most that can be served at a time"
    )]
    Idle { found: usize, queues: u16 },
    #[error(
        "`worker-cpus` is {found}, but `workers` is 0; say how many workers the disk is to have, or leave both out"
    )]
    Nobody { found: CpuList },
    #[error("`worker-cpus` is {found}")]
    Cpus {
        found: CpuList,
        #[source]
        source: CpuError,
    },
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
    fn anchor(&mut self, dir: &Path) {
        let lists = self.parents.iter_mut().chain(&mut self.image_dirs);
        let own = self.image.iter_mut().chain(&mut self.socket);
        own.chain(lists.flatten())
            .for_each(|path| *path = dir.join(&*path));
    }
}

impl Config {
    /// What a command line without a file says.
    pub(crate) fn of(args: &Args) -> Self {
        Self {
            control_socket: args.control_socket.clone(),
            metrics: metrics(args.metrics.clone(), args.metrics_public),
            socket_dir: None,
            image_dirs: Vec::new(),
            threads: Threads::default(),
            defaults: DiskTable::default(),
            groups: Vec::new(),
            disks: DiskOptions::of(args).into_iter().collect(),
            file: None,
        }
    }

    /// Reads a configuration file.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut file: File = toml::from_str(text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            message: error.to_string(),
        })?;
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            Some(_) | None => Path::new("."),
        };
        let absolute = |path: PathBuf| dir.join(path);
        file.defaults.anchor(dir);
        let socket_dir = file.socket_dir.map(absolute);
        let wanted = (file.workers, file.worker_cpus, file.spare_workers);
        let threads = Threads::of(wanted, |span, source| ConfigError::Threads {
            path: path.to_owned(),
            line: line_of(text, &span),
            source,
        })?;
        let groups = groups_of(file.group, text, path)?;
        let mut disks: Vec<DiskOptions> = Vec::with_capacity(file.disk.len());
        let mut taken = BTreeSet::new();
        for table in file.disk {
            let line = line_of(text, &table.span());
            let mut table = table.into_inner();
            table.anchor(dir);
            let disk = table.resolve(&file.defaults, socket_dir.as_deref());
            let disk = disk.map_err(|source| ConfigError::Disk {
                path: path.to_owned(),
                line,
                source,
            })?;
            if let Some(name) = &disk.group
                && !groups.iter().any(|group| group.name == *name)
            {
                let name = name.clone();
                let (path, source) = (path.to_owned(), GroupError::NoSuchGroup { name });
                return Err(ConfigError::Group { path, line, source });
            }
            let new = [
                Some(PathBuf::from(format!("name {}", disk.name))),
                Some(disk.image.clone()),
                disk.socket.clone(),
            ];
            if !new.into_iter().flatten().all(|key| taken.insert(key)) {
                return Err(ConfigError::Twice {
                    path: path.to_owned(),
                    line,
                    name: disk.name,
                });
            }
            disks.push(disk);
        }
        Ok(Self {
            control_socket: file.control_socket.map(absolute),
            metrics: metrics(
                file.metrics.map(|place| place.anchored(dir)),
                file.metrics_public,
            ),
            socket_dir,
            image_dirs: file.image_dirs.into_iter().map(absolute).collect(),
            threads,
            defaults: file.defaults,
            groups,
            disks,
            file: Some(path.to_owned()),
        })
    }
}

/// What the file says of threads, each with its place there.
type Wanted = (
    Option<Spanned<u16>>,
    Option<Spanned<CpuList>>,
    Option<Spanned<u16>>,
);

impl Threads {
    fn of(
        (workers, cpus, spare): Wanted,
        at: impl Fn(Range<usize>, ThreadsError) -> ConfigError,
    ) -> Result<Self, ConfigError> {
        if let Some(workers) = &workers {
            let checked = in_range("workers", *workers.get_ref(), 1..=MAX_QUEUES);
            checked.map_err(|source| at(workers.span(), source))?;
        }
        if let Some(spare) = &spare {
            let checked = in_range("spare-workers", *spare.get_ref(), 0..=MOST_SPARE);
            checked.map_err(|source| at(spare.span(), source))?;
        }
        if let Some(cpus) = &cpus {
            check_cpus(cpus.get_ref()).map_err(|source| at(cpus.span(), source))?;
        }
        Ok(Self {
            shared: workers.map(Spanned::into_inner),
            cpus: cpus.map(Spanned::into_inner),
            spare: spare.map_or(0, Spanned::into_inner),
        })
    }
}

/// The threads that a disk has for its own, by what it says and what the defaults say.
fn own_workers(
    (workers, cpus): (Option<u16>, Option<CpuList>),
    (default_workers, default_cpus): (Option<u16>, Option<&CpuList>),
    queues: u16,
) -> Result<Option<Staffing>, ThreadsError> {
    if let (Some(0), Some(found)) = (workers, &cpus) {
        let found = found.clone();
        return Err(ThreadsError::Nobody { found });
    }
    // A disk that names CPUs only wants one thread for each.
    let workers = workers.or_else(|| default_workers.filter(|_| cpus.is_none()));
    let cpus = cpus.or_else(|| default_cpus.cloned());
    let count = match (workers, &cpus) {
        (Some(0), _) | (None, None) => return Ok(None),
        (Some(count), _) => usize::from(count),
        (None, Some(cpus)) => cpus.len(),
    };
    if count > usize::from(queues) {
        let found = count;
        return Err(ThreadsError::Idle { found, queues });
    }
    cpus.as_ref().map_or(Ok(()), check_cpus)?;
    Ok(Some(Staffing { count, cpus }))
}

fn check_cpus(cpus: &CpuList) -> Result<(), ThreadsError> {
    cpus.check().map_err(|source| ThreadsError::Cpus {
        found: cpus.clone(),
        source,
    })
}

fn in_range(
    what: &'static str,
    found: u16,
    range: RangeInclusive<u16>,
) -> Result<(), ThreadsError> {
    let (least, most) = range.clone().into_inner();
    if range.contains(&found) {
        return Ok(());
    }
    Err(ThreadsError::Count {
        what,
        found,
        least,
        most,
    })
}

fn metrics(place: Option<Endpoint>, is_public: bool) -> Option<(Endpoint, Audience)> {
    let audience = if is_public {
        Audience::Anyone
    } else {
        Audience::Local
    };
    place.map(|place| (place, audience))
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

/// The groups of a file, no two with the same name.
fn groups_of(
    tables: Vec<Spanned<GroupTable>>,
    text: &str,
    path: &Path,
) -> Result<Vec<GroupTable>, ConfigError> {
    let mut groups: Vec<GroupTable> = Vec::with_capacity(tables.len());
    for table in tables {
        let line = line_of(text, &table.span());
        let table = table.into_inner();
        let mut checked = table.check();
        if groups.iter().any(|other| other.name == table.name) {
            let name = table.name.clone();
            checked = Err(GroupError::Exists { name });
        }
        checked.map_err(|source| ConfigError::Group {
            path: path.to_owned(),
            line,
            source,
        })?;
        groups.push(table);
    }
    Ok(groups)
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

/// The line that a part of the text begins in, the first one being 1.
fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = text.get(..span.start).unwrap_or(text);
    1 + before.matches('\n').count()
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

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/etc/fleet.toml"))
    }

    #[test]
    fn a_disk_is_as_it_says_and_else_as_the_defaults_say() {
        let config = parse(
            r#"
            socket-dir = "sockets"
            image-dirs = ["/images"]
            [defaults]
            cache = "direct"
            parents = ["golden.vdi"]
            num-queues = 4
            [[disk]]
            name = "a"
            image = "/images/a.vdi"
            [[disk]]
            name = "b"
            image = "b.vdi"
            socket = "/run/b"
            cache = "writeback"
            read-only = true
            serial = "B1"
            "#,
        );
        let config = config.unwrap();
        let [a, b] = &config.disks[..] else {
            panic!("two disks");
        };
        assert_eq!(a.socket, Some("/etc/sockets/a.sock".into()));
        assert_eq!((a.cache, a.num_queues), (Cache::Direct, 4));
        assert_eq!(a.parents, [PathBuf::from("/etc/golden.vdi")]);
        assert_eq!(a.access, Access::Writable);
        assert_eq!(b.image, PathBuf::from("/etc/b.vdi"));
        assert_eq!((b.cache, b.access), (Cache::Writeback, Access::ReadOnly));
        assert_eq!(b.serial, Serial::new("B1"));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let disk = "[[disk]]\nname = \"a\"\nimage = \"a\"\nsocket = \"s\"\n";
        for (text, line) in [
            ("x = 1\n".to_owned(), "line 1"),
            (format!("{disk}cash = \"direct\"\n"), "line 5"),
            (format!("{disk}cache = \"none\"\n"), "line 5"),
            (format!("{disk}num-queues = 257\n"), "line 1"),
            (format!("{disk}{disk}"), "line 5"),
            (format!("{disk}[[disk]]\nname = \"b\"\n"), "line 5"),
            (
                "\n[[disk]]\nname = \"../a\"\nimage = \"a\"\n".to_owned(),
                "line 2",
            ),
            (format!("{disk}limits = {{ iops = 1 }}\n"), "line 5"),
            (
                format!("{disk}[disk.limits]\nbps_total = 2\nbps_total_max = 1\n"),
                "line 5",
            ),
            ("\n[defaults.limits]\niops_total = 0\n".to_owned(), "line 3"),
            (
                "\n[defaults.limits]\niops_total_max = 1\n".to_owned(),
                "line 2",
            ),
            (
                "\n[[group]]\nname = \"g\"\n[[group]]\nname = \"g\"\n".to_owned(),
                "line 4: a group called g is there already",
            ),
            ("\n[[group]]\nname = \"\"\n".to_owned(), "line 2"),
            (
                "\nworkers = 0\n".to_owned(),
                "line 2: `workers` is 0; it can be 1 to 256",
            ),
            (
                "\nspare-workers = 257\n".to_owned(),
                "line 2: `spare-workers` is 257",
            ),
            ("\nworker-cpus = \"2-1\"\n".to_owned(), "line 2"),
            (
                "\n\nworker-cpus = \"1000\"\n".to_owned(),
                "line 3: `worker-cpus` is 1000: CPU 1000 is none of",
            ),
            (format!("{disk}worker-cpus = 1\n"), "line 5"),
            (format!("{disk}worker-cpus = \"1000\"\n"), "line 1"),
            (
                format!("{disk}workers = 0\nworker-cpus = \"0\"\n"),
                "line 1",
            ),
            (
                format!("{disk}workers = 3\nnum-queues = 2\n"),
                "line 1: the disk cannot have workers of its own: `workers` is 3, but the disk has 2 queues",
            ),
            (
                format!("[[group]]\nname = \"g\"\nlimits = {{ bps_total_max = 1 }}\n{disk}"),
                "line 3",
            ),
            (
                format!("\n{disk}group = \"g\"\n"),
                "line 2: there is no group called g",
            ),
            (
                format!("{disk}serial = \"123456789012345678901\"\n"),
                "line 5",
            ),
        ] {
            let error = parse(&text).expect_err(&text);
            let said = crate::chain_of(&error);
            assert!(said.contains(line), "{text}: {said}");
        }
    }

    #[test]
    fn a_disk_is_the_same_after_it_was_written_down() {
        let text = r#"
            socket-dir = "/run"
            [[disk]]
            name = "a"
            image = "/a.vdi"
            [[disk]]
            name = "b"
            image = "/b.vdi"
            socket = "/b"
            read-only = true
            num-queues = 3
            cache = "direct"
            parents = ["/p"]
            image-dirs = ["/d"]
            allow-modified-parent = true
            discard = "ignore"
            detect-zeroes = "unmap"
            serial = "B 1"
            incoming = true
            limits = { iops_total = 7 }
            group = "some"
            workers = 3
            worker-cpus = "0"
            [[group]]
            name = "some"
        "#;
        for disk in parse(text).unwrap().disks {
            let written = serde_json::to_string(&DiskTable::of(&disk)).unwrap();
            let read: DiskTable = serde_json::from_str(&written).unwrap();
            let again = read.resolve(&DiskTable::default(), None).unwrap();
            assert_eq!(again, disk);
        }
    }

    #[test]
    fn a_disk_has_its_own_limits_and_group_or_those_of_the_defaults() {
        let config = parse(
            r#"
            socket-dir = "sockets"
            [defaults]
            group = "all"
            [defaults.limits]
            iops_total = 5
            bps_total = 6
            [[group]]
            name = "all"
            limits = { iops_total = 100, iops_total_max = 200, iops_total_max_length = 60 }
            [[group]]
            name = "some"
            [[disk]]
            name = "a"
            image = "a"
            [[disk]]
            name = "b"
            image = "b"
            group = "some"
            limits = { iops_total = 7 }
            [[disk]]
            name = "c"
            image = "c"
            group = ""
            limits = {}
            "#,
        );
        let config = config.unwrap();
        let limits = |json| serde_json::from_str::<Limits>(json).unwrap();
        let found = config
            .disks
            .iter()
            .map(|disk| (disk.limits, disk.group.as_deref()));
        assert_eq!(
            found.collect::<Vec<_>>(),
            [
                (limits(r#"{"iops_total": 5, "bps_total": 6}"#), Some("all")),
                (limits(r#"{"iops_total": 7}"#), Some("some")),
                (Limits::default(), None),
            ]
        );
        let of_groups = config
            .groups
            .iter()
            .map(|group| (&group.name[..], group.limits));
        let all = r#"{"iops_total": 100, "iops_total_max": 200, "iops_total_max_length": 60}"#;
        assert_eq!(
            of_groups.collect::<Vec<_>>(),
            [("all", limits(all)), ("some", Limits::default())]
        );
    }

    #[test]
    fn a_disk_has_workers_of_its_own_if_it_says_so_or_the_defaults_do() {
        let config = parse(
            r#"
            socket-dir = "sockets"
            workers = 3
            worker-cpus = "0"
            spare-workers = 2
            [defaults]
            workers = 2
            [[disk]]
            name = "a"
            image = "a"
            [[disk]]
            name = "b"
            image = "b"
            workers = 0
            [[disk]]
            name = "c"
            image = "c"
            worker-cpus = "0"
            [[disk]]
            name = "d"
            image = "d"
            workers = 5
            worker-cpus = "0"
            "#,
        );
        let config = config.unwrap();
        let zero = || Some("0".parse().unwrap());
        let threads = Threads {
            shared: Some(3),
            cpus: zero(),
            spare: 2,
        };
        assert_eq!(config.threads, threads);
        let own = |count, cpus| Some(Staffing { count, cpus });
        let found = config.disks.into_iter().map(|disk| disk.own_workers);
        let expected = [own(2, None), None, own(1, zero()), own(5, zero())];
        assert_eq!(found.collect::<Vec<_>>(), expected);
    }

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
