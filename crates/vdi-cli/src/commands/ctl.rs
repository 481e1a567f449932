//! `vdi ctl`: one command of the control socket for each word.
//!
//! A command is an arm in [`carry_out`] (its name, its arguments, how people see the answer) and its words in `args::ctl`.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use serde_json::{Map, Value, json};

use super::{Failure, done, output};
use crate::args::{AddArgs, CtlArgs, CtlCommand, Limit, NewSize};
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
enum Shown {
    /// There is nothing to see.
    Nothing,
    Object(Value),
    Disks(Value),
    Stats(Value),
    AllStats(Value),
}

pub(super) fn run(args: CtlArgs) -> Result<ExitCode, Failure> {
    let mut daemon = Daemon::at(&args.socket)?;
    let mut out = output();
    if let CtlCommand::Raw { message } = &args.command {
        let answer = daemon.say(message)?;
        write!(out, "{answer}")?;
        let answer: Option<BTreeMap<String, Value>> = serde_json::from_str(&answer).ok();
        let is_done = answer.is_some_and(|answer| answer.contains_key("return"));
        let code = if is_done {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
        return done(out, code);
    }
    let shown = carry_out(&mut daemon, args.command)?;
    match (shown, args.json) {
        (Shown::Nothing, true) => report::json(&mut out, &json!({}))?,
        (Shown::Nothing, false) => {}
        (
            Shown::Object(value)
            | Shown::Disks(value)
            | Shown::Stats(value)
            | Shown::AllStats(value),
            true,
        ) => report::json(&mut out, &value)?,
        (Shown::Object(value), false) => report::object(&mut out, &value)?,
        (Shown::Disks(value), false) => report::disks(&mut out, &value)?,
        (Shown::Stats(value), false) => report::stats(&mut out, &value)?,
        (Shown::AllStats(value), false) => report::all_stats(&mut out, &value)?,
    }
    done(out, ExitCode::SUCCESS)
}

fn carry_out(daemon: &mut Daemon, command: CtlCommand) -> Result<Shown, Failure> {
    Ok(match command {
        CtlCommand::List => Shown::Disks(daemon.ask("list", Value::Null)?),
        CtlCommand::Info(which) => Shown::Object(daemon.ask("info", json!({"disk": which.disk}))?),
        CtlCommand::Stats(which) => match which.disk {
            Some(disk) => Shown::Stats(daemon.ask("stats", json!({"disk": disk}))?),
            None => Shown::AllStats(daemon.ask("stats-of-all", Value::Null)?),
        },
        CtlCommand::Add(args) => Shown::Object(daemon.ask("add", table(&args)?)?),
        CtlCommand::Remove { disk } => {
            daemon.ask("remove", json!({"disk": disk}))?;
            Shown::Nothing
        }
        CtlCommand::Resize { disk, size } => Shown::Object(resize(daemon, &disk, size)?),
        CtlCommand::Snapshot { disk, to } => {
            let to = absolute(&to)?;
            Shown::Object(daemon.ask("snapshot", json!({"disk": disk, "to": to}))?)
        }
        CtlCommand::SetLimits { disk, limits } => {
            let limits = of_words(limits)?;
            daemon.ask("set-limits", json!({"disk": disk, "limits": limits}))?;
            Shown::Nothing
        }
        CtlCommand::Reload => Shown::Object(daemon.ask("reload", Value::Null)?),
        CtlCommand::Shutdown => {
            daemon.ask("shutdown", Value::Null)?;
            Shown::Nothing
        }
        CtlCommand::Raw { message } => Shown::Object(message),
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
    Ok(daemon.ask("resize", json!({"disk": disk, "size_bytes": size_bytes}))?)
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
fn table(args: &AddArgs) -> Result<Value, Failure> {
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
    say("name", json!(args.name));
    say("image", json!(absolute(&args.image)?));
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
