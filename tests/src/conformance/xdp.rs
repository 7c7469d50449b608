//! What is different with a program at XDP.

use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};

use super::context::Context;
use super::look::{from, who};
use super::service::{Front, Target};
use super::{Case, case};
use crate::ebpf::older_than;

pub(super) const CASES: &[Case] = &[
    case("what goes on to another node never reaches the stack", past_the_stack),
    case("a restarted daemon's program takes the place of the one before", replaced),
];

/// Connections or queries to each target.
const EACH: usize = 40;

/// The frames that the stack of a host is given or sends by its `eth0`.
struct Tap(OwnedFd);

impl Tap {
    fn start(cx: &Context<'_>, node: usize) -> Result<Self> {
        let socket = cx.node(node).in_netns(|| {
            let flags = SockFlag::SOCK_NONBLOCK;
            socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)
        })?;
        Ok(Self(socket?))
    }

    /// How many so far were for this address.
    fn count(&self, to: IpAddr) -> u32 {
        let mut count = 0;
        let mut buffer = [0; 2048];
        while let Ok(length) = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_TRUNC) {
            let frame = &buffer[..length.min(buffer.len())];
            let is_to = match (to, frame.get(12..14)) {
                (IpAddr::V4(to), Some([0x08, 0x00])) => frame.get(30..34) == Some(&to.octets()),
                (IpAddr::V6(to), Some([0x86, 0xdd])) => frame.get(38..54) == Some(&to.octets()),
                _ => false,
            };
            count += u32::from(is_to);
        }
        count
    }
}

fn send(cx: &Context<'_>, targets: &[Target], servers: &[&str]) -> Result<()> {
    for target in targets {
        let by_server = who(cx.cluster(), "outside", *target, EACH)?;
        ensure!(by_server.keys().all(|it| servers.contains(&&**it)), "{target:?}: {by_server:?}");
    }
    Ok(())
}

/// The nodes' devices are veth ends, and before 6.3 the kernel does not tell whether one takes
/// what comes from another program: then all is tc's.
fn is_past_the_stack() -> Result<bool> {
    Ok(!older_than(6, 3)?)
}

fn past_the_stack(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer, Front::NodePort]);
    let mut targets = web.at(Front::Balancer);
    targets.extend(cx.node_ports_of(&web, 0));
    for (endpoints, past) in [(&["b0", "b1"], is_past_the_stack()?), (&["a0", "a1"], false)] {
        cx.program(&[&web.clone().endpoints(endpoints)])?;
        // The first packets find out about the neighbours.
        cx.look(&[from(&["outside"]).to(&targets).only(endpoints)])?;
        for target in &targets {
            let tap = Tap::start(cx, 0)?;
            send(cx, &[*target], endpoints)?;
            let seen = tap.count(target.1.ip());
            // A checksum that looks unfinished goes by the stack: one in 65536.
            ensure!((seen <= 3) == past, "{target:?} at {endpoints:?}: {seen} frames by the stack");
        }
    }
    Ok(())
}

fn replaced(cx: &mut Context<'_>) -> Result<()> {
    let web = cx.service("web", &[Front::Balancer]).endpoints(&["b0"]);
    cx.program(&[&web])?;
    let program = |cx: &Context<'_>| -> Result<String> {
        let links = cx.node(0).command("ip").args(["link", "show", "dev", "eth0"]).stdout_of()?;
        let id = links.split("prog/xdp id ").nth(1).and_then(|rest| rest.split(' ').next());
        ensure!(links.contains(" xdp "), "not native: {links}");
        Ok(id.with_context(|| format!("no program at XDP: {links}"))?.to_owned())
    };
    let before = program(cx)?;
    cx.bed.kill_daemon(0)?;
    send(cx, &web.at(Front::Balancer), &["b0"])?;
    ensure!(program(cx)? == before, "the program went with the daemon");
    cx.restart(0, &[])?;
    ensure!(program(cx)? != before, "the program before is still there");
    for target in web.at(Front::Balancer) {
        let tap = Tap::start(cx, 0)?;
        send(cx, &[target], &["b0"])?;
        let seen = tap.count(target.1.ip());
        let past = is_past_the_stack()?;
        ensure!((seen <= 3) == past, "{target:?}: {seen} frames by the stack after the restart");
    }
    Ok(())
}
