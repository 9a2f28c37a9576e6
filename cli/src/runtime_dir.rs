//! The private directory of a running coordinator's socket.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

const PREFIX: &str = "phalanx-";

/// `phalanx-<pid>` below `$XDG_RUNTIME_DIR` or the temporary directory, mode 0700; removed when dropped.
pub(crate) struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// Makes it, and removes those of processes that are gone.
    pub(crate) fn create() -> io::Result<Self> {
        let parent = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|path| path.is_dir());
        let parent = parent.unwrap_or_else(std::env::temp_dir);
        sweep(&parent);
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        // Of an earlier process with our pid, and ours: another user's makes the next line fail.
        let _ = fs::remove_dir_all(&path);
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.clone()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.0.join("grpc.sock")
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX))
            .and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // Fails for other users' directories, which is right.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
