//! Ending sockets of other processes (sock_diag), in every network namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::libc;
use nix::sched::{CloneFlags, setns};

use super::netlink::{Errno, Message, Netlink, NetlinkError, Socket, Subsystem};

/// Message types (include/uapi/linux/sock_diag.h).
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// Lengths of `struct inet_diag_sockid` and of what precedes it in a request
/// (`inet_diag_req_v2`) and in an answer (`inet_diag_msg`), include/uapi/linux/inet_diag.h.
const ID: usize = 48;
const REQUEST_HEADER: usize = 8;
const ANSWER_HEADER: usize = 4;

const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// A connected UDP socket.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct UdpSocket {
    pub peer: SocketAddr,
    /// The same as `bpf_get_socket_cookie` gives.
    pub cookie: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum SocketsError {
    #[error("{}: {source}", path.display())]
    Proc { path: PathBuf, source: io::Error },
    #[error("a network namespace: {0}")]
    Namespace(io::Error),
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    #[error("the kernel destroys no sockets (INET_DIAG_DESTROY): {0}")]
    Destroy(Errno),
}

/// The seam; [`FakeSockets`] is the other implementation.
pub trait Sockets: Send {
    /// Ends the connected UDP sockets for which `ends` holds: whoever uses one gets
    /// `ECONNABORTED`. Returns how many there were.
    ///
    /// # Errors
    /// The first error; the other namespaces are gone through all the same.
    fn destroy_udp(
        &mut self,
        ends: &(dyn Fn(&UdpSocket) -> bool + Sync),
    ) -> Result<usize, SocketsError>;
}

/// All namespaces that a thread is in, as `/proc` shows them.
#[derive(Debug)]
pub struct AllNamespaces {
    proc: PathBuf,
}

impl AllNamespaces {
    #[must_use]
    pub fn at(proc: &Path) -> Self {
        Self { proc: proc.to_owned() }
    }

    /// One file for each, by inode.
    fn files(&self) -> Result<BTreeMap<PathBuf, File>, SocketsError> {
        let failed = |source| SocketsError::Proc { path: self.proc.clone(), source };
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&self.proc).map_err(failed)? {
            let process = entry.map_err(failed)?.path();
            let number = process.file_name().and_then(|name| name.to_str());
            if !number.is_some_and(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
                continue;
            }
            // Processes and threads come and go, and the kernel's show none to some.
            let Ok(threads) = fs::read_dir(process.join("task")) else { continue };
            for thread in threads.flatten() {
                let path = thread.path().join("ns/net");
                let Ok(inode) = fs::read_link(&path) else { continue };
                if files.contains_key(&inode) {
                    continue;
                }
                if let Ok(file) = File::open(&path) {
                    files.insert(inode, file);
                }
            }
        }
        Ok(files)
    }
}

impl Sockets for AllNamespaces {
    fn destroy_udp(
        &mut self,
        ends: &(dyn Fn(&UdpSocket) -> bool + Sync),
    ) -> Result<usize, SocketsError> {
        let mut result = Ok(0);
        let own = fs::read_link(OWN_NAMESPACE).ok();
        for (inode, file) in self.files()? {
            // To enter even one's own takes CAP_SYS_ADMIN.
            let file = (own.as_ref() != Some(&inode)).then_some(file);
            // A thread that has been in another namespace is of no other use.
            let one = thread::scope(|scope| {
                scope.spawn(|| in_namespace(file.as_ref(), ends)).join().unwrap_or(Ok(0))
            });
            result = match (result, one) {
                (Ok(sum), Ok(count)) => Ok(sum + count),
                (Err(first), _) | (Ok(_), Err(first)) => Err(first),
            };
        }
        result
    }
}

/// `None`: the one that the thread is in.
fn in_namespace(
    file: Option<&File>,
    ends: &(dyn Fn(&UdpSocket) -> bool + Sync),
) -> Result<usize, SocketsError> {
    if let Some(file) = file {
        let entered = setns(file, CloneFlags::CLONE_NEWNET);
        entered.map_err(|errno| SocketsError::Namespace(errno.into()))?;
    }
    let mut netlink = Socket::open(Subsystem::SockDiag)?;
    destroy_matching(&mut netlink, ends)
}

fn destroy_matching(
    netlink: &mut impl Netlink,
    ends: &dyn Fn(&UdpSocket) -> bool,
) -> Result<usize, SocketsError> {
    let mut doomed: BTreeSet<Vec<u8>> = BTreeSet::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let family = u8::try_from(family).unwrap_or_default();
        let all = request(SOCK_DIAG_BY_FAMILY, family, &[0; ID]);
        netlink.dump_each(&all, &mut |answer| {
            if let Some((socket, id)) = decode(answer)
                && ends(&socket)
            {
                doomed.insert(request(SOCK_DESTROY, family, id).payload);
            }
        })?;
    }
    let requests: Vec<Message> = doomed
        .into_iter()
        .map(|payload| Message { kind: SOCK_DESTROY, flags: 0, payload })
        .collect();
    if requests.is_empty() {
        return Ok(0);
    }
    let mut count = 0;
    for result in netlink.request_all(&requests)? {
        match result {
            Ok(()) => count += 1,
            // Closed or connected elsewhere meanwhile.
            Err(Errno(libc::ENOENT | libc::ESTALE)) => {}
            Err(errno) => return Err(SocketsError::Destroy(errno)),
        }
    }
    Ok(count)
}

fn request(kind: u16, family: u8, id: &[u8]) -> Message {
    let udp = u8::try_from(libc::IPPROTO_UDP).unwrap_or_default();
    let mut payload = vec![family, udp, 0, 0];
    // All states.
    payload.extend_from_slice(&u32::MAX.to_ne_bytes());
    debug_assert_eq!(payload.len(), REQUEST_HEADER);
    payload.extend_from_slice(id);
    Message { kind, flags: 0, payload }
}

/// A socket with its `inet_diag_sockid`; `None` for one that is not connected.
fn decode(answer: &[u8]) -> Option<(UdpSocket, &[u8])> {
    let family = i32::from(*answer.first()?);
    let id = answer.get(ANSWER_HEADER..ANSWER_HEADER + ID)?;
    let port = u16::from_be_bytes(id.get(2..4)?.try_into().ok()?);
    let to: [u8; 16] = id.get(20..36)?.try_into().ok()?;
    let address = match family {
        libc::AF_INET => IpAddr::from(<[u8; 4]>::try_from(to.get(..4)?).ok()?),
        _ => IpAddr::from(to).to_canonical(),
    };
    let half = |at: usize| -> Option<u64> {
        Some(u32::from_ne_bytes(id.get(at..at + 4)?.try_into().ok()?).into())
    };
    let cookie = half(40)? | half(44)? << 32;
    (port != 0).then(|| (UdpSocket { peer: SocketAddr::new(address, port), cookie }, id))
}

/// Sockets in memory; clones share them.
#[derive(Debug, Clone, Default)]
pub struct FakeSockets(pub Arc<Mutex<BTreeSet<UdpSocket>>>);

impl Sockets for FakeSockets {
    fn destroy_udp(
        &mut self,
        ends: &(dyn Fn(&UdpSocket) -> bool + Sync),
    ) -> Result<usize, SocketsError> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = all.len();
        all.retain(|socket| !ends(socket));
        Ok(before - all.len())
    }
}

#[cfg(test)]
mod tests {
    use std::net;

    use super::*;

    /// This namespace's sockets are the test's own; nothing needs privileges but the end.
    #[test]
    fn connected_sockets_are_told_with_peer_and_cookie() {
        let socket = net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect("127.0.0.1:9").unwrap();
        let mapped = net::UdpSocket::bind("[::]:0").unwrap();
        let idle = net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let two = mapped.connect("[::ffff:127.0.0.1]:9").is_ok();
        let mut netlink = Socket::open(Subsystem::SockDiag).unwrap();
        let seen = Mutex::new(Vec::new());
        let destroyed = destroy_matching(&mut netlink, &|socket| {
            seen.lock().unwrap().push(socket.clone());
            false
        });
        assert_eq!(destroyed.unwrap(), 0);
        let seen = seen.into_inner().unwrap();
        let to: Vec<_> = seen.iter().filter(|s| s.peer == "127.0.0.1:9".parse().unwrap()).collect();
        assert!(to.len() > usize::from(two), "{seen:?}");
        assert!(to.iter().all(|socket| socket.cookie != 0));
        drop(idle);
    }

    #[test]
    fn what_is_no_answer_is_no_socket() {
        assert!(decode(&[]).is_none());
        assert!(decode(&[2; 51]).is_none());
        assert!(decode(&[0; 72]).is_none(), "not connected");
    }
}
