//! The load on one queue: keeps its slots busy, checks what comes back, counts and takes the time.
//!
//! Every request must be answered with OK. Of reads, one of [`SAMPLE`] is poisoned before and checked whole after; all
//! that [`Lane::verify`] reads are.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, VolatileSlice};

use crate::client::{ClientError, PATIENCE, Queue};
use crate::contents::{Contents, PAGE, SECTOR, mix};
use crate::latency::Latencies;
use crate::plan::{Places, Plan, Span};
use crate::workload::{Operation, Waiting};

/// One of so many reads is checked. Checking all would make the client the slower end.
const SAMPLE: u64 = 16;

/// A client that polls looks at the clock after so many looks at the ring.
const SPINS: u32 = 256;

/// Why a load failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LaneError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the server answered {operation:?} of {bytes} bytes at {at} with errno {errno}")]
    Answered {
        operation: Operation,
        at: u64,
        bytes: usize,
        errno: i32,
    },
    #[error("sector {sector} reads as {found:#018x}, and should as {expected:#018x}")]
    Wrong {
        sector: u64,
        found: u64,
        expected: u64,
    },
}

/// What was counted.
#[derive(Debug, Clone)]
pub(crate) struct Tally {
    pub(crate) latencies: Latencies,
    /// How long that took.
    pub(crate) took: Duration,
    /// Server's CPU time before and after, by the clock that was given.
    pub(crate) cpu: Duration,
    pub(crate) calls: u64,
    pub(crate) kicks: u64,
    /// All requests that were answered, also those before and after what is measured.
    pub(crate) answered: u64,
    /// Some of the places that were written.
    pub(crate) written: Vec<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    operation: Operation,
    at: u64,
    started: Instant,
    checked: bool,
}

/// A queue under load.
pub(crate) struct Lane<'a> {
    queue: &'a mut Queue,
    contents: &'a Contents,
    waiting: Waiting,
    slots: Vec<Slot>,
    nth: u64,
}

/// The state of one run.
struct Run<'a> {
    plan: Plan,
    cpu: &'a dyn Fn() -> Duration,
    begin: Option<Mark>,
    end: Option<Mark>,
    from: Instant,
    until: Instant,
    in_flight: usize,
    answered: u64,
    ran_out: bool,
    latencies: Latencies,
    written: Vec<u64>,
}

#[derive(Clone, Copy)]
struct Mark {
    at: Instant,
    cpu: Duration,
    calls: u64,
    kicks: u64,
}

impl<'a> Lane<'a> {
    pub(crate) fn new(queue: &'a mut Queue, contents: &'a Contents, waiting: Waiting) -> Self {
        let idle = Slot {
            operation: Operation::Read,
            at: 0,
            started: Instant::now(),
            checked: false,
        };
        let slots = vec![idle; queue.slots()];
        Self {
            queue,
            contents,
            waiting,
            slots,
            nth: 0,
        }
    }

    /// Keeps all slots busy until the time is over or the places are; `cpu` tells the server's CPU time.
    pub(crate) fn run(
        &mut self,
        plan: Plan,
        span: Span,
        cpu: &dyn Fn() -> Duration,
    ) -> Result<Tally, LaneError> {
        let start = Instant::now();
        let from = start + span.warm_up;
        let mut run = Run {
            plan,
            cpu,
            begin: None,
            end: None,
            from,
            until: from + span.measured,
            in_flight: 0,
            answered: 0,
            ran_out: false,
            latencies: Latencies::new(),
            written: Vec::new(),
        };
        if span.warm_up.is_zero() {
            run.begin = Some(self.mark(&run, start)?);
        }
        let mut free: Vec<u16> = (0..).take(self.slots.len()).collect();
        let mut answers = Vec::with_capacity(self.slots.len());
        loop {
            let now = Instant::now();
            for (slot, errno) in answers.drain(..) {
                self.complete(&mut run, slot, errno, now, &mut free)?;
            }
            self.pass(&mut run, now)?;
            if run.end.is_none() {
                self.submit(&mut run, &mut free, now)?;
            }
            self.queue.kick()?;
            if run.in_flight == 0 {
                self.pass(&mut run, now)?;
                break;
            }
            self.await_answers(&mut answers)?;
        }
        Ok(self.tally(run)?)
    }

    /// Reads these pages and checks all of them.
    pub(crate) fn verify(&mut self, pages: Vec<u64>) -> Result<(), LaneError> {
        let plan = Plan {
            operation: Operation::Read,
            bytes: PAGE,
            places: Places::Listed(pages),
            check_all: true,
        };
        let span = Span {
            warm_up: Duration::ZERO,
            measured: PATIENCE,
        };
        self.run(plan, span, &|| Duration::ZERO).map(drop)
    }

    /// Notes the beginning and the end of what is measured when they pass.
    fn pass(&mut self, run: &mut Run<'_>, now: Instant) -> Result<(), LaneError> {
        if run.begin.is_none() && now >= run.from {
            run.begin = Some(self.mark(run, now)?);
        }
        let drained = run.ran_out && run.in_flight == 0;
        // On a busy machine nothing may have been answered yet.
        let over = now >= run.until && run.latencies.total() > 0;
        if run.end.is_none() && (over || drained) {
            run.end = Some(self.mark(run, now)?);
        }
        Ok(())
    }

    fn mark(&mut self, run: &Run<'_>, at: Instant) -> Result<Mark, LaneError> {
        self.queue.count_calls()?;
        Ok(Mark {
            at,
            cpu: (run.cpu)(),
            calls: self.queue.calls,
            kicks: self.queue.kicks,
        })
    }

    fn submit(
        &mut self,
        run: &mut Run<'_>,
        free: &mut Vec<u16>,
        now: Instant,
    ) -> Result<(), LaneError> {
        while let Some(slot) = free.pop() {
            let bytes = run.plan.bytes;
            let Some(at) = run
                .plan
                .places
                .next(slot, self.contents.bytes(), bytes as u64)
            else {
                run.ran_out = true;
                break;
            };
            self.nth += 1;
            let operation = match run.plan.operation {
                Operation::Mixed if mix(self.nth) % 10 < 7 => Operation::Read,
                Operation::Mixed => Operation::Write,
                other => other,
            };
            let checked = run.plan.check_all || self.nth.is_multiple_of(SAMPLE);
            self.slots[usize::from(slot)] = Slot {
                operation,
                at,
                started: now,
                checked,
            };
            self.start(operation, slot, at, bytes, checked)?;
            run.in_flight += 1;
        }
        Ok(())
    }

    fn start(
        &mut self,
        operation: Operation,
        slot: u16,
        at: u64,
        bytes: usize,
        checked: bool,
    ) -> Result<(), LaneError> {
        match operation {
            Operation::Read | Operation::Mixed => {
                if checked {
                    poison(&self.queue.buffer(slot), bytes);
                }
                self.queue.read(slot, at, bytes)?;
            }
            Operation::Write | Operation::WriteFlush => {
                self.contents.write(at, bytes);
                self.stamp(slot, at, bytes);
                self.queue.write(slot, at, bytes)?;
            }
            Operation::Discard => {
                self.contents.forget(at, bytes);
                self.queue.discard(slot, at, bytes)?;
            }
        }
        Ok(())
    }

    fn complete(
        &mut self,
        run: &mut Run<'_>,
        slot: u16,
        errno: i32,
        now: Instant,
        free: &mut Vec<u16>,
    ) -> Result<(), LaneError> {
        let Slot {
            operation,
            at,
            started,
            checked,
        } = self.slots[usize::from(slot)];
        let bytes = run.plan.bytes;
        if errno != 0 {
            return Err(LaneError::Answered {
                operation,
                at,
                bytes,
                errno: -errno,
            });
        }
        match operation {
            Operation::Read | Operation::Mixed => {
                if checked {
                    check(&self.queue.buffer(slot), self.contents, at, bytes)?;
                }
            }
            Operation::WriteFlush => {
                // The second half of the same request.
                self.slots[usize::from(slot)].operation = Operation::Write;
                self.queue.flush(slot)?;
                return Ok(());
            }
            Operation::Write => {
                // The newest few hundred are kept.
                if run.written.len() < 256 {
                    run.written.push(at);
                } else {
                    let place = usize::try_from(self.nth % 256).expect("below 256");
                    run.written[place] = at;
                }
            }
            Operation::Discard => {}
        }
        run.in_flight -= 1;
        run.answered += 1;
        if run.begin.is_some() && run.end.is_none() {
            run.latencies.add(now - started);
        }
        free.push(slot);
        Ok(())
    }

    fn await_answers(&mut self, answers: &mut Vec<(u16, i32)>) -> Result<(), LaneError> {
        let mut since = None;
        while !self.queue.is_answered() {
            match self.waiting {
                Waiting::Calls => self.queue.wait()?,
                Waiting::Polling | Waiting::Yielding => {
                    for _ in 0..SPINS {
                        if self.queue.is_answered() {
                            break;
                        }
                        std::hint::spin_loop();
                    }
                    if self.waiting == Waiting::Yielding {
                        std::thread::yield_now();
                    }
                    let since = since.get_or_insert_with(Instant::now);
                    if since.elapsed() > PATIENCE {
                        return Err(ClientError::Silent.into());
                    }
                }
            }
        }
        self.queue.reap(answers);
        Ok(())
    }

    fn stamp(&self, slot: u16, at: u64, bytes: usize) {
        let buffer = self.queue.buffer(slot);
        for offset in (0..bytes).step_by(SECTOR) {
            let stamp = self
                .contents
                .stamp(at + offset as u64)
                .expect("what is written is known");
            buffer
                .write_obj(stamp, offset)
                .expect("requests fit in buffers");
        }
    }

    fn tally(&mut self, run: Run<'_>) -> Result<Tally, ClientError> {
        let begin = run.begin.expect("time passes");
        let end = run.end.expect("a run ends by its time or its places");
        // A client that sleeps notes both too late: what came before the one is missed, what came before the other is not.
        let nominal = if run.ran_out {
            Duration::ZERO
        } else {
            run.until - run.from
        };
        Ok(Tally {
            latencies: run.latencies,
            took: nominal.max(end.at - begin.at),
            cpu: end.cpu.saturating_sub(begin.cpu),
            calls: end.calls - begin.calls,
            kicks: end.kicks - begin.kicks,
            answered: run.answered,
            written: run.written,
        })
    }
}

/// So that what was there before is not taken for what was read.
fn poison(buffer: &VolatileSlice<'_>, bytes: usize) {
    for offset in (0..bytes).step_by(SECTOR) {
        buffer
            .write_obj(u64::MAX, offset)
            .expect("requests fit in buffers");
    }
}

/// What was read from there must be what the disk has, where that is known.
pub(crate) fn check(
    buffer: &VolatileSlice<'_>,
    contents: &Contents,
    at: u64,
    bytes: usize,
) -> Result<(), LaneError> {
    for offset in (0..bytes).step_by(SECTOR) {
        let at = at + offset as u64;
        let Some(expected) = contents.stamp(at) else {
            continue;
        };
        let found: u64 = buffer.read_obj(offset).expect("requests fit in buffers");
        if found != expected {
            return Err(LaneError::Wrong {
                sector: at / SECTOR as u64,
                found,
                expected,
            });
        }
    }
    Ok(())
}
