//! Kernels are compiled once, and the files of the cache are not trusted blindly.

use std::fs;
use std::path::{Path, PathBuf};

use phalanx_kernels::KernelError;
use phalanx_kernels::cuda::{CudaBackend, KernelCache, Library, Origin, WarmRequest, devices, warm};
use phalanx_model::KvDtype;
use tempfile::tempdir;

use crate::support::options;

fn origins(cache: KernelCache) -> Vec<Origin> {
    let mut options = options();
    options.kernel_cache = cache;
    CudaBackend::open(options).unwrap().kernel_origins()
}

fn all(origins: &[Origin], origin: Origin) -> bool {
    !origins.is_empty() && origins.iter().all(|&found| found == origin)
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
#[ignore = "needs a device"]
fn kernels_are_compiled_once() {
    let directory = tempdir().unwrap();
    let cache = KernelCache {
        directory: Some(directory.path().join("made/if/missing")),
        prebuilt: None,
    };
    assert!(all(&origins(cache.clone()), Origin::Compiled));
    assert!(all(&origins(cache.clone()), Origin::Cached));

    // Half a file, a changed file and an empty one are compiled again.
    let files = files(cache.directory.as_ref().unwrap());
    let whole = fs::read(&files[0]).unwrap();
    fs::write(&files[0], &whole[..whole.len() / 2]).unwrap();
    let mut changed = fs::read(&files[1]).unwrap();
    changed[100] ^= 1;
    fs::write(&files[1], changed).unwrap();
    fs::write(&files[2], []).unwrap();
    let found = origins(cache.clone());
    let compiled = found.iter().filter(|&&origin| origin == Origin::Compiled);
    assert_eq!(compiled.count(), 3, "{found:?}");
    assert_eq!(fs::read(&files[0]).unwrap(), whole);
    assert!(all(&origins(cache), Origin::Cached));
}

#[test]
#[ignore = "needs a device"]
fn a_directory_of_prebuilt_kernels_is_enough() {
    let directory = tempdir().unwrap();
    let request = WarmRequest {
        arch: devices().unwrap()[0].arch(),
        head_dims: vec![64],
        kv_dtypes: vec![KvDtype::F16],
    };
    let written = warm(&request, directory.path()).unwrap();
    assert_eq!(written.len(), files(directory.path()).len());
    assert!(
        written
            .iter()
            .all(|file| file.compiled && file.path.is_file() && file.bytes > 0)
    );
    let again = warm(&request, directory.path()).unwrap();
    assert!(again.iter().all(|file| !file.compiled));

    let cache = KernelCache {
        directory: None,
        prebuilt: Some(directory.path().to_owned()),
    };
    assert!(all(&origins(cache), Origin::Prebuilt));
}

#[test]
#[ignore = "needs a device"]
fn a_cache_that_cannot_be_written_costs_only_time() {
    let directory = tempdir().unwrap();
    let file = directory.path().join("a file");
    fs::write(&file, "").unwrap();
    let cache = KernelCache {
        directory: Some(file),
        prebuilt: None,
    };
    assert!(all(&origins(cache), Origin::Compiled));
}

#[test]
fn only_architectures_are_compiled_for() {
    let directory = tempdir().unwrap();
    for arch in [
        "",
        "sm_",
        "90",
        "sm_9",
        "compute_90",
        "sm_90/../..",
        "sm_90 -DX",
        "sm_9000",
    ] {
        let request = WarmRequest {
            arch: arch.to_owned(),
            head_dims: vec![64],
            kv_dtypes: vec![KvDtype::F16],
        };
        let error = warm(&request, directory.path()).unwrap_err();
        let KernelError::Device { message, .. } = error else {
            panic!("{error}");
        };
        assert!(message.contains("not an architecture"), "{message}");
    }
    assert!(files(directory.path()).is_empty());
}

#[test]
fn compiling_without_a_compiler_is_an_error() {
    let directory = tempdir().unwrap();
    let request = WarmRequest {
        arch: "sm_90".to_owned(),
        head_dims: vec![],
        kv_dtypes: vec![],
    };
    match warm(&request, directory.path()) {
        Ok(written) => assert!(Library::Nvrtc.is_present() && !written.is_empty()),
        Err(error) => assert!(error.to_string().contains("libnvrtc not found"), "{error}"),
    }
}

#[test]
fn the_cache_is_where_the_environment_says() {
    let cache = |variables: &[(&str, &str)]| {
        KernelCache::of_environment(|name| {
            let (_, value) = variables.iter().find(|(known, _)| *known == name)?;
            Some((*value).into())
        })
    };
    let home = ("HOME", "/home/me");
    let xdg = ("XDG_CACHE_HOME", "/cache");
    let own = ("PHALANX_KERNEL_CACHE", "/kernels");
    let cases: [(&[_], Option<&str>); 5] = [
        (&[home, xdg, own], Some("/kernels")),
        (&[home, xdg], Some("/cache/phalanx/kernels")),
        (&[home], Some("/home/me/.cache/phalanx/kernels")),
        (
            &[home, ("XDG_CACHE_HOME", "")],
            Some("/home/me/.cache/phalanx/kernels"),
        ),
        (&[], None),
    ];
    for (variables, want) in cases {
        let found = cache(variables);
        assert_eq!(found.directory.as_deref(), want.map(Path::new));
        assert_eq!(found.prebuilt, found.directory);
    }
    let found = cache(&[own, ("PHALANX_PREBUILT_KERNELS", "/image")]);
    assert_eq!(found.prebuilt.as_deref(), Some(Path::new("/image")));
}
