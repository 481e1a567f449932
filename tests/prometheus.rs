//! The real Prometheus on a real daemon: its linter has nothing to say of the metrics, and every expression of the Grafana dashboard that is
//! delivered finds something.
//!
//! Grafana itself is not here: what it would put in for its variables, the test does. The programs come out of Debian's package (`ci/setup`).

#![expect(clippy::unwrap_used, reason = "a test says by a panic what is wrong")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vdi_tests::driver::{Driver, Options};
use vdi_tests::load::{DISK_SECTORS, Load, Mix};
use vdi_tests::random::Random;
use vdi_tests::server::{Launch, Server, scratch, wait_for_listener};
use vdi_tests::stop::StopOnDrop;
use vdi_tests::{operator, tool, words};

/// How long Prometheus may take for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// What each disk adds to what Prometheus keeps, if it is used in every way. A fleet of a thousand is as much as a hundred nodes.
const MOST_SERIES: usize = 200;

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn program(name: &str) -> Command {
    let path = repository().join("target/prometheus/usr/bin").join(name);
    assert!(path.exists(), "{} is missing; run ci/setup", path.display());
    Command::new(path)
}

/// A daemon with two disks of which one is limited.
struct Daemon {
    server: Server,
    place: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        let place = scratch();
        let path = |name: &str| place.path().join(name);
        let mut text =
            "control-socket = \"control\"\nsocket-dir = \".\"\nmetrics = \"127.0.0.1:0\"\n"
                .to_owned();
        for name in ["a", "b"] {
            let size = (DISK_SECTORS * 512).to_string();
            tool::vdi(words!["create", path(&format!("{name}.vdi")), size]).expect_code(0);
            text += &format!("[[disk]]\nname = \"{name}\"\nimage = \"{name}.vdi\"\n");
        }
        text += "limits = { iops_total = 50 }\n";
        fs::write(path("fleet.toml"), text).unwrap();
        let launch = Launch::bare().arg("--config").arg(path("fleet.toml"));
        let server = launch.spawn();
        wait_for_listener(&path("control"));
        Self { server, place }
    }

    fn driver(&self, disk: &str) -> Driver {
        let socket = self.place.path().join(format!("{disk}.sock"));
        Driver::connect(&socket, &Options::new()).unwrap()
    }

    /// Where its metrics are.
    fn address(&self) -> String {
        // The control socket is there before it.
        self.server.expect_log("metrics are at http://");
        let log = self.server.log();
        let (_, rest) = log.split_once("metrics are at http://").unwrap();
        rest.split_once("/metrics").unwrap().0.to_owned()
    }

    fn page(&self) -> String {
        get(&self.address(), "/metrics").unwrap()
    }
}

/// The body of an answer over HTTP.
fn get(address: &str, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    let _len = stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    if head.contains(" 200 ") {
        Ok(body.to_owned())
    } else {
        Err(std::io::Error::other(head.to_owned()))
    }
}

/// A Prometheus that scrapes an address each second, twice: as two jobs.
struct Prometheus {
    child: Child,
    address: String,
    log: PathBuf,
    _place: tempfile::TempDir,
}

impl Prometheus {
    fn start(scraped: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        let job = |name| {
            format!("  - job_name: {name}\n    static_configs: [{{targets: [\"{scraped}\"]}}]\n")
        };
        let config = format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n{}{}",
            job("vdi-vhost"),
            job("another")
        );
        fs::write(path("prometheus.yml"), config).unwrap();
        let free = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let log = path("log");
        let child = program("prometheus")
            .arg(format!(
                "--config.file={}",
                path("prometheus.yml").display()
            ))
            .arg(format!("--storage.tsdb.path={}", path("data").display()))
            .arg(format!("--web.listen-address={free}"))
            .stderr(fs::File::create(&log).unwrap())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let prometheus = Self {
            child,
            address: free.to_string(),
            log,
            _place: place,
        };
        let deadline = Instant::now() + PATIENCE;
        while get(&prometheus.address, "/-/ready").is_err() {
            assert!(Instant::now() < deadline, "{}", prometheus.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        prometheus
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// What an expression finds now: each sample's labels and value.
    fn query(&self, expression: &str) -> Vec<(Value, f64)> {
        let server = format!("http://{}", self.address);
        let mut promtool = program("promtool");
        promtool.args(["query", "-o", "json", "instant", &server, expression]);
        let done = promtool.output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{expression}: {said}{}", self.log());
        let found: Value = serde_json::from_slice(&done.stdout).unwrap();
        let samples = found.as_array().unwrap().iter();
        let sample = |sample: &Value| {
            let value = sample["value"][1].as_str().unwrap();
            (sample["metric"].clone(), value.parse().unwrap())
        };
        samples.map(sample).collect()
    }

    /// What an expression finds when that is good at last: where a scrape was late, there is a gap.
    fn find(&self, expression: &str, good: impl Fn(&[(Value, f64)]) -> bool) -> Vec<(Value, f64)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.query(expression);
            if good(&found) {
                return found;
            }
            assert!(
                Instant::now() < deadline,
                "{expression} finds {found:?}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn dashboard() -> Value {
    let file = repository().join("crates/vdi-vhost/grafana/vdi-vhost.json");
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// All expressions with their legends.
fn targets(dashboard: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    targets
        .map(|target| (text(&target["expr"]), text(&target["legendFormat"])))
        .collect()
}

/// What Grafana puts in, for one job and a scrape interval of a second.
fn with_variables(expression: &str) -> String {
    let expression = expression
        .replace("$__rate_interval", "4s")
        .replace("$__range", "1h")
        .replace("$job", "vdi-vhost")
        .replace("$disk", ".*");
    assert!(!expression.contains('$'), "{expression}");
    expression
}

/// Has `check` look at a Prometheus while both disks are used in all ways.
fn under_load(daemon: &Daemon, check: impl FnOnce()) {
    let [mut a, mut b] = ["a", "b"].map(|disk| daemon.driver(disk));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (stop, go_on) = (&stop, || !stop.load(Ordering::Relaxed));
        let _stop = StopOnDrop::new(stop);
        scope.spawn(move || {
            let mut load = Load::new(Random::printed(), 1, Mix::Everything);
            load.run(a.queue(), go_on);
        });
        scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                drop(b.read(0, 512));
                drop(b.queue().get_id());
            }
        });
        check();
    });
}

#[test]
fn the_linter_of_prometheus_has_nothing_to_say_and_a_disk_has_few_series() {
    let daemon = Daemon::start();
    under_load(&daemon, || std::thread::sleep(Duration::from_millis(500)));
    let page = daemon.page();
    let mut promtool = program("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = promtool.stdin.take().unwrap();
    input.write_all(page.as_bytes()).unwrap();
    drop(input);
    let done = promtool.wait_with_output().unwrap();
    let said = [done.stdout, done.stderr].concat();
    let said = String::from_utf8(said).unwrap();
    assert!(done.status.success() && said.is_empty(), "{said}");
    let of_a = page.lines().filter(|line| line.contains("disk=\"a\""));
    let series = of_a.count();
    println!("{series} series of a disk that is used");
    assert!(series > 20 && series <= MOST_SERIES, "{series}");
}

#[test]
fn every_expression_of_the_dashboard_finds_something() {
    let daemon = Daemon::start();
    let prometheus = Prometheus::start(&daemon.address());
    under_load(&daemon, || {
        let everything = "count(vdi_vhost_request_duration_seconds_bucket{kind=\"get_id\"})";
        prometheus.find(everything, |found| !found.is_empty());
        prometheus.find("up", |up| {
            up.len() == 2 && up.iter().all(|(_, up)| (up - 1.0).abs() < 0.1)
        });
        let targets = targets(&dashboard());
        assert!(targets.len() > 20);
        for (expression, legend) in &targets {
            let found = prometheus.find(&with_variables(expression), |found| {
                !found.is_empty() && found.iter().all(|(_, value)| value.is_finite())
            });
            for (labels, _) in &found {
                let wanted = legend
                    .split("{{")
                    .skip(1)
                    .map(|rest| rest.split_once("}}").unwrap().0);
                for label in wanted {
                    assert!(
                        labels[label].is_string(),
                        "{expression}: {labels} has no {label}"
                    );
                }
            }
        }
        println!("{} expressions found something", targets.len());
        // Of one job, not of both.
        let disks = with_variables("sum(vdi_vhost_disks{job=~\"$job\"})");
        prometheus.find(&disks, |found| {
            found.len() == 1 && (found[0].1 - 2.0).abs() < 0.1
        });
        choices(&prometheus);
    });
    assert!(
        !prometheus.log().contains("level=error"),
        "{}",
        prometheus.log()
    );
    let shutdown = operator::ask(
        &daemon.place.path().join("control"),
        "shutdown",
        &json!(null),
    );
    assert!(shutdown.is_ok());
}

/// What there is to choose from in the dashboard: jobs and disks.
fn choices(prometheus: &Prometheus) {
    let dashboard = dashboard();
    let variables = dashboard["templating"]["list"].as_array().unwrap().iter();
    let mut names = BTreeSet::new();
    for variable in variables.filter(|variable| variable["type"] == "query") {
        let query = variable["query"]["query"].as_str().unwrap();
        let inner = query
            .strip_prefix("label_values(")
            .unwrap()
            .strip_suffix(')');
        let (series, label) = inner.unwrap().rsplit_once(", ").unwrap();
        let choices = format!("group by ({label}) ({})", with_variables(series));
        let found = prometheus.find(&choices, |found| found.len() == 2);
        names.extend(
            found
                .iter()
                .map(|(labels, _)| labels[label].as_str().unwrap().to_owned()),
        );
    }
    let expected = ["a", "another", "b", "vdi-vhost"].map(str::to_owned);
    assert_eq!(names, BTreeSet::from(expected));
}

/// Disks of different daemons may have one name, so no expression takes those of all jobs together.
#[test]
fn every_selector_of_the_dashboard_is_of_the_job_that_was_chosen() {
    for (expression, _) in targets(&dashboard()) {
        let selectors = expression.matches("vdi_vhost_").count();
        let of_job = expression.matches("{job=~\"$job\"").count();
        assert_eq!(selectors, of_job, "{expression}");
    }
}
