//! How a test puts the soft GPU in front of a process.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
};

/// The names under which the libraries are looked for. NCCL is searched without a version by cudarc and with one by
/// others.
const NAMES: [&str; 7] = [
    "libcuda.so.1",
    "libnvrtc.so.12",
    "libcublas.so.12",
    "libcublasLt.so.12",
    "libnccl.so",
    "libnccl.so.2",
    "libcuda.so",
];

/// Set: tests are for the GPUs of this machine.
const REAL_GPU: &str = "PHALANX_REAL_GPU";

/// A private directory in which every library's name is a link to the soft GPU; removed when dropped.
#[derive(Debug)]
pub struct LibraryDir {
    path: PathBuf,
}

impl LibraryDir {
    /// Makes the directory. All names link to one file, so the loader maps it once and the libraries share their state.
    ///
    /// # Errors
    /// If `libsoftgpu.so` was not built beside the running executable (`cargo test` builds it for the tests of its own
    /// package; others run `cargo build -p phalanx-softgpu` first), or the links cannot be made.
    pub fn new() -> io::Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let library = find_library(&env::current_exe()?)?;
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("softgpu-lib-{}-{number}", process::id()));
        fs::create_dir_all(&path)?;
        let dir = Self { path };
        for name in NAMES {
            let link = dir.path.join(name);
            if fs::symlink_metadata(&link).is_ok() {
                fs::remove_file(&link)?; // left by a killed process that had the same id
            }
            symlink(&library, link)?;
        }
        Ok(dir)
    }

    /// The directory, to be put first into `LD_LIBRARY_PATH` of a process *before* it starts.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A command for `program` that finds the soft GPU.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("LD_LIBRARY_PATH", self.search_path());
        command
    }

    /// A command that runs one test of the running test executable, ignored or not, in a process that finds the soft
    /// GPU. `name` is the test's full path, as `--list` prints it.
    ///
    /// # Errors
    /// If the path of the running executable cannot be found out.
    pub fn test_command(&self, name: &str) -> io::Result<Command> {
        let mut command = self.command(env::current_exe()?);
        command.args([
            name,
            "--exact",
            "--include-ignored",
            "--nocapture",
            "--test-threads=1",
        ]);
        Ok(command)
    }

    /// The value for `LD_LIBRARY_PATH`: this directory before what is there already; without it if `PHALANX_REAL_GPU` is
    /// set, so that the same tests run on this machine's own GPUs.
    #[must_use]
    pub fn search_path(&self) -> OsString {
        let inherited = env::var_os("LD_LIBRARY_PATH").filter(|inherited| !inherited.is_empty());
        if env::var_os(REAL_GPU).is_some() {
            return inherited.unwrap_or_default();
        }
        let mut value = self.path.clone().into_os_string();
        if let Some(inherited) = inherited {
            value.push(":");
            value.push(inherited);
        }
        value
    }
}

impl Drop for LibraryDir {
    fn drop(&mut self) {
        // Nothing to do about a failure: what is left are links in the temporary directory.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// `target/<profile>/libsoftgpu.so`, or the one in `deps` if cargo did not copy it up; the newer of the two. The
/// executable lies in `target/<profile>`, `.../deps` or `.../examples`.
fn find_library(executable: &Path) -> io::Result<PathBuf> {
    let file = format!("{}softgpu{}", env::consts::DLL_PREFIX, env::consts::DLL_SUFFIX);
    executable
        .ancestors()
        .skip(1)
        .take(3)
        .flat_map(|dir| [dir.join(&file), dir.join("deps").join(&file)])
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .max_by_key(|(modified, _)| *modified)
        .map(|(_, path)| path)
        .ok_or_else(|| {
            let beside = executable.display();
            let message =
                format!("{file} is not beside {beside}: run `cargo build -p phalanx-softgpu` first");
            io::Error::new(io::ErrorKind::NotFound, message)
        })
}
