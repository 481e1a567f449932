//! What is said, and in which form: text for people, for the journal, or JSON for collectors of logs.
//!
//! Source for the journal's form: sd-daemon(3), `SD_NOTICE` and the like.

use std::fmt;
use std::io::{self, IsTerminal};

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{Compact, Format, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, format};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::args::LogFormat;

/// Lets the log begin, on standard error.
pub(crate) fn begin(form: LogFormat) {
    let filter = filter();
    let log = tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(io::stderr)
        .with_target(false);
    match form {
        LogFormat::Json => log.json().flatten_event(true).finish().with(filter).init(),
        // The service manager has connected standard error with its journal, which knows the time.
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => {
            let log = log.with_ansi(false).event_format(Journal::new());
            log.finish().with(filter).init();
        }
        LogFormat::Text => {
            let log = log.with_ansi(io::stderr().is_terminal());
            log.finish().with(filter).init();
        }
    }
}

/// What is logged: levels and targets, as RUST_LOG says. `EnvFilter` knows spans too, of which there are none, and
/// brings an engine of regular expressions, which took a twelfth of the memory of an idle daemon.
fn filter() -> Targets {
    let said = std::env::var("RUST_LOG").ok();
    let said = said.and_then(|said| said.parse().ok());
    // `virtio_queue` logs whatever a guest does wrong, without limit.
    said.unwrap_or_else(|| {
        Targets::new()
            .with_default(LevelFilter::INFO)
            .with_target("virtio_queue", LevelFilter::OFF)
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
