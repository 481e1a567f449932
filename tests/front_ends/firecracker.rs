//! Firecracker's messages in Firecracker's order.
//!
//! `PUT /drives` connects, negotiates and reads the configuration space; the rest comes when the guest's driver activates the
//! device. The same PUT again makes a new connection. One queue of 256, no MQ; FLUSH only with `cache_type` Writeback. There
//! is no REPLY_ACK, so nothing but a reset connection tells of a refused message.
//!
//! Source: Firecracker `src/vmm/src/devices/virtio/vhost_user.rs` and `block/vhost_user/device.rs`.

use std::path::Path;

use vdi_tests::counts::{FrontEnd, crate_version, tell};
use vdi_tests::driver::{Config, feature};
use vdi_tests::guest::{create_image, expect_clean, stop};
use vdi_tests::image::MIB;
use vdi_tests::random::Random;
use vdi_tests::server::Launch;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::played::{Guest, config, connect};

const QUEUE_SIZE: u16 = 256;

/// A drive that was PUT and not activated yet.
struct Drive {
    front_end: Frontend,
    features: u64,
    config: Config,
}

fn put(socket: &Path, cache_type: &str) -> Drive {
    let mut front_end = connect(socket, 1);
    front_end.set_owner().unwrap();
    let mut wanted =
        feature::VERSION_1 | feature::EVENT_IDX | feature::RO | feature::PROTOCOL_FEATURES;
    if cache_type == "Writeback" {
        wanted |= feature::FLUSH;
    }
    let features = front_end.get_features().unwrap() & wanted;
    assert_eq!(
        features,
        wanted & !feature::RO,
        "all but read-only is offered"
    );
    let offered = front_end.get_protocol_features().unwrap();
    let protocol = offered & VhostUserProtocolFeatures::CONFIG;
    front_end.set_protocol_features(protocol).unwrap();
    let config = Config::from_bytes(&config(&mut front_end, 0));
    Drive {
        front_end,
        features,
        config,
    }
}

fn activate(drive: &mut Drive) -> Guest {
    let guest = Guest::new(1, QUEUE_SIZE, drive.features);
    let front_end = &mut drive.front_end;
    front_end.set_features(drive.features).unwrap();
    front_end.set_mem_table(&guest.memory.messages()).unwrap();
    let ring = guest.queues[0].attachment();
    front_end.set_vring_num(0, QUEUE_SIZE).unwrap();
    front_end.set_vring_addr(0, &ring.addresses).unwrap();
    front_end.set_vring_base(0, ring.available_index()).unwrap();
    front_end.set_vring_call(0, &ring.call).unwrap();
    front_end.set_vring_kick(0, &ring.kick).unwrap();
    front_end.set_vring_enable(0, true).unwrap();
    guest
}

#[test]
fn a_drive_is_put_put_again_and_used_whatever_its_cache_type() {
    let image = create_image(64 * MIB);
    let daemon = Launch::image(image.path()).start();
    let mut random = Random::printed();
    let mut verified = 0;
    let mut last = Vec::new();
    for cache_type in ["Unsafe", "Writeback"] {
        let first = put(daemon.socket(), cache_type);
        assert_eq!(first.config.capacity_sectors, 64 * MIB / 512);
        // The old connection goes when the new drive takes its place, so this one waits for its answers.
        drop(first);
        let mut drive = put(daemon.socket(), cache_type);
        assert_eq!(drive.config.capacity_sectors, 64 * MIB / 512);
        let mut guest = activate(&mut drive);
        if !last.is_empty() {
            let read = guest.queues[0].read(4096, 65536);
            assert!(read == last, "data of the guest before are gone");
        }
        verified += guest.write_and_verify(&mut random);
        last = random.bytes(65536);
        guest.queues[0].write(4096, &last);
        if cache_type == "Writeback" {
            guest.queues[0].flush();
        }
    }
    stop(daemon);
    expect_clean(&image);
    tell(&format!(
        "Firecracker played: {verified} bytes written and verified"
    ));
    let row = FrontEnd {
        name: "Firecracker, played",
        version: &format!("vhost {}", crate_version("vhost")),
        features: &format!(
            "1 queue of {QUEUE_SIZE}, CONFIG alone, `cache_type` Unsafe and Writeback"
        ),
        verified: "PUT, PUT again, activation, the next microVM",
    };
    row.tell();
}
