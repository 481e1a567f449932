//! A write into fresh room that is alone, and is done on the worker's own time.
//!
//! Past the page cache a file system that has to find room for a write (ext4) lets a ring hand it to a helper thread of the kernel,
//! and ends it in a third thread: three wake-ups, where a plain call needs one. But whoever comes meanwhile waits for the rest of the
//! call. So it is made only for a small write that is known to be alone at its worker when the turn ends, and where such writes have been
//! over soon (`promptness`). All others go through the ring.
//!
//! Not here: which writes need room (`vdi-core`), whether somebody waits (`worker`).
//!
//! Source: the kernel's `fs/ext4/file.c` (`ext4_dio_write_checks`: -EAGAIN for what is no overwrite) and `fs/iomap/direct-io.c`
//! (`iomap_dio_bio_end_io`: only a call that waits ends its write itself).

use std::time::Duration;

use crate::clock::Moment;
use crate::engine::Engine;
use crate::promptness::Promptness;
use crate::seat::Others;
use crate::transfer::{Finished, Transfer};

/// The write of a seat that may be alone, and how long the last ones took.
#[derive(Debug, Default)]
pub(crate) struct Lone {
    /// Until the end of the turn.
    waiting: Option<Transfer>,
    /// One that the ring has, and since when: it tells how long it would have taken.
    timed: Option<(u64, Moment)>,
    promptness: Promptness,
}

impl Lone {
    /// Keeps a write until the turn ends, or gives all back that are not alone.
    pub(crate) fn keep(&mut self, write: Transfer) -> Option<[Transfer; 2]> {
        match self.waiting.take() {
            Some(other) => Some([other, write]),
            None => {
                self.waiting = Some(write);
                None
            }
        }
    }

    /// Whether there is one.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Starts it. `others` says who would wait for it.
    pub(crate) fn start(&mut self, engine: &mut Engine, others: Others) {
        let Some(write) = self.waiting.take() else {
            return;
        };
        self.timed = Some((write.token(), Moment::now()));
        let inline = others == Others::NoneKnown && self.promptness.expects(write.guest_len());
        engine.start(write, inline);
    }

    /// A transfer of the seat is over.
    pub(crate) fn finished(&mut self, finished: &Finished) {
        if let Some((_, began)) = self.timed.take_if(|timed| timed.0 == finished.token) {
            let nanos = Moment::now().since(began);
            self.promptness.took(Duration::from_nanos(nanos));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::chain::Piece;
    use crate::chain::tests::memory;
    use crate::engine::{EngineChoice, Wait};
    use crate::ring::GuestBuffer;
    use crate::transfer::Operation;

    const SOON: Duration = Duration::from_micros(1);

    fn write(token: u64) -> Transfer {
        let piece = Piece {
            at: vm_memory::GuestAddress(0x1000),
            len: 4096,
        };
        let buffer = GuestBuffer::new(&Arc::new(memory()), &[piece]).unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        Transfer::data(token, Operation::Write, file, 0, buffer, None)
    }

    /// Whether a write is over as soon as it is started; then it is done.
    fn is_inline(lone: &mut Lone, engine: &mut Engine, others: Others) -> bool {
        assert!(lone.keep(write(7)).is_none());
        lone.start(engine, others);
        assert!(!lone.is_waiting());
        let is_inline = engine.in_flight() == 0;
        let finished = loop {
            if let Some(finished) = engine.next_finished() {
                break finished;
            }
            engine.turn(Wait::Forever);
        };
        assert_eq!(finished.token, 7);
        lone.finished(&finished);
        is_inline
    }

    #[test]
    fn only_a_write_that_nobody_waits_for_and_is_expected_to_be_prompt_holds_the_worker_up() {
        let Ok(mut engine) = Engine::new(EngineChoice::IoUring) else {
            eprintln!("this host forbids io_uring: not tested");
            return;
        };
        let mut lone = Lone::default();
        assert!(!is_inline(&mut lone, &mut engine, Others::NoneKnown));
        // What the ring did was timed.
        assert!(lone.timed.is_none());
        (0..2000).for_each(|_| lone.promptness.took(SOON));
        assert!(is_inline(&mut lone, &mut engine, Others::NoneKnown));
        assert!(!is_inline(&mut lone, &mut engine, Others::Wait));
        lone.promptness.took(Duration::from_secs(1));
        assert!(!is_inline(&mut lone, &mut engine, Others::NoneKnown));
    }

    #[test]
    fn of_two_writes_none_is_alone() {
        let mut lone = Lone::default();
        assert!(lone.keep(write(1)).is_none());
        let both = lone.keep(write(2)).unwrap();
        assert_eq!(both.map(|write| write.token()), [1, 2]);
        assert!(!lone.is_waiting());
    }
}
