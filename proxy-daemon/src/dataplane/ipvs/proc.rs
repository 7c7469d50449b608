//! `/proc/net/ip_vs`: every real server of every virtual server in one read.
//!
//! Generic netlink dumps the real servers of one virtual server at a time
//! (`IPVS_CMD_GET_DEST` wants a service), so reading back 10,000 Services that way takes
//! 10,000 dumps. The table in `/proc` (`ip_vs_info_seq_show` in
//! `net/netfilter/ipvs/ip_vs_ctl.c`) has keys, weights and connection counts of all.

use std::io::{self, BufRead};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::model::{HostPort, Protocol};

/// A virtual server that is named by an address, with its real servers. Those of
/// firewall marks are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableEntry {
    pub address: IpAddr,
    pub protocol: Protocol,
    pub port: u16,
    pub real_servers: Vec<TableRealServer>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableRealServer {
    pub address: HostPort,
    /// `Masq`, as opposed to tunnel, direct routing and local node.
    pub masquerading: bool,
    pub weight: u32,
    pub active: u64,
    pub inactive: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum TableError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("line {line}: cannot read `{text}`")]
    Malformed { line: usize, text: String },
}

/// Reads the whole table, one virtual server at a time.
///
/// # Errors
/// Names the first line that is not as the kernel writes it.
pub fn read(table: impl BufRead, each: &mut dyn FnMut(TableEntry)) -> Result<(), TableError> {
    let mut current: Option<TableEntry> = None;
    // Three header lines: version, and the titles of both kinds of line.
    for (index, line) in table.lines().enumerate().skip(3) {
        let line = line?;
        let wrong = || TableError::Malformed { line: index + 1, text: line.clone() };
        let mut words = line.split_whitespace();
        match words.next() {
            Some("->") => {
                if let Some(entry) = &mut current {
                    entry.real_servers.push(real_server(words).ok_or_else(wrong)?);
                }
            }
            Some("FWM") => current.take().into_iter().for_each(&mut *each),
            Some(word) => {
                let protocol = protocol(word).ok_or_else(wrong)?;
                let at = words.next().and_then(host_port).ok_or_else(wrong)?;
                let entry = TableEntry {
                    address: at.address,
                    protocol,
                    port: at.port,
                    real_servers: Vec::new(),
                };
                current.replace(entry).into_iter().for_each(&mut *each);
            }
            None => {}
        }
    }
    current.into_iter().for_each(each);
    Ok(())
}

fn protocol(word: &str) -> Option<Protocol> {
    match word {
        "TCP" => Some(Protocol::Tcp),
        "UDP" => Some(Protocol::Udp),
        "SCTP" => Some(Protocol::Sctp),
        _ => None,
    }
}

fn real_server<'a>(mut words: impl Iterator<Item = &'a str>) -> Option<TableRealServer> {
    let address = host_port(words.next()?)?;
    let masquerading = words.next()? == "Masq";
    let weight = words.next()?.parse().ok()?;
    let active: u64 = words.next()?.parse().ok()?;
    let inactive: u64 = words.next()?.parse().ok()?;
    Some(TableRealServer { address, masquerading, weight, active, inactive })
}

/// `0A60000A:0035` or `[fd00:0010:…]:0035`.
fn host_port(word: &str) -> Option<HostPort> {
    let (address, port) = word.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let address = match address.strip_prefix('[').and_then(|a| a.strip_suffix(']')) {
        Some(v6) => IpAddr::V6(v6.parse::<Ipv6Addr>().ok()?),
        None => IpAddr::V4(Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?)),
    };
    Some(HostPort::new(address, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A60000A:0035 rr
  -> 0AF40105:0035      Masq    1      2          3
  -> 0AF40005:0035      Masq    0      0          0
FWM  00000007 wrr
  -> 0AF40009:0050      Route   1      0          0
UDP  [fd00:0010:0096:0000:0000:0000:000d:bba0]:0035 rr persistent 600 FFFFFFFF
  -> [fd00:0010:0244:0000:0000:0000:0000:0007]:1F90      Masq    1      0          0
SCTP 0A6B4D7B:0F1C rr ops
";

    fn parse(table: &str) -> Result<Vec<TableEntry>, TableError> {
        let mut entries = Vec::new();
        read(table.as_bytes(), &mut |entry| entries.push(entry)).map(|()| entries)
    }

    #[test]
    fn the_kernels_table_is_read() {
        let entries = parse(TABLE).unwrap();
        assert_eq!(entries.len(), 3);
        assert_eq!(entries[0].address, IpAddr::from([10, 96, 0, 10]));
        assert_eq!((entries[0].protocol, entries[0].port), (Protocol::Tcp, 53));
        let first = entries[0].real_servers[0];
        assert_eq!(first.address, "10.244.1.5:53".parse().unwrap());
        assert_eq!(
            (first.weight, first.active, first.inactive, first.masquerading),
            (1, 2, 3, true)
        );
        assert_eq!(entries[0].real_servers[1].weight, 0);
        assert_eq!(entries[1].real_servers[0].address, "[fd00:10:244::7]:8080".parse().unwrap());
        assert_eq!(entries[2].real_servers, vec![], "a mark's real server belongs to nobody else");
    }

    #[test]
    fn a_strange_line_is_named() {
        let error = parse(&TABLE.replace("TCP ", "DCCP")).unwrap_err();
        assert!(error.to_string().starts_with("line 4: cannot read `DCCP"), "{error}");
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(?s).{0,400}") {
            let _ = parse(&text);
        }
    }
}
