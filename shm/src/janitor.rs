//! Names of segments, and the removal of those whose creators are gone.

use std::fs::{self, DirEntry};
use std::io;
use std::path::Path;

use crate::error::ShmError;
use crate::file;

const PREFIX: &str = "phalanx";
const BOOT_DIGITS: usize = 12;
const MAX_GROUP_NAME: usize = 64;

/// `phalanx.<boot id>.<group>.<epoch>`: what a dead boot left on a volume that outlived it is nobody's.
pub(crate) fn segment_name(group: &str, epoch: u32) -> Result<String, ShmError> {
    if !is_group_name(group) {
        return Err(ShmError::BadName {
            name: group.chars().take(2 * MAX_GROUP_NAME).collect(),
        });
    }
    Ok(format!("{PREFIX}.{}.{group}.{epoch}", boot_id()?))
}

fn is_group_name(group: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    (1..=MAX_GROUP_NAME).contains(&group.len()) && group.bytes().all(allowed)
}

/// Nothing is removed that this crate would not have named so.
fn is_segment_name(name: &str) -> bool {
    let parts: Vec<_> = name.split('.').collect();
    let [prefix, boot, group, epoch] = parts[..] else {
        return false;
    };
    prefix == PREFIX
        && boot.len() == BOOT_DIGITS
        && boot.bytes().all(|b| b.is_ascii_hexdigit())
        && is_group_name(group)
        && epoch.parse::<u32>().is_ok()
}

fn boot_id() -> Result<String, ShmError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(ShmError::io(path))?;
    let id: String = text
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(BOOT_DIGITS)
        .collect();
    match id.len() {
        BOOT_DIGITS => Ok(id),
        _ => Err(ShmError::io(path)(io::ErrorKind::InvalidData.into())),
    }
}

/// Removes the segments in `dir` whose creators are gone, and returns how many those were.
///
/// A creator holds a lock on its file for as long as it lives, so a file whose lock is free has none: its process died,
/// or its whole boot did. Other names, other users' files and everything that is not a regular file are left alone,
/// and so is a file that cannot be looked at, since another janitor may be at work.
///
/// # Errors
/// [`ShmError::Io`] if `dir` cannot be listed.
pub fn sweep_orphans(dir: &Path) -> Result<usize, ShmError> {
    let entries = fs::read_dir(dir).map_err(ShmError::io(dir))?;
    let orphans = entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(is_segment_name));
    Ok(orphans
        .filter(|entry| remove_if_orphaned(entry).is_ok_and(|removed| removed))
        .count())
}

fn remove_if_orphaned(entry: &DirEntry) -> Result<bool, ShmError> {
    let path = entry.path();
    let file = file::options().open(&path).map_err(ShmError::io(&path))?;
    file::check_ownership(&path, &file)?;
    if file.try_lock().is_err() {
        return Ok(false);
    }
    // Whoever unlinks a segment holds its lock. So the answer stays true while we hold it.
    if !file::names(&path, &file).map_err(ShmError::io(&path))? {
        return Ok(false);
    }
    fs::remove_file(&path).map_err(ShmError::io(&path))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_recognised_and_nothing_else_is() {
        let name = segment_name("llama-70b_a", 7).unwrap();
        assert!(is_segment_name(&name), "{name}");
        for other in [
            "phalanx",
            "phalanx.0123456789ab.g",
            "phalanx.0123456789ab.g.1.2",
            "phalanx.0123456789ab.g.-1",
            "phalanx.0123456789ab..1",
            "phalanx.short.g.1",
            "other.0123456789ab.g.1",
        ] {
            assert!(!is_segment_name(other), "{other}");
        }
    }

    #[test]
    fn group_names_cannot_leave_the_directory() {
        for name in ["", "..", "a/b", "a.b", "ä", &"x".repeat(65)] {
            assert!(
                matches!(segment_name(name, 1), Err(ShmError::BadName { .. })),
                "{name}"
            );
        }
    }
}
