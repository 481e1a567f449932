//! Groups of disks that share limits, by their names. They come from the configuration and from operators; a disk is in one at most.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::limits::{Group, Limits};

/// Characters of the longest name.
const LONGEST_NAME: usize = 64;

/// A group as it is written down, and as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GroupTable {
    /// What disks call it.
    pub(crate) name: String,
    /// What its disks may do together.
    #[serde(default)]
    pub(crate) limits: Limits,
}

/// Why there is no such group, or why it stays.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GroupError {
    #[error("there is no group called {name}")]
    NoSuchGroup { name: String },
    #[error("a group called {name} is there already")]
    Exists { name: String },
    #[error("the group {name} has disks; {disk} is one")]
    InUse { name: String, disk: String },
    #[error("a group cannot be called {name:?}; take 1 to {LONGEST_NAME} printable characters")]
    Name { name: String },
}

/// All groups. While they are locked, no disk enters or leaves one.
#[derive(Debug, Default)]
pub(crate) struct Groups(Mutex<BTreeMap<String, Arc<Group>>>);

/// The groups, locked.
pub(crate) type Locked<'a> = MutexGuard<'a, BTreeMap<String, Arc<Group>>>;

impl GroupTable {
    /// Whether it can be called that.
    pub(crate) fn check(&self) -> Result<(), GroupError> {
        let name = &self.name;
        let fits = (1..=LONGEST_NAME).contains(&name.chars().count());
        if fits && !name.chars().any(char::is_control) {
            return Ok(());
        }
        let name = name.clone();
        Err(GroupError::Name { name })
    }

    /// What there is to show of a group.
    pub(crate) fn of(group: &Group) -> Self {
        Self {
            name: group.name().to_owned(),
            limits: group.limits(),
        }
    }
}

impl Groups {
    /// Those of a configuration, which has checked their names.
    pub(crate) fn new(tables: &[GroupTable]) -> Self {
        let make = |table: &GroupTable| {
            let group = Group::new(table.name.clone(), &table.limits);
            (table.name.clone(), Arc::new(group))
        };
        Self(Mutex::new(tables.iter().map(make).collect()))
    }

    /// Keeps disks where they are.
    pub(crate) fn lock(&self) -> Locked<'_> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The group of this name.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<Group>, GroupError> {
        find(&self.lock(), name)
    }

    /// Makes a group.
    pub(crate) fn add(&self, table: GroupTable) -> Result<Arc<Group>, GroupError> {
        table.check()?;
        let group = Arc::new(Group::new(table.name.clone(), &table.limits));
        match self.lock().entry(table.name) {
            Entry::Vacant(free) => Ok(Arc::clone(free.insert(group))),
            Entry::Occupied(there) => {
                let name = there.key().clone();
                Err(GroupError::Exists { name })
            }
        }
    }

    /// All groups, by name.
    pub(crate) fn list(&self) -> Vec<GroupTable> {
        let groups = self.lock();
        groups.values().map(|group| GroupTable::of(group)).collect()
    }
}

/// The group of this name.
pub(crate) fn find(groups: &Locked<'_>, name: &str) -> Result<Arc<Group>, GroupError> {
    let missing = || GroupError::NoSuchGroup {
        name: name.to_owned(),
    };
    groups.get(name).cloned().ok_or_else(missing)
}
