//! Reading what our sets and maps hold.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Element, RulesetError, Set, table, table_family};
use crate::kernel::netlink::{Netlink, NetlinkError};
use crate::kernel::nftables::{ElementBytes, Malformed, decode_elements};
use crate::model::Family;

/// A resize of a set of 100,000 elements takes some milliseconds.
const RESIZE_PAUSE: Duration = Duration::from_millis(20);
const READ_ATTEMPTS: u32 = 10;

/// Hands over all elements of all sets and maps of our tables in these families: one dump
/// for each set.
///
/// # Errors
/// When a dump fails.
pub fn read_elements<N: Netlink>(
    netlink: &mut N,
    families: &[Family],
    each: &mut dyn FnMut(Element),
) -> Result<(), RulesetError> {
    for &family in families {
        for set in Set::ALL {
            let mut unknown = 0_usize;
            for bytes in read_set(netlink, family, set)? {
                match Element::decode(set, family, &bytes) {
                    Some(element) => each(element),
                    None => unknown += 1,
                }
            }
            if unknown > 0 {
                let family = table_family(family);
                let set = set.name();
                tracing::warn!(
                    family,
                    set,
                    unknown,
                    "set elements that we never write are ignored"
                );
            }
        }
    }
    Ok(())
}

/// The kernel counts its way through a set from one part of a dump to the next
/// (`nf_tables_dump_set`), so while elements come and go, or the hash is being resized
/// behind a large addition, some come twice and as many not at all. Then it is read again;
/// what was seen once stays seen. A set that never rests is taken as it was seen: an element
/// that was missed is written once more, which changes nothing.
fn read_set<N: Netlink>(
    netlink: &mut N,
    family: Family,
    set: Set,
) -> Result<BTreeSet<ElementBytes>, RulesetError> {
    let request = table(family).list_elements(set.name());
    let mut keys = BTreeSet::new();
    for attempt in 0..READ_ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(RESIZE_PAUSE);
        }
        let mut listed = 0;
        let mut seen = BTreeSet::new();
        let mut malformed: Option<Malformed> = None;
        let result = netlink.dump_each(&request, &mut |part| match decode_elements(part) {
            Ok(part) => {
                listed += part.len();
                seen.extend(part);
            }
            Err(error) => malformed = Some(error),
        });
        if let Some(error) = malformed {
            return Err(NetlinkError::from(error).into());
        }
        let torn = match result {
            Ok(()) => seen.len() != listed,
            Err(NetlinkError::Interrupted { .. }) => true,
            Err(error) => return Err(error.into()),
        };
        keys.append(&mut seen);
        if !torn {
            break;
        }
    }
    Ok(keys)
}
