//! The IPVS codec against the kernel, with `ipvsadm` as the independent witness.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::Path;

use nix::libc;
use proxy_daemon::dataplane::ipvs::codec::{
    FAMILY, Forward, MODULE, Netmask, RealServer, RealServerKey, Requests, SchedulerName,
    ServiceFlags, Timeouts, Tunnel, VirtualServer, VirtualServerKey, decode_destination,
    decode_info, decode_service, decode_timeouts,
};
use proxy_daemon::kernel::netlink::generic::resolve_family;
use proxy_daemon::kernel::netlink::{Errno, Message, Netlink, Socket, Subsystem};
use proxy_daemon::model::{Family, Protocol};

use crate::{in_namespace, run, run_with};

/// What `ipvsadm -Sn` prints for [`table`], apart from the order.
const SAVED: &str = "\
-A -t 10.96.0.1:443 -s rr
-a -t 10.96.0.1:443 -r 10.0.0.1:6443 -m -w 1
-A -u 10.96.0.10:53 -s wrr -o
-a -u 10.96.0.10:53 -r 10.0.0.1:53 -m -w 3
-a -u 10.96.0.10:53 -r 10.0.0.2:53 -m -w 0
-A --sctp-service 10.96.0.11:9 -s lc -p 600 -M 255.255.255.0
-a --sctp-service 10.96.0.11:9 -r 10.0.0.1:9 -m -w 5
-A -t [fd00:96::1]:80 -s sh -b sh-fallback,sh-port
-a -t [fd00:96::1]:80 -r [fd00:1::1]:8080 -m -w 1
-A -u [fd00:96::2]:53 -s mh -p 300 -M 64
-A -f 1 -s wlc -p 360
-a -f 1 -r 10.0.0.3:0 -g -w 1
-A -f 2 -6 -s rr
-a -f 2 -6 -r [fd00:1::2]:0 -g -w 2
-A -t 10.96.0.12:80 -s rr
-a -t 10.96.0.12:80 -r 10.0.0.1:80 -i -w 1 --tun-type ipip
-a -t 10.96.0.12:80 -r 10.0.0.2:80 -i -w 1 --tun-type gue --tun-port 6080 --tun-csum
-a -t 10.96.0.12:80 -r 10.0.0.3:80 -i -w 1 --tun-type gre --tun-nocsum
-a -t 10.96.0.12:80 -r [fd00:1::3]:80 -i -w 1 --tun-type ipip
-A -u 10.96.0.13:5060 -s rr -p 60 --pe sip
";

type Table = BTreeMap<VirtualServerKey, (VirtualServer, BTreeMap<RealServerKey, RealServer>)>;

fn name(text: &str) -> SchedulerName {
    SchedulerName::new(text).unwrap()
}

fn at(addr: &str, protocol: Protocol, port: u16) -> VirtualServerKey {
    VirtualServerKey::Address { addr: addr.parse().unwrap(), protocol, port }
}

fn mark(mark: u32, family: Family) -> VirtualServerKey {
    VirtualServerKey::FwMark { mark: NonZeroU32::new(mark).unwrap(), family }
}

fn service(key: VirtualServerKey, scheduler: &str) -> VirtualServer {
    VirtualServer::new(key, name(scheduler))
}

fn persistent(key: VirtualServerKey, scheduler: &str, timeout: u32) -> VirtualServer {
    VirtualServer { flags: ServiceFlags::PERSISTENT, timeout, ..service(key, scheduler) }
}

fn real(addr: &str, port: u16, weight: u32) -> RealServer {
    RealServer::new(addr.parse().unwrap(), port, weight)
}

fn routed(addr: &str, weight: u32) -> RealServer {
    RealServer { forward: Forward::DirectRoute, ..real(addr, 0, weight) }
}

fn tunnelled(addr: &str, kind: u8, port: u16, flags: u16) -> RealServer {
    let tunnel = Tunnel { kind, port, flags };
    RealServer { forward: Forward::Tunnel, tunnel, ..real(addr, 80, 1) }
}

/// Every kind of service and destination that is told apart.
fn table() -> Table {
    let sh = ServiceFlags::SCHEDULER_1 | ServiceFlags::SCHEDULER_2;
    let entries = [
        (service(at("10.96.0.1", Protocol::Tcp, 443), "rr"), vec![real("10.0.0.1", 6443, 1)]),
        (
            VirtualServer {
                flags: ServiceFlags::ONE_PACKET,
                ..service(at("10.96.0.10", Protocol::Udp, 53), "wrr")
            },
            vec![real("10.0.0.1", 53, 3), real("10.0.0.2", 53, 0)],
        ),
        (
            VirtualServer {
                netmask: Netmask::V4([255, 255, 255, 0].into()),
                ..persistent(at("10.96.0.11", Protocol::Sctp, 9), "lc", 600)
            },
            vec![real("10.0.0.1", 9, 5)],
        ),
        (
            VirtualServer { flags: sh, ..service(at("fd00:96::1", Protocol::Tcp, 80), "sh") },
            vec![real("fd00:1::1", 8080, 1)],
        ),
        (
            VirtualServer {
                netmask: Netmask::V6(64),
                ..persistent(at("fd00:96::2", Protocol::Udp, 53), "mh", 300)
            },
            Vec::new(),
        ),
        (persistent(mark(1, Family::V4), "wlc", 360), vec![routed("10.0.0.3", 1)]),
        (service(mark(2, Family::V6), "rr"), vec![routed("fd00:1::2", 2)]),
        (
            service(at("10.96.0.12", Protocol::Tcp, 80), "rr"),
            vec![
                tunnelled("10.0.0.1", 0, 0, 0),
                tunnelled("10.0.0.2", 1, 6080, 1),
                tunnelled("10.0.0.3", 2, 0, 0),
                tunnelled("fd00:1::3", 0, 0, 0),
            ],
        ),
        (
            VirtualServer {
                persistence_engine: Some(name("sip")),
                ..persistent(at("10.96.0.13", Protocol::Udp, 5060), "rr", 60)
            },
            Vec::new(),
        ),
    ];
    entries
        .into_iter()
        .map(|(server, reals)| {
            let reals = reals.into_iter().map(|real| (real.key, real)).collect();
            (server.key, (server, reals))
        })
        .collect()
}

struct Ipvs {
    socket: Socket,
    requests: Requests,
}

impl Ipvs {
    fn open() -> Self {
        let mut socket = Socket::open(Subsystem::Generic).unwrap();
        // Not loaded by anyone before: the kernel does it when it is asked for the family.
        let family = resolve_family(&mut socket, FAMILY, MODULE).unwrap();
        Self { socket, requests: Requests::new(family) }
    }

    /// The results of all; errors in their place.
    fn send(&mut self, requests: &[Message]) -> Vec<Result<(), Errno>> {
        self.socket.request_all(requests).unwrap()
    }

    fn make(&mut self, table: &Table) {
        let mut requests = Vec::new();
        for (key, (server, reals)) in table {
            requests.push(self.requests.new_service(server));
            requests.extend(reals.values().map(|real| self.requests.new_destination(key, real)));
        }
        for (index, result) in self.send(&requests).into_iter().enumerate() {
            assert_eq!(result, Ok(()), "request {index} of {}", requests.len());
        }
    }

    /// Every part of all dumps, one a line, as the codec's fuzzing starts from.
    fn record(&mut self) -> String {
        let mut parts = self.socket.dump(&self.requests.dump_services()).unwrap();
        for key in table().keys() {
            parts.extend(self.socket.dump(&self.requests.dump_destinations(key)).unwrap());
        }
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        parts.iter().map(|part| hex(&part.payload) + "\n").collect()
    }

    fn read(&mut self) -> Table {
        let mut table = Table::new();
        for part in self.socket.dump(&self.requests.dump_services()).unwrap() {
            let server = decode_service(&part).unwrap().server;
            let reals = self.socket.dump(&self.requests.dump_destinations(&server.key)).unwrap();
            let reals = reals
                .iter()
                .map(|part| decode_destination(part, server.key.family()).unwrap().server)
                .map(|real| (real.key, real))
                .collect();
            table.insert(server.key, (server, reals));
        }
        table
    }
}

fn sorted(text: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn what_the_codec_makes_is_what_ipvsadm_prints() {
    in_namespace(|| {
        Ipvs::open().make(&table());
        assert_eq!(sorted(&run("ipvsadm", &["-Sn"])), sorted(SAVED));
    });
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn what_ipvsadm_makes_is_what_the_codec_reads() {
    in_namespace(|| {
        let mut ipvs = Ipvs::open();
        run_with(SAVED, "ipvsadm", &["-R"]);
        assert_eq!(ipvs.read(), table());
        if let Some(out) = std::env::var_os("PROXY_VM_OUT") {
            let kernel = std::env::var("PROXY_VM_KERNEL").unwrap();
            let file = Path::new(&out).join(format!("dump-{kernel}.hex"));
            std::fs::write(file, ipvs.record()).unwrap();
        }
    });
}

/// `ipvsadm -Sn` leaves the thresholds out, `-Ln --thresholds` has them.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn thresholds_arrive_and_come_back() {
    in_namespace(|| {
        let mut ipvs = Ipvs::open();
        let key = at("10.96.0.1", Protocol::Tcp, 80);
        let bounded =
            RealServer { upper_threshold: 100, lower_threshold: 50, ..real("10.0.0.1", 80, 1) };
        let reals = BTreeMap::from([(bounded.key, bounded)]);
        let table = Table::from([(key, (service(key, "rr"), reals))]);
        ipvs.make(&table);
        assert_eq!(ipvs.read(), table);
        let listed = run("ipvsadm", &["-Ln", "--thresholds"]);
        let line = listed.lines().find(|line| line.contains("10.0.0.1:80")).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[2..4], ["100", "50"], "{listed}");
    });
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn objects_are_changed_and_deleted() {
    in_namespace(|| {
        let mut ipvs = Ipvs::open();
        let key = at("fd00:96::1", Protocol::Tcp, 80);
        let requests = ipvs.requests;
        let (one, two) = (real("fd00:1::1", 80, 1), real("fd00:1::2", 80, 1));
        let drained = RealServer { weight: 0, ..one.clone() };
        let sticky = persistent(key, "wrr", 10_800);
        let results = ipvs.send(&[
            requests.new_service(&service(key, "rr")),
            requests.new_destination(&key, &one),
            requests.new_destination(&key, &two),
            requests.set_service(&sticky),
            requests.set_destination(&key, &drained),
            requests.del_destination(&key, &two.key),
            requests.zero(Some(&key)),
            requests.zero(None),
        ]);
        assert_eq!(results, vec![Ok(()); 8]);
        assert_eq!(
            sorted(&run("ipvsadm", &["-Sn"])),
            [
                "-A -t [fd00:96::1]:80 -s wrr -p 10800",
                "-a -t [fd00:96::1]:80 -r [fd00:1::1]:80 -m -w 0",
            ]
        );
        let reply = ipvs.socket.get(&requests.get_service(&key)).unwrap().unwrap();
        assert_eq!(decode_service(&reply).unwrap().server, sticky);
        // Turned off again, nothing of persistence stays.
        assert_eq!(ipvs.send(&[requests.set_service(&service(key, "wrr"))]), [Ok(())]);
        let reply = ipvs.socket.get(&requests.get_service(&key)).unwrap().unwrap();
        assert_eq!(decode_service(&reply).unwrap().server, service(key, "wrr"));
        assert_eq!(ipvs.send(&[requests.del_service(&key)]), [Ok(())]);
        assert_eq!(run("ipvsadm", &["-Sn"]), "");
        ipvs.make(&table());
        assert_eq!(ipvs.send(&[requests.flush()]), [Ok(())]);
        assert_eq!(run("ipvsadm", &["-Sn"]), "");
    });
}

/// What callers tell cases apart by.
#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn refusals_have_the_errnos_that_are_documented() {
    in_namespace(|| {
        let mut ipvs = Ipvs::open();
        let requests = ipvs.requests;
        let key = at("10.96.0.1", Protocol::Tcp, 80);
        let absent = at("10.96.0.2", Protocol::Tcp, 80);
        let server = real("10.0.0.1", 80, 1);
        let results = ipvs.send(&[
            requests.new_service(&service(key, "rr")),
            requests.new_service(&service(key, "rr")),
            requests.set_service(&service(absent, "rr")),
            requests.del_service(&absent),
            requests.new_service(&service(absent, "no_such")),
            requests.new_destination(&absent, &server),
            requests.set_destination(&key, &server),
            requests.del_destination(&key, &server.key),
            requests.new_destination(&key, &server),
            requests.new_destination(&key, &server),
        ]);
        let no = |errno| Err(Errno(errno));
        assert_eq!(
            results,
            [
                Ok(()),
                no(libc::EEXIST),
                no(libc::ESRCH),
                no(libc::ESRCH),
                no(libc::ENOENT),
                no(libc::ESRCH),
                no(libc::ENOENT),
                no(libc::ENOENT),
                Ok(()),
                no(libc::EEXIST),
            ]
        );
        let got = ipvs.socket.get(&requests.get_service(&absent)).unwrap();
        assert_eq!(got, no(libc::ESRCH).map(|()| unreachable!()));
        // A service that is gone simply has no destinations.
        assert_eq!(ipvs.socket.dump(&requests.dump_destinations(&absent)).unwrap(), []);
    });
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn timeouts_and_info_are_those_of_ipvsadm() {
    in_namespace(|| {
        let mut ipvs = Ipvs::open();
        let requests = ipvs.requests;
        let change = Timeouts { tcp: Some(7_200), tcp_fin: None, udp: Some(250) };
        assert_eq!(ipvs.send(&[requests.set_timeouts(&change)]), [Ok(())]);
        let listed = run("ipvsadm", &["-Ln", "--timeout"]);
        assert_eq!(listed.trim(), "Timeout (tcp tcpfin udp): 7200 120 250");
        let reply = ipvs.socket.get(&requests.get_timeouts()).unwrap().unwrap();
        let expected = Timeouts { tcp_fin: Some(120), ..change };
        assert_eq!(decode_timeouts(&reply).unwrap(), expected);
        let reply = ipvs.socket.get(&requests.get_info()).unwrap().unwrap();
        let info = decode_info(&reply).unwrap();
        let (major, minor, patch) = info.version;
        let heading = format!(
            "IP Virtual Server version {major}.{minor}.{patch} (size={})",
            info.connection_table_size
        );
        assert_eq!(run("ipvsadm", &["-Ln"]).lines().next(), Some(heading.as_str()));
    });
}

#[test]
#[ignore = "needs a guest kernel: cargo xtask vm"]
fn a_thousand_destinations_take_few_sends() {
    in_namespace(|| {
        let mut ipvs = Ipvs::open();
        let key = at("10.96.0.1", Protocol::Tcp, 80);
        let reals: BTreeMap<_, _> = (0..1000u16)
            .map(|number| {
                let [high, low] = number.to_be_bytes();
                let real = RealServer::new([10, 1, high, low].into(), 8080, 1);
                (real.key, real)
            })
            .collect();
        let before = ipvs.socket.counters();
        let table = Table::from([(key, (service(key, "rr"), reals))]);
        ipvs.make(&table);
        let after = ipvs.socket.counters();
        assert_eq!(after.requests - before.requests, 1001);
        assert!(after.sends - before.sends <= 3, "{before:?} {after:?}");
        assert_eq!(ipvs.read(), table);
        assert_eq!(ipvs.socket.counters().dumps, 2);
    });
}
