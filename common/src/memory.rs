//! What this process has taken of the machine's memory.

/// Highest resident memory of this process so far, in bytes; 0 where the system does not tell.
///
/// Source: `VmHWM` of `/proc/self/status`.
pub fn peak_rss_bytes() -> u64 {
    status_bytes("VmHWM:")
}

/// Resident memory of this process now, in bytes; 0 where the system does not tell.
///
/// Source: `VmRSS` of `/proc/self/status`.
pub fn resident_bytes() -> u64 {
    status_bytes("VmRSS:")
}

fn status_bytes(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_touched_is_counted() {
        let touched = vec![1u8; 64 << 20];
        assert!(touched.iter().map(|byte| u64::from(*byte)).sum::<u64>() > 0);
        assert!(resident_bytes() >= 64 << 20 && peak_rss_bytes() >= resident_bytes());
    }
}
