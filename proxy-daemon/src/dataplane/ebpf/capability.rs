//! Which capability is missing, for the error message.

use crate::kernel::capabilities::{Capability, effective_set};

/// Those that loading and attaching network programs needs and this process lacks.
pub(super) fn missing() -> Vec<&'static str> {
    // When it cannot be known, nothing is claimed.
    effective_set().map_or_else(|_| Vec::new(), missing_in)
}

/// `CAP_SYS_ADMIN` stands for `CAP_BPF`, which came with kernel 5.8.
fn missing_in(effective: u64) -> Vec<&'static str> {
    let has = |capability| effective & (1 << capability as u32) != 0;
    let mut missing = Vec::new();
    if !has(Capability::Bpf) && !has(Capability::SysAdmin) {
        missing.push("CAP_BPF");
    }
    if !has(Capability::NetAdmin) {
        missing.push("CAP_NET_ADMIN");
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_what_is_missing() {
        assert_eq!(missing_in(0), ["CAP_BPF", "CAP_NET_ADMIN"]);
        assert_eq!(missing_in(1 << 39), ["CAP_NET_ADMIN"]);
        assert_eq!(missing_in(1 << 12), ["CAP_BPF"]);
        assert!(missing_in(1 << 12 | 1 << 21).is_empty());
        assert!(missing_in(1 << 12 | 1 << 39).is_empty());
    }
}
