//! The log, on standard error.

use std::sync::Arc;

use jiff::tz::TimeZone;
use tracing::Subscriber;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::SubscriberInitExt;

use super::klog::Lines;
use crate::config::Logging;

/// Changes how much is logged; false when `RUST_LOG` decides that.
pub type Verbosity = Arc<dyn Fn(Logging) -> bool + Send + Sync>;

/// `RUST_LOG` goes before `-v`, for looking into one room only.
pub fn start(logging: Logging) -> Verbosity {
    let from_environment = EnvFilter::try_from_default_env().ok();
    let (subscriber, verbosity) = subscriber(logging, from_environment, std::io::stderr);
    subscriber.init();
    verbosity
}

/// With `fixed` the verbosity counts for nothing.
pub(super) fn subscriber<W>(
    logging: Logging,
    fixed: Option<EnvFilter>,
    writer: W,
) -> (impl Subscriber + Send + Sync, Verbosity)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let is_fixed = fixed.is_some();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(fixed.unwrap_or_else(|| filter(logging)))
        .with_ansi(false)
        .event_format(Lines { format: logging.format, zone: TimeZone::system() })
        .with_writer(writer)
        .with_filter_reloading();
    let handle = builder.reload_handle();
    let verbosity = move |logging| !is_fixed && handle.reload(filter(logging)).is_ok();
    (builder.finish(), Arc::new(verbosity))
}

/// Where `kube` says that a request failed, as an error, each time and without saying which or
/// why. The source does that, once a minute.
const REQUESTS: &str = "kube_client::client::builder";

/// What libraries say below a warning is theirs to say only at the highest verbosity.
fn filter(logging: Logging) -> EnvFilter {
    let level = logging.level();
    let rules = if level == tracing::Level::TRACE {
        format!("debug,proxy_daemon={level}")
    } else {
        format!("warn,{REQUESTS}=off,proxy_daemon={level}")
    };
    EnvFilter::builder().with_default_directive(LevelFilter::WARN.into()).parse_lossy(rules)
}
