//! The socket options of `net/ipv4/netfilter/ip_tables.c` and `net/ipv6/netfilter/
//! ip6_tables.c`. They are reached through any socket of the family: what the kernel asks
//! for is CAP_NET_ADMIN, not a raw socket.

#![allow(unsafe_code, reason = "getsockopt and setsockopt with structures of the kernel")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{Errno, Family, HOOKS, Info, Table, XTables, XTablesError};

/// `IPT_SO_SET_REPLACE`, `IPT_SO_SET_ADD_COUNTERS`, `IPT_SO_GET_INFO`,
/// `IPT_SO_GET_ENTRIES`; those of IPv6 have the same numbers.
const SET_REPLACE: libc::c_int = 64;
const SET_ADD_COUNTERS: libc::c_int = 65;
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// `XT_TABLE_MAXNAMELEN`.
const TABLE_NAME: usize = 32;
/// How often a table may have changed between reading and replacing it.
const TRIES: u32 = 10;
/// The lock of iptables commands is waited for this often, for this long each time.
const LOCK_TRIES: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// `sizeof(struct ipt_getinfo)`.
const INFO_SIZE: usize = TABLE_NAME + 4 * (1 + 2 * HOOKS + 2);

// The structures below have pointers and 64-bit integers in them, which a 32-bit kernel
// aligns differently.
const _: () = assert!(size_of::<usize>() == 8);

type Name = [u8; TABLE_NAME];

/// `struct xt_counters`: packets and bytes.
type Counters = [u64; 2];

#[derive(Debug)]
pub struct XTablesSockets {
    v4: OwnedFd,
    v6: Option<OwnedFd>,
    proc_net: PathBuf,
    lock: PathBuf,
}

impl XTablesSockets {
    /// In the network namespace of the calling thread. `proc_net` is its `/proc/net`, and
    /// `lock` the file that iptables commands lock (`/run/xtables.lock`), which is used
    /// when it is there.
    ///
    /// # Errors
    /// When no socket can be opened.
    pub fn open(proc_net: &Path, lock: &Path) -> io::Result<Self> {
        let open = |family| {
            socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
                .map_err(io::Error::from)
        };
        Ok(Self {
            v4: open(AddressFamily::Inet)?,
            // A kernel may be without IPv6.
            v6: open(AddressFamily::Inet6).ok(),
            proc_net: proc_net.to_owned(),
            lock: lock.to_owned(),
        })
    }

    fn socket(&self, family: Family) -> Result<(&OwnedFd, libc::c_int), nix::errno::Errno> {
        match family {
            Family::V4 => Ok((&self.v4, libc::SOL_IP)),
            Family::V6 => {
                let socket = self.v6.as_ref().ok_or(nix::errno::Errno::EAFNOSUPPORT)?;
                Ok((socket, libc::SOL_IPV6))
            }
        }
    }

    /// `buffer` holds the request and takes the answer.
    fn get(
        &self,
        family: Family,
        option: libc::c_int,
        buffer: &mut [u8],
    ) -> Result<(), nix::errno::Errno> {
        let (socket, level) = self.socket(family)?;
        let mut length =
            libc::socklen_t::try_from(buffer.len()).map_err(|_| nix::errno::Errno::EMSGSIZE)?;
        // SAFETY: `buffer` is valid for writes of `length` bytes, which is what the kernel
        // is told it may write; both pointers outlive the call.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                level,
                option,
                buffer.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        nix::errno::Errno::result(result).map(drop)
    }

    fn set(
        &self,
        family: Family,
        option: libc::c_int,
        buffer: &[u8],
    ) -> Result<(), nix::errno::Errno> {
        let (socket, level) = self.socket(family)?;
        let length =
            libc::socklen_t::try_from(buffer.len()).map_err(|_| nix::errno::Errno::EMSGSIZE)?;
        // SAFETY: `buffer` is valid for reads of `length` bytes. A request that names
        // further memory (the counters) is only made by `replace`, which keeps it
        // alive and large enough during the call.
        let result = unsafe {
            libc::setsockopt(socket.as_raw_fd(), level, option, buffer.as_ptr().cast(), length)
        };
        nix::errno::Errno::result(result).map(drop)
    }

    fn read(&self, family: Family, name: Name) -> Result<(Info, Vec<u8>), nix::errno::Errno> {
        let mut answer = name.to_vec();
        answer.resize(INFO_SIZE, 0);
        self.get(family, GET_INFO, &mut answer)?;
        let info = decode_info(&answer).ok_or(nix::errno::Errno::EIO)?;
        let size = usize::try_from(info.size).map_err(|_| nix::errno::Errno::EMSGSIZE)?;
        let mut answer = header(name, &[info.size]);
        let start = answer.len();
        answer.resize(start + size, 0);
        self.get(family, GET_ENTRIES, &mut answer)?;
        let blob = answer.split_off(start);
        Ok((info, blob))
    }

    /// Returns the counters that the old entries had at the moment of the exchange.
    fn replace(
        &self,
        family: Family,
        name: Name,
        (info, blob): (Info, &[u8]),
        old_entries: u32,
    ) -> Result<Vec<Counters>, nix::errno::Errno> {
        let count = usize::try_from(old_entries).map_err(|_| nix::errno::Errno::EMSGSIZE)?;
        let mut counters = vec![Counters::default(); count];
        let mut fields = vec![info.valid_hooks, info.entries, info.size];
        fields.extend(info.hook_entry.iter().chain(&info.underflow));
        fields.push(old_entries);
        let mut request = header(name, &fields);
        // `do_replace` writes exactly `old_entries` counters there, or refuses.
        let pointer = counters.as_mut_ptr().expose_provenance();
        request.extend_from_slice(&pointer.to_ne_bytes());
        request.extend_from_slice(blob);
        self.set(family, SET_REPLACE, &request)?;
        Ok(counters)
    }

    /// New entries begin at zero: what the old ones had counted is added.
    fn add_counters(
        &self,
        family: Family,
        name: Name,
        counters: &[Counters],
    ) -> Result<(), nix::errno::Errno> {
        let number = u32::try_from(counters.len()).map_err(|_| nix::errno::Errno::EMSGSIZE)?;
        let mut request = header(name, &[number]);
        request.extend(counters.iter().flatten().flat_map(|count| count.to_ne_bytes()));
        self.set(family, SET_ADD_COUNTERS, &request)
    }

    /// Held while a table is exchanged: the kernel notices that a table has changed in
    /// between only by its number of entries.
    fn lock(&self) -> Result<Option<Flock<File>>, XTablesError> {
        // Never made: whether commands of the host would see it is not known here.
        let Ok(mut file) = File::open(&self.lock) else { return Ok(None) };
        for _ in 0..LOCK_TRIES {
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Some(lock)),
                Err((back, nix::errno::Errno::EWOULDBLOCK)) => file = back,
                // A file system without locks.
                Err(_) => return Ok(None),
            }
            sleep(LOCK_PAUSE);
        }
        Err(XTablesError::Locked { path: self.lock.clone() })
    }

    /// One attempt; `None` when the table was changed by others in between.
    fn try_edit(
        &self,
        family: Family,
        table: &str,
        change: &mut dyn FnMut(&mut Table) -> bool,
    ) -> Result<Option<bool>, XTablesError> {
        let refused = |operation| {
            move |errno: nix::errno::Errno| XTablesError::Refused {
                operation,
                family,
                table: table.to_owned(),
                errno: Errno(errno as i32),
            }
        };
        let malformed =
            |source| XTablesError::Malformed { family, table: table.to_owned(), source };
        let name = table_name(table).ok_or_else(|| refused("name")(nix::errno::Errno::EINVAL))?;
        let (info, blob) = match self.read(family, name) {
            Ok(read) => read,
            // `get_entries`: its size is another one by now.
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(refused("read")(errno)),
        };
        let mut new = Table::parse(family, info, &blob).map_err(malformed)?;
        if !change(&mut new) {
            return Ok(Some(false));
        }
        let (new_info, new_blob) = new.write().map_err(malformed)?;
        let old = match self.replace(family, name, (new_info, &new_blob), info.entries) {
            Ok(old) => old,
            // `do_replace`: it has another number of entries by now.
            Err(nix::errno::Errno::EAGAIN) => return Ok(None),
            Err(errno) => return Err(refused("replace")(errno)),
        };
        let counters: Vec<_> =
            new.numbers().iter().map(|n| old.get(*n).copied().unwrap_or_default()).collect();
        if let Err(errno) = self.add_counters(family, name, &counters) {
            tracing::warn!(table, ?family, %errno, "counters of iptables rules begin at 0 again");
        }
        Ok(Some(true))
    }
}

impl XTables for XTablesSockets {
    fn tables(&mut self, family: Family) -> Result<Vec<String>, XTablesError> {
        let file = match family {
            Family::V4 => "ip_tables_names",
            Family::V6 => "ip6_tables_names",
        };
        let path = self.proc_net.join(file);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(text.lines().map(str::to_owned).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(XTablesError::Names { path, source }),
        }
    }

    fn edit(
        &mut self,
        family: Family,
        table: &str,
        change: &mut dyn FnMut(&mut Table) -> bool,
    ) -> Result<bool, XTablesError> {
        let _lock = self.lock()?;
        for _ in 0..TRIES {
            if let Some(changed) = self.try_edit(family, table, change)? {
                return Ok(changed);
            }
        }
        Err(XTablesError::Contended { family, table: table.to_owned(), tries: TRIES })
    }
}

/// The beginning of every request: the table and some integers, padded to where a
/// pointer or a 64-bit integer may follow.
fn header(name: Name, fields: &[u32]) -> Vec<u8> {
    let mut bytes = name.to_vec();
    bytes.extend(fields.iter().flat_map(|field| field.to_ne_bytes()));
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

fn table_name(table: &str) -> Option<Name> {
    let mut name = [0; TABLE_NAME];
    // With room for a NUL.
    if table.is_empty() || table.len() >= TABLE_NAME {
        return None;
    }
    name.get_mut(..table.len())?.copy_from_slice(table.as_bytes());
    Some(name)
}

fn decode_info(bytes: &[u8]) -> Option<Info> {
    let mut words = bytes
        .get(TABLE_NAME..)?
        .chunks_exact(4)
        .filter_map(|word| word.try_into().ok().map(u32::from_ne_bytes));
    let valid_hooks = words.next()?;
    let mut five = || {
        let mut five = [0; HOOKS];
        five.iter_mut().for_each(|slot| *slot = words.next().unwrap_or_default());
        five
    };
    let (hook_entry, underflow) = (five(), five());
    Some(Info { valid_hooks, hook_entry, underflow, entries: words.next()?, size: words.next()? })
}
