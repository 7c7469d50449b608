//! What is known of a backend, and what keeps it one.

use proxy_ebpf::layout::{self, BackendId, ServiceId};
use proxy_ebpf::order::Be16;

use super::super::members::{Member, Members};
use super::super::value::Programmed;

#[derive(Debug, Clone, Copy)]
pub(super) struct HeldBackend {
    pub id: BackendId,
    /// Frontends that have it in the one set and in the other.
    cluster: Users,
    local: Users,
    /// Frontends whose flows to it go on.
    serving: Users,
    /// The flags that the map has; 0 (which no backend has) when it has another entry, or is
    /// not known to have this one.
    pub written: u16,
}

/// How many have something. Beyond what it can tell, it stays with that: the backend then is in
/// its set until the daemon is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Users(u16);

impl Users {
    pub const fn one_more(&mut self) {
        self.0 = self.0.saturating_add(1);
    }

    pub const fn one_less(&mut self) {
        if self.0 < u16::MAX {
            self.0 = self.0.saturating_sub(1);
        }
    }

    const fn any(self) -> bool {
        self.0 > 0
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
    /// One that nobody uses yet.
    pub fn new(id: BackendId, written: u16) -> Self {
        let none = Users::default();
        Self { id, cluster: none, local: none, serving: none, written }
    }

    pub const fn users(&mut self, part: Part) -> &mut Users {
        match part {
            Part::Cluster => &mut self.cluster,
            Part::Local => &mut self.local,
            Part::Serving => &mut self.serving,
        }
    }

    pub const fn is_used(&self) -> bool {
        self.cluster.any() || self.local.any() || self.serving.any()
    }

    pub fn value(&self, service: ServiceId, member: Member) -> layout::Backend {
        use layout::Backend as B;
        let flag = |is: bool, flag| if is { flag } else { 0 };
        layout::Backend {
            address: member.address.into(),
            port: Be16::from_host(member.port),
            flags: flag(self.cluster.any(), B::IN_CLUSTER_SET)
                | flag(self.local.any(), B::IN_LOCAL_SET)
                | flag(self.serving.any(), B::SERVING)
                | flag(member.local, B::LOCAL)
                | flag(member.host, B::HOST),
            service,
        }
    }
}

/// Everything that keeps a backend one.
pub(super) fn parts_of(value: &Programmed) -> [(&Members, Part); 3] {
    use layout::Frontend as F;
    let part = |local| if value.flags & local == 0 { Part::Cluster } else { Part::Local };
    [
        (&value.node.members, part(F::NODE_LOCAL_SET)),
        (&value.outside.members, part(F::OUTSIDE_LOCAL_SET)),
        (&value.serving, Part::Serving),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_that_were_too_many_to_count_never_become_none() {
        let mut users = Users(u16::MAX - 1);
        users.one_more();
        users.one_more();
        (0..3).for_each(|_| users.one_less());
        assert_eq!(users, Users(u16::MAX));
        let mut users = Users::default();
        users.one_more();
        users.one_less();
        assert!(!users.any());
    }

    #[test]
    fn one_of_ipv4_takes_twenty_bytes() {
        assert_eq!(size_of::<(Member<std::net::Ipv4Addr>, HeldBackend)>(), 20);
    }
}
