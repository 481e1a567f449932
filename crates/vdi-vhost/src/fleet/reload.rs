//! Reads the configuration again while its disks are served: new disks are added, those that are gone are removed, limits and groups are as
//! the file has them now.
//!
//! What a front end uses is never taken from it: a disk that is gone from the file while one is connected, or that is described otherwise, stays as it is
//! until it is removed by a command, and is told. What operators did stays until the file says something else than it did: disks that they added,
//! limits that they set. Either all new disks are served or none, and then nothing has changed.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};

use serde::Serialize;

use super::{Fleet, FleetError, Readied};
use crate::config::{Config, ConfigError, DiskOptions, DiskTable};
use crate::groups::{self, GroupTable};

/// What a reload did, by the disks' names.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Reloaded {
    added: Vec<String>,
    removed: Vec<String>,
    /// Their limits or their group changed.
    limited: Vec<String>,
    /// They should be removed or served otherwise, and are as they were.
    kept: Vec<String>,
}

/// What the file said when it was read last, beside its disks.
#[derive(Debug)]
pub(super) struct Said {
    /// Of disks that are added.
    pub(super) defaults: DiskTable,
    pub(super) groups: Vec<GroupTable>,
}

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReloadError {
    #[error("there is no configuration file to read again")]
    NoFile,
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("`{what}` changed, for which the daemon must be started again")]
    Fixed { what: &'static str },
    #[error("{name} cannot be served; nothing was changed")]
    Disk {
        name: String,
        #[source]
        source: FleetError,
    },
    #[error(transparent)]
    Fleet(#[from] FleetError),
}

impl Said {
    pub(super) fn of(config: &Config) -> Self {
        Self {
            defaults: config.defaults.clone(),
            groups: config.groups.clone(),
        }
    }
}

impl Fleet {
    /// Serves what the configuration file says now.
    pub(crate) fn reload(self: &Arc<Self>) -> Result<Reloaded, ReloadError> {
        let _change = self.change()?;
        let one_at_a_time = self.reloads.lock();
        let _one_at_a_time = one_at_a_time.unwrap_or_else(PoisonError::into_inner);
        let file = self.config.file.as_ref().ok_or(ReloadError::NoFile)?;
        let config = Config::read(file)?;
        self.refuse_what_is_fixed(&config)?;
        let each = config.disks.iter();
        let mut described: BTreeMap<_, _> =
            each.map(|disk| (disk.name.clone(), disk.clone())).collect();
        let readied = self.ready_all(&described)?;
        let new_groups = self.add_groups(&config.groups);
        let added = self.serve_all(readied).inspect_err(|_| {
            let mut groups = self.groups.lock();
            new_groups.iter().for_each(|name| drop(groups.remove(name)));
        })?;
        // From here on nothing is refused.
        self.change_groups(&config.groups);
        let mut done = Reloaded {
            added,
            ..Reloaded::default()
        };
        let before = self.described().clone();
        for (name, disk) in before {
            if let Some(stays) = self.change_disk(&name, disk, described.get(&name), &mut done) {
                // So that the next reload sees it again.
                described.insert(name, stays);
            }
        }
        *self.described() = described;
        *self.said() = Said::of(&config);
        tracing::info!("the configuration was read again: {done:?}");
        Ok(done)
    }

    pub(super) fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sandbox, the threads and the sockets are made for these.
    fn refuse_what_is_fixed(&self, new: &Config) -> Result<(), ReloadError> {
        let own = &self.config;
        for (what, is_same) in [
            ("control-socket", own.control_socket == new.control_socket),
            ("metrics", own.metrics == new.metrics),
            ("socket-dir", own.socket_dir == new.socket_dir),
            ("image-dirs", own.image_dirs == new.image_dirs),
            ("workers", own.threads.shared == new.threads.shared),
            ("worker-cpus", own.threads.cpus == new.threads.cpus),
            ("spare-workers", own.threads.spare == new.threads.spare),
        ] {
            if !is_same {
                return Err(ReloadError::Fixed { what });
            }
        }
        Ok(())
    }

    /// Opens all of these that are not served yet.
    fn ready_all(
        &self,
        described: &BTreeMap<String, DiskOptions>,
    ) -> Result<Vec<Readied>, ReloadError> {
        let mut readied = Vec::new();
        for (name, disk) in described {
            let opened = match self.refuse_twin(disk) {
                Ok(()) => Readied::new(disk.clone(), &self.parents, None),
                Err(FleetError::Exists { .. }) => continue,
                Err(error) => Err(error),
            };
            readied.push(opened.map_err(|source| ReloadError::Disk {
                name: name.clone(),
                source,
            })?);
        }
        Ok(readied)
    }

    /// Serves all of these, or none.
    fn serve_all(self: &Arc<Self>, readied: Vec<Readied>) -> Result<Vec<String>, ReloadError> {
        let mut added: Vec<String> = Vec::new();
        for disk in readied {
            let name = disk.options().name.clone();
            tracing::info!("{name}: {}", disk.describe());
            if let Err(source) = self.serve(disk) {
                for name in &added {
                    self.take_out(name)?;
                }
                return Err(ReloadError::Disk { name, source });
            }
            added.push(name);
        }
        Ok(added)
    }

    /// Makes the groups that are not there; which those were.
    fn add_groups(&self, tables: &[GroupTable]) -> Vec<String> {
        let new = tables.iter().filter(|table| {
            // Its name was checked when it was read.
            self.groups.add((*table).clone()).is_ok()
        });
        new.map(|table| table.name.clone()).collect()
    }

    /// Limits groups of which the file says something else now.
    fn change_groups(&self, tables: &[GroupTable]) {
        let said = self.said();
        for table in tables.iter().filter(|table| !said.groups.contains(table)) {
            if let Ok(group) = self.groups.find(&table.name) {
                group.set_limits(&table.limits);
            }
        }
    }

    /// Makes of a disk that came from the file what the file says now; how it was described, if it stays like that.
    fn change_disk(
        &self,
        name: &str,
        before: DiskOptions,
        now: Option<&DiskOptions>,
        done: &mut Reloaded,
    ) -> Option<DiskOptions> {
        // An operator may have removed it this instant.
        let berth = self.find(Some(name)).ok()?;
        let Some(now) = now else {
            if berth.is_connected() {
                return Some(keep(name, before, done));
            }
            drop(berth);
            if let Err(error) = self.take_out(name) {
                tracing::error!("{name}: {}", crate::chain_of(&error));
            }
            done.removed.push(name.to_owned());
            return None;
        };
        let limited = DiskOptions {
            limits: now.limits,
            group: now.group.clone(),
            ..before.clone()
        };
        if limited != before {
            if now.limits != before.limits {
                berth.throttle().set_limits(&now.limits);
            }
            if now.group != before.group {
                let groups = self.groups.lock();
                let group = now.group.as_deref().map(|name| groups::find(&groups, name));
                // The file has the group, or would have been refused.
                berth.throttle().set_group(group.and_then(Result::ok));
            }
            done.limited.push(name.to_owned());
        }
        (limited != *now).then(|| keep(name, limited, done))
    }
}

fn keep(name: &str, disk: DiskOptions, done: &mut Reloaded) -> DiskOptions {
    tracing::warn!(
        "{name} is not in the configuration as it is served; it stays so until it is removed"
    );
    done.kept.push(name.to_owned());
    disk
}
