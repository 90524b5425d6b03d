//! What a reader may take: memory that the bytes account for, and a moment.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use espalier_common::clock::{Stopwatch, unix_millis};
use proptest::prelude::*;

/// Notes what this thread asked for: the largest block, and the most that it had at once.
struct Watching;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST_HELD: Cell<isize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

fn note(taken: usize, given_back: usize) {
    // A thread that is ending has nothing left to note in.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(taken)));
    let _ = HELD.try_with(|held| {
        held.set(held.get().saturating_add_unsigned(taken).saturating_sub_unsigned(given_back));
        MOST_HELD.try_with(|most| most.set(most.get().max(held.get())))
    });
}

#[allow(unsafe_code, reason = "an allocator is made of it")]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), 0);
        // SAFETY: as ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), 0);
        // SAFETY: as ours.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size, layout.size());
        // SAFETY: as ours.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        note(0, layout.size());
        // SAFETY: as ours.
        unsafe { System.dealloc(block, layout) }
    }
}

/// What a reader may ask for at once: what parsed structures take more than their text, and buffers of fixed size.
fn bound(input: usize) -> usize {
    input * 64 + (4 << 20)
}

/// What a reader may take for one input. Most take microseconds; a machine that is busy with other things makes them slower.
const PATIENCE_SECONDS: f64 = 5.0;

/// Runs a reader over so many bytes; it may say what it likes.
pub(super) fn survives<T>(input: usize, read: impl FnOnce() -> T) -> Result<T, TestCaseError> {
    LARGEST.set(0);
    MOST_HELD.set(HELD.get());
    let (before, watch) = (HELD.get(), Stopwatch::start());
    BUSY_SINCE.store(unix_millis(), Ordering::Relaxed);
    let said = read();
    BUSY_SINCE.store(0, Ordering::Relaxed);
    let (seconds, largest) = (watch.seconds(), LARGEST.get());
    let held = usize::try_from(MOST_HELD.get() - before).unwrap_or(0);
    prop_assert!(largest <= bound(input), "{largest} bytes at once for an input of {input}");
    prop_assert!(held <= 2 * bound(input), "{held} bytes in all for an input of {input}");
    prop_assert!(seconds <= PATIENCE_SECONDS, "{seconds} s for an input of {input} bytes");
    Ok(said)
}

/// Since when a reader is at its input, in milliseconds since 1970; 0 while none is. Only looked at by [`watch_for_hangs`], whose
/// process has one reader at a time.
static BUSY_SINCE: AtomicU64 = AtomicU64::new(0);
/// What is being read, for whoever has to find a reader that never returned.
static READING: Mutex<String> = Mutex::new(String::new());
/// A reader that has not returned after so many milliseconds never will.
const HANG_MILLIS: u64 = 60_000;

/// Says what is being read from now on.
pub(super) fn reading(what: String) {
    *READING.lock().expect("nobody panics while saying so") = what;
}

/// Ends this process if a reader does not return, and says which.
#[expect(clippy::print_stderr, reason = "nobody else will say it")]
pub(crate) fn watch_for_hangs() {
    let watch = || {
        loop {
            thread::sleep(Duration::from_secs(1));
            let since = BUSY_SINCE.load(Ordering::Relaxed);
            if since != 0 && unix_millis().saturating_sub(since) > HANG_MILLIS {
                eprintln!("fuzz: a reader hangs: {}", READING.lock().expect("nobody panics while saying so"));
                std::process::abort();
            }
        }
    };
    thread::Builder::new().name("hangs".to_owned()).spawn(watch).expect("the system gives a thread");
}
