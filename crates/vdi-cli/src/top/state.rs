//! What is shown, and what keys make of it.

use std::path::PathBuf;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::rates::{Rate, Sample, SortKey, is_restarted, rates, sort};

/// How many samples long news are told.
const TOLD: u32 = 5;

/// What somebody who pressed a key wants.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wish {
    GoOn,
    End,
}

/// All that is shown.
#[derive(Debug)]
pub(super) struct Top {
    pub(super) socket: PathBuf,
    last: Option<Sample>,
    rates: Vec<Rate>,
    pub(super) sort: SortKey,
    pub(super) is_reversed: bool,
    pub(super) filter: String,
    /// The filter is being typed.
    pub(super) is_typing: bool,
    pub(super) only_busy: bool,
    pub(super) is_paused: bool,
    /// The first row that is shown, and how many there is room for, which drawing finds out.
    pub(super) first: usize,
    pub(super) room: usize,
    /// Why there is no sample, if there is none.
    pub(super) trouble: Option<String>,
    /// What is told of the daemon, and for how many samples more.
    news: Option<(News, u32)>,
}

/// What happened to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// It answers after it did not.
    Back,
    /// Its counters began anew.
    Restarted,
}

impl Top {
    pub(super) fn new(socket: PathBuf, sort: SortKey, filter: Option<String>) -> Self {
        Self {
            socket,
            last: None,
            rates: Vec::new(),
            sort,
            is_reversed: false,
            filter: filter.unwrap_or_default(),
            is_typing: false,
            only_busy: false,
            is_paused: false,
            first: 0,
            room: 1,
            trouble: None,
            news: None,
        }
    }

    /// Takes the next sample, or the reason why there is none.
    pub(super) fn take(&mut self, sampled: Result<Sample, String>) {
        match sampled {
            Ok(sample) => {
                self.news = match self.news {
                    _ if self.trouble.take().is_some() => Some((News::Back, TOLD)),
                    Some((news, left)) if left > 1 => Some((news, left - 1)),
                    Some(_) | None => None,
                };
                if let Some(before) = &self.last {
                    if is_restarted(before, &sample) {
                        self.news = Some((News::Restarted, TOLD));
                    }
                    if !self.is_paused {
                        self.rates = rates(before, &sample);
                    }
                } else {
                    self.rates = rates(&sample, &sample);
                }
                self.last = Some(sample);
            }
            Err(why) => self.trouble = Some(why),
        }
    }

    /// What is to be told of the daemon.
    pub(super) fn news(&self) -> Option<News> {
        self.news.map(|(news, _)| news)
    }

    /// Whether anything is known yet.
    pub(super) const fn is_informed(&self) -> bool {
        self.last.is_some()
    }

    /// All disks.
    pub(super) fn all(&self) -> &[Rate] {
        &self.rates
    }

    /// The disks that are to be shown, in order.
    pub(super) fn shown(&self) -> Vec<Rate> {
        let wanted = |rate: &&Rate| {
            rate.name.contains(&self.filter)
                && (!self.only_busy || rate.iops > 0 || rate.in_flight > 0)
        };
        let mut shown: Vec<Rate> = self.rates.iter().filter(wanted).cloned().collect();
        sort(&mut shown, self.sort, self.is_reversed);
        shown
    }

    /// Does what a key is for.
    pub(super) fn press(&mut self, key: KeyEvent) -> Wish {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Wish::End;
        }
        if self.is_typing {
            self.type_filter(key.code);
            return Wish::GoOn;
        }
        let page = self.room.max(1);
        match key.code {
            KeyCode::Char('q') => return Wish::End,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Char('r') => self.is_reversed = !self.is_reversed,
            KeyCode::Char('b') => self.only_busy = !self.only_busy,
            KeyCode::Char('p') => self.is_paused = !self.is_paused,
            KeyCode::Left => self.sort = self.sort.moved(-1),
            KeyCode::Right => self.sort = self.sort.moved(1),
            KeyCode::Up => self.first = self.first.saturating_sub(1),
            KeyCode::Down => self.first += 1,
            KeyCode::PageUp => self.first = self.first.saturating_sub(page),
            KeyCode::PageDown => self.first += page,
            KeyCode::Home => self.first = 0,
            KeyCode::End => self.first = usize::MAX,
            _ => {}
        }
        Wish::GoOn
    }

    fn type_filter(&mut self, code: KeyCode) {
        match code {
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace => {
                self.filter.pop();
            }
            KeyCode::Char(letter) => {
                self.filter.push(letter);
                self.first = 0;
            }
            _ => {}
        }
    }
}
