//! kube-proxy's configuration file on a node, as kubeadm mounts it.

use std::fs;
use std::path::Path;

use proxy_tests::binary::binary;
use proxy_tests::daemon::{Daemon, Page};

use crate::node::{Bed, LONG, SYNCED, load_recorded, plain, until};
use crate::{in_namespace, run};

/// As kubeadm's, with the scheduler of the test.
fn file(kubeconfig: &Path, scheduler: &str) -> String {
    format!(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n\
         kind: KubeProxyConfiguration\n\
         bindAddress: 0.0.0.0\n\
         clientConnection: {{kubeconfig: {}, qps: 0}}\n\
         clusterCIDR: 10.244.0.0/16,fd00:10:244::/56\n\
         conntrack: {{maxPerCore: null, tcpBeLiberal: true}}\n\
         ipvs: {{scheduler: {scheduler}, syncPeriod: 0s, excludeCIDRs: null}}\n\
         healthzBindAddress: ''\n\
         mode: ''\n",
        kubeconfig.display()
    )
}

/// A line of `/proc/sys`.
fn sysctl(name: &str) -> String {
    fs::read_to_string(Path::new("/proc/sys").join(name)).expect(name).trim().to_owned()
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn the_file_drives_the_daemon_and_its_change_ends_it() {
    in_namespace(|| {
        let bed = Bed::new(plain());
        load_recorded(&bed.api);
        let path = bed.path("config.conf");
        let replace = |text: &str| {
            let new = bed.path("new.conf");
            fs::write(&new, text).expect("written");
            fs::rename(&new, &path).expect("renamed");
        };
        let kubeconfig = bed.path("kubeconfig");
        replace(&file(&kubeconfig, "lc"));
        let config = format!("--config={}", path.display());
        let start = || {
            let directory = path.parent().expect("a directory");
            // `Daemon` gives the mode that the file leaves open, and this flag the file's way.
            let arguments = ["--hostname-override=node-a", "--ipvs-scheduler=rr", &config];
            Daemon::start(&binary("proxy-daemon"), directory, &arguments).expect("the daemon")
        };
        let uses = |scheduler: &str| {
            let saved = run("ipvsadm", &["-Sn"]);
            let servers = saved.lines().filter(|line| line.starts_with("-A"));
            let mut count = 0;
            for line in servers {
                assert!(line.contains(&format!("-s {scheduler}")), "{line}");
                count += 1;
            }
            assert!(count > 10, "{saved}");
        };

        let mut daemon = start();
        daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("a first sync");
        uses("lc");
        assert_eq!(sysctl("net/netfilter/nf_conntrack_tcp_be_liberal"), "1");
        let page = Page::fetch().expect("metrics");
        let chosen = page.sum_where("node_dataplane_runtime_info", "scheduler=\"lc\"");
        assert_eq!(chosen, Some(1.0));
        let log = daemon.log();
        assert!(log.contains("--ipvs-scheduler=rr is ignored"), "{log}");

        replace("mode: [");
        until("the mistake is said", LONG, || daemon.log().contains("going on as before"));
        uses("lc");
        replace(&file(&kubeconfig, "sh"));
        let status = daemon.wait(LONG).expect("ended by the change");
        assert_eq!(status.code(), Some(1), "{}", daemon.log());
        assert!(daemon.log().contains("changed: ending"), "{}", daemon.log());
        uses("lc");

        let daemon = start();
        daemon.wait_for(SYNCED, LONG, |at| at > 0.0).expect("a first sync");
        uses("sh");
    });
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn init_only_prepares_the_kernel_and_ends() {
    in_namespace(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let arguments = ["--init-only", "--conntrack-udp-timeout=77s", "--ipvs-strict-arp"];
        let mut daemon = Daemon::start(&binary("proxy-daemon"), directory.path(), &arguments)
            .expect("the daemon");
        let status = daemon.wait(LONG).expect("it ends by itself");
        assert!(status.success(), "{}", daemon.log());
        assert_eq!(sysctl("net/netfilter/nf_conntrack_udp_timeout"), "77");
        assert_eq!(sysctl("net/ipv4/conf/all/arp_ignore"), "1");
        run("ip", &["link", "show", "kube-ipvs0"]);
        assert!(!run("ipvsadm", &["-Sn"]).contains("-A"), "no Service is programmed");
    });
}
