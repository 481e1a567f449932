//! The old daemon's side of an upgrade: its disks go over to a new one, or stay.
//!
//! Not here: what is said (`words`), the new one's side (`take_over`).
//!
//! Nothing else changes meanwhile: commands that change disks are refused. A disk that was let go of and is taken back opens its door
//! again at once, and its image too; if somebody has that now, when a front end starts its first ring.

use std::collections::BTreeSet;
use std::io::{self, BufRead, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::words::{self, AnswerError, Done, Offer, OfferedDisk, Released, Step};
use super::{Fleet, FleetError};
use crate::berth::Berth;
use crate::config::DiskTable;
use crate::control::ControlSocket;
use crate::passing;
use crate::rings::RingError;

/// How long the new daemon may take to be ready.
const READY_TIME: Duration = Duration::from_secs(60);

/// How long it may take to open the images. Guests wait meanwhile.
const OPEN_TIME: Duration = Duration::from_secs(10);

/// Why the disks stay.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandOverError {
    #[error("only a daemon that was started with --config hands its disks over")]
    NoFleet,
    #[error(
        "the image of {name} failed, which the next daemon would not know; `remove` the disk first, or restart"
    )]
    Failed { name: String },
    #[error("the new daemon is gone, or was late")]
    Gone(#[source] io::Error),
    #[error("the new daemon cannot be understood")]
    NotUnderstood(#[from] AnswerError),
    #[error("the new daemon said {found:?} when it was to say {expected:?}")]
    OutOfTurn { expected: Step, found: Step },
    #[error("{name} cannot be let go of")]
    Disk {
        name: String,
        #[source]
        source: RingError,
    },
}

/// A disk that is about to leave.
struct Leaving {
    number: u64,
    berth: Arc<Berth>,
    /// Whether its image was open.
    was_open: bool,
}

impl Fleet {
    /// Hands all disks over to the daemon at the other end; if that goes wrong, all is as before. The connection is of no use
    /// afterwards.
    pub(crate) fn hand_over(
        self: &Arc<Self>,
        mut peer: &UnixStream,
        lines: &mut impl BufRead,
        control: &ControlSocket,
    ) -> io::Result<()> {
        // Waits for commands that are under way.
        let _alone = self.changes.write();
        let all = self.leaving();
        let handed = self.offer(&all, peer, control).and_then(|()| {
            hear(peer, lines, Step::Release, READY_TIME)?;
            tracing::info!("a new daemon is ready: {} disks go over to it", all.len());
            let handed = self.let_go(&all, peer, lines);
            if handed.is_err() {
                self.take_back(&all);
            }
            handed
        });
        match handed {
            Ok(()) => {
                all.iter().for_each(|leaving| leaving.berth.disown());
                control.disown();
                if let Some(place) = self.metrics.get().and_then(Weak::upgrade) {
                    place.disown();
                }
                self.is_handed_over.store(true, Ordering::Release);
                // It serves as soon as it hears that; nothing of it may be ours then.
                let told = peer.write_all(words::answer(&Done {})?.as_bytes());
                self.end();
                told
            }
            Err(error) => {
                let desc = crate::chain_of(&error);
                tracing::warn!("the disks stay here: {desc}");
                peer.write_all(words::refusal(desc)?.as_bytes())
            }
        }
    }

    /// Whether the disks are another daemon's now.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.is_handed_over.load(Ordering::Acquire)
    }

    /// All disks; those that nobody uses first, so that the others wait for less.
    fn leaving(&self) -> Vec<Leaving> {
        let disks = self.disks();
        let each = disks.iter().map(|(number, berth)| Leaving {
            number: *number,
            was_open: berth.lock().is_open(),
            berth: Arc::clone(berth),
        });
        let mut all: Vec<_> = each.collect();
        all.sort_by_key(|leaving| leaving.berth.is_connected());
        all
    }

    fn offer(
        &self,
        all: &[Leaving],
        peer: &UnixStream,
        control: &ControlSocket,
    ) -> Result<(), HandOverError> {
        if self.config.file.is_none() {
            return Err(HandOverError::NoFleet);
        }
        if let Some(leaving) = all.iter().find(|leaving| leaving.berth.lock().has_failed()) {
            let name = leaving.berth.name().to_owned();
            return Err(HandOverError::Failed { name });
        }
        peer.set_write_timeout(Some(READY_TIME))
            .map_err(HandOverError::Gone)?;
        let metrics = self.metrics.get().and_then(Weak::upgrade);
        let offer = Offer {
            metrics: metrics.as_ref().map(|place| place.name()),
            control_socket: control.path().map(crate::config::absolute),
            groups: self.groups.list(),
            described_groups: self.said().groups.clone(),
            disks: all.len(),
        };
        let send = || {
            passing::send(peer, &words::answer(&offer)?, control.as_fd())?;
            if let Some(place) = &metrics {
                passing::send(peer, "\n", place.as_fd())?;
            }
            all.iter().try_for_each(|leaving| {
                let Some(listener) = leaving.berth.listener() else {
                    return Ok(());
                };
                let disk = self.describe(leaving);
                passing::send(peer, &words::line(&disk)?, listener)
            })
        };
        send().map_err(HandOverError::Gone)
    }

    fn describe(&self, leaving: &Leaving) -> OfferedDisk {
        let backend = leaving.berth.lock();
        let described = self.described();
        let throttle = leaving.berth.throttle();
        let group = throttle.group();
        let group = group.as_ref().map(|group| group.name());
        OfferedDisk {
            // The serial of the device, which an image that was frozen meanwhile took with it.
            disk: DiskTable::of(backend.options())
                .with_serial(backend.serial())
                .limited(throttle.limits(), group),
            described: described.get(leaving.berth.name()).map(DiskTable::of),
            paused: backend.is_paused(),
            open: leaving.was_open,
        }
    }

    /// Answers what is in flight, disconnects all front ends, lets go of all images and waits until the new daemon has them.
    fn let_go(
        &self,
        all: &[Leaving],
        mut peer: &UnixStream,
        lines: &mut impl BufRead,
    ) -> Result<(), HandOverError> {
        // What is durable now need not be made so while guests wait.
        all.iter().for_each(|leaving| leaving.berth.flush());
        for leaving in all {
            self.close_door(&leaving.berth);
            leaving.berth.begin_to_leave();
        }
        let mut changed = BTreeSet::new();
        for leaving in all {
            let name = leaving.berth.name();
            let was_changed = leaving.berth.let_go();
            let was_changed = was_changed.map_err(|source| HandOverError::Disk {
                name: name.to_owned(),
                source,
            })?;
            if leaving.berth.lock().has_failed() {
                let name = name.to_owned();
                return Err(HandOverError::Failed { name });
            }
            changed.extend(was_changed.then(|| name.to_owned()));
        }
        let released = words::answer(&Released { changed });
        released
            .and_then(|line| peer.write_all(line.as_bytes()))
            .map_err(HandOverError::Gone)?;
        hear(peer, lines, Step::Finish, OPEN_TIME)
    }

    fn take_back(self: &Arc<Self>, all: &[Leaving]) {
        for leaving in all {
            let name = leaving.berth.name();
            if leaving.was_open
                && let Err(error) = leaving.berth.lock().take_turn()
            {
                let error = crate::chain_of(&error);
                tracing::warn!("{name} is opened again when its front end is back: {error}");
            }
            leaving.berth.stay();
            let opened: Result<(), FleetError> = self.open_door(leaving.number, &leaving.berth);
            if let Err(error) = opened {
                let error = crate::chain_of(&error);
                tracing::error!("{name}: front ends cannot connect any more: {error}");
            }
        }
    }
}

/// Waits until the new daemon takes this step.
fn hear(
    peer: &UnixStream,
    lines: &mut impl BufRead,
    expected: Step,
    patience: Duration,
) -> Result<(), HandOverError> {
    let mut line = String::new();
    let heard = peer
        .set_read_timeout(Some(patience))
        .and_then(|()| lines.read_line(&mut line))
        .map_err(HandOverError::Gone)?;
    if heard == 0 {
        let gone = io::ErrorKind::UnexpectedEof.into();
        return Err(HandOverError::Gone(gone));
    }
    match words::step(&line)? {
        found if found == expected => Ok(()),
        found => Err(HandOverError::OutOfTurn { expected, found }),
    }
}
