//! Unix sockets that servers listen on.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::{UnixListener as StdUnixListener, UnixStream},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::Mode,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use tokio::net::UnixListener;

const BACKLOG: i32 = 1024;

/// Who may connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// This user alone (mode 0600).
    Owner,
    /// As the process's umask has it: a reverse proxy mostly runs as another user.
    Umask,
}

/// A bound socket and its file.
#[derive(Debug)]
pub struct UnixSocket {
    pub listener: UnixListener,
    pub file: SocketFile,
}

/// A socket's file, removed with this value unless somebody has put another in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl UnixSocket {
    /// Binds `path`, replacing a socket file that nobody listens on. Needs a Tokio runtime.
    ///
    /// # Errors
    /// The path is no socket, or another server listens there; the system's refusals.
    pub fn bind(path: &Path, access: Access) -> io::Result<Self> {
        remove_stale(path)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        let metadata = fs::symlink_metadata(path)?;
        let file = SocketFile {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        };
        if access == Access::Owner {
            // Nobody can connect before `listen`, so nobody can before the mode is set.
            rustix::fs::chmod(path, Mode::RUSR | Mode::WUSR)?;
        }
        rustix::net::listen(&socket, BACKLOG)?;
        let listener = UnixListener::from_std(StdUnixListener::from(socket))?;
        Ok(Self { listener, file })
    }
}

/// Removes a socket file whose server is gone.
///
/// # Errors
/// The path is no socket, or a server answers.
pub fn remove_stale(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "the path exists and is not a socket",
        ));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another server listens there",
        )),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) => Err(error),
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.identity);
        if is_ours {
            // Left behind, it is stale and the next start removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}
