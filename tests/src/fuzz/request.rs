//! The target for requests: guest memory, a ring and chains of any shape, through the worker to a disk and back.
//!
//! ```text
//! Input ─► Driver ─► GuestMemory ─► Bench (worker, vdi-core)     what is done
//!                        └────────► device ─► Model              what must come out
//! ```
//!
//! What must hold, whatever a guest puts into its memory:
//!
//! - Every chain that can be followed and has a byte for a status is answered once, with the right status and length; the first that
//!   has not breaks the ring, and nothing behind it is touched.
//! - Nothing changes in guest memory but the status, what a request that succeeded was to write, and the used ring;
//!   what changed is marked for a migration.
//! - Reads give what the disk holds; only what names a sector changes it, and not if it fails.
//! - No kick and no call that was asked for is missing.
//! - All ends soon, also if the memory changes while it is read. Then nothing else is known, but
//! - in the end the image is sound.

mod device;
mod disk;
mod driver;
mod input;
mod memory;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vdi_core::check::{Severity, check};
use vdi_core::{Access, Disk, HostFile, ModifiedParent, Storage};
use vdi_vhost::fuzzing::{Bench, RingPlace, Wishes};

use self::device::{Answer, Effect, IO_ERROR, OK, Touched, Traits, Verdict, judge, total};
pub(super) use self::disk::Images;
use self::disk::Model;
use self::driver::{Driver, Ring};
use self::input::{Input, Kind, Shape, Step};
use self::memory::{GuestMemory, REGION};
use crate::driver::feature;
use crate::random::Random;

/// Turns of the worker within which all must be over: a turn may be as short as one window of one request.
const TURNS: usize = 400;

/// Turns while somebody writes to the memory.
const RACED_TURNS: usize = 8;

/// Changes an input a little.
pub fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    input::mutate(bytes, random);
}

/// Inputs to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    input::seeds()
}

/// Serves a guest that an input describes.
///
/// # Panics
/// If a promise is broken.
pub fn run(bytes: &[u8]) {
    let input = Input::parse(bytes);
    let Some(mut play) = Play::begin(input.shape) else {
        return;
    };
    for step in input.steps {
        play.step(step);
    }
    play.end();
}

/// A guest, a device, and what is known of both.
struct Play {
    shape: Shape,
    images: Images,
    memory: GuestMemory,
    log: Option<File>,
    driver: Driver,
    bench: Bench,
    model: Model,
    traits: Traits,
    /// Writes may fail.
    is_sealed: bool,
    /// Nothing is known of memory and disk any more.
    is_lost: bool,
}

impl Play {
    /// Opens the disk and starts the ring, if there can be such a one.
    fn begin(shape: Shape) -> Option<Self> {
        let images = Images::new(shape.has(Shape::PARENT));
        let mut memory = GuestMemory::new(shape.memory(), shape.has(Shape::LOG));
        let access = if shape.has(Shape::READ_ONLY) {
            Access::ReadOnly
        } else {
            Access::Writable
        };
        let log = shape.has(Shape::LOG).then(|| {
            let file: File = memfd_create("log", MFdFlags::MFD_CLOEXEC)
                .expect("there is memory")
                .into();
            file.set_len(log_len(&memory)).expect("there is memory");
            file
        });
        let wishes = Wishes {
            features: features(shape),
            access,
            discards: !shape.has(Shape::NO_DISCARD),
            detects_zeros: shape.detects_zeros(),
        };
        let guest = vdi_vhost::fuzzing::GuestMemory {
            file: memory.file(),
            regions: memory.regions(),
            log: log
                .as_ref()
                .map(|log| (log.try_clone().expect("descriptors"), log_len(&memory))),
        };
        let bench = Bench::new(&images.open(access), &guest, &wishes);
        let ring = Ring::new(shape, &memory);
        let mut driver = Driver::new(ring, shape.index());
        begin_ring(&mut driver, &mut memory);
        let mut play = Self {
            shape,
            images,
            memory,
            log,
            driver,
            bench: bench.expect("the images are sound"),
            model: Model::new(shape.has(Shape::PARENT)),
            traits: Traits {
                writable: access == Access::Writable,
                discards: wishes.discards,
            },
            is_sealed: false,
            is_lost: overlap(ring),
        };
        play.start().then_some(play)
    }

    fn start(&mut self) -> bool {
        let Ring {
            size,
            table,
            available,
            used,
        } = self.driver.ring;
        let index = self.driver.index;
        self.bench.start(&RingPlace {
            size,
            table,
            available,
            used,
            index,
        })
    }

    fn step(&mut self, step: Step) {
        let memory = &mut self.memory;
        match step.kind() {
            Kind::Chain => self.driver.make(memory, step),
            Kind::Run => self.run_all(false, 0),
            Kind::Race => self.race(step),
            Kind::Poke => {
                let at = memory.address(usize::from(step.half(2)) * 2);
                memory.put(
                    at,
                    &step.long(8).to_le_bytes()[..usize::from(step.byte(1) % 9)],
                );
            }
            Kind::Descriptor => {
                let mut bytes = [0; 16];
                let at = match step.byte(4) {
                    0 => step.long(8),
                    _ => memory.address(usize::from(step.half(8)) * 2),
                };
                bytes[..8].copy_from_slice(&at.to_le_bytes());
                bytes[8..12].copy_from_slice(&u32::from(step.half(12)).to_le_bytes());
                bytes[12] = step.byte(5);
                bytes[14] = step.byte(6);
                self.driver.set_descriptor(memory, step.half(2), &bytes);
            }
            Kind::Head => self.driver.offer(memory, step.half(2)),
            Kind::Jump => self.run_all(false, step.half(2)),
            Kind::Calls => {
                memory.put(self.driver.ring.available, &[step.byte(2), step.byte(3)]);
                let event = memory.look_at_u16(self.driver.ring.used + 2);
                let event = event.wrapping_add(step.half(4)).to_le_bytes();
                memory.put(self.driver.ring.call_event(), &event);
            }
            Kind::Writeback => self.bench.set_writeback(step.byte(2) & 1 != 0),
            Kind::Memory => assert!(self.bench.takes_memory(TURNS), "memory is not taken over"),
            Kind::Restart => self.restart(),
            Kind::Seal => {
                let seal = match step.byte(2) & 1 {
                    0 => SealFlag::F_SEAL_GROW,
                    _ => SealFlag::F_SEAL_WRITE,
                };
                let sealed = fcntl(self.images.top(), FcntlArg::F_ADD_SEALS(seal));
                self.is_sealed |= sealed.is_ok();
            }
        }
    }

    /// Shows the device what was made, and compares what it does with what it must do.
    fn run_all(&mut self, is_raced: bool, jump: u16) {
        let index = self.driver.index;
        let first = index.wrapping_sub(u16::try_from(self.driver.heads.len()).expect("few"));
        self.driver.index = index.wrapping_add(jump);
        self.driver.publish(&mut self.memory, first);
        let ring = self.driver.ring;
        let mut plan = Plan::of(&self.memory, &self.driver, self.traits, jump);
        self.is_lost |= is_raced || plan.is_tangled(&self.memory, ring);
        let (event, flags) = (
            self.memory.look_at_u16(ring.kick_event()),
            self.memory.look_at_u16(ring.used),
        );
        self.memory.show();
        let is_wanted = if self.has_event_index() {
            let new = self.driver.index;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(first)
        } else {
            flags & 1 == 0
        };
        if self.is_lost || is_wanted || jump > 0 {
            self.bench.kick();
        }
        if self.is_lost {
            self.run_lost(is_raced);
        } else {
            self.run_known(&plan, first);
        }
        self.driver.forget();
    }

    /// All that is certain is that it ends.
    fn run_lost(&mut self, is_raced: bool) {
        if !is_raced {
            (0..RACED_TURNS).for_each(|_| self.bench.turn());
        }
        assert!(self.bench.settles(TURNS), "requests do not end");
        let _either = self.bench.has_broken();
        let now = self.memory.look();
        self.memory.see(now);
        self.restart();
    }

    fn run_known(&mut self, plan: &Plan, first: u16) {
        let ring = self.driver.ring;
        let count = u16::try_from(plan.answers.len()).expect("few");
        let is_over = (0..TURNS).any(|_| {
            self.bench.turn();
            let is_answered = self.memory.look_at_u16(ring.used + 2) == first.wrapping_add(count);
            is_answered && (plan.breaks || self.bench.taken() == self.driver.index)
        });
        assert!(
            is_over,
            "{count} chains from {first} are not answered, the used index is {}: {plan:x?}",
            self.memory.look_at_u16(ring.used + 2)
        );
        // It may have more to say, and must fall asleep.
        (0..2).for_each(|_| self.bench.turn());
        assert_eq!(self.bench.has_broken(), plan.breaks, "{plan:x?}");
        if plan.breaks {
            // Nothing makes it go on.
            assert!(self.bench.settles(TURNS), "requests do not end");
            self.bench.kick();
            self.bench.turn();
            assert!(!self.bench.has_broken(), "a broken ring is used again");
        }
        self.check_calls(first, count);
        let now = self.memory.look();
        self.check_answers(plan, first, &now);
        self.check_marks(&now);
        self.memory.see(now);
        if plan.breaks {
            self.restart();
        }
    }

    fn has_event_index(&self) -> bool {
        self.shape.has(Shape::EVENT_INDEX)
    }

    fn check_calls(&self, first: u16, count: u16) {
        let ring = self.driver.ring;
        let is_wanted = if self.has_event_index() {
            let event = self.memory.look_at_u16(ring.call_event());
            event.wrapping_sub(first) < count
        } else {
            count > 0 && self.memory.look_at_u16(ring.available) & 1 == 0
        };
        assert!(
            self.bench.has_called() || !is_wanted,
            "the guest is not called"
        );
    }

    /// Compares used ring, guest memory and what was read with what must be there.
    fn check_answers(&mut self, plan: &Plan, first: u16, now: &[u8]) {
        let ring = self.driver.ring;
        let mut used = BTreeMap::new();
        for nth in 0..u16::try_from(plan.answers.len()).expect("few") {
            let at = ring.used + 4 + 8 * u64::from(first.wrapping_add(nth) % ring.size);
            let element: Vec<u8> = self
                .memory
                .present(at, 8)
                .into_iter()
                .flat_map(|run| now[run].to_vec())
                .collect();
            let (id, len) = element.split_at(4);
            let number =
                |bytes: &[u8]| u32::from_le_bytes(*bytes.first_chunk().expect("four bytes"));
            let twice = used.insert(number(id), number(len));
            assert_eq!(twice, None, "chain {} is answered twice", number(id));
        }
        let mut expected = self.memory.all().to_vec();
        let mut unknown = self.memory.present(ring.used, ring.used_len() + 2);
        for (head, answer) in &plan.answers {
            let status = now[answer.status_at];
            let may_fail = self.is_sealed
                && !matches!(
                    answer.effect,
                    Effect::Nothing | Effect::Read(..) | Effect::Name(_)
                );
            assert!(
                status == answer.status || may_fail && status == IO_ERROR,
                "chain {head} has status {status}: {answer:x?}"
            );
            expected[answer.status_at] = status;
            let written = if status == OK {
                self.take(plan, answer, now, &mut unknown)
            } else {
                0
            };
            let len = used.get(&u32::from(*head)).copied();
            assert_eq!(
                len.map(u64::from),
                Some(written + 1),
                "chain {head}: {answer:x?}"
            );
            self.apply(plan, answer, status);
        }
        for place in unknown {
            expected[place.clone()].copy_from_slice(&now[place]);
        }
        if expected != now {
            let differs = (0..now.len()).find(|place| expected[*place] != now[*place]);
            panic!("byte {differs:x?} changed, which nobody may write: {plan:x?}");
        }
    }

    /// What a request that succeeded wrote into guest memory, and where; how many bytes.
    fn take(
        &self,
        plan: &Plan,
        answer: &Answer,
        now: &[u8],
        unknown: &mut Vec<Range<usize>>,
    ) -> u64 {
        match &answer.effect {
            Effect::Read(sectors, into) => {
                if !plan.is_shared(into) {
                    let bytes: Vec<u8> = into
                        .iter()
                        .flat_map(|place| now[place.clone()].to_vec())
                        .collect();
                    for (sector, found) in sectors.clone().zip(bytes.chunks(512)) {
                        if !plan.is_contested(sector) {
                            self.model.assert_may_be(sector, found, "a read");
                        }
                    }
                }
                unknown.extend(into.iter().cloned());
                total(into)
            }
            Effect::Name(into) => {
                let mut left = 20;
                for place in into {
                    let end = place.end.min(place.start + left);
                    left -= end - place.start;
                    unknown.push(place.start..end);
                }
                20 - left as u64
            }
            Effect::Nothing | Effect::Write(..) | Effect::Zeros(..) | Effect::Flush => 0,
        }
    }

    /// The disk is what the request made of it, perhaps.
    fn apply(&mut self, plan: &Plan, answer: &Answer, status: u8) {
        let is_done = status == OK;
        match &answer.effect {
            Effect::Write(sectors, from) => {
                let bytes: Vec<u8> = from
                    .iter()
                    .flat_map(|place| self.memory.all()[place.clone()].to_vec())
                    .collect();
                for (sector, new) in sectors.clone().zip(bytes.chunks(512)) {
                    self.model.put(sector, new.to_vec(), is_done);
                }
            }
            Effect::Zeros(ranges, is_certain) => {
                for range in ranges {
                    self.model.put_zeros(range.clone(), is_done && *is_certain);
                }
            }
            Effect::Nothing | Effect::Read(..) | Effect::Flush | Effect::Name(_) => {}
        }
        for sectors in &plan.contested {
            self.model.forget(sectors.clone());
        }
    }

    /// Every page that changed is marked. The marks are taken away.
    fn check_marks(&self, now: &[u8]) {
        let Some(log) = &self.log else {
            return;
        };
        for &[at, len, place] in self.memory.regions() {
            let first = at / 4096 / 8;
            let mut marks = [0; REGION / 4096 / 8 + 2];
            log.read_exact_at(&mut marks, first).expect("it covers all");
            let place = usize::try_from(place).expect("it is in the file");
            let len = usize::try_from(len).expect("it is in the file");
            // Regions begin at multiples of 16.
            for nth in (0..len).step_by(16) {
                let part = place + nth..place + len.min(nth + 16);
                if self.memory.all()[part.clone()] != now[part] {
                    let page = (at + nth as u64) / 4096;
                    let byte = usize::try_from(page / 8 - first).expect("few");
                    let is_marked = marks[byte] >> (page % 8) & 1 != 0;
                    assert!(is_marked, "page {page:#x} is not marked");
                }
            }
        }
        for &[at, ..] in self.memory.regions() {
            log.write_all_at(&[0; REGION / 4096 / 8 + 2], at / 4096 / 8)
                .expect("it covers all");
        }
    }

    /// Somebody writes to the ring and what it names while the device works.
    fn race(&mut self, step: Step) {
        let (stop, at) = (AtomicBool::new(false), usize::from(step.half(2)) * 2);
        let file = self
            .memory
            .file()
            .try_clone()
            .expect("descriptors are left");
        let mut random = Random::seeded(step.long(8));
        let most = u64::from(step.byte(4)).max(1) * 16;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let place = (at as u64 + random.within(0..most)) % memory::ALL as u64;
                    let bytes = random.bytes(2);
                    // The file stays as long as it is.
                    let len = bytes
                        .len()
                        .min(memory::ALL - usize::try_from(place).expect("small"));
                    file.write_all_at(&bytes[..len], place)
                        .expect("there is memory");
                }
            });
            self.driver.publish(&mut self.memory, self.driver.index);
            self.memory.show();
            self.bench.kick();
            (0..RACED_TURNS).for_each(|_| self.bench.turn());
            stop.store(true, Ordering::Relaxed);
        });
        self.run_all(true, 0);
    }

    /// Stops the ring, and starts it as a driver does that begins anew.
    fn restart(&mut self) {
        assert!(self.bench.stops(TURNS), "the ring does not stop");
        let _either = (self.bench.has_broken(), self.bench.has_called());
        self.driver.forget();
        begin_ring(&mut self.driver, &mut self.memory);
        assert!(self.start(), "the ring was good before");
    }

    fn end(mut self) {
        assert!(self.bench.stops(TURNS), "the ring does not stop");
        let closed = self.bench.end(!self.shape.has(Shape::KILLED));
        assert!(closed.is_ok() || self.is_sealed, "{closed:?}");
        let files = self.images.open(Access::ReadOnly);
        let report = check(&*files[0]).expect("it can be examined");
        assert_eq!(report.count_of(Severity::Corruption), 0, "{report:#?}");
        let storage = |file: &Arc<HostFile>| Arc::clone(file) as Arc<dyn Storage>;
        let storages = files.iter().map(storage).collect();
        let disk = Disk::open_chain(storages, Access::ReadOnly, ModifiedParent::Allow);
        if !self.is_lost {
            self.model.assert_reads(&disk.expect("the image is sound"));
        }
    }
}

fn features(shape: Shape) -> u64 {
    let mut features = feature::USUAL;
    if !shape.has(Shape::EVENT_INDEX) {
        features &= !feature::EVENT_IDX;
    }
    if shape.has(Shape::NO_FLUSH) {
        features &= !feature::FLUSH;
    }
    features
}

fn log_len(memory: &GuestMemory) -> u64 {
    (memory.end() / 4096 / 8 + 16).next_multiple_of(4096)
}

/// Makes an empty ring.
fn begin_ring(driver: &mut Driver, memory: &mut GuestMemory) {
    let ring = driver.ring;
    let index = driver.index.to_le_bytes();
    memory.put(ring.available, &[0; 2]);
    memory.put(ring.available.saturating_add(2), &index);
    memory.put(ring.call_event(), &index);
    memory.put(ring.used, &[0; 2]);
    memory.put(ring.used.saturating_add(2), &index);
    memory.put(ring.kick_event(), &index);
    memory.show();
}

/// Whether the parts of a ring lie in each other.
fn overlap(ring: Ring) -> bool {
    let part = |at: u64, len: u64| at..at.saturating_add(len);
    let table = part(ring.table, 16 * u64::from(ring.size));
    let available = part(ring.available, ring.available_len());
    let used = part(ring.used, ring.used_len() + 2);
    let meet = |a: &Range<u64>, b: &Range<u64>| a.start < b.end && b.start < a.end;
    meet(&table, &available) || meet(&table, &used) || meet(&available, &used)
}

/// Too many numbers to be shown.
struct Sums(Vec<usize>);

impl std::fmt::Debug for Sums {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("..")
    }
}

/// What must become of a batch of chains.
#[derive(Debug)]
struct Plan {
    /// In the order in which they are made available; up to the one that breaks the ring.
    answers: Vec<(u16, Answer)>,
    breaks: bool,
    touched: Vec<Touched>,
    has_twins: bool,
    /// How many places before one are written by several.
    shared_before: Sums,
    /// Sectors that one request changes and another one uses, in an order that nobody knows.
    contested: Vec<Range<u64>>,
}

impl Plan {
    fn of(memory: &GuestMemory, driver: &Driver, traits: Traits, jump: u16) -> Self {
        let ring = driver.ring;
        let mut plan = Self {
            answers: Vec::new(),
            breaks: false,
            touched: Vec::new(),
            has_twins: false,
            shared_before: Sums(Vec::new()),
            contested: Vec::new(),
        };
        // What a jump makes available was there before, and what a driver offers it may overwrite. A jump may go all the
        // way round.
        let offered = u16::try_from(driver.heads.len()).expect("few");
        let count = offered.wrapping_add(jump);
        if count > ring.size {
            plan.breaks = true;
            return plan;
        }
        let first = driver.index.wrapping_sub(count);
        let entry = |nth: u16| {
            let slot = u64::from(first.wrapping_add(nth) % ring.size);
            u16::from_le_bytes(
                memory
                    .bytes(ring.available + 4 + 2 * slot)
                    .unwrap_or_default(),
            )
        };
        for head in (0..count).map(entry) {
            plan.has_twins |= plan.answers.iter().any(|(other, _)| *other == head);
            let (verdict, touched) = judge(memory, ring.table, ring.size, head, traits);
            plan.touched.push(touched);
            match verdict {
                Verdict::Answer(answer) => plan.answers.push((head, answer)),
                Verdict::Broken => {
                    plan.breaks = true;
                    break;
                }
            }
        }
        plan.contested = contested(&plan.answers);
        plan
    }

    /// Whether what one request writes is what is read as a descriptor, a header or data, a status, or the ring itself.
    fn is_tangled(&mut self, memory: &GuestMemory, ring: Ring) -> bool {
        let mut read = memory.present(ring.table, 16 * u64::from(ring.size));
        read.extend(memory.present(ring.available, ring.available_len()));
        read.extend(self.touched.iter().flat_map(|touched| touched.read.clone()));
        let used = memory.present(ring.used, ring.used_len() + 2);
        let written = self
            .touched
            .iter()
            .flat_map(|touched| touched.written.clone());
        let written = counts(written.chain(used.clone()));
        let is_read = counts(read)
            .into_iter()
            .zip(&written)
            .any(|(read, written)| read > 0 && *written > 0);
        let mut statuses = self.answers.iter().map(|(_, answer)| answer.status_at);
        let is_tangled = self.has_twins
            || is_read
            || statuses.any(|status_at| written[status_at] > 1)
            || used.into_iter().flatten().any(|place| written[place] > 1);
        let mut shared = 0;
        let sums = written.into_iter().map(|count| {
            shared += usize::from(count > 1);
            shared
        });
        self.shared_before = Sums(std::iter::once(0).chain(sums).collect());
        is_tangled
    }

    /// Whether several write to some of these bytes.
    fn is_shared(&self, into: &[Range<usize>]) -> bool {
        into.iter()
            .any(|place| self.shared_before.0[place.start] != self.shared_before.0[place.end])
    }

    fn is_contested(&self, sector: u64) -> bool {
        self.contested
            .iter()
            .any(|sectors| sectors.contains(&sector))
    }
}

/// In how many ranges each place of the guest's memory is.
fn counts(ranges: impl IntoIterator<Item = Range<usize>>) -> Vec<u32> {
    let mut edges: Vec<(usize, bool)> = ranges
        .into_iter()
        .filter(|range| !range.is_empty())
        .flat_map(|range| [(range.start, true), (range.end, false)])
        .collect();
    edges.sort_unstable();
    let (mut counts, mut count, mut at) = (vec![0; memory::ALL], 0, 0);
    for (edge, begins) in edges {
        counts[at..edge].fill(count);
        at = edge;
        count = if begins { count + 1 } else { count - 1 };
    }
    counts
}

/// Sectors that one request changes and another one changes or reads.
fn contested(answers: &[(u16, Answer)]) -> Vec<Range<u64>> {
    let ranges = |answer: &Answer| match &answer.effect {
        Effect::Read(sectors, _) => (vec![sectors.clone()], false),
        Effect::Write(sectors, _) => (vec![sectors.clone()], true),
        Effect::Zeros(ranges, _) => (ranges.clone(), true),
        Effect::Nothing | Effect::Flush | Effect::Name(_) => (Vec::new(), false),
    };
    let all: Vec<_> = answers.iter().map(|(_, answer)| ranges(answer)).collect();
    let mut contested = Vec::new();
    for (nth, (some, changes)) in all.iter().enumerate() {
        for (others, others_change) in &all[nth + 1..] {
            if !changes && !others_change {
                continue;
            }
            for (a, b) in some.iter().flat_map(|a| others.iter().map(move |b| (a, b))) {
                let both = a.start.max(b.start)..a.end.min(b.end);
                if !both.is_empty() {
                    contested.push(both);
                }
            }
        }
    }
    contested
}
