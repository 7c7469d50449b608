# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_proxy_daemon_global_optspecs
    string join \n proxy-mode= cleanup= config= dataplane-config= write-config-to= init-only= version= kubeconfig= master= hostname-override= manifests= cluster-cidr= detect-local-mode= pod-bridge-interface= pod-interface-name-prefix= nodeport-addresses= bind-address= iptables-localhost-nodeports= masquerade-all= iptables-masquerade-bit= drain-timeout= ipvs-scheduler= ipvs-sync-period= ipvs-min-sync-period= ipvs-strict-arp= ipvs-tcp-timeout= ipvs-tcpfin-timeout= ipvs-udp-timeout= ipvs-exclude-cidrs= conntrack-max-per-core= conntrack-min= conntrack-tcp-timeout-established= conntrack-tcp-timeout-close-wait= conntrack-tcp-be-liberal= conntrack-udp-timeout= conntrack-udp-timeout-stream= healthz-bind-address= metrics-bind-address= healthz-port= metrics-port= service-metrics-limit= endpoint-metrics= endpoint-metrics-limit= bind-address-hard-fail= profiling= v/v= logging-format= oom-score-adj= cgroup-root= socket-opt-out= devices= ebpf-map-sizes= ebpf-map-limits= xdp= ebpf-selection= direct-server-return= direct-server-return-port= bpf-root= sysctl-root= feature-gates= kube-api-content-type= kube-api-qps= kube-api-burst= config-sync-period= iptables-sync-period= iptables-min-sync-period= show-hidden-metrics-for-version= log-flush-frequency= log-text-split-stream= log-text-info-buffer-size= log-json-split-stream= log-json-info-buffer-size= vmodule= add-dir-header= alsologtostderr= log-backtrace-at= log-dir= log-file= log-file-max-size= logtostderr= one-output= skip-headers= skip-log-headers= stderrthreshold= boot-id-file= machine-id-file= network-name= source-vip= enable-dsr= root-hnsendpoint-name= forward-healthcheck-vip= windows-service= h/help
end

function __fish_proxy_daemon_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_proxy_daemon_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_proxy_daemon_using_subcommand
    set -l cmd (__fish_proxy_daemon_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l proxy-mode -d 'Data plane: ipvs or ebpf' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l cleanup -d 'Remove from this node what the daemon programmed and what kube-proxy left, then exit' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l config -d 'kube-proxy\'s configuration file; it goes before all flags that it has a field for' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l dataplane-config -d 'A file with a NodeDataplaneConfiguration alone: this daemon\'s own options' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l write-config-to -d 'Write the configuration as it results from all flags and files to this file, then exit' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l init-only -d 'Check and prepare the kernel (modules, settings), then exit' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l version -d 'Print the version and exit; raw says more' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l kubeconfig -d 'Kubeconfig file with the API server\'s address and credentials' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l master -d 'URL of the API server; goes before the one in the kubeconfig' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l hostname-override -d 'Name of this node\'s Node object [default: the host name]' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l manifests -d 'Read Service, EndpointSlice and Node YAML from this directory instead of an API server' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l cluster-cidr -d 'Pod CIDR of the cluster, one per address family' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l detect-local-mode -d 'How to tell traffic of this node\'s pods: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l pod-bridge-interface -d 'Bridge that all pods of the node hang on, for BridgeInterface. Example: cni0' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l pod-interface-name-prefix -d 'Beginning of the pods\' interface names, for InterfaceNamePrefix. Example: veth' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l nodeport-addresses -d 'Node addresses that node ports answer on: CIDRs, or "primary"' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l bind-address -d 'The node\'s own address, in place of the Node object\'s of that family' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l iptables-localhost-nodeports -d 'Whether node ports answer on IPv4 loopback addresses, where the mode can do that' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l masquerade-all -d 'Masquerade all traffic to cluster IPs, also that of pods' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l iptables-masquerade-bit -d 'Bit of the packet mark (0 to 31) for packets to be masqueraded' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l drain-timeout -d 'How long connections of a removed endpoint may go on' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ipvs-scheduler -d 'Scheduler of the virtual servers: rr, wrr, lc, wlc, sh, mh, sed, nq, ...' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ipvs-sync-period -d 'Longest time between two comparisons of the kernel with what should be there' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ipvs-min-sync-period -d 'Shortest time between two rounds of programming; 0 programs every change at once' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ipvs-strict-arp -d 'Answer ARP only on the interface that holds the address (arp_ignore=1, arp_announce=2)' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ipvs-tcp-timeout -d 'Idle time after which IPVS forgets a TCP connection; 0 leaves the kernel\'s' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ipvs-tcpfin-timeout -d 'The same after a FIN; 0 leaves the kernel\'s' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ipvs-udp-timeout -d 'The same for UDP; 0 leaves the kernel\'s' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ipvs-exclude-cidrs -d 'Virtual servers of others in these blocks are never deleted' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l conntrack-max-per-core -d 'Tracked connections per CPU core; 0 leaves the kernel\'s limit and ignores --conntrack-min' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l conntrack-min -d 'Tracked connections at least, whatever --conntrack-max-per-core comes to' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l conntrack-tcp-timeout-established -d 'Idle timeout of established TCP connections; 0 leaves the kernel\'s' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l conntrack-tcp-timeout-close-wait -d 'Timeout of TCP connections in CLOSE_WAIT; 0 leaves the kernel\'s' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l conntrack-tcp-be-liberal -d 'Do not drop TCP packets outside the tracked window (nf_conntrack_tcp_be_liberal=1)' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l conntrack-udp-timeout -d 'Idle timeout of UDP flows without a reply; 0 leaves the kernel\'s' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l conntrack-udp-timeout-stream -d 'Idle timeout of UDP flows with replies; 0 leaves the kernel\'s' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l healthz-bind-address -d 'Address of /healthz and /livez; empty disables' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l metrics-bind-address -d 'Address of /metrics, /proxyMode, /configz, /statusz and /flagz; empty disables' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l healthz-port -d 'Deprecated: the port of a --healthz-bind-address that has none; 0 disables' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l metrics-port -d 'Deprecated: the port of a --metrics-bind-address that has none; 0 disables' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l service-metrics-limit -d 'Service ports with traffic metrics of their own; all others share one series; 0 reads none' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l endpoint-metrics -d 'Traffic metrics of each endpoint as well' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l endpoint-metrics-limit -d 'With --endpoint-metrics: endpoints with metrics of their own; all others share one series' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l bind-address-hard-fail -d 'Exit when one of these addresses cannot be bound, instead of trying again' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l profiling -d 'Serve /debug/flags/v beside the metrics, to change how much is logged' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -s v -l v -d 'Log verbosity: 0 to 3 what matters, 4 and 5 every change, 6 and more everything' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l logging-format -d 'Format of the log lines: text or json' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l oom-score-adj -d 'How late the kernel kills the daemon when memory runs out: -1000 (never) to 1000' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l cgroup-root -d 'cgroup v2 directory whose sockets ebpf mode serves [default: the cgroup2 mount]' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l socket-opt-out -d 'cgroups below --cgroup-root whose sockets ebpf mode leaves alone, by comma; * for any part of a name' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l devices -d 'Devices whose packets ebpf mode translates, by comma; * at the end of a name for any [default: every Ethernet device that is no part of another]' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ebpf-map-sizes -d 'Entries of ebpf mode\'s maps, by comma, when they are made: frontends (an address and port), backends (an endpoint of a Service port), slots (an endpoint of a frontend\'s set), flows (a connection at a device), sockets (one that connect() or sendmsg() sent to an endpoint)' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ebpf-map-limits -d 'What ebpf mode\'s maps may grow to, by comma, as in --ebpf-map-sizes' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l xdp -d 'XDP for what comes in from other machines: off, auto (in the driver where it can), native (in the driver or not at all), generic' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l ebpf-selection -d 'How a connection\'s endpoint is found where the Service does not say: hash of its addresses and ports, maglev, random; ebpf mode' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l direct-server-return -d 'A client\'s packets go to another node\'s endpoint as they came, and that node answers the client: off, accept (others\' are taken, none are sent), on; ebpf mode' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l direct-server-return-port -d 'UDP port of these packets between nodes, the same on all of them' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l bpf-root -d 'Where the BPF file system is, or is to be mounted, for what outlives the daemon' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l sysctl-root -d 'Directory of the kernel\'s settings' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l feature-gates -d 'No effect: kube-proxy\'s gates name nothing of this daemon' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l kube-api-content-type -d 'No effect: one list and one watch of each kind, in JSON, is all that is asked of the API server' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l kube-api-qps -d 'No effect: one list and one watch of each kind, in JSON, is all that is asked of the API server' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l kube-api-burst -d 'No effect: one list and one watch of each kind, in JSON, is all that is asked of the API server' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l config-sync-period -d 'No effect: watches are kept complete by themselves, so there is nothing to refresh' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l iptables-sync-period -d 'No effect: no iptables rules are made; --ipvs-sync-period and --ipvs-min-sync-period set the periods of both modes' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l iptables-min-sync-period -d 'No effect: no iptables rules are made; --ipvs-sync-period and --ipvs-min-sync-period set the periods of both modes' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l show-hidden-metrics-for-version -d 'No effect: no metrics are hidden' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l log-flush-frequency -d 'No effect: the log is one stream, on standard error, unbuffered' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l log-text-split-stream -d 'No effect: the log is one stream, on standard error, unbuffered' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l log-text-info-buffer-size -d 'No effect: the log is one stream, on standard error, unbuffered' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l log-json-split-stream -d 'No effect: the log is one stream, on standard error, unbuffered' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l log-json-info-buffer-size -d 'No effect: the log is one stream, on standard error, unbuffered' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l vmodule -d 'No effect: there are no Go source files; RUST_LOG sets levels by room, for example proxy_daemon::sync=debug' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l add-dir-header -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l alsologtostderr -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l log-backtrace-at -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l log-dir -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l log-file -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l log-file-max-size -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l logtostderr -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l one-output -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l skip-headers -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l skip-log-headers -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l stderrthreshold -d 'No effect: the log goes to standard error, unbuffered, with one kind of header' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l boot-id-file -d 'No effect: nothing here reads it' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l machine-id-file -d 'No effect: nothing here reads it' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l network-name -d 'No effect: it is for Windows' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l source-vip -d 'No effect: it is for Windows' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l enable-dsr -d 'No effect: it is for Windows' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l root-hnsendpoint-name -d 'No effect: it is for Windows' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l forward-healthcheck-vip -d 'No effect: it is for Windows' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -l windows-service -d 'No effect: it is for Windows' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c proxy-daemon -n "__fish_proxy_daemon_needs_command" -f -a "config" -d 'Work on configuration files'
complete -c proxy-daemon -n "__fish_proxy_daemon_using_subcommand config; and not __fish_seen_subcommand_from check" -s h -l help -d 'Print help'
complete -c proxy-daemon -n "__fish_proxy_daemon_using_subcommand config; and not __fish_seen_subcommand_from check" -f -a "check" -d 'Explain a kube-proxy configuration: what carries over, what has no effect, what is wrong'
complete -c proxy-daemon -n "__fish_proxy_daemon_using_subcommand config; and __fish_seen_subcommand_from check" -l proxy-mode -d 'As on the daemon\'s command line: the mode where the file has none that exists here' -r
complete -c proxy-daemon -n "__fish_proxy_daemon_using_subcommand config; and __fish_seen_subcommand_from check" -l strict -d 'Unknown fields count as mistakes'
complete -c proxy-daemon -n "__fish_proxy_daemon_using_subcommand config; and __fish_seen_subcommand_from check" -s h -l help -d 'Print help (see more with \'--help\')'
