//! How the host's allocator treats freed memory.

/// Allocations of at least this size are mapped by themselves, and given back when they are freed. The most glibc takes.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES: i32 = 32 << 20;

/// Free memory at the end of a heap that is kept.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: i32 = 256 << 20;

/// Keeps what is freed for the next allocation. Each step of a layer frees tensors of a few megabytes and allocates the like
/// anew; by default they go back to the system in between, which then clears every page again.
///
/// Another C library than glibc is left as it is. Call it before there are threads.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_MMAP_THRESHOLD, MAPPED_BYTES), (libc::M_TRIM_THRESHOLD, KEPT_BYTES)] {
        #[allow(unsafe_code, reason = "the allocator's parameters have no safe interface")]
        // SAFETY: mallopt takes numbers, and sets parameters of the allocator under its own lock.
        let taken = unsafe { libc::mallopt(parameter, value) };
        debug_assert_eq!(taken, 1, "parameter {parameter} is not {value}");
    }
}
