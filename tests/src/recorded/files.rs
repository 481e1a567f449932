//! The files of the recorded file system, and what was done to them.
//!
//! All histories go by one clock, so that moments of different files can be compared.

use std::collections::BTreeMap;

use crate::random::Random;
use crate::simulated::history::InFlight;
use crate::simulated::{Contents, History, Moment, Operation};

/// The inode number of the directory.
pub(super) const ROOT: u64 = 1;

/// A file that is there, or was.
#[derive(Clone, Debug)]
pub(super) struct FileState {
    pub(super) contents: Contents,
    pub(super) history: History,
}

/// All files and their names.
#[derive(Debug)]
pub(super) struct Files {
    by_inode: BTreeMap<u64, FileState>,
    names: BTreeMap<String, u64>,
    /// What names meant since when.
    past_names: Vec<(Moment, BTreeMap<String, u64>)>,
    /// When names were made durable: before these moments.
    name_syncs: Vec<Moment>,
    clock: Moment,
    next_inode: u64,
}

impl Default for Files {
    fn default() -> Self {
        Self {
            by_inode: BTreeMap::new(),
            names: BTreeMap::new(),
            past_names: vec![(Moment::START, BTreeMap::new())],
            name_syncs: Vec::new(),
            clock: Moment::START,
            next_inode: ROOT + 1,
        }
    }
}

impl Files {
    pub(super) fn put(&mut self, name: &str, contents: Contents) -> u64 {
        let inode = self.next_inode;
        self.next_inode += 1;
        let history = History::new(contents.clone());
        self.by_inode.insert(inode, FileState { contents, history });
        self.change_names(|names| {
            names.insert(name.to_owned(), inode);
        });
        inode
    }

    pub(super) fn change_names(&mut self, change: impl FnOnce(&mut BTreeMap<String, u64>)) {
        change(&mut self.names);
        let now = self.note();
        self.past_names.push((now, self.names.clone()));
    }

    /// All names that there are are durable.
    pub(super) fn sync_names(&mut self) {
        let now = self.note();
        self.name_syncs.push(now);
    }

    pub(super) fn names(&self) -> &BTreeMap<String, u64> {
        &self.names
    }

    pub(super) fn get(&self, inode: u64) -> Option<&FileState> {
        self.by_inode.get(&inode)
    }

    pub(super) fn named(&self, name: &str) -> &FileState {
        &self.by_inode[&self.names[name]]
    }

    pub(super) fn named_mut(&mut self, name: &str) -> &mut FileState {
        let inode = self.names[name];
        self.by_inode.get_mut(&inode).expect("names name files")
    }

    /// An operation on a file arrives, and takes effect.
    pub(super) fn begin(&mut self, inode: u64, operation: Operation) -> InFlight {
        let file = self.by_inode.get_mut(&inode).expect("the kernel knows it");
        operation.apply(&mut file.contents);
        file.history.wait_until(self.clock);
        let record = file.history.begin(operation);
        self.clock = file.history.now();
        record
    }

    /// It is about to be answered.
    pub(super) fn end(&mut self, inode: u64, record: InFlight) {
        let file = self.by_inode.get_mut(&inode).expect("the kernel knows it");
        file.history.wait_until(self.clock);
        file.history.end(record);
        self.clock = file.history.now();
    }

    pub(super) fn note(&mut self) -> Moment {
        let now = self.clock;
        self.clock = now.next();
        now
    }

    pub(super) fn forget_the_past(&mut self) {
        for file in self.by_inode.values_mut() {
            file.history = History::new(file.contents.clone());
        }
        self.clock = Moment::START;
        self.past_names = vec![(Moment::START, self.names.clone())];
        self.name_syncs.clear();
    }

    pub(super) fn recording(&self) -> Recording {
        Recording {
            histories: self
                .by_inode
                .iter()
                .map(|(&inode, file)| (inode, file.history.clone()))
                .collect(),
            past_names: self.past_names.clone(),
            name_syncs: self.name_syncs.clone(),
            end: self.clock,
        }
    }
}

/// What was done to all files.
#[derive(Clone, Debug)]
pub struct Recording {
    histories: BTreeMap<u64, History>,
    past_names: Vec<(Moment, BTreeMap<String, u64>)>,
    name_syncs: Vec<Moment>,
    /// When the record ends.
    pub end: Moment,
}

impl Recording {
    /// The file that had this name at `moment`.
    #[must_use]
    pub fn file(&self, name: &str, moment: Moment) -> Option<u64> {
        let mut past = self.past_names.iter().rev();
        let (_, names) = past.find(|(since, _)| *since <= moment)?;
        names.get(name).copied()
    }

    /// The files by the names that they had just before `moment`: what a killed program leaves.
    #[must_use]
    pub fn names(&self, moment: Moment) -> BTreeMap<String, u64> {
        let mut past = self.past_names.iter().rev();
        let before = past.find(|(since, _)| *since < moment);
        before.map_or_else(BTreeMap::new, |(_, names)| names.clone())
    }

    /// The names that a power cut at `moment` could have left: those that were synced, and of what was done to names since any
    /// part. A renaming is done as a whole or not.
    #[must_use]
    pub fn names_after_cut(&self, moment: Moment, random: &mut Random) -> BTreeMap<String, u64> {
        let synced = self.name_syncs.iter().rev().find(|sync| **sync < moment);
        let mut left = self.names(synced.copied().unwrap_or(Moment::START.next()));
        let in_doubt = |since: Moment| synced.is_none_or(|sync| since >= *sync) && since < moment;
        for pair in self.past_names.windows(2) {
            let [(_, old), (since, new)] = pair else {
                continue;
            };
            if !in_doubt(*since) || random.within(0..2) == 0 {
                continue;
            }
            left.retain(|name, _| new.contains_key(name) || !old.contains_key(name));
            let changed = new
                .iter()
                .filter(|(name, file)| old.get(*name) != Some(file));
            left.extend(changed.map(|(name, file)| (name.clone(), *file)));
        }
        left
    }

    /// What was done to a file.
    ///
    /// # Panics
    /// If there was none.
    #[must_use]
    pub fn history(&self, file: u64) -> &History {
        &self.histories[&file]
    }

    /// What was done to the file that has this name in the end.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn last(&self, name: &str) -> &History {
        let file = self.file(name, self.end);
        self.history(file.expect("there is such a file"))
    }
}
