//! QEMU with a Linux guest: numbers of queues, cache modes, resets, hot-plug of disks and of memory, pauses under load.
//!
//! Every case writes data whose checksums the test keeps, and in the end QEMU's tools must find them in the image. Boots are
//! slow without KVM, so cases share them.

use serde_json::json;
use vdi_tests::counts::{FrontEnd, qemu_version, tell as count};
use vdi_tests::guest::{create_image, expect_clean, stop};
use vdi_tests::image::{Image, MIB};
use vdi_tests::server::{Launch, Server};

use crate::vm::{Boot, Vm};

/// Bytes of one checked piece of the disk.
const PIECE_MIB: u64 = 4;

/// Waits in the guest until `$1` is true, 10 s at most.
const UNTIL: &str = r#"until_true() { for i in $(seq 600); do if eval "$1"; then return 0; fi; sleep 0.1; done; echo "not true: $1"; return 1; }"#;

/// QEMU's name with its version.
/// Tells what was verified.
fn tell(features: &str, verified: &str) {
    let row = FrontEnd {
        name: "QEMU, Linux guest",
        version: &qemu_version(),
        features,
        verified,
    };
    row.tell();
}

/// What is on the disk: a checksum for each piece that was written.
#[derive(Default)]
struct Written(Vec<(u64, String)>);

impl Written {
    /// Writes random data into a piece past the guest's cache.
    fn write(&mut self, vm: &mut Vm, piece: u64) {
        vm.shell(&format!(
            "dd if=/dev/urandom of=/tmp/data bs=1M count={PIECE_MIB} 2>/dev/null"
        ));
        let place = piece * PIECE_MIB * 16;
        vm.shell(&format!(
            "dd if=/tmp/data of=/dev/vda bs=64k seek={place} oflag=direct conv=notrunc,fsync 2>/dev/null"
        ));
        let sum = vm.shell("sha256sum </tmp/data");
        self.0.retain(|(other, _)| *other != piece);
        self.0.push((piece, sum[..64].to_owned()));
    }

    /// Reads all pieces again in the guest.
    fn verify(&self, vm: &mut Vm) {
        for (piece, expected) in &self.0 {
            let (place, count) = (piece * PIECE_MIB * 16, PIECE_MIB * 16);
            let sum = vm.shell(&format!(
                "dd if=/dev/vda bs=64k skip={place} count={count} iflag=direct 2>/dev/null | sha256sum"
            ));
            assert_eq!(&sum[..64], expected, "piece {piece}");
        }
    }

    /// Ends the daemon, and finds all pieces in the image by QEMU's own reader.
    fn expect_in(&self, daemon: Server, image: &Image) {
        stop(daemon);
        expect_clean(image);
        let contents = vdi_tests::qemu::contents(image.path());
        let len = usize::try_from(PIECE_MIB * MIB).unwrap();
        for (piece, expected) in &self.0 {
            let at = usize::try_from(*piece).unwrap() * len;
            assert_eq!(
                &sha256(&contents[at..at + len]),
                expected,
                "piece {piece} of the image"
            );
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn start(size_mib: u64) -> (Image, Server) {
    let image = create_image(size_mib * MIB);
    let server = Launch::image(image.path()).start();
    (image, server)
}

#[test]
fn one_queue_survives_resets_and_reboots_and_a_changed_cache_mode() {
    const OPTIONS: &str = "packed=off,config-wce=on";
    let (image, daemon) = start(64);
    let mut vm = Vm::boot(&Boot {
        cpus: 2,
        disk: Some((&daemon, Some(1), OPTIONS)),
        incoming: None,
        with_fio: false,
    });
    let mut written = Written::default();
    written.write(&mut vm, 0);
    vm.shell("echo 'write through' >/sys/block/vda/cache_type");
    written.write(&mut vm, 1);
    vm.shell("[ \"$(cat /sys/block/vda/cache_type)\" = 'write through' ]");

    vm.qmp("system_reset", &json!({}));
    vm.rebooted();
    written.verify(&mut vm);
    written.write(&mut vm, 2);

    vm.reboot();
    written.verify(&mut vm);
    written.write(&mut vm, 0);
    written.verify(&mut vm);
    vm.end();
    written.expect_in(daemon, &image);
    tell(
        &format!("`num-queues=1,{OPTIONS}`"),
        "write back and write through chosen by the guest, `system_reset`, reboot",
    );
}

/// Plugs the disk in, and waits until the guest has it.
fn plug(vm: &mut Vm, daemon: &Server, queues: u16) {
    let socket = daemon.socket().to_str().unwrap();
    let address = json!({ "type": "unix", "data": { "path": socket } });
    let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
    vm.qmp("chardev-add", &json!({ "id": "late", "backend": backend }));
    let device = json!({
        "driver": "vhost-user-blk-pci", "id": "disk", "bus": "pcie.1", "chardev": "late", "num-queues": queues,
        "packed": false, "config-wce": false, "disable-legacy": "on",
    });
    vm.qmp("device_add", &device);
    vm.shell("until_true '[ -b /dev/vda ]'");
    let found = vm.shell("ls /sys/block/vda/mq | wc -l");
    assert_eq!(found, queues.to_string(), "queues in the guest");
}

/// Unplugs the disk, and waits until guest and QEMU have let it go.
fn unplug(vm: &mut Vm) {
    vm.qmp("device_del", &json!({ "id": "disk" }));
    loop {
        let event = vm.event("DEVICE_DELETED");
        if event["data"]["device"] == "disk" {
            break;
        }
    }
    vm.shell("until_true '[ ! -e /dev/vda ]'");
    vm.qmp("chardev-remove", &json!({ "id": "late" }));
}

#[test]
fn a_disk_is_plugged_in_and_out_and_memory_comes_and_goes_under_it() {
    const DIMM_MIB: u64 = 256;
    let (image, daemon) = start(64);
    let mut vm = Vm::boot(&Boot {
        cpus: 2,
        disk: None,
        incoming: None,
        with_fio: false,
    });
    vm.shell(UNTIL);
    let mut written = Written::default();
    for queues in [1, 2] {
        plug(&mut vm, &daemon, queues);
        written.verify(&mut vm);
        written.write(&mut vm, queues.into());
        unplug(&mut vm);
    }

    plug(&mut vm, &daemon, 2);
    let before: u64 = vm.shell(MEMORY_KIB).parse().unwrap();
    vm.shell("echo online_movable >/sys/devices/system/memory/auto_online_blocks");
    let size = DIMM_MIB * MIB;
    let backend =
        json!({ "qom-type": "memory-backend-memfd", "id": "more", "size": size, "share": true });
    vm.qmp("object-add", &backend);
    vm.qmp(
        "device_add",
        &json!({ "driver": "pc-dimm", "id": "dimm", "memdev": "more" }),
    );
    let more = before + DIMM_MIB * 1024 / 2;
    vm.shell(&format!("until_true '[ $({MEMORY_KIB}) -gt {more} ]'"));
    // User memory is taken from the movable zone first, which is the new memory: this I/O goes there.
    written.write(&mut vm, 3);
    written.verify(&mut vm);
    vm.qmp("device_del", &json!({ "id": "dimm" }));
    loop {
        let event = vm.event("DEVICE_DELETED");
        if event["data"]["device"] == "dimm" {
            break;
        }
    }
    written.write(&mut vm, 4);
    written.verify(&mut vm);
    unplug(&mut vm);
    vm.end();
    written.expect_in(daemon, &image);
    tell(
        "`num-queues=1` and `2`, `packed=off,config-wce=off`",
        "the disk is plugged in and out, 256 MiB of memory are plugged in and out under it",
    );
}

/// Prints how much memory the guest has.
const MEMORY_KIB: &str = "sed -n \"s/^MemTotal: *\\([0-9]*\\) kB/\\1/p\" /proc/meminfo";

#[test]
fn eight_processors_get_eight_queues_unasked_and_pauses_disturb_no_io() {
    const PAUSES: usize = 12;
    const OPTIONS: &str = "config-wce=off";
    let (image, daemon) = start(96);
    let mut vm = Vm::boot(&Boot {
        cpus: 8,
        disk: Some((&daemon, None, OPTIONS)),
        incoming: None,
        with_fio: false,
    });
    let queues = vm.shell("ls /sys/block/vda/mq | wc -l");
    assert_eq!(queues, "8");
    // Each processor writes and verifies a piece of its own, again and again, through its own queue.
    vm.shell(
        "load() { dd if=/dev/urandom of=/tmp/data$1 bs=64k count=16 2>/dev/null; for i in $(seq 5000); do \
         [ ! -e /tmp/stop ] || return 0; \
         dd if=/tmp/data$1 of=/dev/vda bs=64k seek=$(($1 * 16)) oflag=direct conv=notrunc 2>/dev/null || return 1; \
         dd if=/dev/vda bs=64k skip=$(($1 * 16)) count=16 iflag=direct 2>/dev/null | cmp - /tmp/data$1 || return 2; \
         echo $1 >>/tmp/rounds; done; return 3; }",
    );
    vm.shell("pids=; for n in 0 1 2 3 4 5 6 7; do (load $n) & p=$!; taskset -p $(printf %x $((1 << n))) $p >/dev/null; pids=\"$pids $p\"; done");
    for _ in 0..PAUSES {
        std::thread::sleep(std::time::Duration::from_millis(150));
        vm.qmp("stop", &json!({}));
        vm.event("STOP");
        vm.qmp("cont", &json!({}));
        vm.event("RESUME");
    }
    // On a slow machine some processors may not have come far by now.
    vm.shell(UNTIL);
    vm.shell("until_true '[ $(sort -u /tmp/rounds | wc -l) -eq 8 ]'");
    vm.shell(
        "touch /tmp/stop; for p in $pids; do wait $p || exit_code=$?; done; [ -z \"$exit_code\" ]",
    );
    let rounds: u64 = vm.shell("wc -l </tmp/rounds").parse().unwrap();
    assert!(rounds >= 8, "only {rounds} rounds were done");
    let calls = vm.shell(
        "awk '/virtio.*-req\\./ { calls = 0; for (cpu = 2; cpu < 10; cpu++) calls += $cpu; print calls }' /proc/interrupts",
    );
    let used = calls.lines().filter(|calls| *calls != "0").count();
    assert_eq!(used, 8, "calls of each queue: {calls}");
    let mut written = Written::default();
    written.write(&mut vm, 10);
    written.verify(&mut vm);
    vm.end();
    written.expect_in(daemon, &image);
    count(&format!(
        "pauses of QEMU: {rounds} pieces of 1 MiB written and verified meanwhile on 8 queues"
    ));
    tell(
        &format!("`num-queues` not given, so 8 for 8 processors, `{OPTIONS}`"),
        &format!("{PAUSES} times `stop` and `cont` under load on all queues"),
    );
}
