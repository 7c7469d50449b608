//! `IPVS_SVC_ATTR_*` and the virtual server made of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, ErrorContext, Nla, NlaBuffer, Parseable, parse_string,
    parse_u16, parse_u16_be, parse_u32,
};

use super::message::parse_all;
use super::{
    CodecError, Netmask, SchedulerName, ServiceFlags, StatsAttribute, VirtualServer,
    VirtualServerKey, VirtualServerStatus, stats,
};
use crate::model::{Family, Protocol};

const OBJECT: &str = "a service";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServiceAttribute {
    /// `AF_INET` or `AF_INET6`.
    Family(u16),
    Protocol(u16),
    /// `union nf_inet_addr`.
    Address([u8; 16]),
    /// In network byte order on the wire.
    Port(u16),
    FwMark(u32),
    Scheduler(String),
    /// `struct ip_vs_flags`.
    Flags {
        flags: u32,
        mask: u32,
    },
    Timeout(u32),
    /// Network byte order bytes for IPv4, a host-order prefix length for IPv6.
    Netmask([u8; 4]),
    PersistenceEngine(String),
    Stats64(Vec<StatsAttribute>),
    Other(DefaultNla),
}

impl Nla for ServiceAttribute {
    fn value_len(&self) -> usize {
        match self {
            Self::Family(_) | Self::Protocol(_) | Self::Port(_) => 2,
            Self::Address(_) => 16,
            Self::FwMark(_) | Self::Timeout(_) | Self::Netmask(_) => 4,
            Self::Scheduler(name) | Self::PersistenceEngine(name) => name.len() + 1,
            Self::Flags { .. } => 8,
            Self::Stats64(attributes) => attributes.as_slice().buffer_len(),
            Self::Other(attribute) => attribute.value_len(),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Family(_) => 1,
            Self::Protocol(_) => 2,
            Self::Address(_) => 3,
            Self::Port(_) => 4,
            Self::FwMark(_) => 5,
            Self::Scheduler(_) => 6,
            Self::Flags { .. } => 7,
            Self::Timeout(_) => 8,
            Self::Netmask(_) => 9,
            Self::PersistenceEngine(_) => 11,
            Self::Stats64(_) => 12,
            Self::Other(attribute) => attribute.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::Family(value) | Self::Protocol(value) => {
                buffer.copy_from_slice(&value.to_ne_bytes());
            }
            Self::Port(value) => buffer.copy_from_slice(&value.to_be_bytes()),
            Self::Address(bytes) => buffer.copy_from_slice(bytes),
            Self::Netmask(bytes) => buffer.copy_from_slice(bytes),
            Self::FwMark(value) | Self::Timeout(value) => {
                buffer.copy_from_slice(&value.to_ne_bytes());
            }
            Self::Scheduler(name) | Self::PersistenceEngine(name) => {
                let (text, end) = buffer.split_at_mut(name.len());
                text.copy_from_slice(name.as_bytes());
                end.fill(0);
            }
            Self::Flags { flags, mask } => {
                let (first, second) = buffer.split_at_mut(4);
                first.copy_from_slice(&flags.to_ne_bytes());
                second.copy_from_slice(&mask.to_ne_bytes());
            }
            Self::Stats64(attributes) => attributes.as_slice().emit(buffer),
            Self::Other(attribute) => attribute.emit_value(buffer),
        }
    }
}

impl<'a> Parseable<NlaBuffer<&'a [u8]>> for ServiceAttribute {
    fn parse(buffer: &NlaBuffer<&'a [u8]>) -> Result<Self, DecodeError> {
        let value = buffer.value();
        Ok(match buffer.kind() {
            1 => Self::Family(parse_u16(value).context("IPVS_SVC_ATTR_AF")?),
            2 => Self::Protocol(parse_u16(value).context("IPVS_SVC_ATTR_PROTOCOL")?),
            3 => Self::Address(parse_array(value).context("IPVS_SVC_ATTR_ADDR")?),
            4 => Self::Port(parse_u16_be(value).context("IPVS_SVC_ATTR_PORT")?),
            5 => Self::FwMark(parse_u32(value).context("IPVS_SVC_ATTR_FWMARK")?),
            6 => Self::Scheduler(parse_string(value).context("IPVS_SVC_ATTR_SCHED_NAME")?),
            7 => {
                let [a, b, c, d, e, f, g, h]: [u8; 8] =
                    parse_array(value).context("IPVS_SVC_ATTR_FLAGS")?;
                Self::Flags {
                    flags: u32::from_ne_bytes([a, b, c, d]),
                    mask: u32::from_ne_bytes([e, f, g, h]),
                }
            }
            8 => Self::Timeout(parse_u32(value).context("IPVS_SVC_ATTR_TIMEOUT")?),
            9 => Self::Netmask(parse_array(value).context("IPVS_SVC_ATTR_NETMASK")?),
            11 => Self::PersistenceEngine(parse_string(value).context("IPVS_SVC_ATTR_PE_NAME")?),
            12 => Self::Stats64(parse_all(value).context("IPVS_SVC_ATTR_STATS64")?),
            _ => Self::Other(DefaultNla::parse(buffer)?),
        })
    }
}

pub(super) fn parse_array<const N: usize>(value: &[u8]) -> Result<[u8; N], DecodeError> {
    value.try_into().map_err(|_| DecodeError::invalid_number(N, value.len()))
}

/// `union nf_inet_addr`: an IPv4 address takes the first four bytes.
pub(super) fn union_address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(address) => address.octets(),
    }
}

pub(super) fn address_of(bytes: [u8; 16], family: Family) -> IpAddr {
    match family {
        Family::V4 => {
            let [a, b, c, d, ..] = bytes;
            Ipv4Addr::new(a, b, c, d).into()
        }
        Family::V6 => Ipv6Addr::from(bytes).into(),
    }
}

/// `AF_INET` and `AF_INET6`.
pub(super) const fn family_number(family: Family) -> u16 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

pub(super) fn family_of(number: u16, attribute: &'static str) -> Result<Family, CodecError> {
    match number {
        2 => Ok(Family::V4),
        10 => Ok(Family::V6),
        _ => Err(CodecError::Invalid { attribute, value: format!("address family {number}") }),
    }
}

/// The attributes that identify a virtual server.
pub(super) fn identity(key: &VirtualServerKey) -> Vec<ServiceAttribute> {
    let family = ServiceAttribute::Family(family_number(key.family()));
    match *key {
        VirtualServerKey::Address { addr, protocol, port } => vec![
            family,
            ServiceAttribute::Protocol(protocol.number().into()),
            ServiceAttribute::Address(union_address(addr)),
            ServiceAttribute::Port(port),
        ],
        VirtualServerKey::FwMark { mark, .. } => {
            vec![family, ServiceAttribute::FwMark(mark.get())]
        }
    }
}

/// Everything that creating or changing a virtual server wants.
pub(super) fn full(server: &VirtualServer) -> Vec<ServiceAttribute> {
    let mut attributes = identity(&server.key);
    attributes.extend([
        ServiceAttribute::Scheduler(server.scheduler.as_str().to_owned()),
        ServiceAttribute::Flags { flags: server.flags.bits(), mask: ServiceFlags::MASK },
        ServiceAttribute::Timeout(server.timeout),
        ServiceAttribute::Netmask(match server.netmask {
            Netmask::V4(mask) => mask.octets(),
            Netmask::V6(prefix) => u32::from(prefix).to_ne_bytes(),
        }),
    ]);
    if let Some(engine) = &server.persistence_engine {
        attributes.push(ServiceAttribute::PersistenceEngine(engine.as_str().to_owned()));
    }
    attributes
}

#[derive(Default)]
struct Parts {
    family: Option<u16>,
    protocol: Option<u16>,
    address: Option<[u8; 16]>,
    port: Option<u16>,
    mark: Option<u32>,
    scheduler: Option<String>,
    flags: Option<u32>,
    timeout: Option<u32>,
    netmask: Option<[u8; 4]>,
    engine: Option<String>,
    stats: Option<Vec<StatsAttribute>>,
}

impl Parts {
    fn of(attributes: Vec<ServiceAttribute>) -> Self {
        let mut parts = Self::default();
        for attribute in attributes {
            match attribute {
                ServiceAttribute::Family(value) => parts.family = Some(value),
                ServiceAttribute::Protocol(value) => parts.protocol = Some(value),
                ServiceAttribute::Address(value) => parts.address = Some(value),
                ServiceAttribute::Port(value) => parts.port = Some(value),
                ServiceAttribute::FwMark(value) => parts.mark = Some(value),
                ServiceAttribute::Scheduler(value) => parts.scheduler = Some(value),
                ServiceAttribute::Flags { flags, .. } => parts.flags = Some(flags),
                ServiceAttribute::Timeout(value) => parts.timeout = Some(value),
                ServiceAttribute::Netmask(value) => parts.netmask = Some(value),
                ServiceAttribute::PersistenceEngine(value) => parts.engine = Some(value),
                ServiceAttribute::Stats64(value) => parts.stats = Some(value),
                ServiceAttribute::Other(_) => {}
            }
        }
        parts
    }

    fn key(&self) -> Result<VirtualServerKey, CodecError> {
        let family = family_of(present(self.family, "IPVS_SVC_ATTR_AF")?, "IPVS_SVC_ATTR_AF")?;
        if let Some(mark) = self.mark.and_then(NonZeroU32::new) {
            return Ok(VirtualServerKey::FwMark { mark, family });
        }
        let number = present(self.protocol, "IPVS_SVC_ATTR_PROTOCOL")?;
        let protocol = u8::try_from(number).ok().and_then(Protocol::from_number);
        Ok(VirtualServerKey::Address {
            addr: address_of(present(self.address, "IPVS_SVC_ATTR_ADDR")?, family),
            protocol: protocol.ok_or_else(|| CodecError::Invalid {
                attribute: "IPVS_SVC_ATTR_PROTOCOL",
                value: format!("IP protocol {number}"),
            })?,
            port: present(self.port, "IPVS_SVC_ATTR_PORT")?,
        })
    }
}

fn present<T>(value: Option<T>, attribute: &'static str) -> Result<T, CodecError> {
    value.ok_or(CodecError::Missing { object: OBJECT, attribute })
}

fn name(text: &str, attribute: &'static str) -> Result<SchedulerName, CodecError> {
    SchedulerName::new(text)
        .map_err(|error| CodecError::Invalid { attribute, value: error.to_string() })
}

fn netmask(bytes: [u8; 4], family: Family) -> Result<Netmask, CodecError> {
    match family {
        Family::V4 => Ok(Netmask::V4(bytes.into())),
        Family::V6 => {
            let prefix = u32::from_ne_bytes(bytes);
            u8::try_from(prefix).ok().filter(|prefix| *prefix <= 128).map(Netmask::V6).ok_or_else(
                || CodecError::Invalid {
                    attribute: "IPVS_SVC_ATTR_NETMASK",
                    value: format!("prefix length {prefix}"),
                },
            )
        }
    }
}

pub(super) fn decode(attributes: Vec<ServiceAttribute>) -> Result<VirtualServerStatus, CodecError> {
    let parts = Parts::of(attributes);
    let key = parts.key()?;
    let scheduler = present(parts.scheduler, "IPVS_SVC_ATTR_SCHED_NAME")?;
    let engine = parts.engine.map(|engine| name(&engine, "IPVS_SVC_ATTR_PE_NAME"));
    Ok(VirtualServerStatus {
        server: VirtualServer {
            key,
            scheduler: name(&scheduler, "IPVS_SVC_ATTR_SCHED_NAME")?,
            flags: ServiceFlags::from_bits(present(parts.flags, "IPVS_SVC_ATTR_FLAGS")?),
            timeout: present(parts.timeout, "IPVS_SVC_ATTR_TIMEOUT")?,
            netmask: netmask(present(parts.netmask, "IPVS_SVC_ATTR_NETMASK")?, key.family())?,
            persistence_engine: engine.transpose()?,
        },
        stats: stats::decode(&present(parts.stats, "IPVS_SVC_ATTR_STATS64")?),
    })
}
