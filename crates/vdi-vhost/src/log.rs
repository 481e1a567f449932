//! What is said, and in which form: text for people, for the journal, or JSON for collectors of logs.
//!
//! Source for the journal's form: sd-daemon(3), `SD_NOTICE` and the like.

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::OnceLock;

use serde::Deserialize;
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{ParseError, Targets};
use tracing_subscriber::fmt::format::{Compact, Format, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, format};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::LogFormat;

/// It logs whatever a guest does wrong, without limit.
const UNLIMITED: &str = "virtio_queue";

/// How the filter is changed; nothing is before the log begins.
static FILTERED: OnceLock<Box<dyn Filtered>> = OnceLock::new();

/// A filter whose log may have any form.
trait Filtered: Send + Sync {
    fn show(&self) -> Result<String, LevelError>;
    fn replace(&self, filter: Targets) -> Result<(), LevelError>;
}

impl<S> Filtered for Handle<Targets, S> {
    fn show(&self) -> Result<String, LevelError> {
        Ok(self.with_current(ToString::to_string)?)
    }

    fn replace(&self, filter: Targets) -> Result<(), LevelError> {
        Ok(self.reload(filter)?)
    }
}

/// What is logged, as RUST_LOG has it: levels, alone or for a target, with commas between. A word that is no level is refused: the
/// filter would take it for a target, and nothing else would be logged any more.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Filter(String);

/// Why the filter stays.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LevelError {
    #[error("the log has not begun")]
    NoLog,
    #[error("that is no filter")]
    NoFilter(#[source] ParseError),
    #[error("the log's filter cannot be had")]
    Gone(#[from] reload::Error),
}

impl TryFrom<String> for Filter {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        for part in text.split(',') {
            let (target, level) = part.rsplit_once('=').unwrap_or(("", part));
            let is_path = target
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-:".contains(c));
            let is_level = !level.is_empty() && level.parse::<LevelFilter>().is_ok();
            if !is_path || !is_level {
                return Err(format!(
                    "`{part}` is no level; say off, error, warn, info, debug or trace, or TARGET=LEVEL"
                ));
            }
        }
        Ok(Self(text))
    }
}

/// What is logged.
pub(crate) fn filter() -> Result<String, LevelError> {
    FILTERED.get().ok_or(LevelError::NoLog)?.show()
}

/// Has this logged from now on, and still nothing that a guest can repeat without limit, unless that is named.
pub(crate) fn set_filter(filter: &Filter) -> Result<(), LevelError> {
    let text = format!("{UNLIMITED}=off,{}", filter.0);
    let filter = text.parse().map_err(LevelError::NoFilter)?;
    FILTERED.get().ok_or(LevelError::NoLog)?.replace(filter)
}

/// Lets the log begin, on standard error.
pub(crate) fn begin(form: LogFormat) {
    let log = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(io::stderr)
        .with_target(false);
    match form {
        LogFormat::Json => start(log.json().flatten_event(true).finish()),
        // The service manager has connected standard error with its journal, which knows the time.
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => {
            let log = log.with_ansi(false).event_format(Journal::new());
            start(log.finish());
        }
        LogFormat::Text => {
            let log = log.with_ansi(io::stderr().is_terminal());
            start(log.finish());
        }
    }
}

fn start<S: Subscriber + Send + Sync>(log: S) {
    let (filter, handle) = reload::Layer::new(filter_of_start());
    // The log begins once.
    let _ = FILTERED.set(Box::new(handle));
    log.with(filter).init();
}

/// What is logged: levels and targets, as RUST_LOG says. `EnvFilter` knows spans too, of which there are none, and
/// brings an engine of regular expressions, which an idle daemon would carry along.
fn filter_of_start() -> Targets {
    let said = std::env::var("RUST_LOG").ok();
    let said = said.and_then(|said| said.parse().ok());
    said.unwrap_or_else(|| {
        Targets::new()
            .with_default(LevelFilter::INFO)
            .with_target(UNLIMITED, LevelFilter::OFF)
    })
}

/// Lines that begin with their priority.
struct Journal(Format<Compact, ()>);

impl Journal {
    fn new() -> Self {
        let line = format().compact().without_time();
        Self(line.with_level(false).with_target(false))
    }
}

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

/// As syslog numbers them.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_levels_and_no_other_words() {
        let filter = |text: &str| Filter::try_from(text.to_owned());
        for good in [
            "debug",
            "off",
            "info,vdi_vhost::session=trace",
            "info,virtio_queue=off",
        ] {
            assert!(filter(good).is_ok(), "{good}");
        }
        for bad in ["", "debgu", "info,", "session", "a=b", "info,[=debug"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }
}
