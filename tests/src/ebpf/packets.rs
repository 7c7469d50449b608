//! The programs against the library they are made of: the same frames through the kernel's
//! test run and through the parser on the host.

use anyhow::{Result, ensure};
use proxy_ebpf::layout::{FrontendCounters, FrontendId, Traffic};
use proxy_ebpf::parse::{self, UDP};
use proxy_ebpf::service::Hook;

use super::{Table, VIP4, VIP6, load};

const PORT: u16 = 53;
/// `TCX_NEXT` and `XDP_PASS`: nothing is done to any packet yet.
const TC_NEXT: u32 = u32::MAX;
const XDP_PASS: u32 = 2;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

/// Each frame is counted by the program exactly when the parser on the host finds a packet
/// to the frontend in it; hand-made frames first, then thousands damaged at random places.
///
/// # Errors
/// The frame on which they differ.
pub fn packets() -> Result<()> {
    /// Damaged copies of each frame: about two seconds in an emulated guest.
    const DAMAGED: u64 = 200;
    let mut programs = load()?;
    let mut table = Table::default();
    let ids = [
        table.add(&mut programs, (VIP4, PORT).into(), UDP, &[])?,
        table.add(&mut programs, (VIP6, PORT).into(), UDP, &[])?,
    ];
    let mut ours_seen = 0;
    let mut random = Random(0x5eed);
    for original in frames() {
        for round in 0..DAMAGED {
            let mut frame = original.clone();
            if round > 0 {
                random.damage(&mut frame);
            }
            let ours = is_ours(&frame);
            ours_seen += u32::from(ours);
            for hook in [Hook::Tc, Hook::Xdp] {
                let before = traffic(&mut programs, ids, hook)?;
                let verdict = programs.test_run(hook, &frame)?;
                let after = traffic(&mut programs, ids, hook)?;
                let pass = if hook == Hook::Tc { TC_NEXT } else { XDP_PASS };
                ensure!(verdict == pass, "{hook:?} {verdict}: {frame:02x?}");
                let counted = Traffic {
                    packets: after.packets - before.packets,
                    bytes: after.bytes - before.bytes,
                };
                let bytes = u64::try_from(frame.len())?;
                let expected =
                    if ours { Traffic { packets: 1, bytes } } else { Traffic::default() };
                ensure!(counted == expected, "{hook:?} counted {counted:?}: {frame:02x?}");
            }
        }
    }
    ensure!(ours_seen > 100, "only {ours_seen} frames of all were to the frontend");
    Ok(())
}

fn is_ours(frame: &[u8]) -> bool {
    parse::ethernet(&frame).is_ok_and(|packet| {
        packet.protocol == UDP
            && packet.destination_port.to_host() == PORT
            && [VIP4.into(), VIP6.into()].contains(&packet.destination)
    })
}

fn traffic(programs: &mut super::Programs, ids: [FrontendId; 2], hook: Hook) -> Result<Traffic> {
    let mut total = FrontendCounters::default();
    for id in ids {
        total += programs.tables().frontend_counters(id)?;
    }
    Ok(if hook == Hook::Tc { total.tc } else { total.xdp })
}

/// Packets to the frontends with everything between Ethernet and the ports that there is.
fn frames() -> Vec<Vec<u8>> {
    let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    let long: &[u8] = &[1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let routed: &[u8] = &[0, 0, 0, 0, 0, 0, 0];
    let first: &[u8] = &[0, 0, 1, 0, 0, 0, 9];
    let later: &[u8] = &[0, 5, 0xa8, 0, 0, 0, 9];
    let authentication: &[u8] = &[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1];
    vec![
        ipv4(5, 0),
        ipv4(7, 0),
        ipv4(15, 0),
        ipv4(5, 0x2000),
        ipv4(5, 185),
        ipv6(&[]),
        ipv6(&[(HOP_BY_HOP, options)]),
        ipv6(&[(AUTHENTICATION, authentication)]),
        ipv6(&[(FRAGMENT, first)]),
        ipv6(&[(FRAGMENT, later)]),
        ipv6(&[(HOP_BY_HOP, long), (DESTINATION, options), (ROUTING, routed), (FRAGMENT, first)]),
        ipv6(&[(DESTINATION, options); parse::MAX_EXTENSIONS]),
        ipv6(&[(DESTINATION, options); parse::MAX_EXTENSIONS + 1]),
    ]
}

fn ethernet(ethertype: [u8; 2]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(ethertype);
    frame
}

/// UDP from port 4660, and enough payload that damage seldom cuts the ports off.
fn udp(frame: &mut Vec<u8>) {
    frame.extend([0x12, 0x34]);
    frame.extend(PORT.to_be_bytes());
    frame.extend([0, 40, 0, 0]);
    frame.extend([7; 32]);
}

/// `words`: the header's length in 32-bit words.
fn ipv4(words: u8, fragment: u16) -> Vec<u8> {
    let mut frame = ethernet([0x08, 0x00]);
    frame.extend([0x40 | words, 0, 0, words * 4 + 40, 0, 1]);
    frame.extend(fragment.to_be_bytes());
    frame.extend([64, UDP, 0, 0, 192, 0, 2, 1, 10, 96, 0, 1]);
    frame.resize(14 + usize::from(words) * 4, 1);
    udp(&mut frame);
    frame
}

/// Each extension: its kind, and its body after the next-header byte.
fn ipv6(extensions: &[(u8, &[u8])]) -> Vec<u8> {
    let kind = |i: usize| extensions.get(i).map_or(UDP, |extension| extension.0);
    let mut frame = ethernet([0x86, 0xdd]);
    frame.extend([0x60, 0, 0, 0, 0, 200, kind(0), 64]);
    frame.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    frame.extend([0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    for (i, (_, body)) in extensions.iter().enumerate() {
        frame.push(kind(i + 1));
        frame.extend(*body);
    }
    udp(&mut frame);
    frame
}

/// xorshift64: the same damage at every run, so that a failure is found again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or_default()
    }

    /// A few bytes of the headers to other values, small ones preferred (they mean
    /// something); one frame in four also loses its end. Link and network header stay:
    /// the kernel runs nothing shorter.
    fn damage(&mut self, frame: &mut Vec<u8>) {
        for _ in 0..=self.below(3) {
            let place = 12 + self.below(frame.len() - 12);
            let value = self.next().to_le_bytes()[7];
            frame[place] = if self.below(2) == 0 { value % 64 } else { value };
        }
        if self.below(4) == 0 {
            let least = 14 + 40;
            frame.truncate(least + self.below(frame.len() - least));
        }
    }
}
