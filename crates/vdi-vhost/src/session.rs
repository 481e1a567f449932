//! Connections: one front end after the other, and the signal that ends it all.
//!
//! One thread waits for whatever comes first: a signal, a connection, a message. Others who connect meanwhile wait in
//! the socket's backlog. Nothing a front end does or leaves undone may keep this thread from hearing a signal for long: a message
//! is only begun when its header is there and its answer has room. What is said of front ends is rate-limited. A front end
//! that takes back memory which is in use is disconnected (`fault`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{MsgFlags, recv};
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::backend::Backend;
use crate::channel::Channel;
use crate::complaints::Complaints;
use crate::control::ControlSocket;
use crate::rings::RingError;
use crate::service::Manager;

/// How long the rest of a message may take to follow its beginning.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a message that is not complete is looked at again, in milliseconds.
const RECHECK_MS: u16 = 5;

/// What a socket tells when nothing more will come from the peer (`nix` has no name for POLLRDHUP).
const PEER_IS_DONE: PollFlags = PollFlags::from_bits_retain(libc::POLLRDHUP);

/// Bytes of a message's header.
const HEADER_BYTES: usize = 12;

/// What a front end speaks to.
#[derive(Debug)]
pub(crate) enum Door {
    /// A socket where front ends connect, one after the other.
    Listener(UnixListener),
    /// The one connection there will be (`--fd`).
    Connected(UnixStream),
}

/// Why serving cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// poll failed.
    #[error("cannot wait for front ends")]
    Wait(#[source] io::Error),
    /// accept failed.
    #[error("cannot accept a front end's connection")]
    Accept(#[source] io::Error),
    /// A worker died.
    #[error("cannot end a front end's session")]
    EndSession(#[source] RingError),
}

/// What is listened to beside the front end.
#[derive(Clone, Copy)]
pub(crate) struct Ears<'a> {
    /// Becomes readable when the daemon should end.
    pub(crate) signals: &'a UnixStream,
    /// Becomes readable when memory that a front end shares could not be accessed.
    pub(crate) faults: &'a EventFd,
    /// Where operators send commands.
    pub(crate) control: Option<&'a ControlSocket>,
    /// Who is told that this thread goes round.
    pub(crate) manager: &'a Manager,
    /// Who does what is heard.
    pub(crate) backend: &'a Arc<Mutex<Backend>>,
}

/// What was said of front ends: those that come and go do not silence what is wrong with others.
#[derive(Default)]
pub(crate) struct Said {
    comings: Complaints,
    refusals: Complaints,
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    Signal,
    Fault,
    Peer,
    Nothing,
}

/// What there is to read.
enum Message {
    Begun,
    Incomplete,
    End,
}

/// Serves front ends until a signal makes `signals` readable, or the only connection ends.
pub(crate) fn serve(door: Door, ears: &Ears<'_>) -> Result<(), ServeError> {
    let said = Said::default();
    let listener = match door {
        Door::Connected(stream) => return converse(stream, ears, &said).map(|_| ()),
        Door::Listener(listener) => listener,
    };
    listener.set_nonblocking(true).map_err(ServeError::Wait)?;
    loop {
        match wait(ears, &listener, PollFlags::POLLIN, PollTimeout::NONE)? {
            Heard::Signal => return Ok(()),
            // It was the last front end's, and that one has gone.
            Heard::Fault | Heard::Nothing => continue,
            Heard::Peer => {}
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if is_passing(&error) => continue,
            Err(error) => return Err(ServeError::Accept(error)),
        };
        if converse(stream, ears, &said)? == Heard::Signal {
            return Ok(());
        }
    }
}

/// Serves one front end until it goes away or a signal comes, and answers what it left in flight.
pub(crate) fn converse(
    stream: UnixStream,
    ears: &Ears<'_>,
    said: &Said,
) -> Result<Heard, ServeError> {
    said.comings.info(format_args!("a front end is connected"));
    let ended = converse_until_end(stream, ears, said);
    let mut backend = ears.backend.lock().unwrap_or_else(PoisonError::into_inner);
    backend.end_session().map_err(ServeError::EndSession)?;
    said.comings
        .info(format_args!("the front end's session has ended"));
    ended
}

fn converse_until_end(
    stream: UnixStream,
    ears: &Ears<'_>,
    said: &Said,
) -> Result<Heard, ServeError> {
    stream.set_nonblocking(false).map_err(ServeError::Wait)?;
    stream
        .set_read_timeout(Some(MESSAGE_TIMEOUT))
        .map_err(ServeError::Wait)?;
    let own = stream.try_clone().map_err(ServeError::Wait)?;
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(ears.backend));
    let mut begun: Option<Instant> = None;
    loop {
        let heard = match begun {
            // A readable socket cannot be waited on for more, but for its end.
            Some(_) => wait(ears, &own, PEER_IS_DONE, RECHECK_MS.into())?,
            None => wait(ears, &own, PollFlags::POLLIN, PollTimeout::NONE)?,
        };
        match (heard, begun) {
            (Heard::Signal, _) => return Ok(heard),
            (Heard::Fault, _) => match has_lost_memory(ears, said) {
                true => return Ok(Heard::Peer),
                false => continue,
            },
            // It was an operator, or nobody.
            (Heard::Nothing, None) => continue,
            (Heard::Peer, _) | (Heard::Nothing, Some(_)) => {}
        }
        let peer_is_done = begun.is_some() && heard == Heard::Peer;
        match peek(&own) {
            Message::End => return Ok(Heard::Peer),
            // It was looked at after the end was seen: there is no more of it.
            Message::Incomplete if peer_is_done => return Ok(Heard::Peer),
            Message::Incomplete => {
                if begun.get_or_insert_with(Instant::now).elapsed() > MESSAGE_TIMEOUT {
                    said.refusals.warn(format_args!(
                        "the front end sent half a message, it is disconnected"
                    ));
                    return Ok(Heard::Peer);
                }
                continue;
            }
            Message::Begun => begun = None,
        }
        if let Some(channel) = Channel::peek(&own) {
            let mut backend = ears.backend.lock().unwrap_or_else(PoisonError::into_inner);
            backend.set_channel(channel);
        }
        // Room for the answer; a front end that does not read its answers waits here, not we.
        match wait(ears, &own, PollFlags::POLLOUT, PollTimeout::NONE)? {
            Heard::Signal => return Ok(Heard::Signal),
            Heard::Fault if has_lost_memory(ears, said) => return Ok(Heard::Peer),
            Heard::Fault | Heard::Nothing => continue,
            Heard::Peer => {}
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected) => return Ok(Heard::Peer),
            Err(error) => {
                said.refusals
                    .warn(format_args!("the front end is disconnected: {error}"));
                return Ok(Heard::Peer);
            }
        }
    }
}

/// Whether the front end took back memory that is in use, or its memory cannot be had for another reason.
fn has_lost_memory(ears: &Ears<'_>, said: &Said) -> bool {
    let backend = ears.backend.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(lost) = backend.lost_memory() else {
        return false;
    };
    said.refusals
        .warn(format_args!("the front end is disconnected: {lost}"));
    true
}

/// Looks whether a message's header is there, without taking it.
fn peek(stream: &UnixStream) -> Message {
    let mut header = [0; HEADER_BYTES];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv(stream.as_raw_fd(), &mut header, flags) {
        Ok(HEADER_BYTES) => Message::Begun,
        Ok(0) => Message::End,
        Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => Message::Incomplete,
        Err(_) => Message::End,
    }
}

/// Waits for a signal or an event of the peer's descriptor. An operator's command is answered on the way.
fn wait(
    ears: &Ears<'_>,
    peer: &impl AsFd,
    events: PollFlags,
    timeout: PollTimeout,
) -> Result<Heard, ServeError> {
    let mut fds = vec![
        PollFd::new(ears.signals.as_fd(), PollFlags::POLLIN),
        PollFd::new(ears.faults.as_fd(), PollFlags::POLLIN),
        PollFd::new(peer.as_fd(), events),
    ];
    fds.extend(
        ears.control
            .map(|control| PollFd::new(control.as_fd(), PollFlags::POLLIN)),
    );
    let beat = ears.manager.interval().map(|interval| {
        // The longest that poll can wait is 24 days.
        PollTimeout::try_from(interval).unwrap_or(PollTimeout::MAX)
    });
    // No timeout is the smallest number.
    let timeout = match beat {
        Some(beat) if timeout.is_none() => beat,
        Some(beat) => beat.min(timeout),
        None => timeout,
    };
    loop {
        ears.manager.beat();
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(ServeError::Wait(error.into())),
            Ok(_) => break,
        }
    }
    let happened = |nth: usize| fds.get(nth).is_some_and(|fd| fd.any().unwrap_or(true));
    if happened(0) {
        return Ok(Heard::Signal);
    }
    if happened(1) {
        // Read, so that it is heard once.
        let _ = ears.faults.read();
        return Ok(Heard::Fault);
    }
    if let Some(control) = ears.control.filter(|_| happened(3)) {
        control.answer(ears.backend);
    }
    Ok(if happened(2) {
        Heard::Peer
    } else {
        Heard::Nothing
    })
}

/// Whether accepting may work the next time: the peer has gone, or another resource is short.
fn is_passing(error: &io::Error) -> bool {
    let passing = [libc::EAGAIN, libc::EINTR, libc::ECONNABORTED, libc::EPROTO];
    error
        .raw_os_error()
        .is_some_and(|errno| passing.contains(&errno))
}
