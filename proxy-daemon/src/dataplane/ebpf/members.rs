//! Backends as sets and tables list them, in little room: there is one for each endpoint, a few
//! times over.

use std::net::{IpAddr, Ipv4Addr};

/// A backend; `A` is its address, of any family or of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Member<A = IpAddr> {
    pub address: A,
    pub port: u16,
    pub local: bool,
    /// A process of the node itself.
    pub host: bool,
}

impl<A: Copy> Member<A> {
    /// The same, at the same address of another type.
    pub fn at<B>(&self, address: B) -> Member<B> {
        let Self { port, local, host, .. } = *self;
        Member { address, port, local, host }
    }
}

impl From<Member<Ipv4Addr>> for Member {
    fn from(member: Member<Ipv4Addr>) -> Self {
        member.at(IpAddr::V4(member.address))
    }
}

/// A list that does not change. Equal lists are equal, however they were made.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Members(List);

/// A Service port has one family, and most have this one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum List {
    V4(Box<[Member<Ipv4Addr>]>),
    /// With others among them.
    Any(Box<[Member]>),
}

impl Default for Members {
    fn default() -> Self {
        Self(List::V4(Box::default()))
    }
}

impl From<Vec<Member>> for Members {
    fn from(members: Vec<Member>) -> Self {
        let narrow = |member: &Member| match member.address {
            IpAddr::V4(address) => Some(member.at(address)),
            IpAddr::V6(_) => None,
        };
        let all: Option<Box<[_]>> = members.iter().map(narrow).collect();
        Self(all.map_or_else(|| List::Any(members.into()), List::V4))
    }
}

impl Members {
    #[must_use]
    pub const fn len(&self) -> usize {
        match &self.0 {
            List::V4(list) => list.len(),
            List::Any(list) => list.len(),
        }
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[must_use]
    pub fn get(&self, index: usize) -> Option<Member> {
        match &self.0 {
            List::V4(list) => list.get(index).copied().map(Member::from),
            List::Any(list) => list.get(index).copied(),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = Member> + '_ {
        (0..self.len()).filter_map(|index| self.get(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(address: &str) -> Member {
        Member { address: address.parse().unwrap(), port: 80, local: false, host: true }
    }

    #[test]
    fn a_list_gives_back_what_was_put_in() {
        for addresses in [&["10.0.0.1", "10.0.0.2"][..], &["10.0.0.1", "fd00::1"], &[]] {
            let all: Vec<Member> = addresses.iter().map(|address| member(address)).collect();
            let members = Members::from(all.clone());
            assert_eq!(members.iter().collect::<Vec<_>>(), all);
            assert_eq!(members.len(), all.len());
            assert_eq!(members.get(all.len()), None);
        }
        assert_eq!(Members::default(), Members::from(Vec::new()));
    }

    #[test]
    fn one_of_ipv4_takes_eight_bytes() {
        assert_eq!(size_of::<Member<Ipv4Addr>>(), 8);
    }
}
