//! What the manifests in `deploy/` allow the daemon, for tests that allow it no more.

use std::path::Path;

use anyhow::{Context as _, Result};
use proxy_daemon::kernel::sysctl::KernelVersion;
use serde_yaml_ng::Value;

const DAEMON_SET: &str = include_str!("../../deploy/daemonset.yaml");
const EBPF_PATCH: &str = include_str!("../../deploy/ebpf/daemonset.yaml");

/// Those that the DaemonSet adds in this mode, and what docs/operate.md has added to them on a
/// kernel like this one.
///
/// # Errors
/// As [`capabilities`].
pub fn capabilities_here(mode: &str) -> Result<Vec<String>> {
    let mut capabilities = capabilities(mode)?;
    let version = KernelVersion::running()?;
    if mode == "ebpf" && version < KernelVersion::new(5, 11) {
        capabilities.push("SYS_RESOURCE".to_owned());
    }
    Ok(capabilities)
}

/// The capabilities that the DaemonSet adds in this mode.
///
/// # Errors
/// When the manifests have none where they should be.
pub fn capabilities(mode: &str) -> Result<Vec<String>> {
    let value = if mode == "ebpf" { of_patch()? } else { of_daemon_set()? };
    serde_yaml_ng::from_value(value).context("a list of capabilities")
}

fn of_daemon_set() -> Result<Value> {
    let manifest: Value = serde_yaml_ng::from_str(DAEMON_SET)?;
    let container = &manifest["spec"]["template"]["spec"]["containers"][0];
    Ok(container["securityContext"]["capabilities"]["add"].clone())
}

fn of_patch() -> Result<Value> {
    let patch: Vec<Value> = serde_yaml_ng::from_str(EBPF_PATCH)?;
    let adds = |step: &&Value| {
        step["path"].as_str().is_some_and(|path| path.ends_with("/capabilities/add"))
    };
    let step = patch.iter().find(adds).context("the patch changes no capabilities")?;
    Ok(step["value"].clone())
}

/// Where the DaemonSet shows the node's cgroups.
pub const CGROUP_ROOT: &str = "/host/sys/fs/cgroup";

/// Where it shows the sysctls that can be written.
pub const SYSCTL_ROOT: &str = "/host/proc/sys";

/// `FROM[:TO]` of the program `confined`.
#[must_use]
pub fn shown(from: &Path, to: Option<&str>) -> String {
    to.map_or_else(|| from.display().to_string(), |to| format!("{}:{to}", from.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifests_name_their_capabilities() {
        assert_eq!(capabilities("ipvs").unwrap(), ["NET_ADMIN"]);
        let ebpf = capabilities("ebpf").unwrap();
        assert!(ebpf.contains(&"BPF".to_owned()), "{ebpf:?}");
    }
}
