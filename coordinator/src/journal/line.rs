//! A record as it is stored, in a file or as an object: a line `crc32 json`.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A record longer than this is not one of ours.
pub(super) const MAX_RECORD_BYTES: usize = 64 << 20;

/// The line of a record, its newline included.
pub(super) fn encode(record: &impl Serialize) -> String {
    let json = serde_json::to_string(record).expect("records hold nothing that JSON cannot");
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()))
}

/// The JSON of a line without its newline, if its checksum is right.
pub(super) fn checked_json(line: &[u8]) -> Option<&[u8]> {
    let (checksum, json) = line.split_at_checked(8)?;
    let json = json.strip_prefix(b" ")?;
    let checksum = u32::from_str_radix(std::str::from_utf8(checksum).ok()?, 16).ok()?;
    (checksum == crc32fast::hash(json)).then_some(json)
}

/// Reads a line that stands alone: `None` if it is damaged, an error if it is whole and of no kind that is known.
pub(super) fn decode<T: DeserializeOwned>(line: &[u8]) -> Option<Result<T, serde_json::Error>> {
    let json = line.strip_suffix(b"\n").and_then(checked_json)?;
    Some(serde_json::from_slice(json))
}
