//! A front end that sends anything: truncated, unknown and lying messages.
//!
//! Not for legal traffic: see `control.rs`.
//!
//! Source: QEMU `docs/interop/vhost-user.rst`, "Message Specification".

use std::io::{ErrorKind, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::control::{ControlError, connect_patiently};
use super::queue::PATIENCE;

/// Version 1, the only one.
pub const VERSION: u32 = 1;
/// The message is an answer.
pub const REPLY: u32 = 4;
/// The sender wants an answer.
pub const NEED_REPLY: u32 = 8;

/// What comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A message.
    Message {
        /// Which request it answers.
        request: u32,
        /// The header's flags.
        flags: u32,
        /// What follows the header.
        payload: Vec<u8>,
    },
    /// The back end ended the connection.
    Closed,
    /// Nothing came in time.
    Silence,
}

impl Reply {
    /// Whether this is a no: an answer to NEED_REPLY that is not 0, or the end.
    #[must_use]
    pub fn refuses(&self) -> bool {
        match self {
            Self::Message { payload, .. } => payload.iter().any(|&byte| byte != 0),
            Self::Closed => true,
            Self::Silence => false,
        }
    }

    /// The first eight bytes of the answer.
    ///
    /// # Panics
    /// If it is no such answer.
    #[must_use]
    pub fn expect_u64(&self) -> u64 {
        match self {
            Self::Message { payload, .. } => {
                let bytes = payload.first_chunk().expect("the answer is a number");
                u64::from_ne_bytes(*bytes)
            }
            Self::Closed | Self::Silence => panic!("no answer: {self:?}"),
        }
    }
}

/// A connection without manners.
#[derive(Debug)]
pub struct RawFrontEnd {
    socket: UnixStream,
}

impl RawFrontEnd {
    /// Connects and says nothing.
    ///
    /// # Errors
    /// If nobody listens.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let socket = connect_patiently(path)?;
        socket
            .set_read_timeout(Some(PATIENCE))
            .expect("PATIENCE is not 0");
        socket
            .set_write_timeout(Some(PATIENCE))
            .expect("PATIENCE is not 0");
        Ok(Self { socket })
    }

    /// Sends bytes as they are; errors are ignored, since the back end may have closed.
    pub fn send_bytes(&mut self, bytes: &[u8]) {
        let _may_be_closed = self.socket.write_all(bytes);
    }

    /// Sends the same bytes again and again until the back end takes no more for a while.
    pub fn send_until_full(&self, bytes: &[u8]) {
        let a_while = Some(Duration::from_millis(300));
        let mut socket = &self.socket;
        socket.set_write_timeout(a_while).expect("it is not 0");
        while socket.write_all(bytes).is_ok() {}
    }

    /// Sends a message whose header says what is said here, whatever the payload is.
    pub fn send(
        &mut self,
        request: u32,
        flags: u32,
        len_bytes: u32,
        payload: &[u8],
        fds: &[RawFd],
    ) {
        let mut bytes = Vec::new();
        bytes.extend(request.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(len_bytes.to_ne_bytes());
        bytes.extend(payload);
        let _may_be_closed = self.socket.send_with_fds(&[&bytes[..]], fds);
    }

    /// Sends a well-formed message that wants an answer, and takes the answer.
    pub fn ask(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> Reply {
        let len = u32::try_from(payload.len()).expect("payloads are short");
        self.send(request, VERSION | NEED_REPLY, len, payload, fds);
        self.reply()
    }

    /// Says that nothing more will be sent.
    pub fn shut(&mut self) {
        let _may_be_closed = self.socket.shutdown(std::net::Shutdown::Write);
    }

    /// Waits for one message or the end.
    pub fn reply(&mut self) -> Reply {
        let mut header = [0; 12];
        if let Err(end) = self.read_exact(&mut header) {
            return end;
        }
        let word = |at: usize| {
            let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_ne_bytes(bytes)
        };
        let mut payload = vec![0; word(8) as usize];
        if let Err(end) = self.read_exact(&mut payload) {
            return end;
        }
        Reply::Message {
            request: word(0),
            flags: word(4),
            payload,
        }
    }

    fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), Reply> {
        self.socket
            .read_exact(bytes)
            .map_err(|error| match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut => Reply::Silence,
                _ => Reply::Closed,
            })
    }
}
