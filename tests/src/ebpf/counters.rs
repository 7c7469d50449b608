//! What the metrics say of traffic in ebpf mode, beside what was sent.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_daemon::dataplane::ebpf::Tables;
use proxy_ebpf::layout::FrontendKey;
use proxy_ebpf::order::Be16;
use proxy_ebpf::parse::UDP;

use super::daemon::{Bed, CLUSTER, EXTERNAL};
use super::wire::{CLIENT, Namespaces, POD};
use super::{in_netns, succeeds};
use crate::daemon::{Daemon, Page};
use crate::node::SYNCED;

const CONNECTIONS: &str = "node_dataplane_service_connections_total";
const PACKETS: &str = "node_dataplane_service_packets_total";
const BYTES: &str = "node_dataplane_service_bytes_total";
const REFUSED: &str = "node_dataplane_service_refused_total";
const ENDPOINT_CONNECTIONS: &str = "node_dataplane_endpoint_connections_total";
const DROPS: &str = "node_dataplane_drops_total";
/// Scrapes that come closer together may show the same.
const APART: Duration = Duration::from_millis(1100);
const PATIENCE: Duration = Duration::from_secs(60);

/// Ethernet, IPv4 and UDP.
const HEADERS: u32 = 14 + 20 + 8;

fn service(name: &str, address: &str, external: &str, protocol: &str, port: u16) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop, uid: {name}}}\n\
         spec:\n  clusterIP: {address}\n  clusterIPs: [{address}]\n  externalIPs: [{external}]\n  \
         selector: {{app: {name}}}\n  ports: [{{port: {port}, targetPort: 5353, protocol: {protocol}}}]\n"
    )
}

fn slice(service: &str, protocol: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {service}-1\n  \
         namespace: shop\n  labels: {{kubernetes.io/service-name: {service}}}\naddressType: IPv4\n\
         ports: [{{port: 5353, protocol: {protocol}}}]\nendpoints:\n\
         - {{addresses: [\"{}\"], conditions: {{ready: true}}, nodeName: node-a}}\n",
        POD.other[0]
    )
}

const NAMES: [&str; 2] = ["198.51.100.53", "198.51.100.54"];
const NOBODY: &str = "198.51.100.99";

/// A page that shows everything until now.
fn page() -> Result<Page> {
    thread::sleep(APART);
    Page::fetch()
}

fn of(page: &Page, name: &str, label: &str) -> f64 {
    page.sum_where(name, label).unwrap_or(0.0)
}

fn rise(before: &Page, after: &Page, name: &str, label: &str) -> f64 {
    of(after, name, label) - of(before, name, label)
}

fn equal(what: &str, found: f64, expected: u32) -> Result<()> {
    ensure!((found - f64::from(expected)).abs() < 0.5, "{what}: {found}, and {expected} were sent");
    Ok(())
}

/// Answers every datagram with the same.
fn echo(bed: &Bed) -> Result<()> {
    let address: IpAddr = POD.other[0].parse()?;
    let socket = bed.net.at(&bed.net.pod, || Ok(UdpSocket::bind((address, 5353))?))?;
    // Ends with the test process.
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    });
    Ok(())
}

/// Datagrams of one flow from outside, each answered.
fn ask(bed: &Bed, to: &str, count: u32, length: usize) -> Result<()> {
    let from: IpAddr = CLIENT.other[0].parse()?;
    let socket = bed.net.at(&bed.net.client, || Ok(UdpSocket::bind((from, 0))?))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let to = SocketAddr::new(to.parse()?, 53);
    for _ in 0..count {
        socket.send_to(&vec![7; length], to)?;
        let mut buffer = [0; 2048];
        let (answered, by) = socket.recv_from(&mut buffer).with_context(|| to.to_string())?;
        ensure!(answered == length && by == to, "{answered} bytes from {by}");
    }
    Ok(())
}

fn until(daemon: &Daemon, what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        if Instant::now() > end {
            bail!("not in time: {what}\n{}", daemon.log());
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// # Errors
/// What differed.
pub fn counters() -> Result<()> {
    in_netns(|| {
        let bed = Bed::new(Namespaces::new()?)?;
        let dns = service("dns", "10.96.0.53", NAMES[0], "UDP", 53);
        let empty = service("empty", "10.96.0.99", NOBODY, "TCP", 80);
        bed.write("shop.yaml", &(dns + &empty + &slice("dns", "UDP")))?;
        bed.endpoints(&[("remote", "node-b"), ("pod", "node-a")])?;
        echo(&bed)?;
        let more = ["--endpoint-metrics", "--service-metrics-limit=10", "--ipvs-sync-period=5s"];
        let mut daemon = bed.start_with(&more)?;
        daemon.wait_for(SYNCED, PATIENCE, |at| at > 0.0)?;
        bed.settles(&daemon, &["remote", "pod"])?;
        until(&daemon, "dns", || ask(&bed, NAMES[0], 1, 10).is_ok())?;
        connections(&bed)?;
        datagrams(&bed)?;
        refusals(&bed)?;

        // What the kernel has survives the daemon.
        let before = page()?;
        daemon.kill()?;
        ask(&bed, NAMES[0], 3, 10).context("while no daemon runs")?;
        daemon = bed.start_with(&more)?;
        // The kernel goes on meanwhile, so that only the page tells when it is there.
        daemon.wait_for(SYNCED, PATIENCE, |at| at > 0.0)?;
        let after = page()?;
        let dns = "service=\"dns\"";
        equal("packets over a restart", rise(&before, &after, PACKETS, dns), 6)?;
        frontends_come_and_go(&bed, &daemon)
    })
}

/// From outside, by the devices, and from the node, in the socket.
fn connections(bed: &Bed) -> Result<()> {
    let web = "namespace=\"default\",service=\"web\",port=\"http\",protocol=\"TCP\"";
    let before = page()?;
    for _ in 0..20 {
        bed.ask(EXTERNAL[0], 80)?;
        bed.ask(EXTERNAL[1], 80)?;
    }
    let from_outside = page()?;
    equal("connections", rise(&before, &from_outside, CONNECTIONS, web), 40)?;
    let by_endpoint = rise(&before, &from_outside, ENDPOINT_CONNECTIONS, web);
    equal("connections of endpoints", by_endpoint, 40)?;
    ensure!(rise(&before, &from_outside, BYTES, web) > 0.0, "no bytes");
    let dial = format!("for i in 1 2 3 4 5; do exec 3<>/dev/tcp/{}/80; done", CLUSTER[0]);
    succeeds(&bed.cgroup.bash(&dial)?)?;
    let after = page()?;
    equal("connections of sockets", rise(&from_outside, &after, CONNECTIONS, web), 5)
}

fn datagrams(bed: &Bed) -> Result<()> {
    let before = page()?;
    ask(bed, NAMES[0], 10, 100)?;
    let after = page()?;
    let dns = "service=\"dns\",port=\"53\",protocol=\"UDP\"";
    equal("flows", rise(&before, &after, CONNECTIONS, dns), 1)?;
    for direction in ["in", "out"] {
        let label = format!("{dns},direction=\"{direction}\"");
        equal("packets", rise(&before, &after, PACKETS, &label), 10)?;
        equal("bytes", rise(&before, &after, BYTES, &label), 10 * (100 + HEADERS))?;
        // The same by endpoint, which there is one of.
        let name = "node_dataplane_endpoint_packets_total";
        let at = format!("endpoint=\"{}:5353\",direction=\"{direction}\"", POD.other[0]);
        equal("packets of the endpoint", rise(&before, &after, name, &at), 10)?;
    }
    Ok(())
}

fn refusals(bed: &Bed) -> Result<()> {
    let before = page()?;
    for _ in 0..3 {
        ensure!(bed.ask(NOBODY, 80).is_err(), "nobody is there");
    }
    let after = page()?;
    equal("refusals", rise(&before, &after, REFUSED, "service=\"empty\""), 3)?;
    equal("drops", rise(&before, &after, DROPS, "reason=\"no_endpoint\""), 3)?;
    equal("connections", rise(&before, &after, CONNECTIONS, "service=\"empty\""), 0)
}

/// A Service keeps what a frontend of it had that goes; one that comes inherits nothing.
fn frontends_come_and_go(bed: &Bed, daemon: &Daemon) -> Result<()> {
    let label = "service=\"dns\"";
    // Counted after the last scrape, so that it has to be read when the frontend is gone.
    let before = page()?;
    ask(bed, NAMES[0], 4, 10)?;
    let moved = service("dns", "10.96.0.53", NAMES[1], "UDP", 53) + &slice("dns", "UDP");
    bed.write("shop.yaml", &moved)?;
    until(daemon, "the other address", || ask(bed, NAMES[1], 1, 10).is_ok())?;
    let after = page()?;
    equal("packets, with a frontend gone", rise(&before, &after, PACKETS, label), 2 * (4 + 1))?;
    let gone = of(&after, REFUSED, "service=\"empty\"");
    equal("a Service that is gone", gone, 0)?;
    // Ids rest for a second before they are given out again.
    thread::sleep(APART);
    let late = service("late", "10.96.0.98", "198.51.100.98", "UDP", 53) + &slice("late", "UDP");
    bed.write("shop.yaml", &(moved + &late))?;
    until(daemon, "the late Service", || ask(bed, "198.51.100.98", 1, 10).is_ok())?;
    let after = page()?;
    equal("packets of the late Service", of(&after, PACKETS, "service=\"late\""), 2)?;
    equal("its connections", of(&after, CONNECTIONS, "service=\"late\""), 1)?;
    deleted_by_hand(bed, daemon)
}

/// What somebody removes is found to be missing, and is put back.
fn deleted_by_hand(bed: &Bed, daemon: &Daemon) -> Result<()> {
    let divergent = |page: &Page| page.sum("node_dataplane_divergent_objects");
    let repaired = |page: &Page| of(page, "node_dataplane_repaired_objects_total", "");
    let before = page()?;
    equal("divergence at rest", divergent(&before).context("no gauge")?, 0)?;
    equal("repairs at rest", repaired(&before), 0)?;
    let maps = bed.maps()?;
    let mut tables = Tables::open_at(|name| maps.join(name))?;
    let external = FrontendKey::new(NAMES[1].parse::<IpAddr>()?.into(), Be16::from_host(53), UDP);
    tables.remove_frontend(&external)?;
    ensure!(ask(bed, NAMES[1], 1, 10).is_err(), "the kernel has no such frontend");
    until(daemon, "noticed", || Page::fetch().is_ok_and(|page| repaired(&page) > 0.0))?;
    ask(bed, NAMES[1], 1, 10).context("put back")?;
    let after = page()?;
    equal("repairs", repaired(&after), 1)?;
    equal("divergence", divergent(&after).context("no gauge")?, 0)
}
