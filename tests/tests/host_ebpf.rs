//! The eBPF programs on the kernel of the machine that runs the tests. Needs root, and the
//! object: `cargo xtask test` builds it and passes it in `PROXY_EBPF_OBJECT`.

proxy_tests::ebpf_cases!();
