//! `vdi top`: all disks of a daemon, live.
//!
//! ```text
//! sampler (a thread) ─► Sample ─┐
//! keys ─────────────────────────┴► Top ─► view ─► terminal, or text
//! ```
//!
//! The daemon is asked by a thread of its own, so that keys are heard while it does not answer. Each time it is connected to anew: a daemon
//! that was restarted is found again, and one that is silent is not held on to.

mod rates;
mod state;
mod view;

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};
use serde::Deserialize;
use serde_json::Value;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use self::rates::Sample;
pub(crate) use self::rates::SortKey;
use self::state::{Top, Wish};
use crate::args::TopArgs;
use crate::commands::Failure;
use crate::daemon::{Daemon, DaemonError};
use crate::stats::DiskStats;

/// How soon a key is heard.
const ATTENTION: Duration = Duration::from_millis(50);

#[derive(Deserialize)]
struct All {
    disks: Vec<DiskStats>,
}

/// What all disks did until now.
fn sample(socket: &Path) -> Result<Sample, DaemonError> {
    let all: All = Daemon::at(socket)?.ask_for("stats-of-all", Value::Null)?;
    Ok(Sample {
        taken: Instant::now(),
        disks: all.disks,
    })
}

/// Does what the command line says.
pub(crate) fn run(args: &TopArgs) -> Result<ExitCode, Failure> {
    let top = Top::new(args.socket.clone(), args.sort, args.filter.clone());
    if args.once || args.batch {
        let count = if args.once { Some(1) } else { args.count };
        print(top, args, count)?;
    } else if io::stdout().is_terminal() {
        let signals = Signals::heard()?;
        let mut terminal = ratatui::try_init()?;
        let shown = show(top, args, &mut terminal, &signals);
        ratatui::restore();
        // Whoever sent it sees that it did what it does.
        if let Some(signal) = signals.came() {
            signal_hook::low_level::emulate_default_handler(signal)?;
        }
        shown?;
    } else {
        return Err(Failure::NoTerminal);
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints tables, for scripts: one for each interval.
fn print(mut top: Top, args: &TopArgs, count: Option<u64>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    top.take(Ok(sample(&args.socket)?));
    let mut left = count;
    while left != Some(0) {
        thread::sleep(args.interval());
        let sampled = sample(&args.socket);
        if count.is_some() {
            top.take(Ok(sampled?));
        } else {
            top.take(sampled.map_err(|error| crate::line_of_causes(&error)));
        }
        write!(out, "{}", view::text(&top))?;
        out.flush()?;
        left = left.map(|left| left - 1);
        if left != Some(0) {
            writeln!(out)?;
        }
    }
    Ok(())
}

/// Signals that end it, after which the terminal is to be as it was.
struct Signals(Arc<AtomicUsize>);

impl Signals {
    fn heard() -> io::Result<Self> {
        let came = Arc::default();
        for signal in [SIGTERM, SIGHUP, SIGINT] {
            let number = usize::try_from(signal).unwrap_or_default();
            flag::register_usize(signal, Arc::clone(&came), number)?;
        }
        Ok(Self(came))
    }

    /// The one that came last.
    fn came(&self) -> Option<i32> {
        let number = self.0.load(Ordering::Relaxed);
        i32::try_from(number).ok().filter(|number| *number != 0)
    }
}

/// Shows all until somebody has seen enough, or it is told to end.
fn show(
    mut top: Top,
    args: &TopArgs,
    terminal: &mut DefaultTerminal,
    signals: &Signals,
) -> Result<(), Failure> {
    let (told, samples) = mpsc::sync_channel(0);
    let (socket, interval) = (args.socket.clone(), args.interval());
    thread::spawn(move || ask_for_ever(&socket, interval, &told));
    let mut is_stale = true;
    while signals.came().is_none() {
        if is_stale {
            terminal.draw(|frame| view::draw(frame, &mut top))?;
        }
        is_stale = hear(&samples, &mut top);
        if !event::poll(ATTENTION)? {
            continue;
        }
        is_stale = true;
        // What was typed or resized meanwhile is drawn once.
        while event::poll(Duration::ZERO)? {
            if let Event::Key(key) = event::read()?
                && key.kind != KeyEventKind::Release
                && top.press(key) == Wish::End
            {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Takes the next sample, if there is one.
fn hear(samples: &Receiver<Result<Sample, String>>, top: &mut Top) -> bool {
    match samples.recv_timeout(Duration::ZERO) {
        Ok(sampled) => {
            top.take(sampled);
            true
        }
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
    }
}

fn ask_for_ever(socket: &Path, interval: Duration, told: &SyncSender<Result<Sample, String>>) {
    let mut next = Instant::now();
    loop {
        let sampled = sample(socket).map_err(|error| crate::line_of_causes(&error));
        if told.send(sampled).is_err() {
            return;
        }
        next = (next + interval).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}
