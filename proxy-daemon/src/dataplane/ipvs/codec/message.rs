//! One message of the family: its command and first-level attributes.

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, ErrorContext, Nla, NlaBuffer, NlasIterator, Parseable,
    ParseableParametrized, parse_u32,
};
use netlink_packet_generic::{GenlFamily, GenlHeader};

use super::{DestinationAttribute, ServiceAttribute};

/// `IPVS_CMD_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    NewService,
    SetService,
    DelService,
    GetService,
    NewDestination,
    SetDestination,
    DelDestination,
    GetDestination,
    SetConfig,
    GetConfig,
    SetInfo,
    GetInfo,
    Zero,
    Flush,
    Other(u8),
}

impl From<Command> for u8 {
    fn from(command: Command) -> Self {
        match command {
            Command::NewService => 1,
            Command::SetService => 2,
            Command::DelService => 3,
            Command::GetService => 4,
            Command::NewDestination => 5,
            Command::SetDestination => 6,
            Command::DelDestination => 7,
            Command::GetDestination => 8,
            Command::SetConfig => 12,
            Command::GetConfig => 13,
            Command::SetInfo => 14,
            Command::GetInfo => 15,
            Command::Zero => 16,
            Command::Flush => 17,
            Command::Other(number) => number,
        }
    }
}

impl From<u8> for Command {
    fn from(number: u8) -> Self {
        match number {
            1 => Self::NewService,
            2 => Self::SetService,
            3 => Self::DelService,
            4 => Self::GetService,
            5 => Self::NewDestination,
            6 => Self::SetDestination,
            7 => Self::DelDestination,
            8 => Self::GetDestination,
            12 => Self::SetConfig,
            13 => Self::GetConfig,
            14 => Self::SetInfo,
            15 => Self::GetInfo,
            16 => Self::Zero,
            17 => Self::Flush,
            number => Self::Other(number),
        }
    }
}

/// `IPVS_CMD_ATTR_*`, and in a `SetInfo` reply `IPVS_INFO_ATTR_*`, which reuses their
/// numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandAttribute {
    Service(Vec<ServiceAttribute>),
    Destination(Vec<DestinationAttribute>),
    TimeoutTcp(u32),
    TimeoutTcpFin(u32),
    TimeoutUdp(u32),
    Version(u32),
    ConnectionTableSize(u32),
    Other(DefaultNla),
}

impl Nla for CommandAttribute {
    fn value_len(&self) -> usize {
        match self {
            Self::Service(attributes) => attributes.as_slice().buffer_len(),
            Self::Destination(attributes) => attributes.as_slice().buffer_len(),
            Self::TimeoutTcp(_)
            | Self::TimeoutTcpFin(_)
            | Self::TimeoutUdp(_)
            | Self::Version(_)
            | Self::ConnectionTableSize(_) => 4,
            Self::Other(attribute) => attribute.value_len(),
        }
    }

    fn kind(&self) -> u16 {
        match self {
            Self::Service(_) | Self::Version(_) => 1,
            Self::Destination(_) | Self::ConnectionTableSize(_) => 2,
            Self::TimeoutTcp(_) => 4,
            Self::TimeoutTcpFin(_) => 5,
            Self::TimeoutUdp(_) => 6,
            Self::Other(attribute) => attribute.kind(),
        }
    }

    fn emit_value(&self, buffer: &mut [u8]) {
        match self {
            Self::Service(attributes) => attributes.as_slice().emit(buffer),
            Self::Destination(attributes) => attributes.as_slice().emit(buffer),
            Self::TimeoutTcp(value)
            | Self::TimeoutTcpFin(value)
            | Self::TimeoutUdp(value)
            | Self::Version(value)
            | Self::ConnectionTableSize(value) => buffer.copy_from_slice(&value.to_ne_bytes()),
            Self::Other(attribute) => attribute.emit_value(buffer),
        }
    }
}

impl CommandAttribute {
    fn parse(command: Command, buffer: &NlaBuffer<&[u8]>) -> Result<Self, DecodeError> {
        let value = buffer.value();
        Ok(match (command, buffer.kind()) {
            (Command::SetInfo, 1) => Self::Version(parse_u32(value)?),
            (Command::SetInfo, 2) => Self::ConnectionTableSize(parse_u32(value)?),
            (_, 1) => Self::Service(parse_all(value).context("IPVS_CMD_ATTR_SERVICE")?),
            (_, 2) => Self::Destination(parse_all(value).context("IPVS_CMD_ATTR_DEST")?),
            (_, 4) => Self::TimeoutTcp(parse_u32(value)?),
            (_, 5) => Self::TimeoutTcpFin(parse_u32(value)?),
            (_, 6) => Self::TimeoutUdp(parse_u32(value)?),
            _ => Self::Other(DefaultNla::parse(buffer)?),
        })
    }
}

/// All attributes of a nest.
pub(super) fn parse_all<A>(bytes: &[u8]) -> Result<Vec<A>, DecodeError>
where
    A: for<'a> Parseable<NlaBuffer<&'a [u8]>>,
{
    NlasIterator::new(bytes).map(|attribute| A::parse(&attribute?)).collect()
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipvs {
    pub command: Command,
    pub attributes: Vec<CommandAttribute>,
}

impl GenlFamily for Ipvs {
    fn family_name() -> &'static str {
        super::FAMILY
    }

    fn command(&self) -> u8 {
        self.command.into()
    }

    /// `IPVS_GENL_VERSION`.
    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Ipvs {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Ipvs {
    fn parse_with_param(bytes: &[u8], header: GenlHeader) -> Result<Self, DecodeError> {
        let command = header.cmd.into();
        let attributes = NlasIterator::new(bytes)
            .map(|attribute| CommandAttribute::parse(command, &attribute?))
            .collect::<Result<_, _>>()?;
        Ok(Self { command, attributes })
    }
}
