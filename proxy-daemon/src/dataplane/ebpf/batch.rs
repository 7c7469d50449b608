//! Whole per-CPU arrays in a few system calls (`BPF_MAP_LOOKUP_BATCH`, which they have from kernel
//! 5.13 on). aya reads entry by entry.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::Pod;
use aya::maps::{MapData, MapError};
use aya::sys::SyscallError;
use nix::libc;

use super::pins::Pins;
use super::tables::failed;
use super::{LoadError, TableError};

/// `enum bpf_cmd` of include/uapi/linux/bpf.h.
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
/// Entries of one system call, which has to have room for the fullest bucket of a hash.
pub const BATCH: usize = 4096;
/// What is read at once, about.
const BYTES: usize = 1 << 20;

/// `struct { .. } batch` of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// A per-CPU array, opened for reading all of it.
pub struct BatchMap {
    name: &'static str,
    map: MapData,
    key_size: usize,
    value_size: usize,
}

impl std::fmt::Debug for BatchMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BatchMap").field("name", &self.name).finish_non_exhaustive()
    }
}

impl BatchMap {
    /// `cpus` is how many values an entry has, each padded to 8 bytes.
    ///
    /// # Errors
    /// It is not pinned there.
    pub fn open<V: Pod>(pins: &Pins, name: &'static str, cpus: usize) -> Result<Self, LoadError> {
        let map = MapData::from_pin(pins.map(name))
            .map_err(|e| LoadError::from_aya(format!("open map {name}"), &e))?;
        let value_size = size_of::<V>().next_multiple_of(8) * cpus;
        Ok(Self { name, map, key_size: size_of::<u32>(), value_size })
    }

    /// Hands over keys and values until `each` has enough (an array's come in their order).
    /// One call of the kernel takes `limit` entries at most.
    ///
    /// # Errors
    /// The kernel refuses: an older one does not know how.
    pub fn each(
        &self,
        limit: usize,
        each: &mut dyn FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), TableError> {
        let length = (BYTES / (self.key_size + self.value_size)).clamp(1, limit.max(1));
        let mut keys = vec![0; length * self.key_size];
        let mut values = vec![0; length * self.value_size];
        // Large enough for what any kind of map keeps here: a key, or a bucket's number.
        let mut place = vec![0; self.key_size.max(size_of::<u32>())];
        let mut began = false;
        loop {
            let mut next = vec![0; place.len()];
            let from = began.then_some(&mut place);
            let (count, over) = self.lookup(from, &mut next, &mut keys, &mut values)?;
            let entries = keys.chunks(self.key_size).zip(values.chunks(self.value_size));
            for (key, value) in entries.take(count) {
                if !each(key, value) {
                    return Ok(());
                }
            }
            if over {
                return Ok(());
            }
            place = next;
            began = true;
        }
    }

    /// How many entries there were, and whether they were the last.
    fn lookup(
        &self,
        from: Option<&mut Vec<u8>>,
        next: &mut [u8],
        keys: &mut [u8],
        values: &mut [u8],
    ) -> Result<(usize, bool), TableError> {
        let address = |bytes: &mut [u8]| bytes.as_mut_ptr() as u64;
        let room = keys.len() / self.key_size;
        let mut attributes = Attributes {
            in_batch: from.map_or(0, |place| address(place)),
            out_batch: address(next),
            keys: address(keys),
            values: address(values),
            count: u32::try_from(room).unwrap_or(u32::MAX),
            map_fd: u32::try_from(self.map.fd().as_fd().as_raw_fd()).unwrap_or(u32::MAX),
            ..Attributes::default()
        };
        let result = bpf(&mut attributes);
        let count = (attributes.count as usize).min(room);
        match result {
            Ok(()) => Ok((count, false)),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok((count, true)),
            Err(io_error) => {
                let call = "bpf_map_lookup_batch";
                let error = MapError::SyscallError(SyscallError { call, io_error });
                Err(failed(self.name, "read all")(error))
            }
        }
    }
}

#[allow(unsafe_code, reason = "one call into libc")]
fn bpf(attributes: &mut Attributes) -> io::Result<()> {
    let size = size_of::<Attributes>();
    // SAFETY: the kernel reads and writes `size` bytes of the struct, and the memory that it
    // names, which `lookup` borrows mutably for as long and made as large as `count` says.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, std::ptr::from_mut(attributes), size)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The struct that the bytes are; `None` when they are too few.
#[allow(unsafe_code, reason = "bytes from the kernel are read as what it keeps there")]
pub fn from_bytes<T: Pod>(bytes: &[u8]) -> Option<T> {
    if bytes.len() < size_of::<T>() {
        return None;
    }
    // SAFETY: long enough, no alignment is asked for, and any bytes are a `Pod`.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// Over all CPUs.
pub fn sum<T: Pod + Default + std::ops::AddAssign>(value: &[u8]) -> T {
    let each = value.chunks(size_of::<T>().next_multiple_of(8));
    each.filter_map(from_bytes::<T>).fold(T::default(), |mut total, one| {
        total += one;
        total
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_cpus_are_padded_and_added_up() {
        let bytes: Vec<u8> =
            [1_u32, 77, 2, 77].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(sum::<u32>(&bytes), 3);
        assert_eq!(from_bytes::<u64>(&bytes[..7]), None);
    }
}
