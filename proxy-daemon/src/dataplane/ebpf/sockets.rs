//! Ending UDP sockets that are connected to backends which are none any more.
//!
//! A socket was sent to its backend when it connected, and its packets are never looked at
//! again: without this a resolver that keeps its socket would talk to a dead endpoint for ever.
//! On a thread of its own, since every network namespace is gone through; and only when a
//! socket's entry says that it came by a frontend: one that was connected to the endpoint's own
//! address is its owner's affair.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use proxy_ebpf::layout::{BackendId, SocketKey, SocketPeer};
use tracing::{debug, warn};

use super::plane::Gone;
use super::{TableError, Tables};
use crate::dataplane::FlowRelease;
use crate::kernel::sockets::{Sockets, UdpSocket};
use crate::model::Family;

/// A socket that was sent to the backend just before it went is connected a moment later: all
/// are looked for once more after this.
const AGAIN: Duration = Duration::from_millis(300);

/// Entries of `SOCKETS`: the seam.
pub trait Peers: Send {
    /// # Errors
    /// The kernel refuses.
    fn peers(&self) -> Result<Vec<(SocketKey, SocketPeer)>, TableError>;

    /// Whether the backend is one again, under the same id: sockets that were sent there since
    /// must live.
    ///
    /// # Errors
    /// The kernel refuses.
    fn serves(&self, backend: &Gone) -> Result<bool, TableError>;
}

impl Peers for Tables {
    fn serves(&self, gone: &Gone) -> Result<bool, TableError> {
        let backend = self.backend(gone.id)?;
        let at = (IpAddr::from(backend.address), backend.port.to_host());
        Ok(backend.is_there() && at == (gone.address, gone.port))
    }

    fn peers(&self) -> Result<Vec<(SocketKey, SocketPeer)>, TableError> {
        Self::peers(self)
    }
}

enum Message {
    Gone(Vec<Gone>),
    /// Look there from now on: the maps are others.
    Peers(Box<dyn Peers>),
}

/// The engine's side.
#[derive(Debug)]
pub struct SocketRelease {
    gone: Sender<Message>,
    done: Receiver<FlowRelease>,
}

impl SocketRelease {
    /// # Errors
    /// The thread cannot be started.
    pub fn start(peers: impl Peers + 'static, sockets: impl Sockets + 'static) -> io::Result<Self> {
        let peers: Box<dyn Peers> = Box::new(peers);
        let (gone, to_do) = channel();
        let (report, done) = channel();
        let mut worker = Worker { peers, sockets, failing: false };
        std::thread::Builder::new().name("sockets".into()).spawn(move || {
            worker.run(&to_do, &report);
        })?;
        Ok(Self { gone, done })
    }

    pub fn release(&self, gone: Vec<Gone>) {
        if !gone.is_empty() {
            // Without the thread sockets stay, as was said when it ended.
            let _ = self.gone.send(Message::Gone(gone));
        }
    }

    /// The maps were exchanged for these.
    pub fn look_at(&self, peers: impl Peers + 'static) {
        let _ = self.gone.send(Message::Peers(Box::new(peers)));
    }

    pub fn take_done(&self) -> Vec<FlowRelease> {
        self.done.try_iter().collect()
    }
}

struct Worker<S> {
    peers: Box<dyn Peers>,
    sockets: S,
    failing: bool,
}

impl<S: Sockets> Worker<S> {
    fn run(&mut self, to_do: &Receiver<Message>, report: &Sender<FlowRelease>) {
        while let Ok(first) = to_do.recv() {
            let mut gone = Vec::new();
            self.take(first, &mut gone);
            loop {
                match to_do.try_recv() {
                    Ok(more) => self.take(more, &mut gone),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            if gone.is_empty() {
                continue;
            }
            self.release(&gone, report);
            std::thread::sleep(AGAIN);
            self.release(&gone, report);
        }
    }

    fn take(&mut self, message: Message, gone: &mut Vec<Gone>) {
        match message {
            Message::Gone(more) => gone.extend(more),
            Message::Peers(peers) => self.peers = peers,
        }
    }

    fn release(&mut self, gone: &[Gone], report: &Sender<FlowRelease>) {
        for family in Family::ALL {
            let of_family = |gone: &&Gone| gone.address.is_ipv4() == (family == Family::V4);
            let gone: HashSet<(IpAddr, u16, BackendId)> = gone
                .iter()
                .filter(of_family)
                .filter(|gone| !self.peers.serves(gone).unwrap_or(false))
                .map(|gone| (gone.address, gone.port, gone.id))
                .collect();
            if gone.is_empty() {
                continue;
            }
            let start = Instant::now();
            let released = match self.release_all(&gone) {
                Ok(count) => {
                    self.failing = false;
                    debug!(%family, count, "UDP sockets of backends that are gone were ended");
                    Some(count)
                }
                Err(error) => {
                    if !std::mem::replace(&mut self.failing, true) {
                        warn!(
                            error,
                            "UDP sockets that are connected to removed endpoints stay: they send \
                             into the void until their owners open new ones"
                        );
                    }
                    None
                }
            };
            // Nobody is left to be told.
            let _ = report.send(FlowRelease { family, duration: start.elapsed(), released });
        }
    }

    fn release_all(&mut self, gone: &HashSet<(IpAddr, u16, BackendId)>) -> Result<usize, String> {
        let peers = self.peers.peers().map_err(|error| error.to_string())?;
        // A socket may have been connected to one after the other.
        let doomed: HashSet<(u64, SocketAddr)> = peers
            .into_iter()
            .filter_map(|(key, peer)| {
                let (address, port) = (IpAddr::from(key.address), key.port.to_host());
                let is_gone = gone.contains(&(address, port, peer.backend));
                is_gone.then(|| (key.cookie, SocketAddr::new(address, port)))
            })
            .collect();
        if doomed.is_empty() {
            return Ok(0);
        }
        let ends = |socket: &UdpSocket| doomed.contains(&(socket.cookie, socket.peer));
        self.sockets.destroy_udp(&ends).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use proxy_ebpf::order::Be16;

    use super::*;
    use crate::kernel::sockets::FakeSockets;

    struct Entries(Vec<(SocketKey, SocketPeer)>);

    impl Peers for Entries {
        fn serves(&self, gone: &Gone) -> Result<bool, TableError> {
            Ok(gone.id == BackendId(9))
        }

        fn peers(&self) -> Result<Vec<(SocketKey, SocketPeer)>, TableError> {
            Ok(self.0.clone())
        }
    }

    #[test]
    fn sockets_of_gone_backends_end_and_no_others() {
        let address: IpAddr = [10, 244, 0, 1].into();
        let entry = |cookie, backend| {
            let port = Be16::from_host(53);
            let key = SocketKey::new(cookie, address.into(), port);
            let peer = SocketPeer { backend: BackendId(backend), ..SocketPeer::default() };
            (key, peer)
        };
        let sockets = FakeSockets::default();
        let peer: SocketAddr = (address, 53).into();
        let elsewhere: SocketAddr = ([10, 244, 0, 2], 53).into();
        // By the Service, by another Service, by one that is served again, and elsewhere since.
        let all = [(1, peer), (2, peer), (3, peer), (4, elsewhere)];
        let all = all.map(|(cookie, peer)| UdpSocket { peer, cookie });
        sockets.0.lock().unwrap().extend(all.clone());
        let entries = Entries(vec![entry(1, 7), entry(2, 8), entry(3, 9), entry(4, 7)]);
        let release = SocketRelease::start(entries, sockets.clone()).unwrap();
        let gone = |id| Gone { id: BackendId(id), address, port: 53 };
        release.release(vec![gone(9)]);
        release.release(vec![gone(7)]);
        let first = release.done.recv().unwrap();
        assert_eq!((first.family, first.released), (Family::V4, Some(1)));
        assert_eq!(release.done.recv().unwrap().released, Some(0), "looked for once more");
        assert_eq!(sockets.0.lock().unwrap().iter().cloned().collect::<Vec<_>>().len(), 3);
        assert!(!sockets.0.lock().unwrap().contains(&all[0]));
    }

    /// What a socket was connected to before is remembered until it is forgotten for want of room.
    #[test]
    fn a_socket_that_was_connected_to_several_gone_backends_ends_by_the_last() {
        let at = |last: u8| SocketAddr::from(([10, 244, 0, last], 53));
        let all: Vec<u8> = (1..=8).collect();
        let entry = |last: &u8| {
            let key = SocketKey::new(1, at(*last).ip().into(), Be16::from_host(53));
            (key, SocketPeer { backend: BackendId(u32::from(*last)), ..SocketPeer::default() })
        };
        for last in &all {
            let sockets = FakeSockets::default();
            sockets.0.lock().unwrap().extend([UdpSocket { peer: at(*last), cookie: 1 }]);
            let entries = Entries(all.iter().map(entry).collect());
            let release = SocketRelease::start(entries, sockets.clone()).unwrap();
            let gone = |last: &u8| Gone {
                id: BackendId(u32::from(*last)),
                address: at(*last).ip(),
                port: 53,
            };
            release.release(all.iter().map(gone).collect());
            assert_eq!(release.done.recv().unwrap().released, Some(1), "{last}");
        }
    }
}
