//! What the front end is told without having asked: that the configuration space changed.
//!
//! `vhost` has a type for this channel, which cannot send that message and hides its descriptor. So the descriptor is
//! copied from the front end's message before `vhost` takes it.
//!
//! No answer is asked for: a front end may ask us for the configuration before it answers, and both would wait.
//!
//! Source: vhost-user protocol, "VHOST_USER_BACKEND_CONFIG_CHANGE_MSG", "VHOST_USER_SET_BACKEND_REQ_FD".

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};

/// VHOST_USER_SET_BACKEND_REQ_FD, as a message begins with it.
const SET_BACKEND_REQ_FD: u32 = 21;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: its number, version 1 of the protocol, no body.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The way to the front end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// The channel that comes with the next message, if it brings one. The message stays where it is.
    pub(crate) fn peek(stream: &UnixStream) -> Option<Self> {
        let mut request = [0; 4];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let (_, len) = recv(stream, &mut request, flags).ok()?;
        if len < request.len() || u32::from_ne_bytes(request) != SET_BACKEND_REQ_FD {
            return None;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [IoSliceMut::new(&mut request)];
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        recvmsg(stream, &mut bytes, &mut ancillary, flags).ok()?;
        ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next().map(Self),
            _ => None,
        })
    }

    /// Says that the configuration space is to be read again.
    pub(crate) fn config_changed(&self) {
        let message: Vec<u8> = CONFIG_CHANGE
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        if let Err(error) = send(&self.0, &message, flags) {
            tracing::warn!("the front end cannot be told of the new size: {error}");
        }
    }
}
