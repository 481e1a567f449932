//! A daemon with the disks `a` and `b`, and the one after it.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use vdi_tests::driver::{Driver, Options, PATIENCE};
use vdi_tests::load::DISK_SECTORS;
use vdi_tests::server::{Exit, Launch, Server, scratch, wait_for_listener};
use vdi_tests::{operator, tool, words};

pub(crate) struct Fleet {
    server: Option<Server>,
    place: Option<TempDir>,
}

impl Fleet {
    /// Images and a configuration, and no daemon yet.
    pub(crate) fn make() -> Self {
        let place = scratch();
        let path = |name: &str| place.path().join(name);
        for image in ["a.vdi", "b.vdi"] {
            let size = (DISK_SECTORS * 512).to_string();
            tool::vdi(words!["create", path(image), size]).expect_code(0);
        }
        operator::describe(place.path(), "metrics = \"unix:metrics\"");
        Self {
            server: None,
            place: Some(place),
        }
    }

    /// With a daemon.
    pub(crate) fn start() -> Self {
        let mut fleet = Self::make();
        fleet.server = Some(operator::serve(&fleet.path("")));
        fleet
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.as_ref().unwrap().path().join(name)
    }

    pub(crate) fn server(&mut self) -> &mut Server {
        self.server.as_mut().unwrap()
    }

    /// A daemon that takes over.
    pub(crate) fn next(&self) -> Launch {
        self.next_with(&self.path("fleet.toml"))
    }

    /// The same with another configuration.
    pub(crate) fn next_with(&self, config: &Path) -> Launch {
        Launch::bare()
            .arg("--config")
            .arg(config)
            .arg("--take-over")
            .arg(self.path("control"))
    }

    /// The next daemon where there is none.
    pub(crate) fn launch_next(mut self) -> Self {
        self.server = Some(self.next().spawn());
        wait_for_listener(&self.path("control"));
        self
    }

    /// Has a new daemon take over, and waits for the end of the old one; how that was.
    pub(crate) fn upgrade(&mut self) -> Exit {
        let next = self.next().spawn();
        let old = self.server.take().unwrap().wait();
        assert_eq!(old.code, Some(0), "{}{}", old.log, next.log());
        self.server = Some(next);
        old
    }

    pub(crate) fn driver(&self, disk: &str, options: &Options) -> Driver {
        let socket = self.path(&format!("sockets/{disk}.sock"));
        Driver::connect(&socket, options).unwrap()
    }

    /// Sends a command; what it returns, or its error's class.
    pub(crate) fn ask(&self, command: &str, arguments: &Value) -> Result<Value, String> {
        operator::ask(&self.path("control"), command, arguments)
    }

    /// What Prometheus sees.
    pub(crate) fn metrics(&self) -> String {
        let mut stream = UnixStream::connect(self.path("metrics")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).unwrap();
        std::io::read_to_string(stream).unwrap()
    }

    pub(crate) fn info(&self, disk: &str) -> Value {
        self.ask("info", &json!({"disk": disk})).unwrap()
    }

    pub(crate) fn names(&self) -> Vec<String> {
        operator::names(&self.path("control"))
    }

    /// Ends the daemon well; where its files are.
    pub(crate) fn end(mut self) -> TempDir {
        let exit = self.server.take().unwrap().terminate();
        assert_eq!(exit.code, Some(0), "{}", exit.log);
        self.place.take().unwrap()
    }
}
