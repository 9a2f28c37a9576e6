//! The shared libraries of CUDA, found at run time. Nothing of CUDA is needed to build.
//!
//! cudarc loads a library at the first call into it and panics if there is none. So whoever enters this module's
//! siblings asks here first.

use std::fmt;

use cudarc::driver::CudaContext;

/// A library that is loaded with `dlopen`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// The driver.
    Cuda,
    /// The run-time compiler. Not needed where every kernel comes prebuilt.
    Nvrtc,
    CublasLt,
    /// Needed by groups of more than one rank only.
    Nccl,
}

impl Library {
    pub const ALL: [Self; 4] = [Self::Cuda, Self::Nvrtc, Self::CublasLt, Self::Nccl];

    /// What the linker calls it, e.g. `cublasLt`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Nvrtc => "nvrtc",
            Self::CublasLt => "cublasLt",
            Self::Nccl => "nccl",
        }
    }

    /// Whether the dynamic linker finds it under one of the names that are tried.
    pub fn is_present(self) -> bool {
        // SAFETY: loading runs the library's initializers: NVIDIA's are meant to be loaded into any process, and
        // whoever can place another library on the linker's path already decides what this process runs.
        unsafe {
            match self {
                Self::Cuda => cudarc::driver::sys::is_culib_present(),
                Self::Nvrtc => cudarc::nvrtc::sys::is_culib_present(),
                Self::CublasLt => cudarc::cublaslt::sys::is_culib_present(),
                Self::Nccl => cudarc::nccl::sys::is_culib_present(),
            }
        }
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lib{}", self.name())
    }
}

/// Why CUDA cannot be used here, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaUnavailable {
    #[error("{library} not found: looked for {names} in {places}")]
    Missing {
        library: Library,
        names: String,
        places: String,
    },
    #[error("the CUDA driver reports: {0}")]
    Driver(String),
    #[error("the CUDA driver finds no device")]
    NoDevice,
}

/// Whether all of CUDA is here and there is a device.
///
/// # Errors
/// The first thing that is missing.
pub fn available() -> Result<(), CudaUnavailable> {
    require(&Library::ALL)?;
    match CudaContext::device_count() {
        Ok(0) => Err(CudaUnavailable::NoDevice),
        Ok(_) => Ok(()),
        Err(error) => Err(CudaUnavailable::Driver(error.to_string())),
    }
}

/// Whether the dynamic linker finds `libraries`.
///
/// # Errors
/// [`CudaUnavailable::Missing`] of the first that it does not.
pub fn require(libraries: &[Library]) -> Result<(), CudaUnavailable> {
    match libraries.iter().find(|library| !library.is_present()) {
        None => Ok(()),
        Some(&library) => Err(CudaUnavailable::Missing {
            library,
            names: names(library),
            places: places(),
        }),
    }
}

/// The first and the versioned names; those between are of other systems.
fn names(library: Library) -> String {
    let mut names = cudarc::get_lib_name_candidates(library.name());
    names.retain(|name| name.ends_with(".so") && !name.contains("64") || name.contains(".so."));
    names.dedup();
    names.join(", ")
}

/// Where `dlopen` looks.
fn places() -> String {
    let system = "the directories of the dynamic linker (ldconfig -p)";
    match std::env::var("LD_LIBRARY_PATH") {
        Ok(path) if !path.is_empty() => format!("LD_LIBRARY_PATH={path} and {system}"),
        _ => format!("{system}; LD_LIBRARY_PATH is not set"),
    }
}
