//! What tells the maps of one version from those of another, map by map: a daemon takes over
//! those of another version that are as its own would be.

use super::{
    Affinity, AffinityKey, Backend, BackendCounters, Config, Device, Flow, FragmentKey,
    FragmentPorts, Frontend, FrontendCounters, FrontendKey, LocalKey, OptOut, Prefix, RangeData,
    SlotRange, SocketKey, SocketPeer, Timeouts, Traffic, Tuple, hash, names,
};

/// A struct of a map.
pub(super) trait Described {
    /// Of its name, its size, and its fields' names and offsets.
    const FINGERPRINT: u64;
}

const fn of(structs: &[u64]) -> u64 {
    let mut state = 0xcbf2_9ce4_8422_2325;
    let mut i = 0;
    while i < structs.len() {
        state = hash(state, &structs[i].to_le_bytes());
        i += 1;
    }
    state
}

macro_rules! fingerprints {
    ($($name:ident: $($part:ty),*;)+) => {
        /// Of the structs in each map's keys and values, and in these. A field that keeps its
        /// place and gets another meaning needs another name.
        pub const FINGERPRINTS: [(&str, u64); names::PINNED.len()] = [
            $((names::$name, of(&[$(<$part as Described>::FINGERPRINT),*]))),+
        ];
    };
}

fingerprints! {
    CONFIG: Config, Prefix, Timeouts;
    FRONTENDS: FrontendKey, Frontend, SlotRange;
    SLOTS: ;
    BACKENDS: Backend;
    LOCALS: LocalKey;
    AFFINITY: AffinityKey, Affinity;
    PREFIXES: ;
    SOURCE_RANGES: RangeData;
    DEVICES: Device;
    OPT_OUTS: OptOut;
    FLOWS: Tuple, Flow;
    FRAGMENTS: FragmentKey, FragmentPorts;
    SOCKETS: SocketKey, SocketPeer;
    UDP_PEERS: SocketKey, SocketPeer;
    FRONTEND_COUNTERS: FrontendCounters, Traffic;
    BACKEND_COUNTERS: BackendCounters, Traffic;
    DROPS: ;
}

/// Of this version's map of that name.
#[must_use]
pub fn fingerprint(name: &str) -> Option<u64> {
    FINGERPRINTS.iter().find(|(map, _)| *map == name).map(|(_, fingerprint)| *fingerprint)
}

/// Of `AFFINITY` until version 6: an entry did not tell which place its backend had.
pub const AFFINITY_6: u64 = 0x8f06_0920_5706_bb4c;

/// Those of version 4, which daemons of that version did not write beside their maps.
const VERSION_4: [(&str, u64); 15] = [
    (names::CONFIG, 0xcbea_9e62_8b0c_4af1),
    (names::FRONTENDS, 0x091e_cf43_43fc_f8fd),
    (names::SLOTS, 0xcbf2_9ce4_8422_2325),
    (names::BACKENDS, 0x3ec6_09d2_96ca_12fa),
    (names::AFFINITY, AFFINITY_6),
    (names::PREFIXES, 0xcbf2_9ce4_8422_2325),
    (names::SOURCE_RANGES, 0x0bed_c706_56aa_2350),
    (names::DEVICES, 0x06a0_27df_e21c_a8e6),
    (names::OPT_OUTS, 0xede1_bce8_95a8_7b95),
    (names::FLOWS, 0x48a5_851d_e7d3_67ca),
    (names::FRAGMENTS, 0xe5cf_7543_c4d9_4c30),
    (names::SOCKETS, 0xf3e1_7c7e_d459_0114),
    (names::FRONTEND_COUNTERS, 0x43a6_6006_6539_f1fe),
    (names::BACKEND_COUNTERS, 0x3dcf_60cf_5d65_4ae7),
    (names::DROPS, 0xcbf2_9ce4_8422_2325),
];

/// Of a map that nothing was written beside.
#[must_use]
pub fn known(version: u32, name: &str) -> Option<u64> {
    // Version 3 had a smaller Config and was the same otherwise.
    if !(version == 4 || version == 3 && name != names::CONFIG) {
        return None;
    }
    VERSION_4.iter().find(|(map, _)| *map == name).map(|(_, fingerprint)| *fingerprint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pinned_map_has_one() {
        assert_eq!(FINGERPRINTS.map(|(name, _)| name), names::PINNED);
    }

    #[test]
    fn those_of_versions_that_wrote_none_are_remembered() {
        assert_eq!(known(4, names::FLOWS), fingerprint(names::FLOWS));
        assert_ne!(known(4, names::DEVICES), fingerprint(names::DEVICES), "a device has a MAC");
        assert_eq!(known(3, names::FLOWS), fingerprint(names::FLOWS));
        assert_eq!(known(3, names::CONFIG), None);
        assert_eq!(known(2, names::FLOWS), None);
    }

    /// As the converter of affinity in the daemon takes it for.
    #[test]
    fn affinity_was_without_a_place_until_version_6() {
        let fields = [("seen", 0), ("backend", 8), ("pad", 12)];
        let affinity = fields
            .iter()
            .fold(hash(hash(0xcbf2_9ce4_8422_2325, b"Affinity"), b"16"), |state, (name, at)| {
                hash(hash(state, name.as_bytes()), std::format!("{at}").as_bytes())
            });
        assert_eq!(Some(of(&[AffinityKey::FINGERPRINT, affinity])), known(4, names::AFFINITY));
        assert_eq!(known(4, names::AFFINITY), Some(AFFINITY_6));
    }
}
