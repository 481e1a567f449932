//! One cell of the table, one round: a server on an image under a load, checked and measured.

use std::time::Duration;

use crate::back_end::{BackEnd, BackEndError, Programs, Server, Service};
use crate::client::{self, ClientError, Connection};
use crate::contents::{PAGE, mix};
use crate::cpus;
use crate::fio::{self, FioError};
use crate::images::{BLOCK, Image, ImageError, Images};
use crate::lane::{Lane, LaneError, Tally};
use crate::latency::Latencies;
use crate::medium::Medium;
use crate::plan::{Places, Plan, Span};
use crate::record::Load;
use crate::syscalls::{Counter, CounterError};
use crate::workload::{Disk, Operation, Order, Waiting, Workload};

/// Why there is nothing to record.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CellError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    BackEnd(#[from] BackEndError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Lane(#[from] LaneError),
    #[error(transparent)]
    Fio(#[from] FioError),
    #[error(transparent)]
    Counter(#[from] CounterError),
    #[error("a thread of the client cannot be given priority with chrt; be root")]
    Priority(#[source] std::io::Error),
}

/// What is measured, and for how long.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cell<'a> {
    pub(crate) medium: Medium,
    pub(crate) workload: &'a Workload,
    pub(crate) server: Server,
    pub(crate) round: u32,
    pub(crate) measured: Duration,
    /// Whether system calls are counted, too.
    pub(crate) counted: bool,
}

impl Cell<'_> {
    /// Measures it.
    pub(crate) fn run(
        &self,
        images: &mut Images<'_>,
        programs: &Programs,
    ) -> Result<Load, CellError> {
        let image = images.prepare(self.workload, self.server)?;
        if self.server == Server::Fio {
            return self.limit(&image);
        }
        let mut back_end = BackEnd::start(programs, &self.service(&image))?;
        let connection = self.connect(&mut back_end)?;
        let record = self
            .measure(&image, &back_end, connection)
            .map_err(|error| match back_end.ended() {
                Some(ended) => ended.into(),
                None => error,
            })?;
        back_end.end()?;
        Ok(record)
    }

    fn service<'a>(&self, image: &'a Image) -> Service<'a> {
        Service {
            server: self.server,
            image: &image.path,
            direct: self.medium.is_direct(),
            queues: self.workload.queues,
            pinned: self.is_pinned(),
        }
    }

    /// With one queue, server and client have a CPU each.
    fn is_pinned(&self) -> bool {
        self.workload.queues == 1
    }

    fn limit(&self, image: &Image) -> Result<Load, CellError> {
        let measured = fio::run(self.workload, image, self.medium.is_direct(), self.measured)?;
        Ok(Load {
            requests: measured.requests,
            iops: measured.iops,
            p50_us: measured.p50_us,
            p99_us: measured.p99_us,
            cpu_us: measured.cpu_us,
            ..self.blank()
        })
    }

    fn connect(&self, back_end: &mut BackEnd) -> Result<Connection, CellError> {
        let Workload {
            queues,
            depth,
            bytes,
            waiting,
            ..
        } = *self.workload;
        let greeted = client::greet(back_end)?;
        Ok(greeted.start(queues, depth, bytes.max(PAGE), waiting)?)
    }

    fn measure(
        &self,
        image: &Image,
        back_end: &BackEnd,
        mut connection: Connection,
    ) -> Result<Load, CellError> {
        let waiting = self.workload.waiting;
        if self.workload.disk == Disk::Refilled {
            refill(&mut connection, image)?;
        }
        let counter = self.counted.then(|| Counter::attach(back_end.pid()));
        let counter = counter.transpose()?.flatten();
        let tallies = self.load(image, &|| back_end.cpu(), &mut connection)?;
        let syscalls = counter.map(Counter::finish).transpose()?;
        let resident_kib = back_end.resident_kib();
        let pages = self.suspects(image, &tallies);
        Lane::new(&mut connection.queues[0], &image.contents, waiting).verify(pages)?;
        let answered: u64 = tallies.iter().map(|tally| tally.answered).sum();
        Ok(Load {
            resident_kib,
            syscalls: syscalls.map(|syscalls| count(syscalls) / count(answered.max(1))),
            ..self.summary(&tallies)
        })
    }

    /// Puts the load on all queues, a thread for each.
    fn load(
        &self,
        image: &Image,
        cpu: &(dyn Fn() -> Duration + Sync),
        connection: &mut Connection,
    ) -> Result<Vec<Tally>, LaneError> {
        std::thread::scope(|scope| {
            let lanes = connection.queues.iter_mut().enumerate();
            let threads: Vec<_> = lanes
                .map(|(nth, queue)| {
                    scope.spawn(move || {
                        if self.is_pinned() {
                            cpus::move_to_client_cpu();
                        }
                        let mut lane = Lane::new(queue, &image.contents, self.workload.waiting);
                        self.drive(&mut lane, nth as u64, image, cpu)
                    })
                })
                .collect();
            let joined = threads
                .into_iter()
                .map(|thread| thread.join().expect("loads do not panic"));
            joined.collect()
        })
    }

    fn drive(
        &self,
        lane: &mut Lane<'_>,
        nth: u64,
        image: &Image,
        cpu: &dyn Fn() -> Duration,
    ) -> Result<Tally, LaneError> {
        let Workload {
            operation,
            order,
            bytes,
            depth,
            queues,
            ..
        } = *self.workload;
        let unit = if order == Order::OnceEachBlock {
            BLOCK
        } else {
            bytes as u64
        };
        let seed = u64::from(self.round);
        let places = Places::new(
            order,
            image.end,
            unit,
            (nth, queues as u64),
            depth as u64,
            seed,
        );
        let plan = Plan {
            operation,
            bytes,
            places,
            check_all: false,
        };
        let warm_up = if self.workload.runs_out() {
            Duration::ZERO
        } else {
            (self.measured / 5).min(Duration::from_millis(100))
        };
        lane.run(
            plan,
            Span {
                warm_up,
                measured: self.measured,
            },
            cpu,
        )
    }

    /// The pages that are read again at the end: some that were written, and any.
    fn suspects(&self, image: &Image, tallies: &[Tally]) -> Vec<u64> {
        let pages = image.end / PAGE as u64;
        let any = (0..64).map(|nth| mix(nth ^ u64::from(self.round) << 32) % pages * PAGE as u64);
        let written = tallies
            .iter()
            .flat_map(|tally| tally.written.iter().copied());
        written.chain(any).collect()
    }

    fn summary(&self, tallies: &[Tally]) -> Load {
        let mut latencies = Latencies::new();
        let (mut iops, mut calls, mut kicks) = (0.0, 0, 0);
        for tally in tallies {
            latencies.merge(&tally.latencies);
            iops += count(tally.latencies.total()) / tally.took.as_secs_f64();
            calls += tally.calls;
            kicks += tally.kicks;
        }
        let requests = latencies.total();
        let each = |total: f64| total / count(requests.max(1));
        Load {
            requests,
            iops,
            p50_us: latencies.percentile_us(50),
            p99_us: latencies.percentile_us(99),
            // Each lane sees the CPU time of the whole server.
            cpu_us: each(tallies[0].cpu.as_secs_f64() * 1e6),
            calls: Some(each(count(calls))),
            kicks: Some(each(count(kicks))),
            ..self.blank()
        }
    }

    fn blank(&self) -> Load {
        Load {
            medium: self.medium,
            workload: self.workload.name.to_owned(),
            server: self.server,
            round: self.round,
            requests: 0,
            iops: 0.0,
            p50_us: 0.0,
            p99_us: 0.0,
            cpu_us: 0.0,
            calls: None,
            kicks: None,
            syscalls: None,
            resident_kib: None,
        }
    }
}

/// Has the server write all blocks of the disk.
fn refill(connection: &mut Connection, image: &Image) -> Result<(), LaneError> {
    let places = Places::Once {
        next: 0,
        step: BLOCK,
        end: image.end,
    };
    let plan = Plan {
        operation: Operation::Write,
        bytes: usize::try_from(BLOCK).expect("blocks fit in memory"),
        places,
        check_all: false,
    };
    let whole = Span {
        warm_up: Duration::ZERO,
        measured: client::PATIENCE,
    };
    let queue = &mut connection.queues[0];
    let waiting = Waiting::Polling;
    Lane::new(queue, &image.contents, waiting).run(plan, whole, &|| Duration::ZERO)?;
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn count(number: u64) -> f64 {
    number as f64
}
