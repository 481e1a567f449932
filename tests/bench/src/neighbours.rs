//! What a disk suffers from disks that are flooded beside it, served by one daemon with one worker, all on one CPU.
//!
//! The calm disk has a read of 4 KiB each [`PACE`], one at a time, so that all instants count alike, the flooded ones as many requests as they are told; all data are in the page cache, so
//! that the worker is what they meet at. The other CPU is the clients'. The calm one's client sleeps until it is called and goes before the others
//! there (SCHED_FIFO, for which one must be root), so what is measured is the server's doing and the wake-up.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::unistd::gettid;

use crate::back_end::{BackEnd, Programs, Server};
use crate::cell::CellError;
use crate::client::{self, Connection, Queue};
use crate::contents::{Contents, PAGE, mix};
use crate::cpus;
use crate::images::{ImageError, Images};
use crate::lane::{self, Lane, LaneError, Tally};
use crate::latency::Latencies;
use crate::plan::{Places, Plan, Span};
use crate::workload::{Operation, Order, Waiting, Workload};

/// How long the others flood before and after what is measured.
const MARGIN: Duration = Duration::from_millis(200);

/// How often the calm disk is read from.
const PACE: Duration = Duration::from_micros(500);

/// A load on a disk's one queue.
#[derive(Debug, Clone, Copy)]
struct Flood {
    name: &'static str,
    operation: Operation,
    bytes: usize,
    depth: usize,
}

/// What is done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Remedy {
    Nothing,
    /// Each flooded disk has the limits [`LIMITS`].
    Limits,
    /// The calm disk has a worker of its own, on the same CPU.
    OwnWorker,
}

/// Of a flooded disk, where it has some.
const LIMITS: &str = "{ iops_total = 5000, bps_total = 209715200 }";

const REMEDIES: [Remedy; 3] = [Remedy::Nothing, Remedy::Limits, Remedy::OwnWorker];

/// How many disks are flooded at once.
const DISKS: [usize; 2] = [1, 4];

const fn flood(name: &'static str, operation: Operation, bytes: usize, depth: usize) -> Flood {
    Flood {
        name,
        operation,
        bytes,
        depth,
    }
}

const FLOODS: [Flood; 5] = [
    flood("reads of 4 KiB, 32 in flight", Operation::Read, 4 << 10, 32),
    flood(
        "reads of 4 KiB, 128 in flight",
        Operation::Read,
        4 << 10,
        128,
    ),
    flood(
        "writes of 4 KiB, 32 in flight",
        Operation::Write,
        4 << 10,
        32,
    ),
    flood("reads of 1 MiB, 32 in flight", Operation::Read, 1 << 20, 32),
    flood(
        "writes of 1 MiB, 32 in flight",
        Operation::Write,
        1 << 20,
        32,
    ),
];

/// What the calm disk's reads took, and what the others moved meanwhile.
#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    p50_us: f64,
    p99_us: f64,
    flood_mib: f64,
}

/// A disk and what it must read as.
struct Disk {
    name: String,
    image: PathBuf,
    contents: Arc<Contents>,
}

/// The disks, the calm one first.
pub(crate) struct Neighbours<'a> {
    programs: &'a Programs,
    place: PathBuf,
    disks: Vec<Disk>,
    measured: Duration,
    rounds: u32,
}

impl<'a> Neighbours<'a> {
    /// Makes the disks, of so many bytes.
    pub(crate) fn new(
        images: &mut Images<'_>,
        programs: &'a Programs,
        bytes: u64,
        (measured, rounds): (Duration, u32),
    ) -> Result<Self, ImageError> {
        let full = Workload::named("randread-4k-qd1").expect("it is in the table");
        let first = images.prepare(full, Server::VdiVhost)?;
        let place = images.directory().to_owned();
        let mut disks = Vec::new();
        for nth in 0..=*DISKS.last().expect("there are some") {
            let name = if nth == 0 {
                "calm".to_owned()
            } else {
                format!("flooded-{nth}")
            };
            let image = place.join(format!("{name}.vdi"));
            let copied =
                fs::copy(&first.path, &image).and_then(|_| fs::File::open(&image)?.sync_all());
            copied.map_err(|source| ImageError::File {
                path: image.clone(),
                source,
            })?;
            let contents = Arc::new(Contents::filled(bytes));
            disks.push(Disk {
                name,
                image,
                contents,
            });
        }
        Ok(Self {
            programs,
            place,
            disks,
            measured,
            rounds,
        })
    }

    /// Measures all and makes the table.
    pub(crate) fn table(&self) -> Result<String, CellError> {
        let alone = self.medians(None, 0, Remedy::Nothing)?;
        let mut text = format!(
            "| beside it | without limits: p50, p99 | × alone | they move | limited: p50, p99 | × alone | own worker: p50, p99 | × alone |\n\
             | --- | --: | --: | --: | --: | --: | --: | --: |\n\
             | nothing | {:.0}, {:.0} µs | | | | | | |\n",
            alone.p50_us, alone.p99_us
        );
        for flood in &FLOODS {
            for disks in DISKS {
                let many = if disks == 1 { "1 disk" } else { "4 disks" };
                text += &format!("| {many}: {} ", flood.name);
                for remedy in REMEDIES {
                    let with = self.medians(Some(flood), disks, remedy)?;
                    let factor = with.p99_us / alone.p99_us;
                    text += &format!("| {:.0}, {:.0} µs | {factor:.1} ", with.p50_us, with.p99_us);
                    if remedy == Remedy::Nothing {
                        text += &format!("| {:.0} MiB/s ", with.flood_mib);
                    }
                }
                text += "|\n";
                eprint!(
                    "{}",
                    text.lines().last().unwrap_or_default().to_owned() + "\n"
                );
            }
        }
        Ok(text)
    }

    /// Measures it a few times; the median of each figure.
    fn medians(
        &self,
        flood: Option<&Flood>,
        disks: usize,
        remedy: Remedy,
    ) -> Result<Measured, CellError> {
        let rounds = (0..self.rounds.max(1)).map(|round| self.measure(flood, disks, remedy, round));
        let all = rounds.collect::<Result<Vec<_>, _>>()?;
        let median = |figure: fn(&Measured) -> f64| {
            let mut figures: Vec<f64> = all.iter().map(figure).collect();
            figures.sort_by(f64::total_cmp);
            figures[figures.len() / 2]
        };
        Ok(Measured {
            p50_us: median(|measured| measured.p50_us),
            p99_us: median(|measured| measured.p99_us),
            flood_mib: median(|measured| measured.flood_mib),
        })
    }

    fn measure(
        &self,
        flood: Option<&Flood>,
        disks: usize,
        remedy: Remedy,
        round: u32,
    ) -> Result<Measured, CellError> {
        let config = self.place.join("neighbours.toml");
        fs::write(&config, self.config(disks, remedy)).map_err(|source| ImageError::File {
            path: config.clone(),
            source,
        })?;
        let mut server = BackEnd::of_disks(self.programs, &config)?;
        let mut connect = |disk: &Disk, depth, bytes| -> Result<Connection, CellError> {
            let socket = self.place.join(format!("{}.sock", disk.name));
            let greeted = client::greet_at(&mut server, &socket)?;
            Ok(greeted.start(1, depth, bytes, Waiting::Calls)?)
        };
        let mut calm_one = connect(&self.disks[0], 1, PAGE)?;
        let mut flooded = Vec::new();
        if let Some(flood) = flood {
            for disk in &self.disks[1..=disks] {
                flooded.push((disk, flood, connect(disk, flood.depth, flood.bytes)?));
            }
        }
        let whole = self.measured + 2 * MARGIN;
        let (own, others) = std::thread::scope(|scope| {
            let others: Vec<_> = flooded
                .iter_mut()
                .map(|(disk, flood, connection)| {
                    scope.spawn(move || drive(disk, flood, connection, whole, round))
                })
                .collect();
            let own = scope.spawn(|| {
                go_first()?;
                std::thread::sleep(MARGIN);
                read_calmly(&self.disks[0], &mut calm_one, self.measured)
            });
            let joined = others
                .into_iter()
                .map(|thread| thread.join().expect("loads do not panic"));
            let others: Result<Vec<_>, _> = joined.collect();
            (own.join().expect("loads do not panic"), others)
        });
        drop((calm_one, flooded));
        server.end()?;
        let own = own?;
        let bytes = flood.map_or(0, |flood| flood.bytes);
        Ok(Measured {
            p50_us: own.percentile_us(50),
            p99_us: own.percentile_us(99),
            flood_mib: others?
                .iter()
                .map(|tally| mib_per_second(tally, bytes))
                .sum(),
        })
    }

    fn config(&self, disks: usize, remedy: Remedy) -> String {
        let cpu = cpus::of_server();
        let mut text = format!(
            "control-socket = \"control\"\nsocket-dir = \".\"\nworkers = 1\nworker-cpus = \"{cpu}\"\n"
        );
        for (nth, Disk { name, image, .. }) in self.disks.iter().take(disks + 1).enumerate() {
            text += &format!("[[disk]]\nname = {name:?}\nimage = {image:?}\n");
            match (nth, remedy) {
                (0, Remedy::OwnWorker) => text += &format!("worker-cpus = \"{cpu}\"\n"),
                (1.., Remedy::Limits) => text += &format!("limits = {LIMITS}\n"),
                (_, _) => {}
            }
        }
        text
    }
}

/// Reads here and there, and how long that took each time.
fn read_calmly(
    disk: &Disk,
    connection: &mut Connection,
    measured: Duration,
) -> Result<Latencies, CellError> {
    cpus::move_to_client_cpu();
    let queue = &mut connection.queues[0];
    let (start, pages) = (Instant::now(), disk.contents.bytes() / PAGE as u64);
    let (mut latencies, mut answers) = (Latencies::new(), Vec::new());
    for nth in 0.. {
        let begun = Instant::now();
        if begun - start >= measured {
            break;
        }
        let at = mix(nth) % pages * PAGE as u64;
        queue.read(0, at, PAGE)?;
        queue.kick()?;
        while !queue.is_answered() {
            queue.wait()?;
        }
        latencies.add(begun.elapsed());
        queue.reap(&mut answers);
        check(queue, disk, at, &mut answers)?;
        std::thread::sleep(PACE.saturating_sub(begun.elapsed()));
    }
    Ok(latencies)
}

/// The one answer must be OK, and the right data have come with it.
fn check(
    queue: &Queue,
    disk: &Disk,
    at: u64,
    answers: &mut Vec<(u16, i32)>,
) -> Result<(), LaneError> {
    for (slot, errno) in answers.drain(..) {
        if errno != 0 {
            return Err(LaneError::Answered {
                operation: Operation::Read,
                at,
                bytes: PAGE,
                errno: -errno,
            });
        }
        lane::check(&queue.buffer(slot), &disk.contents, at, PAGE)?;
    }
    Ok(())
}

/// Puts the load on a disk.
fn drive(
    disk: &Disk,
    load: &Flood,
    connection: &mut Connection,
    measured: Duration,
    round: u32,
) -> Result<Tally, CellError> {
    cpus::move_to_client_cpu();
    let (bytes, depth) = (load.bytes as u64, load.depth as u64);
    let end = disk.contents.bytes();
    let plan = Plan {
        operation: load.operation,
        bytes: load.bytes,
        places: Places::new(Order::Random, end, bytes, (0, 1), depth, round.into()),
        check_all: false,
    };
    let span = Span {
        warm_up: Duration::ZERO,
        measured,
    };
    let mut lane = Lane::new(&mut connection.queues[0], &disk.contents, Waiting::Calls);
    Ok(lane.run(plan, span, &|| Duration::ZERO)?)
}

/// Has this thread go before all others on its CPU.
fn go_first() -> Result<(), CellError> {
    let thread = gettid().to_string();
    let done = Command::new("chrt")
        .args(["--fifo", "--pid", "10", &thread])
        .status();
    match done {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(CellError::Priority(io::Error::other(status.to_string()))),
        Err(error) => Err(CellError::Priority(error)),
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn mib_per_second(tally: &Tally, bytes: usize) -> f64 {
    let moved = tally.latencies.total() as f64 * bytes as f64;
    moved / f64::from(1 << 20) / tally.took.as_secs_f64()
}
