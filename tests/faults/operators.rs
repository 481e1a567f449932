//! An operator's commands while the storage fails.

use nix::errno::Errno;
use serde_json::json;
use vdi_core::{CreateOptions, NewKind, create};
use vdi_tests::driver::{Layout, Request};
use vdi_tests::image::MIB;
use vdi_tests::operator::Desk;
use vdi_tests::recorded::{Kind, Recorded, Rule};
use vdi_tests::tool::vdi;
use vdi_tests::words;

fn disk(files: &Recorded) -> Desk {
    let options = CreateOptions {
        capacity_bytes: 8 * MIB,
        block_size: 1 << 20,
        kind: NewKind::Dynamic,
        uuid: None,
    };
    create(&files.path("d.vdi"), &options).unwrap();
    Desk::open(files.directory(), &["d"])
}

/// Names that cannot be made durable: the image has the name that it had, and no other.
#[test]
fn a_snapshot_whose_names_cannot_be_synced_leaves_what_was_there() {
    for after in 0..2 {
        let files = Recorded::mount();
        let desk = disk(&files);
        let mut driver = desk.driver("d");
        driver.write(0, &[1; 512]);
        let to = files.path("d-0.vdi");
        let command = json!({"disk": "d", "to": to});
        let rule = files.add(
            Rule::fail(Kind::SyncNames, Errno::EIO)
                .after(after)
                .times(1),
        );
        assert_eq!(desk.ask("snapshot", &command), Err("not-possible".into()));
        assert_eq!(files.lift(rule), 1);
        driver.write(1, &[2; 512]);
        assert_eq!(driver.read(0, 1024), [[1; 512], [2; 512]].concat());
        if after == 1 {
            assert!(!to.exists());
        }
        // It can be done again, and then holds all of it.
        desk.ask("snapshot", &command).unwrap();
        drop(driver);
        assert_eq!(desk.server.terminate().code, Some(0));
        vdi(words!["check", to]).expect_code(0);
        let raw = files.directory().join("raw");
        vdi(words!["convert", "-O", "raw", to, raw]).expect_code(0);
        assert_eq!(
            std::fs::read(raw).unwrap()[..1024],
            [[1; 512], [2; 512]].concat()
        );
    }
}

/// One read fails, each one in turn. The guest waits at worst, until the operator has had it tried again.
#[test]
fn a_snapshot_during_which_a_read_fails_is_made_or_not_and_the_disk_comes_back() {
    let files = Recorded::mount();
    let desk = disk(&files);
    let mut driver = desk.driver("d");
    driver.write(0, &[1; 512]);
    let (mut broken, mut whole) = (0, 0);
    for nth in 0..100 {
        let rule = Rule::fail(Kind::Read, Errno::EIO).after(nth).times(1);
        let rule = files.add(rule);
        let command = json!({"disk": "d", "to": files.path(&format!("d-{nth}.vdi"))});
        let answer = desk.ask("snapshot", &command);
        if files.lift(rule) == 0 {
            answer.unwrap();
            break;
        }
        let write = Request::write(nth, vec![9; 512]);
        let token = driver.queue().submit(&write, &Layout::framed());
        if answer == Err("broken".to_owned()) {
            broken += 1;
            let size = json!({"disk": "d", "size_bytes": 8 * MIB});
            desk.ask("resize", &size).unwrap();
        } else {
            whole += 1;
        }
        let _nothing = driver.queue().wait(token).expect_ok();
        assert_eq!(driver.read(nth, 512), [9; 512]);
    }
    assert!(broken > 0 && whole > 0, "{broken} and {whole}");
    drop(driver);
    assert_eq!(desk.server.terminate().code, Some(0));
}
