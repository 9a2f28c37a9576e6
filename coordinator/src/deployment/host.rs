//! What this machine has left.

use std::{fs, path::Path};

use super::DeploymentError;

/// Bytes that processes may still take: the kernel's estimate, or what the cgroup leaves if that is less.
pub(super) fn available_memory() -> Result<u64, DeploymentError> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).map_err(|source| DeploymentError::Host {
        what: path.into(),
        source,
    })?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    let host = kib.map_or(u64::MAX, |kib| kib.saturating_mul(1024));
    Ok(host.min(cgroup_memory().unwrap_or(u64::MAX)))
}

/// What the limit of our own cgroup (version 2, else 1) leaves; none without a limit.
fn cgroup_memory() -> Option<u64> {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let v2 = || {
        Some((
            number("/sys/fs/cgroup/memory.max")?,
            number("/sys/fs/cgroup/memory.current")?,
        ))
    };
    let v1 = || {
        let limit = number("/sys/fs/cgroup/memory/memory.limit_in_bytes")?;
        Some((limit, number("/sys/fs/cgroup/memory/memory.usage_in_bytes")?))
    };
    let (limit, used) = v2().or_else(v1)?;
    Some(limit.saturating_sub(used))
}

/// Bytes free for us on the filesystem of `dir`.
///
/// # Errors
/// [`DeploymentError::Host`] if it does not tell.
pub fn free_space(dir: &Path) -> Result<u64, DeploymentError> {
    let stat = rustix::fs::statvfs(dir).map_err(|error| DeploymentError::Host {
        what: dir.display().to_string(),
        source: error.into(),
    })?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
