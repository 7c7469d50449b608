//! The simulated cluster on the machine's own kernel: who reaches whom, over which
//! address, and that nothing stays behind.

#![allow(clippy::expect_used, clippy::panic, reason = "a failed expectation is the failed test")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::cluster::{Cluster, Host, OUTSIDE_EXTRA_V4, cgroup2_mount_point};

/// Connects from one host to a listener on another and returns the address that the
/// listener saw as the client's.
fn seen_address(client: &Host, server: &Host, to: IpAddr) -> IpAddr {
    let listener = server
        .in_netns(|| TcpListener::bind((to, 8080)))
        .expect("enter the server's namespace")
        .unwrap_or_else(|error| panic!("{} binds {to}: {error}", server.name()));
    thread::scope(|scope| {
        let accept = scope.spawn(|| {
            let (mut stream, peer) = listener.accept().expect("accept");
            stream.write_all(b"hello").expect("greet");
            peer.ip()
        });
        let greeting = client.in_netns(|| {
            let target = SocketAddr::new(to, 8080);
            let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
            let mut greeting = String::new();
            stream.read_to_string(&mut greeting)?;
            std::io::Result::Ok(greeting)
        });
        let greeting = greeting.expect("enter the client's namespace");
        let greeting = greeting.unwrap_or_else(|error| {
            panic!("{} to {} at {to}: {error}", client.name(), server.name())
        });
        assert_eq!(greeting, "hello");
        accept.join().expect("the accepting thread")
    })
}

/// Every pair that a real cluster connects, without any proxy in between.
fn everybody_talks(cluster: &Cluster) {
    let outside = cluster.outside().expect("asked for");
    let clients: Vec<&Host> = cluster
        .pods()
        .map(|pod| &**pod)
        .chain(cluster.nodes().iter().map(|node| &**node))
        .collect();
    let servers = clients.clone();
    for client in &clients {
        for server in &servers {
            for to in server.addresses() {
                let seen = seen_address(client, server, to);
                let own = client.address_like(to).expect("same families everywhere");
                let from_gateway =
                    cluster.nodes().iter().any(|node| std::ptr::eq(&**node, *client));
                if client.name() == server.name() {
                    assert_eq!(seen, to, "to itself");
                } else if !from_gateway {
                    assert_eq!(seen, own, "{} to {}", client.name(), server.name());
                }
            }
        }
    }
    for node in cluster.nodes() {
        for to in node.addresses() {
            let own = outside.address_like(to).expect("same families everywhere");
            assert_eq!(seen_address(outside, node, to), own);
        }
    }
}

#[test]
fn dual_stack_cluster_connects_everybody_and_keeps_addresses() {
    let cluster =
        Cluster::builder().nodes(2).pods_per_node(3).outside_client().build().expect("cluster");
    assert!(cluster.has_bridge_netfilter());
    everybody_talks(&cluster);
}

#[test]
fn single_stack_clusters_have_no_other_family() {
    for v6 in [false, true] {
        let builder = Cluster::builder().nodes(2).pod_host_numbers(&[5, 20]).outside_client();
        let builder = if v6 { builder.ipv6_only() } else { builder.ipv4_only() };
        let cluster = builder.build().expect("cluster");
        everybody_talks(&cluster);
        let pod = cluster.pod(1, 1);
        let expected: IpAddr =
            if v6 { "fd00:10:244:1::14" } else { "10.244.1.20" }.parse().expect("address");
        assert_eq!(pod.addresses(), [expected]);
        let other = if v6 { "-4" } else { "-6" };
        let listed = pod.command("ip").args([other, "-o", "addr", "show", "dev", "eth0"]);
        assert_eq!(listed.stdout_of().expect("ip"), "");
    }
}

#[test]
fn clients_second_address_is_routed_back_and_vip_ranges_follow_the_chosen_node() {
    let cluster = Cluster::builder().nodes(2).outside_client().build().expect("cluster");
    let outside = cluster.outside().expect("asked for");
    let route_to = |vip: &str| {
        outside.command("ip").args(["route", "get", vip]).stdout_of().expect("ip route get")
    };
    assert!(route_to("198.51.100.7").contains("via 10.99.0.2 "));
    cluster.route_outside_via("198.51.100.0/24", 1).expect("route");
    assert!(route_to("198.51.100.7").contains("via 10.99.0.3 "));
    // The node answers the documentation address through the fabric.
    let target = cluster.node(1).ipv4().expect("dual-stack");
    let status = outside
        .command("ip")
        .args([
            "route",
            "replace",
            "10.99.0.3",
            "dev",
            "eth0",
            "src",
            &OUTSIDE_EXTRA_V4.to_string(),
        ])
        .output()
        .expect("ip route")
        .status;
    assert!(status.success());
    assert_eq!(seen_address(outside, cluster.node(1), target.into()), OUTSIDE_EXTRA_V4);
}

#[test]
fn processes_start_in_their_pods_cgroup_and_end_with_the_cluster() {
    let cluster = Cluster::builder().nodes(1).pods_per_node(1).build().expect("cluster");
    let pod = cluster.pod(0, 0);
    let own = pod.command("cat").arg("/proc/self/cgroup").stdout_of().expect("cat");
    let mount = cgroup2_mount_point().expect("cgroup2");
    let relative = pod.cgroup().strip_prefix(&mount).expect("below the mount");
    assert!(own.contains(&format!("0::/{}", relative.display())), "{own}");
    assert!(relative.starts_with(cluster.cgroup().strip_prefix(&mount).expect("below")));

    let orphan = pod.command("sleep").arg("600").spawn().expect("sleep");
    let id = orphan.id();
    // As after a panic that skips the destructor of the process.
    std::mem::forget(orphan);
    let tree = cluster.cgroup().to_owned();
    drop(cluster);
    assert!(!tree.exists(), "cgroup tree removed");
    let state = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "still running: {state}");
}

/// Run by the next test as the process that crashes.
#[test]
#[ignore = "ends itself by SIGKILL; started by the test of leftovers"]
fn crashing_owner() {
    let cluster = Cluster::builder().nodes(1).pods_per_node(1).build().expect("cluster");
    // Without outputs of its own, or the reader of ours would wait for its end too.
    let quiet = std::process::Stdio::null;
    let sleeper = cluster.pod(0, 0).command("sleep").arg("600").stdout(quiet()).stderr(quiet());
    let sleeper = sleeper.spawn().expect("sleep");
    println!("sleeper={} tree={}", sleeper.id(), cluster.cgroup().display());
    let own = nix::unistd::Pid::this();
    nix::sys::signal::kill(own, nix::sys::signal::Signal::SIGKILL).expect("kill itself");
}

#[test]
fn leftovers_of_a_crashed_owner_go_at_the_next_build() {
    let program = std::env::current_exe().expect("own path");
    let crashed = std::process::Command::new(program)
        .args(["--ignored", "--exact", "crashing_owner", "--nocapture"])
        .output()
        .expect("run the owner");
    assert!(!crashed.status.success());
    let printed = String::from_utf8_lossy(&crashed.stdout).into_owned();
    let field = |name: &str| {
        let words = printed.split_whitespace();
        let found = words.filter_map(|word| word.strip_prefix(name)).next();
        found.unwrap_or_else(|| panic!("{name} in {printed}")).to_owned()
    };
    let (sleeper, tree) = (field("sleeper="), field("tree="));
    assert!(std::path::Path::new(&tree).exists(), "a crash leaves the tree");

    // Another test's build may be the next one: either way the tree goes.
    let cluster = Cluster::builder().build().expect("cluster");
    let deadline = Instant::now() + Duration::from_secs(5);
    while std::path::Path::new(&tree).exists() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    assert!(!std::path::Path::new(&tree).exists(), "removed at the next build");
    let state = std::fs::read_to_string(format!("/proc/{sleeper}/stat")).unwrap_or_default();
    assert!(!state.contains("(sleep)") || state.contains(") Z "), "still running: {state}");
    drop(cluster);
}

#[test]
fn building_two_nodes_of_three_pods_is_quick() {
    let started = Instant::now();
    let cluster =
        Cluster::builder().nodes(2).pods_per_node(3).outside_client().build().expect("cluster");
    let took = started.elapsed();
    println!("built in {took:?}");
    assert!(took < Duration::from_secs(5), "{took:?}");
    drop(cluster);
}
