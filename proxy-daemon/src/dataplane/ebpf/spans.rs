//! Where addresses of Services are: the programs look for one only there.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use proxy_ebpf::layout::{Config, Prefix};

use super::plane::prefix;

/// Ranges that hold nothing but Services, and the least prefixes around all other addresses.
#[derive(Debug, Default)]
pub struct Spans {
    /// ServiceCIDRs.
    ranges: Vec<IpNetwork>,
    /// Those of them that there is a place for in `CONFIG`.
    placed: Vec<IpNetwork>,
    /// The rest of them.
    more: Vec<IpNetwork>,
    /// Of addresses outside these.
    others: Around,
}

/// By family (IPv4?): the least and the greatest address.
type Around = BTreeMap<bool, (IpAddr, IpAddr)>;

/// True when the address was not inside.
fn widen(around: &mut Around, address: IpAddr) -> bool {
    let mut changed = false;
    let span = around.entry(address.is_ipv4()).or_insert_with(|| {
        changed = true;
        (address, address)
    });
    let wider = (span.0.min(address), span.1.max(address));
    changed |= wider != *span;
    *span = wider;
    changed
}

/// Places left for ranges, whatever addresses there are besides.
const RANGES: usize = Config::MAX_PREFIXES - 2;

impl Spans {
    /// True when they are others than before.
    pub fn set_ranges(&mut self, ranges: &[IpNetwork]) -> bool {
        let changed = self.ranges != ranges;
        if changed {
            self.ranges = ranges.to_vec();
            self.placed = place(ranges);
            self.more = ranges.iter().filter(|r| !self.placed.contains(r)).copied().collect();
        }
        changed
    }

    /// Ranges that are to be looked for in `PREFIXES`, within a span in `CONFIG`.
    pub fn more(&self) -> &[IpNetwork] {
        &self.more
    }

    /// An address is a Service's; true when it was not inside.
    pub fn note(&mut self, address: IpAddr) -> bool {
        if self.placed.iter().any(|range| range.contains(address)) {
            return false;
        }
        widen(&mut self.others, address)
    }

    pub fn write(&self, config: &mut Config) {
        let ranges = self.placed.iter().map(|range| {
            let (address, length) = prefix(range);
            Prefix::new(address, length)
        });
        config.dropping = 0;
        config.prefixes = 0;
        for range in ranges {
            config.service_prefixes[config.dropping as usize] = range;
            config.dropping += 1;
        }
        config.prefixes = config.dropping;
        let mut others = self.others.clone();
        for range in &self.more {
            config.features |= Config::MORE_RANGES;
            widen(&mut others, range.network());
            widen(&mut others, range.broadcast());
        }
        for (least, greatest) in others.values() {
            config.service_prefixes[config.prefixes as usize] = common(*least, *greatest);
            config.prefixes += 1;
        }
    }
}

/// The first one, the first of the other family, and others as long as there is room.
fn place(ranges: &[IpNetwork]) -> Vec<IpNetwork> {
    let mut placed: Vec<IpNetwork> = Vec::new();
    let Some(first) = ranges.first() else { return placed };
    let other = ranges.iter().find(|range| range.is_ipv4() != first.is_ipv4());
    for range in [first].into_iter().chain(other).chain(ranges) {
        if placed.len() < RANGES && !placed.contains(range) {
            placed.push(*range);
        }
    }
    placed
}

/// The longest prefix with both in it.
fn common(least: IpAddr, greatest: IpAddr) -> Prefix {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let length = (bits(least) ^ bits(greatest)).leading_zeros();
    Prefix::new(least.into(), length)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_come_first_and_all_addresses_are_inside_of_something() {
        let mut spans = Spans::default();
        let ranges: Vec<IpNetwork> =
            ["10.96.0.0/16", "fd00:96::/112"].map(|range| range.parse().unwrap()).to_vec();
        assert!(spans.set_ranges(&ranges) && !spans.set_ranges(&ranges));
        assert!(!spans.note(ip("10.96.3.4")), "it is in a range");
        assert!(spans.note(ip("198.51.100.7")) && spans.note(ip("198.51.100.200")));
        assert!(!spans.note(ip("198.51.100.9")));
        assert!(spans.note(ip("2001:db8::1")));
        let mut config = Config::default();
        spans.write(&mut config);
        spans.write(&mut config);
        assert_eq!((config.dropping, config.prefixes), (2, 4));
        let inside = |address: &str, places: &[usize]| {
            places.iter().any(|place| config.service_prefixes[*place].contains(&ip(address).into()))
        };
        assert!(inside("10.96.255.1", &[0]) && inside("fd00:96::1", &[1]));
        assert!(inside("198.51.100.200", &[2, 3]) && inside("2001:db8::1", &[2, 3]));
        assert!(!inside("10.97.0.1", &[0, 1, 2, 3]) && !inside("192.0.2.1", &[0, 1, 2, 3]));
    }

    #[test]
    fn each_family_has_a_range_and_addresses_in_others_are_looked_for() {
        let mut spans = Spans::default();
        let ranges: Vec<IpNetwork> = ["10.96.0.0/16", "10.112.0.0/16", "fd00:96::/112"]
            .map(|range| range.parse().unwrap())
            .to_vec();
        spans.set_ranges(&ranges);
        let mut config = Config::default();
        spans.write(&mut config);
        assert_eq!((config.dropping, config.prefixes), (2, 3));
        assert_eq!(config.features, Config::MORE_RANGES);
        let dropped = |address: &str, config: &Config| {
            let within = &config.service_prefixes[..config.dropping as usize];
            within.iter().any(|prefix| prefix.contains(&ip(address).into()))
        };
        let looked_for = |address: &str, config: &Config| {
            config.service_prefixes[2].contains(&ip(address).into())
        };
        assert!(dropped("10.96.0.1", &config) && dropped("fd00:96::1", &config));
        assert!(!dropped("10.112.0.1", &config));
        assert_eq!(spans.more(), [ranges[1]]);
        assert!(looked_for("10.112.0.0", &config) && looked_for("10.112.255.255", &config));
        assert!(!looked_for("10.113.0.0", &config) && !looked_for("10.111.0.0", &config));
        assert!(spans.note(ip("10.112.0.7")), "it is noted in case that the range goes");
        assert!(!spans.note(ip("fd00:96::7")));
        // Two of one family have a place each.
        spans.set_ranges(&ranges[..2]);
        spans.write(&mut config);
        assert!(dropped("10.96.0.1", &config) && dropped("10.112.0.1", &config));
        assert_eq!(spans.more(), []);
    }
}
