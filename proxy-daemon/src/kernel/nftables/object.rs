//! Requests that create, delete and dump tables, chains, rules and sets.

use crate::kernel::netlink::Message;
use crate::model::Family;

use super::attribute::{Attribute, Malformed, Writer, attributes};
use super::element::Shape;
use super::expression::Expression;

/// `NFNL_SUBSYS_NFTABLES`.
const SUBSYSTEM: u8 = 10;
/// `NFNL_MSG_BATCH_BEGIN` and `NFNL_MSG_BATCH_END`.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// `sizeof(struct nfgenmsg)`.
pub(super) const HEADER: usize = 4;

/// `NLM_F_EXCL`, `NLM_F_CREATE`, `NLM_F_APPEND`.
const EXCL: u16 = 0x200;
pub(super) const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

/// `enum nf_tables_msg_types`.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    NewTable = 0,
    DelTable = 2,
    NewChain = 3,
    GetChain = 4,
    DelChain = 5,
    NewRule = 6,
    GetRule = 7,
    DelRule = 8,
    NewSet = 9,
    GetSet = 10,
    DelSet = 11,
    NewElement = 12,
    GetElement = 13,
    DelElement = 14,
}

impl Kind {
    const fn number(self) -> u16 {
        ((SUBSYSTEM as u16) << 8) | self as u16
    }
}

/// `enum nf_inet_hooks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    Prerouting = 0,
    Input = 1,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    Filter,
    Nat,
}

/// What attaches a chain to a netfilter hook.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseChain {
    pub kind: ChainKind,
    pub hook: Hook,
    pub priority: i32,
}

/// One field of a set's key; each occupies whole 32-bit registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Address(Family),
    /// Transport protocol number.
    Protocol,
    /// Transport port, network byte order.
    Port,
}

impl Field {
    /// Octets in a key, padded to whole registers.
    #[must_use]
    pub const fn length(self) -> u32 {
        match self {
            Self::Address(Family::V6) => 16,
            Self::Address(Family::V4) | Self::Protocol | Self::Port => 4,
        }
    }

    /// Octets that count; the rest of the registers is padding.
    const fn octets(self) -> u32 {
        match self {
            Self::Address(Family::V6) => 16,
            Self::Address(Family::V4) => 4,
            Self::Port => 2,
            Self::Protocol => 1,
        }
    }

    /// What `nft` calls the type (its `enum datatypes`): the kernel only keeps it, so
    /// that people see addresses and ports in `nft list`.
    const fn nft_type(self) -> u32 {
        match self {
            Self::Address(Family::V4) => 7,
            Self::Address(Family::V6) => 8,
            Self::Protocol => 12,
            Self::Port => 13,
        }
    }
}

/// What a set's or a map's elements are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetLayout {
    pub key: &'static [Field],
    pub shape: Shape,
    /// Of a map.
    pub data: &'static [Field],
}

/// `enum nft_set_flags`.
const SET_INTERVAL: u32 = 0x4;
const SET_MAP: u32 = 0x8;
const SET_CONCAT: u32 = 0x80;
/// `NFTA_SET_DESC_CONCAT`.
const SET_DESC_CONCAT: u16 = 2;

/// Octets of these fields in registers.
#[must_use]
pub fn length(fields: &[Field]) -> u32 {
    fields.iter().map(|field| field.length()).sum()
}

/// Each field's type takes six bits of the whole's (`TYPE_BITS` of nft).
fn nft_type(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |sum, field| (sum << 6) | field.nft_type())
}

/// A table, the scope of every other request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table<'a> {
    pub family: Family,
    pub name: &'a str,
}

impl Table<'_> {
    pub(super) fn message(self, kind: Kind, flags: u16, fill: impl FnOnce(&mut Writer)) -> Message {
        let mut writer = Writer::after(&header(family_number(self.family), 0));
        // Attribute 1 is the table's name in every object's attribute list.
        writer.put_str(1, self.name);
        fill(&mut writer);
        Message { kind: kind.number(), flags, payload: writer.finish() }
    }

    /// Refused with `EEXIST` when there is one, so that a table somebody else made in
    /// the meantime is not taken over.
    #[must_use]
    pub fn create(self) -> Message {
        self.message(Kind::NewTable, CREATE | EXCL, |_| {})
    }

    /// With everything in it.
    #[must_use]
    pub fn delete(self) -> Message {
        self.message(Kind::DelTable, 0, |_| {})
    }

    /// A base chain lets through what its rules do not decide about.
    #[must_use]
    pub fn add_chain(self, name: &str, base: Option<BaseChain>) -> Message {
        self.message(Kind::NewChain, CREATE, |w| {
            w.put_str(3, name);
            let Some(base) = base else { return };
            w.nest(4, |w| {
                w.put_u32(1, base.hook as u32);
                w.put(2, &base.priority.to_be_bytes());
            });
            w.put_str(
                7,
                match base.kind {
                    ChainKind::Filter => "filter",
                    ChainKind::Nat => "nat",
                },
            );
        })
    }

    #[must_use]
    pub fn delete_chain(self, name: &str) -> Message {
        self.message(Kind::DelChain, 0, |w| w.put_str(3, name))
    }

    #[must_use]
    pub fn append_rule(self, chain: &str, expressions: &[Expression]) -> Message {
        self.message(Kind::NewRule, CREATE | APPEND, |w| {
            w.put_str(2, chain);
            w.nest(4, |w| {
                for expression in expressions {
                    expression.write(w);
                }
            });
        })
    }

    /// All rules of all chains.
    #[must_use]
    pub fn delete_rules(self) -> Message {
        self.message(Kind::DelRule, 0, |_| {})
    }

    /// Makes a set or a map. Without a size limit: the kernel then takes the resizable
    /// hash (`net/netfilter/nft_set_hash.c`), whose memory follows its elements, or for
    /// intervals `nft_set_pipapo.c` (kernel 5.6). `id` is unique within the transaction.
    #[must_use]
    pub fn add_set(self, name: &str, id: u32, layout: &SetLayout) -> Message {
        let SetLayout { key, shape, data } = *layout;
        self.message(Kind::NewSet, CREATE, |w| {
            w.put_str(2, name);
            w.put_u32(
                3,
                match shape {
                    Shape::Key => 0,
                    Shape::Interval => SET_INTERVAL | SET_CONCAT,
                    Shape::Data => SET_MAP,
                },
            );
            w.put_u32(4, nft_type(key));
            w.put_u32(5, length(key));
            if shape == Shape::Data {
                w.put_u32(6, nft_type(data));
                w.put_u32(7, length(data));
            }
            if shape == Shape::Interval {
                w.nest(9, |w| {
                    w.nest(SET_DESC_CONCAT, |w| {
                        for field in key {
                            w.nest(1, |w| w.put_u32(1, field.octets()));
                        }
                    });
                });
            }
            w.put_u32(10, id);
        })
    }

    #[must_use]
    pub fn delete_set(self, name: &str) -> Message {
        self.message(Kind::DelSet, 0, |w| w.put_str(2, name))
    }

    /// Dump of this table's sets; refused with `ENOENT` when there is no such table.
    #[must_use]
    pub fn list_sets(self) -> Message {
        self.message(Kind::GetSet, 0, |_| {})
    }

    /// Dump of the family's chains: the kernel does not filter them by table.
    #[must_use]
    pub fn list_chains(self) -> Message {
        self.message(Kind::GetChain, 0, |_| {})
    }

    /// Dump of this table's rules.
    #[must_use]
    pub fn list_rules(self) -> Message {
        self.message(Kind::GetRule, 0, |_| {})
    }
}

pub(super) const fn family_number(family: Family) -> u8 {
    match family {
        // `NFPROTO_IPV4` and `NFPROTO_IPV6`.
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// `struct nfgenmsg`: family, version 0, and a resource id in network byte order.
fn header(family: u8, resource: u16) -> [u8; HEADER] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// Frames changes as one transaction: index 0 and the last are the frame.
#[must_use]
pub fn batch(changes: impl IntoIterator<Item = Message>) -> Vec<Message> {
    let frame =
        |kind| Message { kind, flags: 0, payload: header(0, u16::from(SUBSYSTEM)).to_vec() };
    std::iter::once(frame(BATCH_BEGIN))
        .chain(changes)
        .chain(std::iter::once(frame(BATCH_END)))
        .collect()
}

/// A chain as a dump shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainName {
    pub table: String,
    pub chain: String,
}

/// A set as a dump shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetInfo {
    pub table: String,
    pub name: String,
    /// Octets of one key.
    pub key_length: u32,
    /// Octets of what a map holds for a key.
    pub data_length: u32,
    /// `enum nft_set_flags`.
    pub flags: u32,
}

impl SetInfo {
    /// Whether its elements have this layout.
    #[must_use]
    pub fn has(&self, layout: &SetLayout) -> bool {
        let data = if layout.shape == Shape::Data { length(layout.data) } else { 0 };
        let flag = |bit: u32, shape| (self.flags & bit != 0) == (layout.shape == shape);
        self.key_length == length(layout.key)
            && self.data_length == data
            && flag(SET_INTERVAL, Shape::Interval)
            && flag(SET_MAP, Shape::Data)
    }
}

/// The attributes of one dumped object, after `struct nfgenmsg`.
pub(super) fn body(
    message: &Message,
) -> Result<impl Iterator<Item = Result<Attribute<'_>, Malformed>>, Malformed> {
    payload_attributes(&message.payload)
}

pub(super) fn payload_attributes(
    payload: &[u8],
) -> Result<impl Iterator<Item = Result<Attribute<'_>, Malformed>>, Malformed> {
    let bytes = payload.get(HEADER..).ok_or(Malformed("nfgenmsg is cut off"))?;
    Ok(attributes(bytes))
}

/// # Errors
/// When the bytes are not those of a chain.
pub fn decode_chain(message: &Message) -> Result<ChainName, Malformed> {
    let [table, chain] = names(message, [1, 3])?;
    Ok(ChainName { table, chain })
}

/// Which chain a dumped rule stands in.
///
/// # Errors
/// When the bytes are not those of a rule.
pub fn decode_rule(message: &Message) -> Result<ChainName, Malformed> {
    let [table, chain] = names(message, [1, 2])?;
    Ok(ChainName { table, chain })
}

/// # Errors
/// When the bytes are not those of a set.
pub fn decode_set(message: &Message) -> Result<SetInfo, Malformed> {
    let [table, name] = names(message, [1, 2])?;
    let mut info = SetInfo { table, name, key_length: 0, data_length: 0, flags: 0 };
    for attribute in body(message)? {
        let attribute = attribute?;
        match attribute.kind {
            3 => info.flags = attribute.u32()?,
            5 => info.key_length = attribute.u32()?,
            7 => info.data_length = attribute.u32()?,
            _ => {}
        }
    }
    Ok(info)
}

fn names(message: &Message, kinds: [u16; 2]) -> Result<[String; 2], Malformed> {
    let mut found = [String::new(), String::new()];
    for attribute in body(message)? {
        let attribute = attribute?;
        for (kind, slot) in kinds.iter().zip(&mut found) {
            if attribute.kind == *kind {
                attribute.string()?.clone_into(slot);
            }
        }
    }
    if found.iter().any(String::is_empty) {
        return Err(Malformed("object without a name"));
    }
    Ok(found)
}
