//! The package is installed.

use std::path::Path;

use super::{code, output, rights, run};

#[test]
#[ignore = "in the guest"]
fn a_it_is_installed_and_starts_nothing() {
    println!("\n{}", run("systemctl --version"));
    run("dpkg --install /job/package.deb");
    assert_eq!(
        run("systemctl list-units --all --plain --no-legend vdi-vhost*"),
        ""
    );
    for unit in [
        "vdi-vhost@.socket",
        "vdi-vhost-control@.socket",
        "vdi-vhost@.service",
    ] {
        assert_ne!(code(&format!("systemctl is-enabled {unit}")), 0, "{unit}");
    }
    let sockets = Path::new(super::SOCKETS);
    assert_eq!(rights(sockets), "755,vdi-vhost,vdi-vhost");
    // Where images go, for whoever makes them before a daemon ever ran.
    assert_eq!(rights(Path::new(super::IMAGES)), "750,vdi-vhost,vdi-vhost");
}

#[test]
#[ignore = "in the guest"]
fn systemd_finds_nothing_wrong_with_the_units() {
    for unit in [
        "vdi-vhost@disk.service",
        "vdi-vhost@disk.socket",
        "vdi-vhost-control@disk.socket",
        "vdi-vhost-fleet@a.service",
    ] {
        let said = output(&format!("systemd-analyze verify --man=no {unit}"));
        assert!(said.status.success(), "{said:?}");
        let said = String::from_utf8(said.stderr).unwrap();
        assert_eq!(said, "", "{unit}");
    }
    // In tenths; 10 is no protection at all.
    for unit in ["vdi-vhost@disk.service", "vdi-vhost-fleet@a.service"] {
        let said = run(&format!(
            "systemd-analyze security --no-pager --threshold=15 {unit}"
        ));
        println!("{}", said.lines().last().unwrap());
    }
}
