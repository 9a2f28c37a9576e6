//! `scripts/gpu-check`, rehearsed: whoever has a GPU runs it once, and it must not fail for reasons of its own.

use std::{fs, process::Command};

use phalanx_tests::{demo_model, phalanx, root};

use crate::support::alone;

fn rehearse(arguments: &[&str]) -> (bool, String) {
    let directory = tempfile::tempdir().expect("a directory");
    let target = phalanx().parent().expect("target/<profile>").to_owned();
    let output = Command::new(root().join("scripts/gpu-check"))
        .arg("--soft")
        .arg("--target")
        .arg(target)
        .arg("--output")
        .arg(directory.path())
        .args(arguments)
        .env("PHALANX_DEMO_MODEL", demo_model())
        .output()
        .expect("python3");
    let files: Vec<_> = fs::read_dir(directory.path())
        .expect("readable")
        .flatten()
        .map(|entry| entry.path())
        .collect();
    let report = files.first().map(|file| fs::read_to_string(file).expect("text"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(files.len(), 1, "{said}");
    (output.status.success(), report.unwrap_or_default() + &said)
}

#[test]
fn every_step_leaves_its_part_in_one_file() {
    let _alone = alone();
    let (success, report) = rehearse(&[]);
    assert!(success, "{report}");
    for part in [
        "==== environment:",
        "==== kernels:",
        "all_reduce",
        "==== conformance:",
        "test result: ok. 1 passed",
        "==== timings:",
        "paged_attention",
        "==== collectives:",
        "==== throughput:",
        "output tok/s",
        "==== summary",
    ] {
        assert!(report.contains(part), "{part:?} is missing in:\n{report}");
    }
}

#[test]
fn a_step_that_fails_does_not_end_the_others() {
    let _alone = alone();
    let empty = tempfile::tempdir().expect("a directory");
    let soft = phalanx().with_file_name("libsoftgpu.so");
    std::os::unix::fs::symlink(soft, empty.path().join("libsoftgpu.so")).expect("linked");
    // No program is there.
    let target = empty.path().to_string_lossy().into_owned();
    let (success, report) = rehearse(&["--target", &target, "--only", "kernels,timings,environment"]);
    assert!(!success, "{report}");
    for verdict in ["environment", "kernels", "timings"] {
        let line = report
            .lines()
            .rev()
            .find(|line| line.starts_with(verdict))
            .unwrap_or_default();
        assert_eq!(line.contains("FAILED"), verdict != "environment", "{report}");
    }
}
