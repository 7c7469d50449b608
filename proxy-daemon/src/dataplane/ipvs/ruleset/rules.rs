//! The chains and rules of one family's table. They depend on the configuration only;
//! Services are elements of the sets.
//!
//! Where they stand among the hooks of `net/netfilter/ipvs/ip_vs_core.c` (`ip_vs_ops4`,
//! priorities from `uapi/linux/netfilter_ipv4.h`):
//!
//! - IPVS takes connections at LOCAL_IN (98, 99) and LOCAL_OUT (-99, -98), so the
//!   packets it is going to translate show their frontend in PREROUTING and at any
//!   earlier priority of LOCAL_IN and LOCAL_OUT. Refusals and marks are decided there.
//! - It sends the translated packet through LOCAL_OUT once more and then POSTROUTING,
//!   with the conntrack entry of the client's packet (`net.ipv4.vs.conntrack=1`). The
//!   mark survives, and the nat hook sees the first packet of the connection, whose
//!   destination is the endpoint now.

use ipnetwork::IpNetwork;

use crate::kernel::netlink::Message;
use crate::kernel::nftables::{
    Base, BaseChain, ChainKind, CompareOp, CtKey, Expression, Field, Hook, MetaKey, Register,
    Reject, Table, Verdict,
};
use crate::model::{Family, LocalDetect, Protocol};

use super::RulesetConfig;
use super::element::Set;

/// Before destination NAT (-100) and after conntrack (-200): frontends are as the client
/// knows them.
const BEFORE_NAT: i32 = -110;
/// `NF_IP_PRI_NAT_DST` is where the kernel translates, whatever the priority of the
/// chain (`nf_nat_register_fn`); this only puts us before other nat chains.
const DESTINATION_NAT: i32 = -105;
/// After destination NAT, before IPVS takes packets of the host.
const AFTER_NAT: i32 = -99;
/// `NF_IP_PRI_FILTER`: before IPVS takes the packet in INPUT.
const FILTER: i32 = 0;
/// `NF_IP_PRI_NAT_SRC`.
const SOURCE_NAT: i32 = 100;

/// `NF_CT_STATE_BIT(IP_CT_NEW)`.
const CT_NEW: u32 = 8;
/// `IPS_DST_NAT`.
const CT_DESTINATION_NAT: u32 = 1 << 5;
/// ICMP type 3 code 3, and ICMPv6 type 1 code 4: port unreachable (RFC 792, RFC 4443).
const PORT_UNREACHABLE_V4: u8 = 3;
const PORT_UNREACHABLE_V6: u8 = 4;

/// Where one-register values are loaded.
const R0: Register = Register(0);

const MARK_CHAIN: &str = "mark-masquerade";
const REJECT_CHAIN: &str = "reject-connection";
const VIP_PORT_CHAIN: &str = "vip-port";
const REFUSE_CHAIN: &str = "refuse";
const SOURCES_CHAIN: &str = "cluster-ip-sources";
const ARRIVING_CHAIN: &str = "arriving";
const FROM_HOST_CHAIN: &str = "from-host";
const GUARD_CHAIN: &str = "source-ranges";
const INSIDE_CHAIN: &str = "inside";
const NO_SERVICE_CHAIN: &str = "no-service";

/// A chain with its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chain {
    pub name: &'static str,
    base: Option<BaseChain>,
    pub rules: Vec<Vec<Expression>>,
}

/// Every chain, in an order in which a jump's target comes before the jump.
pub(super) fn chains(family: Family, config: &RulesetConfig, mark: u32) -> Vec<Chain> {
    let rules = Rules { family };
    let plain = |name, rules| Chain { name, base: None, rules };
    let new = |chain| vec![if_new(chain)];
    let [filter, nat] = [ChainKind::Filter, ChainKind::Nat];
    let mut chains = vec![
        plain(MARK_CHAIN, vec![set_mark(mark)]),
        plain(REJECT_CHAIN, rules.reject()),
        plain(VIP_PORT_CHAIN, rules.vip_port()),
        plain(REFUSE_CHAIN, rules.refuse()),
        plain(SOURCES_CHAIN, rules.cluster_ip_sources(config)),
        plain(GUARD_CHAIN, rules.source_ranges()),
        plain(INSIDE_CHAIN, vec![rules.redirect(Set::ShortCircuit)]),
        plain(ARRIVING_CHAIN, rules.arriving()),
        plain(FROM_HOST_CHAIN, rules.sent_by_host()),
        base("prerouting", filter, Hook::Prerouting, BEFORE_NAT, new(ARRIVING_CHAIN)),
        base("output", filter, Hook::Output, BEFORE_NAT, new(FROM_HOST_CHAIN)),
        base(
            "redirect-arriving",
            nat,
            Hook::Prerouting,
            DESTINATION_NAT,
            rules.redirect_arriving(config),
        ),
        base("redirect-output", nat, Hook::Output, DESTINATION_NAT, rules.redirect_own()),
        base("refuse-output", filter, Hook::Output, AFTER_NAT, new(REFUSE_CHAIN)),
        base("input", filter, Hook::Input, FILTER, new(REFUSE_CHAIN)),
        base("postrouting", nat, Hook::Postrouting, SOURCE_NAT, rules.postrouting(mark)),
    ];
    let no_service = rules.no_service(config);
    if !no_service.is_empty() {
        let filter = |name, hook| base(name, filter, hook, FILTER, new(NO_SERVICE_CHAIN));
        chains.extend([
            plain(NO_SERVICE_CHAIN, no_service),
            filter("forward", Hook::Forward),
            filter("output-filter", Hook::Output),
        ]);
    }
    chains
}

/// The messages that create them.
pub(super) fn requests(table: Table<'_>, chains: &[Chain]) -> Vec<Message> {
    let create = chains.iter().map(|chain| table.add_chain(chain.name, chain.base));
    let fill = chains
        .iter()
        .flat_map(|chain| chain.rules.iter().map(|rule| table.append_rule(chain.name, rule)));
    create.chain(fill).collect()
}

const fn base(
    name: &'static str,
    kind: ChainKind,
    hook: Hook,
    priority: i32,
    rules: Vec<Vec<Expression>>,
) -> Chain {
    Chain { name, base: Some(BaseChain { kind, hook, priority }), rules }
}

struct Rules {
    family: Family,
}

impl Rules {
    fn arriving(&self) -> Vec<Vec<Expression>> {
        vec![
            rule(self.frontend_in(Set::Guarded), jump(GUARD_CHAIN)),
            rule(self.frontend_in(Set::Masquerade), jump(MARK_CHAIN)),
            rule(self.frontend_in(Set::ClusterIps), jump(SOURCES_CHAIN)),
        ]
    }

    fn source_ranges(&self) -> Vec<Vec<Expression>> {
        let width = self.address_registers();
        let [address, protocol, port, _] = self.frontend_in(Set::Guarded);
        let source = self.load_address(Direction::Source, width + 2);
        let lookup = Expression::Lookup { set: Set::Allowed.name(), key: R0 };
        vec![
            rule([address, protocol, port, source, lookup], Expression::Verdict(Verdict::Return)),
            vec![Expression::Counter, Expression::Verdict(Verdict::Drop)],
        ]
    }

    /// Clients inside the cluster by one map, then everybody by the other.
    fn redirect_arriving(&self, config: &RulesetConfig) -> Vec<Vec<Expression>> {
        let inside = self.pods(config).into_iter().map(|matches| rule(matches, jump(INSIDE_CHAIN)));
        inside.chain([self.redirect(Set::Shared)]).collect()
    }

    fn redirect_own(&self) -> Vec<Vec<Expression>> {
        vec![self.redirect(Set::ShortCircuit), self.redirect(Set::Shared)]
    }

    /// One virtual server has one set of endpoints and one memory of its clients: who
    /// needs another is sent to another virtual server of the same Service. IPVS finds
    /// the connection entry unconfirmed and alters the reply side only
    /// (`ip_vs_update_conntrack`), so both translations are undone on the way back.
    fn redirect(&self, map: Set) -> Vec<Expression> {
        let [address, protocol, port, _] = self.frontend_in(map);
        let target = Register(0);
        let nat = Expression::DestinationNat {
            family: self.family,
            address: target,
            port: Register(self.address_registers()),
        };
        let lookup = Expression::LookupMap { map: map.name(), key: R0, to: target };
        vec![address, protocol, port, lookup, nat]
    }

    /// Traffic of the host itself is always masqueraded: for an address on the dummy
    /// interface the kernel chooses that same address as the source, to which no
    /// endpoint could reply.
    fn sent_by_host(&self) -> Vec<Vec<Expression>> {
        let from_vip_to_vip = [
            self.load_address(Direction::Source, 0),
            Expression::Lookup { set: Set::Vips.name(), key: R0 },
            self.load_address(Direction::Destination, 0),
            Expression::Lookup { set: Set::Vips.name(), key: R0 },
        ];
        vec![
            rule(self.frontend_in(Set::Guarded), jump(GUARD_CHAIN)),
            rule(from_vip_to_vip, jump(MARK_CHAIN)),
            rule(self.frontend_in(Set::Masquerade), jump(MARK_CHAIN)),
            rule(self.frontend_in(Set::ClusterIps), jump(MARK_CHAIN)),
        ]
    }

    fn refuse(&self) -> Vec<Vec<Expression>> {
        let vip = [
            self.load_address(Direction::Destination, 0),
            Expression::Lookup { set: Set::Vips.name(), key: R0 },
        ];
        vec![
            counted(self.frontend_in(Set::Drop), Expression::Verdict(Verdict::Drop)),
            counted(self.frontend_in(Set::Reject), goto(REJECT_CHAIN)),
            rule(vip, goto(VIP_PORT_CHAIN)),
        ]
    }

    /// A chain of its own rather than an inverted lookup: a packet without a port
    /// breaks off any rule that loads one, and must be refused all the same.
    fn vip_port(&self) -> Vec<Vec<Expression>> {
        // Virtual servers that are no frontends are reached through a redirect only.
        let redirected = ct_bit(CtKey::Status, CT_DESTINATION_NAT);
        let hidden = redirected.into_iter().chain(self.frontend_in(Set::Owned));
        vec![
            rule(self.frontend_in(Set::Frontends), Expression::Verdict(Verdict::Return)),
            rule(hidden, Expression::Verdict(Verdict::Return)),
            vec![Expression::Counter, goto(REJECT_CHAIN)],
        ]
    }

    fn reject(&self) -> Vec<Vec<Expression>> {
        let is_tcp = [
            Expression::LoadMeta { key: MetaKey::L4Protocol, to: R0 },
            Expression::Compare {
                register: R0,
                op: CompareOp::Equal,
                value: vec![Protocol::Tcp.number()],
            },
        ];
        let code = match self.family {
            Family::V4 => PORT_UNREACHABLE_V4,
            Family::V6 => PORT_UNREACHABLE_V6,
        };
        vec![
            rule(is_tcp, Expression::Reject(Reject::TcpReset)),
            vec![Expression::Reject(Reject::IcmpUnreachable { code })],
        ]
    }

    /// Reached for ClusterIP frontends from PREROUTING: returns for sources that are
    /// pods of this cluster, marks the others.
    fn cluster_ip_sources(&self, config: &RulesetConfig) -> Vec<Vec<Expression>> {
        if config.masquerade_all {
            return vec![vec![jump(MARK_CHAIN)]];
        }
        let mut local = self.pods(config);
        // When no source can be told to be a pod (of this family), none is taken for an
        // outsider: pods would lose their addresses.
        if local.is_empty() {
            return Vec::new();
        }
        for matches in &mut local {
            matches.push(Expression::Verdict(Verdict::Return));
        }
        local.push(vec![jump(MARK_CHAIN)]);
        local
    }

    /// What tells that a packet comes from a pod: one of these.
    fn pods(&self, config: &RulesetConfig) -> Vec<Vec<Expression>> {
        match &config.local_detect {
            LocalDetect::Unknown => Vec::new(),
            LocalDetect::Cidrs(cidrs) => {
                cidrs.iter().filter_map(|cidr| self.source_in(*cidr)).collect()
            }
            LocalDetect::Bridge(name) => {
                // With its NUL the comparison is of the whole name.
                vec![input_name(format!("{name}\0").into_bytes())]
            }
            LocalDetect::InterfacePrefix(prefix) => vec![input_name(prefix.as_bytes().to_vec())],
        }
    }

    /// Drops what goes to an address of the Service CIDRs that is no Service's. After
    /// destination NAT and IPVS, where the packets of Services (those of other proxies on
    /// this node too) have their endpoint's address or, as long as the address is on the
    /// node, are not forwarded.
    fn no_service(&self, config: &RulesetConfig) -> Vec<Vec<Expression>> {
        let drop = || Expression::Verdict(Verdict::Drop);
        let cidrs = config.service_cidrs.iter();
        let mut rules: Vec<Vec<Expression>> = cidrs
            .filter_map(|cidr| self.address_in(Direction::Destination, *cidr))
            .map(|matches| counted(matches, drop()))
            .collect();
        if !rules.is_empty() {
            let vip = [
                self.load_address(Direction::Destination, 0),
                Expression::Lookup { set: Set::Vips.name(), key: R0 },
            ];
            rules.insert(0, rule(vip, Expression::Verdict(Verdict::Return)));
        }
        rules
    }

    fn source_in(&self, cidr: IpNetwork) -> Option<Vec<Expression>> {
        self.address_in(Direction::Source, cidr)
    }

    fn address_in(&self, direction: Direction, cidr: IpNetwork) -> Option<Vec<Expression>> {
        let (family, network, mask) = match cidr {
            IpNetwork::V4(cidr) => {
                (Family::V4, cidr.network().octets().to_vec(), cidr.mask().octets().to_vec())
            }
            IpNetwork::V6(cidr) => {
                (Family::V6, cidr.network().octets().to_vec(), cidr.mask().octets().to_vec())
            }
        };
        let xor = vec![0; mask.len()];
        (family == self.family).then(|| {
            vec![
                self.load_address(direction, 0),
                Expression::Bitwise { register: R0, mask, xor },
                Expression::Compare { register: R0, op: CompareOp::Equal, value: network },
            ]
        })
    }

    fn postrouting(&self, mark: u32) -> Vec<Vec<Expression>> {
        let mut marked = vec![
            Expression::LoadMeta { key: MetaKey::Mark, to: R0 },
            bits(mark, 0),
            Expression::Compare {
                register: R0,
                op: CompareOp::NotEqual,
                value: 0_u32.to_ne_bytes().to_vec(),
            },
        ];
        // A packet that is encapsulated after this comes by again, and must not be
        // masqueraded a second time.
        marked.extend(change_mark(!mark, 0));
        let width = self.address_registers();
        let hairpin = [
            self.load_address(Direction::Source, 0),
            self.load_address(Direction::Destination, width),
            Expression::LoadMeta { key: MetaKey::L4Protocol, to: Register(2 * width) },
            load_port(2 * width + 1),
            Expression::Lookup { set: Set::Hairpin.name(), key: R0 },
        ];
        vec![rule(marked, Expression::Masquerade), rule(hairpin, Expression::Masquerade)]
    }

    /// Destination address, protocol and port are in this set.
    fn frontend_in(&self, set: Set) -> [Expression; 4] {
        let width = self.address_registers();
        [
            self.load_address(Direction::Destination, 0),
            Expression::LoadMeta { key: MetaKey::L4Protocol, to: Register(width) },
            load_port(width + 1),
            Expression::Lookup { set: set.name(), key: R0 },
        ]
    }

    const fn address_registers(&self) -> u8 {
        match self.family {
            Family::V4 => 1,
            Family::V6 => 4,
        }
    }

    /// Offsets of the addresses in the IPv4 (RFC 791) and IPv6 (RFC 8200) headers.
    const fn load_address(&self, direction: Direction, register: u8) -> Expression {
        let offset = match (self.family, direction) {
            (Family::V4, Direction::Source) => 12,
            (Family::V4, Direction::Destination) => 16,
            (Family::V6, Direction::Source) => 8,
            (Family::V6, Direction::Destination) => 24,
        };
        let length = Field::Address(self.family).length();
        Expression::LoadPayload { base: Base::Network, offset, length, to: Register(register) }
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Source,
    Destination,
}

fn rule(matches: impl IntoIterator<Item = Expression>, action: Expression) -> Vec<Expression> {
    matches.into_iter().chain(std::iter::once(action)).collect()
}

fn counted(matches: impl IntoIterator<Item = Expression>, action: Expression) -> Vec<Expression> {
    rule(matches.into_iter().chain([Expression::Counter]), action)
}

/// Why a rule with a counter refuses or drops what it counts: the n-th one of its chain. With
/// the names that ebpf mode has for the same.
pub(super) fn reason(chain: &str, place: usize) -> Option<&'static str> {
    Some(match (chain, place) {
        (REFUSE_CHAIN, 0) => "no_local_endpoint",
        (REFUSE_CHAIN, _) => "no_endpoint",
        (VIP_PORT_CHAIN, _) => "unused_port",
        (GUARD_CHAIN, _) => "source_range",
        (NO_SERVICE_CHAIN, _) => "unused_address",
        _ => return None,
    })
}

fn jump(chain: &str) -> Expression {
    Expression::Verdict(Verdict::Jump(chain.to_owned()))
}

fn goto(chain: &str) -> Expression {
    Expression::Verdict(Verdict::Goto(chain.to_owned()))
}

/// Destination port: the second 16 bits in TCP, UDP and SCTP alike.
const fn load_port(register: u8) -> Expression {
    Expression::LoadPayload { base: Base::Transport, offset: 2, length: 2, to: Register(register) }
}

/// New connections only: replies, ICMP errors (related) and connections from before a
/// Service lost its endpoints stay alone, and cost one rule.
fn if_new(chain: &str) -> Vec<Expression> {
    rule(ct_bit(CtKey::State, CT_NEW), jump(chain))
}

fn ct_bit(key: CtKey, bit: u32) -> [Expression; 3] {
    [
        Expression::LoadCt { key, to: R0 },
        bits(bit, 0),
        Expression::Compare {
            register: R0,
            op: CompareOp::NotEqual,
            value: 0_u32.to_ne_bytes().to_vec(),
        },
    ]
}

fn input_name(value: Vec<u8>) -> Vec<Expression> {
    vec![
        Expression::LoadMeta { key: MetaKey::InputName, to: R0 },
        Expression::Compare { register: R0, op: CompareOp::Equal, value },
    ]
}

/// On values in host byte order.
fn bits(mask: u32, xor: u32) -> Expression {
    Expression::Bitwise {
        register: R0,
        mask: mask.to_ne_bytes().to_vec(),
        xor: xor.to_ne_bytes().to_vec(),
    }
}

fn change_mark(mask: u32, xor: u32) -> [Expression; 3] {
    [
        Expression::LoadMeta { key: MetaKey::Mark, to: R0 },
        bits(mask, xor),
        Expression::StoreMeta { key: MetaKey::Mark, from: R0 },
    ]
}

/// Other bits of the mark belong to others (network plug-ins use them).
fn set_mark(mark: u32) -> Vec<Expression> {
    change_mark(!mark, mark).to_vec()
}
