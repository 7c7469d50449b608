//! Generic netlink: family ids are handed out when a family registers, so they are
//! asked for by name.

use netlink_packet_core::{Emitable, NlasIterator};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};

use super::{Errno, Message, Netlink, NetlinkError};
use crate::kernel::modules::MissingModule;

/// `struct genlmsghdr`: command, version, two reserved bytes.
pub const HEADER_LENGTH: usize = 4;
/// `CTRL_ATTR_FAMILY_ID` (include/uapi/linux/genetlink.h).
const FAMILY_ID: u16 = 1;

#[derive(Debug, thiserror::Error)]
pub enum FamilyError {
    #[error(transparent)]
    Missing(#[from] MissingModule),
    #[error("generic netlink family {family} cannot be looked up: {errno}")]
    Refused { family: &'static str, errno: Errno },
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// The id of `family`, which `module` provides. The kernel tries to load the module
/// itself when the family is not there (net/netlink/genetlink.c `ctrl_getfamily`).
pub fn resolve_family(
    netlink: &mut dyn Netlink,
    family: &'static str,
    module: &'static str,
) -> Result<u16, FamilyError> {
    let message = GenlMessage::from_payload(GenlCtrl {
        cmd: GenlCtrlCmd::GetFamily,
        nlas: vec![GenlCtrlAttrs::FamilyName(family.to_owned())],
    });
    let mut payload = vec![0; message.buffer_len()];
    message.emit(&mut payload);
    let request = Message { kind: message.family_id(), flags: 0, payload };
    let reply = match netlink.get(&request)? {
        Ok(reply) => reply,
        Err(Errno(nix::libc::ENOENT)) => {
            return Err(MissingModule::new(module, format!("netlink family {family}")).into());
        }
        Err(errno) => return Err(FamilyError::Refused { family, errno }),
    };
    family_id(&reply.payload)
        .ok_or(FamilyError::Netlink(NetlinkError::Malformed("a family without its id")))
}

/// Read by hand: the crate's parser refuses the whole reply over an attribute that a
/// newer kernel added.
fn family_id(payload: &[u8]) -> Option<u16> {
    NlasIterator::new(payload.get(HEADER_LENGTH..)?)
        .filter_map(Result::ok)
        .find(|attribute| attribute.kind() == FAMILY_ID)
        .and_then(|attribute| attribute.value().try_into().ok().map(u16::from_ne_bytes))
}

#[cfg(test)]
mod tests {
    use super::super::FakeNetlink;
    use super::*;

    #[test]
    fn the_id_is_read_from_the_reply() {
        let mut payload = vec![1, 2, 0, 0];
        payload.extend_from_slice(&[9, 0, 2, 0, b'I', b'P', b'V', b'S', 0, 0, 0, 0]);
        payload.extend_from_slice(&6u16.to_ne_bytes());
        payload.extend_from_slice(&FAMILY_ID.to_ne_bytes());
        payload.extend_from_slice(&[0x21, 0, 0, 0]);
        let reply = Message { kind: 16, flags: 0, payload };
        let mut fake = FakeNetlink::scripted([Ok(vec![reply])]);
        assert_eq!(resolve_family(&mut fake, "IPVS", "ip_vs").unwrap(), 0x21);
        let request = &fake.messages()[0];
        assert_eq!(request.kind, 16);
        assert_eq!(request.payload, b"\x03\x02\0\0\x09\0\x02\0IPVS\0\0\0\0");
    }

    #[test]
    fn an_absent_family_names_its_module() {
        let mut fake = FakeNetlink::scripted([Err(Errno(nix::libc::ENOENT))]);
        let error = resolve_family(&mut fake, "IPVS", "ip_vs").unwrap_err();
        assert!(matches!(&error, FamilyError::Missing(_)));
        assert!(error.to_string().contains("modprobe ip_vs"), "{error}");
    }
}
