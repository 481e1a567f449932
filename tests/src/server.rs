//! Starts the daemon, or another back end, and makes sure that it ends.
//!
//! Not a driver: see [`crate::driver`]. A [`Server`] that is dropped is killed; one that is dropped by a panic
//! shows what it logged.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::driver::{Control, ControlError, Driver, Options, PATIENCE};

/// How a program ended.
#[derive(Debug)]
pub struct Exit {
    /// Its exit code, if it was not killed.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// What it wrote to its standard output.
    pub output: String,
    /// What it wrote to its standard error.
    pub log: String,
    /// How long it took to end.
    pub took: Duration,
}

/// A back end that is to be started.
#[derive(Debug)]
pub struct Launch {
    program: PathBuf,
    before: Vec<OsString>,
    arguments: Vec<OsString>,
    input: Option<OwnedFd>,
    directory: TempDir,
    socket: PathBuf,
}

impl Launch {
    /// The daemon, with no arguments.
    ///
    /// # Panics
    /// If it is not built.
    #[must_use]
    pub fn bare() -> Self {
        Self::program(binary("vdi-vhost"))
    }

    /// The daemon, serving an image on a socket of its own.
    #[must_use]
    pub fn image(image: &Path) -> Self {
        let launch = Self::bare();
        let socket = launch.socket.clone();
        launch.serving(image, &socket)
    }

    /// The daemon, serving an image on a socket at a given path, which outlives this.
    #[must_use]
    pub fn image_at(image: &Path, socket: &Path) -> Self {
        let mut launch = Self::bare();
        launch.socket = socket.to_owned();
        launch.serving(image, socket)
    }

    /// The daemon for the disks of a configuration, of which one has this socket.
    #[must_use]
    pub fn config_at(config: &Path, socket: &Path) -> Self {
        let mut launch = Self::bare();
        launch.socket = socket.to_owned();
        launch.arg("--config").arg(config)
    }

    fn serving(self, image: &Path, socket: &Path) -> Self {
        self.args([
            OsStr::new("--socket-path"),
            socket.as_os_str(),
            OsStr::new("--blk-file"),
            image.as_os_str(),
        ])
    }

    /// QEMU's storage daemon, as another back end or as another user of an image.
    #[must_use]
    pub fn storage_daemon(image: &Path, format: &str, queues: usize) -> Self {
        let launch = Self::program(PathBuf::from("qemu-storage-daemon"));
        let blockdev = format!(
            "driver={format},node-name=n,file.driver=file,file.filename={}",
            image.display()
        );
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            launch.socket.display()
        );
        launch.args(["--blockdev", &blockdev, "--export", &export])
    }

    /// The daemon from another place.
    #[must_use]
    pub fn installed(program: &Path) -> Self {
        Self::program(program.to_owned())
    }

    fn program(program: PathBuf) -> Self {
        let directory = tempfile::tempdir().expect("a directory can be made");
        let socket = directory.path().join("socket");
        Self {
            program,
            before: Vec::new(),
            arguments: Vec::new(),
            input: None,
            directory,
            socket,
        }
    }

    /// The same with one more argument.
    #[must_use]
    pub fn arg(self, argument: impl AsRef<OsStr>) -> Self {
        self.args([argument])
    }

    /// The same with more arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.arguments
            .extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// The same, so that its descriptors can be looked at: by anyone but root only without the sandbox.
    ///
    /// # Panics
    /// If there is no `/proc`.
    #[must_use]
    pub fn inspectable(self) -> Self {
        let own = fs::metadata("/proc/self").expect("Linux has it");
        if own.uid() == 0 {
            self
        } else {
            self.args(["--sandbox", "off"])
        }
    }

    /// The same, started by another program: its name, its arguments, then the daemon's command line.
    #[must_use]
    pub fn under(mut self, command: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.before = command.into_iter().map(|a| a.as_ref().to_owned()).collect();
        self
    }

    /// The same with something to inherit as its standard input.
    #[must_use]
    pub fn input(mut self, input: OwnedFd) -> Self {
        self.input = Some(input);
        self
    }

    /// Where it is to listen.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Starts it and waits until it listens.
    ///
    /// # Panics
    /// If it ends, or does not listen in time.
    #[must_use]
    pub fn start(self) -> Server {
        let mut server = self.spawn();
        let deadline = Instant::now() + PATIENCE;
        while !listens(&server.socket) {
            if let Some(status) = server.ended() {
                panic!("the back end ended with {status} before it listened");
            }
            assert!(Instant::now() < deadline, "the back end does not listen");
            std::thread::sleep(Duration::from_millis(2));
        }
        server
    }

    /// Starts it and waits until it ends.
    ///
    /// # Panics
    /// If it does not end in time.
    #[must_use]
    pub fn run(self) -> Exit {
        self.spawn().wait()
    }

    /// Starts it and waits for nothing.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn spawn(self) -> Server {
        let mut line = self.before.clone();
        line.push(self.program.into_os_string());
        line.extend(self.arguments);
        let file =
            |name| File::create(self.directory.path().join(name)).expect("a file can be made");
        let child = Command::new(&line[0])
            .args(&line[1..])
            .stdin(self.input.map_or_else(Stdio::null, Stdio::from))
            .stdout(file("output"))
            .stderr(file("log"))
            .spawn()
            .unwrap_or_else(|error| panic!("{line:?} cannot be started: {error}"));
        Server {
            child,
            directory: self.directory,
            socket: self.socket,
        }
    }
}

/// A back end that runs until this is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    directory: TempDir,
    socket: PathBuf,
}

impl Server {
    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process; that of the program it was started by, if there is one.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects a driver.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn driver(&self, options: &Options) -> Driver {
        self.try_driver(options)
            .unwrap_or_else(|error| panic!("the driver cannot start: {error}"))
    }

    /// Connects a driver.
    ///
    /// # Errors
    /// If there is no connection, or a message is refused.
    pub fn try_driver(&self, options: &Options) -> Result<Driver, ControlError> {
        Driver::connect(&self.socket, options)
    }

    /// Connects and negotiates, and starts nothing.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn control(&self, options: &Options) -> Control {
        Control::connect(&self.socket, options.wanted)
            .unwrap_or_else(|error| panic!("no connection: {error}"))
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&mut self) -> bool {
        self.ended().is_none()
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.read("log")
    }

    /// Waits until it has logged this: who hears of something may hear of it before it is logged.
    ///
    /// # Panics
    /// If it does not in time.
    #[track_caller]
    pub fn expect_log(&self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(what) {
            assert!(
                Instant::now() < deadline,
                "{what:?} is not in the log:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Asks it to end and waits until it did.
    ///
    /// # Panics
    /// If it does not end in time.
    #[must_use]
    pub fn terminate(self) -> Exit {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Kills it as a crash would and waits until it is gone.
    ///
    /// # Panics
    /// If it does not end in time.
    #[must_use]
    pub fn kill(self) -> Exit {
        self.signal(Signal::SIGKILL);
        self.wait()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it is gone.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("Linux has 22-bit process ids");
        kill(Pid::from_raw(pid), signal).expect("the process can be signalled");
    }

    /// Waits until it ends.
    ///
    /// # Panics
    /// If it does not in time.
    #[must_use]
    pub fn wait(mut self) -> Exit {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.ended() {
                break status;
            }
            assert!(start.elapsed() < PATIENCE, "the back end does not end");
            std::thread::sleep(Duration::from_millis(1));
        };
        Exit {
            code: status.code(),
            signal: status.signal(),
            output: self.read("output"),
            log: self.read("log"),
            took: start.elapsed(),
        }
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is our child")
    }

    fn read(&self, name: &str) -> String {
        let bytes = fs::read(self.directory.path().join(name)).expect("the file is there");
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the back end's log ---\n{}---", self.log());
        }
        let _may_be_gone = self.child.kill();
        let _status = self.child.wait();
    }
}

/// How many requests a daemon started again, by its own account.
#[must_use]
pub fn requests_started_again(log: &str) -> u64 {
    log.lines()
        .filter_map(|line| {
            let (before, _) = line.split_once(" requests were in flight")?;
            before.rsplit(' ').next()?.parse::<u64>().ok()
        })
        .sum()
}

/// A program of this workspace, found next to the test that asks for it.
///
/// # Panics
/// If it is not built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let path = target_directory().join(name);
    assert!(
        path.exists(),
        "{} is not built; run `cargo build --workspace` first",
        path.display()
    );
    path
}

/// A directory on the disk that the build is on: images there behave like images, not like memory.
///
/// # Panics
/// If it cannot be made.
#[must_use]
pub fn scratch() -> TempDir {
    let parent = target_directory().join("scratch");
    fs::create_dir_all(&parent).expect("the target directory can be written to");
    tempfile::tempdir_in(parent).expect("a directory can be made")
}

fn target_directory() -> PathBuf {
    let test = std::env::current_exe().expect("Linux knows the path of a program");
    let deps = test.parent().expect("a program lies in a directory");
    deps.parent()
        .expect("tests lie in target/*/deps")
        .to_owned()
}

/// Whether somebody listens on the socket; a connection would be one more that the daemon serves.
/// Waits until somebody listens there.
///
/// # Panics
/// If nobody does in time.
pub fn wait_for_listener(socket: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while !listens(socket) {
        assert!(Instant::now() < deadline, "nobody listens");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn listens(socket: &Path) -> bool {
    const LISTENING: &str = "00010000"; // __SO_ACCEPTCON, in the column of flags
    let is_socket = fs::metadata(socket).is_ok_and(|meta| meta.file_type().is_socket());
    let name = socket.to_str().expect("temporary paths are UTF-8");
    let table = fs::read_to_string("/proc/net/unix").expect("Linux has it");
    is_socket
        && table
            .lines()
            .any(|line| line.contains(LISTENING) && line.ends_with(name))
}
