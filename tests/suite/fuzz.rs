//! `make fuzz`: every reader of what comes from elsewhere, tried for as long as one likes.

use std::env;

use espalier_common::clock::{Stopwatch, unix_seconds};

use crate::foreign::{Effort, TARGETS, watch_for_hangs};

/// For each target, unless `SECONDS` says otherwise.
const SECONDS: u64 = 60;

fn number(variable: &str, otherwise: u64) -> u64 {
    match env::var(variable) {
        Ok(text) if !text.is_empty() => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")),
        _ => otherwise,
    }
}

#[test]
#[ignore = "a minute a reader, or as long as SECONDS says: `make fuzz`"]
#[expect(clippy::print_stderr, reason = "the seed and the counts are for the reader")]
fn nothing_breaks_a_reader() {
    let (seconds, seed) = (number("SECONDS", SECONDS), number("SEED", unix_seconds()));
    let only = env::var("READER").unwrap_or_default();
    watch_for_hangs();
    eprintln!("fuzz: {seconds} s a target from SEED={seed}");
    let mut found = 0;
    for (name, tried) in TARGETS.iter().filter(|(name, _)| name.contains(&only)) {
        let watch = Stopwatch::start();
        let count = tried(&Effort::For { seconds: seconds as f64, seed });
        eprintln!("fuzz: {name}: {count} inputs in {:.0} s", watch.seconds());
        found += 1;
    }
    assert!(found > 0, "no reader is named like READER={only}");
}
