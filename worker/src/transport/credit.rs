//! The sender's purse: it never has more unacknowledged bytes under way than it was granted.

/// Bytes that may still be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Credit(u64);

impl Credit {
    /// What the receiver granted with its first message.
    pub fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Adds a later grant.
    pub fn grant(&mut self, bytes: u64) {
        self.0 = self.0.saturating_add(bytes);
    }

    /// Pays for `bytes`, or pays nothing and returns false.
    #[must_use]
    pub fn pay(&mut self, bytes: u64) -> bool {
        let paid = bytes <= self.0;
        if paid {
            self.0 -= bytes;
        }
        paid
    }
}

/// The receiver's side: grants again what it has consumed, half a window at a time, so that grants stay rare.
#[derive(Debug)]
pub struct Grants {
    window: u64,
    consumed: u64,
}

impl Grants {
    /// Grants for a window that was granted whole at the start. It must hold two of the largest chunks, or a sender could
    /// wait for credit while the receiver waits for half a window.
    pub fn new(window: u64) -> Self {
        Self { window, consumed: 0 }
    }

    /// Notes consumed bytes; returns what is to be granted now, if anything.
    pub fn consume(&mut self, bytes: u64) -> Option<u64> {
        self.consumed += bytes;
        (self.consumed >= self.window / 2).then(|| std::mem::take(&mut self.consumed))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_under_way_never_exceed_the_window(window in 16u64..64, chunks in prop::collection::vec(1u64..=8, 1..100)) {
            let (mut credit, mut grants) = (Credit::new(window), Grants::new(window));
            let mut under_way = std::collections::VecDeque::new();
            for chunk in chunks {
                // The receiver consumes only when the sender is out of credit: the worst case for both.
                while !credit.pay(chunk) {
                    let consumed: u64 = under_way.pop_front().expect("out of credit, so something is under way");
                    credit.grant(grants.consume(consumed).unwrap_or(0));
                }
                under_way.push_back(chunk);
                prop_assert!(under_way.iter().sum::<u64>() <= window);
            }
        }
    }
}
