//! Flags of kube-proxy's, with an effect here or without, and flags of the other mode.

use super::tests::{bad, good};
use super::*;

/// Those of kube-proxy 1.36 for Linux and Windows, with a value that it takes.
const KUBE_PROXY_FLAGS: &[&str] = &[
    "--add_dir_header",
    "--alsologtostderr",
    "--bind-address=192.0.2.1",
    "--bind-address-hard-fail",
    "--boot-id-file=/x",
    "--cleanup",
    "--cluster-cidr=10.0.0.0/8",
    "--config-sync-period=1m",
    "--conntrack-max-per-core=1",
    "--conntrack-min=1",
    "--conntrack-tcp-be-liberal",
    "--conntrack-tcp-timeout-close-wait=1s",
    "--conntrack-tcp-timeout-established=1s",
    "--conntrack-udp-timeout=1s",
    "--conntrack-udp-timeout-stream=1s",
    "--detect-local-mode=NodeCIDR",
    "--enable-dsr",
    "--feature-gates=AllAlpha=true,AllBeta=False",
    "--forward-healthcheck-vip",
    "--healthz-bind-address=0.0.0.0:1",
    "--healthz-port=1",
    "--hostname-override=a",
    "--init-only",
    "--iptables-localhost-nodeports=false",
    "--iptables-masquerade-bit=1",
    "--iptables-min-sync-period=2s",
    "--iptables-sync-period=1m",
    "--ipvs-exclude-cidrs=10.0.0.0/8",
    "--ipvs-min-sync-period=1s",
    "--ipvs-scheduler=lc",
    "--ipvs-strict-arp",
    "--ipvs-sync-period=1m",
    "--ipvs-tcp-timeout=1s",
    "--ipvs-tcpfin-timeout=1s",
    "--ipvs-udp-timeout=1s",
    "--kube-api-burst=1",
    "--kube-api-content-type=x",
    "--kube-api-qps=1.5",
    "--kubeconfig=x",
    "--log-flush-frequency=1s",
    "--log-json-info-buffer-size=1Ki",
    "--log-json-split-stream",
    "--log-text-info-buffer-size=512",
    "--log-text-split-stream",
    "--log_backtrace_at=x.go:1",
    "--log_dir=/x",
    "--log_file=/x",
    "--log_file_max_size=1",
    "--logging-format=json",
    "--logtostderr=false",
    "--machine-id-file=/x",
    "--masquerade-all",
    "--master=https://192.0.2.1",
    "--metrics-bind-address=0.0.0.0:2",
    "--metrics-port=2",
    "--network-name=x",
    "--nodeport-addresses=primary",
    "--one_output",
    "--oom-score-adj=-1",
    "--pod-bridge-interface=cni0",
    "--pod-interface-name-prefix=veth",
    "--profiling",
    "--proxy-mode=ipvs",
    "--root-hnsendpoint-name=x",
    "--show-hidden-metrics-for-version=1.35",
    "--skip_headers",
    "--skip_log_headers",
    "--source-vip=x",
    "--stderrthreshold=1",
    "--v=2",
    "--vmodule=proxier=4,x*=5",
    "--windows-service",
    "--write-config-to=/x",
];

#[test]
fn every_flag_of_kube_proxy_is_accepted_alone_and_together() {
    for flag in KUBE_PROXY_FLAGS {
        let config = good(&[flag]);
        let (name, _) = flag.split_once('=').unwrap_or((flag, ""));
        let inert = inert::find(&name.replace('_', "-"));
        assert_eq!(config.notes.len(), usize::from(inert.is_some()), "{flag}: {:?}", config.notes);
        let default = good(&[]);
        let effect = !config.same_effect(&default);
        let elsewhere = ["--proxy-mode", "--healthz-port", "--metrics-port"].contains(&name)
            || name.starts_with("--pod-");
        assert_eq!(effect, inert.is_none() && !elsewhere, "{flag}");
    }
    let all = good(KUBE_PROXY_FLAGS);
    assert_eq!(all.notes.len(), inert::FLAGS.len(), "{:#?}", all.notes);
}

#[test]
fn defaults_of_flags_without_effect_are_not_worth_a_word() {
    for inert in inert::FLAGS {
        let flag = format!("{}={}", inert.flag, inert.default);
        assert_eq!(good(&[&flag]).notes, Vec::<String>::new(), "{flag}");
    }
    assert_eq!(good(&["--config-sync-period=900s"]).notes, Vec::<String>::new());
}

#[test]
fn flags_without_effect_are_judged_all_the_same() {
    for flag in [
        "--feature-gates=A",
        "--feature-gates=A=maybe",
        "--kube-api-qps=x",
        "--kube-api-burst=-1",
        "--config-sync-period=0s",
        "--iptables-sync-period=1",
        "--profiling=yes",
        "--show-hidden-metrics-for-version=1",
        "--vmodule=x",
        "--log-json-info-buffer-size=1Q",
    ] {
        assert_eq!(bad(&[flag]), [flag]);
    }
}

#[test]
fn flags_of_the_other_mode_are_said_to_have_no_effect() {
    let of_ipvs = [
        "--ipvs-scheduler=lc",
        "--ipvs-strict-arp=true",
        "--ipvs-tcp-timeout=15m",
        "--ipvs-tcpfin-timeout=2m",
        "--ipvs-udp-timeout=5m",
        "--iptables-masquerade-bit=3",
    ];
    let of_ebpf = [
        "--cgroup-root=/c",
        "--socket-opt-out=a/*",
        "--devices=eth0",
        "--xdp=auto",
        "--ebpf-map-sizes=slots=7",
        "--ebpf-map-limits=slots=600000",
        "--ebpf-selection=random",
        "--direct-server-return=on",
        "--direct-server-return-port=7000",
    ];
    let notes = |mode: &str, flag: &str| good(&[mode, flag]).notes;
    let (ipvs, ebpf) = ("--proxy-mode=ipvs", "--proxy-mode=ebpf");
    for (its, other, flags) in [(ipvs, ebpf, &of_ipvs[..]), (ebpf, ipvs, &of_ebpf[..])] {
        for flag in flags {
            assert_eq!(notes(its, flag), Vec::<String>::new(), "{its} {flag}");
            let said = notes(other, flag);
            assert_eq!(said.len(), 1, "{other} {flag}: {said:?}");
            assert!(said[0].starts_with(&format!("{flag} has no effect: ")), "{said:?}");
            assert_eq!(notes("--cleanup", flag), Vec::<String>::new(), "{flag}");
        }
    }
    // Defaults, however they are written.
    let defaults = ["--proxy-mode=ebpf", "--ipvs-scheduler=", "--ipvs-udp-timeout=0"];
    assert_eq!(good(&defaults).notes, Vec::<String>::new());
}
