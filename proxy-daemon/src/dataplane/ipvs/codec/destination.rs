//! `IPVS_DEST_ATTR_*` and the real server made of them.

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, ErrorContext, Nla, NlaBuffer, Parseable, parse_u8,
    parse_u16, parse_u16_be, parse_u32,
};

use super::message::parse_all;
use super::service::{address_of, family_number, family_of, parse_array, union_address};
use super::{
    CodecError, ConnectionCounts, Forward, RealServer, RealServerKey, RealServerStatus,
    StatsAttribute, Tunnel, stats,
};
use crate::model::Family;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DestinationAttribute {
    /// `union nf_inet_addr`.
    Address([u8; 16]),
    /// In network byte order on the wire.
    Port(u16),
    Forward(u32),
    Weight(u32),
    UpperThreshold(u32),
    LowerThreshold(u32),
    ActiveConnections(u32),
    InactiveConnections(u32),
    PersistentConnections(u32),
    AddressFamily(u16),
    Stats64(Vec<StatsAttribute>),
    TunnelType(u8),
    /// In network byte order on the wire.
    TunnelPort(u16),
    TunnelFlags(u16),
    Other(DefaultNla),
}

impl Nla for DestinationAttribute {
    fn value_len(&self) -> usize {
        match self {
            Self::Address(_) => 16,
            Self::Port(_) | Self::AddressFamily(_) | Self::TunnelPort(_) | Self::TunnelFlags(_) => {
                2
            }
            Self::TunnelType(_) => 1,
            Self::Forward(_)
            | Self::Weight(_)
            | Self::UpperThreshold(_)
            | Self::LowerThreshold(_)
            | Self::ActiveConnections(_)
            | Self::InactiveConnections(_)
            | Self::PersistentConnections(_) => 4,
            Self::Stats64(attributes) => attributes.as_slice().buffer_len(),
            Self::Other(attribute) => attribute.value_len(),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Address(_) => 1,
            Self::Port(_) => 2,
            Self::Forward(_) => 3,
            Self::Weight(_) => 4,
            Self::UpperThreshold(_) => 5,
            Self::LowerThreshold(_) => 6,
            Self::ActiveConnections(_) => 7,
            Self::InactiveConnections(_) => 8,
            Self::PersistentConnections(_) => 9,
            Self::AddressFamily(_) => 11,
            Self::Stats64(_) => 12,
            Self::TunnelType(_) => 13,
            Self::TunnelPort(_) => 14,
            Self::TunnelFlags(_) => 15,
            Self::Other(attribute) => attribute.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::Address(bytes) => buffer.copy_from_slice(bytes),
            Self::Port(value) | Self::TunnelPort(value) => {
                buffer.copy_from_slice(&value.to_be_bytes());
            }
            Self::AddressFamily(value) | Self::TunnelFlags(value) => {
                buffer.copy_from_slice(&value.to_ne_bytes());
            }
            Self::TunnelType(value) => buffer.fill(*value),
            Self::Forward(value)
            | Self::Weight(value)
            | Self::UpperThreshold(value)
            | Self::LowerThreshold(value)
            | Self::ActiveConnections(value)
            | Self::InactiveConnections(value)
            | Self::PersistentConnections(value) => buffer.copy_from_slice(&value.to_ne_bytes()),
            Self::Stats64(attributes) => attributes.as_slice().emit(buffer),
            Self::Other(attribute) => attribute.emit_value(buffer),
        }
    }
}

impl<'a> Parseable<NlaBuffer<&'a [u8]>> for DestinationAttribute {
    fn parse(buffer: &NlaBuffer<&'a [u8]>) -> Result<Self, DecodeError> {
        let value = buffer.value();
        Ok(match buffer.kind() {
            1 => Self::Address(parse_array(value).context("IPVS_DEST_ATTR_ADDR")?),
            2 => Self::Port(parse_u16_be(value).context("IPVS_DEST_ATTR_PORT")?),
            3 => Self::Forward(parse_u32(value).context("IPVS_DEST_ATTR_FWD_METHOD")?),
            4 => Self::Weight(parse_u32(value).context("IPVS_DEST_ATTR_WEIGHT")?),
            5 => Self::UpperThreshold(parse_u32(value).context("IPVS_DEST_ATTR_U_THRESH")?),
            6 => Self::LowerThreshold(parse_u32(value).context("IPVS_DEST_ATTR_L_THRESH")?),
            7 => Self::ActiveConnections(parse_u32(value).context("IPVS_DEST_ATTR_ACTIVE_CONNS")?),
            8 => Self::InactiveConnections(parse_u32(value).context("IPVS_DEST_ATTR_INACT_CONNS")?),
            9 => Self::PersistentConnections(
                parse_u32(value).context("IPVS_DEST_ATTR_PERSIST_CONNS")?,
            ),
            11 => Self::AddressFamily(parse_u16(value).context("IPVS_DEST_ATTR_ADDR_FAMILY")?),
            12 => Self::Stats64(parse_all(value).context("IPVS_DEST_ATTR_STATS64")?),
            13 => Self::TunnelType(parse_u8(value).context("IPVS_DEST_ATTR_TUN_TYPE")?),
            14 => Self::TunnelPort(parse_u16_be(value).context("IPVS_DEST_ATTR_TUN_PORT")?),
            15 => Self::TunnelFlags(parse_u16(value).context("IPVS_DEST_ATTR_TUN_FLAGS")?),
            _ => Self::Other(DefaultNla::parse(buffer)?),
        })
    }
}

/// The attributes that identify a real server.
pub(super) fn identity(key: &RealServerKey) -> Vec<DestinationAttribute> {
    vec![
        DestinationAttribute::Address(union_address(key.addr)),
        DestinationAttribute::Port(key.port),
        DestinationAttribute::AddressFamily(family_number(Family::of(key.addr))),
    ]
}

/// Everything that creating or changing a real server wants.
pub(super) fn full(server: &RealServer) -> Vec<DestinationAttribute> {
    let mut attributes = identity(&server.key);
    attributes.extend([
        DestinationAttribute::Forward(server.forward.number()),
        DestinationAttribute::Weight(server.weight),
        DestinationAttribute::UpperThreshold(server.upper_threshold),
        DestinationAttribute::LowerThreshold(server.lower_threshold),
    ]);
    // Kernels before 5.2 do not know them; 0 is what their absence means.
    if server.tunnel != Tunnel::default() {
        attributes.extend([
            DestinationAttribute::TunnelType(server.tunnel.kind),
            DestinationAttribute::TunnelPort(server.tunnel.port),
            DestinationAttribute::TunnelFlags(server.tunnel.flags),
        ]);
    }
    attributes
}

#[derive(Default)]
struct Parts {
    address: Option<[u8; 16]>,
    port: Option<u16>,
    forward: Option<u32>,
    weight: Option<u32>,
    upper_threshold: Option<u32>,
    lower_threshold: Option<u32>,
    active: Option<u32>,
    inactive: Option<u32>,
    persistent: Option<u32>,
    family: Option<u16>,
    stats: Option<Vec<StatsAttribute>>,
    tunnel: Tunnel,
}

impl Parts {
    fn of(attributes: Vec<DestinationAttribute>) -> Self {
        let mut parts = Self::default();
        for attribute in attributes {
            match attribute {
                DestinationAttribute::Address(value) => parts.address = Some(value),
                DestinationAttribute::Port(value) => parts.port = Some(value),
                DestinationAttribute::Forward(value) => parts.forward = Some(value),
                DestinationAttribute::Weight(value) => parts.weight = Some(value),
                DestinationAttribute::UpperThreshold(value) => parts.upper_threshold = Some(value),
                DestinationAttribute::LowerThreshold(value) => parts.lower_threshold = Some(value),
                DestinationAttribute::ActiveConnections(value) => parts.active = Some(value),
                DestinationAttribute::InactiveConnections(value) => parts.inactive = Some(value),
                DestinationAttribute::PersistentConnections(value) => {
                    parts.persistent = Some(value);
                }
                DestinationAttribute::AddressFamily(value) => parts.family = Some(value),
                DestinationAttribute::Stats64(value) => parts.stats = Some(value),
                DestinationAttribute::TunnelType(value) => parts.tunnel.kind = value,
                DestinationAttribute::TunnelPort(value) => parts.tunnel.port = value,
                DestinationAttribute::TunnelFlags(value) => parts.tunnel.flags = value,
                DestinationAttribute::Other(_) => {}
            }
        }
        parts
    }
}

fn present<T>(value: Option<T>, attribute: &'static str) -> Result<T, CodecError> {
    value.ok_or(CodecError::Missing { object: "a destination", attribute })
}

pub(super) fn decode(
    attributes: Vec<DestinationAttribute>,
    service_family: Family,
) -> Result<RealServerStatus, CodecError> {
    let parts = Parts::of(attributes);
    let family = match parts.family {
        Some(number) => family_of(number, "IPVS_DEST_ATTR_ADDR_FAMILY")?,
        None => service_family,
    };
    Ok(RealServerStatus {
        server: RealServer {
            key: RealServerKey {
                addr: address_of(present(parts.address, "IPVS_DEST_ATTR_ADDR")?, family),
                port: present(parts.port, "IPVS_DEST_ATTR_PORT")?,
            },
            forward: Forward::from_number(present(parts.forward, "IPVS_DEST_ATTR_FWD_METHOD")?),
            weight: present(parts.weight, "IPVS_DEST_ATTR_WEIGHT")?,
            upper_threshold: present(parts.upper_threshold, "IPVS_DEST_ATTR_U_THRESH")?,
            lower_threshold: present(parts.lower_threshold, "IPVS_DEST_ATTR_L_THRESH")?,
            tunnel: parts.tunnel,
        },
        connections: ConnectionCounts {
            active: present(parts.active, "IPVS_DEST_ATTR_ACTIVE_CONNS")?,
            inactive: present(parts.inactive, "IPVS_DEST_ATTR_INACT_CONNS")?,
            persistent: present(parts.persistent, "IPVS_DEST_ATTR_PERSIST_CONNS")?,
        },
        stats: stats::decode(&present(parts.stats, "IPVS_DEST_ATTR_STATS64")?),
    })
}
