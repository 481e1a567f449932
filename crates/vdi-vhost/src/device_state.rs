//! The device's state as a front end moves it in a snapshot or a migration (DEVICE_STATE): there is none.
//!
//! All that a block device is lies in its image, in the guest's memory, and in what the front end sets up itself. So
//! what is saved is empty, and only that can be loaded: bytes that are there are another device's state, and whoever
//! sends them must hear that they are not heeded.
//!
//! Source: vhost-user protocol, "Migrating back-end state".

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::message::VhostTransferStateDirection;

/// How long the end of a state that is loaded may take, once the front end has asked how it went.
const END_TIMEOUT_MS: u16 = 1000;

/// Why a state is not taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    /// It is some other device's.
    #[error(
        "the front end loads a state into this device, which has none; only an empty one can be loaded"
    )]
    NotEmpty,
    /// The front end forgot to close its end.
    #[error("the state that the front end loads does not end within {END_TIMEOUT_MS} ms")]
    Endless,
    /// The kernel refused.
    #[error("the state that the front end loads cannot be read")]
    Read(#[source] io::Error),
}

/// A state that the front end is writing.
#[derive(Debug)]
pub(crate) struct Loading(File);

/// Begins a transfer over `file`: one that saves is over at once, since closing the file says so.
pub(crate) fn transfer(
    direction: VhostTransferStateDirection,
    file: File,
) -> Result<Option<Loading>, StateError> {
    match direction {
        VhostTransferStateDirection::SAVE => Ok(None),
        VhostTransferStateDirection::LOAD => {
            // This end is for us alone to read, so nobody else minds.
            let failed = |error: Errno| StateError::Read(error.into());
            let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(failed)?;
            let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
            fcntl(&file, FcntlArg::F_SETFL(flags)).map_err(failed)?;
            Ok(Some(Loading(file)))
        }
    }
}

impl Loading {
    /// Whether the whole state was taken over, which is so if it was empty.
    pub(crate) fn check(mut self) -> Result<(), StateError> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let _ready = poll(&mut fds, PollTimeout::from(END_TIMEOUT_MS));
        match self.0.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(StateError::NotEmpty),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(StateError::Endless),
            Err(error) => Err(StateError::Read(error)),
        }
    }
}
