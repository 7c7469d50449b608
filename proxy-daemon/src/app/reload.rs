//! Noticing that a configuration file changed.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use tracing::{info, warn};

use crate::config::Config;

/// Files are read this often. Not watched: in a Pod the file is a symbolic link through a
/// directory that the kubelet exchanges, up to a minute after the ConfigMap changed.
const POLL: Duration = Duration::from_secs(5);

/// Ends with the file when the daemon would do something else with what is in it now. A
/// version that cannot be used is said and left alone: the daemon would not come up again.
pub async fn changed(config: &Config, hostname: &str) -> PathBuf {
    if config.files.is_empty() {
        return std::future::pending().await;
    }
    let mut contents: HashMap<PathBuf, Vec<u8>> = HashMap::new();
    loop {
        tokio::time::sleep(POLL).await;
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
        match Config::from_args(std::env::args_os(), hostname) {
            Ok(now) if !config.same_effect(&now) => return path,
            // At first this makes up for a change between the start and now.
            Ok(_) if first => {}
            Ok(_) => info!(file = %path.display(), "changed, but nothing that has an effect here"),
            Err(usage) => {
                warn!(file = %path.display(), "changed, and cannot be used; going on as before: {usage}");
            }
        }
    }
}
