//! The workers as one disk has them: who serves which of its queues, and commands to them.
//!
//! The threads are the crew's and serve other disks too, unless they are this disk's own. Queue `i` of disk `n` is served by thread `(n + i) % threads`, so that disks with few
//! queues do not meet at one thread. The disk has a seat at a thread from when the first queue there starts until it is dismissed.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vdi_core::Disk;

use crate::command::{Command, SeatNumber, Setup, Takeover};
use crate::complaints::Complaints;
use crate::crew::{Crew, done};
use crate::device::Device;
use crate::dirty::Guest;
use crate::dump::Witnesses;
use crate::image_file::ImageFile;
use crate::limits::Throttle;
use crate::stats::Stats;

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
    /// What it did.
    pub(crate) stats: Arc<Stats>,
    /// How much it may do.
    pub(crate) throttle: Arc<Throttle>,
}

/// The crew, for one disk; dropping it ends all service to that, after what is in flight.
#[derive(Debug)]
pub(crate) struct Workers {
    crew: Arc<Crew>,
    number: SeatNumber,
    /// What they serve, if there is something now.
    served: Option<Served>,
    /// Which threads have a seat for it.
    seated: Vec<bool>,
}

impl Workers {
    /// Workers that have nothing to serve yet.
    pub(crate) fn new(crew: &Arc<Crew>) -> Self {
        Self {
            crew: Arc::clone(crew),
            number: crew.take_number(),
            served: None,
            seated: vec![false; crew.len()],
        }
    }

    /// Gives them something to serve.
    pub(crate) fn employ(&mut self, served: Served) {
        self.served = Some(served);
    }

    /// Takes all seats away and forgets what was served; waits until no thread has anything of it.
    pub(crate) fn dismiss(&mut self) {
        let left: Vec<_> = self
            .seats()
            .map(|thread| self.crew.send(thread, self.number, Command::Leave))
            .collect();
        for acknowledged in &left {
            // A thread that has died has nothing of it either.
            let _ = done(acknowledged);
        }
        self.seated.fill(false);
        self.served = None;
    }

    /// Serves a queue, which is kicked by `kick`, or else polled.
    pub(crate) fn start(
        &mut self,
        setup: Setup,
        kick: Option<OwnedFd>,
        guest: Guest,
    ) -> io::Result<()> {
        let (index, thread) = (setup.index, self.thread_of(setup.index));
        if !self.seated[thread] {
            let served = self.served.clone();
            let served = served.ok_or_else(|| io::Error::other("there is nothing to serve"))?;
            // Workers open no files.
            let sync_file = served.images[0].file_for_syncs();
            let sit = Command::Sit(Box::new(served), sync_file);
            done(&self.crew.send(thread, self.number, sit))?;
            self.seated[thread] = true;
        }
        self.tell(index, Command::Start(Box::new(setup), kick, guest))
    }

    /// Has a queue's worker do something, and waits until it is done. Nothing happens if it does not serve the disk.
    pub(crate) fn tell(&self, index: u16, command: Command) -> io::Result<()> {
        let thread = self.thread_of(index);
        if self.seated[thread] {
            done(&self.crew.send(thread, self.number, command))
        } else {
            Ok(())
        }
    }

    /// Tells all workers of a change in the guest, and waits until they heed it.
    pub(crate) fn set_guest(&self, guest: &Guest, takeover: Takeover) -> io::Result<()> {
        let command = || Command::Guest(guest.clone(), takeover);
        let sent: Vec<_> = self
            .seats()
            .map(|thread| self.crew.send(thread, self.number, command()))
            .collect();
        sent.iter().try_for_each(done)
    }

    /// Has nothing to do with its threads any more, which serve others.
    pub(crate) fn disband(&mut self) {
        self.dismiss();
        self.crew.disband();
    }

    /// The threads, to be asked by others.
    pub(crate) fn witnesses(&self) -> Witnesses {
        Witnesses {
            crew: Arc::clone(&self.crew),
            number: self.number,
        }
    }

    /// The threads that have a seat for the disk.
    fn seats(&self) -> impl Iterator<Item = usize> {
        let seated = self.seated.iter().enumerate();
        seated.filter_map(|(thread, seated)| seated.then_some(thread))
    }

    fn thread_of(&self, index: u16) -> usize {
        (self.number as usize + usize::from(index)) % self.seated.len()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.dismiss();
        self.crew.give_back(self.number);
    }
}
