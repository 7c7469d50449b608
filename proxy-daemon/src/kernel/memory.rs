//! Memory that was freed and that the C library has not given back.
//!
//! glibc keeps it for the next allocation, and a pool of it for each thread. After a list of
//! everything that is as much again as what is in use, for as long as the daemon runs. Other
//! C libraries have nothing of the kind to be told.

#![allow(unsafe_code, reason = "mallopt and malloc_trim, which nix has no wrapper for")]

/// What is as large as this has a mapping of its own, which goes when it is freed. That is
/// glibc's own figure, but it makes it larger, up to 32 MiB, with each such mapping that goes:
/// then a scrape of the metrics, or a page of a list, would leave its buffers in the pool.
#[cfg(target_env = "gnu")]
const MAPPED: nix::libc::c_int = 128 << 10;

/// One pool for all threads: they allocate at the same time at a start and at no other. Before
/// there is a second thread.
pub fn share_pool() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two numbers; there is no other thread yet that could be allocating.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1);
        nix::libc::mallopt(nix::libc::M_MMAP_THRESHOLD, MAPPED);
    }
}

/// Gives back what is free. Takes a few milliseconds in which other threads wait for memory.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number, looks at free memory alone, and may be called by any thread.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
