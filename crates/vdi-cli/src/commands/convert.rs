//! `vdi convert`: a disk into another file, raw or VDI.

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use vdi_core::convert::{self, CopyOptions, Destination, End, NewImage, Progress, RawDisk};
use vdi_core::{Access, Capacity, CreateOptions, Locking};

use crate::args::{ConvertArgs, Format};
use crate::commands::{Failure, existing, open_end, options, refuse_same, stop_on_signals};
use crate::new_file::NewFile;

pub(super) fn run(args: &ConvertArgs) -> Result<ExitCode, Failure> {
    if args.output_format == Format::Raw && args.layout.is_given() {
        return Err(Failure::LayoutOfRaw);
    }
    let stop = stop_on_signals()?;
    let from = open_end(&args.source, args.source_format, &args.open)?;
    refuse_same(&args.source, &args.destination)?;
    refuse_parent(&from, &args.destination)?;
    let copying = Copying {
        from: &args.source,
        to: &args.destination,
        options: args.copying.options(),
        is_quiet: args.quiet,
    };
    if is_device(&args.destination) {
        let to = open_device(args)?;
        copy(&copying, &from, to, &stop)?;
        return Ok(ExitCode::SUCCESS);
    }
    let new = NewFile::beside(&args.destination, existing(args.force))?;
    let to = create_destination(args, new.path(), from.capacity())?;
    // The locks go with it, before the name comes: whoever sees it can open it.
    copy(&copying, &from, to, &stop)?;
    new.publish()?;
    Ok(ExitCode::SUCCESS)
}

/// With --force-share no lock protects the parents of what is copied.
fn refuse_parent(from: &End, to: &Path) -> Result<(), Failure> {
    let Ok(there) = fs::metadata(to) else {
        return Ok(());
    };
    if from.is_in_file(there.dev(), there.ino()) {
        let path = to.to_owned();
        return Err(Failure::OverParent { path });
    }
    Ok(())
}

fn open_device(args: &ConvertArgs) -> Result<Destination, Failure> {
    let path = args.destination.clone();
    if args.output_format == Format::Vdi {
        return Err(Failure::ImageOnDevice { path });
    }
    if !args.force {
        return Err(Failure::DeviceWithoutForce { path });
    }
    RawDisk::open(&path, Access::Writable, Locking::Locked)
        .map(Destination::Raw)
        .map_err(|source| Failure::OpenRaw { path, source })
}

fn create_destination(
    args: &ConvertArgs,
    path: &Path,
    capacity: Capacity,
) -> Result<Destination, Failure> {
    match args.output_format {
        Format::Raw => match RawDisk::create(path, capacity) {
            Ok(raw) => Ok(Destination::Raw(raw)),
            Err(source) => Err(Failure::CreateRaw {
                path: args.destination.clone(),
                source,
            }),
        },
        Format::Vdi => create_image(
            &args.destination,
            path,
            &options(capacity.bytes(), &args.layout),
        ),
    }
}

/// Makes an image that will be called `name` at `path`.
pub(super) fn create_image(
    name: &Path,
    path: &Path,
    options: &CreateOptions,
) -> Result<Destination, Failure> {
    match NewImage::create(path, options) {
        Ok(image) => Ok(Destination::Image(image)),
        Err(source) => Err(Failure::CreateImage {
            path: name.to_owned(),
            source,
        }),
    }
}

/// How a disk is copied, and what that is called to its user.
pub(super) struct Copying<'a> {
    pub(super) from: &'a Path,
    pub(super) to: &'a Path,
    pub(super) options: CopyOptions,
    pub(super) is_quiet: bool,
}

/// Copies, with a progress bar if somebody looks, until a signal comes.
pub(super) fn copy(
    copying: &Copying<'_>,
    from: &End,
    to: Destination,
    stop: &AtomicBool,
) -> Result<(), Failure> {
    let bar = if copying.is_quiet {
        ProgressBar::hidden()
    } else {
        ProgressBar::new(from.capacity().bytes())
    };
    bar.set_style(
        ProgressStyle::with_template(
            "{wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        )
        .expect("the template is right"),
    );
    let mut go_on = |progress: Progress| {
        bar.set_position(progress.done_bytes);
        if stop.load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    };
    let copied = convert::copy(from, to, copying.options, &mut go_on);
    bar.finish_and_clear();
    copied.map_err(|source| Failure::Copy {
        from: copying.from.to_owned(),
        to: copying.to.to_owned(),
        source,
    })
}

fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())
}
