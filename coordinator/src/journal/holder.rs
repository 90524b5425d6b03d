//! Who holds the lock of a file: the kernel knows, so nothing need be written down that could outlive the holder.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

/// Describes the process that holds the lock of `file`, in words for people.
pub(crate) fn of(file: &File) -> String {
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let process = file.metadata().ok().and_then(|metadata| holder(&locks, metadata.ino()));
    let Some(process) = process else { return "a process that this one cannot see".to_owned() };
    let command = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ");
    match command.trim() {
        "" => format!("process {process}"),
        command => format!("process {process} ({command})"),
    }
}

/// The process with the whole-file lock on an inode. Device numbers are not compared: those of stacked file systems differ
/// from what a file tells of itself. If several devices have a locked inode of that number, nobody is named.
fn holder(locks: &str, inode: u64) -> Option<u32> {
    let suffix = format!(":{inode}");
    let mut holders = locks.lines().filter_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF`; one who waits has `->` before FLOCK.
        let fields: Vec<&str> = line.split_whitespace().collect();
        let ours = fields.get(1) == Some(&"FLOCK") && fields.get(5).is_some_and(|place| place.ends_with(&suffix));
        // 0 stands for a process of another PID namespace.
        ours.then(|| fields[4].parse().ok().filter(|process| *process > 0))?
    });
    match (holders.next(), holders.next()) {
        (Some(process), None) => Some(process),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holder_is_the_one_with_the_inode() {
        let locks = "1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 4712 08:01:1234 0 EOF\n\
                     2: POSIX  ADVISORY  WRITE 4713 08:01:1234 0 EOF\n3: FLOCK  ADVISORY  WRITE 4714 08:01:11234 0 EOF\n\
                     4: FLOCK  ADVISORY  WRITE 0 08:01:99 0 EOF\n5: FLOCK ADVISORY WRITE 7 08:01:8 0 EOF\n\
                     6: FLOCK ADVISORY WRITE 8 08:02:8 0 EOF\n";
        assert_eq!(holder(locks, 1234), Some(4711));
        for unknown in [99, 8, 4] {
            assert_eq!(holder(locks, unknown), None, "{unknown}");
        }
    }

    #[test]
    fn this_process_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::create(folder.path().join("lock")).unwrap();
        file.lock().unwrap();
        assert!(of(&file).contains(&format!("process {}", std::process::id())), "{}", of(&file));
    }
}
