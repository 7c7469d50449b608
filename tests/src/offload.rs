//! What a veth pair has to be told to be like two network cards and a cable.
//!
//! Its ends leave checksums and segments unfinished, since nobody between could damage them;
//! and frames that were redirected at XDP they take only where the other end polls its queue.

use anyhow::{Context as _, Result, bail};
use proxy_daemon::kernel::netlink::generic::resolve_family;
use proxy_daemon::kernel::netlink::{Message, Netlink as _, Socket, Subsystem};

/// `ETHTOOL_MSG_FEATURES_SET` and its attributes (include/uapi/linux/ethtool_netlink.h).
const FEATURES_SET: u8 = 12;
const VERSION: u8 = 1;
const HEADER: u16 = 1;
const HEADER_NAME: u16 = 2;
const WANTED: u16 = 3;
const BITS: u16 = 3;
const BIT: u16 = 1;
const BIT_NAME: u16 = 2;
const BIT_VALUE: u16 = 3;
const NESTED: u16 = 0x8000;

/// Makes `link` of the current network namespace finish what it sends, and poll for what
/// comes.
///
/// # Errors
/// There is no such link, or the kernel refuses.
pub fn like_hardware(link: &str) -> Result<()> {
    let mut socket = Socket::open(Subsystem::Generic)?;
    let family = resolve_family(&mut socket, "ethtool", "ethtool")?;
    let bits = [
        attribute(NESTED | BIT, &text(BIT_NAME, "tx-checksum-ip-generic")),
        attribute(NESTED | BIT, &[text(BIT_NAME, "rx-gro"), attribute(BIT_VALUE, &[])].concat()),
    ];
    let mut payload = vec![FEATURES_SET, VERSION, 0, 0];
    payload.extend(attribute(NESTED | HEADER, &text(HEADER_NAME, link)));
    payload.extend(attribute(NESTED | WANTED, &attribute(NESTED | BITS, &bits.concat())));
    let results = socket.request_all(&[Message { kind: family, flags: 0, payload }])?;
    match results.first() {
        Some(Ok(())) => Ok(()),
        Some(Err(errno)) => Err(*errno).with_context(|| format!("features of {link}")),
        None => bail!("features of {link}: no answer"),
    }
}

fn text(kind: u16, text: &str) -> Vec<u8> {
    attribute(kind, &[text.as_bytes(), &[0]].concat())
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
