//! Which capabilities the process has.

use std::fs;

/// Bit numbers (include/uapi/linux/capability.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    NetAdmin = 12,
    SysPtrace = 19,
    SysAdmin = 21,
    SysResource = 24,
    Perfmon = 38,
    Bpf = 39,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CapabilityError {
    #[error(
        "capability CAP_NET_ADMIN is missing: run as root, or give it to the container \
         (securityContext.capabilities.add: [NET_ADMIN])"
    )]
    NetAdmin,
    #[error("cannot read the process's capabilities from /proc/self/status: {0}")]
    Unreadable(String),
}

/// Checks for what every data plane needs.
///
/// # Errors
/// Names the missing capability and how to get it.
pub fn check_net_admin() -> Result<(), CapabilityError> {
    if effective_set()? & (1 << Capability::NetAdmin as u32) == 0 {
        return Err(CapabilityError::NetAdmin);
    }
    Ok(())
}

/// The effective set, a bit per [`Capability`].
///
/// # Errors
/// `/proc` is not there or not readable.
pub fn effective_set() -> Result<u64, CapabilityError> {
    let status = fs::read_to_string("/proc/self/status")
        .map_err(|error| CapabilityError::Unreadable(error.to_string()))?;
    effective(&status).ok_or_else(|| CapabilityError::Unreadable("no CapEff line".to_owned()))
}

/// Whether this process has it; true when that cannot be known.
#[must_use]
pub fn has(capability: Capability) -> bool {
    effective_set().map_or(true, |effective| effective & (1 << capability as u32) != 0)
}

fn effective(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_set_is_read() {
        let status = "Name:\tx\nCapPrm:\t0000000000000000\nCapEff:\t0000000000001000\n";
        assert_eq!(effective(status), Some(1 << 12));
        assert_eq!(effective("Name:\tx\n"), None);
    }
}
