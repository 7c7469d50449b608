//! Destinations that are no frontend: other ports of Services' addresses, free addresses of their
//! ranges, and all that is nothing of ours.

use crate::layout::config::client;
use crate::layout::{Config, FrontendKey};
use crate::order::{Address, Be16};
use crate::tables::Tables;

/// What a destination is that is no frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmatched {
    /// Nothing of ours.
    Foreign,
    /// A Service's address.
    UnusedPort,
    /// In the Service range.
    UnusedAddress,
}

/// The key under which the daemon enters that a ClusterIP is some Service's.
#[must_use]
#[inline(always)]
pub const fn address_key(address: Address) -> FrontendKey {
    FrontendKey::new(address, Be16::from_host(0), 0)
}

/// Whether an address is in a Service range that `CONFIG` has no place for.
#[inline(always)]
fn is_in_more(tables: &impl Tables, config: &Config, destination: &Address) -> bool {
    config.features & Config::MORE_RANGES != 0 && tables.client(destination) & client::SERVICE != 0
}

/// The key under which it enters that an external address is some Service's.
#[must_use]
#[inline(always)]
pub const fn external_key(address: Address) -> FrontendKey {
    FrontendKey::new(address, Be16::from_host(1), 0)
}

/// The first Service ranges and the least prefixes around all others are in `CONFIG`, so that what
/// goes elsewhere (nearly every packet) costs no lookup. Whether external addresses count, too, says
/// `external`.
#[inline(always)]
pub fn unmatched(
    tables: &impl Tables,
    config: &Config,
    destination: &Address,
    external: bool,
) -> Unmatched {
    let mut i = 0;
    while i < Config::MAX_PREFIXES {
        if i as u64 >= u64::from(config.prefixes) {
            break;
        }
        if config.service_prefixes[i].contains(destination) {
            return match tables.frontend(&address_key(*destination)) {
                Some(_) => Unmatched::UnusedPort,
                None if external && tables.frontend(&external_key(*destination)).is_some() => {
                    Unmatched::UnusedPort
                }
                None if (i as u64) < u64::from(config.dropping) => Unmatched::UnusedAddress,
                None if is_in_more(tables, config, destination) => Unmatched::UnusedAddress,
                None => Unmatched::Foreign,
            };
        }
        i += 1;
    }
    Unmatched::Foreign
}
