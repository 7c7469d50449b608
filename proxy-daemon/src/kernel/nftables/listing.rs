//! Chains and rules of any table, as far as it takes to see what leads where, and to
//! remove single ones.

use crate::kernel::netlink::Message;

use super::attribute::{Malformed, Writer, attributes};
use super::element::find;
use super::object::{Kind, Table, body, decode_chain, decode_rule};

/// `NFTA_CHAIN_HOOK`, `NFTA_CHAIN_POLICY`.
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
/// `NFTA_RULE_CHAIN`, `NFTA_RULE_HANDLE`, `NFTA_RULE_EXPRESSIONS`.
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
/// `NFTA_EXPR_DATA`, `NFTA_IMMEDIATE_DATA`, `NFTA_DATA_VERDICT`, `NFTA_VERDICT_CHAIN`.
const EXPR_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;
/// `NFTA_EXPR_NAME`.
const EXPR_NAME: u16 = 1;
/// `NFTA_COUNTER_PACKETS`.
const COUNTER_PACKETS: u16 = 2;
/// `NF_DROP`.
const DROP: u32 = 0;

/// A chain as a dump shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainInfo {
    pub table: String,
    pub chain: String,
    /// It is attached to a hook.
    pub base: bool,
    /// It is, and drops what its rules do not decide about.
    pub drops: bool,
}

/// A rule as a dump shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleInfo {
    pub table: String,
    pub chain: String,
    pub handle: u64,
    /// The chains that its immediate verdicts jump or go to. Those of a verdict map are
    /// elements of the map and not seen here.
    pub jumps: Vec<String>,
    /// Packets that its counter has counted, if it has one.
    pub packets: Option<u64>,
}

impl Table<'_> {
    /// One rule; refused with `ENOENT` when it is gone.
    #[must_use]
    pub fn delete_rule(self, chain: &str, handle: u64) -> Message {
        self.message(Kind::DelRule, 0, |w| {
            w.put_str(RULE_CHAIN, chain);
            put_u64(w, RULE_HANDLE, handle);
        })
    }

    /// All rules of a chain.
    #[must_use]
    pub fn flush_chain(self, chain: &str) -> Message {
        self.message(Kind::DelRule, 0, |w| w.put_str(RULE_CHAIN, chain))
    }
}

fn put_u64(w: &mut Writer, kind: u16, value: u64) {
    w.put(kind, &value.to_be_bytes());
}

/// # Errors
/// When the bytes are not those of a chain.
pub fn decode_chain_info(message: &Message) -> Result<ChainInfo, Malformed> {
    let name = decode_chain(message)?;
    let (mut base, mut policy) = (false, None);
    for attribute in body(message)? {
        let attribute = attribute?;
        match attribute.kind {
            CHAIN_HOOK => base = true,
            CHAIN_POLICY => policy = Some(attribute.u32()?),
            _ => {}
        }
    }
    let drops = base && policy == Some(DROP);
    Ok(ChainInfo { table: name.table, chain: name.chain, base, drops })
}

/// # Errors
/// When the bytes are not those of a rule.
pub fn decode_rule_info(message: &Message) -> Result<RuleInfo, Malformed> {
    let place = decode_rule(message)?;
    let mut rule = RuleInfo {
        table: place.table,
        chain: place.chain,
        handle: 0,
        jumps: Vec::new(),
        packets: None,
    };
    for attribute in body(message)? {
        let attribute = attribute?;
        match attribute.kind {
            RULE_HANDLE => {
                let bytes = attribute.value.try_into();
                let bytes = bytes.map_err(|_| Malformed("a handle is not eight bytes"))?;
                rule.handle = u64::from_be_bytes(bytes);
            }
            RULE_EXPRESSIONS => {
                for expression in attributes(attribute.value) {
                    let expression = expression?.value;
                    rule.jumps.extend(jump(expression)?);
                    rule.packets = rule.packets.or(packets(expression)?);
                }
            }
            _ => {}
        }
    }
    Ok(rule)
}

/// What a counter has counted.
fn packets(expression: &[u8]) -> Result<Option<u64>, Malformed> {
    match find(expression, EXPR_NAME)? {
        Some(name) if name.string()? == "counter" => {}
        _ => return Ok(None),
    }
    let Some(data) = find(expression, EXPR_DATA)? else { return Ok(None) };
    let Some(packets) = find(data.value, COUNTER_PACKETS)? else { return Ok(None) };
    let bytes = packets.value.try_into().map_err(|_| Malformed("a counter is not eight bytes"))?;
    Ok(Some(u64::from_be_bytes(bytes)))
}

/// Where an expression leads, if it is a verdict with a chain.
fn jump(expression: &[u8]) -> Result<Option<String>, Malformed> {
    match find(expression, EXPR_NAME)? {
        Some(name) if name.string()? == "immediate" => {}
        _ => return Ok(None),
    }
    let mut inner = expression;
    for kind in [EXPR_DATA, IMMEDIATE_DATA, DATA_VERDICT] {
        match find(inner, kind)? {
            Some(attribute) => inner = attribute.value,
            None => return Ok(None),
        }
    }
    find(inner, VERDICT_CHAIN)?.map(|chain| chain.string().map(str::to_owned)).transpose()
}
