//! eBPF maps by the bytes of their keys and values: commands of bpf(2) that aya has no call for.
//!
//! Batches are from kernel 5.6 on, for some kinds of maps from later ones; where there are none,
//! entries go one by one. Every system call is counted.

#![allow(unsafe_code, reason = "system calls without a wrapper")]

use std::cell::Cell;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno as Number;
use nix::libc;

use super::netlink::Errno;

/// Commands, include/uapi/linux/bpf.h.
const LOOKUP: libc::c_long = 1;
const UPDATE: libc::c_long = 2;
const NEXT_KEY: libc::c_long = 4;
const INFO_BY_FD: libc::c_long = 15;
const LOOKUP_BATCH: libc::c_long = 24;
const UPDATE_BATCH: libc::c_long = 26;

const NOEXIST: u64 = 1;

/// Map types: in the one the keys are 0, 1, 2.., in the others a value is one for each CPU.
const ARRAY: u32 = 2;
const PER_CPU: [u32; 4] = [5, 6, 10, 21];

/// The kernel's own number for an operation that a map does not have; it never got a name in
/// user space.
const ENOTSUPP: i32 = 524;

/// Entries of one batch: as many as fit a few pages, since the kernel copies them one by one.
pub const BATCH: usize = 4096;
/// What a batch of larger values comes to, about.
const BYTES: usize = 1 << 20;

/// What the kernel says of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Shape {
    pub kind: u32,
    /// The same in every handle to one map.
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

#[repr(C)]
struct InfoArguments {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct ElementArguments {
    fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct BatchArguments {
    after: u64,
    cursor: u64,
    keys: u64,
    values: u64,
    count: u32,
    fd: u32,
    element_flags: u64,
    flags: u64,
}

/// A handle of its own to a map.
#[derive(Debug)]
pub struct RawMap {
    fd: OwnedFd,
    shape: Shape,
    /// Length of what is read and written with a key: a value, or one for each CPU.
    value: usize,
    /// Batches have not been refused yet.
    batches: Cell<bool>,
    calls: Cell<u64>,
}

fn address<T: ?Sized>(pointer: *const T) -> u64 {
    pointer.cast::<u8>().addr() as u64
}

/// The one call.
///
/// # Safety
/// Every address in `arguments` is of as much memory as the command reads or writes there.
unsafe fn bpf<A>(command: libc::c_long, arguments: &mut A) -> Result<(), Errno> {
    let pointer: *mut A = arguments;
    // SAFETY: the kernel reads and writes no more than the size that it is given; what the
    // arguments point to is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, size_of::<A>()) };
    if result < 0 { Err(Errno(Number::last_raw())) } else { Ok(()) }
}

impl RawMap {
    /// # Errors
    /// It is no map, has a value for each CPU, or descriptors ran out.
    pub fn of(map: BorrowedFd<'_>) -> Result<Self, Errno> {
        let map = Self::open(map)?;
        if PER_CPU.contains(&map.shape.kind) {
            return Err(Errno(Number::EOPNOTSUPP as i32));
        }
        Ok(map)
    }

    /// A map that has a value for each of `cpus`, those that there could be, which each begin at a
    /// multiple of 8 bytes.
    ///
    /// # Errors
    /// It is no such map, or descriptors ran out.
    pub fn of_each_cpu(map: BorrowedFd<'_>, cpus: usize) -> Result<Self, Errno> {
        let mut map = Self::open(map)?;
        if !PER_CPU.contains(&map.shape.kind) {
            return Err(Errno(Number::EOPNOTSUPP as i32));
        }
        map.value = map.value.next_multiple_of(8) * cpus;
        Ok(map)
    }

    fn open(map: BorrowedFd<'_>) -> Result<Self, Errno> {
        let fd = map.try_clone_to_owned().map_err(|e| Errno(e.raw_os_error().unwrap_or(0)))?;
        let mut shape = Shape::default();
        let mut arguments = InfoArguments {
            fd: number(&fd),
            length: u32::try_from(size_of::<Shape>()).unwrap_or(0),
            info: address(&raw mut shape),
        };
        // SAFETY: the kernel writes at most `length` bytes to `shape`, which are all of it.
        unsafe {
            bpf(INFO_BY_FD, &mut arguments)?;
        }
        let value = shape.value_size as usize;
        Ok(Self { fd, shape, value, batches: Cell::new(true), calls: Cell::new(0) })
    }

    #[must_use]
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// System calls for entries so far.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls.get()
    }

    /// As if the kernel had no batches: for tests.
    pub fn one_by_one(&self) {
        self.batches.set(false);
    }

    const fn key(&self) -> usize {
        self.shape.key_size as usize
    }

    const fn value(&self) -> usize {
        self.value
    }

    /// Adds or replaces. `keys` and `values` are one after the other; an error leaves those
    /// before it written.
    ///
    /// # Errors
    /// The kernel refuses one; `EINVAL` when there are not as many values as keys.
    pub fn update(&self, keys: &[u8], values: &[u8]) -> Result<(), Errno> {
        if !keys.len().is_multiple_of(self.key())
            || !values.len().is_multiple_of(self.value())
            || keys.len() / self.key() != values.len() / self.value()
        {
            return Err(Errno(Number::EINVAL as i32));
        }
        let keys = keys.chunks(BATCH * self.key());
        for (keys, values) in keys.zip(values.chunks(BATCH * self.value())) {
            if keys.len() > self.key() && self.batches.get() {
                match self.update_batch(keys, values) {
                    Err(error) if self.has_no_batches(error) => {}
                    result => {
                        result?;
                        continue;
                    }
                }
            }
            let keys = keys.chunks_exact(self.key());
            for (key, value) in keys.zip(values.chunks_exact(self.value())) {
                self.update_one(key, value, 0)?;
            }
        }
        Ok(())
    }

    /// Adds one that is not there yet; false when it is.
    ///
    /// # Errors
    /// The kernel refuses, or the sizes are not the map's.
    pub fn add(&self, key: &[u8], value: &[u8]) -> Result<bool, Errno> {
        if key.len() != self.key() || value.len() != self.value() {
            return Err(Errno(Number::EINVAL as i32));
        }
        match self.update_one(key, value, NOEXIST) {
            Err(Errno(number)) if number == Number::EEXIST as i32 => Ok(false),
            result => result.map(|()| true),
        }
    }

    /// Gives all entries, some at a time: keys and values, one after the other. What comes or
    /// goes meanwhile may be among them or not.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn read(&self, mut give: impl FnMut(&[u8], &[u8])) -> Result<(), Errno> {
        if self.batches.get() {
            let mut all = |keys: &[u8], values: &[u8]| {
                give(keys, values);
                true
            };
            match self.read_batches(BATCH, &mut all) {
                Err(error) if self.has_no_batches(error) => {}
                result => return result,
            }
        }
        self.read_one_by_one(give)
    }

    /// Gives entry after entry (an array's come in their order) until `each` has enough, in batches
    /// of `limit` at most.
    ///
    /// # Errors
    /// The kernel refuses: an older one has no batches.
    pub fn read_while(
        &self,
        limit: usize,
        mut each: impl FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Errno> {
        let room = (BYTES / (self.key() + self.value())).clamp(1, limit.max(1));
        self.read_batches(room, &mut |keys, values| {
            let mut entries = keys.chunks(self.key()).zip(values.chunks(self.value()));
            entries.all(|(key, value)| each(key, value))
        })
    }

    /// The values of an array from `first` on, as many as there are up to `count`.
    ///
    /// # Errors
    /// The kernel refuses; `EINVAL` for a map that is no array.
    pub fn range(&self, first: u32, count: u32) -> Result<Vec<u8>, Errno> {
        if self.shape.kind != ARRAY || self.key() != size_of::<u32>() {
            return Err(Errno(Number::EINVAL as i32));
        }
        let count = count.min(self.shape.max_entries.saturating_sub(first));
        let mut values = vec![0; count as usize * self.value()];
        let mut keys = vec![0; BATCH.min(count as usize) * self.key()];
        for (at, part) in values.chunks_mut(BATCH * self.value()).enumerate() {
            let first = first + u32::try_from(at * BATCH).unwrap_or(u32::MAX);
            if part.len() > self.value() && self.batches.get() {
                // The first is the one after this; without any, it is the very first.
                let after = first.checked_sub(1).map(u32::to_ne_bytes);
                let after = after.as_ref().map(<[u8; 4]>::as_slice);
                let mut cursor = [0; 4];
                let keys = &mut keys[..part.len() / self.value() * size_of::<u32>()];
                match self.lookup_batch(after, &mut cursor, keys, part) {
                    Err(error) if self.has_no_batches(error) => {}
                    result => {
                        result?;
                        continue;
                    }
                }
            }
            for (index, value) in (first..).zip(part.chunks_exact_mut(self.value())) {
                self.lookup_one(&index.to_ne_bytes(), value)?;
            }
        }
        Ok(values)
    }

    /// Told by the first batch, whatever it holds; a kernel that has them never says so.
    fn has_no_batches(&self, Errno(error): Errno) -> bool {
        let unknown = [ENOTSUPP, Number::EOPNOTSUPP as i32, Number::EINVAL as i32].contains(&error);
        if unknown {
            self.batches.set(false);
        }
        unknown
    }

    /// Until `give` has enough.
    fn read_batches(
        &self,
        mut room: usize,
        give: &mut impl FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<(), Errno> {
        // As large as what the kernel puts there: a key, or a number of its own.
        let mut cursor = vec![0; self.key().max(size_of::<u64>())];
        let mut after: Option<Vec<u8>> = None;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        loop {
            keys.resize(room * self.key(), 0);
            values.resize(room * self.value(), 0);
            match self.lookup_batch(after.as_deref(), &mut cursor, &mut keys, &mut values) {
                Ok((count, over)) => {
                    let more = give(&keys[..count * self.key()], &values[..count * self.value()]);
                    if over || !more {
                        return Ok(());
                    }
                    after = Some(cursor.clone());
                }
                // A bucket of a hash comes whole or not at all.
                Err(Errno(number)) if number == Number::ENOSPC as i32 => room *= 2,
                Err(error) => return Err(error),
            }
        }
    }

    fn read_one_by_one(&self, mut give: impl FnMut(&[u8], &[u8])) -> Result<(), Errno> {
        let mut key: Option<Vec<u8>> = None;
        let mut next = vec![0; self.key()];
        let mut value = vec![0; self.value()];
        while self.next_key(key.as_deref(), &mut next)? {
            match self.lookup_one(&next, &mut value) {
                Ok(()) => give(&next, &value),
                // It went meanwhile.
                Err(Errno(number)) if number == Number::ENOENT as i32 => {}
                Err(error) => return Err(error),
            }
            key = Some(next.clone());
        }
        Ok(())
    }

    fn count(&self) {
        self.calls.set(self.calls.get() + 1);
    }

    fn update_batch(&self, keys: &[u8], values: &[u8]) -> Result<(), Errno> {
        self.count();
        let mut arguments = BatchArguments {
            after: 0,
            cursor: 0,
            keys: address(keys),
            values: address(values),
            count: u32::try_from(keys.len() / self.key()).unwrap_or(0),
            fd: number(&self.fd),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads `count` keys and values, which the callers have counted.
        unsafe { bpf(UPDATE_BATCH, &mut arguments) }
    }

    /// How many, and whether there are no more.
    fn lookup_batch(
        &self,
        after: Option<&[u8]>,
        cursor: &mut [u8],
        keys: &mut [u8],
        values: &mut [u8],
    ) -> Result<(usize, bool), Errno> {
        self.count();
        let room = keys.len() / self.key();
        debug_assert_eq!(values.len(), room * self.value());
        let mut arguments = BatchArguments {
            after: after.map_or(0, |key| address(key.as_ptr())),
            cursor: address(cursor.as_mut_ptr()),
            keys: address(keys.as_mut_ptr()),
            values: address(values.as_mut_ptr()),
            count: u32::try_from(room).unwrap_or(0),
            fd: number(&self.fd),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads a key or a smaller number from `after`, writes the same to
        // `cursor`, which is as large, and at most `count` keys and values.
        let result = unsafe { bpf(LOOKUP_BATCH, &mut arguments) };
        match result {
            Ok(()) => Ok((arguments.count as usize, false)),
            Err(Errno(number)) if number == Number::ENOENT as i32 => {
                Ok((arguments.count as usize, true))
            }
            Err(error) => Err(error),
        }
    }

    fn element(&self, key: Option<&[u8]>, value: u64, flags: u64) -> ElementArguments {
        self.count();
        let key = key.map_or(0, |key| address(key.as_ptr()));
        ElementArguments { fd: number(&self.fd), pad: 0, key, value, flags }
    }

    fn update_one(&self, key: &[u8], value: &[u8], flags: u64) -> Result<(), Errno> {
        let mut arguments = self.element(Some(key), address(value), flags);
        // SAFETY: the kernel reads one key and one value, as long as the callers have made sure.
        unsafe { bpf(UPDATE, &mut arguments) }
    }

    fn lookup_one(&self, key: &[u8], value: &mut [u8]) -> Result<(), Errno> {
        debug_assert_eq!((key.len(), value.len()), (self.key(), self.value()));
        let mut arguments = self.element(Some(key), address(value.as_mut_ptr()), 0);
        // SAFETY: the kernel reads one key and writes one value.
        unsafe { bpf(LOOKUP, &mut arguments) }
    }

    /// False when there is none after `key`.
    fn next_key(&self, key: Option<&[u8]>, next: &mut [u8]) -> Result<bool, Errno> {
        let mut arguments = self.element(key, address(next.as_mut_ptr()), 0);
        // SAFETY: the kernel reads one key and writes one.
        let result = unsafe { bpf(NEXT_KEY, &mut arguments) };
        match result {
            Err(Errno(number)) if number == Number::ENOENT as i32 => Ok(false),
            result => result.map(|()| true),
        }
    }
}

fn number(fd: &OwnedFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}
