//! Rules by which operations on files go wrong or take their time.

use std::ops::Range;
use std::time::Duration;

use nix::errno::Errno;

use crate::random::Random;

/// What programs do to files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `read(2)` and its kin.
    Read,
    /// `write(2)` and its kin.
    Write,
    /// `ftruncate(2)`; it touches the byte that it makes the first missing one.
    Truncate,
    /// `fallocate(2)`.
    Allocate,
    /// `fsync(2)` and `fdatasync(2)`, and what makes a write with `RWF_SYNC` durable; it touches all bytes.
    Sync,
    /// `fsync(2)` of the directory.
    SyncNames,
}

/// What becomes of an operation.
#[derive(Clone, Copy, Debug)]
pub enum Effect {
    /// It fails, and nothing is done.
    Fail(Errno),
    /// Of a read or write, at most so many bytes are done, and said to be.
    Short(u32),
    /// It has its effect, and is answered after any time up to this.
    Slow(Duration),
}

/// What is to go wrong.
#[derive(Clone, Debug)]
pub struct Rule {
    /// With which operations.
    pub kind: Kind,
    /// Where in the files; operations elsewhere do not count.
    pub within: Range<u64>,
    /// How many such operations are left alone first.
    pub after: u64,
    /// With how many it goes wrong then.
    pub times: u64,
    /// How.
    pub effect: Effect,
}

impl Rule {
    /// All operations of a kind, everywhere and always.
    #[must_use]
    pub const fn all(kind: Kind, effect: Effect) -> Self {
        Self {
            kind,
            within: 0..u64::MAX,
            after: 0,
            times: u64::MAX,
            effect,
        }
    }

    /// All operations of a kind fail.
    #[must_use]
    pub const fn fail(kind: Kind, errno: Errno) -> Self {
        Self::all(kind, Effect::Fail(errno))
    }

    /// The same in a part of the files only.
    #[must_use]
    pub const fn within(mut self, within: Range<u64>) -> Self {
        self.within = within;
        self
    }

    /// The same so many times only.
    #[must_use]
    pub const fn times(mut self, times: u64) -> Self {
        self.times = times;
        self
    }

    /// The same, beginning with a later operation.
    #[must_use]
    pub const fn after(mut self, after: u64) -> Self {
        self.after = after;
        self
    }
}

/// Names a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a rule is lifted, or its hits are asked for"]
pub struct RuleId(usize);

/// All rules that ever were.
#[derive(Debug)]
pub(super) struct Rules {
    rules: Vec<Held>,
    random: Random,
}

#[derive(Debug)]
struct Held {
    rule: Rule,
    hits: u64,
    is_lifted: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            rules: Vec::new(),
            random: Random::seeded(1),
        }
    }
}

/// What the rules say of one operation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Verdict {
    pub(super) failure: Option<Errno>,
    pub(super) at_most: Option<u32>,
    pub(super) delay: Duration,
}

impl Rules {
    pub(super) fn add(&mut self, rule: Rule) -> RuleId {
        self.rules.push(Held {
            rule,
            hits: 0,
            is_lifted: false,
        });
        RuleId(self.rules.len() - 1)
    }

    pub(super) fn lift(&mut self, id: RuleId) -> u64 {
        self.rules[id.0].is_lifted = true;
        self.hits(id)
    }

    pub(super) fn hits(&self, id: RuleId) -> u64 {
        self.rules[id.0].hits
    }

    /// How often operations failed, and how often they were cut short.
    pub(super) fn injected(&self) -> (u64, u64) {
        let (mut failed, mut short) = (0, 0);
        for held in &self.rules {
            match held.rule.effect {
                Effect::Fail(_) => failed += held.hits,
                Effect::Short(_) => short += held.hits,
                Effect::Slow(_) => {}
            }
        }
        (failed, short)
    }

    /// Judges an operation, which counts for the rules that it meets.
    pub(super) fn judge(&mut self, kind: Kind, touched: &Range<u64>) -> Verdict {
        let mut verdict = Verdict::default();
        for held in &mut self.rules {
            let rule = &mut held.rule;
            let meets = rule.within.start < touched.end && touched.start < rule.within.end;
            if held.is_lifted || rule.kind != kind || !meets || held.hits >= rule.times {
                continue;
            }
            if rule.after > 0 {
                rule.after -= 1;
                continue;
            }
            held.hits += 1;
            match rule.effect {
                Effect::Fail(errno) => verdict.failure = Some(errno),
                Effect::Short(most) => verdict.at_most = Some(most),
                Effect::Slow(most) => {
                    let most = u64::try_from(most.as_micros()).expect("short delays");
                    verdict.delay = Duration::from_micros(self.random.within(0..most + 1));
                }
            }
        }
        verdict
    }
}
