//! Runs the programs under test and those they must agree with.
//!
//! A child that is being started has copies of all our descriptors until it runs its
//! program, and with them our locks on images. So one child is started at a time, and whoever
//! closed an image waits for that ([`settle`]) before the image's locks are asked for.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

/// What a program answered.
#[derive(Debug)]
pub struct Answer {
    /// Its exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// What it wrote to standard output.
    pub out: String,
    /// What it wrote to standard error.
    pub err: String,
}

impl Answer {
    /// The same answer, if the exit code is `code`.
    ///
    /// # Panics
    /// If it is another.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// The output as JSON.
    ///
    /// # Panics
    /// If it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

/// Where a program of this workspace is: beside the test's own executable.
///
/// # Panics
/// If it was not built.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its executable");
    let directory = test
        .parent()
        .and_then(|deps| deps.parent())
        .expect("target/*/deps/test");
    let path = directory.join(name);
    assert!(
        path.exists(),
        "{} is not there; build it first: cargo build --workspace",
        path.display()
    );
    path
}

/// Runs `vdi` with these words.
///
/// # Panics
/// If it cannot be started.
#[track_caller]
pub fn vdi<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> Answer {
    run(Command::new(program("vdi")).args(words))
}

/// Runs `qemu-img` with these words.
///
/// # Panics
/// If it cannot be started.
#[track_caller]
pub fn qemu_img<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> Answer {
    run(Command::new("qemu-img").args(words))
}

/// Has `qemu-io` do something with a VDI image.
///
/// # Panics
/// If it cannot be started or fails.
#[track_caller]
pub fn qemu_io(image: &std::path::Path, commands: &[String]) -> Answer {
    let mut qemu_io = Command::new("qemu-io");
    qemu_io.args(["-f", "vdi"]);
    for command in commands {
        qemu_io.args(["-c", command]);
    }
    // It complains on standard output and exits with 0 all the same.
    let answer = run(qemu_io.arg(image)).expect_code(0);
    assert!(
        !answer.out.contains("failed") && answer.err.is_empty(),
        "{answer:#?}"
    );
    answer
}

#[track_caller]
fn run(command: &mut Command) -> Answer {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = spawn(command)
        .wait_with_output()
        .expect("a child can be waited for");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("programs answer in UTF-8");
    Answer {
        code: output.status.code(),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

static STARTING: Mutex<()> = Mutex::new(());

fn starting() -> MutexGuard<'static, ()> {
    STARTING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a program; when this returns, it runs.
///
/// # Panics
/// If it cannot be started.
#[track_caller]
pub fn spawn(command: &mut Command) -> Child {
    let _one_at_a_time = starting();
    command.spawn().unwrap_or_else(|error| {
        panic!(
            "{} cannot be started: {error}; is its package installed?",
            command.get_program().display()
        )
    })
}

/// Waits until no child has a copy of a descriptor that was closed before.
pub fn settle() {
    drop(starting());
}

/// Words of a command line from texts and paths alike.
#[macro_export]
macro_rules! words {
    ($($word:expr),* $(,)?) => {
        [$(std::ffi::OsStr::new(&$word)),*]
    };
}
