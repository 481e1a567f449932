//! Memory that a front end takes back while it is in use: what it shares are files, and whoever touches a mapping behind
//! the end of its file gets SIGBUS, which would end this process.
//!
//! A handler puts a page of zeros in the place of the one that is gone, marks the account of the session that it belongs to as
//! lost, rings a bell and lets the thread go on. The thread that serves the front ends hears the bell and ends that session, and
//! no other; until it does, workers look at the account:
//!
//! - **F1** The mark is made before the memory changes. Who copied something out of shared memory and finds its account without
//!   the mark ([`Account::is_lost`]) has what was there, not zeros that were put there.
//! - **F2** So nothing that was read is acted upon, written to the image or made visible in it, and no answer is given, unless
//!   the account was looked at after the reading and before that: chains (`seat`), written zeros (`inflight`), bounce buffers
//!   (`transfer`), commits and used rings (`seat`).
//! - The kernel gets no signal: a transfer from or to memory that is gone fails (EFAULT) and its request with it, which
//!   [`Account::suspect`] tells.
//! - Only what the program itself touches is replaced, page by page, and a thread that finds the mark touches no more,
//!   so that transfers that are under way meet the error and not the zeros. One case remains: data that share a page with
//!   something that the program touches (a ring, a header, a status, data that go through a bounce buffer), on their way into a
//!   block that is allocated, when the page goes before the kernel has come to them. Then zeros can reach the sectors that their
//!   request was about to overwrite, and nobody is told that it did: its answer is withheld.
//! - A fault at any other place ends the process as if there were no handler.
//!
//! Every session has an account of its own, which is never whole again: what is mapped later in it is lost too. The bell and the
//! slots are the process's. The handler takes no lock and allocates nothing.
//!
//! Sources: sigaction(2) (SIGBUS, BUS_ADRERR), mmap(2), signal-safety(7).
#![expect(
    unsafe_code,
    reason = "a signal handler that mends mappings has no safe interface"
)]

use std::io;
use std::ops::Range;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Mappings that every session may have whatever others do: four regions of memory and four that replace them, the log, the record of
/// requests in flight and what replaces these, and as many again.
const OWN_MAPPINGS: usize = 16;

/// Mappings beyond those, of all sessions together: hot-plugged memory. A front end may have [`crate::memory::MAX_REGIONS`].
const SHARED_MAPPINGS: usize = 1 << 14;

/// Mappings at once: the own ones of 1024 sessions, and the shared ones. With those of [`MAX_RUNS`] they are fewer than a process can have.
const MAX_MAPPINGS: usize = 1024 * OWN_MAPPINGS + SHARED_MAPPINGS;

/// How many runs of pages are replaced before whole mappings are: every run makes two mappings more, of which a process can have 65530,
/// and without which it cannot allocate. A thread stops soon after its first fault, so it takes many threads to get there.
const MAX_RUNS: usize = 8192;

/// The mappings that are watched. All zeros at first, so that slots that are never used take no memory.
static SLOTS: [Slot; MAX_MAPPINGS] = [const { Slot::new() }; MAX_MAPPINGS];

/// Where the slots end that have ever been used: the handler looks at no others.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Which slots are free; not for the handler.
static FREE: Mutex<Free> = Mutex::new(Free::all());

/// Runs of pages that were replaced in mappings that are still watched.
static RUNS: AtomicUsize = AtomicUsize::new(0);

/// Rung when something was replaced, or may have to be.
static BELL: OnceLock<EventFd> = OnceLock::new();

/// What became of the memory of one front end's session. Whoever has a mapping of it has the account.
#[derive(Debug, Clone, Default)]
pub(crate) struct Account(Arc<Marks>);

#[derive(Debug, Default)]
struct Marks {
    /// Something was replaced (F1).
    is_lost: AtomicBool,
    /// Something was, or may have to be, and nobody looked since.
    is_suspected: AtomicBool,
    /// How many mappings are watched; changes with [`FREE`].
    mappings: AtomicUsize,
}

/// Slots that can be taken.
struct Free {
    given_back: Vec<usize>,
    /// From here on none has ever been taken.
    fresh: usize,
    /// How many of [`SHARED_MAPPINGS`] are taken.
    shared: usize,
}

/// Why a mapping cannot be watched.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TooMany {
    /// The session has its own, and others have the shared ones.
    #[error(
        "the front end has {mappings} mappings, and all {SHARED_MAPPINGS} that a daemon has beyond the first {OWN_MAPPINGS} of each front end \
         are in use; share less memory regions, or serve fewer disks"
    )]
    Shared { mappings: usize },
    /// There are more sessions than ever.
    #[error("all {MAX_MAPPINGS} mappings that a daemon can watch are in use; serve fewer disks")]
    All,
}

/// A mapping. `version` is odd while the others change, so that the handler never sees parts of two.
struct Slot {
    version: AtomicU64,
    /// Whose it is.
    marks: AtomicPtr<Marks>,
    start: AtomicUsize,
    end: AtomicUsize,
    /// What the mapping can be cut into: a page, or a huge one.
    page: AtomicUsize,
    /// Runs of pages that were replaced.
    runs: AtomicUsize,
    /// Where the last run would go on.
    next: AtomicUsize,
}

/// A mapping of a file that somebody else may cut; dropped before the mapping is.
#[derive(Debug)]
pub(crate) struct Watch {
    index: usize,
    account: Account,
}

impl Account {
    /// Whether zeros may have taken the place of something (F1).
    pub(crate) fn is_lost(&self) -> bool {
        // What was read before stays before.
        fence(Ordering::Acquire);
        self.0.is_lost.load(Ordering::SeqCst)
    }

    /// The kernel could not move data from or to this memory: the bell rings.
    pub(crate) fn suspect(&self) {
        self.0.suspect();
    }

    /// Whether there is a reason to look at the memory since this was last asked.
    pub(crate) fn take_suspicion(&self) -> bool {
        self.0.is_suspected.swap(false, Ordering::SeqCst)
    }
}

impl Marks {
    fn suspect(&self) {
        // Whoever hears the bell finds it.
        self.is_suspected.store(true, Ordering::SeqCst);
        if let Some(bell) = BELL.get() {
            // Full is as good as written to.
            let _ = bell.write(1);
        }
    }
}

impl Watch {
    /// Watches over a mapping of pages of this size.
    pub(crate) fn over(
        mapping: Range<usize>,
        page: usize,
        account: &Account,
    ) -> Result<Self, TooMany> {
        let index = {
            let mut free = Free::lock();
            let index = free.take(&account.0.mappings)?;
            USED.store(free.fresh, Ordering::Release);
            index
        };
        let account = account.clone();
        SLOTS[index].set(&mapping, page, Arc::as_ptr(&account.0));
        Ok(Self { index, account })
    }

    /// The account of the session that the mapping belongs to.
    pub(crate) fn account(&self) -> &Account {
        &self.account
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        SLOTS[self.index].set(&(0..0), 0, ptr::null());
        Free::lock().give_back(self.index, &self.account.0.mappings);
    }
}

impl Free {
    const fn all() -> Self {
        Self {
            given_back: Vec::new(),
            fresh: 0,
            shared: 0,
        }
    }

    fn lock() -> MutexGuard<'static, Self> {
        FREE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for a session that has so many `mappings`.
    fn take(&mut self, mappings: &AtomicUsize) -> Result<usize, TooMany> {
        let had = mappings.load(Ordering::Relaxed);
        let is_shared = had >= OWN_MAPPINGS;
        if is_shared && self.shared >= SHARED_MAPPINGS {
            return Err(TooMany::Shared { mappings: had });
        }
        let index = match self.given_back.pop() {
            Some(again) => again,
            None if self.fresh < MAX_MAPPINGS => {
                self.fresh += 1;
                self.fresh - 1
            }
            None => return Err(TooMany::All),
        };
        self.shared += usize::from(is_shared);
        mappings.store(had + 1, Ordering::Relaxed);
        Ok(index)
    }

    fn give_back(&mut self, index: usize, mappings: &AtomicUsize) {
        let has = mappings.fetch_sub(1, Ordering::Relaxed) - 1;
        self.shared -= usize::from(has >= OWN_MAPPINGS);
        self.given_back.push(index);
    }
}

impl Slot {
    const fn new() -> Self {
        Self {
            version: AtomicU64::new(0),
            marks: AtomicPtr::new(ptr::null_mut()),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            runs: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
        }
    }

    /// Only whoever has taken the slot does this.
    fn set(&self, mapping: &Range<usize>, page: usize, marks: *const Marks) {
        self.version.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.marks.store(marks.cast_mut(), Ordering::Relaxed);
        self.start.store(mapping.start, Ordering::Relaxed);
        self.end.store(mapping.end, Ordering::Relaxed);
        self.page.store(page, Ordering::Relaxed);
        RUNS.fetch_sub(self.runs.swap(0, Ordering::Relaxed), Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The mapping, its page size and whose it is. One that changes is none that anybody touches.
    fn mapping(&self) -> Option<(Range<usize>, usize, *const Marks)> {
        let version = self.version.load(Ordering::Acquire);
        let marks = self.marks.load(Ordering::Relaxed).cast_const();
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        let page = self.page.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let same = self.version.load(Ordering::Relaxed) == version;
        (same && version.is_multiple_of(2)).then_some((start..end, page, marks))
    }

    /// What to replace because of a fault at `address`: the page, or everything if there were too many.
    fn part(&self, mapping: &Range<usize>, page: usize, address: usize) -> Range<usize> {
        let from_start = address - mapping.start;
        let start = address - from_start % page;
        let end = mapping.end.min(start.saturating_add(page));
        if self.next.swap(end, Ordering::Relaxed) == start {
            return start..end;
        }
        self.runs.fetch_add(1, Ordering::Relaxed);
        if RUNS.fetch_add(1, Ordering::Relaxed) < MAX_RUNS {
            start..end
        } else {
            mapping.clone()
        }
    }
}

/// Catches faults from now on; what becomes readable when there was one.
pub(crate) fn catch() -> io::Result<&'static EventFd> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let bell = EventFd::from_flags(flags)?;
    let bell = BELL.get_or_init(|| bell);
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
    set_action(handler as libc::sighandler_t, libc::SA_SIGINFO)?;
    Ok(bell)
}

fn set_action(handler: libc::sighandler_t, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: all zeros is a value of this plain structure: no flags, no signals blocked.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: `action` is initialized, and `on_fault` has the signature that SA_SIGINFO asks for.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The handler. What it calls is signal-safe: atomics, mmap, write, sigaction, raise.
extern "C" fn on_fault(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // The code that was interrupted may be about to look at it.
    let errno = Errno::last_raw();
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid structure.
    let info = unsafe { &*info };
    // Not positive: sent by somebody.
    let is_fault = info.si_code > 0;
    // SAFETY: the address is there whenever the kernel reports a fault, and is not looked at otherwise.
    let address = unsafe { info.si_addr() } as usize;
    if !(is_fault && mend(address)) {
        // Back to where it came from, and there again into what happens without a handler.
        let _ = set_action(libc::SIG_DFL, 0);
        if !is_fault {
            // SAFETY: no memory is involved.
            unsafe { libc::raise(signal) };
        }
    }
    Errno::set_raw(errno);
}

/// Puts zeros where the memory at `address` was; false if that is not memory of a front end's.
fn mend(address: usize) -> bool {
    let used = USED.load(Ordering::Acquire);
    let found = SLOTS.iter().take(used).find_map(|slot| {
        let (mapping, page, marks) = slot.mapping()?;
        let is_here = mapping.contains(&address);
        is_here.then_some((slot, mapping, page, marks))
    });
    let Some((slot, mapping, page, marks)) = found else {
        return false;
    };
    // SAFETY: the faulting thread uses the mapping, so its `Watch` is there, and the account that this has.
    let marks = unsafe { &*marks };
    marks.is_lost.store(true, Ordering::SeqCst); // F1
    let part = slot.part(&mapping, page, address);
    let mended = replace(&part) || replace(&mapping);
    marks.suspect();
    mended
}

/// Maps zeros over a part of a mapping that is watched.
fn replace(part: &Range<usize>) -> bool {
    let (at, len) = (part.start as *mut libc::c_void, part.len());
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    const NO_FILE: RawFd = -1;
    // SAFETY: the part lies in a mapping of shared memory that the faulting thread uses, so nobody unmaps it meanwhile
    // (`Watch` goes first); its contents are the front end's to change at any time, also to zeros.
    let mapped = unsafe { libc::mmap(at, len, protection, flags, NO_FILE, 0) };
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    #[test]
    fn a_fault_outside_of_what_is_watched_is_not_mended() {
        let place = 0;
        assert!(!mend(&raw const place as usize));
        assert!(!mend(0));
    }

    #[test]
    fn pages_are_replaced_one_by_one_until_that_would_be_too_many_mappings() {
        let slot = Slot::new();
        let mapping = 0x1000_0000..0x3000_0000;
        slot.set(&mapping, PAGE, ptr::null());
        let expected = (mapping.clone(), PAGE, ptr::null());
        assert_eq!(slot.mapping(), Some(expected));
        let part = |address| slot.part(&mapping, PAGE, address);
        // A sweep is one run, however long.
        for nth in 0..2 * MAX_RUNS {
            let page = mapping.start + nth * PAGE;
            assert_eq!(part(page + 7), page..page + PAGE);
        }
        for nth in 1..MAX_RUNS {
            let page = mapping.start + 2 * nth * PAGE;
            assert_eq!(part(page + PAGE - 1), page..page + PAGE);
        }
        assert_eq!(part(0x2fff_f000), mapping);
        // Whoever takes the slot next begins anew.
        slot.set(&mapping, PAGE, ptr::null());
        assert_eq!(part(0x2fff_f000), 0x2fff_f000..mapping.end);
        slot.set(&(0..0), 0, ptr::null());
    }

    #[test]
    fn huge_pages_are_replaced_whole() {
        const HUGE: usize = 2 << 20;
        let slot = Slot::new();
        let mapping = 3 * HUGE..5 * HUGE;
        assert_eq!(slot.part(&mapping, HUGE, 3 * HUGE + 5), 3 * HUGE..4 * HUGE);
        assert_eq!(slot.part(&mapping, HUGE, 5 * HUGE - 1), 4 * HUGE..5 * HUGE);
        slot.set(&(0..0), 0, ptr::null());
    }

    #[test]
    fn a_slot_that_changes_is_no_mapping() {
        let slot = Slot::new();
        slot.set(&(PAGE..2 * PAGE), PAGE, ptr::null());
        slot.version.fetch_add(1, Ordering::Relaxed);
        assert_eq!(slot.mapping(), None);
    }

    #[test]
    fn slots_are_taken_once_and_given_back() {
        // No address of any mapping.
        let place = usize::MAX - PAGE..usize::MAX;
        let account = Account::default();
        let watch = Watch::over(place.clone(), PAGE, &account).unwrap();
        let other = Watch::over(place.clone(), PAGE, &account).unwrap();
        assert_ne!(watch.index, other.index);
        let index = watch.index;
        drop(watch);
        let is_there = |slot: &Slot| slot.mapping().is_some_and(|(mapping, ..)| mapping == place);
        assert!(!is_there(&SLOTS[index]));
        assert!(is_there(&SLOTS[other.index]));
    }

    #[test]
    fn a_session_that_takes_all_that_is_shared_leaves_every_other_its_own() {
        let mut free = Free::all();
        let (greedy, full) = (AtomicUsize::new(0), OWN_MAPPINGS + SHARED_MAPPINGS);
        let all: Vec<_> = std::iter::from_fn(|| free.take(&greedy).ok()).collect();
        assert!(all.iter().copied().eq(0..full));
        let refused = free.take(&greedy).unwrap_err();
        assert_eq!(refused, TooMany::Shared { mappings: full });
        let said = "the front end has 16400 mappings, and all 16384 that a daemon has beyond the first 16 of each front end";
        assert!(refused.to_string().starts_with(said), "{refused}");

        let own = |free: &mut Free| {
            let session = AtomicUsize::new(0);
            let taken: Vec<_> = std::iter::from_fn(|| free.take(&session).ok()).collect();
            (session, taken)
        };
        let others: Vec<_> = (1..1024).map(|_| own(&mut free)).collect();
        assert!(others.iter().all(|(_, taken)| taken.len() == OWN_MAPPINGS));
        let one_more = AtomicUsize::new(0);
        assert_eq!(free.take(&one_more), Err(TooMany::All));

        // Whose it was does not matter for the slot, only for what is shared.
        let (other, taken) = &others[0];
        free.give_back(taken[3], other);
        assert!(free.take(&greedy).is_err());
        assert_eq!(free.take(other), Ok(taken[3]));
        free.give_back(7, &greedy);
        assert_eq!(free.take(other), Ok(7));
        assert!(free.take(&greedy).is_err() && free.take(other).is_err());
        free.give_back(7, other);
        assert_eq!(free.take(&greedy), Ok(7));
    }

    #[test]
    fn a_suspicion_is_one_account_s_and_taken_once() {
        let (account, other) = (Account::default(), Account::default());
        account.clone().suspect();
        assert!(!other.take_suspicion());
        assert!(account.take_suspicion());
        assert!(!account.take_suspicion());
        assert!(!account.is_lost());
    }
}
