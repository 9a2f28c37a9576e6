//! Where run-time images, newer CUDAs and Python's wheels put the libraries, and under which names: workers find them all.

use std::{
    env,
    ffi::OsString,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use softgpu::LibraryDir;

use crate::support::{alone, launch};

/// A tree of directories in which only these files are, each the soft GPU; the directories in order.
struct Machine {
    root: tempfile::TempDir,
    directories: Vec<PathBuf>,
}

impl Machine {
    fn new(libraries: &LibraryDir, files: &[&str]) -> Self {
        let library = fs::read_link(libraries.path().join("libcuda.so.1")).expect("a link to the soft GPU");
        let root = tempfile::tempdir().expect("a directory");
        let mut directories = Vec::new();
        for file in files {
            let path = root.path().join(file);
            let directory = path.parent().expect("below the root").to_owned();
            fs::create_dir_all(&directory).expect("made");
            symlink(&library, &path).expect("linked");
            if !directories.contains(&directory) {
                directories.push(directory);
            }
        }
        Self { root, directories }
    }

    fn search_path(&self) -> OsString {
        env::join_paths(&self.directories).expect("no colon")
    }
}

/// Two ranks serve where there is nothing but `files`.
fn assert_serves(files: &[&str]) {
    let libraries = LibraryDir::new().expect("the soft GPU");
    let machine = Machine::new(&libraries, files);
    let arguments = ["--device", "cuda", "-tp", "2", "--enforce-eager"];
    let server = launch(&machine.search_path(), "0,1", &arguments);
    server.wait_ready();
    for worker in server.part("worker") {
        let loaded = loaded_from(worker, machine.root.path());
        assert!(
            server.log_text().contains("hardware=Cuda(["),
            "{}",
            server.log_text()
        );
        assert!(loaded, "worker {worker} has no library of this machine");
    }
    assert!(!server.complete("Hello", 2).is_empty());
    assert!(server.stop().success());
}

/// Whether a worker looks for libraries below `root` and behind the coordinator's links.
fn loaded_from(pid: u32, root: &Path) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).expect("readable");
    let path = environment
        .split(|byte| *byte == 0)
        .find_map(|variable| variable.strip_prefix(b"LD_LIBRARY_PATH="));
    let path = String::from_utf8_lossy(path.unwrap_or_default()).into_owned();
    let mut directories = path.split(':');
    directories.next().is_some_and(|first| first.ends_with("/cuda"))
        && directories.any(|directory| Path::new(directory).starts_with(root))
}

#[test]
fn a_run_time_image_has_no_unversioned_nccl() {
    let _alone = alone();
    assert_serves(&[
        "lib/libcuda.so.1",
        "lib/libnvrtc.so.12",
        "lib/libcublas.so.12",
        "lib/libcublasLt.so.12",
        "lib/libnccl.so.2",
    ]);
}

#[test]
fn cuda_13_has_names_of_its_own() {
    let _alone = alone();
    assert_serves(&[
        "driver/libcuda.so.1",
        "lib/libnvrtc.so.13",
        "lib/libcublas.so.13",
        "lib/libcublasLt.so.13",
        "lib/libnccl.so.2",
    ]);
}

#[test]
fn wheels_have_a_directory_per_library() {
    let _alone = alone();
    assert_serves(&[
        "site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "site-packages/nvidia/cublas/lib/libcublas.so.12",
        "site-packages/nvidia/cublas/lib/libcublasLt.so.12",
        "site-packages/nvidia/nccl/lib/libnccl.so.2",
        "driver/libcuda.so.1",
    ]);
}
