//! Live migration: a guest under load moves from one QEMU to another and back, and the daemons of both take turns with the
//! image.
//!
//! What the device wrote of the guest's memory shows in two ways: fio verifies all the time what it reads, and a file that
//! is read into the guest's page cache while the guest moves has the right sum afterwards, without being read again.
//!
//! `VDI_TEST_ROUNDS` says how many migrations; `ci/migrations` asks for many.

use std::time::Duration;

use serde_json::json;
use vdi_tests::counts::{self, FrontEnd, qemu_version};
use vdi_tests::guest::{create_image, expect_clean, stop};
use vdi_tests::image::MIB;
use vdi_tests::server::{Launch, Server};

use crate::vm::{Boot, Vm};

/// Blocks that are checked as they are read, for ever, in the second half of the disk.
const LOAD: &str = "fio --name=load --filename=/dev/vda --offset=256m --size=64m --direct=1 --ioengine=libaio --iodepth=8 \
    --rw=randrw --bs=4k --verify=crc32c --verify_fatal=1 --verify_backlog=64 --time_based --runtime=3600 \
    --eta=never >/tmp/fio.out 2>&1 & load=$!";

/// Reads the file once, piece by piece, for longer than the guest takes to move.
const READER: &str = "(n=0; while [ $n -lt 500 ]; do dd if=/mnt/data of=/dev/null bs=100000 count=1 skip=$n; \
    n=$((n + 1)); done) >/dev/null 2>&1 & reader=$!";

const QUEUES: u16 = 2;
const OPTIONS: &str = "config-wce=off";

fn boot<'a>(daemon: &'a Server, incoming: Option<&'a std::path::Path>) -> Boot<'a> {
    Boot {
        cpus: 2,
        disk: Some((daemon, Some(QUEUES), OPTIONS)),
        incoming,
        with_fio: true,
    }
}

/// Moves the guest to a new QEMU on another daemon.
fn migrate(from: &mut Vm, to: &Server, path: &std::path::Path) -> Vm {
    let mut arrived = Vm::boot(&boot(to, Some(path)));
    let uri = format!("unix:{}", path.display());
    let _started = from.qmp("migrate", &json!({ "uri": uri }));
    loop {
        let state = from.qmp("query-migrate", &json!({}));
        match state["status"].as_str() {
            Some("completed") => break,
            Some("failed" | "cancelled") => panic!("{state}"),
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    let _resumed = arrived.event("RESUME");
    arrived
}

#[test]
fn a_guest_under_load_moves_to_and_fro_between_two_daemons() {
    let rounds: usize =
        std::env::var("VDI_TEST_ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
    let image = create_image(512 * MIB);
    let here = Launch::image(image.path()).start();
    let there = Launch::image(image.path()).arg("--incoming").start();
    let place = tempfile::tempdir().unwrap();
    let mut vm = Vm::boot(&boot(&here, None));
    vm.shell("head -c 50000000 /dev/urandom >/tmp/data && mkfs.ext4 -q /dev/vda 200m && mount -t ext4 /dev/vda /mnt");
    let sum = vm.shell("cp /tmp/data /mnt/data && sha256sum </tmp/data && rm /tmp/data && sync");
    vm.shell(LOAD);
    for round in 0..rounds {
        // Empties the page cache, then has the device fill it while the guest moves.
        vm.shell("sync; echo 3 >/proc/sys/vm/drop_caches");
        vm.shell(READER);
        let to = [&there, &here][round % 2];
        let path = place.path().join(format!("migration-{round}"));
        let arrived = migrate(&mut vm, to, &path);
        std::mem::replace(&mut vm, arrived).leave_behind();
        vm.shell("kill $reader; wait $reader; true");
        // From the page cache as far as it is there: what was not marked dirty would be stale here.
        let found = vm.shell("sha256sum </mnt/data");
        assert_eq!(found, sum, "after migration {round}");
        vm.shell("kill -0 $load || { cat /tmp/fio.out; false; }");
    }
    vm.shell(
        "kill -INT $load; wait $load; grep 'err= 0' /tmp/fio.out || { cat /tmp/fio.out; false; }",
    );
    vm.shell("umount /mnt && e2fsck -f -n /dev/vda");
    vm.shell("! dmesg | grep -i -e 'i/o error' -e 'blocked for more than'");
    vm.end();
    for daemon in [here, there] {
        stop(daemon);
    }
    expect_clean(&image);
    counts::tell(&format!(
        "live migration under load: {rounds} migrations between two QEMUs and two daemons, 0 wrong bytes"
    ));
    let row = FrontEnd {
        name: "QEMU, Linux guest",
        version: &qemu_version(),
        features: &format!("`-incoming`, `num-queues={QUEUES},{OPTIONS}`"),
        verified: "live migration to and fro between two QEMUs and two daemons, under fio that verifies",
    };
    row.tell();
}
