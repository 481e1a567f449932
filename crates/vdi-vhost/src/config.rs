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

mod disk;
mod threads;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

pub(crate) use disk::{DiskError, DiskOptions, DiskTable, absolute, refuse_relative};
pub(crate) use threads::{Threads, ThreadsError};

use crate::args::Args;
use crate::cpus::CpuList;
use crate::groups::{GroupError, GroupTable};
use crate::metrics::{Audience, Endpoint};

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

fn metrics(place: Option<Endpoint>, is_public: bool) -> Option<(Endpoint, Audience)> {
    let audience = if is_public {
        Audience::Anyone
    } else {
        Audience::Local
    };
    place.map(|place| (place, audience))
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

/// The line that a part of the text begins in, the first one being 1.
fn line_of(text: &str, span: &Range<usize>) -> usize {
    let before = text.get(..span.start).unwrap_or(text);
    1 + before.matches('\n').count()
}

#[cfg(test)]
mod tests {
    use vdi_core::Access;

    use super::*;
    use crate::args::Cache;
    use crate::crew::Staffing;
    use crate::device::Serial;
    use crate::limits::Limits;

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
    fn a_disk_that_names_no_cpus_for_its_workers_has_those_of_the_defaults() {
        let config = parse(
            r#"
            socket-dir = "sockets"
            [defaults]
            worker-cpus = "0"
            [[disk]]
            name = "a"
            image = "a"
            [[disk]]
            name = "b"
            image = "b"
            workers = 2
            [[disk]]
            name = "c"
            image = "c"
            workers = 0
            "#,
        );
        let own = |count| {
            let cpus = Some("0".parse().unwrap());
            Some(Staffing { count, cpus })
        };
        let found = config.unwrap().disks.into_iter();
        let found: Vec<_> = found.map(|disk| disk.own_workers).collect();
        assert_eq!(found, [own(1), own(2), None]);
    }
}
