//! The images of one medium: made when they are first asked for, gone when this is.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::Arc;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::back_end::{Programs, Server};
use crate::contents::{self, Contents};
use crate::medium::Medium;
use crate::workload::{Disk, Workload};

/// How long a disk is whose blocks are all to be allocated once: 64 Ki blocks of 1 MiB.
const FRESH_BYTES: u64 = 64 << 30;
/// The unit of allocation of all VDI images here, VirtualBox's own.
pub(crate) const BLOCK: u64 = 1 << 20;
/// The unit of allocation of the top image of [`Disk::FreshSmallChain`].
const SMALL_BLOCK: &str = "128k";

/// In what pieces the data of full images come into the page cache.
const PIECE_BYTES: usize = 128 << 10;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    #[error("{} cannot be made or changed", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{program} cannot be started; is it installed or built?")]
    Start {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("{program} ended with {status}: {said}")]
    Program {
        program: String,
        status: ExitStatus,
        said: String,
    },
}

/// An image and what it must read as.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) contents: Arc<Contents>,
    /// Loads that visit each block once end here, so that they do not fill the medium.
    pub(crate) end: u64,
}

/// The images on one medium.
pub(crate) struct Images<'a> {
    directory: tempfile::TempDir,
    medium: Medium,
    programs: &'a Programs,
    bytes: u64,
    kept: HashMap<(Disk, Kind), Image>,
}

/// fio has a raw file of its own, since it stamps nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Vdi,
    Raw,
    Qcow2,
    Fio,
}

impl Kind {
    fn of(server: Server) -> Self {
        match server {
            Server::VdiVhost | Server::Other | Server::QsdVdi | Server::QsdVdiUring => Self::Vdi,
            Server::QsdRaw => Self::Raw,
            Server::QsdQcow2 => Self::Qcow2,
            Server::Fio => Self::Fio,
        }
    }
}

impl<'a> Images<'a> {
    /// A place on a medium for images of so many bytes.
    pub(crate) fn on(
        medium: Medium,
        on_disk: &Path,
        programs: &'a Programs,
        bytes: u64,
    ) -> Result<Self, ImageError> {
        let parent = medium.parent(on_disk);
        let made = fs::create_dir_all(&parent).and_then(|()| {
            tempfile::Builder::new()
                .prefix("vdi-bench.")
                .tempdir_in(&parent)
        });
        let directory = made.map_err(|source| ImageError::File {
            path: parent,
            source,
        })?;
        Ok(Self {
            directory,
            medium,
            programs,
            bytes,
            kept: HashMap::new(),
        })
    }

    /// Where the images are.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The image for one round of a workload.
    pub(crate) fn prepare(
        &mut self,
        workload: &Workload,
        server: Server,
    ) -> Result<Image, ImageError> {
        let kind = Kind::of(server);
        match workload.disk {
            // A chain costs fio nothing: it reads the raw file.
            Disk::Chain if kind == Kind::Fio => self.kept(Disk::Full, kind),
            Disk::Full | Disk::Empty | Disk::Refilled | Disk::Chain => {
                self.kept(workload.disk, kind)
            }
            Disk::Fresh => self.fresh(workload, server),
            Disk::FreshChain | Disk::FreshSmallChain => self.fresh_child(workload.disk, kind),
        }
    }

    fn kept(&mut self, disk: Disk, kind: Kind) -> Result<Image, ImageError> {
        if let Some(image) = self.kept.get(&(disk, kind)) {
            return Ok(image.clone());
        }
        let path = self.path(disk, kind);
        let contents = match disk {
            Disk::Full | Disk::Chain => Contents::filled(self.bytes),
            Disk::Empty
            | Disk::Fresh
            | Disk::Refilled
            | Disk::FreshChain
            | Disk::FreshSmallChain => Contents::zeros(self.bytes),
        };
        match disk {
            Disk::Full => self.make_full(&path, kind)?,
            Disk::Chain => self.make_child(&path, disk, kind)?,
            Disk::Empty
            | Disk::Fresh
            | Disk::Refilled
            | Disk::FreshChain
            | Disk::FreshSmallChain => self.make_empty(&path, kind, self.bytes)?,
        }
        self.settle(&path)?;
        let image = Image {
            path,
            contents: Arc::new(contents),
            end: self.bytes,
        };
        self.kept.insert((disk, kind), image.clone());
        Ok(image)
    }

    fn fresh(&self, workload: &Workload, server: Server) -> Result<Image, ImageError> {
        let path = self.path(Disk::Fresh, Kind::of(server));
        remove(&path)?;
        self.make_empty(&path, Kind::of(server), FRESH_BYTES)?;
        // QEMU writes whole blocks, whatever was asked for.
        let whole_blocks = matches!(server, Server::QsdVdi | Server::QsdVdiUring)
            || workload.bytes as u64 == BLOCK;
        let end = if whole_blocks {
            4 * self.bytes
        } else {
            FRESH_BYTES
        };
        Ok(Image {
            path,
            contents: Arc::new(Contents::zeros(FRESH_BYTES)),
            end,
        })
    }

    fn fresh_child(&mut self, disk: Disk, kind: Kind) -> Result<Image, ImageError> {
        let path = self.path(disk, kind);
        remove(&path)?;
        self.make_child(&path, disk, kind)?;
        Ok(Image {
            path,
            contents: Arc::new(Contents::filled(self.bytes)),
            end: self.bytes,
        })
    }

    fn path(&self, disk: Disk, kind: Kind) -> PathBuf {
        let extension = match kind {
            Kind::Vdi => "vdi",
            Kind::Raw => "raw",
            Kind::Qcow2 => "qcow2",
            Kind::Fio => "fio.raw",
        };
        let name = format!("{disk:?}.{extension}").to_lowercase();
        self.directory.path().join(name)
    }

    fn make_empty(&self, path: &Path, kind: Kind, bytes: u64) -> Result<(), ImageError> {
        match kind {
            Kind::Vdi => {
                let mut vdi = Command::new(&self.programs.vdi);
                run(vdi.arg("create").arg(path).arg(bytes.to_string()))
            }
            Kind::Raw | Kind::Fio => {
                let made = File::create(path).and_then(|file| file.set_len(bytes));
                made.map_err(|source| ImageError::File {
                    path: path.to_owned(),
                    source,
                })
            }
            Kind::Qcow2 => unreachable!("QCOW2 images are in chains only"),
        }
    }

    fn make_full(&self, path: &Path, kind: Kind) -> Result<(), ImageError> {
        self.make_with_any_tool(path, kind)?;
        if self.medium != Medium::Buffered {
            return Ok(());
        }
        write_anew(path).map_err(|source| ImageError::File {
            path: path.to_owned(),
            source,
        })
    }

    fn make_with_any_tool(&self, path: &Path, kind: Kind) -> Result<(), ImageError> {
        if let Kind::Raw | Kind::Fio = kind {
            return fill(path, self.bytes);
        }
        let raw = self.directory.path().join("filled.raw");
        fill(&raw, self.bytes)?;
        if kind == Kind::Vdi {
            let mut vdi = Command::new(&self.programs.vdi);
            run(vdi
                .args(["convert", "-q", "-f", "raw", "-O", "vdi"])
                .args([&raw, path]))?;
        } else {
            let mut qemu_img = Command::new("qemu-img");
            run(qemu_img
                .args(["convert", "-f", "raw", "-O", "qcow2"])
                .args([&raw, path]))?;
        }
        remove(&raw)
    }

    /// Makes a child of a child of a full image.
    fn make_child(&mut self, path: &Path, disk: Disk, kind: Kind) -> Result<(), ImageError> {
        let extension = if kind == Kind::Vdi { "vdi" } else { "qcow2" };
        let base = self.directory.path().join(format!("base.{extension}"));
        let middle = self.directory.path().join(format!("middle.{extension}"));
        if !base.exists() {
            self.make_full(&base, kind)?;
            self.settle(&base)?;
            self.make_child_of(&base, &middle, Disk::FreshChain, kind)?;
        }
        self.make_child_of(&middle, path, disk, kind)
    }

    fn make_child_of(
        &self,
        parent: &Path,
        child: &Path,
        disk: Disk,
        kind: Kind,
    ) -> Result<(), ImageError> {
        let small = (disk == Disk::FreshSmallChain).then_some(SMALL_BLOCK);
        if kind == Kind::Vdi {
            let mut vdi = Command::new(&self.programs.vdi);
            let block = small.into_iter().flat_map(|size| ["--block-size", size]);
            return run(vdi.arg("snapshot").args(block).args([parent, child]));
        }
        let mut qemu_img = Command::new("qemu-img");
        let cluster = small.map(|size| ["-o".to_owned(), format!("cluster_size={size}")]);
        qemu_img.args(["create", "-q", "-f", "qcow2"]);
        qemu_img.args(cluster.into_iter().flatten());
        qemu_img.args(["-F", "qcow2", "-b"]);
        run(qemu_img.args([parent, child]))
    }

    /// Has the file written to its medium, so that this does not happen while something is measured.
    fn settle(&self, path: &Path) -> Result<(), ImageError> {
        let settled = File::open(path).and_then(|file| {
            file.sync_all()?;
            if self.medium.is_direct() {
                posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            }
            Ok(())
        });
        settled.map_err(|source| ImageError::File {
            path: path.to_owned(),
            source,
        })
    }
}

fn fill(path: &Path, bytes: u64) -> Result<(), ImageError> {
    contents::fill(path, bytes).map_err(|source| ImageError::File {
        path: path.to_owned(),
        source,
    })
}

/// Has a file be in the page cache, and as if it had been written in pieces of [`PIECE_BYTES`], whoever made it: some tools write past the
/// page cache, and how fast its pages are read and written depends on how large they were when they came.
fn write_anew(path: &Path) -> io::Result<()> {
    let new = path.with_extension("new");
    let (mut from, mut to) = (File::open(path)?, File::create(&new)?);
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let len = from.read(&mut piece)?;
        if len == 0 {
            break;
        }
        to.write_all(&piece[..len])?;
    }
    to.sync_all()?;
    fs::rename(new, path)
}

/// Removes a file that may be there.
pub(crate) fn remove(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(ImageError::File {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

/// Runs a tool that makes images.
pub(crate) fn run(command: &mut Command) -> Result<(), ImageError> {
    let program = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).output();
    match output {
        Err(source) => Err(ImageError::Start { program, source }),
        Ok(Output { status, .. }) if status.success() => Ok(()),
        Ok(Output { status, stderr, .. }) => {
            let said = String::from_utf8_lossy(&stderr).into_owned();
            Err(ImageError::Program {
                program,
                status,
                said,
            })
        }
    }
}
