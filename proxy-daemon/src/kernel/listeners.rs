//! Who listens on a TCP port of this network namespace: this process or another one.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// `TCP_LISTEN` (`include/net/tcp_states.h`).
const LISTEN: &str = "0A";

/// The seam, on a `/proc` that may be elsewhere.
#[derive(Debug, Clone)]
pub struct Listeners {
    proc: PathBuf,
}

impl Listeners {
    #[must_use]
    pub fn at(proc: &Path) -> Self {
        Self { proc: proc.to_owned() }
    }

    /// Whether a process other than this one listens on `port`, on whatever address.
    ///
    /// # Errors
    /// When the tables of sockets cannot be read.
    pub fn held_by_others(&self, port: u16) -> io::Result<bool> {
        let mut sockets = BTreeSet::new();
        for file in ["tcp", "tcp6"] {
            match fs::read_to_string(self.proc.join("thread-self/net").join(file)) {
                Ok(table) => sockets.extend(listening(&table, port)),
                Err(error) if error.kind() == io::ErrorKind::NotFound && file == "tcp6" => {}
                Err(error) => return Err(error),
            }
        }
        if sockets.is_empty() {
            return Ok(false);
        }
        for descriptor in fs::read_dir(self.proc.join("self/fd"))? {
            // It may have been closed since.
            let Ok(target) = fs::read_link(descriptor?.path()) else { continue };
            if let Some(inode) = target.to_str().and_then(inode) {
                sockets.remove(&inode);
            }
        }
        Ok(!sockets.is_empty())
    }
}

/// Inodes of the sockets that listen on `port`, of the lines of `/proc/net/tcp`
/// (`get_tcp4_sock` in `net/ipv4/tcp_ipv4.c`).
fn listening(table: &str, port: u16) -> impl Iterator<Item = u64> {
    table.lines().skip(1).filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace();
        let local = fields.nth(1)?.rsplit_once(':')?.1;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?;
        let matches = state == LISTEN && u16::from_str_radix(local, 16) == Ok(port);
        matches.then(|| inode.parse().ok()).flatten()
    })
}

/// Of `socket:[12345]`.
fn inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::os::unix::fs::symlink;

    use proptest::prelude::{any, proptest};

    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:2810 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1
   1: 0100007F:2810 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 4712 1
   2: 0100007F:2809 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1
";

    #[test]
    fn listening_sockets_are_found_by_port() {
        assert_eq!(listening(TABLE, 10256).collect::<Vec<_>>(), [4711]);
        assert_eq!(listening(TABLE, 10249).collect::<Vec<_>>(), [4713]);
        assert_eq!(listening(TABLE, 80).count(), 0);
    }

    #[test]
    fn a_socket_of_ones_own_is_not_that_of_another() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(!Listeners::at(Path::new("/proc")).held_by_others(port).unwrap());
    }

    #[test]
    fn a_socket_that_is_not_among_ones_own_is_anothers() {
        let proc = tempfile::tempdir().unwrap();
        let net = proc.path().join("thread-self/net");
        let descriptors = proc.path().join("self/fd");
        fs::create_dir_all(&net).unwrap();
        fs::create_dir_all(&descriptors).unwrap();
        fs::write(net.join("tcp"), TABLE).unwrap();
        symlink("socket:[4713]", descriptors.join("3")).unwrap();
        let listeners = Listeners::at(proc.path());
        assert!(listeners.held_by_others(10256).unwrap());
        assert!(!listeners.held_by_others(10249).unwrap());
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in ".{0,300}", port in any::<u16>()) {
            let _ = listening(&text, port).count();
            let _ = inode(&text);
        }
    }
}
