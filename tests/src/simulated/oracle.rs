//! What a disk may read as, now and after a crash.
//!
//! Knows for each sector what was written to it, when that could first reach the file, and
//! when it was answered. It knows nothing of blocks or files.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::history::Moment;
use super::index;

/// One of the things that were written to a sector.
#[derive(Clone, Debug)]
struct Version {
    /// The bytes of the whole write, and where the sector's begin in it.
    data: Arc<[u8]>,
    skip: usize,
    /// No earlier can it be in the file.
    begun: Moment,
    answered: Option<Moment>,
}

/// The ways to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// P1: what was answered is there.
    Kill,
    /// P2: what was answered before a flush began is there when that flush is answered.
    PowerCut,
}

/// What a disk may read as.
#[derive(Debug)]
pub struct Oracle {
    start: Vec<u8>,
    now: Vec<u8>,
    /// By sector, in the order in which they were begun.
    versions: BTreeMap<u64, Vec<Version>>,
    /// When flushes began and were answered.
    flushes: Vec<(Moment, Moment)>,
}

impl Oracle {
    /// A disk that holds this, durably.
    #[must_use]
    pub fn new(disk: Vec<u8>) -> Self {
        Self {
            now: disk.clone(),
            start: disk,
            versions: BTreeMap::new(),
            flushes: Vec::new(),
        }
    }

    /// What the disk reads as now.
    #[must_use]
    pub fn now(&self) -> &[u8] {
        &self.now
    }

    /// From `begun` on the data of a write that starts at the disk's byte `start` may reach
    /// those of its sectors that lie in `part`.
    pub fn begin(&mut self, start: u64, data: &Arc<[u8]>, part: &Range<u64>, begun: Moment) {
        for sector in part.start / 512..part.end / 512 {
            self.versions.entry(sector).or_default().push(Version {
                data: Arc::clone(data),
                skip: index(sector * 512 - start),
                begun,
                answered: None,
            });
        }
    }

    /// A part of the data of a write can be read.
    pub fn show(&mut self, start: u64, data: &[u8], part: &Range<u64>) {
        let from = index(part.start - start)..index(part.end - start);
        self.now[index(part.start)..index(part.end)].copy_from_slice(&data[from]);
    }

    /// A write was answered.
    pub fn answer(&mut self, start: u64, data: &Arc<[u8]>, answered: Moment) {
        self.answer_part(&(start..start + data.len() as u64), data, answered);
    }

    /// A write was answered, which a part of it must be read after.
    pub fn answer_part(&mut self, part: &Range<u64>, data: &Arc<[u8]>, answered: Moment) {
        for sector in part.start / 512..part.end / 512 {
            let versions = self.versions.entry(sector).or_default().iter_mut();
            let of_it = |version: &&mut Version| Arc::ptr_eq(&version.data, data);
            for version in versions.rev().filter(of_it) {
                version.answered = Some(answered);
            }
        }
    }

    /// A flush that began then was answered well.
    pub fn flush(&mut self, begun: Moment, answered: Moment) {
        self.flushes.push((begun, answered));
    }

    /// Whether a flush was answered before `moment`.
    #[must_use]
    pub fn is_flushed(&self, moment: Moment) -> bool {
        self.flushes.iter().any(|&(_, answered)| answered < moment)
    }

    /// All sectors ever written.
    pub fn touched(&self) -> impl Iterator<Item = u64> + '_ {
        self.versions.keys().copied()
    }

    /// What is wrong with the bytes that a disk reads as from `first` on after a crash at
    /// `moment`. A sector may be torn at the byte that `cut_of` gives for it, if that is not 0.
    #[must_use]
    pub fn judge(
        &self,
        first: u64,
        found: &[u8],
        moment: Moment,
        crash: Crash,
        cut_of: impl Fn(u64) -> u64,
    ) -> Option<String> {
        let covered = self.covered(moment, crash);
        let end = first + found.len() as u64 / 512;
        let mut at = first;
        for (&sector, versions) in self.versions.range(first..end) {
            let (from, to) = (index((at - first) * 512), index((sector - first) * 512));
            let before = &self.start[index(at * 512)..index(sector * 512)];
            if found[from..to] != *before {
                return Some(format!(
                    "sectors {at}..{sector}, never written, have changed"
                ));
            }
            let sector_found = &found[to..to + 512];
            let cut = index(cut_of(sector));
            if !self.allows(sector, versions, sector_found, (moment, covered), cut) {
                return Some(self.complain(sector, versions, sector_found, moment));
            }
            at = sector + 1;
        }
        let rest = &self.start[index(at * 512)..index(end * 512)];
        let is_kept = found[index((at - first) * 512)..] == *rest;
        (!is_kept).then(|| format!("sectors {at}..{end}, never written, have changed"))
    }

    /// What was answered before this is there.
    fn covered(&self, moment: Moment, crash: Crash) -> Option<Moment> {
        match crash {
            Crash::Kill => Some(moment),
            Crash::PowerCut => {
                let flushes = self
                    .flushes
                    .iter()
                    .filter(|&&(_, answered)| answered < moment);
                flushes.map(|&(begun, _)| begun).max()
            }
        }
    }

    fn allows(
        &self,
        sector: u64,
        versions: &[Version],
        found: &[u8],
        (moment, covered): (Moment, Option<Moment>),
        cut: usize,
    ) -> bool {
        let is_sure = |version: &Version| {
            let answered = version.answered;
            answered.is_some_and(|answered| covered.is_some_and(|covered| answered < covered))
        };
        let sure = versions.iter().rposition(is_sure);
        let start = &self.start[index(sector * 512)..index(sector * 512 + 512)];
        let old = sure.is_none().then_some(start);
        let versions = versions[sure.unwrap_or(0)..]
            .iter()
            .filter(|version| version.begun < moment)
            .map(|version| &version.data[version.skip..version.skip + 512]);
        let allowed: Vec<&[u8]> = old.into_iter().chain(versions).collect();
        [0..cut, cut..512].into_iter().all(|part| {
            allowed
                .iter()
                .any(|bytes| bytes[part.clone()] == found[part.clone()])
        })
    }

    fn complain(&self, sector: u64, versions: &[Version], found: &[u8], moment: Moment) -> String {
        let known: Vec<String> = versions
            .iter()
            .map(|version| {
                let bytes = &version.data[version.skip..version.skip + 512];
                let is_found = bytes == found;
                let (begun, answered) = (version.begun, version.answered);
                format!(
                    "{begun:?}..{answered:?}{}",
                    if is_found { " <- found" } else { "" }
                )
            })
            .collect();
        let start = &self.start[index(sector * 512)..index(sector * 512 + 512)];
        let what = match found {
            found if found.iter().all(|&byte| byte == 0) => "zeros",
            found if found == start => "the first contents",
            _ => "something else",
        };
        format!(
            "sector {sector} reads as {what} ({:?}..) at {moment:?}; writes: {known:?}; the last flush covers {:?}",
            &found[..8],
            self.covered(moment, Crash::PowerCut)
        )
    }
}
