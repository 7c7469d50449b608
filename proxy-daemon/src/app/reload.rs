//! Noticing that a configuration file changed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use tracing::{info, warn};

use crate::config::{Config, Logging, Usage};

/// Files are read this often. Not watched: in a Pod the file is a symbolic link through a
/// directory that the kubelet exchanges, up to a minute after the ConfigMap changed.
pub const POLL: Duration = Duration::from_secs(5);

/// Ends with the file when the daemon would do something else with what is in it now, as
/// `read` takes flags and files together. A version that cannot be used is said and left
/// alone: the daemon would not come up again. How much is logged is changed by `log` instead,
/// which says whether it could.
pub async fn changed(
    config: &Config,
    read: impl Fn() -> Result<Config, Usage>,
    log: impl Fn(Logging) -> bool,
    poll: Duration,
) -> PathBuf {
    if config.files.is_empty() {
        return std::future::pending().await;
    }
    let mut contents: HashMap<PathBuf, Vec<u8>> = HashMap::new();
    let mut logging = config.logging;
    loop {
        tokio::time::sleep(poll).await;
        let mut differs = None;
        for path in &config.files {
            // A file that is away for a moment is being replaced.
            let Ok(content) = tokio::fs::read(path).await else { continue };
            if contents.get(path) != Some(&content) {
                let first = contents.insert(path.clone(), content).is_none();
                differs = Some((path.clone(), first));
            }
        }
        let Some((path, first)) = differs else { continue };
        match read() {
            Ok(now)
                if !config
                    .same_effect(&Config { logging: at(config, now.logging), ..now.clone() }) =>
            {
                return path;
            }
            Ok(now) if now.logging != logging && log(now.logging) => {
                logging = now.logging;
                info!(file = %path.display(), verbosity = logging.verbosity, "changed: the log follows");
            }
            // At first this makes up for a change between the start and now.
            Ok(_) if first => {}
            Ok(_) => info!(file = %path.display(), "changed, but nothing that has an effect here"),
            Err(usage) => {
                warn!(file = %path.display(), "changed, and cannot be used; going on as before: {usage}");
            }
        }
    }
}

/// As verbose as at the start.
const fn at(start: &Config, now: Logging) -> Logging {
    Logging { verbosity: start.logging.verbosity, ..now }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use super::*;

    const TICK: Duration = Duration::from_millis(5);

    #[tokio::test]
    async fn only_a_change_that_counts_and_can_be_used_ends_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.conf");
        let good = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                    mode: ipvs\n";
        let write = |text: &str| {
            // As a ConfigMap's files change: by a rename.
            let new = directory.path().join("new");
            fs::write(&new, text).unwrap();
            fs::rename(&new, &path).unwrap();
        };
        write(good);
        let flag = format!("--config={}", path.display());
        let read = move || Config::from_args(["proxy-daemon", &flag], "a");
        let config = read().unwrap();
        let ended = changed(&config, read, |_| panic!("the log stays as it is"), TICK);
        tokio::pin!(ended);
        for harmless in [
            good.to_owned(),
            format!("{good}configSyncPeriod: 20s\n"),
            format!("{good}ipvs: {{scheduler: 5}}\n"),
            "[".to_owned(),
        ] {
            write(&harmless);
            let waited = tokio::time::timeout(TICK * 10, &mut ended).await;
            assert!(waited.is_err(), "ended by {harmless}");
        }
        fs::remove_file(&path).unwrap();
        assert!(tokio::time::timeout(TICK * 10, &mut ended).await.is_err(), "ended by a removal");
        write(&format!("{good}ipvs: {{scheduler: lc}}\n"));
        let waited = tokio::time::timeout(Duration::from_secs(10), &mut ended).await;
        assert_eq!(waited.expect("ended"), path);
    }

    #[tokio::test]
    async fn what_changed_before_the_first_look_counts() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let started = Config::from_args(["proxy-daemon"], "a").unwrap();
        let started = Config { files: vec![file.path().to_owned()], ..started };
        let now = Config { drain_timeout: TICK, ..started.clone() };
        let ended = changed(&started, || Ok(now.clone()), |_| true, TICK);
        let waited = tokio::time::timeout(Duration::from_secs(10), ended).await;
        assert_eq!(waited.expect("ended"), file.path());
    }

    #[tokio::test]
    async fn the_log_follows_without_a_restart() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                    mode: ipvs\n";
        fs::write(file.path(), head).unwrap();
        let flag = format!("--config={}", file.path().display());
        let read = || Config::from_args(["proxy-daemon", &flag], "a");
        let config = read().unwrap();
        let levels = std::cell::RefCell::new(Vec::new());
        let log = |logging: Logging| {
            levels.borrow_mut().push(logging.verbosity);
            true
        };
        let ended = changed(&config, read, log, TICK);
        tokio::pin!(ended);
        for (text, expected) in [
            ("logging: {verbosity: 6}\n", vec![6]),
            // The same again, said in another way.
            ("logging: {verbosity: 6}\n# 1\n", vec![6]),
            ("", vec![6, 0]),
        ] {
            fs::write(file.path(), format!("{head}{text}")).unwrap();
            let end = Instant::now() + Duration::from_secs(10);
            while *levels.borrow() != expected && Instant::now() < end {
                let waited = tokio::time::timeout(TICK, &mut ended).await;
                assert!(waited.is_err(), "ended by {text}");
            }
            // And nothing else.
            let waited = tokio::time::timeout(TICK * 10, &mut ended).await;
            assert!(waited.is_err(), "ended by {text}");
            assert_eq!(*levels.borrow(), expected, "{text}");
        }
        fs::write(file.path(), format!("{head}logging: {{verbosity: 6, format: json}}\n")).unwrap();
        let waited = tokio::time::timeout(Duration::from_secs(10), ended).await;
        assert_eq!(waited.expect("ended"), file.path(), "the format takes a restart");
    }
}
