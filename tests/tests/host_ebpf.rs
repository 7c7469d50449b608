//! The eBPF programs on the kernel of the machine that runs the tests. Needs root, and the
//! object: `cargo xtask test` builds it and passes it in `PROXY_EBPF_OBJECT`.

use proxy_tests::ebpf;

macro_rules! cases {
    ($($case:ident),+ $(,)?) => {
        $(#[test]
        fn $case() -> anyhow::Result<()> {
            ebpf::$case()
        })+
    };
}

cases!(
    connect4,
    connect6,
    connect6_mapped,
    connect4_udp,
    connect_refused,
    tc,
    xdp_native,
    xdp_generic,
    refusals,
);

/// Printed with `--nocapture`: the table in `docs/ebpf.md` comes from here.
#[test]
fn verified_instructions() -> anyhow::Result<()> {
    print!("{}", ebpf::verified_instructions()?);
    Ok(())
}
