//! The threads that do for all disks what must not happen on a request's path: lengthening the file ahead of need (W1), marking
//! the image before its first change (W6).
//!
//! They sleep until a disk wakes them; nothing ticks. A disk that has chores waits in a list; whoever is free does one step of them, and
//! puts it back at the end if there may be more. So one disk's slow storage delays the others' chores by one step, and nobody's requests.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};
use std::thread::{self, JoinHandle};

use vdi_core::{Disk, WriteError};

use crate::sandbox::{Role, Sandbox};

/// Two: while one waits for a slow disk's storage, the other does what is due for the rest.
const THREADS: usize = 2;

/// The running threads; dropping it ends and joins them.
#[derive(Debug)]
pub(crate) struct Housekeepers {
    rounds: Arc<Rounds>,
    threads: Vec<JoinHandle<()>>,
}

/// A disk that is looked after as long as this exists; dropping it waits until no thread is at work with it.
#[derive(Debug)]
pub(crate) struct Kept {
    /// So that the threads are there.
    housekeepers: Arc<Housekeepers>,
    key: u64,
}

/// Which disks have chores.
#[derive(Debug, Default)]
struct Rounds {
    state: Mutex<State>,
    /// There is one more in the list, or all is over.
    work: Condvar,
    /// A step is done.
    done: Condvar,
}

#[derive(Debug, Default)]
struct State {
    houses: BTreeMap<u64, House>,
    next_key: u64,
    waiting: VecDeque<u64>,
    is_over: bool,
}

#[derive(Debug)]
struct House {
    disk: Arc<Disk>,
    /// Its top image, to say which one is in trouble.
    image: PathBuf,
    phase: Phase,
    /// It could not be done lately, which was said.
    is_failing: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    Waiting,
    AtWork,
    /// It was woken meanwhile.
    WokenAtWork,
}

/// How a disk calls for its housekeeper.
struct Bell {
    rounds: Arc<Rounds>,
    key: u64,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.rounds.call(self.key);
    }
}

impl Housekeepers {
    /// Starts the threads and confines them.
    pub(crate) fn start(sandbox: &Sandbox) -> io::Result<Arc<Self>> {
        let mut all = Self {
            rounds: Arc::default(),
            threads: Vec::new(),
        };
        for nth in 0..THREADS {
            let (rounds, sandbox) = (Arc::clone(&all.rounds), sandbox.clone());
            let (started, ready) = mpsc::channel();
            let thread = thread::Builder::new()
                .name(format!("housekeeper-{nth}"))
                .spawn(move || {
                    let confined = sandbox.confine(Role::Housekeeper);
                    let serves = confined.is_ok();
                    let _ = started.send(confined);
                    if serves {
                        rounds.go();
                    }
                })?;
            all.threads.push(thread);
            ready.recv().map_err(io::Error::other)??;
        }
        Ok(Arc::new(all))
    }

    /// Looks after a disk, whose top image is in this file, from now on.
    pub(crate) fn keep(self: &Arc<Self>, disk: &Arc<Disk>, image: &Path) -> Kept {
        let key = {
            let mut state = self.rounds.lock();
            let key = state.next_key;
            state.next_key += 1;
            let house = House {
                disk: Arc::clone(disk),
                image: image.to_owned(),
                phase: Phase::Idle,
                is_failing: false,
            };
            state.houses.insert(key, house);
            key
        };
        let rounds = Arc::clone(&self.rounds);
        disk.set_housekeeper(Waker::from(Arc::new(Bell { rounds, key })));
        // There may have been nobody to call before.
        self.rounds.call(key);
        Kept {
            housekeepers: Arc::clone(self),
            key,
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let rounds = &self.housekeepers.rounds;
        let mut state = rounds.lock();
        while state.houses.get(&self.key).is_some_and(House::is_at_work) {
            state = rounds.wait(&rounds.done, state);
        }
        state.waiting.retain(|key| *key != self.key);
        let gone = state.houses.remove(&self.key);
        // What the disk does when it goes away may take time.
        drop(state);
        drop(gone);
    }
}

impl Drop for Housekeepers {
    fn drop(&mut self) {
        self.rounds.lock().is_over = true;
        self.rounds.work.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl House {
    fn is_at_work(&self) -> bool {
        matches!(self.phase, Phase::AtWork | Phase::WokenAtWork)
    }
}

impl Rounds {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, what: &Condvar, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        what.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// A disk has chores. Disks call with locks of theirs held, so nothing of a disk is touched under ours.
    fn call(&self, key: u64) {
        let mut state = self.lock();
        let Some(house) = state.houses.get_mut(&key) else {
            return;
        };
        match house.phase {
            Phase::Waiting | Phase::WokenAtWork => {}
            Phase::AtWork => house.phase = Phase::WokenAtWork,
            Phase::Idle => {
                house.phase = Phase::Waiting;
                state.waiting.push_back(key);
                self.work.notify_one();
            }
        }
    }

    /// Does chores until all is over.
    fn go(&self) {
        let mut state = self.lock();
        while !state.is_over {
            let Some(key) = state.waiting.pop_front() else {
                state = self.wait(&self.work, state);
                continue;
            };
            let Some(house) = state.houses.get_mut(&key) else {
                continue;
            };
            house.phase = Phase::AtWork;
            let disk = Arc::clone(&house.disk);
            drop(state);
            let result = disk.do_chores();
            drop(disk);
            state = self.lock();
            self.step_is_done(&mut state, key, &result);
        }
    }

    fn step_is_done(&self, state: &mut State, key: u64, result: &Result<bool, WriteError>) {
        // It stays while it is at work.
        let Some(house) = state.houses.get_mut(&key) else {
            return;
        };
        let was_woken = house.phase == Phase::WokenAtWork;
        let more = match result {
            Ok(true) => {
                house.is_failing = false;
                true
            }
            Ok(false) => was_woken,
            Err(error) => {
                // One line per spell of trouble: a guest can bring it about again and again (disk full).
                if !std::mem::replace(&mut house.is_failing, true) {
                    let (image, why) = (house.image.display(), crate::chain_of(error));
                    tracing::error!("{image}: the image cannot take new data: {why}");
                }
                was_woken
            }
        };
        house.phase = if more { Phase::Waiting } else { Phase::Idle };
        if more {
            state.waiting.push_back(key);
            self.work.notify_one();
        }
        self.done.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
    use std::time::Duration;

    use vdi_core::{
        Access, CreateOptions, FileOffset, HostFile, Locking, ModifiedParent, NewKind, Reserve,
        Sector, Storage, create,
    };

    use super::*;

    /// How long what should happen may take.
    const PATIENCE: Duration = Duration::from_secs(20);

    /// How long what should not happen is waited for.
    const A_MOMENT: Duration = Duration::from_millis(100);

    /// An image's file; the next sync tells that it has begun and takes until it is told to end, if there is somebody to do so.
    #[derive(Debug)]
    struct Slow {
        file: HostFile,
        gate: Mutex<Option<(Sender<()>, Receiver<()>)>>,
    }

    impl Storage for Slow {
        fn read_exact_at(&self, buf: &mut [u8], at: FileOffset) -> io::Result<()> {
            self.file.read_exact_at(buf, at)
        }

        fn write_all_at(&self, buf: &[u8], at: FileOffset) -> io::Result<()> {
            self.file.write_all_at(buf, at)
        }

        fn len_bytes(&self) -> io::Result<u64> {
            self.file.len_bytes()
        }

        fn set_len(&self, len_bytes: u64) -> io::Result<()> {
            self.file.set_len(len_bytes)
        }

        fn punch(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
            self.file.punch(at, len_bytes)
        }

        fn zero(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
            self.file.zero(at, len_bytes)
        }

        fn reserve(&self, at: FileOffset, len_bytes: u64) -> io::Result<()> {
            self.file.reserve(at, len_bytes)
        }

        fn sync(&self) -> io::Result<()> {
            let gate = self.gate.lock().unwrap().take();
            if let Some((begun, end)) = gate {
                begun.send(()).unwrap();
                end.recv().unwrap();
            }
            self.file.sync()
        }
    }

    struct Bench {
        directory: tempfile::TempDir,
        housekeepers: Arc<Housekeepers>,
    }

    impl Bench {
        fn new() -> Self {
            Self {
                directory: tempfile::tempdir().unwrap(),
                housekeepers: Housekeepers::start(&Sandbox::off()).unwrap(),
            }
        }

        /// A disk that is looked after.
        fn disk(&self, name: &str) -> (Arc<Slow>, Arc<Disk>, Kept) {
            let path = self.directory.path().join(name);
            let options = CreateOptions {
                capacity_bytes: 16 << 20,
                block_size: 1 << 20,
                kind: NewKind::Dynamic,
                uuid: None,
            };
            create(&path, &options).unwrap();
            let slow = Arc::new(Slow {
                file: HostFile::open(&path, Access::Writable, Locking::Locked).unwrap(),
                gate: Mutex::new(None),
            });
            let storage = vec![Arc::clone(&slow) as Arc<dyn Storage>];
            let disk = Disk::open_chain(storage, Access::Writable, ModifiedParent::Refuse);
            let disk = Arc::new(disk.unwrap());
            let kept = self.housekeepers.keep(&disk, &path);
            (slow, disk, kept)
        }
    }

    /// Brings about the first chore, which syncs.
    fn write_first(disk: &Arc<Disk>) {
        let range = disk.capacity().range(Sector(0), 8).unwrap();
        let reserved = disk.reserve(range, &disk.lane(), Waker::noop());
        assert!(matches!(reserved, Ok(Reserve::Parked)));
    }

    /// Hears when a disk is not looked after any more.
    fn removal(kept: Kept) -> Receiver<()> {
        let (gone, heard) = mpsc::channel();
        thread::spawn(move || {
            drop(kept);
            let _ = gone.send(());
        });
        heard
    }

    #[test]
    fn a_disk_goes_away_after_the_step_that_is_under_way_and_not_after_another_disk_s() {
        let bench = Bench::new();
        let (slow, disk, kept) = bench.disk("slow.vdi");
        let (_, _, other) = bench.disk("other.vdi");
        let ((begun, has_begun), (end, ends)) = (mpsc::channel(), mpsc::channel());
        *slow.gate.lock().unwrap() = Some((begun, ends));
        write_first(&disk);
        has_begun.recv_timeout(PATIENCE).unwrap();

        let removed = removal(kept);
        assert_eq!(
            removed.recv_timeout(A_MOMENT),
            Err(RecvTimeoutError::Timeout)
        );
        removal(other).recv_timeout(PATIENCE).unwrap();
        assert_eq!(removed.try_recv(), Err(mpsc::TryRecvError::Empty));
        end.send(()).unwrap();
        removed.recv_timeout(PATIENCE).unwrap();
        // Nobody is at work with it, and nobody comes.
        assert_eq!(Arc::strong_count(&disk), 1);
        assert!(bench.housekeepers.rounds.lock().houses.is_empty());
    }
}
