//! Support for the end-to-end tests: real processes, found, started, watched and killed.
#![forbid(unsafe_code)]

pub mod fleet;
pub mod http;
pub mod processes;
pub mod python;
pub mod server;

use std::path::{Path, PathBuf};

/// The workspace's root.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lies in the workspace")
}

/// The demo model, which `scripts/fetch-demo-model` fetches.
pub fn demo_model() -> PathBuf {
    let default = || root().join(".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("PHALANX_DEMO_MODEL").map_or_else(default, PathBuf::from);
    assert!(
        path.exists(),
        "{} is missing: run ./scripts/fetch-demo-model",
        path.display()
    );
    path
}

/// The binary of this build, which `cargo build --workspace` puts beside the tests' directory.
pub fn phalanx() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let binary = test
        .ancestors()
        .nth(2)
        .expect("target/<profile>/deps/<test>")
        .join("phalanx");
    assert!(
        binary.exists(),
        "{} is missing: run cargo build --workspace",
        binary.display()
    );
    binary
}
