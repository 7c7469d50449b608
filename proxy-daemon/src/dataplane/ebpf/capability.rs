//! Which capability is missing, for the error message.

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::kernel::capabilities::{Capability, effective_set};
use crate::kernel::sysctl::KernelVersion;

/// Those that loading and attaching network programs needs and this process lacks.
pub(super) fn missing() -> Vec<&'static str> {
    // When it cannot be known, nothing is claimed.
    effective_set()
        .map_or_else(|_| Vec::new(), |effective| missing_in(effective, memory_is_locked()))
}

/// Before kernel 5.11 what maps take counts as memory that the process has locked
/// (`bpf_map_charge_init`), and more than a runtime's usual limit takes `CAP_SYS_RESOURCE`.
fn memory_is_locked() -> bool {
    KernelVersion::running().is_ok_and(|version| version < KernelVersion::new(5, 11))
        && getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(now, _)| now != RLIM_INFINITY)
}

/// `CAP_SYS_ADMIN` stands for `CAP_BPF` and `CAP_PERFMON`, which came with kernel 5.8. Without
/// the latter the verifier takes what is on the stack for a secret (`allow_uninit_stack`,
/// `allow_ptr_leaks` in kernel/bpf/verifier.c), and rejects calls between functions that share it.
fn missing_in(effective: u64, memory_is_locked: bool) -> Vec<&'static str> {
    let has = |capability| effective & (1 << capability as u32) != 0;
    let mut missing = Vec::new();
    if !has(Capability::Bpf) && !has(Capability::SysAdmin) {
        missing.push("CAP_BPF");
    }
    if !has(Capability::NetAdmin) {
        missing.push("CAP_NET_ADMIN");
    }
    if !has(Capability::Perfmon) && !has(Capability::SysAdmin) {
        missing.push("CAP_PERFMON");
    }
    if memory_is_locked && !has(Capability::SysResource) {
        missing.push("CAP_SYS_RESOURCE (or LimitMEMLOCK=infinity: this kernel is older than 5.11)");
    }
    missing
}

#[cfg(test)]
mod tests {

    #[test]
    fn names_what_is_missing() {
        let missing_in = |effective| super::missing_in(effective, false);
        assert_eq!(missing_in(0), ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]);
        assert_eq!(missing_in(1 << 39), ["CAP_NET_ADMIN", "CAP_PERFMON"]);
        assert_eq!(missing_in(1 << 12), ["CAP_BPF", "CAP_PERFMON"]);
        assert_eq!(missing_in(1 << 12 | 1 << 39), ["CAP_PERFMON"]);
        assert!(missing_in(1 << 12 | 1 << 21).is_empty());
        assert!(missing_in(1 << 12 | 1 << 38 | 1 << 39).is_empty());
        let all = 1 << 12 | 1 << 38 | 1 << 39;
        assert!(super::missing_in(all, true)[0].starts_with("CAP_SYS_RESOURCE"));
        assert!(super::missing_in(all | 1 << 24, true).is_empty());
    }
}
