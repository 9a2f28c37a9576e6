//! The private directory of a running coordinator's socket.

use std::{
    fs, io,
    os::unix::{fs::DirBuilderExt, net::UnixStream},
    path::{Path, PathBuf},
};

use phalanx_coordinator::cluster::CudaLibraries;

const PREFIX: &str = "phalanx-run-";
const SOCKET: &str = "grpc.sock";

/// `phalanx-run-<pid>` below `$XDG_RUNTIME_DIR` or the temporary directory, mode 0700; removed when dropped.
pub(crate) struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// Makes it, and removes those of coordinators that are gone.
    pub(crate) fn create() -> io::Result<Self> {
        let parent = std::env::var_os("XDG_RUNTIME_DIR")
            .map(PathBuf::from)
            .filter(|path| path.is_dir());
        let parent = parent.unwrap_or_else(std::env::temp_dir);
        sweep(&parent);
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.0.clone()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.0.join(SOCKET)
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// Removes our socket, the workers' links and the directory around them; whatever else lies there is not ours and stays.
fn remove(directory: &Path) {
    let _ = fs::remove_file(directory.join(SOCKET));
    for link in fs::read_dir(directory.join(CudaLibraries::LINKS))
        .into_iter()
        .flatten()
        .flatten()
    {
        if link.file_type().is_ok_and(|kind| kind.is_symlink()) {
            let _ = fs::remove_file(link.path());
        }
    }
    let _ = fs::remove_dir(directory.join(CudaLibraries::LINKS));
    let _ = fs::remove_dir(directory);
}

/// Removes the directories whose socket nobody listens on. A pid says nothing: another container may share the volume.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let ours = name
            .to_str()
            .and_then(|name| name.strip_prefix(PREFIX))
            .is_some_and(|pid| pid.parse::<u32>().is_ok());
        let refused = || {
            UnixStream::connect(entry.path().join(SOCKET))
                .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        };
        if ours && refused() {
            remove(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_dead_sockets_are_swept() {
        let parent = tempfile::tempdir().expect("a temporary directory");
        let make = |name: &str| {
            let path = parent.path().join(name);
            fs::create_dir(&path).expect("made");
            path
        };
        let (dead, live, foreign) = (
            make("phalanx-run-1"),
            make("phalanx-run-2"),
            make("phalanx-run-3"),
        );
        drop(UnixListener::bind(dead.join(SOCKET)).expect("bound"));
        let _listener = UnixListener::bind(live.join(SOCKET)).expect("bound");
        fs::write(foreign.join("important"), "data").expect("written");
        sweep(parent.path());
        assert!(!dead.exists() && live.join(SOCKET).exists() && foreign.join("important").exists());
    }
}
