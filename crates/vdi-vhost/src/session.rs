//! A session: one front end's messages, from its connection to its end, on a thread of its own.
//!
//! Nothing a front end does or leaves undone may keep this thread from hearing for long that it is to end: a message
//! is only begun when its header is there and its answer has room. What is said of front ends is rate-limited. A front end
//! that takes back memory which is in use is disconnected (`fault`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use vhost::vhost_user::{BackendReqHandler, Error};

use crate::berth::Berth;
use crate::channel::Channel;
use crate::complaints::{About, Complaints};
use crate::rings::RingError;

/// How long the rest of a message may take to follow its beginning.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a message that is not complete is looked at again, in milliseconds.
const RECHECK_MS: u16 = 5;

/// What a socket tells when nothing more will come from the peer (`nix` has no name for POLLRDHUP).
const PEER_IS_DONE: PollFlags = PollFlags::from_bits_retain(libc::POLLRDHUP);

/// Bytes of a message's header.
const HEADER_BYTES: usize = 12;

/// Why serving cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    /// poll failed.
    #[error("cannot wait for front ends")]
    Wait(#[source] io::Error),
    /// accept failed for the only connection there is, or there is no thread.
    #[error("cannot accept a front end's connection")]
    Accept(#[source] io::Error),
    /// A worker died.
    #[error("cannot end a front end's session")]
    EndSession(#[source] RingError),
}

/// What was said of front ends: those that come and go do not silence what is wrong with others.
pub(crate) struct Said {
    comings: Complaints,
    refusals: Complaints,
}

impl Said {
    /// Lines that begin so.
    pub(crate) fn about(about: &About) -> Self {
        let complaints = || Complaints::about(about.clone());
        Self {
            comings: complaints(),
            refusals: complaints(),
        }
    }
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heard {
    Poke,
    Peer,
    Nothing,
}

/// What there is to read.
enum Message {
    Begun,
    Incomplete,
    End,
}

/// Serves one front end until it goes away or the disk's place is closed, and answers what it left in flight.
pub(crate) fn converse(stream: UnixStream, berth: &Berth) -> Result<(), ServeError> {
    let said = berth.said();
    said.comings.info(format_args!("a front end is connected"));
    if let Err(error) = converse_until_end(stream, berth) {
        // Other disks need not go with it: descriptors are short, perhaps, since somebody else's front end took them all.
        said.refusals
            .warn(format_args!("the front end is disconnected: {error}"));
    }
    berth.lock().end_session().map_err(ServeError::EndSession)?;
    said.comings
        .info(format_args!("the front end's session has ended"));
    Ok(())
}

fn converse_until_end(stream: UnixStream, berth: &Berth) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
    let own = stream.try_clone()?;
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(berth.backend()));
    let mut begun: Option<Instant> = None;
    loop {
        let heard = match begun {
            // A readable socket cannot be waited on for more, but for its end.
            Some(_) => wait(berth, &own, PEER_IS_DONE, RECHECK_MS.into())?,
            None => wait(berth, &own, PollFlags::POLLIN, PollTimeout::NONE)?,
        };
        match (heard, begun) {
            (Heard::Poke, _) if is_over(berth) => return Ok(()),
            (Heard::Poke, _) | (Heard::Nothing, None) => continue,
            (Heard::Peer, _) | (Heard::Nothing, Some(_)) => {}
        }
        let peer_is_done = begun.is_some() && heard == Heard::Peer;
        match peek(&own) {
            Message::End => return Ok(()),
            // It was looked at after the end was seen: there is no more of it.
            Message::Incomplete if peer_is_done => return Ok(()),
            Message::Incomplete => {
                if begun.get_or_insert_with(Instant::now).elapsed() > MESSAGE_TIMEOUT {
                    berth.said().refusals.warn(format_args!(
                        "the front end sent half a message, it is disconnected"
                    ));
                    return Ok(());
                }
                continue;
            }
            Message::Begun => begun = None,
        }
        if let Some(channel) = Channel::peek(&own) {
            berth.lock().set_channel(channel);
        }
        // Room for the answer; a front end that does not read its answers waits here, not we.
        match wait(berth, &own, PollFlags::POLLOUT, PollTimeout::NONE)? {
            Heard::Poke if is_over(berth) => return Ok(()),
            Heard::Poke | Heard::Nothing => continue,
            Heard::Peer => {}
        }
        match handler.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected) => return Ok(()),
            Err(error) => {
                berth
                    .said()
                    .refusals
                    .warn(format_args!("the front end is disconnected: {error}"));
                return Ok(());
            }
        }
    }
}

/// Whether the disk's place is closed, or the front end took back memory that is in use, or its memory cannot be had for another
/// reason.
fn is_over(berth: &Berth) -> bool {
    if berth.is_closing() {
        return true;
    }
    let Some(lost) = berth.lock().lost_memory() else {
        return false;
    };
    berth
        .said()
        .refusals
        .warn(format_args!("the front end is disconnected: {lost}"));
    true
}

/// Nobody could be let in who waits at the door: descriptors or threads are short.
pub(crate) fn complain_of_door(berth: &Berth, error: &io::Error) {
    berth.said().refusals.warn(format_args!(
        "a front end has to wait, it cannot be let in yet: {error}"
    ));
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

/// Waits for a poke or an event of the peer's descriptor.
fn wait(
    berth: &Berth,
    peer: &impl AsFd,
    events: PollFlags,
    timeout: PollTimeout,
) -> io::Result<Heard> {
    let mut fds = [
        PollFd::new(berth.poked().as_fd(), PollFlags::POLLIN),
        PollFd::new(peer.as_fd(), events),
    ];
    while let Err(errno) = poll(&mut fds, timeout) {
        if errno != Errno::EINTR {
            return Err(errno.into());
        }
    }
    let happened = |nth: usize| fds[nth].any().unwrap_or(true);
    if happened(0) {
        // Read, so that it is heard once.
        let _ = berth.poked().read();
        return Ok(Heard::Poke);
    }
    Ok(if happened(1) {
        Heard::Peer
    } else {
        Heard::Nothing
    })
}
