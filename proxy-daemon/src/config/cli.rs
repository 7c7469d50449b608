//! From the command line, and the files it names, to one [`Config`].
//!
//! Precedence is kube-proxy's: a file goes before flags, except for the node's name, the log
//! and what a file has no field for. One addition: where the file names no mode that exists
//! here, `--proxy-mode` does, so that the same file serves kube-proxy too.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::Path;

use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _};
use serde_json::Value;

use super::build::{self, Problems};
use super::fields::{self, Field, Target};
use super::file::{self, Contents, Setting};
use super::flags::{Command, ConfigCommand, Flags};
use super::inert::{self, Inert};
use super::{Config, ProxyMode, Usage, check, document, value};

/// Flags that stand in no file: they stay in force beside one.
const OF_NO_FILE: [&str; 8] = [
    "config",
    "dataplane-config",
    "write-config-to",
    "cleanup",
    "init-only",
    "version",
    "help",
    "master",
];

/// Flags that go before their field.
const BEFORE_THE_FILE: [&str; 10] = [
    "hostname-override",
    "v",
    "vmodule",
    "logging-format",
    "log-flush-frequency",
    "log-text-split-stream",
    "log-text-info-buffer-size",
    "log-json-split-stream",
    "log-json-info-buffer-size",
    "proxy-mode",
];

/// The file's addresses say what these do.
const PORTS: [&str; 2] = ["healthz-port", "metrics-port"];

/// kube-proxy's log flags without a field, and those of no use at all: nobody has to be told
/// that the file goes before them.
const WITHOUT_FIELD: [&str; 13] = [
    "add-dir-header",
    "alsologtostderr",
    "log-backtrace-at",
    "log-dir",
    "log-file",
    "log-file-max-size",
    "logtostderr",
    "one-output",
    "skip-headers",
    "skip-log-headers",
    "stderrthreshold",
    "boot-id-file",
    "machine-id-file",
];

/// What becomes of a flag beside a file of kube-proxy's kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    OfNoFile,
    BeforeTheFile,
    /// Of this daemon alone: that file cannot say it.
    Ours,
    /// The file goes before it.
    Overridden,
    WithoutField,
}

/// By name without dashes. Each flag is in one, which a test sees to.
pub(super) fn classes(id: &str) -> impl Iterator<Item = Class> {
    let of = |fields: &'static [Field]| {
        let is = |field: &Field| matches!(field.target, Target::Flag(flag) if &flag[2..] == id);
        !BEFORE_THE_FILE.contains(&id) && fields.iter().any(is)
    };
    [
        (Class::OfNoFile, OF_NO_FILE.contains(&id)),
        (Class::BeforeTheFile, BEFORE_THE_FILE.contains(&id)),
        (Class::Ours, of(fields::OWN)),
        (Class::Overridden, of(fields::KUBE_PROXY) || PORTS.contains(&id)),
        (Class::WithoutField, WITHOUT_FIELD.contains(&id)),
    ]
    .into_iter()
    .filter_map(|(class, is)| is.then_some(class))
}

fn class(flag: &str) -> Option<Class> {
    classes(flag.trim_start_matches('-')).next()
}

/// The command line with everything it takes, for parsing, manual page and completions.
#[must_use]
pub fn command() -> clap::Command {
    Flags::command().args(inert::args())
}

fn matches<I, T>(arguments: I) -> Result<(ArgMatches, Flags), Usage>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let clap = |error| Usage::Clap(Box::new(error));
    let matches = command().try_get_matches_from(arguments).map_err(clap)?;
    let flags = Flags::from_arg_matches(&matches).map_err(clap)?;
    Ok((matches, flags))
}

pub(super) fn config(arguments: Vec<OsString>, hostname: &str) -> Result<Config, Usage> {
    let (matches, flags) = matches(arguments)?;
    let mut problems = Problems::default();
    match flags.mode.version.as_str() {
        "raw" => return Err(Usage::Print { text: super::version_raw(), code: 0 }),
        version => match value::boolean(version) {
            Ok(true) => return Err(Usage::Print { text: super::version(), code: 0 }),
            Ok(false) => {}
            Err(_) => problems.add("--version", version, "must be true, false or raw"),
        },
    }
    if let Some(Command::Config(ConfigCommand::Check(arguments))) = &flags.command {
        return Err(check::run(arguments));
    }
    let mut read = |flag: &str, path: &str, parse: fn(&str) -> Result<Contents, String>| {
        (!path.is_empty()).then(|| {
            let text = std::fs::read_to_string(Path::new(path)).map_err(|e| e.to_string());
            text.and_then(|text| parse(&text)).unwrap_or_else(|what| {
                problems.add(flag, path, what);
                Contents::default()
            })
        })
    };
    let files = Files {
        kube_proxy: read("--config", &flags.mode.config, file::kube_proxy),
        own: read("--dataplane-config", &flags.mode.dataplane_config, file::own),
    };
    if !problems.is_empty() {
        return Err(Usage::Problems(problems));
    }
    resolve(&matches, &flags, &files, hostname)
}

/// Contents of the files that were named.
#[derive(Debug, Default)]
pub(super) struct Files {
    pub kube_proxy: Option<Contents>,
    pub own: Option<Contents>,
}

/// Flags and files to a configuration; the flags were taken apart, the files read.
fn resolve(
    matches: &ArgMatches,
    flags: &Flags,
    files: &Files,
    hostname: &str,
) -> Result<Config, Usage> {
    let mut notes = Vec::new();
    let mut warnings = Vec::new();
    let given = Given::of(matches);
    let settings = settings(&given, files, &mut notes, &mut warnings);
    let mut arguments = vec!["proxy-daemon".to_owned()];
    for (flag, value) in &given.0 {
        match class(flag) {
            Some(Class::Overridden) if files.kube_proxy.is_some() => {
                let file = &flags.mode.config;
                warnings.push(format!("{flag}={value} is ignored: --config={file} goes before it"));
            }
            Some(Class::WithoutField) if files.kube_proxy.is_some() => {}
            _ => arguments.push(format!("{flag}={value}")),
        }
    }
    // The last of a flag counts, except of lists, which no flag kept above is.
    arguments.extend(settings.iter().map(|s| format!("{}={}", s.flag, s.value)));
    let fields = names(&given, files, &settings);
    let mut problems = Problems::with_fields(fields);
    for contents in [&files.kube_proxy, &files.own].into_iter().flatten() {
        warnings.extend(contents.warnings.iter().cloned());
        problems.list.extend(contents.problems.iter().cloned());
        contents.judge_inert(&mut problems, &mut notes);
    }
    let (merged, flags) = self::matches(arguments)?;
    judge_inert(&merged, &mut problems, &mut notes);
    let config = build::build(&flags, hostname, problems, notes, warnings);
    let config = config.map_err(Usage::Problems)?;
    let kube_proxy_mode = kube_proxy_mode(files, config.proxy_mode);
    let inert = inert_settings(&merged, files);
    Ok(Config { inert, kube_proxy_mode, flags: in_force(&merged), ..config })
}

/// What kube-proxy's document says is its own mode: what its file has, as far as that is one of
/// kube-proxy's; and of flags ipvs, which both have.
fn kube_proxy_mode(files: &Files, mode: ProxyMode) -> String {
    let of_file = |contents: &Contents| {
        let setting = contents.settings.iter().rfind(|s| s.flag == "--proxy-mode");
        setting.map(|setting| setting.value.clone()).filter(|mode| mode != "ebpf")
    };
    match &files.kube_proxy {
        Some(contents) => of_file(contents).unwrap_or_default(),
        None if mode == ProxyMode::Ipvs => mode.to_string(),
        None => String::new(),
    }
}

/// Of flags and of the file alone, by field.
fn inert_settings(matches: &ArgMatches, files: &Files) -> Vec<(&'static str, Value)> {
    let mut settings = Vec::new();
    for field in fields::KUBE_PROXY {
        let found = match &field.target {
            Target::Flag(flag) => {
                inert::find(flag).and_then(|inert| Some((inert, given(matches, inert)?)))
            }
            Target::Inert(inert) => {
                let mut of_file = files.kube_proxy.iter().flat_map(|contents| &contents.inert);
                let found = of_file.find(|(found, _)| found.flag == inert.flag);
                found.map(|(inert, raw)| (*inert, raw.clone()))
            }
        };
        let set = found.filter(|(inert, raw)| !inert.kind.same(raw, inert.default));
        settings.extend(set.map(|(_, raw)| (field.path, document::value(field.shape, &raw))));
    }
    settings
}

/// Every flag with its value.
fn in_force(merged: &ArgMatches) -> Vec<(String, String)> {
    let value = |id: &str| {
        let values = merged.get_raw(id).into_iter().flatten();
        let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
        values.join(",")
    };
    let asks = |id: &str| ["help", "version"].contains(&id);
    let default_of = |id: &str| {
        inert::FLAGS.iter().find(|inert| inert.id() == id).map(|inert| inert.default.to_owned())
    };
    let mut flags: Vec<_> = command()
        .get_arguments()
        .filter(|arg| !asks(arg.get_id().as_str()))
        .filter_map(|arg| {
            let id = arg.get_id().as_str();
            let given = merged.value_source(id).is_some();
            let value = if given { value(id) } else { default_of(id).unwrap_or_default() };
            Some((arg.get_long()?.to_owned(), value))
        })
        .collect();
    flags.sort_unstable();
    flags
}

/// By flag the field that it is called by in messages: where a file is in force, all of the
/// file's but those that a flag went before.
fn names(given: &Given, files: &Files, settings: &[Setting]) -> HashMap<&'static str, String> {
    let mut names = HashMap::new();
    if files.kube_proxy.is_some() {
        for field in fields::KUBE_PROXY {
            if let Target::Flag(flag) = field.target
                && given.get(flag).is_none()
            {
                names.insert(flag, field.path.to_owned());
            }
        }
    }
    names.extend(settings.iter().map(|setting| (setting.flag, setting.field.to_owned())));
    names
}

/// As [`resolve`], of one file and a mode: for `config check`.
pub(super) fn of_contents(contents: Contents, mode: &str) -> Result<Config, Usage> {
    let mut arguments = vec!["proxy-daemon".to_owned(), "--config=FILE".to_owned()];
    if !mode.is_empty() {
        arguments.push(format!("--proxy-mode={mode}"));
    }
    let (matches, flags) = matches(arguments)?;
    let files = Files { kube_proxy: Some(contents), own: None };
    // Any name will do: the node's is not known where a file is checked.
    resolve(&matches, &flags, &files, "node")
}

/// Flags as they were given, with their dashes, in no particular order.
struct Given(Vec<(String, String)>);

impl Given {
    fn of(matches: &ArgMatches) -> Self {
        let mut given = Vec::new();
        for arg in command().get_arguments() {
            let (Some(long), id) = (arg.get_long(), arg.get_id().as_str()) else { continue };
            if matches.value_source(id) != Some(ValueSource::CommandLine) {
                continue;
            }
            for value in matches.get_raw(id).into_iter().flatten() {
                given.push((format!("--{long}"), value.to_string_lossy().into_owned()));
            }
        }
        Self(given)
    }

    fn get(&self, flag: &str) -> Option<&str> {
        self.0.iter().rev().find(|(name, _)| name == flag).map(|(_, value)| value.as_str())
    }
}

/// What of the files goes before the flags, least important first.
fn settings(
    given: &Given,
    files: &Files,
    notes: &mut Vec<String>,
    warnings: &mut Vec<String>,
) -> Vec<Setting> {
    let own = || {
        let both = [&files.kube_proxy, &files.own].into_iter().flatten();
        both.flat_map(|contents| &contents.own)
    };
    let own_has = |flag: &str| own().any(|setting| setting.flag == flag);
    let mode = given.get("--proxy-mode");
    let mut settings = Vec::new();
    for setting in files.kube_proxy.iter().flat_map(|contents| &contents.settings) {
        let Setting { flag, field, value } = setting;
        let logging = field.starts_with("logging.") || *flag == "--hostname-override";
        if logging && given.get(flag).is_some() {
            continue;
        }
        if *flag == "--kubeconfig" && (given.get("--manifests").is_some() || own_has("--manifests"))
        {
            notes.push(format!(
                "{field}={value} has no effect: --manifests replaces the API server"
            ));
            continue;
        }
        let foreign = *flag == "--proxy-mode" && is_foreign(value);
        if foreign && let Some(mode) = mode {
            notes.push(format!("{field}={value} is kube-proxy's: --proxy-mode={mode} decides"));
            continue;
        }
        if foreign && own_has(flag) {
            continue;
        }
        settings.push(setting.clone());
    }
    // A file without a mode has kube-proxy's default one.
    let has_mode = mode.is_some()
        || own_has("--proxy-mode")
        || settings.iter().any(|setting| setting.flag == "--proxy-mode");
    if files.kube_proxy.is_some() && !has_mode {
        let (flag, field) = ("--proxy-mode", "mode");
        settings.push(Setting { flag, field, value: String::new() });
    }
    settings.extend(own().cloned());
    for setting in &settings {
        let Setting { flag, field, value } = setting;
        // Of all others the file was said to go before them.
        let stays = class(flag) != Some(Class::Overridden) || files.kube_proxy.is_none();
        if let Some(other) = given.get(flag).filter(|other| stays && *other != value) {
            warnings.push(format!("{flag}={other} is ignored: {field}={value} goes before it"));
        }
    }
    settings
}

/// A mode that kube-proxy has and this daemon has not.
fn is_foreign(mode: &str) -> bool {
    matches!(mode, "iptables" | "nftables" | "kernelspace" | "userspace")
}

fn judge_inert(matches: &ArgMatches, problems: &mut Problems, notes: &mut Vec<String>) {
    for inert in inert::FLAGS {
        let Some(raw) = given(matches, inert) else { continue };
        let name = problems.name_of(inert.flag);
        inert.judge(&name, &raw, problems, notes);
    }
}

/// What this flag was given; the last counts.
fn given(matches: &ArgMatches, inert: &Inert) -> Option<String> {
    if matches.value_source(inert.id()) != Some(ValueSource::CommandLine) {
        return None;
    }
    let last = matches.get_raw(inert.id()).and_then(Iterator::last)?;
    Some(last.to_string_lossy().into_owned())
}
