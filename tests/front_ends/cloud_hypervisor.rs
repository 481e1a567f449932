//! Cloud Hypervisor's messages in Cloud Hypervisor's order.
//!
//! It negotiates and reads the configuration space when the disk is added: at offset 0, and old releases at 0x100. The guest's
//! driver activates the device: memory table, all ring sizes, the region of requests in flight, then ring by ring, where a
//! ring begins at its available index, after a reconnect too. A pause disables the rings. A snapshot takes the rings' bases and
//! the device's state; who restores it loads the state first.
//!
//! Source: Cloud Hypervisor `virtio-devices/src/vhost_user/vu_common_ctrl.rs` and `blk.rs`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use vdi_tests::counts::{FrontEnd, crate_version, tell as count};
use vdi_tests::driver::{Config, Layout, PATIENCE, Request, feature};
use vdi_tests::guest::{create_image, expect_clean, stop};
use vdi_tests::image::{Image, MIB};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserProtocolFeatures as Protocol,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::played::{Guest, config, connect};

const QUEUE_SIZE: u16 = 128;
const QUEUES: usize = 4;

/// A disk that was added, and what is kept of it while its back end is gone.
struct Disk {
    front_end: Frontend,
    features: u64,
    protocol: Protocol,
    inflight: Option<(VhostUserInflight, File)>,
}

impl Disk {
    /// Connects and negotiates; the configuration is read at `config_offset`.
    fn add(socket: &Path, config_offset: u32) -> Self {
        let mut front_end = connect(socket, QUEUES as u64);
        front_end.set_owner().unwrap();
        let wanted = feature::USUAL | feature::LOG_ALL;
        let features = front_end.get_features().unwrap() & wanted;
        let wanted = Protocol::CONFIG
            | Protocol::MQ
            | Protocol::CONFIGURE_MEM_SLOTS
            | Protocol::REPLY_ACK
            | Protocol::INFLIGHT_SHMFD
            | Protocol::LOG_SHMFD
            | Protocol::DEVICE_STATE;
        let protocol = front_end.get_protocol_features().unwrap() & wanted;
        assert_eq!(
            protocol, wanted,
            "all that Cloud Hypervisor uses is offered"
        );
        front_end.set_protocol_features(protocol).unwrap();
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        assert!(front_end.get_queue_num().unwrap() >= QUEUES as u64);
        let config = Config::from_bytes(&config(&mut front_end, config_offset));
        assert_eq!(config.capacity_sectors, 64 * MIB / 512);
        Self {
            front_end,
            features: features & !feature::LOG_ALL,
            protocol,
            inflight: None,
        }
    }

    /// Connects to the next back end after the first has gone.
    fn reconnect(&mut self, socket: &Path, guest: &Guest) {
        self.front_end = connect(socket, QUEUES as u64);
        self.front_end.set_owner().unwrap();
        let _offered = self.front_end.get_features().unwrap();
        self.front_end.set_protocol_features(self.protocol).unwrap();
        self.front_end
            .set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.activate(guest);
    }

    fn activate(&mut self, guest: &Guest) {
        let front_end = &mut self.front_end;
        front_end.set_features(self.features).unwrap();
        front_end.set_mem_table(&guest.memory.messages()).unwrap();
        for index in 0..guest.queues.len() {
            front_end.set_vring_num(index, QUEUE_SIZE).unwrap();
        }
        let (message, file) = self.inflight.get_or_insert_with(|| {
            let queues = u16::try_from(guest.queues.len()).unwrap();
            let wanted = VhostUserInflight::new(0, 0, queues, QUEUE_SIZE);
            front_end.get_inflight_fd(&wanted).unwrap()
        });
        front_end
            .set_inflight_fd(message, file.as_raw_fd())
            .unwrap();
        for (index, queue) in guest.queues.iter().enumerate() {
            let ring = queue.attachment();
            front_end.set_vring_addr(index, &ring.addresses).unwrap();
            front_end
                .set_vring_base(index, ring.available_index())
                .unwrap();
            front_end.set_vring_call(index, &ring.call).unwrap();
            front_end.set_vring_kick(index, &ring.kick).unwrap();
        }
        self.enable(guest, true);
    }

    fn enable(&mut self, guest: &Guest, enable: bool) {
        for index in 0..guest.queues.len() {
            self.front_end.set_vring_enable(index, enable).unwrap();
        }
    }

    /// The state as a snapshot keeps it.
    fn save(&mut self, guest: &Guest) -> Vec<u8> {
        for index in 0..guest.queues.len() {
            let base = self.front_end.get_vring_base(index).unwrap();
            assert_eq!(
                base,
                u32::from(guest.queues[index].used_index()),
                "all is answered"
            );
        }
        let (reader, writer) = pipe();
        self.move_state(VhostTransferStateDirection::SAVE, writer);
        let mut state = Vec::new();
        File::from(reader).read_to_end(&mut state).unwrap();
        self.front_end.check_device_state().unwrap();
        state
    }

    /// Loads a state; whether the device took it.
    fn load(&mut self, state: &[u8]) -> bool {
        let (reader, writer) = pipe();
        self.move_state(VhostTransferStateDirection::LOAD, reader);
        File::from(writer).write_all(state).unwrap();
        self.front_end.check_device_state().is_ok()
    }

    fn move_state(&mut self, direction: VhostTransferStateDirection, end: OwnedFd) {
        let phase = VhostTransferStatePhase::STOPPED;
        let other = self.front_end.set_device_state_fd(direction, phase, end);
        assert!(
            other.unwrap().is_none(),
            "the device uses the pipe that it got"
        );
    }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe().unwrap()
}

fn serve(image: &Image, socket: &Path) -> Server {
    Launch::image_at(image.path(), socket).start()
}

#[test]
fn a_disk_is_added_paused_resumed_and_attached_again_with_requests_in_flight() {
    let image = create_image(64 * MIB);
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("socket");
    let mut daemon = serve(&image, &socket);
    let mut random = Random::printed();
    let mut verified = 0;
    let mut recovered = 0;
    for config_offset in [0, 0x100] {
        let mut disk = Disk::add(&socket, config_offset);
        let mut guest = Guest::new(QUEUES, QUEUE_SIZE, disk.features);
        disk.activate(&guest);
        verified += guest.write_and_verify(&mut random);

        disk.enable(&guest, false);
        let waiting = guest.expect_silence(64 * 1024);
        disk.enable(&guest, true);
        for (queue, token) in guest.queues.iter_mut().zip(waiting) {
            let _none = queue.wait(token).expect_ok();
        }
        verified += guest.write_and_verify(&mut random);

        for _ in 0..3 {
            let sector = 80 * 1024;
            let data = random.bytes(QUEUES * 4096);
            let submit = |(queue, data): (&mut vdi_tests::driver::Queue, &[u8])| {
                let at = sector + 8 * queue.index() as u64;
                queue.submit(&Request::write(at, data.to_vec()), &Layout::framed())
            };
            let pairs = guest.queues.iter_mut().zip(data.chunks(4096));
            let tokens: Vec<_> = pairs.map(submit).collect();
            assert_eq!(daemon.kill().signal, Some(9));
            daemon = serve(&image, &socket);
            disk.reconnect(&socket, &guest);
            for (queue, token) in guest.queues.iter_mut().zip(tokens) {
                let answer = queue.wait_within(token, PATIENCE).unwrap();
                let _none = answer.expect_ok();
            }
            assert!(guest.queues[0].read(sector, 4 * 4096) == data);
            recovered += QUEUES;
        }
        verified += guest.write_and_verify(&mut random);
    }
    stop(daemon);
    expect_clean(&image);
    count(&format!(
        "Cloud Hypervisor played: {recovered} requests under way at kill -9, {verified} bytes written and verified"
    ));
    tell(
        "its protocol features, configuration at 0 and at 0x100",
        "pause and resume, `kill -9` and reconnect with requests in flight",
    );
}

#[test]
fn a_snapshot_is_taken_and_restored_with_an_empty_state_and_no_other_is_taken_over() {
    let image = create_image(64 * MIB);
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("socket");
    let daemon = serve(&image, &socket);
    let mut disk = Disk::add(&socket, 0);
    let mut guest = Guest::new(QUEUES, QUEUE_SIZE, disk.features);
    disk.activate(&guest);
    let mut random = Random::printed();
    let mut verified = guest.write_and_verify(&mut random);
    disk.enable(&guest, false);
    let state = disk.save(&guest);
    assert!(state.is_empty(), "the state is {state:?}");
    drop(disk);

    let mut disk = Disk::add(&socket, 0);
    assert!(
        !disk.load(b"another device's"),
        "a foreign state was taken over"
    );
    assert!(disk.load(&state));
    disk.activate(&guest);
    verified += guest.write_and_verify(&mut random);
    stop(daemon);
    expect_clean(&image);
    count(&format!(
        "Cloud Hypervisor played: {verified} bytes written and verified around a snapshot"
    ));
    tell("DEVICE_STATE", "snapshot and restore");
}

/// Tells what was verified.
fn tell(features: &str, verified: &str) {
    let row = FrontEnd {
        name: "Cloud Hypervisor, played",
        version: &format!("vhost {}", crate_version("vhost")),
        features: &format!("{QUEUES} queues of {QUEUE_SIZE}, {features}"),
        verified,
    };
    row.tell();
}
