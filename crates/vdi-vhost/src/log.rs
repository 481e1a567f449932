//! What is said, and in which form: text for people, for the journal, or JSON for collectors of logs.
//!
//! Source for the journal's form: sd-daemon(3), `SD_NOTICE` and the like.

use std::fmt;
use std::io::{self, IsTerminal};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Compact, Format, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, format};
use tracing_subscriber::registry::LookupSpan;

use crate::args::LogFormat;

/// What is logged unless RUST_LOG says otherwise. `virtio_queue` logs whatever a guest does wrong, without limit.
const FILTER: &str = "info,virtio_queue=off";

/// Lets the log begin, on standard error.
pub(crate) fn begin(form: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(FILTER));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_target(false);
    match form {
        LogFormat::Json => log.json().flatten_event(true).init(),
        // The service manager has connected standard error with its journal, which knows the time.
        LogFormat::Text if std::env::var_os("JOURNAL_STREAM").is_some() => {
            log.with_ansi(false).event_format(Journal::new()).init();
        }
        LogFormat::Text => log.with_ansi(io::stderr().is_terminal()).init(),
    }
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
