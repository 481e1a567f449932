//! The workers from outside: who serves which queue, and commands to them.
//!
//! Queue `i` is served by worker `i % count`. A thread is started when its first queue starts, and then stays for later
//! connections.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use vdi_core::Disk;

use crate::command::{Ack, Command, Doorbell, Setup, Takeover};
use crate::complaints::Complaints;
use crate::device::Device;
use crate::dirty::Guest;
use crate::engine::EngineChoice;
use crate::image_file::ImageFile;
use crate::sandbox::{Role, Sandbox};
use crate::worker::Worker;

/// What all workers serve.
#[derive(Debug, Clone)]
pub(crate) struct Served {
    /// The disk.
    pub(crate) disk: Arc<Disk>,
    /// The files of its images, the top one's first.
    pub(crate) images: Arc<[ImageFile]>,
    /// The device that guests see.
    pub(crate) device: Arc<Device>,
    /// What is said about wrong requests.
    pub(crate) complaints: Arc<Complaints>,
    /// How data is moved.
    pub(crate) engine: EngineChoice,
    /// What the threads are confined by.
    pub(crate) sandbox: Sandbox,
}

/// All workers, running or not; dropping it ends them, after what is in flight.
#[derive(Debug)]
pub(crate) struct Workers {
    /// What they serve, if there is something now.
    served: Option<Served>,
    handles: Vec<Option<Handle>>,
}

#[derive(Debug)]
struct Handle {
    commands: Sender<(Command, Ack)>,
    doorbell: Arc<Doorbell>,
    thread: Option<JoinHandle<()>>,
}

impl Workers {
    /// `count` workers, none of which runs or has anything to serve yet.
    pub(crate) fn new(count: usize) -> Self {
        let handles = std::iter::repeat_with(|| None).take(count.max(1)).collect();
        Self {
            served: None,
            handles,
        }
    }

    /// Gives them something to serve.
    pub(crate) fn employ(&mut self, served: Served) {
        self.served = Some(served);
    }

    /// Ends all threads and forgets what they served. No queue may be started.
    pub(crate) fn dismiss(&mut self) {
        self.handles.iter_mut().for_each(|handle| *handle = None);
        self.served = None;
    }

    /// Serves a queue, which is kicked by `kick`, or else polled.
    pub(crate) fn start(
        &mut self,
        setup: Setup,
        kick: Option<OwnedFd>,
        guest: Guest,
    ) -> io::Result<()> {
        let index = setup.index;
        let slot = self.slot(index);
        if self.handles[slot].is_none() {
            let served = self.served.as_ref();
            let served = served.ok_or_else(|| io::Error::other("there is nothing to serve"))?;
            self.handles[slot] = Some(Handle::spawn(served, slot)?);
        }
        self.tell(index, Command::Start(Box::new(setup), kick, guest))
    }

    /// Has a queue's worker do something, and waits until it is done. Nothing happens if it does not run.
    pub(crate) fn tell(&self, index: u16, command: Command) -> io::Result<()> {
        match &self.handles[self.slot(index)] {
            Some(handle) => done(&handle.send(command)),
            None => Ok(()),
        }
    }

    /// Tells all workers of a change in the guest, and waits until they heed it.
    pub(crate) fn set_guest(&self, guest: &Guest, takeover: Takeover) -> io::Result<()> {
        let running = self.handles.iter().flatten();
        let sent: Vec<_> = running
            .map(|handle| handle.send(Command::Guest(guest.clone(), takeover)))
            .collect();
        sent.iter().try_for_each(done)
    }

    fn slot(&self, index: u16) -> usize {
        usize::from(index) % self.handles.len()
    }
}

impl Handle {
    fn spawn(served: &Served, slot: usize) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let doorbell = Arc::new(Doorbell::new()?);
        let (served, its_doorbell) = (served.clone(), Arc::clone(&doorbell));
        let (started, ready) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("worker-{slot}"))
            .spawn(move || {
                match Worker::new(&served, its_doorbell, inbox)
                    .and_then(|worker| served.sandbox.confine(Role::Worker).map(|()| worker))
                {
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
            commands,
            doorbell,
            thread: Some(thread),
        })
    }

    fn send(&self, command: Command) -> Receiver<io::Result<()>> {
        let (ack, acknowledged) = mpsc::channel();
        // If the worker is gone, the acknowledgement fails.
        let _ = self.commands.send((command, ack));
        self.doorbell.ring();
        acknowledged
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let _ = done(&self.send(Command::Exit));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for an acknowledgement.
fn done(acknowledged: &Receiver<io::Result<()>>) -> io::Result<()> {
    let died = || Err(io::Error::other("the worker thread has died"));
    acknowledged.recv().unwrap_or_else(|_| died())
}
