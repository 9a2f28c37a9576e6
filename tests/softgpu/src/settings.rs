//! What the soft GPU is told through the environment.

use std::{env, path::PathBuf, sync::LazyLock};

/// Names of the variables, for whoever spawns a process on the soft GPU.
pub struct Env;

impl Env {
    /// Number of devices, 0 to 16 (8).
    pub const DEVICES: &'static str = "SOFTGPU_DEVICES";
    /// Compute capability without the dot (80).
    pub const COMPUTE_CAPABILITY: &'static str = "SOFTGPU_CC";
    /// Memory of each device in MiB (4096).
    pub const MEMORY_MIB: &'static str = "SOFTGPU_MEM_MIB";
    /// OS threads that run the blocks of a grid (the number of cores).
    pub const THREADS: &'static str = "SOFTGPU_THREADS";
    /// Delays every operation of a stream by a random time below this, in microseconds, runs the threads of a block in
    /// random order, and lets non-blocking NCCL calls answer "in progress" (0: none of this).
    pub const JITTER_US: &'static str = "SOFTGPU_JITTER_US";
    /// Allocations up to this size are filled with NaN (16).
    pub const POISON_MIB: &'static str = "SOFTGPU_POISON_MIB";
    /// Directory of compiled modules (`softgpu-<uid>` in the temporary directory).
    pub const CACHE: &'static str = "SOFTGPU_CACHE";
    /// The C++17 compiler behind NVRTC (g++).
    pub const CXX: &'static str = "SOFTGPU_CXX";
    /// Its flags beyond those that are needed (`-O2 -march=native`).
    pub const CXXFLAGS: &'static str = "SOFTGPU_CXXFLAGS";
    /// Set: keep the sources given to the compiler beside the module.
    pub const KEEP: &'static str = "SOFTGPU_KEEP";
    /// Set: no messages on standard error.
    pub const QUIET: &'static str = "SOFTGPU_QUIET";
    /// Set: a lost peer of a communicator is reported as `ncclRemoteError`; otherwise the collective hangs, as with
    /// NCCL on one host.
    pub const NCCL_DETECT: &'static str = "SOFTGPU_NCCL_DETECT";
    /// Set: no device reaches the memory of another, also not that of another process.
    pub const NO_PEER_ACCESS: &'static str = "SOFTGPU_NO_PEER_ACCESS";
    /// Seconds that the ranks of a communicator wait for each other (60).
    pub const NCCL_INIT_TIMEOUT: &'static str = "SOFTGPU_NCCL_INIT_TIMEOUT";
}

/// Devices beyond this number do not exist.
pub(crate) const MAX_DEVICES: usize = 16;

pub(crate) struct Settings {
    pub(crate) devices: usize,
    pub(crate) compute_capability: u32,
    /// Bytes of one device.
    pub(crate) memory: u64,
    pub(crate) threads: usize,
    pub(crate) jitter_us: u64,
    /// Bytes up to which an allocation is poisoned.
    pub(crate) poison: usize,
    pub(crate) cache: PathBuf,
    pub(crate) cxx: String,
    pub(crate) cxxflags: String,
    pub(crate) keep: bool,
    pub(crate) quiet: bool,
    pub(crate) nccl_detect: bool,
    pub(crate) no_peer_access: bool,
    pub(crate) nccl_init_timeout_s: u64,
}

/// Read once, at the first call into any of the libraries.
pub(crate) fn settings() -> &'static Settings {
    static SETTINGS: LazyLock<Settings> = LazyLock::new(Settings::from_env);
    &SETTINGS
}

impl Settings {
    fn from_env() -> Self {
        let number = |name: &str, default: u64| {
            env::var(name)
                .ok()
                .and_then(|v| v.parse().ok())
                .unwrap_or(default)
        };
        let text = |name: &str, default: &str| env::var(name).unwrap_or_else(|_| default.to_owned());
        let set = |name: &str| env::var_os(name).is_some();
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        // SAFETY: getuid has no precondition and cannot fail.
        let uid = unsafe { libc::getuid() };
        Self {
            devices: visible(
                number(Env::DEVICES, 8).min(MAX_DEVICES as u64) as usize,
                env::var("CUDA_VISIBLE_DEVICES").ok().as_deref(),
            ),
            compute_capability: number(Env::COMPUTE_CAPABILITY, 80).clamp(10, 999) as u32,
            memory: number(Env::MEMORY_MIB, 4096).min(1 << 24) << 20,
            threads: number(Env::THREADS, cores).clamp(1, 256) as usize,
            jitter_us: number(Env::JITTER_US, 0),
            poison: (number(Env::POISON_MIB, 16).min(1 << 24) << 20) as usize,
            cache: env::var_os(Env::CACHE)
                .map_or_else(|| env::temp_dir().join(format!("softgpu-{uid}")), PathBuf::from),
            cxx: text(Env::CXX, "g++"),
            cxxflags: text(Env::CXXFLAGS, "-O2 -march=native"),
            keep: set(Env::KEEP),
            quiet: set(Env::QUIET),
            nccl_detect: set(Env::NCCL_DETECT),
            no_peer_access: set(Env::NO_PEER_ACCESS),
            nccl_init_timeout_s: number(Env::NCCL_INIT_TIMEOUT, 60),
        }
    }
}

/// How many of `devices` a list in `CUDA_VISIBLE_DEVICES` leaves: those before its first entry that names none. Which
/// they are makes no difference here.
fn visible(devices: usize, list: Option<&str>) -> usize {
    let exists = |entry: &&str| entry.trim().parse::<usize>().is_ok_and(|device| device < devices);
    list.map_or(devices, |list| list.split(',').take_while(exists).count())
}

/// Says on standard error what a status code cannot say.
#[expect(
    clippy::print_stderr,
    reason = "a stand-in for a C library has no other way to explain an error code"
)]
pub(crate) fn log(message: &str) {
    if !settings().quiet {
        eprintln!("[softgpu {}] {message}", std::process::id());
    }
}

#[cfg(test)]
mod tests {
    use super::visible;

    #[test]
    fn a_list_of_visible_devices_ends_at_the_first_that_does_not_exist() {
        assert_eq!(visible(8, None), 8);
        assert_eq!(visible(8, Some("3")), 1);
        assert_eq!(visible(2, Some("1, 0")), 2);
        assert_eq!(visible(2, Some("0,2,1")), 1);
        assert_eq!(visible(2, Some("")), 0);
    }
}
