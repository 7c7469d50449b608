//! `IPVS_STATS_ATTR_*` inside `IPVS_SVC_ATTR_STATS64` and `IPVS_DEST_ATTR_STATS64`.

use netlink_packet_core::{DecodeError, DefaultNla, Nla, NlaBuffer, Parseable, parse_u64};

use super::Stats;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatsAttribute {
    /// One of the ten counters, by number.
    Counter(u16, u64),
    Other(DefaultNla),
}

/// The counters are numbered 1 to 10; 11 is padding.
const LAST: u16 = 10;

impl Nla for StatsAttribute {
    fn value_len(&self) -> usize {
        match self {
            Self::Counter(..) => 8,
            Self::Other(attribute) => attribute.value_len(),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Counter(number, _) => *number,
            Self::Other(attribute) => attribute.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::Counter(_, value) => buffer.copy_from_slice(&value.to_ne_bytes()),
            Self::Other(attribute) => attribute.emit_value(buffer),
        }
    }
}

impl<'a> Parseable<NlaBuffer<&'a [u8]>> for StatsAttribute {
    fn parse(buffer: &NlaBuffer<&'a [u8]>) -> Result<Self, DecodeError> {
        Ok(match buffer.kind() {
            number @ 1..=LAST => Self::Counter(number, parse_u64(buffer.value())?),
            _ => Self::Other(DefaultNla::parse(buffer)?),
        })
    }
}

/// A counter that is not reported reads 0.
pub(super) fn decode(attributes: &[StatsAttribute]) -> Stats {
    let mut stats = Stats::default();
    for attribute in attributes {
        let StatsAttribute::Counter(number, value) = *attribute else { continue };
        let field = match number {
            1 => &mut stats.connections,
            2 => &mut stats.in_packets,
            3 => &mut stats.out_packets,
            4 => &mut stats.in_bytes,
            5 => &mut stats.out_bytes,
            6 => &mut stats.connection_rate,
            7 => &mut stats.in_packet_rate,
            8 => &mut stats.out_packet_rate,
            9 => &mut stats.in_byte_rate,
            _ => &mut stats.out_byte_rate,
        };
        *field = value;
    }
    stats
}

#[cfg(test)]
pub(super) fn encode(stats: &Stats) -> Vec<StatsAttribute> {
    let values = [
        stats.connections,
        stats.in_packets,
        stats.out_packets,
        stats.in_bytes,
        stats.out_bytes,
        stats.connection_rate,
        stats.in_packet_rate,
        stats.out_packet_rate,
        stats.in_byte_rate,
        stats.out_byte_rate,
    ];
    (1u16..).zip(values).map(|(number, value)| StatsAttribute::Counter(number, value)).collect()
}
