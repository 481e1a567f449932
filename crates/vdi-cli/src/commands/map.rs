//! `vdi map`: where the data of a disk are, as a table, as JSON, and as pictures.

use std::env;
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anstream::{AutoStream, ColorChoice};
use vdi_core::{Access, Capacity, SectorRange};

use super::{
    Failure, chain_options, done, existing, find_files, locking, modified_parent, open_files,
    output, refuse_same, stop_on_signals,
};
use crate::args::MapArgs;
use crate::new_file::NewFile;
use crate::report::{self, Colours, Scene, Shades, Terminal};

pub(super) fn run(args: &MapArgs) -> Result<ExitCode, Failure> {
    let chain = &args.open.chain;
    let options = chain_options(chain, locking(&args.open));
    let files = find_files(&args.file, Access::ReadOnly, &options)?;
    let paths: Vec<PathBuf> = files.iter().map(|file| file.path().to_owned()).collect();
    let disk = open_files(&args.file, files, Access::ReadOnly, modified_parent(chain))?;
    let scene = Scene {
        images: disk.images(),
        files: &paths,
    };
    if let Some(path) = &args.svg {
        write_svg(&scene, path, args)?;
        return Ok(ExitCode::SUCCESS);
    }
    let visit = disk.lane().enter();
    let mut out = output();
    let range = part(args, disk.capacity());
    let (start, extents) = (range.start_bytes(), disk.map(range, &visit));
    if args.output.is_json() {
        report::map_json(&mut out, start, extents, &paths)?;
    } else if args.strip {
        report::strip(&mut out, &scene, terminal())?;
    } else {
        report::map(&mut out, start, extents, &paths)?;
        // Behind the table, which may be long: this is what stays on the screen.
        if io::stdout().is_terminal() {
            writeln!(out)?;
            report::strip(&mut out, &scene, terminal())?;
        }
    }
    done(out, ExitCode::SUCCESS)
}

/// The part of the disk that was asked for, in whole sectors.
fn part(args: &MapArgs, capacity: Capacity) -> SectorRange {
    let end = capacity.bytes();
    let from = args.start_offset.min(end);
    let to = args
        .max_length
        .map_or(end, |len| from.saturating_add(len).min(end));
    capacity
        .range_around_bytes(from..to)
        .expect("both lie on the disk")
}

/// What standard output can show, by what its environment says.
fn terminal() -> Terminal {
    let columns = terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| width.0);
    // The first that says something counts, see locale(7).
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .into_iter()
        .filter_map(env::var_os)
        .find(|value| !value.is_empty())
        .map(|value| value.to_string_lossy().to_lowercase());
    let is_utf8 = locale.is_some_and(|name| name.contains("utf-8") || name.contains("utf8"));
    Terminal {
        columns: columns.unwrap_or(80),
        shades: if is_utf8 {
            Shades::Blocks
        } else {
            Shades::Ascii
        },
        colours: match AutoStream::choice(&io::stdout()) {
            ColorChoice::Never => Colours::None,
            ColorChoice::Auto | ColorChoice::Always | ColorChoice::AlwaysAnsi => Colours::Ansi256,
        },
    }
}

fn write_svg(scene: &Scene<'_>, path: &Path, args: &MapArgs) -> Result<(), Failure> {
    for image in scene.files {
        // With --force-share no lock protects it.
        refuse_same(image, path)?;
    }
    let look = |source| Failure::Look {
        path: args.file.clone(),
        source,
    };
    let picture = report::svg(scene).map_err(look)?;
    let stop = stop_on_signals()?;
    let new = NewFile::beside(path, existing(args.force))?;
    let write = |source| Failure::Picture {
        path: path.to_owned(),
        source,
    };
    fs::write(new.path(), picture).map_err(write)?;
    if stop.load(Ordering::Relaxed) {
        return Err(Failure::Interrupted);
    }
    new.publish()?;
    Ok(())
}
