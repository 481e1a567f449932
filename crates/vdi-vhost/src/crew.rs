//! The crew: the worker threads that serve the queues of disks. One serves all disks that ask for nothing else; a disk may have one of its
//! own, whose threads serve no other.
//!
//! Threads are started once, before the control thread gives up the system calls that this takes, and end with the process: once the sandbox is
//! closed nobody can make a ring any more, and that stays so. What disks have of their own comes from the [`Reserve`], which was started for the disks of the
//! configuration and, with `spare-workers`, for those that are added, and goes back there when the disk goes. Until then such a thread
//! sleeps. Which disks a crew serves comes and goes meanwhile (`workers`).

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::unistd::{Pid, gettid};

use crate::command::{Command, Doorbell, Order, SeatNumber};
use crate::cpus::{CpuError, CpuList};
use crate::engine::EngineChoice;
use crate::sandbox::{Role, Sandbox};
use crate::sharer::Sharer;
use crate::worker::Worker;

/// Most threads in the reserve: the control thread's filter names each of them.
pub(crate) const MOST_SPARE: u16 = 256;

/// How many threads there are to be, and where they may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Staffing {
    /// At least one.
    pub(crate) count: usize,
    /// All that the process may use, if it is not said.
    pub(crate) cpus: Option<CpuList>,
}

impl Staffing {
    /// Where each thread may run.
    pub(crate) fn places(&self) -> impl Iterator<Item = Option<CpuList>> {
        let place = |nth| {
            self.cpus
                .as_ref()
                .map(|cpus| cpus.of_thread(nth, self.count))
        };
        (0..self.count).map(place)
    }

    /// The number, as it is written down.
    pub(crate) fn small_count(&self) -> u16 {
        u16::try_from(self.count).unwrap_or(u16::MAX)
    }
}

/// The threads. Nothing is served when they end: whoever has something served has a share in the crew.
#[derive(Debug)]
pub(crate) struct Crew {
    members: Vec<Arc<Member>>,
    staffing: Staffing,
    /// The numbers of the disks that live.
    numbers: Mutex<BTreeSet<SeatNumber>>,
    /// Where its threads go when the disk is gone whose own they are.
    reserve: Option<Arc<Reserve>>,
    is_disbanded: AtomicBool,
}

/// Threads that serve nobody until a disk has them for its own.
#[derive(Debug)]
pub(crate) struct Reserve {
    free: Mutex<Vec<Arc<Member>>>,
    /// All of its threads, wherever they serve.
    threads: Vec<Pid>,
}

/// One thread from outside.
#[derive(Debug)]
struct Member {
    /// Until it is to end.
    orders: Option<Sender<Order>>,
    doorbell: Arc<Doorbell>,
    thread: Option<JoinHandle<()>>,
    id: Pid,
    /// Where it may run, if that was ever said.
    place: Mutex<Option<CpuList>>,
}

/// Why a disk has no threads of its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CrewError {
    #[error(
        "the disk wants {wanted} workers of its own, and {left} are left; `spare-workers` in the configuration says how many \
         the daemon starts for disks that are added"
    )]
    TooFew { wanted: usize, left: usize },
    #[error(transparent)]
    Cpus(#[from] CpuError),
    #[error("the disk's workers cannot be bound to CPUs")]
    Bind(#[from] Errno),
}

impl Crew {
    /// Starts threads for all disks, each with an engine of its own, and confines them.
    pub(crate) fn start(
        staffing: Staffing,
        engine: EngineChoice,
        sandbox: &Sandbox,
    ) -> io::Result<Arc<Self>> {
        let members = (0..)
            .zip(staffing.places())
            .map(|(nth, place)| Member::start(format!("worker-{nth}"), place, engine, sandbox));
        let members = members.collect::<io::Result<_>>()?;
        Ok(Self::of(members, staffing, None))
    }

    /// Threads of one disk's own, out of the reserve.
    pub(crate) fn own(reserve: &Arc<Reserve>, staffing: Staffing) -> Result<Arc<Self>, CrewError> {
        staffing.cpus.as_ref().map_or(Ok(()), CpuList::check)?;
        let members = reserve.take(staffing.count)?;
        let crew = Self::of(members, staffing, Some(Arc::clone(reserve)));
        for (member, place) in crew.members.iter().zip(crew.staffing.places()) {
            // If one cannot be, all go back.
            member.bind(place)?;
        }
        Ok(crew)
    }

    fn of(
        members: Vec<Arc<Member>>,
        staffing: Staffing,
        reserve: Option<Arc<Reserve>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            members,
            staffing,
            numbers: Mutex::default(),
            reserve,
            is_disbanded: AtomicBool::new(false),
        })
    }

    /// Gives the threads back that are a disk's own, which has no seat at them any more. Those of all disks stay.
    pub(crate) fn disband(&self) {
        if let Some(reserve) = &self.reserve
            && !self.is_disbanded.swap(true, Ordering::AcqRel)
        {
            reserve.give_back(&self.members);
        }
    }

    /// How many threads there are.
    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether they serve one disk only.
    pub(crate) const fn is_own(&self) -> bool {
        self.reserve.is_some()
    }

    /// Where they may run together, if that was said.
    pub(crate) const fn cpus(&self) -> Option<&CpuList> {
        self.staffing.cpus.as_ref()
    }

    /// Where one of them may run, if that was said.
    pub(crate) fn cpus_of(&self, thread: usize) -> Option<CpuList> {
        self.members[thread].place().clone()
    }

    /// A number that no other disk has now, and the smallest such: it is an index in every thread's list of seats, and disks that
    /// follow each other begin with different threads.
    pub(crate) fn take_number(&self) -> SeatNumber {
        let mut numbers = self.numbers();
        let free = (0..).find(|number| !numbers.contains(number));
        let number = free.expect("there are fewer disks than numbers");
        numbers.insert(number);
        number
    }

    /// Lets another disk have a number whose seats are gone.
    pub(crate) fn give_back(&self, number: SeatNumber) {
        self.numbers().remove(&number);
    }

    fn numbers(&self) -> MutexGuard<'_, BTreeSet<SeatNumber>> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a thread something about a disk; what it answers when that is done.
    pub(crate) fn send(
        &self,
        thread: usize,
        seat: SeatNumber,
        command: Command,
    ) -> Receiver<io::Result<()>> {
        let (ack, acknowledged) = mpsc::channel();
        let member = &self.members[thread];
        if let Some(orders) = &member.orders {
            // If the thread is gone, the acknowledgement fails.
            let _ = orders.send(Order { seat, command, ack });
        }
        member.doorbell.ring();
        acknowledged
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.disband();
    }
}

impl Reserve {
    /// Starts threads that wait for disks, one for each of these places, and confines them. The first ones are taken first: what the kernel
    /// does for a thread, it does where the thread was when it made its ring.
    pub(crate) fn start(
        places: &[Option<CpuList>],
        engine: EngineChoice,
        sandbox: &Sandbox,
    ) -> io::Result<Arc<Self>> {
        let members = (0..).zip(places).map(|(nth, place)| {
            Member::start(format!("own-{nth}"), place.clone(), engine, sandbox)
        });
        let mut free: Vec<_> = members.collect::<io::Result<_>>()?;
        let threads = free.iter().map(|member| member.id).collect();
        free.reverse();
        Ok(Arc::new(Self {
            free: Mutex::new(free),
            threads,
        }))
    }

    /// All threads that may be bound to CPUs later.
    pub(crate) fn threads(&self) -> &[Pid] {
        &self.threads
    }

    fn take(&self, wanted: usize) -> Result<Vec<Arc<Member>>, CrewError> {
        let mut free = self.free();
        let left = free.len();
        match left.checked_sub(wanted) {
            Some(rest) => Ok(free.drain(rest..).rev().collect()),
            None => Err(CrewError::TooFew { wanted, left }),
        }
    }

    fn give_back(&self, members: &[Arc<Member>]) {
        self.free().extend(members.iter().rev().cloned());
    }

    fn free(&self) -> MutexGuard<'_, Vec<Arc<Member>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    fn start(
        name: String,
        place: Option<CpuList>,
        engine: EngineChoice,
        sandbox: &Sandbox,
    ) -> io::Result<Arc<Self>> {
        let (orders, inbox) = mpsc::channel();
        let doorbell = Arc::new(Doorbell::new()?);
        let (sandbox, its_doorbell) = (sandbox.clone(), Arc::clone(&doorbell));
        let (started, ready) = mpsc::channel();
        let bound = place.clone();
        let beside = name
            .replace("worker", "sharer")
            .replace("own", "sharer-own");
        let begin = move || {
            // Before this one is bound: it runs wherever the process may.
            let sharer = Sharer::start(beside, Arc::clone(&its_doorbell), &sandbox)?;
            // First, so that what it allocates is near.
            bound.map_or(Ok(()), |cpus| cpus.bind(Pid::from_raw(0)))?;
            let worker = Worker::new(engine, its_doorbell, inbox, Some(sharer))?;
            sandbox.confine(Role::Worker).map(|()| worker)
        };
        let thread = thread::Builder::new()
            .name(name)
            .spawn(move || match begin() {
                Ok(worker) => {
                    let _ = started.send(Ok(gettid()));
                    worker.run();
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            })?;
        let id = heard(&ready)?;
        Ok(Arc::new(Self {
            orders: Some(orders),
            doorbell,
            thread: Some(thread),
            id,
            place: Mutex::new(place),
        }))
    }

    /// Has the thread run there, or wherever the process may.
    fn bind(&self, to: Option<CpuList>) -> Result<(), CrewError> {
        let mut place = self.place();
        if *place != to {
            match &to {
                Some(to) => to.bind(self.id)?,
                None => CpuList::allowed()?.bind(self.id)?,
            }
            *place = to;
        }
        Ok(())
    }

    fn place(&self) -> MutexGuard<'_, Option<CpuList>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.orders = None;
        self.doorbell.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for an acknowledgement.
pub(crate) fn done(acknowledged: &Receiver<io::Result<()>>) -> io::Result<()> {
    heard(acknowledged)
}

fn heard<T>(answer: &Receiver<io::Result<T>>) -> io::Result<T> {
    let died = || Err(io::Error::other("the worker thread has died"));
    answer.recv().unwrap_or_else(|_| died())
}
