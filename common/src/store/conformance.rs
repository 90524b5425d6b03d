//! What every store must do, as one body of assertions.

use std::thread;

use super::{BlobStore, Placed, StoreError};

/// Checks an empty store against the contract of [`BlobStore`]; leaves it empty.
///
/// # Panics
/// If the store breaks the contract.
#[allow(clippy::unwrap_used, reason = "an assertion is all this is")]
pub fn check(store: &dyn BlobStore) {
    names_must_be_plain_and_relative(store);
    blobs_are_read_back_whole_and_in_part(store);
    lists_are_sorted_and_end_at_folders(store);
    concurrent_puts_leave_one_whole_blob(store);
    of_many_writers_one_puts_what_was_absent(store);
    large_blobs_are_whole(store);
    for name in store.list("").unwrap() {
        store.delete(&name).unwrap();
    }
    assert!(store.list("").unwrap().is_empty());
}

fn names_must_be_plain_and_relative(store: &dyn BlobStore) {
    let long = "x".repeat(2000);
    for name in ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "./a", "a\\b", "a\0b", "a\nb", ".put-x", &long] {
        let refused = |result: Result<(), StoreError>| matches!(result, Err(StoreError::BadName { .. }));
        assert!(refused(store.put(name, b"x")), "put {name:?}");
        assert!(refused(store.put_if_absent(name, b"x").map(drop)), "put_if_absent {name:?}");
        assert!(refused(store.get(name).map(drop)), "get {name:?}");
        assert!(refused(store.get_range(name, 0..0).map(drop)), "get_range {name:?}");
        assert!(refused(store.size(name).map(drop)), "size {name:?}");
        assert!(refused(store.delete(name)), "delete {name:?}");
        assert!(name.is_empty() || refused(store.list(name).map(drop)), "list {name:?}");
    }
}

#[allow(clippy::unwrap_used, reason = "an assertion is all this is")]
fn blobs_are_read_back_whole_and_in_part(store: &dyn BlobStore) {
    let missing = |result: Result<(), StoreError>| matches!(result, Err(StoreError::NotFound { .. }));
    assert!(missing(store.get("a/b").map(drop)));
    assert!(missing(store.get_range("a/b", 0..1).map(drop)));
    assert!(missing(store.size("a/b").map(drop)));
    store.delete("a/b").unwrap();

    store.put("a/b", b"0123456789").unwrap();
    assert_eq!(store.get("a/b").unwrap(), "0123456789");
    assert_eq!(store.size("a/b").unwrap(), 10);
    assert_eq!(store.get_range("a/b", 2..5).unwrap(), "234");
    assert_eq!(store.get_range("a/b", 0..10).unwrap(), "0123456789");
    assert_eq!(store.get_range("a/b", 10..10).unwrap(), "");
    #[allow(clippy::reversed_empty_ranges, reason = "it must be refused")]
    for range in [5..11, 11..11, 0..u64::MAX, 4..2] {
        let result = store.get_range("a/b", range.clone());
        assert!(matches!(result, Err(StoreError::RangeOutOfBounds { size: 10, .. })), "{range:?}");
    }
    assert!(missing(store.get("a").map(drop)), "a folder is no blob");
    assert!(missing(store.get("a/b/c").map(drop)), "a blob is no folder");

    assert_eq!(store.get_at_most("a/b", 10).unwrap(), "0123456789");
    assert!(matches!(store.get_at_most("a/b", 9), Err(StoreError::TooLarge { size: 10, limit: 9, .. })));

    store.put("a/b", b"").unwrap();
    assert_eq!(store.get("a/b").unwrap(), "", "put replaces");
    assert_eq!(store.get_range("a/b", 0..0).unwrap(), "");
    assert!(matches!(store.get_range("a/b", 0..1), Err(StoreError::RangeOutOfBounds { size: 0, .. })));
    store.delete("a/b").unwrap();
    assert!(missing(store.get("a/b").map(drop)));
}

#[allow(clippy::unwrap_used, reason = "an assertion is all this is")]
fn lists_are_sorted_and_end_at_folders(store: &dyn BlobStore) {
    for name in ["layers/2", "layers/10/w", "layers-old/1", "journal", "layers/1"] {
        store.put(name, name.as_bytes()).unwrap();
    }
    assert_eq!(store.list("").unwrap(), ["journal", "layers-old/1", "layers/1", "layers/10/w", "layers/2"]);
    assert_eq!(store.list("layers").unwrap(), ["layers/1", "layers/10/w", "layers/2"]);
    assert!(store.list("nothing").unwrap().is_empty());
    assert!(store.list("journal").unwrap().is_empty(), "a blob is no folder");
}

#[allow(clippy::unwrap_used, reason = "an assertion is all this is")]
fn concurrent_puts_leave_one_whole_blob(store: &dyn BlobStore) {
    thread::scope(|scope| {
        for writer in 0..4u8 {
            scope.spawn(move || {
                for _ in 0..4 {
                    store.put("shared/blob", &[writer; 4096]).unwrap();
                    let read = store.get("shared/blob").unwrap();
                    assert!(read.len() == 4096 && read.iter().all(|&byte| byte == read[0]), "a torn blob");
                }
            });
        }
    });
}

#[allow(clippy::unwrap_used, reason = "an assertion is all this is")]
fn of_many_writers_one_puts_what_was_absent(store: &dyn BlobStore) {
    for round in 0..4 {
        let name = format!("once/{round:08}");
        let written: Vec<u8> = thread::scope(|scope| {
            let writers: Vec<_> = (0..4u8)
                .map(|writer| {
                    let name = &name;
                    scope.spawn(move || (writer, store.put_if_absent(name, &[writer; 512]).unwrap()))
                })
                .collect();
            let ended = writers.into_iter().map(|writer| writer.join().unwrap());
            ended.filter(|(_, placed)| *placed == Placed::Written).map(|(writer, _)| writer).collect()
        });
        assert_eq!(written.len(), 1, "{name} was written by {written:?}");
        assert_eq!(store.get(&name).unwrap(), vec![written[0]; 512]);
        assert_eq!(store.put_if_absent(&name, b"late").unwrap(), Placed::AlreadyThere);
        assert_eq!(store.get(&name).unwrap(), vec![written[0]; 512], "it is as it was");
    }
}

/// Large enough to go to an object store in several parts.
const LARGE_BYTES: usize = (17 << 20) + 5;

#[allow(clippy::unwrap_used, reason = "an assertion is all this is")]
fn large_blobs_are_whole(store: &dyn BlobStore) {
    let bytes: Vec<u8> = (0..LARGE_BYTES).map(|place| (place * 31 + (place >> 16)) as u8).collect();
    store.put("large", &bytes).unwrap();
    assert_eq!(store.size("large").unwrap(), LARGE_BYTES as u64);
    assert!(store.get("large").unwrap() == bytes, "a large blob came back as another");
    let end = LARGE_BYTES as u64;
    assert!(store.get_range("large", end - 9_000_000..end).unwrap() == bytes[LARGE_BYTES - 9_000_000..], "its end");
}
