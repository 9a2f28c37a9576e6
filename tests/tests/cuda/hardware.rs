//! Which ranks get GPUs, and what is said where they cannot.

use std::time::Duration;

use phalanx_tests::server::Server;
use softgpu::LibraryDir;

use crate::support::{alone, launch};

#[test]
fn gpus_that_were_asked_for_and_are_not_there_are_missed_in_one_line() {
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let refused = |mut server: Server, reason: &str| {
        assert!(!server.wait(Duration::from_secs(30)).success());
        let log = server.log_text();
        let last = log.lines().last().unwrap_or_default();
        assert!(
            last.starts_with("phalanx: ") && last.contains(reason),
            "{reason:?} not in: {log}"
        );
    };
    let one = launch(&libraries.search_path(), "0", &["--device", "cuda", "-tp", "2"]);
    refused(
        one,
        "rank 1 cannot use a GPU: device discovery: CUDA_ERROR_NO_DEVICE",
    );
    std::fs::remove_file(libraries.path().join("libnccl.so")).expect("removed");
    std::fs::remove_file(libraries.path().join("libnccl.so.2")).expect("removed");
    let without_nccl = launch(&libraries.search_path(), "0,1", &["--device", "cuda", "-tp", "2"]);
    refused(
        without_nccl,
        "cannot use a GPU: libnccl not found: looked for libnccl.so,",
    );
}

#[test]
fn auto_takes_cpus_when_there_are_fewer_gpus_than_ranks() {
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let server = launch(&libraries.search_path(), "0", &["-tp", "2"]);
    server.wait_ready();
    assert!(
        server.log_text().contains("not every rank has a GPU: using CPUs"),
        "{}",
        server.log_text()
    );
    assert!(!server.complete("Hello", 4).is_empty());
    assert!(server.stop().success());
}
