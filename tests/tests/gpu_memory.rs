//! What a rank's GPU has room for, measured at start, on the soft GPU.

use std::{ffi::OsStr, time::Duration};

use phalanx_tests::{demo_model, server::Server};
use softgpu::LibraryDir;

/// A short context: few blocks, small workspaces, a quick largest step.
const SMALL: [&str; 8] = [
    "--device",
    "cuda",
    "--max-model-len",
    "256",
    "--max-num-batched-tokens",
    "32",
    "--max-num-seqs",
    "4",
];

/// A server on a soft GPU of so many MiB.
fn launch(libraries: &LibraryDir, mib: &str, arguments: &[&str]) -> Server {
    let model = demo_model();
    let arguments = [&SMALL, arguments].concat();
    let environment: [(&str, &OsStr); 4] = [
        ("LD_LIBRARY_PATH", &libraries.search_path()),
        ("CUDA_VISIBLE_DEVICES", "0,1".as_ref()),
        ("SOFTGPU_MEM_MIB", mib.as_ref()),
        (
            "PHALANX_KERNEL_CACHE",
            concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels").as_ref(),
        ),
    ];
    Server::launch_in(&model.to_string_lossy(), &arguments, &environment)
}

/// The number after `key=` in the line that tells what was measured.
fn measured(server: &Server, key: &str) -> u64 {
    let log = server.log_text();
    let line = log
        .lines()
        .find(|line| line.contains("memory measured"))
        .expect("a line");
    let at = line.find(&format!(" {key}=")).expect("the key") + key.len() + 2;
    let digits = line[at..]
        .split(|c: char| !c.is_ascii_digit())
        .next()
        .expect("digits");
    digits.parse().expect("a number")
}

#[test]
fn a_smaller_gpu_gets_fewer_blocks_and_one_too_small_is_refused_with_the_bytes() {
    let libraries = LibraryDir::new().expect("the soft GPU");
    let blocks = |mib| {
        let server = launch(&libraries, mib, &["-tp", "2"]);
        server.wait_ready();
        assert!(!server.complete("Hello", 2).is_empty());
        let (planned, blocks) = (
            measured(&server, "planned_blocks"),
            measured(&server, "num_blocks"),
        );
        assert!(server.stop().success());
        // The estimate before loading is cautious, and not far off: within two times 2 MiB for each of 30 layers,
        // whose blocks have 16 tokens of at most 2 KV heads of 64.
        let tolerance = (120 << 20) / (30 * 16 * 2 * 64 * 2 * 2);
        assert!(
            planned <= blocks && blocks <= planned + tolerance,
            "{planned} planned, {blocks} measured"
        );
        blocks
    };
    let (large, small) = (blocks("1024"), blocks("800"));
    assert!(small < large && small > 0, "{small} of {large}");
    let mut refused = launch(&libraries, "620", &["-tp", "2"]);
    assert!(!refused.wait(Duration::from_secs(60)).success());
    let log = refused.log_text();
    let last = log.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("phalanx: rank 0 needs ") && last.contains("--gpu-memory-utilization"),
        "{log}"
    );
}
