//! The control plane: what a front end's messages do. Runs on one thread; workers are told by acknowledged commands.
//!
//! Our own handler on the `vhost` crate rather than `vhost-user-backend`'s daemon, whose event loop neither drains a
//! queue nor reports its own failures; the ring state is that crate's. Not here: the rings (`rings`), the device's features
//! and configuration (`device`), merges (`merging`).
//!
//! Everything a front end says is checked. An error is answered (if an answer was asked for) and ends the connection: a
//! front end that breaks the protocol cannot be relied on for the rest.
//!
//! Source: vhost-user protocol, "Front-end message types".

mod merging;

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use vdi_core::{Access, Capacity, Disk, WriteError};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::channel::Channel;
use crate::command::Takeover;
use crate::complaints::{About, Complaints};
use crate::config::DiskOptions;
use crate::device::{Device, Serial};
use crate::device_state::{self, Loading, StateError};
use crate::dirty::DirtyLog;
use crate::dump::{ControlDump, ImageDump, Witnesses};
use crate::fault::Account;
use crate::housekeeper::Housekeepers;
use crate::limits::Throttle;
use crate::memory::{self, Memory, MemoryError, Region};
use crate::rings::{Addresses, Lost, RingError, Rings};
use crate::stats::{Stats, Usage};
use crate::tracking::{Tracking, TrackingError};
use crate::turn::merge::MergeError;
use crate::turn::{GrowError, Opened, Purpose, SnapshotError, Turn, TurnError};
use crate::workers::{Served, Workers};

use self::merging::Merging;

/// The device as a front end controls it.
pub(crate) struct Backend {
    device: Arc<Device>,
    turn: Turn,
    housekeepers: Arc<Housekeepers>,
    complaints: Arc<Complaints>,
    stats: Arc<Stats>,
    throttle: Arc<Throttle>,
    rings: Rings,
    /// What is being merged into its parent, if something is.
    merging: Option<Merging>,
    /// What became of what this session's front end shares.
    account: Account,
    /// Where the front end hears of changes, if it wants to.
    channel: Option<Channel>,
    /// Where the front end wants writes to be marked, once VHOST_F_LOG_ALL is accepted.
    log: Option<Arc<DirtyLog>>,
    /// The state that the front end gives the device, until it asks how that went.
    loading: Option<Loading>,
}

/// Why a message is refused. `vhost` sees it as an error of the handler.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("features {features:#x} were accepted, but only {offered:#x} were offered")]
    Features { features: u64, offered: u64 },
    #[error(
        "{len} bytes at {offset} of the configuration space cannot be written, only `writeback`"
    )]
    Config { offset: u32, len: usize },
    #[error("the dirty log covers {covered} bytes of a guest whose memory ends at {needed}")]
    ShortLog { covered: u64, needed: u64 },
    #[error("{what} was not offered")]
    NotOffered { what: &'static str },
    #[error("{}", crate::chain_of(.0))]
    State(#[source] StateError),
    #[error("{}", crate::chain_of(.0))]
    Memory(#[from] MemoryError),
    #[error("{}", crate::chain_of(.0))]
    Ring(#[from] RingError),
    #[error("{}", crate::chain_of(.0))]
    Turn(#[from] TurnError),
    #[error("the image was served for {served:?} and can now be had for {found:?} only")]
    Access { served: Access, found: Access },
    #[error("{}", crate::chain_of(.0))]
    Tracking(#[from] TrackingError),
}

/// Why an operator's command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    /// Another daemon has the image, perhaps.
    #[error("the image cannot be opened: {0}")]
    Open(Error),
    /// The image did not come back.
    #[error(transparent)]
    Turn(#[from] TurnError),
    /// A ring did not stop, or not start again.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The disk is as it was.
    #[error(transparent)]
    Grow(#[from] GrowError),
    /// The same.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The same.
    #[error(transparent)]
    Merge(#[from] MergeError),
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::ReqHandlerError(io::Error::other(refusal))
    }
}

impl From<RingError> for Error {
    fn from(error: RingError) -> Self {
        Refusal::from(error).into()
    }
}

impl From<TrackingError> for Error {
    fn from(error: TrackingError) -> Self {
        Refusal::from(error).into()
    }
}

impl From<MemoryError> for Error {
    fn from(error: MemoryError) -> Self {
        Refusal::from(error).into()
    }
}

impl Backend {
    /// The control plane of a device whose queues are served by `workers`, with an image that is not open yet.
    pub(crate) fn new(
        device: Arc<Device>,
        turn: Turn,
        workers: Workers,
        housekeepers: Arc<Housekeepers>,
        about: &About,
    ) -> Self {
        Self {
            rings: Rings::new(device.num_queues(), workers),
            device,
            turn,
            housekeepers,
            complaints: Arc::new(Complaints::about(about.clone())),
            account: Account::default(),
            stats: Arc::default(),
            throttle: Arc::default(),
            channel: None,
            log: None,
            loading: None,
            merging: None,
        }
    }

    /// Opens the image for the workers, unless it is open.
    fn begin_turn(&mut self) -> Result<()> {
        if self.turn.disk().is_some() {
            return Ok(());
        }
        let opened = self.turn.begin().map_err(Refusal::from)?;
        let (served, found) = (self.device.access(), opened.disk.access());
        if served != found {
            self.turn.end();
            return Err(Refusal::Access { served, found }.into());
        }
        self.serve(opened);
        // Those for which the image did not come back, after a command.
        Ok(self.rings.resume(&self.device)?)
    }

    /// Has the workers serve an image that was opened.
    pub(crate) fn serve(&mut self, opened: Opened) {
        self.turn.keep_house(&self.housekeepers);
        self.device.set_capacity(opened.disk.capacity());
        self.rings.employ(Served {
            disk: opened.disk,
            images: opened.images,
            device: Arc::clone(&self.device),
            complaints: Arc::clone(&self.complaints),
            stats: Arc::clone(&self.stats),
            throttle: Arc::clone(&self.throttle),
        });
    }

    /// Makes the disk larger, while its guest runs: requests wait meanwhile, and the guest is told.
    pub(crate) fn grow(&mut self, to: Capacity) -> std::result::Result<Capacity, ControlError> {
        self.while_suspended(|turn| turn.grow(to))??;
        if let Some(channel) = &self.channel {
            channel.config_changed();
        }
        tracing::info!("the disk has {} bytes now", self.device.capacity().bytes());
        Ok(self.device.capacity())
    }

    /// Freezes the disk as it is at this instant, under the name `to`, while its guest goes on in a child: requests wait
    /// meanwhile, and all that were answered are in the frozen image, durably. The child has blocks like the image's unless it is said.
    pub(crate) fn snapshot(
        &mut self,
        to: &Path,
        block_size: Option<u32>,
    ) -> std::result::Result<(), ControlError> {
        if self.merging.is_some() {
            return Err(SnapshotError::Merging.into());
        }
        self.while_suspended(|turn| turn.snapshot(to, Purpose::Keep { block_size }))??;
        tracing::info!("the disk was frozen as {}", to.display());
        Ok(())
    }

    /// Lets the image go that was opened for a command alone, unless a guest wants it now.
    fn let_go_if(&mut self, was_opened: bool) {
        if was_opened && self.rings.dismiss_if_idle() {
            self.turn.end();
        }
    }

    /// Does something with the image while no request is under way. If the image does not come back, requests wait until
    /// it does: with the next such command, or the next ring that starts.
    fn while_suspended<E>(
        &mut self,
        change: impl FnOnce(
            &mut Turn,
        )
            -> std::result::Result<(Opened, std::result::Result<(), E>), TurnError>,
    ) -> std::result::Result<std::result::Result<(), E>, ControlError> {
        let was_held = self.turn.disk().is_some();
        if !was_held {
            self.begin_turn().map_err(ControlError::Open)?;
        }
        if let Some(disk) = self.turn.disk() {
            // So that little is left to be written while requests wait. A failure is told by whoever writes next.
            let _ = disk.flush();
        }
        self.rings.suspend()?;
        let (opened, changed) = change(&mut self.turn)?;
        self.serve(opened);
        self.rings.resume(&self.device)?;
        self.let_go_if(!was_held);
        Ok(changed)
    }

    /// Takes no more requests until [`Self::resume`]; those that were taken are answered when this returns.
    pub(crate) fn pause(&mut self) -> std::result::Result<(), ControlError> {
        Ok(self.rings.pause()?)
    }

    /// Takes requests again.
    pub(crate) fn resume(&mut self) -> std::result::Result<(), ControlError> {
        Ok(self.rings.unpause()?)
    }

    /// Who can tell how the disk is while this is busy.
    pub(crate) fn witnesses(&self) -> Witnesses {
        self.rings.witnesses()
    }

    /// The control plane in numbers.
    pub(crate) fn dump(&self) -> ControlDump {
        let memory = self.rings.memory();
        let disk = self.turn.disk();
        ControlDump {
            paused: self.is_paused(),
            failed: self.has_failed(),
            failed_requests: self.failed_requests(),
            event_idx: self.device.has_event_idx(),
            write_through: self.device.is_write_through(),
            memory_regions: memory.num_regions(),
            memory_bytes: memory.iter().map(GuestMemoryRegion::len).sum(),
            memory_lost: self.account.is_lost(),
            tracked: self.rings.tracking().is_some(),
            dirty_log: self.log.is_some(),
            rings: self.rings.dump(),
            image: disk.map(|disk| ImageDump::of(disk.images().len(), &disk.inside())),
        }
    }

    /// Whether requests wait because an operator wants them to.
    pub(crate) const fn is_paused(&self) -> bool {
        self.rings.is_paused()
    }

    /// How the disk is served.
    pub(crate) const fn options(&self) -> &DiskOptions {
        self.turn.options()
    }

    /// The size of the disk.
    pub(crate) fn capacity(&self) -> Capacity {
        self.device.capacity()
    }

    /// What the disk did since the daemon was started.
    pub(crate) const fn stats(&self) -> &Arc<Stats> {
        &self.stats
    }

    /// What the disk takes, and how it fares.
    pub(crate) fn usage(&self) -> Usage {
        let taken = self.turn.usage();
        Usage {
            size_bytes: self.capacity().bytes(),
            block_bytes: self.device.block_bytes(),
            allocated_blocks: taken.allocated_blocks.into(),
            released_blocks: taken.released_blocks,
            file_bytes: taken.file_bytes,
            failed_requests: self.failed_requests(),
            failed: self.has_failed(),
        }
    }

    /// What limits it.
    pub(crate) const fn throttle(&self) -> &Arc<Throttle> {
        &self.throttle
    }

    /// How many requests the host failed.
    pub(crate) fn failed_requests(&self) -> u64 {
        self.complaints.failures()
    }

    /// Whether a failure ended all writing (W5).
    pub(crate) fn has_failed(&self) -> bool {
        self.turn.has_failed()
    }

    /// Whether the image is open here.
    pub(crate) fn is_open(&self) -> bool {
        self.turn.disk().is_some()
    }

    /// Where the front end hears of changes (SET_BACKEND_REQ_FD).
    pub(crate) fn set_channel(&mut self, channel: Channel) {
        self.channel = Some(channel);
    }

    /// The open disk.
    pub(crate) fn disk(&self) -> Option<Arc<Disk>> {
        self.turn.disk().map(Arc::clone)
    }

    /// The serial number that the guest sees.
    pub(crate) fn serial(&self) -> &Serial {
        self.device.serial()
    }

    /// Opens the image, unless it is open, for front ends to come.
    pub(crate) fn take_turn(&mut self) -> std::result::Result<(), ControlError> {
        self.begin_turn().map_err(ControlError::Open)
    }

    /// Lets another daemon have the image, when there is no session: it is durable then. Whether it is not exact about count and
    /// length.
    pub(crate) fn let_go(&mut self) -> std::result::Result<bool, RingError> {
        self.rings.reset()?;
        self.rings.dismiss();
        self.abandon_merge();
        self.turn.end();
        Ok(self.turn.is_untidy())
    }

    /// Another daemon changed the image and let go of it, so that count and length are to be made exact at the end.
    pub(crate) fn inherit_changes(&mut self) {
        self.turn.inherit_changes();
    }

    /// Answers what is in flight and closes the image; nothing is served after that.
    pub(crate) fn close(&mut self) -> std::result::Result<(), WriteError> {
        self.abandon_merge();
        // The housekeeper, in the turn, must still be there for requests that wait for room.
        self.rings.disband();
        self.turn.close()
    }

    /// Marks writes if the front end wants it now.
    fn heed_log(&mut self) -> Result<()> {
        let wanted = self.log.clone().filter(|_| self.device.logs_all());
        Ok(self.rings.set_log(wanted)?)
    }

    /// What the front end took back of what it shares, if it is in use.
    pub(crate) fn lost_memory(&self) -> Option<Lost> {
        let is_gone = self.account.is_lost();
        // The bell rings for all disks, and most have nothing to look at.
        if !self.account.take_suspicion() && !is_gone {
            return None;
        }
        self.rings.cut().or(is_gone.then_some(Lost::Gone))
    }

    /// The front end is gone: answers what is in flight, then forgets it.
    pub(crate) fn end_session(&mut self) -> std::result::Result<(), RingError> {
        self.rings.reset()?;
        (self.log, self.loading) = (None, None);
        self.channel = None;
        self.rings.set_memory(Memory::new(), Takeover::WhenIdle)?;
        self.account = Account::default();
        self.device.forget_features();
        Ok(())
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Obsolete; back ends are told to ignore it.
    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.rings.reset()?;
        self.device.forget_features();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let offered = self.device.features();
        self.device
            .ack_features(features)
            .ok_or(Refusal::Features { features, offered })?;
        self.heed_log()?;
        if self.device.rings_start_enabled() {
            self.rings.enable_all()?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let map = |(region, file)| Region::map(region, file, &self.account).map(Arc::new);
        let mapped = regions.iter().zip(files).map(map);
        let mapped = mapped.collect::<std::result::Result<_, MemoryError>>()?;
        let memory = memory::from_regions(mapped)?;
        self.rings.set_memory(memory, Takeover::WhenIdle)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        Ok(self.rings.set_size(index, size)?)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        table: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = Addresses {
            table,
            available,
            used,
        };
        Ok(self.rings.set_addresses(index, addresses)?)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        Ok(self.rings.set_base(index, base)?)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.rings.stop(index)?;
        if self.rings.dismiss_if_idle() {
            self.abandon_merge();
            self.turn.end();
        }
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.begin_turn()?;
        Ok(self.rings.set_kick(index.into(), file, &self.device)?)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        Ok(self.rings.set_call(index.into(), file)?)
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        Ok(self.rings.set_error(index.into(), file)?)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        Ok(self.rings.set_enabled(index, enable)?)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(Device::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = Device::protocol_features().bits();
        if features & !offered != 0 {
            return Err(Refusal::Features { features, offered }.into());
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.device.num_queues()))
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.device.read_config(offset as usize, size as usize))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        let refusal = Refusal::Config {
            offset,
            len: bytes.len(),
        };
        let writeback = self
            .device
            .write_config(offset as usize, bytes)
            .ok_or(refusal)?;
        if let Some(tracking) = self.rings.tracking() {
            tracking.set_writeback(self.device.writeback_choice())?;
        }
        if !writeback
            && let Some(disk) = self.turn.disk()
            && let Err(error) = disk.flush()
        {
            // Later writes fail on their own. A guest can ask for it as often as it likes.
            self.complaints.warn(format_args!(
                "cannot make earlier writes durable: {}",
                crate::chain_of(&error)
            ));
        }
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(memory::MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let region = Region::map(region, file, &self.account)?;
        let memory = memory::with_region(&self.rings.memory(), region)?;
        self.rings.set_memory(memory, Takeover::Now)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = memory::without_region(&self.rings.memory(), region)?;
        Ok(self.rings.set_memory(memory, Takeover::WhenIdle)?)
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        Err(Refusal::NotOffered { what: "a GPU" }.into())
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        Err(Refusal::NotOffered {
            what: "SHARED_OBJECT",
        }
        .into())
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let limits = self.rings.tracking_limits();
        Ok(Tracking::make(
            wanted,
            limits,
            self.device.writeback_choice(),
            &self.account,
        )?)
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> Result<()> {
        let tracking = Tracking::map(region, file, self.rings.tracking_limits(), &self.account)?;
        if let Some(choice) = tracking.writeback()? {
            self.device.recall_writeback(choice);
        }
        tracking.set_writeback(self.device.writeback_choice())?;
        Ok(self.rings.set_tracking(tracking)?)
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        file: File,
    ) -> Result<Option<File>> {
        self.loading = device_state::transfer(direction, file).map_err(Refusal::State)?;
        Ok(None)
    }

    fn check_device_state(&mut self) -> Result<()> {
        let loaded = self.loading.take().map_or(Ok(()), Loading::check);
        Ok(loaded.map_err(Refusal::State)?)
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Refusal::NotOffered { what: "SHMEM" }.into())
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(log, file, &self.account)?;
        let (covered, needed) = (log.covers(), memory::end(&self.rings.memory()));
        if covered < needed {
            return Err(Refusal::ShortLog { covered, needed }.into());
        }
        self.log = Some(Arc::new(log));
        self.heed_log()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::Parser;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::args::Args;
    use crate::crew::{Crew, Staffing};
    use crate::device::{DetectZeroes, Discard, Zeros};
    use crate::engine::EngineChoice;
    use crate::fault;
    use crate::sandbox::Sandbox;
    use crate::turn::Opening;

    const LEN: u64 = 0x2000;

    /// Control planes of disks that are not open, for two front ends.
    pub(crate) fn two_backends() -> [Backend; 2] {
        let sandbox = Sandbox::off();
        let one = Staffing {
            count: 1,
            cpus: None,
        };
        let crew = Crew::start(one, EngineChoice::Sync, &sandbox).unwrap();
        let housekeepers = Housekeepers::start(&sandbox).unwrap();
        let args = Args::try_parse_from(["vdi-vhost", "--blk-file", "none"]).unwrap();
        std::array::from_fn(|_| {
            let zeros = Zeros {
                discard: Discard::Ignore,
                detect: DetectZeroes::Off,
                block_sectors: 2048,
            };
            let capacity = Capacity::from_bytes_rounded_down(1 << 20);
            let serial = Serial::new("tested").unwrap();
            let device = Device::new(capacity, Access::Writable, 1, serial, zeros);
            let disk = DiskOptions::of(&args).unwrap();
            let turn = Turn::waiting(Opening::new(disk, Arc::default()));
            let (workers, housekeepers) = (Workers::new(&crew), Arc::clone(&housekeepers));
            let about = About::default();
            Backend::new(Arc::new(device), turn, workers, housekeepers, &about)
        })
    }

    /// Gives it memory; the file to cut.
    fn share(backend: &mut Backend) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEN).unwrap();
        let region = VhostUserMemoryRegion::new(0, LEN, 0, 0);
        let own = vec![file.try_clone().unwrap()];
        backend.set_mem_table(&[region], own, None).unwrap();
        file
    }

    fn touch(backend: &Backend) {
        let _: u8 = backend.rings.memory().read_obj(GuestAddress(0)).unwrap();
    }

    #[test]
    fn a_front_end_that_cuts_its_memory_ends_its_own_session() {
        fault::catch().unwrap();
        let [mut one, mut other] = two_backends();
        let (file, _other_file) = (share(&mut one), share(&mut other));
        touch(&one);
        assert!(one.lost_memory().is_none() && other.lost_memory().is_none());
        file.set_len(0).unwrap();
        touch(&one);
        assert!(matches!(one.lost_memory(), Some(Lost::Cut { .. })));
        assert!(other.lost_memory().is_none());
        // It stays so, even if its file is whole again.
        file.set_len(LEN).unwrap();
        assert!(matches!(one.lost_memory(), Some(Lost::Gone)));
        one.end_session().unwrap();
        assert!(one.lost_memory().is_none());
        let _file = share(&mut one);
        touch(&one);
        touch(&other);
        assert!(one.lost_memory().is_none() && other.lost_memory().is_none());
        assert!(!memory::is_lost(&one.rings.memory()) && !memory::is_lost(&other.rings.memory()));
    }

    #[test]
    fn a_reset_and_the_end_of_a_session_forget_what_was_negotiated() {
        let [mut device, _other] = two_backends();
        for is_reset in [true, false] {
            let offered = device.get_features().unwrap();
            device.set_features(offered).unwrap();
            assert!(device.device.has_event_idx() && !device.device.is_write_through());
            if is_reset {
                device.reset_device().unwrap();
            } else {
                device.end_session().unwrap();
            }
            assert!(!device.device.has_event_idx() && device.device.is_write_through());
        }
    }

    #[test]
    fn files_are_looked_at_only_for_a_reason() {
        let [mut one, mut other] = two_backends();
        for file in [share(&mut one), share(&mut other)] {
            file.set_len(0).unwrap();
        }
        assert!(one.lost_memory().is_none());
        memory::suspect(&one.rings.memory());
        assert!(other.lost_memory().is_none());
        assert!(matches!(one.lost_memory(), Some(Lost::Cut { .. })));
    }
}
