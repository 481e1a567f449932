//! The thread that hears who comes: front ends at the doors of disks, operators, signals, the kernel's word that memory is gone. It
//! only opens; what comes after is done by a thread for each. It also tells the service manager that all goes round.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;

use crate::control::ControlSocket;
use crate::fleet::{Fleet, knock};
use crate::service::Manager;
use crate::session::ServeError;

/// Knocks that are heard at once; more are by the next look.
const KNOCKS: usize = 64;

/// After how many milliseconds a door is listened at again where nobody could be let in: what was short, a descriptor mostly, may be
/// there again.
const AGAIN_MS: u16 = 100;

/// What is listened to beside the doors, by number.
const SIGNAL: u64 = 0;
const FAULT: u64 = 1;
const OPERATOR: u64 = 2;
const END: u64 = 3;
const HANGUP: u64 = 4;

/// What there is to hear.
pub(crate) struct Ears<'a> {
    /// Becomes readable when the process should end.
    pub(crate) signals: &'a UnixStream,
    /// Becomes readable when the configuration should be read again.
    pub(crate) hangups: Option<&'a UnixStream>,
    /// Becomes readable when memory that a front end shares could not be accessed.
    pub(crate) faults: &'a EventFd,
    /// Where operators send commands.
    pub(crate) control: Option<&'a Arc<ControlSocket>>,
    /// Who is told that this thread goes round.
    pub(crate) manager: &'a Manager,
}

/// Opens doors until a signal comes, an operator wants it to end, or the only connection ends.
pub(crate) fn serve(fleet: &Arc<Fleet>, ears: &Ears<'_>) -> Result<(), ServeError> {
    let doors = fleet.knocks();
    let add = |fd: BorrowedFd<'_>, event| {
        doors
            .add(fd, event)
            .map_err(|errno| ServeError::Wait(errno.into()))
    };
    let hear = |fd, number| add(fd, EpollEvent::new(EpollFlags::EPOLLIN, number));
    hear(ears.signals.as_fd(), SIGNAL)?;
    hear(ears.faults.as_fd(), FAULT)?;
    hear(fleet.ending().as_fd(), END)?;
    if let Some(control) = ears.control {
        add(control.as_fd(), knock(OPERATOR))?;
    }
    if let Some(hangups) = ears.hangups {
        hear(hangups.as_fd(), HANGUP)?;
    }
    // The longest that epoll can wait is 24 days.
    let beat = ears
        .manager
        .interval()
        .map_or(EpollTimeout::NONE, |interval| {
            EpollTimeout::try_from(interval).unwrap_or(EpollTimeout::MAX)
        });
    let mut events = [EpollEvent::empty(); KNOCKS];
    let mut stuck: Vec<u64> = Vec::new();
    loop {
        ears.manager.beat();
        let wait = if stuck.is_empty() {
            beat
        } else {
            EpollTimeout::from(AGAIN_MS)
        };
        let count = match doors.wait(&mut events, wait) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(errno) => return Err(ServeError::Wait(errno.into())),
        };
        for number in stuck.drain(..) {
            ears.hear_again(fleet, number);
        }
        for event in &events[..count] {
            match event.data() {
                SIGNAL => return Ok(()),
                END => return fleet.fatal().map_or(Ok(()), Err),
                FAULT => {
                    // Read, so that it is heard once.
                    let _ = ears.faults.read();
                    fleet.poke_all();
                }
                HANGUP => {
                    if let Some(mut hangups) = ears.hangups {
                        // What came so far is one.
                        let _ = hangups.read(&mut [0; KNOCKS]);
                        reload(fleet);
                    }
                }
                number => match ears.let_in(fleet, number) {
                    Ok(true) => {}
                    Ok(false) => stuck.push(number),
                    Err(error) => return Err(ServeError::Accept(error)),
                },
            }
        }
    }
}

impl Ears<'_> {
    /// Lets in who is there; false if that is to be tried again a little later.
    fn let_in(&self, fleet: &Arc<Fleet>, number: u64) -> io::Result<bool> {
        match self.control {
            Some(control) if number == OPERATOR => {
                let is_in = control.let_in(fleet);
                if is_in {
                    self.hear_again(fleet, number);
                }
                Ok(is_in)
            }
            Some(_) | None => fleet.knocked(number),
        }
    }

    /// Listens at a door again.
    fn hear_again(&self, fleet: &Fleet, number: u64) {
        match self.control {
            Some(control) if number == OPERATOR => {
                // It was listened to before.
                let _ = fleet.knocks().modify(control.as_fd(), &mut knock(OPERATOR));
            }
            Some(_) | None => fleet.listen_again(number),
        }
    }
}

/// Reads the configuration again, on a thread of its own: images are opened.
fn reload(fleet: &Arc<Fleet>) {
    let fleet = Arc::clone(fleet);
    let thread = thread::Builder::new().name("reload".to_owned());
    let begun = thread.spawn(move || {
        if let Err(error) = fleet.reload() {
            let error = crate::chain_of(&error);
            tracing::error!("the configuration was not read again: {error}");
        }
    });
    if let Err(error) = begun {
        tracing::error!("the configuration was not read again: {error}");
    }
}
