//! Nothing of CUDA is needed to build: no crate may turn on what links its libraries or runs its compiler.

use std::path::Path;
use std::process::Command;

/// The lines of `cargo tree -e features` for what depends on `package`.
fn tree(package: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--workspace",
            "--offline",
            "-e",
            "features",
            "-i",
            package,
        ])
        .current_dir(root)
        .output()
        .expect("cargo tree");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains(package), "{text}");
    text
}

#[test]
fn cuda_is_loaded_and_never_linked() {
    let cudarc = tree("cudarc");
    assert!(cudarc.contains("cudarc feature \"dynamic-loading\""), "{cudarc}");
    for forbidden in [
        "dynamic-linking",
        "static-linking",
        "fallback-dynamic-loading",
        "cuda-version-from-build-system",
    ] {
        assert!(!cudarc.contains(forbidden), "{forbidden} is on:\n{cudarc}");
    }
}

#[test]
fn candle_stays_on_the_cpu() {
    let candle = tree("candle-core");
    for forbidden in ["cuda", "nccl", "cudnn"] {
        let feature = format!("candle-core feature \"{forbidden}\"");
        assert!(!candle.contains(&feature), "{feature} is on:\n{candle}");
    }
}
