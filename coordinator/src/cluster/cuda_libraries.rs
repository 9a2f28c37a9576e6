//! Where CUDA's libraries lie, and the names under which workers find them.
//!
//! A worker loads `libnccl.so`, or one of the versions it knows. Run-time images and packages bring `libnccl.so.2` only,
//! and a newer CUDA brings `libcublas.so.13`: then the workers get a directory of links in front of their
//! `LD_LIBRARY_PATH`. It must be there before they start, because the dynamic linker reads the variable once.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    os::unix::fs::{DirBuilderExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use crate::config::{DeviceChoice, GpuEnvironment, WorkerSource};

/// The driver, which only a machine with a GPU has.
const DRIVER: &str = "cuda";
/// What a rank loads, without `lib` and `.so`.
const LIBRARIES: [&str; 5] = [DRIVER, "nvrtc", "cublas", "cublasLt", "nccl"];
/// Suffixes that the workers try.
const KNOWN_VERSIONS: [&str; 6] = ["1", "12", "11", "10", "9", ""];
/// Where NVIDIA's installer puts what the linker's cache may not know.
const TOOLKIT: &str = "/usr/local/cuda/lib64";

/// The files found, by library.
#[derive(Clone, Debug, Default)]
pub struct CudaLibraries {
    /// None: the workers run elsewhere.
    found: Option<BTreeMap<&'static str, Found>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    /// Has one of the names that workers look for, in a place where they look.
    as_is: bool,
    file: PathBuf,
}

impl CudaLibraries {
    /// The directory of links, within the scratch directory.
    pub const LINKS: &str = "cuda";

    /// Of the machine on which the workers will run, if that is this one.
    pub fn of(source: &WorkerSource) -> Self {
        match source {
            WorkerSource::Local { gpus, .. } => Self::find(gpus, &cached()),
            WorkerSource::External { .. } => Self::default(),
        }
    }

    /// `cached` are the files that the dynamic linker knows by itself.
    fn find(gpus: &GpuEnvironment, cached: &[PathBuf]) -> Self {
        let mut own: Vec<PathBuf> = Vec::new();
        for directory in std::env::split_paths(gpus.search_path.as_deref().unwrap_or_default()) {
            own.extend(files_in(&directory));
        }
        own.extend(cached.iter().cloned());
        let toolkit = files_in(Path::new(TOOLKIT));
        let found = LIBRARIES
            .into_iter()
            .filter_map(|name| Some((name, find(name, &own, &toolkit)?)));
        Self {
            found: Some(found.collect()),
        }
    }

    /// Whether ranks that may be on GPUs can only be on CPUs.
    pub fn only_cpu(&self, device: DeviceChoice) -> bool {
        match (device, &self.found) {
            (DeviceChoice::Cpu, _) => true,
            (DeviceChoice::Auto, Some(found)) => !found.contains_key(DRIVER),
            (DeviceChoice::Auto, None) | (DeviceChoice::Cuda, _) => false,
        }
    }

    /// The workers' `LD_LIBRARY_PATH`: that of this process, with a directory of links before it if any are needed, and
    /// the directories they point to behind. None: as it is.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn search_path(&self, gpus: &GpuEnvironment) -> io::Result<Option<OsString>> {
        let found = self.found.iter().flatten();
        let hidden: Vec<_> = found.filter(|(_, found)| !found.as_is).collect();
        if hidden.is_empty() {
            return Ok(None);
        }
        let links = gpus.scratch.join(Self::LINKS);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&links)?;
        let mut path = vec![links.clone()];
        path.extend(std::env::split_paths(
            gpus.search_path.as_deref().unwrap_or_default(),
        ));
        for (name, library) in hidden {
            symlink(&library.file, links.join(format!("lib{name}.so")))?;
            // What the library itself depends on lies beside it.
            let directory = library.file.parent().map(Path::to_owned);
            path.extend(directory.filter(|directory| !path.contains(directory)));
        }
        std::env::join_paths(path).map(Some).map_err(io::Error::other)
    }
}

/// The file of a library: first one that workers find by themselves, then the newest.
fn find(name: &str, own: &[PathBuf], toolkit: &[PathBuf]) -> Option<Found> {
    let found = |as_is| {
        move |file: &PathBuf| Found {
            as_is,
            file: file.clone(),
        }
    };
    let known =
        |file: &&PathBuf| version(file, name).is_some_and(|version| KNOWN_VERSIONS.contains(&version));
    let newest = |files: &[PathBuf]| {
        let of_name = files.iter().filter(|file| version(file, name).is_some());
        of_name
            .max_by_key(|file| numbers(version(file, name).unwrap_or_default()))
            .map(found(false))
    };
    own.iter()
        .find(known)
        .map(found(true))
        .or_else(|| newest(own))
        .or_else(|| newest(toolkit))
}

/// What follows `lib<name>.so.` in the file's name; empty if nothing does; none if it is another library.
fn version<'a>(file: &'a Path, name: &str) -> Option<&'a str> {
    let rest = file
        .file_name()?
        .to_str()?
        .strip_prefix("lib")?
        .strip_prefix(name)?
        .strip_prefix(".so")?;
    if rest.is_empty() {
        Some("")
    } else {
        rest.strip_prefix('.')
    }
}

fn numbers(version: &str) -> Vec<u32> {
    version.split('.').map(|part| part.parse().unwrap_or(0)).collect()
}

fn files_in(directory: &Path) -> Vec<PathBuf> {
    // The linker reads an empty entry as the working directory; a server has no business there.
    if directory.as_os_str().is_empty() {
        return Vec::new();
    }
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.exists())
        .collect()
}

/// The libraries in the dynamic linker's cache: lines like `libcuda.so.1 (libc6,x86-64) => /usr/lib/libcuda.so.1`.
fn cached() -> Vec<PathBuf> {
    let output = ["/sbin/ldconfig", "ldconfig"]
        .iter()
        .find_map(|program| Command::new(program).arg("-p").output().ok());
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let paths = |text: &str| {
        text.lines()
            .filter_map(|line| Some(PathBuf::from(line.split_once("=> ")?.1)))
            .collect()
    };
    text.as_deref().map(paths).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scene {
        root: tempfile::TempDir,
        gpus: GpuEnvironment,
    }

    impl Scene {
        /// A library path of two directories, `a` and `b`, that hold these files.
        fn new(files: &[&str]) -> Self {
            let root = tempfile::tempdir().expect("a directory");
            for directory in ["a", "b", "system"] {
                fs::create_dir(root.path().join(directory)).expect("a directory");
            }
            for file in files {
                fs::write(root.path().join(file), file).expect("a file");
            }
            let gpus = GpuEnvironment {
                search_path: Some(
                    std::env::join_paths(["a", "b"].map(|dir| root.path().join(dir))).expect("no colon"),
                ),
                visible_devices: None,
                scratch: root.path().join("scratch"),
            };
            Self { root, gpus }
        }

        fn find(&self) -> CudaLibraries {
            CudaLibraries::find(&self.gpus, &files_in(&self.root.path().join("system")))
        }

        /// The workers' path, relative to the scene.
        fn path(&self) -> Vec<String> {
            let path = self
                .find()
                .search_path(&self.gpus)
                .expect("made")
                .expect("changed");
            let relative = |path: PathBuf| {
                path.strip_prefix(self.root.path())
                    .expect("of the scene")
                    .to_owned()
            };
            std::env::split_paths(&path)
                .map(|path| relative(path).display().to_string())
                .collect()
        }

        fn link(&self, name: &str) -> String {
            fs::read_to_string(self.gpus.scratch.join("cuda").join(name)).expect("a link to a file")
        }
    }

    #[test]
    fn libraries_with_the_names_that_are_looked_for_need_nothing() {
        let scene = Scene::new(&[
            "a/libcuda.so.1",
            "b/libcublas.so.12",
            "b/libcublas.so.13",
            "system/libnccl.so",
        ]);
        assert_eq!(
            scene.find().search_path(&scene.gpus).expect("nothing to make"),
            None
        );
        assert!(!scene.gpus.scratch.exists());
    }

    #[test]
    fn others_are_linked_under_a_name_that_is() {
        let scene = Scene::new(&[
            "a/libcuda.so.1",
            "b/libnccl.so.2",
            "b/libnccl.so.2.9.1",
            "b/libnccl.so.2.28.3",
            "system/libcublas.so.13",
            "system/libcublasLt.so.13",
        ]);
        assert_eq!(scene.path(), ["scratch/cuda", "a", "b", "system"]);
        assert_eq!(scene.link("libnccl.so"), "b/libnccl.so.2.28.3");
        assert_eq!(scene.link("libcublas.so"), "system/libcublas.so.13");
        assert_eq!(scene.link("libcublasLt.so"), "system/libcublasLt.so.13");
        assert!(!scene.gpus.scratch.join("cuda/libcuda.so").exists());
    }

    #[test]
    fn without_a_driver_auto_means_cpus() {
        let scene = Scene::new(&["a/libnccl.so.2"]);
        let without = scene.find();
        assert!(without.only_cpu(DeviceChoice::Auto) && without.only_cpu(DeviceChoice::Cpu));
        assert!(!without.only_cpu(DeviceChoice::Cuda));
        let scene = Scene::new(&["b/libcuda.so.1"]);
        assert!(!scene.find().only_cpu(DeviceChoice::Auto));
        let elsewhere = CudaLibraries::of(&WorkerSource::External {
            join_token: String::new(),
        });
        assert!(
            !elsewhere.only_cpu(DeviceChoice::Auto),
            "the workers must be asked"
        );
    }

    #[test]
    fn a_name_that_only_begins_alike_is_another_library() {
        assert_eq!(version(Path::new("/x/libcublasLt.so.12"), "cublas"), None);
        assert_eq!(version(Path::new("/x/libcuda.so"), "cuda"), Some(""));
        assert_eq!(version(Path::new("/x/libcudart.so.12"), "cuda"), None);
        assert_eq!(version(Path::new("/x/libnccl.so.2.28.3"), "nccl"), Some("2.28.3"));
    }
}
