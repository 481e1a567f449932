//! `clone` by the control socket: a child of a golden image is made and served, or neither.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Barrier;

use serde_json::{Value, json};
use vdi_tests::image::MIB;
use vdi_tests::server::scratch;
use vdi_tests::{qemu, tool, words};

use crate::fleet::Fleet;

/// What is in a directory, with the inodes.
fn names(directory: &Path) -> BTreeSet<(String, u64)> {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    entries
        .map(|entry| {
            let inode = entry.metadata().unwrap().ino();
            (entry.file_name().into_string().unwrap(), inode)
        })
        .collect()
}

impl Fleet {
    fn clone_of_golden(&self, name: &str, image: &str) -> Result<Value, String> {
        let add = json!({"name": name, "image": self.path(image)});
        let of = self.path("golden.vdi");
        self.ask("clone", &json!({"of": of, "add": add}))
    }
}

#[test]
fn a_clone_reads_as_its_parent_and_keeps_its_writes_to_itself() {
    let fleet = Fleet::start("");
    let golden = fs::read(fleet.path("golden.vdi")).unwrap();
    let made = fleet.clone_of_golden("x", "x.vdi").unwrap();
    assert_eq!((&made["name"], &made["open"]), (&json!("x"), &json!(true)));
    assert_eq!(made["size_bytes"], 24 * MIB);
    fleet.clone_of_golden("y", "y.vdi").unwrap();
    let (mut x, mut y) = (fleet.driver("x"), fleet.driver("y"));
    assert_ne!(x.queue().get_id(), y.queue().get_id(), "one serial number");
    x.write(8, &[1; 512]);
    assert_eq!(x.read(8, 1024), [[1; 512], [5; 512]].concat());
    assert_eq!(y.read(8, 1024), [5; 1024]);
    drop((x, y));
    let place = fleet.place;
    assert_eq!(fleet.server.terminate().code, Some(0));
    assert!(fs::read(place.path().join("golden.vdi")).unwrap() == golden);
    for image in ["x.vdi", "y.vdi"] {
        tool::vdi(words!["check", place.path().join(image)]).expect_code(0);
    }
    let hidden = |(name, _): &(String, u64)| name.starts_with('.');
    assert!(!names(place.path()).iter().any(hidden));
}

/// The size of an image's blocks, as its header says.
fn block_size(image: &Path) -> u32 {
    let header = fs::read(image).unwrap();
    u32::from_le_bytes(header[0x178..0x17C].try_into().unwrap())
}

#[test]
fn children_have_blocks_like_their_parents_or_as_it_is_said() {
    let fleet = Fleet::start("");
    let (of, socket) = (fleet.path("golden.vdi"), fleet.path("control"));
    let golden = block_size(&of);
    fleet.clone_of_golden("x", "x.vdi").unwrap();
    assert_eq!(block_size(&fleet.path("x.vdi")), golden);
    let ctl = |rest: &[&std::ffi::OsStr]| {
        let mut all = words!["ctl", "--socket", socket].to_vec();
        all.extend(rest);
        tool::vdi(all)
    };
    let small = fleet.path("small.vdi");
    ctl(&words!["clone", "s", of, small, "--block-size", "256k"]).expect_code(0);
    assert_eq!(block_size(&small), 256 << 10);
    let mut driver = fleet.driver("s");
    driver.write(8, &[1; 512]);
    let frozen = fleet.path("frozen.vdi");
    ctl(&words!["snapshot", "s", frozen, "--block-size", "128k"]).expect_code(0);
    assert_eq!(
        (block_size(&small), block_size(&frozen)),
        (128 << 10, 256 << 10)
    );
    driver.write(10, &[2; 512]);
    let expected = [[5; 512], [1; 512], [5; 512], [2; 512], [5; 512]].concat();
    assert_eq!(driver.read(7, 2560), expected);
    // None that VirtualBox does not open.
    let before = names(fleet.place.path());
    let add = json!({"name": "t", "image": fleet.path("t.vdi")});
    let command = json!({"of": of, "block_size_bytes": 64 << 10, "add": add});
    assert_eq!(fleet.ask("clone", &command), Err("not-possible".to_owned()));
    let to = fleet.path("t.vdi");
    let command = json!({"disk": "s", "to": to, "block_size_bytes": 64 << 10});
    assert_eq!(
        fleet.ask("snapshot", &command),
        Err("not-possible".to_owned())
    );
    assert_eq!(names(fleet.place.path()), before);
    assert_eq!(driver.read(7, 2560), expected);
}

#[test]
fn a_clone_is_as_the_defaults_say_and_a_clone_of_a_clone_finds_all_its_parents() {
    let fleet = Fleet::start(
        r#"
        [defaults]
        limits = { iops_total = 70 }
        "#,
    );
    let made = fleet.clone_of_golden("x", "x.vdi").unwrap();
    assert_eq!(made["limits"], json!({"iops_total": 70}));
    fleet.driver("x").write(0, &[1; 512]);
    // While it is written nobody can build on it.
    let of_x = json!({"of": fleet.path("x.vdi"), "add": {"name": "y", "image": fleet.path("y.vdi"), "limits": {}}});
    assert_eq!(fleet.ask("clone", &of_x), Err("not-open".to_owned()));
    fleet.ask("remove", &json!({"disk": "x"})).unwrap();
    let made = fleet.ask("clone", &of_x).unwrap();
    assert_eq!(made["limits"], json!({}));
    let mut y = fleet.driver("y");
    assert_eq!(y.read(0, 1024), [[1; 512], [5; 512]].concat());
    // Now x is its parent, and is read only.
    let x = json!({"name": "x", "image": fleet.path("x.vdi")});
    assert_eq!(fleet.ask("add", &x), Err("not-open".to_owned()));
}

#[test]
fn a_clone_that_cannot_be_made_or_served_leaves_nothing() {
    let fleet = Fleet::start("");
    let elsewhere = scratch();
    let foreign = elsewhere.path().join("x.vdi");
    qemu::create(&foreign, "8M");
    fs::write(fleet.path("no-image.vdi"), "text").unwrap();
    fs::write(fleet.path("empty.vdi"), "").unwrap();
    let before = (names(fleet.place.path()), names(elsewhere.path()));
    let (golden, x) = (fleet.path("golden.vdi"), fleet.path("x.vdi"));
    let new = |image: &Path| json!({"name": "x", "image": image});
    for (of, add, class) in [
        (&golden, json!({"name": "a", "image": x}), "exists"),
        // Not even an empty file is replaced.
        (&golden, new(&fleet.path("empty.vdi")), "exists"),
        (&golden, new(&fleet.path("c.vdi")), "exists"),
        (&golden, new(&golden), "exists"),
        (
            &golden,
            new(&elsewhere.path().join("y.vdi")),
            "not-possible",
        ),
        (&golden, new(Path::new("x.vdi")), "not-possible"),
        (&Path::new("golden.vdi").to_owned(), new(&x), "not-possible"),
        (&foreign, new(&x), "not-open"),
        (&fleet.path("nothing.vdi"), new(&x), "not-open"),
        (&fleet.path("no-image.vdi"), new(&x), "not-open"),
        // Another disk of this daemon writes it.
        (&fleet.path("a.vdi"), new(&x), "not-open"),
        // Made, and then not served.
        (
            &golden,
            json!({"name": "x", "image": x, "socket": foreign}),
            "not-possible",
        ),
        // Made, opened, and then not served: there are not so many threads.
        (
            &golden,
            json!({"name": "x", "image": x, "workers": 64}),
            "not-possible",
        ),
        (
            &golden,
            json!({"name": "x", "image": x, "group": "none"}),
            "no-such-group",
        ),
        (
            &golden,
            json!({"name": "x", "image": x, "cash": 1}),
            "not-understood",
        ),
    ] {
        let answer = fleet.ask("clone", &json!({"of": of, "add": add}));
        assert_eq!(answer, Err(class.to_owned()), "{of:?} {add}");
        assert_eq!(fleet.names(), ["a", "b"]);
        let now = (names(fleet.place.path()), names(elsewhere.path()));
        assert_eq!(now, before, "{of:?} {add}");
    }
    fleet.clone_of_golden("x", "x.vdi").unwrap();
}

/// Has four operators make clones at once, with these names and images; those that were made.
fn at_once(fleet: &Fleet, clones: &[(String, String); 4]) -> Vec<Value> {
    let start = Barrier::new(clones.len());
    std::thread::scope(|scope| {
        let start = &start;
        let asked: Vec<_> = clones
            .iter()
            .map(|(name, image)| {
                scope.spawn(move || {
                    start.wait();
                    fleet.clone_of_golden(name, image)
                })
            })
            .collect();
        let answers = asked.into_iter().map(|one| one.join().unwrap());
        let (made, refused): (Vec<_>, Vec<_>) = answers.partition(Result::is_ok);
        let classes = refused.into_iter().filter_map(Result::err);
        // The other one may have its socket first.
        let known = ["exists", "not-possible"];
        classes.for_each(|class| assert!(known.contains(&class.as_str()), "{class}"));
        made.into_iter().filter_map(Result::ok).collect()
    })
}

#[test]
fn of_clones_that_want_one_name_at_once_one_is_made_and_nothing_is_left_of_the_others() {
    let fleet = Fleet::start("");
    let before = names(fleet.place.path()).len();
    for round in 0..8 {
        // One file, or one disk.
        let clones = [0, 1, 2, 3].map(|nth| match round % 2 {
            0 => (format!("{round}-{nth}"), format!("x-{round}.vdi")),
            _ => (format!("{round}"), format!("x-{round}-{nth}.vdi")),
        });
        let made = at_once(&fleet, &clones);
        assert_eq!(made.len(), 1, "{made:?}");
        let mut driver = fleet.driver(made[0]["name"].as_str().unwrap());
        assert_eq!(driver.read(0, 512), [5; 512]);
        let now = names(fleet.place.path());
        assert_eq!(now.len(), before + round + 1, "{now:?}");
    }
}
