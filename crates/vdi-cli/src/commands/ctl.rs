//! `vdi ctl`: one command of the control socket for each word.
//!
//! A command is an arm in [`message`] (its name, its arguments, how people see the answer) and its words in `args::ctl`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Map, Value, json};

use super::{Failure, done, output};
use crate::args::{CtlArgs, CtlCommand, DiskArgs, Limit, NewSize, Said, Which};
use crate::daemon::{Daemon, Info};
use crate::report;

/// Why a command was not even sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotSent {
    #[error(
        "{disk} has {from} bytes, and can only grow while it is served; stop its guest and use `vdi resize --shrink`"
    )]
    Smaller { disk: String, from: u64 },
    #[error("`none` ends all limits; give either it or limits")]
    NoneAndSome,
}

/// How people see an answer.
#[derive(Clone, Copy)]
enum Shown {
    Nothing,
    Object,
    Disks,
    Stats,
    AllStats,
    Jobs,
    Level,
    Dump,
}

pub(super) fn run(args: CtlArgs) -> Result<ExitCode, Failure> {
    let mut daemon = Daemon::at(&args.socket)?;
    let command = match args.said {
        Said::Command(command) => command,
        Said::Raw { message } => return raw(&mut daemon, &message),
    };
    let (shown, name, arguments) = message(&mut daemon, command)?;
    let value = daemon.ask(name, arguments)?;
    let mut out = output();
    if args.json {
        report::json(&mut out, &value)?;
    } else {
        match shown {
            Shown::Nothing => {}
            Shown::Object => report::object(&mut out, &value)?,
            Shown::Disks => report::disks(&mut out, &value)?,
            Shown::Stats => report::stats(&mut out, &value)?,
            Shown::AllStats => report::all_stats(&mut out, &value)?,
            Shown::Jobs => report::jobs(&mut out, &value)?,
            Shown::Level => report::level(&mut out, &value)?,
            Shown::Dump => report::dump(&mut out, &value)?,
        }
    }
    done(out, ExitCode::SUCCESS)
}

fn raw(daemon: &mut Daemon, message: &Value) -> Result<ExitCode, Failure> {
    let answer = daemon.say(message)?;
    let mut out = output();
    write!(out, "{answer}")?;
    let answer: Option<BTreeMap<String, Value>> = serde_json::from_str(&answer).ok();
    let is_done = answer.is_some_and(|answer| answer.contains_key("return"));
    let code = if is_done {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    };
    done(out, code)
}

/// What is sent, and how people see what comes back.
fn message(
    daemon: &mut Daemon,
    command: CtlCommand,
) -> Result<(Shown, &'static str, Value), Failure> {
    let of = |which: Which| json!({"disk": which.disk});
    Ok(match command {
        CtlCommand::List => (Shown::Disks, "list", Value::Null),
        CtlCommand::Info(which) => (Shown::Object, "info", of(which)),
        CtlCommand::Stats(Which { disk: None }) => (Shown::AllStats, "stats-of-all", Value::Null),
        CtlCommand::Stats(which) => (Shown::Stats, "stats", of(which)),
        CtlCommand::Add(args) => {
            let disk = table(&args.name, &args.image, args.served)?;
            (Shown::Object, "add", disk)
        }
        CtlCommand::Clone(args) => {
            let disk = table(&args.name, &args.image, args.served)?;
            let (of, block) = (absolute(&args.of)?, args.block_size);
            let arguments = json!({"of": of, "block_size_bytes": block, "add": disk});
            (Shown::Object, "clone", arguments)
        }
        CtlCommand::Remove { disk } => (Shown::Nothing, "remove", json!({"disk": disk})),
        CtlCommand::Resize { disk, size } => {
            (Shown::Object, "resize", resize(daemon, &disk, size)?)
        }
        CtlCommand::Snapshot {
            disk,
            to,
            block_size,
        } => {
            let to = absolute(&to)?;
            let arguments = json!({"disk": disk, "to": to, "block_size_bytes": block_size});
            (Shown::Object, "snapshot", arguments)
        }
        CtlCommand::Commit { disk, keep } => {
            let arguments = json!({"disk": disk, "keep": keep});
            (Shown::Object, "commit", arguments)
        }
        CtlCommand::Jobs => (Shown::Jobs, "jobs", Value::Null),
        CtlCommand::Cancel(which) => (Shown::Object, "cancel", of(which)),
        CtlCommand::SetLimits {
            group,
            name,
            limits,
        } => {
            let whose = if group { "group" } else { "disk" };
            let arguments = json!({whose: name, "limits": of_words(limits)?});
            (Shown::Nothing, "set-limits", arguments)
        }
        CtlCommand::AddGroup { name, limits } => {
            let arguments = json!({"name": name, "limits": of_words(limits)?});
            (Shown::Nothing, "add-group", arguments)
        }
        CtlCommand::RemoveGroup { group } => {
            (Shown::Nothing, "remove-group", json!({"group": group}))
        }
        CtlCommand::JoinGroup { disk, group } => {
            let arguments = json!({"disk": disk, "group": group});
            (Shown::Nothing, "join-group", arguments)
        }
        CtlCommand::LeaveGroup(which) => (Shown::Nothing, "leave-group", of(which)),
        CtlCommand::Pause(which) => (Shown::Nothing, "pause", of(which)),
        CtlCommand::Resume(which) => (Shown::Nothing, "resume", of(which)),
        CtlCommand::LogLevel { level } => (Shown::Level, "log-level", json!({"level": level})),
        CtlCommand::Dump(which) => (Shown::Dump, "dump", of(which)),
        CtlCommand::Reload => (Shown::Object, "reload", Value::Null),
        CtlCommand::Shutdown => (Shown::Nothing, "shutdown", Value::Null),
    })
}

fn resize(daemon: &mut Daemon, disk: &str, size: NewSize) -> Result<Value, Failure> {
    let info: Info = daemon.ask_for("info", json!({"disk": disk}))?;
    let from = info.size_bytes;
    let to = size.from(from).filter(|to| *to >= from);
    let smaller = || NotSent::Smaller {
        disk: disk.to_owned(),
        from,
    };
    let size_bytes = to.ok_or_else(smaller)?;
    Ok(json!({"disk": disk, "size_bytes": size_bytes}))
}

fn of_words(words: Vec<Limit>) -> Result<Map<String, Value>, NotSent> {
    let (count, mut limits) = (words.len(), Map::new());
    for (key, value) in words.into_iter().flatten() {
        limits.insert(key, value.into());
    }
    if limits.is_empty() || limits.len() == count {
        Ok(limits)
    } else {
        Err(NotSent::NoneAndSome)
    }
}

/// A disk as the daemon's configuration has it; what was not said is left out.
fn table(name: &str, image: &Path, args: DiskArgs) -> Result<Value, Failure> {
    let mut table = Map::new();
    let mut say = |key: &str, value: Value| {
        if !value.is_null() {
            table.insert(key.to_owned(), value);
        }
    };
    let list = |paths: &[std::path::PathBuf]| {
        let all: Result<Vec<_>, _> = paths.iter().map(|path| absolute(path)).collect();
        all.map(|all| {
            if all.is_empty() {
                Value::Null
            } else {
                json!(all)
            }
        })
    };
    let yes = |is: bool| if is { json!(true) } else { Value::Null };
    say("name", json!(name));
    say("image", json!(absolute(image)?));
    if let Some(socket) = &args.disk_socket {
        say("socket", json!(absolute(socket)?));
    }
    say("read-only", yes(args.read_only));
    say("num-queues", json!(args.num_queues));
    say("cache", json!(args.cache));
    say("parents", list(&args.parents)?);
    say("image-dirs", list(&args.image_dirs)?);
    say("allow-modified-parent", yes(args.allow_modified_parent));
    say("discard", json!(args.discard));
    say("detect-zeroes", json!(args.detect_zeroes));
    say("serial", json!(args.serial));
    say("incoming", yes(args.incoming));
    say("workers", json!(args.workers));
    say("worker-cpus", json!(args.worker_cpus));
    say("group", json!(args.group));
    if !args.limits.is_empty() {
        say("limits", of_words(args.limits)?.into());
    }
    Ok(table.into())
}

/// The daemon has a working directory of its own.
fn absolute(path: &Path) -> Result<std::path::PathBuf, Failure> {
    std::path::absolute(path).map_err(|source| Failure::Look {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_all_those_that_are_named_or_none() {
        let some = |value| Some(("iops_total".to_owned(), value));
        assert_eq!(of_words(vec![some(5)]).unwrap()["iops_total"], 5);
        assert!(of_words(vec![None]).unwrap().is_empty());
        assert!(of_words(vec![None, some(5)]).is_err());
    }
}
