//! A walk through a history, which knows at every moment what is durable and what is not yet.
//!
//! Operations become durable in the order of their syncs, but have their effect in the order in which they were begun. The two
//! differ only for operations that were in flight together.

use super::contents::Contents;
use super::history::{CutPoint, History, Moment, Operation, Record};

/// Somewhere in a history. It goes forward only, at little cost.
#[derive(Debug)]
pub struct Replay<'h> {
    history: &'h History,
    /// The number of the next record to look at.
    next: usize,
    base: Contents,
    /// By number, in order.
    pending: Vec<usize>,
    is_durable: Vec<bool>,
    syncs: Vec<&'h Record>,
    /// When syncs that have ended began: the good ones and the others.
    good: Vec<&'h Record>,
    failed: Vec<usize>,
}

impl<'h> Replay<'h> {
    /// At the start.
    #[must_use]
    pub fn new(history: &'h History) -> Self {
        Self {
            history,
            next: 0,
            base: history.start().clone(),
            pending: Vec::new(),
            is_durable: vec![false; history.records.len()],
            syncs: Vec::new(),
            good: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Goes on to `moment`, which is not in the past; gives what the power can be cut at there.
    #[must_use]
    pub fn advance(&mut self, moment: Moment) -> CutPoint<'h> {
        let records = &self.history.records;
        while let Some(record) = records.get(self.next).filter(|one| one.begun < moment.0) {
            match record.operation {
                Operation::Sync | Operation::SyncOf(_) | Operation::FailedSync => {
                    self.syncs.push(record);
                }
                Operation::Write { .. } | Operation::SetLen(_) | Operation::Punch(_) => {
                    self.pending.push(self.next);
                }
            }
            self.next += 1;
        }
        let is_over = |record: &&Record| record.ended.is_some_and(|ended| ended < moment.0);
        let (over, syncs): (Vec<_>, Vec<_>) = self.syncs.iter().copied().partition(is_over);
        self.syncs = syncs;
        self.end_syncs(&over);
        let oldest = self.pending.first().copied().unwrap_or(self.next);
        let durable = (oldest..self.next).filter(|&number| self.is_durable[number]);
        CutPoint {
            base: self.base.clone(),
            durable: durable.map(|number| &records[number]).collect(),
            pending: self
                .pending
                .iter()
                .map(|&number| &records[number])
                .collect(),
        }
    }

    fn end_syncs(&mut self, over: &[&'h Record]) {
        for sync in over {
            match sync.operation {
                Operation::Sync | Operation::SyncOf(_) => self.good.push(sync),
                _ => self.failed.push(sync.begun),
            }
        }
        if over.is_empty() {
            return;
        }
        self.good.sort_unstable_by_key(|sync| sync.begun);
        let (covered, pending): (Vec<usize>, Vec<usize>) = self
            .pending
            .iter()
            .partition(|&&number| self.is_covered(number));
        self.pending = pending;
        let was_durable = |number: &usize| self.is_durable[*number];
        let is_late = covered
            .first()
            .is_some_and(|&first| (first..self.next).any(|n| was_durable(&n)));
        for &number in &covered {
            self.is_durable[number] = true;
        }
        if is_late {
            // One that was begun before others that are durable already.
            self.base = self.history.start().clone();
            self.apply(0..self.next);
        } else {
            let records = &self.history.records;
            for number in covered {
                records[number].operation.apply(&mut self.base);
            }
        }
    }

    fn apply(&mut self, numbers: std::ops::Range<usize>) {
        for number in numbers.filter(|&number| self.is_durable[number]) {
            self.history.records[number].operation.apply(&mut self.base);
        }
    }

    /// Whether a sync that has ended covers it, and none that failed lies between.
    fn is_covered(&self, number: usize) -> bool {
        let record = &self.history.records[number];
        let Some(ended) = record.ended else {
            return false;
        };
        let covers = |sync: &&&Record| {
            ended < sync.begun
                && match &sync.operation {
                    Operation::SyncOf(range) => record.operation.is_inside(range),
                    _ => true,
                }
        };
        self.good.iter().find(covers).is_some_and(|good| {
            !self
                .failed
                .iter()
                .any(|&failed| ended < failed && failed < good.begun)
        })
    }
}
