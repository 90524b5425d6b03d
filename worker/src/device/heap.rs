//! How the host's allocator treats freed memory.

/// Allocations of at least this size are mapped by themselves, and given back when they are freed: as many
/// as glibc makes it at most when it goes by what was freed.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES: i32 = 32 << 20;

/// Free memory at the end of a heap that is kept: twice the other, as glibc has it when it sets both by itself.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT_BYTES: i32 = 2 * MAPPED_BYTES;

/// What a heap has beyond what is asked of it, and keeps whatever else is given back. Each thread has heaps of its own, of 64 MiB at
/// most, and some end again and again at what one step of a layer frees: with so much of it they stay as large as they ever were.
/// Pages that fault fall to 0.4 of what they were, a hundredth of a run's time; the most that is resident stays about the same.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const PADDING_BYTES: i32 = 2 * MAPPED_BYTES;

/// Keeps what is freed for the next allocation. Each step of a layer frees tensors of a few megabytes and allocates the like
/// anew; glibc, which goes by the largest that was freed so far, gives them back to the system in between, and every page is
/// cleared again. Variables as `MALLOC_TRIM_THRESHOLD_` do not count then.
///
/// Another C library is left as it is. Call it before there are threads.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for (parameter, value) in
        [(libc::M_MMAP_THRESHOLD, MAPPED_BYTES), (libc::M_TRIM_THRESHOLD, KEPT_BYTES), (libc::M_TOP_PAD, PADDING_BYTES)]
    {
        #[allow(unsafe_code, reason = "the allocator's parameters have no safe interface")]
        // SAFETY: mallopt takes numbers, and sets parameters of the allocator under its own lock. It refuses none of these.
        unsafe {
            libc::mallopt(parameter, value);
        }
    }
}
