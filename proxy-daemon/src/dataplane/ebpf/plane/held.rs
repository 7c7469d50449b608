//! What is known of a backend, and what keeps it one.

use std::net::IpAddr;

use proxy_ebpf::layout::{self, BackendId, ServiceId};
use proxy_ebpf::order::Be16;

use super::super::backends::Placed;
use super::super::value::{Member, Programmed};

#[derive(Debug, Clone, Copy)]
pub(super) struct HeldBackend {
    pub id: BackendId,
    pub member: Member,
    /// Frontends that have it in the one set and in the other.
    pub cluster: u32,
    pub local: u32,
    /// Frontends whose flows to it go on.
    pub serving: u32,
    /// The flags that the map has; 0 (which no backend has) when it has another entry, or is
    /// not known to have this one.
    pub written: u16,
}

impl Placed for HeldBackend {
    fn place(&self) -> (IpAddr, u16) {
        (self.member.address, self.member.port)
    }
}

/// What a backend is to a frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Cluster,
    Local,
    Serving,
}

/// Of a backend that found no room.
pub(super) const NO_ID: BackendId = BackendId(u32::MAX);

impl HeldBackend {
    pub const fn users(&mut self, part: Part) -> &mut u32 {
        match part {
            Part::Cluster => &mut self.cluster,
            Part::Local => &mut self.local,
            Part::Serving => &mut self.serving,
        }
    }

    pub fn value(&self, service: ServiceId) -> layout::Backend {
        use layout::Backend as B;
        let flag = |is: bool, flag| if is { flag } else { 0 };
        layout::Backend {
            address: self.member.address.into(),
            port: Be16::from_host(self.member.port),
            flags: flag(self.cluster > 0, B::IN_CLUSTER_SET)
                | flag(self.local > 0, B::IN_LOCAL_SET)
                | flag(self.serving > 0, B::SERVING)
                | flag(self.member.local, B::LOCAL)
                | flag(self.member.host, B::HOST),
            service,
        }
    }
}

/// Everything that keeps a backend one.
pub(super) fn parts_of(value: &Programmed) -> [(&[Member], Part); 3] {
    use layout::Frontend as F;
    let part = |local| if value.flags & local == 0 { Part::Cluster } else { Part::Local };
    [
        (&value.node.members, part(F::NODE_LOCAL_SET)),
        (&value.outside.members, part(F::OUTSIDE_LOCAL_SET)),
        (&value.serving, Part::Serving),
    ]
}
