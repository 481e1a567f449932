//! A dead daemon's socket and locks are not in the way of the next one.

use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vdi_core::NewKind;
use vdi_tests::driver::{Driver, Layout, Options, PATIENCE, Request};
use vdi_tests::image::{Image, MIB, field};
use vdi_tests::server::{Launch, binary};

use crate::Place;

/// Not a measurement, which is `ci/restart-time`'s: only that nothing waits for a time-out, in a debug build. On a busy machine
/// one of five is not late.
const SOON: Duration = Duration::from_secs(3);

#[test]
fn the_same_command_works_again_right_after_a_kill() {
    for cache in ["writeback", "direct"] {
        let image = Image::by_us(2 << 40, 1 << 20, NewKind::Dynamic);
        let place = Place::new();
        let launch = || Launch::image_at(image.path(), &place.socket()).args(["--cache", cache]);
        let mut server = launch().start();
        let mut fastest = Duration::MAX;
        for round in 0..5 {
            let mut driver = server.driver(&Options::new());
            let data = vec![round; 1 << 20];
            let requests: Vec<_> = (0..16)
                .map(|nth| Request::write(nth * 2048, data.clone()))
                .collect();
            let layout = Layout::framed();
            let _tokens = driver
                .queue()
                .submit_all(requests.iter().map(|request| (request, &layout)));
            assert_eq!(server.kill().signal, Some(9));
            let _memory = driver.vanish();
            let before = Instant::now();
            server = launch().start();
            fastest = fastest.min(before.elapsed());
        }
        assert!(fastest < SOON, "{fastest:?}");
        assert_eq!(server.terminate().code, Some(0));
    }
}

#[test]
fn a_second_daemon_leaves_the_socket_and_the_image_of_a_living_one_alone() {
    let image = Image::by_qemu(16 * MIB);
    let server = Launch::image(image.path()).start();
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[3; 512]);
    let second = |path: &std::path::Path| {
        Command::new(binary("vdi-vhost"))
            .arg("--socket-path")
            .arg(path)
            .arg("--blk-file")
            .arg(image.path())
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let refused = second(server.socket());
    assert_eq!(refused.status.code(), Some(1));
    let elsewhere = tempfile::tempdir().unwrap();
    let refused = second(&elsewhere.path().join("socket"));
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let process = server.pid();
    let holder = format!("is in use by another program (vdi-vhost, process {process})");
    assert!(said.contains(&holder), "{said}");
    assert_eq!(driver.read(0, 512), [3; 512]);
    assert!(UnixStream::connect(server.socket()).is_ok());
}

/// The lock goes when the last I/O ends, not when the process does: a write on its way to the storage must not land in
/// the next daemon's time.
#[test]
fn whatever_can_still_write_holds_the_lock() {
    let image = Image::by_qemu(16 * MIB);
    let server = Launch::image(image.path())
        .args(["--cache", "direct"])
        .inspectable()
        .start();
    let directory = format!("/proc/{}", server.pid());
    let mut writers = 0;
    for entry in std::fs::read_dir(format!("{directory}/fd")).unwrap() {
        let fd = entry.unwrap();
        if !std::fs::read_link(fd.path()).is_ok_and(|link| link == image.path()) {
            continue;
        }
        let name = fd.file_name().into_string().unwrap();
        let info = std::fs::read_to_string(format!("{directory}/fdinfo/{name}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        if flags & 3 != 0 {
            writers += 1;
            assert!(
                info.contains("lock:"),
                "descriptor {name} has no lock:\n{info}"
            );
        }
    }
    assert!(writers >= 2, "the buffered and the direct way");
}

/// From the start of the process to an accepted connection and the first answer, after a kill under load.
#[test]
#[ignore = "a measurement, for a release build: ci/restart-time"]
fn restart_time() {
    let terabytes = |count: u64| Image::by_us(count << 40, 1 << 20, NewKind::Dynamic);
    let images = [
        ("2 TiB, empty", terabytes(2)),
        ("2 TiB, every block allocated", full(terabytes(2))),
    ];
    println!("| image | process start to accept | to the first answer |");
    println!("| --- | --- | --- |");
    for (name, image) in images {
        let (mut accepted, mut answered): (Vec<_>, Vec<_>) =
            (0..11).map(|_| start_once(&image)).unzip();
        accepted.sort_unstable();
        answered.sort_unstable();
        let show = |times: &[Duration]| {
            let ms = |time: Duration| time.as_secs_f64() * 1000.0;
            let (low, middle, high) = (times[0], times[times.len() / 2], times[times.len() - 1]);
            format!("{:.1} ms ({:.1} to {:.1})", ms(middle), ms(low), ms(high))
        };
        println!("| {name} | {} | {} |", show(&accepted), show(&answered));
    }
}

/// Starts the daemon, takes the times, and kills it with writes in flight.
fn start_once(image: &Image) -> (Duration, Duration) {
    let place = Place::new();
    let start = Instant::now();
    let server = Launch::image_at(image.path(), &place.socket()).spawn();
    let socket = loop {
        match UnixStream::connect(place.socket()) {
            Ok(socket) => break socket,
            Err(_) => std::thread::sleep(Duration::from_micros(100)),
        }
        assert!(start.elapsed() < PATIENCE, "nobody listens");
    };
    let accepted = start.elapsed();
    let options = Options::new();
    let mut driver = Driver::on_socket(socket, &options).unwrap();
    let _data = driver.read(0, 4096);
    let answered = start.elapsed();
    for nth in 0..32 {
        let request = Request::write(nth * 2048, vec![1; 65_536]);
        let _token = driver.queue().submit(&request, &Layout::framed());
    }
    assert_eq!(server.kill().signal, Some(9));
    (accepted, answered)
}

/// The same image with a map in which every block has its place, in a file that is as long and full of holes.
fn full(image: Image) -> Image {
    let [data_at, blocks] = [field::DATA_OFFSET, field::BLOCKS_IN_IMAGE]
        .map(|at| u64::from(u32::from_le_bytes(image.bytes(at))));
    let map_at = u64::from(u32::from_le_bytes(image.bytes(field::MAP_OFFSET)));
    let count = u32::try_from(blocks).unwrap();
    let map: Vec<u8> = (0..count).flat_map(u32::to_le_bytes).collect();
    image.patch(map_at, &map);
    image.patch(field::BLOCKS_ALLOCATED, &count.to_le_bytes());
    let file = std::fs::File::options()
        .write(true)
        .open(image.path())
        .unwrap();
    file.set_len(data_at + (blocks << 20)).unwrap();
    image
}
