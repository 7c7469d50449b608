//! The IPVS generic netlink family (include/uapi/linux/ip_vs.h, and
//! net/netfilter/ipvs/ip_vs_ctl.c for what each command wants), on the traits of
//! `netlink-packet-core` and `-generic`.
//!
//! [`Requests`] makes messages from typed values, the `decode_*` functions read replies.
//! Decoding takes any bytes: attributes of newer kernels are skipped, missing ones are
//! errors that name them.

mod destination;
mod message;
mod model;
mod service;
mod stats;
#[cfg(test)]
pub(super) mod tests;

use netlink_packet_core::{Emitable, ParseableParametrized};
use netlink_packet_generic::GenlMessage;

pub use destination::DestinationAttribute;
pub use message::{Command, CommandAttribute, Ipvs};
pub use model::{
    ConnectionCounts, Forward, Info, InvalidName, Netmask, RealServer, RealServerKey,
    RealServerStatus, SchedulerName, ServiceFlags, Stats, Timeouts, Tunnel, VirtualServer,
    VirtualServerKey, VirtualServerStatus,
};
pub use service::ServiceAttribute;
pub use stats::StatsAttribute;

use crate::kernel::netlink::Message;
use crate::model::Family;

/// The name under which the family registers, and the module that provides it.
pub const FAMILY: &str = "IPVS";
pub const MODULE: &str = "ip_vs";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("IPVS reply: {0}")]
    Malformed(String),
    #[error("IPVS reply: {object} without {attribute}")]
    Missing { object: &'static str, attribute: &'static str },
    #[error("IPVS reply: {attribute} holds {value}")]
    Invalid { attribute: &'static str, value: String },
    #[error("IPVS reply: command {found} where {expected:?} was expected")]
    Unexpected { expected: Command, found: u8 },
}

impl From<netlink_packet_core::DecodeError> for CodecError {
    fn from(error: netlink_packet_core::DecodeError) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// Makes requests to the family with this id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Requests {
    family: u16,
}

impl Requests {
    #[must_use]
    pub const fn new(family: u16) -> Self {
        Self { family }
    }

    fn encode(self, command: Command, attributes: Vec<CommandAttribute>) -> Message {
        let message = GenlMessage::from_payload(Ipvs { command, attributes });
        let mut payload = vec![0; message.buffer_len()];
        message.emit(&mut payload);
        Message { kind: self.family, flags: 0, payload }
    }

    fn with_service(self, command: Command, server: &VirtualServer) -> Message {
        self.encode(command, vec![CommandAttribute::Service(service::full(server))])
    }

    fn with_key(self, command: Command, key: &VirtualServerKey) -> Message {
        self.encode(command, vec![CommandAttribute::Service(service::identity(key))])
    }

    fn with_destination(
        self,
        command: Command,
        key: &VirtualServerKey,
        destination: Vec<DestinationAttribute>,
    ) -> Message {
        self.encode(
            command,
            vec![
                CommandAttribute::Service(service::identity(key)),
                CommandAttribute::Destination(destination),
            ],
        )
    }

    /// EEXIST when it is there; ENOENT when the kernel lacks the scheduler.
    #[must_use]
    pub fn new_service(self, server: &VirtualServer) -> Message {
        self.with_service(Command::NewService, server)
    }

    /// ESRCH when it is not there.
    #[must_use]
    pub fn set_service(self, server: &VirtualServer) -> Message {
        self.with_service(Command::SetService, server)
    }

    /// Its real servers go with it. ESRCH when it is not there.
    #[must_use]
    pub fn del_service(self, key: &VirtualServerKey) -> Message {
        self.with_key(Command::DelService, key)
    }

    /// To be sent with `get`; the reply is read by [`decode_service`].
    #[must_use]
    pub fn get_service(self, key: &VirtualServerKey) -> Message {
        self.with_key(Command::GetService, key)
    }

    /// To be sent with `dump`; each part is read by [`decode_service`].
    #[must_use]
    pub fn dump_services(self) -> Message {
        self.encode(Command::GetService, Vec::new())
    }

    /// EEXIST when it is there; ESRCH when the virtual server is not.
    #[must_use]
    pub fn new_destination(self, key: &VirtualServerKey, server: &RealServer) -> Message {
        self.with_destination(Command::NewDestination, key, destination::full(server))
    }

    /// ENOENT when it is not there; ESRCH when the virtual server is not.
    #[must_use]
    pub fn set_destination(self, key: &VirtualServerKey, server: &RealServer) -> Message {
        self.with_destination(Command::SetDestination, key, destination::full(server))
    }

    /// ENOENT when it is not there; ESRCH when the virtual server is not.
    #[must_use]
    pub fn del_destination(self, key: &VirtualServerKey, server: &RealServerKey) -> Message {
        self.with_destination(Command::DelDestination, key, destination::identity(server))
    }

    /// To be sent with `dump`; each part is read by [`decode_destination`]. The kernel
    /// has no dump of the destinations of all services. One that is gone has none.
    #[must_use]
    pub fn dump_destinations(self, key: &VirtualServerKey) -> Message {
        self.with_key(Command::GetDestination, key)
    }

    /// What is `None` stays as it is.
    #[must_use]
    pub fn set_timeouts(self, timeouts: &Timeouts) -> Message {
        let attributes = [
            timeouts.tcp.map(CommandAttribute::TimeoutTcp),
            timeouts.tcp_fin.map(CommandAttribute::TimeoutTcpFin),
            timeouts.udp.map(CommandAttribute::TimeoutUdp),
        ];
        self.encode(Command::SetConfig, attributes.into_iter().flatten().collect())
    }

    /// To be sent with `get`; the reply is read by [`decode_timeouts`].
    #[must_use]
    pub fn get_timeouts(self) -> Message {
        self.encode(Command::GetConfig, Vec::new())
    }

    /// To be sent with `get`; the reply is read by [`decode_info`].
    #[must_use]
    pub fn get_info(self) -> Message {
        self.encode(Command::GetInfo, Vec::new())
    }

    /// Removes every virtual server of the network namespace, whoever made it.
    #[must_use]
    pub fn flush(self) -> Message {
        self.encode(Command::Flush, Vec::new())
    }

    /// Zeroes the counters of one virtual server and its real servers, or of all.
    #[must_use]
    pub fn zero(self, key: Option<&VirtualServerKey>) -> Message {
        match key {
            Some(key) => self.with_key(Command::Zero, key),
            None => self.encode(Command::Zero, Vec::new()),
        }
    }
}

fn decode(message: &Message, expected: Command) -> Result<Ipvs, CodecError> {
    let (header, body) =
        GenlMessage::<Ipvs>::parse_with_param(&message.payload, message.kind)?.into_parts();
    if body.command == expected {
        Ok(body)
    } else {
        Err(CodecError::Unexpected { expected, found: header.cmd })
    }
}

/// A part of the dump of services, or the reply to `get_service`.
pub fn decode_service(message: &Message) -> Result<VirtualServerStatus, CodecError> {
    decode(message, Command::NewService)?
        .attributes
        .into_iter()
        .find_map(|attribute| match attribute {
            CommandAttribute::Service(attributes) => Some(service::decode(attributes)),
            _ => None,
        })
        .ok_or(CodecError::Missing {
            object: "a service reply",
            attribute: "IPVS_CMD_ATTR_SERVICE",
        })?
}

/// A part of the dump of the destinations of a virtual server of `family`, which kernels
/// before 3.18 leave out of the reply.
pub fn decode_destination(
    message: &Message,
    family: Family,
) -> Result<RealServerStatus, CodecError> {
    decode(message, Command::NewDestination)?
        .attributes
        .into_iter()
        .find_map(|attribute| match attribute {
            CommandAttribute::Destination(attributes) => {
                Some(destination::decode(attributes, family))
            }
            _ => None,
        })
        .ok_or(CodecError::Missing {
            object: "a destination reply",
            attribute: "IPVS_CMD_ATTR_DEST",
        })?
}

pub fn decode_timeouts(message: &Message) -> Result<Timeouts, CodecError> {
    let mut timeouts = Timeouts::default();
    for attribute in decode(message, Command::SetConfig)?.attributes {
        match attribute {
            CommandAttribute::TimeoutTcp(seconds) => timeouts.tcp = Some(seconds),
            CommandAttribute::TimeoutTcpFin(seconds) => timeouts.tcp_fin = Some(seconds),
            CommandAttribute::TimeoutUdp(seconds) => timeouts.udp = Some(seconds),
            _ => {}
        }
    }
    Ok(timeouts)
}

pub fn decode_info(message: &Message) -> Result<Info, CodecError> {
    let (mut version, mut size) = (None, None);
    for attribute in decode(message, Command::SetInfo)?.attributes {
        match attribute {
            CommandAttribute::Version(value) => version = Some(value),
            CommandAttribute::ConnectionTableSize(value) => size = Some(value),
            _ => {}
        }
    }
    let missing = |attribute| CodecError::Missing { object: "an info reply", attribute };
    let version: u32 = version.ok_or_else(|| missing("IPVS_INFO_ATTR_VERSION"))?;
    let [_, major, minor, patch] = version.to_be_bytes();
    Ok(Info {
        version: (major, minor, patch),
        connection_table_size: size.ok_or_else(|| missing("IPVS_INFO_ATTR_CONN_TAB_SIZE"))?,
    })
}
