//! The sandbox: what the daemon gives up before it hears a front end, so that who takes it over by a flaw has taken over
//! little more than the image. On unless `--sandbox off` is said.
//!
//! Not here: which system calls each thread may make (`filters`), and what guests and front ends may do at all.
//!
//! The control thread enters it alone ([`Sandbox::enter`], steps 1 to 3), when images and sockets are open and before any other thread is
//! started; threads inherit that. Workers and housekeepers start then, make what they need and narrow what they may do
//! ([`Sandbox::confine`]); after that the control thread does ([`Sandbox::seal`], step 4). In this order, since each step takes away
//! what the one before needs:
//!
//! 1. No core dumps, no debugger of the same user: guest memory stays here (RLIMIT_CORE, PR_SET_DUMPABLE). A process may open
//!    `/proc/self/fd/N` all the same, as itself.
//! 2. No new privileges, no capabilities. One is kept if need be: a daemon that runs as root and serves another user's files could not
//!    open them again without CAP_DAC_OVERRIDE, and step 3 bounds what that opens.
//! 3. Landlock: no file can be opened but the image (written only if it is served so), its parents and, for a disk that has some, what
//!    lies in the directories where parents are looked for (read only). A rule holds for the file that has the name now: one that takes its
//!    place cannot be opened. Files are removed only from the directories of the sockets, nothing is made or executed. No TCP, and no signals or
//!    abstract sockets to other programs, as far as the kernel knows how to forbid that; a kernel without landlock is warned of.
//!    In a process whose disks come and go (`--config`) images can be opened and made in the directories that the configuration names for
//!    that, and sockets be made in theirs; what lies beside the configuration can be read, since that is read again.
//! 4. The control thread's filter of system calls; sessions and operators have threads that inherit it, and the one that serves metrics narrows it. Only a process whose disks come and go makes
//!    new sockets, local ones. Threads that disks may have for their own (`crew`) were started before, and the control thread binds those, by
//!    their numbers, to CPUs; no other thread of this process or any.
//!
//! What this cannot do: threads share their memory, so who runs code in one can have the others make their calls for him. And
//! io_uring does what it is told behind a filter's back. So the rings of the workers can only move data (`ring`), and once the sandbox is
//! sealed no thread can make another one.
//! RLIMIT_NPROC is left as it is: it counts all of
//! a user's threads, those by which the kernel serves io_uring too.
//!
//! Sources: landlock(7), seccomp(2), capabilities(7), prctl(2), proc_pid_fd(5).

mod filters;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, path_beneath_rules,
};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{AccessFlags, Pid, faccessat};
use vdi_core::Access;

use self::filters::Filters;
pub(crate) use self::filters::Role;
use crate::engine::EngineChoice;

/// The newest landlock that was looked at; the kernel's own counts if it is older.
const LANDLOCK: ABI = ABI::V10;

/// The one capability that may be kept.
const OPEN_ANY_FILE: Capability = Capability::CAP_DAC_OVERRIDE;

/// What may have to be opened, made or removed while guests are served.
#[derive(Debug)]
pub(crate) struct Reach {
    /// The images, and what they are opened for.
    pub(crate) images: Vec<(PathBuf, Access)>,
    /// The files of their parents.
    pub(crate) parents: Vec<PathBuf>,
    /// Where parents are looked for, and where the configuration is.
    pub(crate) directories: Vec<PathBuf>,
    /// Where images are that operators may add, and where snapshots are made.
    pub(crate) image_dirs: Vec<PathBuf>,
    /// The sockets, which are removed at the end.
    pub(crate) sockets: Vec<PathBuf>,
    /// Where sockets of disks that are added are made.
    pub(crate) socket_dir: Option<PathBuf>,
    /// Whether disks may be added.
    pub(crate) grows: bool,
}

/// Why the daemon does not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    /// A limit, or an attribute of the process.
    #[error("cannot forbid core dumps and new privileges; `--sandbox off` does without")]
    Process(#[from] Errno),
    /// Capabilities.
    #[error("cannot drop capabilities; `--sandbox off` does without")]
    Capabilities(#[from] CapsError),
    /// Landlock, though the kernel has it.
    #[error("cannot restrict which files can be opened; `--sandbox off` does without")]
    Files(#[from] RulesetError),
    /// The filter of system calls.
    #[error("cannot restrict system calls; `--sandbox off` does without")]
    Calls(#[from] seccompiler::Error),
}

/// The sandbox that this process is in, if it is.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox(Option<Arc<Filters>>);

impl Sandbox {
    /// No sandbox.
    pub(crate) fn off() -> Self {
        tracing::warn!(
            "--sandbox off: a flaw in this program would expose all that its user may do"
        );
        Self(None)
    }

    /// Puts this thread, and all that it will start, into the sandbox, but for the filters of system calls. There must be no other
    /// thread yet.
    pub(crate) fn enter(reach: &Reach, engine: EngineChoice) -> Result<Self, SandboxError> {
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        prctl::set_dumpable(false)?;
        prctl::set_no_new_privs()?;
        drop_capabilities(reach)?;
        let status = restrict_files(reach)?;
        if status.ruleset == RulesetStatus::NotEnforced {
            tracing::warn!(
                "this kernel has no landlock: which files a flaw in this program would expose is not restricted"
            );
        } else {
            tracing::debug!("landlock: {:?}", status.landlock);
        }
        Ok(Self(Some(Arc::new(Filters::new(engine, reach.grows)?))))
    }

    /// Filters the control thread's calls, when the threads that need others have started.
    /// It may bind these to CPUs.
    pub(crate) fn seal(&self, bound: &[Pid]) -> Result<(), SandboxError> {
        match &self.0 {
            Some(filters) => Ok(filters.seal(bound)?),
            None => Ok(()),
        }
    }

    /// Narrows what this thread may do to its role, for good. Called when the thread has what it needs.
    pub(crate) fn confine(&self, role: Role) -> io::Result<()> {
        match &self.0 {
            Some(filters) => filters.apply(role).map_err(io::Error::other),
            None => Ok(()),
        }
    }
}

/// Drops all capabilities, of this process and whatever it would execute; except the one without which it could not open
/// its files again.
fn drop_capabilities(reach: &Reach) -> Result<(), CapsError> {
    let held = caps::read(None, CapSet::Permitted)?;
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        caps::clear(None, CapSet::Bounding)?;
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::clear(None, CapSet::Effective)?;
    let mut kept = CapsHashSet::new();
    if held.contains(&OPEN_ANY_FILE) && !reach.is_ours() {
        tracing::debug!("{OPEN_ANY_FILE} is kept: the files are another user's");
        kept.insert(OPEN_ANY_FILE);
    }
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

fn restrict_files(reach: &Reach) -> Result<RestrictionStatus, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = read | AccessFs::WriteFile | AccessFs::Truncate;
    let images = |wanted: Access| {
        let of_kind = move |(_, access): &&(PathBuf, Access)| *access == wanted;
        reach.images.iter().filter(of_kind).map(|(path, _)| path)
    };
    let make = write | AccessFs::MakeReg | AccessFs::RemoveFile;
    let make_sockets = AccessFs::MakeSock | AccessFs::RemoveFile;
    Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?
        .create()?
        .add_rules(path_beneath_rules(images(Access::ReadOnly), read))?
        .add_rules(path_beneath_rules(images(Access::Writable), write))?
        .add_rules(path_beneath_rules(&reach.parents, read))?
        .add_rules(path_beneath_rules(&reach.directories, read))?
        .add_rules(path_beneath_rules(&reach.image_dirs, make))?
        .add_rules(path_beneath_rules(
            reach.socket_directories(),
            AccessFs::RemoveFile,
        ))?
        .add_rules(path_beneath_rules(&reach.socket_dir, make_sockets))?
        .restrict_self()
}

impl Reach {
    /// Forgets what is said twice: a thousand disks have few directories.
    pub(crate) fn tidy(&mut self) {
        for paths in [&mut self.parents, &mut self.directories] {
            paths.sort_unstable();
            paths.dedup();
        }
    }

    fn socket_directories(&self) -> BTreeSet<&Path> {
        self.sockets.iter().map(|path| directory_of(path)).collect()
    }

    /// Whether everything can be opened, made or removed with the rights that are effective now.
    fn is_ours(&self) -> bool {
        let (read, write) = (AccessFlags::R_OK, AccessFlags::W_OK);
        let search = AccessFlags::X_OK;
        let of = |access: &Access| match access {
            Access::ReadOnly => read,
            Access::Writable => read | write,
        };
        self.images
            .iter()
            .all(|(path, access)| may(path, of(access)))
            && self.parents.iter().all(|path| may(path, read))
            && self.directories.iter().all(|path| may(path, read | search))
            && self
                .image_dirs
                .iter()
                .all(|path| may(path, read | write | search))
            && self
                .socket_directories()
                .into_iter()
                .chain(self.socket_dir.as_deref())
                .all(|path| may(path, write | search))
    }
}

/// The directory that a path's last name is in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    }
}

fn may(path: &Path, access: AccessFlags) -> bool {
    faccessat(AT_FDCWD, path, access, AtFlags::AT_EACCESS) != Err(Errno::EACCES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_one_name_lies_in_the_working_directory() {
        assert_eq!(directory_of(Path::new("a.vdi")), Path::new("."));
        assert_eq!(directory_of(Path::new("b/a.vdi")), Path::new("b"));
        assert_eq!(directory_of(Path::new("/a.vdi")), Path::new("/"));
    }
}
