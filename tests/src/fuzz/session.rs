//! The target for sessions: what a front end says and the descriptors it brings, through a socket into the daemon.
//!
//! ```text
//! Input ─► messages, descriptors ─► socket ─► session, backend, rings, workers
//!                                     └─────► answers
//! ```
//!
//! What must hold, whatever a front end says:
//!
//! - The session ends soon after the front end has gone, and the daemon does not.
//! - Every message that is to be answered is answered once, with its own number and the right length, until one ends the session.
//! - The next front end, which behaves, is served: what it writes it reads.
//! - In the end the image is closed clean, and no descriptor and no mapping is left.

mod input;

use std::fs::File;
use std::io::{IoSlice, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vdi_core::Access;
use vdi_core::check::{Severity, check};
use vdi_vhost::fuzzing::{self, Daemon};

use self::input::{Kind, MEMORY, Message, SECOND};
use super::request::Images;
use crate::driver::raw::NEED_REPLY;
use crate::driver::{ControlError, Driver, Layout, Options, PATIENCE, Region, Request};
use crate::random::Random;

/// More than a message may be.
const MOST_ANSWER: usize = 8192;

/// Changes an input a little.
pub fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    input::mutate(bytes, random);
}

/// Inputs to begin with.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    input::seeds()
}

/// Serves a front end that an input describes, then one that behaves.
///
/// # Panics
/// If a promise is broken.
pub fn run(bytes: &[u8]) {
    fuzzing::prepare();
    let before = held();
    let messages = input::parse(bytes);
    // Whoever stopped this process for a while made it wait in vain, but not twice.
    let is_served = serve(&messages) || serve(&messages);
    assert!(is_served, "a front end that behaves waits in vain");
    assert_eq!(held(), before, "descriptors or mappings are left");
}

/// How many descriptors and how many mappings of front ends' files this process has.
fn held() -> (usize, usize) {
    let open = std::fs::read_dir("/proc/self/fd").expect("this is Linux");
    (open.count(), shared())
}

/// How many mappings of front ends' files there are.
fn shared() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("this is Linux");
    maps.lines().filter(|line| line.contains("/memfd:")).count()
}

/// Whether the second front end is served in time.
fn serve(messages: &[Message]) -> bool {
    let images = Images::new(false);
    let daemon = Daemon::new(&images.path());
    let (ours, theirs) = UnixStream::pair().expect("descriptors are left");
    send_all(&ours, messages);
    // All is said before anybody listens, so nothing depends on time.
    daemon.converse(theirs);
    assert_eq!(
        shared(),
        0,
        "the memory of a front end that is gone is mapped"
    );
    check_answers(&ours, messages);
    let is_served = behave(&daemon);
    daemon.close().expect("nothing fails");
    let files = images.open(Access::ReadOnly);
    let report = check(&*files[0]).expect("it can be examined");
    assert_eq!(report.count_of(Severity::Corruption), 0, "{report:#?}");
    is_served
}

fn send_all(socket: &UnixStream, messages: &[Message]) {
    let guest = guest();
    for message in messages {
        let mut bytes = [message.code, message.flags, message.len]
            .map(u32::to_ne_bytes)
            .concat();
        bytes.extend(&message.payload);
        let fds: Vec<OwnedFd> = message
            .fds
            .iter()
            .map(|kind| descriptor(*kind, &guest))
            .collect();
        let numbers: Vec<i32> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let rights = if numbers.is_empty() {
            &[][..]
        } else {
            &rights[..]
        };
        let flags = MsgFlags::MSG_DONTWAIT;
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            rights,
            flags,
            None,
        );
        assert_eq!(sent, Ok(bytes.len()), "the socket has room");
    }
    socket.shutdown(Shutdown::Write).expect("it is connected");
}

fn memfd(len: u64) -> File {
    let file: File = memfd_create("front-end", MFdFlags::MFD_CLOEXEC)
        .expect("there is memory")
        .into();
    file.set_len(len).expect("there is memory");
    file
}

fn descriptor(kind: Kind, guest: &File) -> OwnedFd {
    let open = |path: &str| File::open(path).expect("it is there").into();
    let event = |value: u64| {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).expect("descriptors are left");
        event.write(value).expect("it is empty");
        event.into()
    };
    let pipe = || std::io::pipe().expect("descriptors are left");
    match kind {
        Kind::Memory => guest.try_clone().expect("descriptors are left").into(),
        Kind::Event => event(1),
        Kind::FullEvent => event(u64::MAX - 1),
        Kind::Short => memfd(0x1000).into(),
        Kind::Huge => memfd(1 << 40).into(),
        Kind::Zeros => memfd(1 << 20).into(),
        Kind::EmptyPipe => pipe().0.into(),
        Kind::PipeEnd => pipe().1.into(),
        Kind::FullPipe => {
            let (reader, mut writer) = pipe();
            std::io::Write::write_all(&mut writer, &[7; 100]).expect("it has room");
            reader.into()
        }
        Kind::Socket => UnixStream::pair().expect("descriptors are left").0.into(),
        Kind::Null => open("/dev/null"),
        Kind::Directory => open("/proc"),
    }
}

/// Guest memory with two rings of 16: one with a read, a write, a flush and a name, one with a loop.
fn guest() -> File {
    let file = memfd(MEMORY);
    let put = |at: u64, bytes: &[u8]| file.write_all_at(bytes, at).expect("there is memory");
    let descriptor = |at: u64, address: u64, len: u32, flags: u16, next: u16| {
        put(at, &address.to_le_bytes());
        put(at + 8, &len.to_le_bytes());
        put(at + 12, &[flags.to_le_bytes(), next.to_le_bytes()].concat());
    };
    let requests: [(u32, u64, u32, u16); 4] =
        [(0, 9, 512, 3), (1, 9, 512, 1), (4, 0, 0, 1), (8, 0, 20, 3)];
    for (nth, (kind, sector, len, flags)) in (0_u16..).zip(requests) {
        let at = 0x4000 + u64::from(nth) * 0x400;
        put(at, &kind.to_le_bytes());
        put(at + 8, &sector.to_le_bytes());
        let (first, table) = (nth * 3, u64::from(nth) * 48);
        descriptor(table, at, 16, 1, first + 1);
        descriptor(table + 16, at + 0x100, len, flags, first + 2);
        descriptor(table + 32, at + 0x300, 1, 2, 0);
        put(0x1004 + u64::from(nth) * 2, &first.to_le_bytes());
    }
    put(0x1002, &4_u16.to_le_bytes());
    descriptor(SECOND, SECOND + 0x4000, 16, 1, 0);
    put(SECOND + 0x1002, &1_u16.to_le_bytes());
    file
}

/// How long the answer to a message is, if it has one of its own.
fn own_answer(message: &Message) -> Option<&'static [usize]> {
    match message.code {
        1 | 11 | 15 | 17 | 36 | 42 | 43 => Some(&[8]),
        6 => Some(&[16]),
        31 => Some(&[24, 20]),
        // See `config_len`.
        24 => Some(&[]),
        _ => None,
    }
}

/// How long the answer to a question about the configuration space is, if nothing is wrong with it.
fn config_len(message: &Message) -> Option<usize> {
    let words: Vec<u32> = message
        .payload
        .chunks(4)
        .take(3)
        .map_while(|bytes| bytes.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes)))
        .collect();
    let &[offset, size, 0] = &words[..] else {
        return None;
    };
    let len = 12 + usize::try_from(size).ok()?;
    let is_right = (1..=256).contains(&size) && offset <= 0x200 && message.payload.len() == len;
    is_right.then_some(len)
}

/// Compares the answers with what was to be answered, as long as that is certain.
fn check_answers(mut socket: &UnixStream, messages: &[Message]) {
    let mut bytes = Vec::new();
    socket.set_nonblocking(true).expect("it is a socket");
    // What was sent and never read is an error behind the last answer.
    let _end = socket.read_to_end(&mut bytes);
    let mut answers = Vec::new();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let word = |nth: usize| {
            let bytes = rest.get(nth * 4..).and_then(<[u8]>::first_chunk);
            u32::from_ne_bytes(*bytes.expect("an answer is whole"))
        };
        let len = usize::try_from(word(2)).expect("64-bit hosts only");
        assert_eq!(word(1), 5, "an answer has other flags");
        assert!(len < MOST_ANSWER, "an answer is {len} bytes long");
        answers.push((word(0), len));
        rest = rest.get(12 + len..).expect("an answer is whole");
    }
    let mut answers = answers.into_iter();
    let (mut knows_protocol, mut accepted) = (false, 0);
    for message in messages {
        if let (16, Some(bits)) = (message.code, message.payload.first_chunk()) {
            accepted = u64::from_ne_bytes(*bits);
        }
        let wants = knows_protocol && accepted & 8 != 0 && message.flags & NEED_REPLY != 0;
        let own = own_answer(message);
        if own.is_some() || wants {
            let Some((code, len)) = answers.next() else {
                return; // The session has ended.
            };
            assert_eq!(code, message.code, "the answer to {message:?}");
            let right = own.unwrap_or(&[8]);
            let is_config = message.code == 24 && message.is_framed;
            if let Some(right) = config_len(message).filter(|_| is_config) {
                assert_eq!(len, right, "{message:?}");
            }
            assert!(
                right.is_empty() || right.contains(&len),
                "{len} bytes: {message:?}"
            );
        }
        if !message.is_framed {
            return;
        }
        knows_protocol |= message.code == 1;
    }
    assert_eq!(answers.next(), None, "one answer too many");
}

/// A front end that does all right; false if it waited in vain for something.
fn behave(daemon: &Daemon) -> bool {
    let (ours, theirs) = UnixStream::pair().expect("descriptors are left");
    std::thread::scope(|scope| {
        scope.spawn(|| daemon.converse(theirs));
        let options = Options::new()
            .queue_size(16)
            .memory(vec![Region::new(0, 1 << 20)]);
        let mut driver = match Driver::on_socket(ours, &options) {
            Ok(driver) => driver,
            Err(ControlError::TimedOut { .. }) => return false,
            Err(error) => panic!("a front end that behaves is not served: {error}"),
        };
        let data = vec![0x77; 512];
        let mut answer = |request: &Request| {
            let token = driver.queue().submit(request, &Layout::framed());
            driver.queue().wait_within(token, PATIENCE)
        };
        let Some(written) = answer(&Request::write(77, data.clone())) else {
            return false;
        };
        let _empty = written.expect_ok();
        let Some(read) = answer(&Request::read(77, 512)) else {
            return false;
        };
        assert_eq!(read.expect_ok(), data, "what was written is read");
        answer(&Request::flush()).is_some_and(|flushed| flushed.expect_ok().is_empty())
    })
}
