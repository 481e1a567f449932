//! Lines of text over a local socket, with descriptors: how one daemon gives another what it listens on.
//!
//! The descriptors come in the order of the lines they were sent with. The kernel may hand over a descriptor together with bytes that
//! were sent before it, never after; so who reads a line that came with one has it (unix(7), "SCM_RIGHTS").

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes of the longest line: the names of all disks there can be.
const LONGEST_LINE: usize = 8 << 20;

/// Bytes that are read at once.
const PIECE: usize = 4096;

/// Descriptors that the kernel hands over at once, at most (SCM_MAX_FD).
const DESCRIPTORS: usize = 253;

/// Sends a line and a descriptor.
pub(crate) fn send(mut socket: &UnixStream, line: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let pushed = ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    assert!(pushed, "there is room for one");
    let bytes = line.as_bytes();
    let flags = SendFlags::NOSIGNAL;
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, flags)?;
    socket.write_all(bytes.get(sent..).unwrap_or_default())
}

/// What comes in.
#[derive(Debug)]
pub(crate) struct Lines {
    socket: UnixStream,
    bytes: VecDeque<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl Lines {
    /// Those that come through this socket.
    pub(crate) fn of(socket: UnixStream) -> Self {
        Self {
            socket,
            bytes: VecDeque::new(),
            descriptors: VecDeque::new(),
        }
    }

    /// Where they come from, to answer.
    pub(crate) const fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The next line, without its end; `UnexpectedEof` if there is none.
    pub(crate) fn next(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(end) = self.bytes.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<_> = self.bytes.drain(..=end).collect();
                line.pop();
                return Ok(line);
            }
            if self.bytes.len() > LONGEST_LINE {
                return Err(io::Error::other("a line is too long"));
            }
            self.receive()?;
        }
    }

    /// The descriptor that came with a line that was read.
    pub(crate) fn take_descriptor(&mut self) -> io::Result<OwnedFd> {
        let missing = || io::Error::other("a descriptor is missing");
        self.descriptors.pop_front().ok_or_else(missing)
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut piece = [0; PIECE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut piece)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(&self.socket, into, &mut ancillary, flags)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        if got.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.bytes.extend(&piece[..got.bytes]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn descriptors_come_in_the_order_of_their_lines() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sent = std::thread::spawn(move || {
            for nth in 0..600 {
                let mut file = tempfile::tempfile().unwrap();
                write!(file, "{nth}").unwrap();
                let line = format!("{nth} {}\n", "x".repeat(nth * 10));
                send(&ours, &line, file.as_fd()).unwrap();
                (&ours).write_all(b"without\n").unwrap();
            }
        });
        let mut lines = Lines::of(theirs);
        for nth in 0..600 {
            let line = String::from_utf8(lines.next().unwrap()).unwrap();
            assert!(line.starts_with(&format!("{nth} ")));
            let mut file = File::from(lines.take_descriptor().unwrap());
            let mut text = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, nth.to_string());
            assert_eq!(lines.next().unwrap(), b"without");
        }
        sent.join().unwrap();
        assert!(lines.take_descriptor().is_err());
        let end = lines.next().unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }
}
