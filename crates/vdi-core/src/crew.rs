//! Several threads at one list of pieces.
//!
//! Invariants:
//!
//! - **T1** Pieces are given out in their order. What ends the work is the end of the lowest piece that
//!   has one, however many threads there are: all pieces below it were given out before it, and a
//!   piece that was given out is finished.
//! - **T2** Whoever asked for the work is asked on the asking thread, every [`TICK`], whether to go on.

use std::ops::ControlFlow;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::writer::lock;

/// How often it is asked whether to go on: unnoticed by a person, and by the work.
const TICK: Duration = Duration::from_millis(50);

/// How many threads work at something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Threads(usize);

impl Threads {
    /// The most that may be asked for: one file is not served faster by more, and `qemu-img` has the same limit.
    pub const MOST: usize = 16;

    /// This many, if it is a number from 1 to [`Self::MOST`].
    pub fn new(count: usize) -> Option<Self> {
        (1..=Self::MOST).contains(&count).then_some(Self(count))
    }

    /// To copy: one that reads, one that looks for zeros, one that writes. Reads take turns, and the host lets writes to one
    /// file take turns, so that more only wait.
    pub const TO_COPY: Self = Self(3);

    /// To compare: one for each CPU that this program may use, but at least eight, since they wait for storage more than for CPUs.
    pub fn of_this_host() -> Self {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        Self(cpus.clamp(8, Self::MOST))
    }
}

/// Why work ended before its pieces did.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stopped<E> {
    /// A piece ended it (T1).
    Ended(E),
    /// It was not to go on.
    Interrupted,
}

/// Has the pieces worked at. Each thread has a desk of its own for what it uses again and again.
pub(crate) fn share_out<P: Send, E: Send, D>(
    threads: Threads,
    pieces: impl Iterator<Item = Result<P, E>> + Send,
    desk: impl Fn() -> D + Sync,
    work: impl Fn(&mut D, P) -> Result<(), E> + Sync,
    go_on: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<(), Stopped<E>> {
    if go_on().is_break() {
        return Err(Stopped::Interrupted);
    }
    let crew = Crew {
        feed: Mutex::new(Feed {
            pieces: Some(pieces),
            given: 0,
        }),
        state: Mutex::new(State {
            working: threads.0,
            end: None,
        }),
        gone: Condvar::new(),
    };
    let mut is_interrupted = false;
    thread::scope(|scope| {
        for _ in 0..threads.0 {
            scope.spawn(|| crew.serve(desk(), &work));
        }
        while crew.is_at_work() {
            if !is_interrupted && go_on().is_break() {
                is_interrupted = true;
                lock(&crew.feed).pieces = None;
            }
        }
    });
    match lock(&crew.state).end.take() {
        Some((_, end)) => Err(Stopped::Ended(end)),
        None if is_interrupted => Err(Stopped::Interrupted),
        None => Ok(()),
    }
}

struct Crew<I, E> {
    feed: Mutex<Feed<I>>,
    state: Mutex<State<E>>,
    /// Told when a thread has no more to do.
    gone: Condvar,
}

struct Feed<I> {
    /// `None` when no more are given out.
    pieces: Option<I>,
    given: u64,
}

struct State<E> {
    working: usize,
    /// The end of the lowest piece that had one, and the piece's number.
    end: Option<(u64, E)>,
}

impl<I, E> Crew<I, E> {
    /// Waits a [`TICK`], or less if the last thread goes meanwhile, and says whether any is there.
    fn is_at_work(&self) -> bool {
        let waited = self
            .gone
            .wait_timeout_while(lock(&self.state), TICK, |state| state.working > 0);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.working > 0
    }
}

impl<P, E, I: Iterator<Item = Result<P, E>>> Crew<I, E> {
    fn serve<D>(&self, mut desk: D, work: &impl Fn(&mut D, P) -> Result<(), E>) {
        let _gone = Gone(self);
        loop {
            let next = lock(&self.feed).next();
            let Some((number, piece)) = next else {
                return;
            };
            let done = piece.and_then(|piece| work(&mut desk, piece));
            if let Err(end) = done {
                lock(&self.feed).pieces = None;
                lock(&self.state).keep_lowest(number, end);
            }
        }
    }
}

impl<P, E, I: Iterator<Item = Result<P, E>>> Feed<I> {
    fn next(&mut self) -> Option<(u64, I::Item)> {
        let piece = self.pieces.as_mut()?.next()?;
        self.given += 1;
        Some((self.given, piece))
    }
}

impl<E> State<E> {
    fn keep_lowest(&mut self, number: u64, end: E) {
        if self.end.as_ref().is_none_or(|(kept, _)| number < *kept) {
            self.end = Some((number, end));
        }
    }
}

/// A thread that says so when it goes, even in a panic.
struct Gone<'c, I, E>(&'c Crew<I, E>);

impl<I, E> Drop for Gone<'_, I, E> {
    fn drop(&mut self) {
        lock(&self.0.state).working -= 1;
        self.0.gone.notify_all();
    }
}

#[cfg(test)]
impl Threads {
    pub(crate) const TWO: Self = Self(2);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    const FOUR: Threads = Threads(4);

    fn go_on() -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    #[test]
    fn every_piece_is_worked_at_once() {
        let sum = AtomicU64::new(0);
        let pieces = (0..1000_u64).map(Ok::<_, ()>);
        let work = |desk: &mut u64, piece| {
            *desk += 1;
            sum.fetch_add(piece, Ordering::Relaxed);
            Ok(())
        };
        assert_eq!(share_out(FOUR, pieces, || 0, work, &mut go_on), Ok(()));
        assert_eq!(sum.into_inner(), 999 * 500);
    }

    #[test]
    fn the_lowest_piece_that_ends_the_work_is_the_end_of_it() {
        for _ in 0..50 {
            let pieces = (0..100_u64).map(Ok);
            let work = |(): &mut (), piece: u64| match piece {
                // The lowest one is the last to say so.
                3 => {
                    thread::sleep(Duration::from_millis(2));
                    Err(piece)
                }
                4.. => Err(piece),
                _ => Ok(()),
            };
            let ended = share_out(FOUR, pieces, || (), work, &mut go_on);
            assert_eq!(ended, Err(Stopped::Ended(3)));
        }
    }

    #[test]
    fn a_list_that_fails_ends_the_work_where_it_does() {
        let pieces = (0..100_u64).map(|piece| if piece == 50 { Err(piece) } else { Ok(piece) });
        let ended = share_out(FOUR, pieces, || (), |(), _| Ok(()), &mut go_on);
        assert_eq!(ended, Err(Stopped::Ended(50)));
    }

    #[test]
    fn work_without_an_end_is_interrupted() {
        let pieces = (0_u64..).map(Ok::<_, ()>);
        let mut asked = 0;
        let mut go_on = || {
            asked += 1;
            if asked < 3 {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        };
        let ended = share_out(FOUR, pieces, || (), |(), _| Ok(()), &mut go_on);
        assert_eq!(ended, Err(Stopped::Interrupted));
    }

    #[test]
    fn the_number_of_threads_is_bounded() {
        assert_eq!(Threads::new(0), None);
        assert_eq!(Threads::new(Threads::MOST + 1), None);
        assert_eq!(Threads::new(Threads::MOST), Some(Threads(Threads::MOST)));
        assert!(Threads::new(Threads::of_this_host().0).is_some());
    }
}
