//! `config check FILE`: what a file would come to here.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;

use super::build::Problem;
use super::file::{self, Contents};
use super::flags::CheckArgs;
use super::{Usage, cli, inert};

/// The explanation, with the exit status: 0 when the daemon would start, 2 when not.
pub(super) fn run(arguments: &CheckArgs) -> Usage {
    let name = arguments.file.display();
    let explained = read(&arguments.file)
        .and_then(|text| explain(&text, &arguments.proxy_mode, arguments.strict));
    match explained {
        Ok(explained) => Usage::Print {
            text: format!("{name}: {}", explained.text),
            code: if explained.good { 0 } else { 2 },
        },
        Err(what) => Usage::Print { text: format!("{name}: {what}"), code: 2 },
    }
}

fn read(path: &Path) -> Result<String, String> {
    if path == Path::new("-") {
        let mut text = String::new();
        return std::io::stdin()
            .read_to_string(&mut text)
            .map(|_| text)
            .map_err(|error| error.to_string());
    }
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

pub(super) struct Explained {
    pub text: String,
    pub good: bool,
}

/// # Errors
/// When the text is no configuration at all.
pub(super) fn explain(text: &str, mode: &str, strict: bool) -> Result<Explained, String> {
    let inside = file::in_config_map(text)?;
    let (head, text) = match &inside {
        Some((key, text)) => (format!("the key {key} of a ConfigMap"), text.as_str()),
        None => (file::KIND.to_owned(), text),
    };
    let contents = file::kube_proxy(text)?;
    let carried = carried(&contents);
    let unknown = contents.warnings.clone();
    let (notes, warnings, problems) = match cli::of_contents(contents, mode) {
        Ok(config) => (config.notes, config.warnings, Vec::new()),
        Err(Usage::Problems(problems)) => (Vec::new(), unknown.clone(), problems.list),
        Err(other) => return Err(other.to_string()),
    };
    let doubtful: Vec<String> =
        warnings.into_iter().filter(|warning| !unknown.contains(warning)).collect();
    let (unknown_count, refused) = (unknown.len(), problems.len());
    let good = problems.is_empty() && (!strict || unknown.is_empty());
    let mut text = head;
    let problems: Vec<String> = problems.iter().map(Problem::to_string).collect();
    for (title, lines) in [
        ("cannot be used", problems),
        ("unknown, left out", unknown),
        ("worth a look", doubtful),
        ("carries over", carried),
        ("without effect here", notes),
    ] {
        if !lines.is_empty() {
            // Writing to a String does not fail.
            let _ = write!(text, "\n{title}:");
            for line in lines {
                let _ = write!(text, "\n  {line}");
            }
        }
    }
    let verdict = match (good, unknown_count) {
        (true, _) => "The daemon starts with it.",
        (false, 1..) if refused == 0 => "The daemon would start with it, but --strict refuses it.",
        (false, _) => "The daemon refuses it.",
    };
    let _ = write!(text, "\n{verdict}");
    Ok(Explained { text, good })
}

/// What the file sets and the daemon obeys.
fn carried(contents: &Contents) -> Vec<String> {
    let settings = contents.settings.iter().chain(&contents.own);
    settings
        .filter(|setting| inert::find(setting.flag).is_none())
        .map(|setting| format!("{}: {} ({})", setting.field, setting.value, setting.flag))
        .collect()
}
