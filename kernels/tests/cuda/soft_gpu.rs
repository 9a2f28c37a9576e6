//! What needs a device, on the soft GPU: this very program is started again with the soft GPU's libraries in front.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::process::Command;

use softgpu::LibraryDir;

/// The tests whose names contain `filter`, ignored ones too, in a process that loads its libraries from `path` and sees
/// devices of a compute capability, major and minor digit.
fn run_on(capability: &str, filter: &str, path: OsString) {
    let output = Command::new(env::current_exe().unwrap())
        .args(["--include-ignored", "--skip", "soft_gpu", filter])
        .env("LD_LIBRARY_PATH", path)
        .env("SOFTGPU_DEVICES", "2")
        .env("SOFTGPU_CC", capability)
        .env("SOFTGPU_MEM_MIB", "512")
        // Built with what is tested, and removed with it.
        .env(
            "PHALANX_KERNEL_CACHE",
            concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels"),
        )
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{}\n{}", output.status, text.join("\n"));
    assert!(!text[0].contains("running 0 tests"), "{filter} names no test");
}

fn run(filter: &str, path: OsString) {
    run_on("80", filter, path);
}

#[test]
fn everything_holds_on_the_soft_gpu() {
    run("", LibraryDir::new().unwrap().search_path());
}

/// Devices that multiply E4M3.
#[test]
fn linear_layers_hold_on_ada() {
    for filter in ["conformance::cuda::linear", "fp8::"] {
        run_on("89", filter, LibraryDir::new().unwrap().search_path());
    }
}

/// Each library in turn is the only one that is not there.
#[test]
fn every_missing_library_is_named() {
    for library in ["cuda", "nvrtc", "cublasLt", "nccl"] {
        let directory = LibraryDir::new().unwrap();
        for entry in fs::read_dir(directory.path()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with(&format!("lib{library}.")) {
                fs::remove_file(&path).unwrap();
            }
        }
        for filter in ["libraries::what_is_missing", "libraries::a_missing"] {
            run(filter, directory.path().into());
        }
    }
}
