//! The maps, and [`Tables`] over them.
//!
//! The sizes here are for tests; the loader sets them from the daemon's configuration.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use proxy_ebpf::layout::{
    Backend, BackendCounters, BackendId, Frontend, FrontendCounters, FrontendId, FrontendKey,
};
use proxy_ebpf::service::Tables;
use proxy_ebpf::verdict::Reason;

/// Not preallocated: the memory follows the number of Services, and the limit can be
/// generous.
#[map]
static FRONTENDS: HashMap<FrontendKey, Frontend> =
    HashMap::with_max_entries(1024, BPF_F_NO_PREALLOC);

#[map]
static SLOTS: Array<BackendId> = Array::with_max_entries(1024, 0);

#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(1024, 0);

#[map]
static FRONTEND_COUNTERS: PerCpuArray<FrontendCounters> = PerCpuArray::with_max_entries(1024, 0);

#[map]
static BACKEND_COUNTERS: PerCpuArray<BackendCounters> = PerCpuArray::with_max_entries(1024, 0);

#[map]
static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::CAPACITY, 0);

/// The tables in the kernel.
pub struct Kernel;

impl Tables for Kernel {
    #[inline(always)]
    fn frontend(&self, key: &FrontendKey) -> Option<Frontend> {
        // SAFETY: the pointer is valid until the program ends (it runs in an RCU read
        // section). The writer only ever replaces whole values; copying at once keeps
        // the time short in which the kernel may hand the element's memory to another
        // key (it reuses freed elements without waiting for readers, since 6.1).
        unsafe { FRONTENDS.get(key).copied() }
    }

    #[inline(always)]
    fn slot(&self, index: u32) -> Option<BackendId> {
        SLOTS.get(index).copied()
    }

    #[inline(always)]
    fn backend(&self, id: BackendId) -> Option<Backend> {
        BACKENDS.get(id.0).copied()
    }

    #[inline(always)]
    fn count_frontend(&self, id: FrontendId, update: impl FnOnce(&mut FrontendCounters)) {
        if let Some(counters) = FRONTEND_COUNTERS.get_ptr_mut(id.0) {
            // SAFETY: this CPU's entry. A program that interrupts this one on the same
            // CPU may lose one of two updates; it cannot do worse.
            update(unsafe { &mut *counters });
        }
    }

    #[inline(always)]
    fn count_backend(&self, id: BackendId, update: impl FnOnce(&mut BackendCounters)) {
        if let Some(counters) = BACKEND_COUNTERS.get_ptr_mut(id.0) {
            // SAFETY: as in `count_frontend`.
            update(unsafe { &mut *counters });
        }
    }

    #[inline(always)]
    fn count_drop(&self, reason: Reason) {
        if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
            // SAFETY: as in `count_frontend`.
            unsafe { *count += 1 };
        }
    }
}
