//! As much of HTTP as a scraper needs, by one thread that nobody can hold up.
//!
//! - **H1** A caller costs a descriptor, [`LONGEST_REQUEST`] bytes and a share of one page; there are [`MOST_CALLERS`] at most.
//! - **H2** A caller has [`TO_ASK`] for its request and [`TO_READ`] for the answer. If all places are taken, whoever has been asking longest gives its
//!   place up: a scraper asks at once, so half requests, however many, keep none out.
//! - **H3** The page is made again only when it is older than [`FRESH`]; a flood of requests costs no more than that.
//!
//! Each connection is for one request. Not hyper or `tiny_http`: these have no limits of this kind, and threads of their own, which would need more
//! system calls than this one's filter has. Requests are parsed by `httparse`.

use std::fmt::{self, Debug, Formatter};
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use httparse::{EMPTY_HEADER, Request, Status};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

/// Callers at once: a few scrapers, and some who mean no good.
const MOST_CALLERS: usize = 32;

/// Bytes of a request; Prometheus sends 400.
const LONGEST_REQUEST: usize = 8 << 10;

/// Headers of a request.
const MOST_HEADERS: usize = 64;

/// How long a caller may take for its request.
const TO_ASK: Duration = Duration::from_secs(2);

/// How long it may take to read the answer. Prometheus itself gives up after ten seconds.
const TO_READ: Duration = Duration::from_secs(10);

/// How long a page is good.
const FRESH: Duration = Duration::from_millis(50);

/// How long nobody is let in after the host could not do it: no descriptor is left, say.
const DEAF: Duration = Duration::from_millis(100);

/// Where callers come from.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection, of either kind.
trait Peer: Read + Write + AsFd + Send {}

impl<T: Read + Write + AsFd + Send> Peer for T {}

/// Those who are served.
#[derive(Debug)]
pub(super) struct Server {
    listener: Listener,
    /// Becomes readable when all is over.
    end: Arc<EventFd>,
    callers: Vec<Caller>,
    /// Nobody is let in before.
    deaf_until: Option<Instant>,
    /// The last page, if it is fresh.
    page: Option<(Instant, Arc<str>)>,
}

struct Caller {
    peer: Box<dyn Peer>,
    since: Instant,
    state: State,
}

enum State {
    /// What has come of its request.
    Asking(Vec<u8>),
    Reading {
        head: String,
        body: Arc<str>,
        sent: usize,
    },
}

/// What a caller wants.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// That is not known yet.
    NotYet,
    Page,
    /// The page's length.
    Head,
    /// Something that there is not: the status, and what to do.
    Nothing(&'static str, &'static str),
}

impl Server {
    pub(super) fn new(listener: Listener, end: Arc<EventFd>) -> io::Result<Self> {
        match &listener {
            Listener::Tcp(listener) => listener.set_nonblocking(true)?,
            Listener::Unix(listener) => listener.set_nonblocking(true)?,
        }
        Ok(Self {
            listener,
            end,
            callers: Vec::with_capacity(MOST_CALLERS),
            deaf_until: None,
            page: None,
        })
    }

    /// Serves what `make` makes until all is over.
    pub(super) fn serve(&mut self, mut make: impl FnMut() -> String) {
        loop {
            match self.wait() {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    tracing::error!("there are no metrics any more: {error}");
                    return;
                }
            }
            let now = Instant::now();
            // It may be megabytes.
            self.page.take_if(|(made, _)| now >= *made + FRESH);
            self.let_in(now);
            let mut callers = std::mem::take(&mut self.callers);
            callers.retain_mut(|caller| self.go_on(caller, now, &mut make));
            self.callers = callers;
        }
    }

    /// Waits until something can be done. Whether all is over.
    fn wait(&self) -> io::Result<bool> {
        let now = Instant::now();
        let deaf = self.deaf_until.filter(|until| *until > now);
        let stale = self.page.as_ref().map(|(made, _)| *made + FRESH);
        let ends = self.callers.iter().map(Caller::deadline);
        let ends = ends.chain(deaf).chain(stale);
        let timeout = ends.min().map_or(PollTimeout::NONE, |end| {
            // Rounded up, so that it is over then.
            let wait = end.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        let mut all = vec![PollFd::new(self.end.as_fd(), PollFlags::POLLIN)];
        let callers = self.callers.iter();
        all.extend(callers.map(|caller| PollFd::new(caller.peer.as_fd(), caller.awaits())));
        if deaf.is_none() && self.has_place() {
            all.push(PollFd::new(self.listener.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut all, timeout) {
            Ok(_) => Ok(all[0].any() == Some(true)),
            Err(nix::errno::Errno::EINTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Whether one more can be let in, perhaps in the place of another.
    fn has_place(&self) -> bool {
        self.callers.len() < MOST_CALLERS || self.callers.iter().any(Caller::is_asking)
    }

    /// Lets in who waits.
    fn let_in(&mut self, now: Instant) {
        if self.deaf_until.is_some_and(|until| until > now) {
            return;
        }
        self.deaf_until = None;
        // Not more, so that those who are here get their turn.
        for _ in 0..MOST_CALLERS {
            if !self.has_place() {
                return;
            }
            match self.listener.accept() {
                Ok(peer) => {
                    self.make_place();
                    self.callers.push(Caller {
                        peer,
                        since: now,
                        state: State::Asking(Vec::new()),
                    });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    tracing::debug!("somebody who wants metrics cannot be let in: {error}");
                    self.deaf_until = Some(now + DEAF);
                    return;
                }
            }
        }
    }

    /// H2: those who came first stand first.
    fn make_place(&mut self) {
        if self.callers.len() >= MOST_CALLERS
            && let Some(longest) = self.callers.iter().position(Caller::is_asking)
        {
            self.callers.remove(longest);
        }
    }

    /// Hears or answers a caller; whether it stays.
    fn go_on(
        &mut self,
        caller: &mut Caller,
        now: Instant,
        make: &mut impl FnMut() -> String,
    ) -> bool {
        if now >= caller.deadline() {
            return false;
        }
        if let State::Asking(heard) = &mut caller.state {
            let Ok(asked) = hear(&mut *caller.peer, heard) else {
                return false;
            };
            caller.state = match asked {
                Asked::NotYet => return true,
                Asked::Page => State::answer("200 OK", self.page(make)),
                Asked::Head => State::answer("200 OK", self.page(make)).without_body(),
                Asked::Nothing(status, advice) => State::answer(status, advice.into()),
            };
            caller.since = now;
        }
        matches!(caller.send(), Ok(false))
    }

    fn page(&mut self, make: &mut impl FnMut() -> String) -> Arc<str> {
        if let Some((_, page)) = &self.page {
            return Arc::clone(page);
        }
        let page: Arc<str> = make().into();
        self.page = Some((Instant::now(), Arc::clone(&page)));
        page
    }
}

impl Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }

    fn accept(&self) -> io::Result<Box<dyn Peer>> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Box::new(stream))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(Box::new(stream))
            }
        }
    }
}

impl Caller {
    const fn is_asking(&self) -> bool {
        matches!(self.state, State::Asking(_))
    }

    fn deadline(&self) -> Instant {
        self.since + if self.is_asking() { TO_ASK } else { TO_READ }
    }

    const fn awaits(&self) -> PollFlags {
        match self.state {
            State::Asking(_) => PollFlags::POLLIN,
            State::Reading { .. } => PollFlags::POLLOUT,
        }
    }

    /// Sends as much as goes; whether that was all.
    fn send(&mut self) -> io::Result<bool> {
        let State::Reading { head, body, sent } = &mut self.state else {
            return Ok(false);
        };
        loop {
            let (head, body) = (head.as_bytes(), body.as_bytes());
            let rest = match sent.checked_sub(head.len()) {
                None => &head[*sent..],
                Some(of_body) => &body[of_body..],
            };
            if rest.is_empty() {
                return Ok(true);
            }
            match self.peer.write(rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(len) => *sent += len,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl Debug for Caller {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caller")
            .field("is_asking", &self.is_asking())
            .finish_non_exhaustive()
    }
}

impl State {
    fn answer(status: &str, body: Arc<str>) -> Self {
        let kind = prometheus_client::encoding::prometheus_text::CONTENT_TYPE;
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        Self::Reading {
            head,
            body,
            sent: 0,
        }
    }

    fn without_body(mut self) -> Self {
        if let Self::Reading { body, .. } = &mut self {
            *body = "".into();
        }
        self
    }
}

/// Hears as much as has come. An error: the caller has gone.
fn hear(peer: &mut dyn Peer, heard: &mut Vec<u8>) -> io::Result<Asked> {
    let mut piece = [0; 1024];
    loop {
        match peer.read(&mut piece) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(len) => heard.extend_from_slice(&piece[..len]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Asked::NotYet),
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        match understand(heard) {
            Asked::NotYet if heard.len() < LONGEST_REQUEST => {}
            Asked::NotYet => {
                let long = "431 Request Header Fields Too Large";
                return Ok(Asked::Nothing(long, "that is too long\n"));
            }
            asked => return Ok(asked),
        }
    }
}

fn understand(heard: &[u8]) -> Asked {
    let mut headers = [EMPTY_HEADER; MOST_HEADERS];
    let mut request = Request::new(&mut headers);
    match request.parse(heard) {
        Ok(Status::Partial) => return Asked::NotYet,
        Ok(Status::Complete(_)) => {}
        Err(_) => return Asked::Nothing("400 Bad Request", "that is no HTTP\n"),
    }
    let path = request.path.unwrap_or_default();
    let path = path.split('?').next().unwrap_or_default();
    match (request.method.unwrap_or_default(), path) {
        ("GET", "/metrics") => Asked::Page,
        ("HEAD", "/metrics") => Asked::Head,
        ("GET" | "HEAD", _) => Asked::Nothing("404 Not Found", "metrics are at /metrics\n"),
        _ => Asked::Nothing("405 Method Not Allowed", "metrics can only be read\n"),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_request_is_understood_when_all_of_it_has_come() {
        let get = b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\n";
        for len in 0..get.len() {
            assert_eq!(understand(&get[..len]), Asked::NotYet, "{len}");
        }
        assert_eq!(understand(get), Asked::Page);
        assert_eq!(understand(b"HEAD /metrics HTTP/1.0\r\n\r\n"), Asked::Head);
        for (bad, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("\u{1}\u{2}", "400"),
        ] {
            let Asked::Nothing(said, _) = understand(bad.as_bytes()) else {
                panic!("{bad:?}");
            };
            assert!(said.starts_with(status), "{bad:?}: {said}");
        }
    }

    #[test]
    fn a_page_is_not_made_for_every_caller_of_a_flood() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = Listener::Unix(UnixListener::bind(&path).unwrap());
        let end = Arc::new(EventFd::new().unwrap());
        let mut server = Server::new(listener, Arc::clone(&end)).unwrap();
        let (mut made, begun) = (0_u32, Instant::now());
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for _ in 0..500 {
                    let mut stream = UnixStream::connect(&path).unwrap();
                    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
                    let mut answer = String::new();
                    stream.read_to_string(&mut answer).unwrap();
                    assert!(answer.ends_with("\r\n\r\npage\n"), "{answer}");
                }
                end.write(1).unwrap();
            });
            server.serve(|| {
                made += 1;
                "page\n".to_owned()
            });
        });
        let most = begun.elapsed().as_millis() / FRESH.as_millis() + 1;
        assert!(u128::from(made) <= most, "{made} pages, not {most}");
    }
}
