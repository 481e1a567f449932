//! The driver drives a back end that is not ours, so that it cannot have grown around ours.
//!
//! Not a test of QEMU: only what QEMU's storage daemon does right is asked of it.

use vdi_tests::driver::{Calls, Driver, Indirect, Layout, Options, Region, Request, feature};
use vdi_tests::server::{Launch, Server, scratch};

const MIB: u64 = 1 << 20;

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at / 7 + seed * 31) % 251).expect("below 251"))
        .collect()
}

/// QEMU's storage daemon on an empty raw disk of 64 MiB.
fn other_back_end(directory: &tempfile::TempDir, queues: usize) -> Server {
    let image = directory.path().join("disk.raw");
    let file = std::fs::File::create(&image).expect("the directory is ours");
    file.set_len(64 * MIB).expect("it can be lengthened");
    Launch::storage_daemon(&image, "raw", queues).start()
}

fn write_and_read_in_all_layouts(driver: &mut Driver) {
    // QEMU refuses empty descriptors and tables behind other descriptors, which virtio allows.
    let understood = |layout: &Layout| {
        !layout.empty_between && matches!(layout.indirect, Indirect::No | Indirect::After(0))
    };
    let layouts = Layout::all_kinds();
    let layouts = layouts.into_iter().filter(|(_, layout)| understood(layout));
    for (nth, (name, layout)) in layouts.enumerate() {
        let data = pattern(nth, 4096);
        let sector = 8 * nth as u64;
        let queue = driver.queue();
        let written = queue.run(&Request::write(sector, data.clone()), &layout);
        assert_eq!(written.status, 0, "writing: {name}");
        let read = queue.run(&Request::read(sector, 4096), &layout);
        assert_eq!(
            (read.status, read.data == data),
            (0, true),
            "reading: {name}"
        );
    }
}

#[test]
fn layouts_that_qemu_understands_are_understood() {
    let directory = scratch();
    let server = other_back_end(&directory, 1);
    write_and_read_in_all_layouts(&mut server.driver(&Options::new()));
    write_and_read_in_all_layouts(&mut server.driver(&Options::new().without(feature::EVENT_IDX)));
}

#[test]
fn a_driver_that_wants_no_calls_gets_its_answers() {
    let directory = scratch();
    let server = other_back_end(&directory, 1);
    for options in [Options::new(), Options::new().without(feature::EVENT_IDX)] {
        let mut driver = server.driver(&options);
        driver.queue().set_calls(Calls::Unwanted);
        write_and_read_in_all_layouts(&mut driver);
    }
}

#[test]
fn two_queues_are_driven_by_two_threads() {
    let directory = scratch();
    let server = other_back_end(&directory, 2);
    let mut driver = server.driver(&Options::new().queues(2));
    std::thread::scope(|scope| {
        for queue in &mut driver.queues {
            scope.spawn(|| {
                for nth in 0..500 {
                    let data = pattern(nth, 512);
                    let sector = (2 * nth + queue.index()) as u64;
                    queue.write(sector, &data);
                    assert_eq!(queue.read(sector, 512), data);
                }
            });
        }
    });
}

#[test]
fn data_may_cross_the_border_of_two_regions() {
    let directory = scratch();
    let server = other_back_end(&directory, 1);
    let regions = vec![Region::new(0, 8 * MIB), Region::new(8 * MIB, 8 * MIB)];
    let mut driver = server.driver(&Options::new().memory(regions));
    let data = pattern(1, 8192);
    let across = Layout::framed().largest_at(8 * MIB - 1024);
    let queue = driver.queue();
    let write = Request::write(0, data.clone());
    assert_eq!(queue.run(&write, &across).status, 0);
    assert_eq!(queue.run(&Request::read(0, 8192), &across).data, data);
}

#[test]
fn a_stopped_ring_goes_on_where_it_was() {
    let directory = scratch();
    let server = other_back_end(&directory, 1);
    let mut driver = server.driver(&Options::new());
    driver.write(0, &pattern(1, 512));
    let base = driver.control.stop(0).unwrap();
    assert_eq!(base, 1);
    driver.control.start(&driver.queues[0], base).unwrap();
    assert_eq!(driver.read(0, 512), pattern(1, 512));
}
