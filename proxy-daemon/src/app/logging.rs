//! The log, on standard error.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::config::{LogFormat, Logging};

/// Changes how much is logged; false when `RUST_LOG` decides that.
pub type Verbosity = Box<dyn Fn(Logging) -> bool + Send + Sync>;

/// `RUST_LOG` goes before `-v`, for looking into one room only.
pub fn start(logging: Logging) -> Verbosity {
    let from_environment = EnvFilter::try_from_default_env().ok();
    let fixed = from_environment.is_some();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(from_environment.unwrap_or_else(|| filter(logging)))
        .with_writer(std::io::stderr)
        .with_target(false);
    match logging.format {
        LogFormat::Text => {
            let builder = builder.with_ansi(false).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |logging| !fixed && handle.reload(filter(logging)).is_ok())
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            builder.init();
            Box::new(move |logging| !fixed && handle.reload(filter(logging)).is_ok())
        }
    }
}

/// What libraries say below a warning is theirs to say only at the highest verbosity.
fn filter(logging: Logging) -> EnvFilter {
    let level = logging.level();
    let others = if level == tracing::Level::TRACE { "debug" } else { "warn" };
    EnvFilter::builder()
        .with_default_directive(LevelFilter::WARN.into())
        .parse_lossy(format!("{others},proxy_daemon={level}"))
}
