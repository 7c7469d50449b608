//! Log lines as Kubernetes' components write them, for the pipelines that read those: klog's text,
//! or the JSON of `component-base/logs/json`.

use std::fmt::{self, Write as _};

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::config::LogFormat;

/// Formats events; one line each, whatever is in them.
#[derive(Debug)]
pub(super) struct Lines {
    pub(super) format: LogFormat,
    /// klog writes local time.
    pub(super) zone: TimeZone,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let mut fields = Fields::new(self.format);
        event.record(&mut fields);
        let caller = Caller::of(metadata, &fields);
        let now = Timestamp::now();
        let line = match self.format {
            LogFormat::Text => {
                let now = now.to_zoned(self.zone.clone());
                text(*metadata.level(), &now, std::process::id(), &caller, &fields)
            }
            LogFormat::Json => json(*metadata.level(), now, &caller, &fields),
        };
        writer.write_str(&line)
    }
}

/// `I1130 10:56:44.632281    4711 client.rs:12] "message" key="value"`.
fn text(level: Level, now: &Zoned, process: u32, caller: &Caller, fields: &Fields) -> String {
    let severity = match level {
        Level::ERROR => 'E',
        Level::WARN => 'W',
        _ => 'I',
    };
    let mut line = format!(
        "{severity}{:02}{:02} {:02}:{:02}:{:02}.{:06} {process:>7} {}:{}] ",
        now.month(),
        now.day(),
        now.hour(),
        now.minute(),
        now.second(),
        now.subsec_nanosecond() / 1000,
        caller.file.rsplit('/').next().unwrap_or_default(),
        caller.line,
    );
    quote(&fields.message, &mut line);
    line.push_str(&fields.rest);
    line.push('\n');
    line
}

/// `{"ts":1764500204632.281,"caller":"kube/client.rs:12","msg":"message","v":0,"key":"value"}`.
fn json(level: Level, now: Timestamp, caller: &Caller, fields: &Fields) -> String {
    let micros = now.as_microsecond();
    let file = caller.file.rmatch_indices('/').nth(1);
    let file = file.map_or(caller.file.as_str(), |(at, _)| &caller.file[at + 1..]);
    let mut line = format!("{{\"ts\":{}.{:03},\"caller\":", micros / 1000, micros % 1000);
    encode(&format!("{file}:{}", caller.line), &mut line);
    line.push_str(",\"msg\":");
    encode(&fields.message, &mut line);
    // An error has no verbosity, by which it is told. Kubernetes has no warnings there.
    line.push_str(match level {
        Level::ERROR => "",
        Level::WARN => ",\"v\":0,\"level\":\"warn\"",
        Level::INFO => ",\"v\":0",
        Level::DEBUG => ",\"v\":4",
        Level::TRACE => ",\"v\":6",
    });
    line.push_str(&fields.rest);
    line.push_str("}\n");
    line
}

/// Where it was said.
struct Caller {
    file: String,
    line: u32,
}

impl Caller {
    /// What came through the `log` crate has its place in fields.
    fn of(metadata: &Metadata<'_>, fields: &Fields) -> Self {
        let file = metadata.file().map(str::to_owned).or_else(|| fields.file.clone());
        Self {
            file: file.unwrap_or_else(|| metadata.target().to_owned()),
            line: metadata.line().or(fields.line).unwrap_or_default(),
        }
    }
}

/// The message, and the other fields as they go into the line.
struct Fields {
    format: LogFormat,
    message: String,
    rest: String,
    file: Option<String>,
    line: Option<u32>,
}

impl Fields {
    const fn new(format: LogFormat) -> Self {
        Self { format, message: String::new(), rest: String::new(), file: None, line: None }
    }

    fn key(&mut self, field: &Field) {
        let name = match field.name() {
            // As both formats call it.
            "error" => "err",
            name => name,
        };
        match self.format {
            LogFormat::Text => {
                self.rest.push(' ');
                self.rest.push_str(name);
                self.rest.push('=');
            }
            LogFormat::Json => {
                self.rest.push(',');
                encode(name, &mut self.rest);
                self.rest.push(':');
            }
        }
    }

    fn string(&mut self, field: &Field, value: &str) {
        match field.name() {
            "message" => value.clone_into(&mut self.message),
            "log.file" => self.file = Some(value.to_owned()),
            name if name.starts_with("log.") => {}
            _ => {
                self.key(field);
                match self.format {
                    LogFormat::Text => quote(value, &mut self.rest),
                    LogFormat::Json => encode(value, &mut self.rest),
                }
            }
        }
    }

    /// What both formats show without quotes.
    fn bare(&mut self, field: &Field, value: &dyn fmt::Display) {
        self.key(field);
        // Writing to a string cannot fail.
        let _ = write!(self.rest, "{value}");
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.string(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.string(field, &format!("{value:?}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "log.line" {
            self.line = u32::try_from(value).ok();
        } else {
            self.bare(field, &value);
        }
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.bare(field, &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.bare(field, &value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no other numbers.
        if value.is_finite() {
            self.bare(field, &value);
        } else {
            self.string(field, &value.to_string());
        }
    }
}

/// As Go quotes a string, which is how klog keeps an entry on one line.
fn quote(text: &str, line: &mut String) {
    line.push('"');
    for character in text.chars() {
        match character {
            '"' => line.push_str("\\\""),
            '\\' => line.push_str("\\\\"),
            '\n' => line.push_str("\\n"),
            '\r' => line.push_str("\\r"),
            '\t' => line.push_str("\\t"),
            // Writing to a string cannot fail.
            control if control.is_control() => drop(write!(line, "\\u{:04x}", control as u32)),
            character => line.push(character),
        }
    }
    line.push('"');
}

fn encode(text: &str, line: &mut String) {
    line.push_str(&serde_json::Value::from(text).to_string());
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use serde_json::{Value, json};
    use tracing::{debug, error, info, trace, warn};
    use tracing_subscriber::EnvFilter;

    use super::*;
    use crate::app::logging::{self, Verbosity};
    use crate::config::Logging;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is written while `say` talks at a verbosity.
    fn said(format: LogFormat, verbosity: u32, say: impl FnOnce(&Verbosity)) -> String {
        let written = Written::default();
        let of_subscriber = written.clone();
        let logging = Logging { verbosity, format };
        let (subscriber, verbosity) =
            logging::subscriber(logging, None, move || of_subscriber.clone());
        tracing::subscriber::with_default(subscriber, || say(&verbosity));
        let bytes = written.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn text_is_klogs() {
        let lines = said(LogFormat::Text, 4, |_| {
            info!(kind = "Service", port = 80, ready = true, "started");
            warn!(error = %io::Error::other("two\nlines \"quoted\""), "cannot be\nread");
            error!("the end");
            debug!(list = ?["a"], "\u{1b}[0mdetail");
        });
        let lines: Vec<&str> = lines.lines().collect();
        let expected = [
            ("I", r#""started" kind="Service" port=80 ready=true"#),
            ("W", r#""cannot be\nread" err="two\nlines \"quoted\"""#),
            ("E", r#""the end""#),
            ("I", r#""\u001b[0mdetail" list="[\"a\"]""#),
        ];
        assert_eq!(lines.len(), expected.len(), "{lines:#?}");
        for (line, (severity, rest)) in lines.into_iter().zip(expected) {
            let (header, body) = line.split_once("] ").unwrap();
            assert_eq!(body, rest);
            assert!(header.starts_with(severity), "{header}");
            let parts: Vec<&str> = header[1..].split_whitespace().collect();
            let [date, time, process, place] = parts[..] else { panic!("{header}") };
            assert!(date.len() == 4 && date.bytes().all(|byte| byte.is_ascii_digit()), "{date}");
            assert_eq!((time.len(), &time[2..3], &time[8..9]), (15, ":", "."), "{time}");
            assert_eq!(process, std::process::id().to_string());
            assert!(place.starts_with("klog.rs:"), "{place}");
        }
    }

    #[test]
    fn the_header_has_klogs_columns() {
        let now: Zoned = "2026-11-30T10:56:44.632281[UTC]".parse().unwrap();
        let caller = Caller { file: "proxy-daemon/src/app/server.rs".to_owned(), line: 12 };
        let fields = Fields { message: "msg".to_owned(), ..Fields::new(LogFormat::Text) };
        assert_eq!(
            text(Level::INFO, &now, 1, &caller, &fields),
            "I1130 10:56:44.632281       1 server.rs:12] \"msg\"\n"
        );
        let now = Timestamp::from_microsecond(1_764_500_204_632_281).unwrap();
        assert_eq!(
            json(Level::INFO, now, &caller, &fields),
            "{\"ts\":1764500204632.281,\"caller\":\"app/server.rs:12\",\"msg\":\"msg\",\"v\":0}\n"
        );
    }

    #[test]
    fn json_is_that_of_kubernetes() {
        let lines = said(LogFormat::Json, 6, |_| {
            info!(kind = "Service", port = 80, "started");
            warn!(error = "two\nlines", "cannot");
            error!(error = "x", "the end");
            debug!("step");
            trace!(share = f64::NAN, "detail");
        });
        let lines: Vec<Value> =
            lines.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        let expected = [
            json!({"msg": "started", "v": 0, "kind": "Service", "port": 80}),
            json!({"msg": "cannot", "v": 0, "level": "warn", "err": "two\nlines"}),
            json!({"msg": "the end", "err": "x"}),
            json!({"msg": "step", "v": 4}),
            json!({"msg": "detail", "v": 6, "share": "NaN"}),
        ];
        assert_eq!(lines.len(), expected.len(), "{lines:#?}");
        for (mut line, expected) in lines.into_iter().zip(expected) {
            let held = line.as_object_mut().unwrap();
            assert!(held.remove("ts").unwrap().as_f64().unwrap() > 1.7e12);
            let caller = held.remove("caller").unwrap();
            assert!(caller.as_str().unwrap().starts_with("app/klog.rs:"), "{caller}");
            assert_eq!(line, expected);
        }
    }

    #[test]
    fn requests_that_fail_are_the_sources_to_report() {
        let say = |_: &Verbosity| {
            error!(target: "kube_client::client::builder", "failed with error client error");
            warn!(target: "kube_client::client::tls", "failed to reload CA bundle");
        };
        for verbosity in [0, 2, 5] {
            let lines = said(LogFormat::Text, verbosity, say);
            assert!(!lines.contains("client error"), "-v={verbosity}: {lines}");
            assert!(lines.contains("CA bundle"), "-v={verbosity}: {lines}");
        }
        assert!(said(LogFormat::Text, 6, say).contains("client error"));
    }

    #[test]
    fn the_verbosity_changes_while_it_runs() {
        let lines = said(LogFormat::Text, 0, |verbosity| {
            debug!("before");
            assert!(verbosity(Logging { verbosity: 4, format: LogFormat::Text }));
            debug!("after");
        });
        assert!(!lines.contains("before") && lines.contains("\"after\""), "{lines}");
        // Where `RUST_LOG` decides.
        let (logging, fixed) =
            (Logging { verbosity: 0, format: LogFormat::Text }, EnvFilter::new("warn"));
        let (_subscriber, verbosity) = logging::subscriber(logging, Some(fixed), io::sink);
        assert!(!verbosity(Logging { verbosity: 4, ..logging }));
    }
}
