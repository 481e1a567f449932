//! The crew: the worker threads, which serve the queues of all disks.
//!
//! They are started once, before the control thread gives up the system calls that this takes, and end with the crew. Which disks they
//! serve comes and goes meanwhile (`workers`).

use std::collections::BTreeSet;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::command::{Command, Doorbell, Order, SeatNumber};
use crate::engine::EngineChoice;
use crate::sandbox::{Role, Sandbox};
use crate::worker::Worker;

/// The threads; dropping it ends and joins them. Nothing is served then: whoever has something served has a share in the crew.
#[derive(Debug)]
pub(crate) struct Crew {
    members: Vec<Member>,
    /// The numbers of the disks that live.
    numbers: Mutex<BTreeSet<SeatNumber>>,
}

/// One thread from outside.
#[derive(Debug)]
struct Member {
    /// Until it is to end.
    orders: Option<Sender<Order>>,
    doorbell: Arc<Doorbell>,
    thread: Option<JoinHandle<()>>,
}

impl Crew {
    /// Starts `count` threads, each with an engine of its own, and confines them.
    pub(crate) fn start(
        count: usize,
        engine: EngineChoice,
        sandbox: &Sandbox,
    ) -> io::Result<Arc<Self>> {
        let members = (0..count.max(1)).map(|nth| Member::start(nth, engine, sandbox));
        Ok(Arc::new(Self {
            members: members.collect::<io::Result<_>>()?,
            numbers: Mutex::default(),
        }))
    }

    /// How many threads there are.
    pub(crate) fn len(&self) -> usize {
        self.members.len()
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

impl Member {
    fn start(nth: usize, engine: EngineChoice, sandbox: &Sandbox) -> io::Result<Self> {
        let (orders, inbox) = mpsc::channel();
        let doorbell = Arc::new(Doorbell::new()?);
        let (sandbox, its_doorbell) = (sandbox.clone(), Arc::clone(&doorbell));
        let (started, ready) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("worker-{nth}"))
            .spawn(move || {
                let worker = Worker::new(engine, its_doorbell, inbox);
                match worker.and_then(|worker| sandbox.confine(Role::Worker).map(|()| worker)) {
                    Ok(worker) => {
                        let _ = started.send(Ok(()));
                        worker.run();
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
            })?;
        done(&ready)?;
        Ok(Self {
            orders: Some(orders),
            doorbell,
            thread: Some(thread),
        })
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
    let died = || Err(io::Error::other("the worker thread has died"));
    acknowledged.recv().unwrap_or_else(|_| died())
}
