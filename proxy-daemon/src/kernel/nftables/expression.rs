//! Expressions, the instructions a rule is made of. They work on sixteen 32-bit
//! registers.

use super::attribute::Writer;
use super::object::family_number;
use crate::model::Family;

/// `NFTA_LIST_ELEM`.
const LIST_ELEM: u16 = 1;
/// `NFTA_EXPR_NAME`, `NFTA_EXPR_DATA`.
const EXPR_NAME: u16 = 1;
const EXPR_DATA: u16 = 2;
/// `NFTA_DATA_VALUE`, `NFTA_DATA_VERDICT`.
pub(super) const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
/// `NFTA_VERDICT_CODE`, `NFTA_VERDICT_CHAIN`.
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
/// `NFT_REG_VERDICT`.
const VERDICT_REGISTER: u32 = 0;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY` (`uapi/linux/netfilter/nf_nat.h`, kernel 3.14).
const RANDOM_FULLY: u32 = 1 << 4;

/// The n-th 32-bit register, `NFT_REG32_00 + n` with n below 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Register(pub u8);

impl Register {
    fn number(self) -> u32 {
        8 + u32::from(self.0)
    }
}

/// Where a payload offset counts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// `NFT_PAYLOAD_NETWORK_HEADER`.
    Network,
    /// `NFT_PAYLOAD_TRANSPORT_HEADER`: after IPv6 extension headers; loading from it
    /// breaks off the rule for later fragments.
    Transport,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetaKey {
    /// `NFT_META_MARK`, in host byte order.
    Mark,
    /// `NFT_META_IIFNAME`, padded with NUL to 16 bytes.
    InputName,
    /// `NFT_META_L4PROTO`: the transport protocol, also behind extension headers.
    L4Protocol,
}

impl MetaKey {
    const fn number(self) -> u32 {
        match self {
            Self::Mark => 3,
            Self::InputName => 6,
            Self::L4Protocol => 16,
        }
    }
}

/// What is asked of the packet's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CtKey {
    /// `NFT_CT_STATE`.
    State = 0,
    /// `NFT_CT_STATUS`.
    Status = 2,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompareOp {
    Equal,
    NotEqual,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Drop,
    Accept,
    Jump(String),
    Goto(String),
    Return,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reject {
    /// An ICMP or ICMPv6 destination unreachable with this code, by the table's family.
    IcmpUnreachable {
        code: u8,
    },
    TcpReset,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expression {
    LoadPayload {
        base: Base,
        offset: u32,
        length: u32,
        to: Register,
    },
    LoadMeta {
        key: MetaKey,
        to: Register,
    },
    StoreMeta {
        key: MetaKey,
        from: Register,
    },
    /// A bit mask in host byte order.
    LoadCt {
        key: CtKey,
        to: Register,
    },
    /// `register = (register & mask) ^ xor`.
    Bitwise {
        register: Register,
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    Compare {
        register: Register,
        op: CompareOp,
        value: Vec<u8>,
    },
    /// Goes on when the key that starts in `key` is in the set.
    Lookup {
        set: &'static str,
        key: Register,
    },
    /// As [`Expression::Lookup`] in a map; what it holds for the key goes to `to`.
    LookupMap {
        map: &'static str,
        key: Register,
        to: Register,
    },
    Verdict(Verdict),
    Reject(Reject),
    /// To the address and the port in these registers; ends the chain's hook.
    DestinationNat {
        family: Family,
        address: Register,
        port: Register,
    },
    /// Counts the packets that come by, and their bytes.
    Counter,
    /// With a source port chosen fully at random, which avoids the collisions that the
    /// sequential search meets under load.
    Masquerade,
}

impl Expression {
    pub(super) fn write(&self, list: &mut Writer) {
        list.nest(LIST_ELEM, |w| {
            w.put_str(EXPR_NAME, self.name());
            w.nest(EXPR_DATA, |w| self.write_data(w));
        });
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::LoadPayload { .. } => "payload",
            Self::LoadMeta { .. } | Self::StoreMeta { .. } => "meta",
            Self::LoadCt { .. } => "ct",
            Self::Bitwise { .. } => "bitwise",
            Self::Compare { .. } => "cmp",
            Self::Lookup { .. } | Self::LookupMap { .. } => "lookup",
            Self::Verdict(_) => "immediate",
            Self::Reject(_) => "reject",
            Self::DestinationNat { .. } => "nat",
            Self::Counter => "counter",
            Self::Masquerade => "masq",
        }
    }

    /// Attribute numbers stand in the order of the kernel's `enum nft_*_attributes`.
    fn write_data(&self, w: &mut Writer) {
        match self {
            Self::LoadPayload { base, offset, length, to } => {
                w.put_u32(1, to.number());
                w.put_u32(2, if *base == Base::Network { 1 } else { 2 });
                w.put_u32(3, *offset);
                w.put_u32(4, *length);
            }
            Self::LoadMeta { key, to } => {
                w.put_u32(1, to.number());
                w.put_u32(2, key.number());
            }
            Self::StoreMeta { key, from } => {
                w.put_u32(2, key.number());
                w.put_u32(3, from.number());
            }
            Self::LoadCt { key, to } => {
                w.put_u32(1, to.number());
                w.put_u32(2, *key as u32);
            }
            Self::Bitwise { register, mask, xor } => {
                w.put_u32(1, register.number());
                w.put_u32(2, register.number());
                // Operands are register contents, at most 64 bytes.
                w.put_u32(3, u32::try_from(mask.len()).unwrap_or(u32::MAX));
                w.nest(4, |w| w.put(DATA_VALUE, mask));
                w.nest(5, |w| w.put(DATA_VALUE, xor));
            }
            Self::Compare { register, op, value } => {
                w.put_u32(1, register.number());
                w.put_u32(2, u32::from(*op == CompareOp::NotEqual));
                w.nest(3, |w| w.put(DATA_VALUE, value));
            }
            Self::Lookup { set, key } => {
                w.put_str(1, set);
                w.put_u32(2, key.number());
            }
            Self::LookupMap { map, key, to } => {
                w.put_str(1, map);
                w.put_u32(2, key.number());
                w.put_u32(3, to.number());
            }
            Self::DestinationNat { family, address, port } => {
                // `NFT_NAT_DNAT`.
                w.put_u32(1, 1);
                w.put_u32(2, family_number(*family).into());
                w.put_u32(3, address.number());
                w.put_u32(5, port.number());
            }
            Self::Verdict(verdict) => {
                w.put_u32(1, VERDICT_REGISTER);
                w.nest(2, |w| w.nest(DATA_VERDICT, |w| verdict.write(w)));
            }
            Self::Reject(Reject::IcmpUnreachable { code }) => {
                w.put_u32(1, 0);
                w.put(2, &[*code]);
            }
            Self::Reject(Reject::TcpReset) => {
                w.put_u32(1, 1);
            }
            // From zero on.
            Self::Counter => {}
            Self::Masquerade => w.put_u32(1, RANDOM_FULLY),
        }
    }
}

impl Verdict {
    fn write(&self, w: &mut Writer) {
        let (code, chain): (i32, Option<&str>) = match self {
            Self::Drop => (0, None),
            Self::Accept => (1, None),
            Self::Jump(chain) => (-3, Some(chain)),
            Self::Goto(chain) => (-4, Some(chain)),
            Self::Return => (-5, None),
        };
        w.put(VERDICT_CODE, &code.to_be_bytes());
        if let Some(chain) = chain {
            w.put_str(VERDICT_CHAIN, chain);
        }
    }
}
