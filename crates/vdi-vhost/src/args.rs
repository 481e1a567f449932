//! The command line, by the conventions of QEMU's vhost-user back-end programs (docs/interop/vhost-user.rst).

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgGroup, CommandFactory, FromArgMatches, Parser, ValueEnum};
use clap_complete::Shell;

use crate::cpus::{CpuError, CpuList};
use crate::device::{DetectZeroes, Discard, SERIAL_BYTES, Serial};
use crate::engine::EngineChoice;
use crate::metrics::Endpoint;

/// Most queues: the protocol's messages have 8 bits for the number of one.
pub(crate) const MAX_QUEUES: u16 = 256;

/// Serves a VirtualBox VDI image to a virtual machine as a vhost-user-blk device.
///
/// It is started by hand, by a management program (QEMU's conventions), or by systemd: then it takes over the sockets of a socket
/// unit (one for front ends, and one called `control` with FileDescriptorName=), says when it is ready and serves the watchdog.
///
/// SIGTERM and SIGINT end it: requests in flight are finished and the image is closed clean. Exit code 0: ended so, or the
/// only connection (--fd) ended. 1: it could not start or go on. 2: wrong usage.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
#[command(group(ArgGroup::new("door").args(["socket_path", "fd"])))]
pub(crate) struct Args {
    /// Where front ends connect; one is served after the other.
    #[arg(long, value_name = "PATH")]
    pub(crate) socket_path: Option<PathBuf>,

    /// An inherited socket, connected or listening.
    #[arg(long, value_name = "FDNUM", value_parser = clap::value_parser!(i32).range(3..))]
    pub(crate) fd: Option<RawFd>,

    /// The image to serve.
    #[arg(long, value_name = "IMAGE", required_unless_present = "config")]
    pub(crate) blk_file: Option<PathBuf>,

    /// Serve many disks: those that this TOML file describes, and those that are added through its control socket. It is read
    /// again on SIGHUP. See vdi-vhost's docs/fleet.md for what it can say.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["blk_file", "socket_path", "fd", "control_socket", "metrics", "metrics_public",
          "read_only", "num_queues", "incoming", "cache", "parents", "image_dirs", "allow_modified_parent", "discard",
          "detect_zeroes", "serial"])]
    pub(crate) config: Option<PathBuf>,

    /// Take over the disks and sockets of the daemon whose control socket this is, at the state in which it has them; the file's list of
    /// disks counts when it is reloaded. That daemon ends when all is done, and serves on if anything fails. If none is there, begin as
    /// without this option.
    #[arg(long, value_name = "CONTROL-SOCKET", requires = "config")]
    pub(crate) take_over: Option<PathBuf>,

    /// Serve it read-only.
    #[arg(long)]
    pub(crate) read_only: bool,

    /// How many queues front ends may use. QEMU wants one per virtual CPU. Queues cost nothing until they are used.
    #[arg(long, value_name = "N", default_value_t = MAX_QUEUES,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub(crate) num_queues: u16,

    /// Where operators send commands; its file is its owner's alone. `vdi resize --online` speaks to it.
    #[arg(long, value_name = "PATH")]
    pub(crate) control_socket: Option<PathBuf>,

    /// Where Prometheus finds metrics over HTTP (/metrics): a loopback address such as 127.0.0.1:9187, or unix:PATH.
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) metrics: Option<Endpoint>,

    /// Let metrics be read from other machines: names of disks, and how much they do.
    #[arg(long, requires = "metrics")]
    pub(crate) metrics_public: bool,

    /// Begin without the image, which another daemon serves: it is opened and locked when the first queue starts, for a
    /// guest that arrives by live migration.
    #[arg(long)]
    pub(crate) incoming: bool,

    /// Whether data go through the host's page cache or past it.
    #[arg(long, value_enum, default_value_t = Cache::Writeback)]
    pub(crate) cache: Cache,

    /// The file of a parent of the image, if it is a differencing one. Can be given several times.
    #[arg(long = "parent", value_name = "FILE")]
    pub(crate) parents: Vec<PathBuf>,

    /// A directory with images that may be parents; the image's own is one. Can be given several times.
    #[arg(long = "image-dir", value_name = "DIR")]
    pub(crate) image_dirs: Vec<PathBuf>,

    /// Serve a child although its parent was written to after the child was made.
    #[arg(long)]
    pub(crate) allow_modified_parent: bool,

    /// Whether guests can give space back to the host.
    #[arg(long, value_enum, default_value_t = Discard::Unmap)]
    pub(crate) discard: Discard,

    /// Whether data that are nothing but zeros are looked for, and take no space.
    #[arg(long, value_enum, default_value_t = DetectZeroes::Off)]
    pub(crate) detect_zeroes: DetectZeroes,

    /// The serial number that the guest sees, at most 20 printable characters [default: from the image's UUID].
    #[arg(long, value_name = "ID", value_parser = parse_serial)]
    pub(crate) serial: Option<Serial>,

    /// How many threads serve the queues of all disks, but for those that have threads of their own by --config [default: one per CPU, at
    /// most one per queue].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub(crate) workers: Option<u16>,

    /// The CPUs that those threads run on, as the kernel lists them: 0-3,8. There is a thread for each, pinned to it; if --workers says
    /// another number, each thread may run on all of these.
    #[arg(long, value_name = "LIST", value_parser = parse_cpus)]
    pub(crate) worker_cpus: Option<CpuList>,

    /// How data are moved.
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto)]
    pub(crate) engine: EngineChoice,

    /// Whether the daemon gives up what it does not need once it has opened its files: system calls, other files, privileges. Whoever
    /// breaks into it could still remove files beside its socket: give the socket a directory of its own.
    #[arg(long, value_enum, default_value_t = Sandboxing::On)]
    pub(crate) sandbox: Sandboxing,

    /// How the log is written to standard error.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,

    /// Print the manual page, or completions for a shell, and exit.
    #[arg(long, value_enum, value_name = "WHAT", exclusive = true)]
    pub(crate) generate: Option<Page>,

    /// Print what this program can do as JSON and exit, whatever else is said.
    #[arg(long)]
    pub(crate) print_capabilities: bool,
}

/// Whether there is a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sandboxing {
    /// Seccomp, landlock, no capabilities, no core dumps.
    On,
    /// None of that, for finding out what it breaks.
    Off,
}

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people; for systemd's journal (JOURNAL_STREAM) with priorities and without times.
    Text,
    /// One object in a line.
    Json,
}

/// What is printed about the program itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Page {
    /// The manual page, vdi-vhost(1).
    Man,
    /// Completions for bash.
    Bash,
    /// Completions for zsh.
    Zsh,
    /// Completions for fish.
    Fish,
}

/// The role of the host's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Cache {
    /// Data go through it; a flush by the guest makes them durable.
    Writeback,
    /// Data go past it (O_DIRECT).
    Direct,
}

/// What `--print-capabilities` prints: docs/interop/vhost-user.json, `VHostUserBackendCapabilities`.
pub(crate) const CAPABILITIES: &str = r#"{
  "type": "block",
  "features": [
    "read-only",
    "blk-file"
  ]
}"#;

/// Whether the capabilities are asked for, which lets everything else be ignored, even nonsense.
pub(crate) fn asks_for_capabilities(args: impl IntoIterator<Item = OsString>) -> bool {
    args.into_iter()
        .skip(1)
        .any(|arg| arg == "--print-capabilities")
}

/// What the command line asks for.
pub(crate) enum Asked {
    /// A disk is to be served.
    Serve(Box<Args>),
    /// A page is to be printed.
    Print(Vec<u8>),
}

/// Reads the command line. Ends the process if it makes no sense.
pub(crate) fn parse() -> Asked {
    let mut command = Args::command();
    let matches = command.get_matches_mut();
    if let Some(page) = matches.get_one::<Page>("generate") {
        return Asked::Print(page.make(command));
    }
    let args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let has_door = args.socket_path.is_some() || args.fd.is_some() || args.config.is_some();
    if !has_door && std::env::var_os("LISTEN_FDS").is_none() {
        let missing = "there is nothing to serve on; give --socket-path PATH or --fd FDNUM, or start it by a socket unit";
        command
            .error(ErrorKind::MissingRequiredArgument, missing)
            .exit();
    }
    Asked::Serve(Box::new(args))
}

impl Page {
    fn make(self, mut command: clap::Command) -> Vec<u8> {
        let mut page = Vec::new();
        let shell = match self {
            Self::Man => {
                let man = clap_mangen::Man::new(command);
                man.render(&mut page).expect("a Vec takes everything");
                return page;
            }
            Self::Bash => Shell::Bash,
            Self::Zsh => Shell::Zsh,
            Self::Fish => Shell::Fish,
        };
        clap_complete::generate(shell, &mut command, "vdi-vhost", &mut page);
        page
    }
}

fn parse_serial(text: &str) -> Result<Serial, String> {
    Serial::new(text).ok_or_else(|| format!("at most {SERIAL_BYTES} printable ASCII characters"))
}

/// CPUs that there are, for this process.
fn parse_cpus(text: &str) -> Result<CpuList, CpuError> {
    let cpus: CpuList = text.parse()?;
    cpus.check().map(|()| cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn one_door_is_given_at_most() {
        assert!(parse("vdi-vhost --blk-file a.vdi --socket-path s").is_ok());
        assert!(parse("vdi-vhost --blk-file a.vdi --fd=3").is_ok());
        // By a socket unit.
        assert!(parse("vdi-vhost --blk-file a.vdi").is_ok());
        assert!(parse("vdi-vhost --blk-file a.vdi --fd=3 --socket-path s").is_err());
    }

    #[test]
    fn values_outside_their_limits_are_refused() {
        let with = |rest| parse(&format!("vdi-vhost --blk-file a --fd=3 {rest}"));
        for bad in [
            "--num-queues 0",
            "--num-queues 257",
            "--workers 0",
            "--worker-cpus 1000",
            "--worker-cpus x",
            "--cache none",
            "--fd=2",
        ] {
            assert!(with(bad).is_err(), "{bad}");
        }
        assert!(with("--serial 123456789012345678901").is_err());
        assert_eq!(with("--num-queues 256").unwrap().num_queues, 256);
    }

    #[test]
    fn capabilities_are_printed_whatever_else_is_said() {
        let asks = |line: &str| asks_for_capabilities(line.split_whitespace().map(OsString::from));
        assert!(asks("vdi-vhost --nonsense --print-capabilities --fd=x"));
        assert!(!asks("vdi-vhost --fd=3"));
        let value: serde_json::Value = serde_json::from_str(CAPABILITIES).unwrap();
        assert_eq!(value["type"], "block");
    }
}
