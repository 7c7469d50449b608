//! What kube-proxy takes and this daemon has no use for: accepted, judged as kube-proxy
//! judges it, and said once in the log when it was meant to have an effect.

use clap::Arg;

use super::build::Problems;
use super::value::{self, Expected};

/// A flag of kube-proxy without an effect here.
#[derive(Debug)]
pub struct Inert {
    /// With its dashes.
    pub flag: &'static str,
    pub kind: Kind,
    /// kube-proxy's; given again, nothing is lost.
    pub default: &'static str,
    /// Why it has no effect, to go on after "no effect: ".
    pub why: &'static str,
}

/// What kube-proxy accepts as the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Bool,
    Duration,
    /// Above 0.
    Period,
    Float,
    /// From 0.
    Count,
    Text,
    /// `Name=true,...`
    Gates,
    /// `pattern=N,...`
    Vmodule,
    /// `1.35`
    MinorVersion,
    /// `512`, `2Ki`
    Quantity,
    /// `300-2000`, `300+50`, `300`
    PortRange,
}

const fn inert(flag: &'static str, kind: Kind, default: &'static str, why: &'static str) -> Inert {
    Inert { flag, kind, default, why }
}

const IPTABLES: &str = "no iptables rules are made; --ipvs-sync-period and \
                        --ipvs-min-sync-period set the periods of both modes";
const GO_CLIENT: &str =
    "one list and one watch of each kind, in JSON, is all that is asked of the API server";
const WINDOWS: &str = "it is for Windows";
const GO_LOG: &str = "the log goes to standard error, unbuffered, with one kind of header";
const FILE_PATTERNS: &str = "there are no Go source files; RUST_LOG sets levels by room, for example proxy_daemon::sync=debug";
const SPLIT: &str = "the log is one stream, on standard error, unbuffered";
const CADVISOR: &str = "nothing here reads it";

pub const FLAGS: &[Inert] = &[
    inert("--feature-gates", Kind::Gates, "", "kube-proxy's gates name nothing of this daemon"),
    inert("--kube-api-content-type", Kind::Text, "application/vnd.kubernetes.protobuf", GO_CLIENT),
    inert("--kube-api-qps", Kind::Float, "5", GO_CLIENT),
    inert("--kube-api-burst", Kind::Count, "10", GO_CLIENT),
    inert(
        "--config-sync-period",
        Kind::Period,
        "15m0s",
        "watches are kept complete by themselves, so there is nothing to refresh",
    ),
    inert("--iptables-sync-period", Kind::Period, "30s", IPTABLES),
    inert("--iptables-min-sync-period", Kind::Duration, "1s", IPTABLES),
    inert("--show-hidden-metrics-for-version", Kind::MinorVersion, "", "no metrics are hidden"),
    inert("--log-flush-frequency", Kind::Duration, "5s", SPLIT),
    inert("--log-text-split-stream", Kind::Bool, "false", SPLIT),
    inert("--log-text-info-buffer-size", Kind::Quantity, "0", SPLIT),
    inert("--log-json-split-stream", Kind::Bool, "false", SPLIT),
    inert("--log-json-info-buffer-size", Kind::Quantity, "0", SPLIT),
    inert("--vmodule", Kind::Vmodule, "", FILE_PATTERNS),
    inert("--add-dir-header", Kind::Bool, "false", GO_LOG),
    inert("--alsologtostderr", Kind::Bool, "false", GO_LOG),
    inert("--log-backtrace-at", Kind::Text, ":0", GO_LOG),
    inert("--log-dir", Kind::Text, "", GO_LOG),
    inert("--log-file", Kind::Text, "", GO_LOG),
    inert("--log-file-max-size", Kind::Count, "1800", GO_LOG),
    inert("--logtostderr", Kind::Bool, "true", GO_LOG),
    inert("--one-output", Kind::Bool, "false", GO_LOG),
    inert("--skip-headers", Kind::Bool, "false", GO_LOG),
    inert("--skip-log-headers", Kind::Bool, "false", GO_LOG),
    inert("--stderrthreshold", Kind::Text, "2", GO_LOG),
    inert("--boot-id-file", Kind::Text, "/proc/sys/kernel/random/boot_id", CADVISOR),
    inert("--machine-id-file", Kind::Text, "/etc/machine-id,/var/lib/dbus/machine-id", CADVISOR),
    inert("--network-name", Kind::Text, "", WINDOWS),
    inert("--source-vip", Kind::Text, "", WINDOWS),
    inert("--enable-dsr", Kind::Bool, "false", WINDOWS),
    inert("--root-hnsendpoint-name", Kind::Text, "", WINDOWS),
    inert("--forward-healthcheck-vip", Kind::Bool, "false", WINDOWS),
    inert("--windows-service", Kind::Bool, "false", WINDOWS),
];

impl Inert {
    /// The name without dashes, which is also the id of the argument.
    pub fn id(&self) -> &'static str {
        self.flag.trim_start_matches('-')
    }

    fn arg(&self) -> Arg {
        let arg = Arg::new(self.id())
            .long(self.id())
            .help(format!("No effect: {}", self.why))
            .help_heading("Accepted from kube-proxy, without effect")
            .hide_short_help(true);
        if self.kind == Kind::Bool {
            arg.value_name("BOOL")
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
        } else {
            arg.value_name("VALUE").num_args(1)
        }
    }

    /// Notes a problem as kube-proxy would, or that the value has no effect. `name` is how
    /// the user wrote it: the flag, or the field of a file.
    pub fn judge(&self, name: &str, raw: &str, problems: &mut Problems, notes: &mut Vec<String>) {
        match self.kind.check(raw) {
            Err(expected) => problems.add(name, raw, expected),
            Ok(()) if self.kind.same(raw, self.default) => {}
            Ok(()) => notes.push(format!("{name}={raw} has no effect: {}", self.why)),
        }
    }
}

pub fn args() -> impl Iterator<Item = Arg> {
    FLAGS.iter().map(Inert::arg)
}

pub fn find(flag: &str) -> Option<&'static Inert> {
    FLAGS.iter().find(|inert| inert.flag == flag)
}

impl Kind {
    pub fn check(self, raw: &str) -> Result<(), Expected> {
        match self {
            Self::Text => Ok(()),
            Self::Bool => value::boolean(raw).map(drop),
            Self::Duration => value::duration(raw).map(drop),
            Self::Period => value::duration(raw).and_then(|period| {
                if period.is_zero() { Err("must be greater than 0".to_owned()) } else { Ok(()) }
            }),
            Self::Float => match raw.parse::<f32>() {
                Ok(number) if number.is_finite() => Ok(()),
                _ => Err("must be a number".to_owned()),
            },
            Self::Count => value::number(raw, 0, i32::MAX.unsigned_abs()).map(drop),
            Self::Gates => pairs(raw, "Name=true,OtherName=false", |name, value| {
                !name.is_empty() && value::boolean(value).is_ok()
            }),
            Self::Vmodule => pairs(raw, "pattern=4,other=2", |pattern, level| {
                !pattern.is_empty() && level.parse::<u32>().is_ok()
            }),
            Self::MinorVersion => minor_version(raw),
            Self::Quantity => quantity(raw),
            Self::PortRange => port_range(raw),
        }
    }

    /// Whether both mean the same, however they are written.
    pub fn same(self, one: &str, other: &str) -> bool {
        match self {
            Self::Bool => value::boolean(one) == value::boolean(other),
            Self::Duration | Self::Period => value::duration(one) == value::duration(other),
            Self::Float => one.parse::<f32>().ok() == other.parse::<f32>().ok(),
            _ => one == other,
        }
    }
}

fn pairs(raw: &str, example: &str, good: impl Fn(&str, &str) -> bool) -> Result<(), Expected> {
    let fits = |item: &str| {
        item.split_once('=').is_some_and(|(name, value)| good(name.trim(), value.trim()))
    };
    match value::items(raw).find(|item| !fits(item)) {
        Some(item) => Err(format!("{item:?} must be written as in {example}")),
        None => Ok(()),
    }
}

fn minor_version(raw: &str) -> Result<(), Expected> {
    let number = |text: &str| text.parse::<u32>().is_ok();
    match raw.split_once('.') {
        _ if raw.is_empty() => Ok(()),
        Some((major, minor)) if number(major) && number(minor) => Ok(()),
        _ => Err("must be MAJOR.MINOR, for example 1.35".to_owned()),
    }
}

fn quantity(raw: &str) -> Result<(), Expected> {
    const UNITS: [&str; 13] = ["", "k", "K", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi"];
    let digits = raw.find(|c: char| !c.is_ascii_digit()).unwrap_or(raw.len());
    let (number, unit) = raw.split_at(digits);
    if !number.is_empty() && UNITS.contains(&unit) {
        Ok(())
    } else {
        Err("must be a number of bytes, for example 512, 1K or 2Ki".to_owned())
    }
}

/// `ParsePortRange` of apimachinery: empty is the same as 0-0.
fn port_range(raw: &str) -> Result<(), Expected> {
    let port = |text: &str| text.trim().parse::<u16>().ok();
    let fits = if raw.trim().is_empty() {
        true
    } else if let Some((first, last)) = raw.split_once('-') {
        port(first).zip(port(last)).is_some_and(|(first, last)| first <= last)
    } else if let Some((first, more)) = raw.split_once('+') {
        port(first).zip(port(more)).is_some_and(|(first, more)| first.checked_add(more).is_some())
    } else {
        port(raw).is_some()
    };
    if fits { Ok(()) } else { Err("must be a port range, for example 300-2000".to_owned()) }
}
