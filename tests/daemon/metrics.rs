//! What Prometheus sees of a running daemon, and that nobody who wants to see it can hold it up.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vdi_tests::driver::{Driver, Layout, Options, PATIENCE, Request, Segment};
use vdi_tests::image::{Image, MIB};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server, wait_for_listener};
use vdi_tests::soon::soon;

use crate::fleet::Fleet;

/// How long a page is given to those who ask, and more.
const TO_BE_OLD: Duration = Duration::from_millis(100);

const REQUEST: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// What a page says: each line's name and labels, and its value.
type Page = BTreeMap<String, f64>;

fn parse(text: &str) -> Page {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    };
    lines.map(sample).collect()
}

/// Sends a request; the head and the body of the answer.
fn ask(mut stream: impl Read + Write, request: &[u8]) -> (String, String) {
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// Where the daemon says that its metrics are.
fn address(server: &Server) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = server.log();
        let said = log.split("metrics are at http://").nth(1);
        if let Some((address, _)) = said.and_then(|rest| rest.split_once("/metrics")) {
            return address.to_owned();
        }
        assert!(Instant::now() < deadline, "no word of metrics: {log}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

impl Fleet {
    fn scrape(&self) -> String {
        // The control socket is there first.
        wait_for_listener(&self.path("metrics"));
        let stream = UnixStream::connect(self.path("metrics")).unwrap();
        let (head, body) = ask(stream, REQUEST);
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("text/plain; version=0.0.4"), "{head}");
        body
    }

    /// What a page says that is made after this was asked for.
    fn page(&self) -> Page {
        std::thread::sleep(TO_BE_OLD);
        parse(&self.scrape())
    }
}

/// The reference parser's opinion.
fn expect_valid(text: &str) {
    let program = "import sys\nfrom prometheus_client.parser import text_string_to_metric_families as parse\n\
                   print(sum(len(family.samples) for family in parse(sys.stdin.read())))";
    let mut python = Command::new("/usr/bin/python3")
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    python
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let done = python.wait_with_output().unwrap();
    assert!(
        done.status.success(),
        "python3-prometheus-client: ci/setup installs it"
    );
    let found = String::from_utf8(done.stdout).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(found.trim(), lines.to_string());
}

#[test]
fn metrics_say_what_the_driver_did() {
    let fleet = Fleet::start("metrics = \"unix:metrics\"");
    let mut a = fleet.driver("a");
    for nth in 0..5 {
        a.write(nth * 8, &[1; 4096]);
    }
    a.read(0, 8192);
    a.flush();
    // What is answered may not be counted yet; of a stopped ring all is.
    let base = a.control.stop(0).unwrap();
    a.control.start(&a.queues[0], base).unwrap();
    let page = fleet.page();
    let of = |name: &str| page[&format!("vdi_vhost_{name}")];
    for (name, value) in [
        ("disks", 2),
        ("requests_total{disk=\"a\",kind=\"write\"}", 5),
        ("request_bytes_total{disk=\"a\",kind=\"write\"}", 20480),
        ("requests_total{disk=\"a\",kind=\"read\"}", 1),
        ("request_bytes_total{disk=\"a\",kind=\"read\"}", 8192),
        ("requests_total{disk=\"a\",kind=\"flush\"}", 1),
        ("request_errors_total{disk=\"a\",kind=\"write\"}", 0),
        ("requests_total{disk=\"b\",kind=\"write\"}", 0),
        (
            "request_duration_seconds_count{disk=\"a\",kind=\"write\"}",
            5,
        ),
        (
            "request_duration_seconds_bucket{disk=\"a\",kind=\"write\",le=\"+Inf\"}",
            5,
        ),
        ("in_flight_requests{disk=\"a\"}", 0),
        ("refused_requests_total{disk=\"a\"}", 0),
        ("disk_size_bytes{disk=\"a\"}", 24 << 20),
        ("allocated_blocks{disk=\"a\"}", 1),
        ("allocated_bytes{disk=\"a\"}", 1 << 20),
        ("allocated_blocks{disk=\"b\"}", 0),
        ("released_blocks_total{disk=\"a\"}", 0),
        ("front_end_connected{disk=\"a\"}", 1),
        ("front_end_connected{disk=\"b\"}", 0),
        ("disk_failed{disk=\"a\"}", 0),
    ] {
        assert!(
            (of(name) - f64::from(value)).abs() < 0.5,
            "{name}: {}",
            of(name)
        );
    }
    assert!(of("syncs_total{disk=\"a\"}") >= 1.0);
    assert!(of("sync_seconds_total{disk=\"a\"}") > 0.0);
    assert!(of("request_duration_seconds_sum{disk=\"a\",kind=\"write\"}") > 0.0);
    let len = fs::metadata(fleet.path("a.vdi")).unwrap().len();
    let said = of("image_file_bytes{disk=\"a\"}");
    assert!((said - f64::from(u32::try_from(len).unwrap())).abs() < 0.5);
    assert!(page.contains_key(&format!(
        "vdi_vhost_build_info{{version=\"{}\"}}",
        env!("CARGO_PKG_VERSION")
    )));
    expect_valid(&fleet.scrape());
    // Nothing that was counted is lost when the front end goes, and blocks that are given back are counted.
    let request = Request::discard(&[Segment::new(0, 2048)]);
    drop(a.queue().run(&request, &Layout::whole()).expect_ok());
    a.control.stop(0).unwrap();
    drop(a);
    let page = fleet.page();
    let of = |name: &str| page[&format!("vdi_vhost_{name}")];
    assert!((of("released_blocks_total{disk=\"a\"}") - 1.0).abs() < 0.5);
    assert!(of("allocated_blocks{disk=\"a\"}") < 0.5);
    assert!((of("requests_total{disk=\"a\",kind=\"write\"}") - 5.0).abs() < 0.5);
    let socket = fleet.path("metrics");
    assert_eq!(fleet.server.terminate().code, Some(0));
    assert!(!socket.exists(), "the socket stays behind");
}

#[test]
fn what_limits_hold_and_what_waits_is_seen() {
    let fleet = Fleet::start("metrics = \"unix:metrics\"");
    let limits = serde_json::json!({"disk": "a", "limits": {"iops_total": 50}});
    fleet.ask("set-limits", &limits).unwrap();
    let mut a = fleet.driver("a");
    // Shown at once: one after the other, a slow machine would need no limit.
    let (read, layout) = (Request::read(0, 512), Layout::whole());
    let tokens = a.queue().submit_all([(&read, &layout); 20]);
    for token in tokens {
        drop(a.queue().wait(token).expect_ok());
    }
    let page = fleet.page();
    let of = |name: &str| page[&format!("vdi_vhost_{name}{{disk=\"a\"}}")];
    assert!(of("throttled_requests_total") >= 5.0);
    assert!(of("throttled_seconds_total") > 0.1);
}

#[test]
fn other_machines_see_metrics_only_if_that_is_asked_for() {
    let image = Image::by_qemu(8 * MIB);
    let exit = Launch::image(image.path())
        .args(["--metrics", "0.0.0.0:0"])
        .run();
    assert_eq!(exit.code, Some(1));
    assert!(
        exit.log.contains("could be read from other machines"),
        "{}",
        exit.log
    );
    assert!(exit.log.contains("--metrics-public"), "{}", exit.log);
    let exit = Launch::image(image.path())
        .args(["--metrics", "somewhere"])
        .run();
    assert_eq!(exit.code, Some(2));
    assert!(exit.log.contains("127.0.0.1:9187"), "{}", exit.log);
    let server = Launch::image(image.path())
        .args(["--metrics", "0.0.0.0:0", "--metrics-public"])
        .start();
    let _address = address(&server);
    assert_eq!(server.terminate().code, Some(0));
}

#[test]
fn callers_who_mean_no_good_keep_no_scraper_out_and_no_guest_waiting() {
    let image = Image::by_qemu(8 * MIB);
    let server = Launch::image(image.path())
        .args(["--metrics", "127.0.0.1:0"])
        .start();
    let address = address(&server);
    let connect = || connect(&address);
    let mut driver = server.driver(&Options::new());
    driver.write(0, &[1; 512]);
    soon(Duration::from_secs(1), || {
        // More than there are places for: some say nothing, some half a request, some ask and do not read.
        let _rude: Vec<TcpStream> = (0..200)
            .map(|nth| {
                let mut stream = connect();
                let said: &[u8] = match nth % 3 {
                    0 => b"",
                    1 => b"GET /met",
                    _ => REQUEST,
                };
                // One that was turned away already cannot be written to.
                let _ = stream.write_all(said);
                stream
            })
            .collect();
        let before = Instant::now();
        let (head, _) = ask(connect(), REQUEST);
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        let took = before.elapsed();
        assert_eq!(driver.read(0, 512), [1; 512]);
        took
    });
    let junk = Random::printed().bytes(64 << 10);
    let long = [b"GET /metrics HTTP/1.1\r\nx: ".as_slice(), &[b'x'; 9000]].concat();
    for (request, status) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "404"),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        (b"\0\0\0\0", "400"),
        (&long, "431"),
        (&junk, "400"),
    ] {
        let mut stream = connect();
        // It may hang up before it has all.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        // What was not read makes the kernel throw the answer away.
        let is_reset = answer.is_empty() && request.len() > 8192;
        assert!(
            is_reset || answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{answer}"
        );
    }
    // One that says nothing is let go of.
    assert_eq!(connect().read(&mut [0]).unwrap(), 0);
    // One that asks, does not read, and is there when all ends.
    let mut deaf = connect();
    deaf.write_all(REQUEST).unwrap();
    let (head, _) = ask(connect(), REQUEST);
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    drop::<Driver>(driver);
    assert_eq!(server.terminate().code, Some(0));
}

/// All names of metrics in a text.
fn names(text: &str) -> BTreeSet<&str> {
    let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let starts = text.match_indices("vdi_vhost_").map(|(at, _)| &text[at..]);
    starts
        .map(|rest| rest.split(|c| !is_of_name(c)).next().unwrap())
        .collect()
}

/// The names that a page has, a histogram's once.
fn exported(page: &str) -> BTreeSet<&str> {
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types.map(|line| line.split(' ').next().unwrap()).collect()
}

#[test]
fn the_page_of_the_fleet_lists_what_there_is() {
    let fleet = Fleet::start("metrics = \"unix:metrics\"");
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/fleet.md");
    let docs = fs::read_to_string(docs).unwrap();
    let rows = docs
        .lines()
        .filter(|line| line.starts_with("| `vdi_vhost_"));
    let listed: String = rows.collect();
    let page = fleet.scrape();
    assert_eq!(names(&listed), exported(&page));
}

#[test]
fn every_metric_of_the_dashboard_is_one_that_a_daemon_exports() {
    let fleet = Fleet::start("metrics = \"unix:metrics\"");
    // A histogram is there once there is something in it: of a stopped ring all is counted.
    let mut driver = fleet.driver("a");
    driver.read(0, 512);
    driver.control.stop(0).unwrap();
    std::thread::sleep(TO_BE_OLD);
    let page = fleet.scrape();
    let file = "../crates/vdi-vhost/grafana/vdi-vhost.json";
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let board: serde_json::Value = serde_json::from_str(&text).unwrap();
    let panels = board["panels"].as_array().unwrap();
    let targets = panels
        .iter()
        .map(|panel| panel["targets"].as_array().unwrap());
    let shown: Vec<&str> = targets
        .flatten()
        .map(|target| target["expr"].as_str().unwrap())
        .collect();
    assert!(shown.len() >= panels.len());
    let found = names(&page);
    let used: BTreeSet<&str> = shown.iter().flat_map(|expr| names(expr)).collect();
    for name in &used {
        assert!(found.contains(name), "no daemon exports {name}");
    }
    // Nothing is counted that nobody sees, but for how many blocks the bytes are.
    for name in exported(&page) {
        let bucket = format!("{name}_bucket");
        let is_shown = used.contains(name) || used.contains(bucket.as_str());
        assert!(
            is_shown || name == "vdi_vhost_allocated_blocks",
            "{name} is not shown"
        );
    }
    // What panels choose by is what samples have.
    let expr = shown.concat();
    let of_matchers = expr
        .match_indices(['{', ','])
        .map(|(at, _)| &expr[at + 1..]);
    let labels = of_matchers
        .filter_map(|rest| rest.split_once(['=', '!']))
        .map(|(name, _)| name);
    for label in labels.filter(|name| name.chars().all(|c| c.is_ascii_lowercase())) {
        assert!(
            ["disk", "kind", "job"].contains(&label),
            "no sample has {label}"
        );
    }
}
