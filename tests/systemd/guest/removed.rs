//! The package is removed.

use std::path::Path;

use vdi_tests::driver::Options;

use super::{connect, create, output, run};

#[test]
#[ignore = "in the guest"]
fn what_runs_is_stopped_and_nothing_is_left_but_images_and_their_user() {
    let image = create("last");
    run("systemctl enable --now vdi-vhost@last.socket vdi-vhost-control@last.socket");
    run("systemctl enable --now vdi-vhost-fleet@a");
    let mut driver = connect("last", &Options::new());
    driver.write(0, &[1; 4096]);
    run("cp /usr/bin/vdi /job/vdi");
    run("dpkg --purge vdi-vhost");
    drop(driver);
    assert_eq!(
        run("systemctl list-units --all --plain --no-legend vdi-vhost*"),
        ""
    );
    let files = output("systemctl list-unit-files --no-legend vdi-vhost*");
    assert_eq!(String::from_utf8(files.stdout).unwrap(), "");
    let left = run("find / -xdev -name *vdi-vhost* -not -path /proc/*");
    assert_eq!(left, "/var/lib/vdi-vhost\n");
    assert!(!Path::new("/run/vdi-vhost").exists());
    run(&format!("/job/vdi check {}", image.display()));
    run("getent passwd vdi-vhost");
    // It comes back as if nothing had been.
    run("dpkg --install /job/newer.deb");
    run("systemctl start vdi-vhost@last.socket");
    let mut driver = connect("last", &Options::new());
    assert_eq!(driver.read(0, 4096), [1; 4096]);
    drop(driver);
    run("dpkg --purge vdi-vhost");
    run(&format!("/job/vdi check {}", image.display()));
}
