//! Codec of the nf_tables netlink subsystem: tables, chains, rules, sets and their
//! elements as request bytes, and dumps read back.
//!
//! Pure: nothing here opens a socket. Requests go out through
//! [`crate::kernel::netlink::Netlink::transaction`], framed by [`batch`], since nf_tables
//! takes changes only inside a batch and applies all of it or nothing
//! (`net/netfilter/nfnetlink.c`, `nfnetlink_rcv_batch`).
//!
//! Numbers are those of `include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h`. Only what
//! kernel 4.19 already understood is used, but for interval sets of several fields (5.6).

mod attribute;
mod element;
mod expression;
mod listing;
mod object;
#[cfg(test)]
mod tests;

pub use attribute::{Attribute, Malformed, Writer, attributes};
pub use element::{ElementBytes, Operation, Shape, decode_elements};
pub use expression::{Base, CompareOp, CtKey, Expression, MetaKey, Register, Reject, Verdict};
pub use listing::{ChainInfo, RuleInfo, decode_chain_info, decode_rule_info};
pub use object::{
    BaseChain, ChainKind, ChainName, Field, Hook, SetInfo, SetLayout, Table, batch, decode_chain,
    decode_rule, decode_set, length,
};
