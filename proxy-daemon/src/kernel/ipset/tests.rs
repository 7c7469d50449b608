//! The codec on bytes; the kernel's side of it is tested in a guest.

use proptest::collection::vec;
use proptest::prelude::{any, proptest};

use super::*;
use crate::kernel::netlink::FakeNetlink;

/// A directory that looks like `/sys/module` of a kernel with ipset.
fn modules() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("ip_set")).unwrap();
    directory
}

fn listed(set: &str, members: &[(IpAddr, u16, u8)]) -> Message {
    message(LIST, |w| {
        w.put_str(ATTR_SETNAME, set);
        w.nest(ATTR_ADT, |w| {
            for (address, port, protocol) in members {
                w.nest(ATTR_DATA, |w| {
                    w.nest(MEMBER_IP, |w| match address {
                        IpAddr::V4(v4) => w.put(IPADDR_V4, &v4.octets()),
                        IpAddr::V6(v6) => w.put(IPADDR_V6, &v6.octets()),
                    });
                    w.put(MEMBER_PORT, &port.to_be_bytes());
                    w.put(MEMBER_PROTO, &[*protocol]);
                });
            }
        });
    })
}

#[test]
fn names_and_members_are_read() {
    let directory = modules();
    let v4 = ("10.96.0.1".parse().unwrap(), 443, 6);
    let v6 = ("fd00::1".parse().unwrap(), 53, 17);
    let answer = listed("KUBE-CLUSTER-IP", &[v4, v6]);
    let fake = FakeNetlink::new(move |_| Ok(vec![answer.clone()]));
    let mut sets = NetlinkIpSets::new(fake.clone(), directory.path());
    assert_eq!(sets.names().unwrap(), ["KUBE-CLUSTER-IP"]);
    let members = sets.members("KUBE-CLUSTER-IP").unwrap();
    let expected = [v4, v6].map(|(address, port, protocol)| Member {
        address: Some(address),
        port: Some(port),
        protocol: Some(protocol),
    });
    assert_eq!(members, expected);
    let asked = fake.messages();
    assert!(asked.iter().all(|message| message.kind == LIST));
    // nfgenmsg, the protocol, and `LIST_SETNAME` in network byte order.
    assert_eq!(asked[0].payload[4..], [5, 0, 1, 0, 6, 0, 0, 0, 8, 0, 6, 0, 0, 0, 0, 2]);
}

#[test]
fn a_kernel_without_ipset_is_not_asked() {
    let directory = tempfile::tempdir().unwrap();
    let fake = FakeNetlink::default();
    assert!(NetlinkIpSets::new(fake.clone(), directory.path()).names().unwrap().is_empty());
    assert!(fake.messages().is_empty(), "asking loads the module");
    // Where the directory cannot be seen it has to be asked.
    let unseen = directory.path().join("not-mounted");
    let refusing = FakeNetlink::new(|_| Err(Errno(libc::EINVAL)));
    assert!(NetlinkIpSets::new(refusing.clone(), &unseen).names().unwrap().is_empty());
    assert_eq!(refusing.messages().len(), 1);
}

#[test]
fn what_is_busy_is_told_and_what_is_gone_is_a_success() {
    let directory = modules();
    let fake = FakeNetlink::scripted([Err(BUSY), Err(Errno(libc::ENOENT)), Ok(Vec::new())]);
    let mut sets = NetlinkIpSets::new(fake, directory.path());
    assert_eq!(sets.destroy(&["a", "b", "c"]).unwrap(), [Err(BUSY), Ok(()), Ok(())]);
    assert!(explain(BUSY).contains("refers to it"));
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_decoded_or_rejected(payload in vec(any::<u8>(), 0..200)) {
        let message = Message { kind: LIST, flags: 0, payload };
        let _ = decode_name(&message);
        let _ = decode_members(&message);
    }

    #[test]
    fn damaged_lists_are_decoded_or_rejected(
        position in any::<proptest::sample::Index>(),
        value in any::<u8>(),
    ) {
        let mut message = listed("SET", &[("10.0.0.1".parse().unwrap(), 80, 6)]);
        let position = position.index(message.payload.len());
        message.payload[position] = value;
        let _ = decode_name(&message);
        let _ = decode_members(&message);
    }
}
