//! Log lines and the final error, in the two forms that callers of runc read.
//!
//! `text` is `time="..." level=info msg="..." key=value`; `json` is one object a line with `level`,
//! `msg` and `time`. With `--log` both log lines and the final error go to that file, which is only
//! ever appended to; the final error goes to standard error as well, as one line.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer, debug_fn};
use tracing_subscriber::fmt::{FmtContext, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use crate::cli::Global;

/// The form of log lines.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// key=value pairs
    Text,
    /// One JSON object a line
    Json,
}

/// Where the final error is reported.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    format: LogFormat,
}

/// Starts logging as the command line asks. A process that is part of a sandbox warns its monitor on
/// standard error.
///
/// # Errors
/// The log file can't be opened.
pub fn start(global: &Global, part_of_sandbox: bool) -> anyhow::Result<Log> {
    let file = match &global.log {
        None => None,
        Some(path) => {
            let file = OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .with_context(|| format!("log file {}", path.display()))?;
            Some(file)
        }
    };
    let log = Log { file, format: global.log_format };
    let level = match (global.debug, part_of_sandbox) {
        (true, _) => LevelFilter::DEBUG,
        (false, true) => LevelFilter::WARN,
        (false, false) => LevelFilter::INFO,
    };
    if log.file.is_some() || global.debug || part_of_sandbox {
        log.subscribe(level)?;
    }
    Ok(log)
}

impl Log {
    /// Sends log lines to the log file, or to standard error if there is none.
    fn subscribe(&self, level: LevelFilter) -> anyhow::Result<()> {
        let builder = tracing_subscriber::fmt()
            .with_max_level(level)
            .fmt_fields(
                debug_fn(|writer, field, value| write!(writer, "{field}={value:?}"))
                    .delimited("\n"),
            )
            .event_format(Lines { format: self.format });
        match &self.file {
            Some(file) => builder.with_writer(Mutex::new(file.try_clone()?)).init(),
            None => builder.with_writer(std::io::stderr).init(),
        }
        Ok(())
    }

    /// Reports the error with which kiln ends. Failures to write have nowhere to be reported to.
    pub fn report(&self, message: &str) {
        if let Some(mut file) = self.file.as_ref() {
            let line = format_line(self.format, Level::ERROR, message, &[]);
            let _ = file.write_all(line.as_bytes());
        }
        let _ = writeln!(std::io::stderr(), "kiln: {message}");
    }
}

/// Formats events as [`format_line`] does, the fields of their spans included.
struct Lines {
    format: LogFormat,
}

impl<S, N> FormatEvent<S, N> for Lines
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
        let mut collected = Collected::default();
        event.record(&mut collected);
        let mut fields = Vec::new();
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            let extensions = span.extensions();
            let Some(recorded) = extensions.get::<FormattedFields<N>>() else { continue };
            let pairs = recorded.split('\n').filter_map(|pair| pair.split_once('='));
            fields.extend(pairs.map(|(key, value)| (key.to_owned(), value.into())));
        }
        fields.append(&mut collected.fields);
        let level = *event.metadata().level();
        writer.write_str(&format_line(self.format, level, &collected.message, &fields))
    }
}

#[derive(Default)]
struct Collected {
    message: String,
    fields: Vec<(String, Value)>,
}

impl Visit for Collected {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => self.message = value.to_owned(),
            name => self.fields.push((name.to_owned(), value.into())),
        }
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.fields.push((field.name().to_owned(), value.into()));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.fields.push((field.name().to_owned(), value.into()));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.fields.push((field.name().to_owned(), value.into()));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.fields.push((field.name().to_owned(), value.into()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// One line in the given form, its newline included.
fn format_line(
    format: LogFormat,
    level: Level,
    message: &str,
    fields: &[(String, Value)],
) -> String {
    let level = match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG | Level::TRACE => "debug",
    };
    let time = rfc3339(SystemTime::now());
    let pairs = [("level", level), ("msg", message), ("time", &time)]
        .map(|(key, value)| (key.to_owned(), Value::from(value)))
        .into_iter()
        .chain(fields.iter().cloned());
    match format {
        LogFormat::Json => format!("{}\n", Value::Object(pairs.collect())),
        LogFormat::Text => {
            let text: Vec<_> = pairs
                .map(|(key, value)| match value {
                    Value::String(text) => format!("{key}={text:?}"),
                    number => format!("{key}={number}"),
                })
                .collect();
            format!("{}\n", text.join(" "))
        }
    }
}

/// A time of UTC as in RFC 3339, with milliseconds.
pub fn rfc3339(time: SystemTime) -> String {
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since_epoch.as_secs();
    let (year, month, day) = civil_date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let millis = since_epoch.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

/// The Gregorian date of a day counted from 1970-01-01.
fn civil_date(mut days: u64) -> (u64, u64, u64) {
    let is_leap = |year: u64| {
        (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400)
    };
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn json_lines_have_what_containerd_reads() {
        let line = format_line(LogFormat::Json, Level::ERROR, "no \"rootfs\"", &[]);
        let value: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "no \"rootfs\"");
        assert!(value["time"].as_str().is_some_and(|time| time.ends_with('Z')));
    }

    #[test]
    fn numbers_are_numbers_in_both_forms() {
        let fields = [("phase".to_owned(), "boot".into()), ("duration_ms".to_owned(), 1.5.into())];
        let line = format_line(LogFormat::Json, Level::INFO, "phase has ended", &fields);
        let value: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!((&value["phase"], &value["duration_ms"]), (&"boot".into(), &1.5.into()));
        let line = format_line(LogFormat::Text, Level::INFO, "phase has ended", &fields);
        assert!(line.ends_with("phase=\"boot\" duration_ms=1.5\n"), "{line}");
    }

    #[test]
    fn dates_around_leap_days() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }
}
