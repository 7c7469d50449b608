//! The eBPF programs on a guest's kernel; the same cases as on the machine's own. The object
//! is the one embedded in the build (`cargo xtask test`), or `PROXY_EBPF_OBJECT`.

proxy_tests::ebpf_cases!(#[ignore = "needs a guest kernel: cargo xtask vm"]);

/// IPVS is not everywhere.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn ipvs_after_ebpf() -> anyhow::Result<()> {
    proxy_tests::ebpf::ipvs_after_ebpf()
}
