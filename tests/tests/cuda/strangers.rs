//! Workers that are not the coordinator's children: nobody but their peers notices that one hangs.

use std::{
    fs::File,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use phalanx_tests::{
    demo_model, http, phalanx,
    processes::{self, eventually},
    server::{chat, free_port},
};
use rustix::process::Signal;
use softgpu::LibraryDir;

use crate::support::{KERNELS, SMALL, alone, last_event};

const RANKS: u32 = 2;
/// From the start to ready, in an unoptimized build on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// The watchdogs give up after nine tenths of the step's limit.
const STEP_LIMIT: &str = "10";
const GIVEN_UP: Duration = Duration::from_secs(30);

/// A coordinator, workers and a gateway, each started by the test. Ended with it.
struct Parts {
    /// The coordinator, the workers in rank order, the gateway.
    children: Vec<Child>,
    address: String,
    log: PathBuf,
    _directory: tempfile::TempDir,
}

impl Parts {
    fn start(libraries: &LibraryDir) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let socket = directory.path().join("grpc").to_string_lossy().into_owned();
        let log = directory.path().join("log");
        let output = File::create(&log).expect("a log file");
        let spawn = |arguments: &[&str], device: &str| {
            Command::new(phalanx())
                .args(arguments)
                .env("PHALANX_JOIN_TOKEN", "known to all")
                .env("PHALANX_KERNEL_CACHE", KERNELS)
                .env("LD_LIBRARY_PATH", libraries.library_path())
                .env("CUDA_VISIBLE_DEVICES", device)
                .env("SOFTGPU_MEM_MIB", "1536")
                .stdin(Stdio::null())
                .stdout(output.try_clone().expect("a handle"))
                .stderr(output.try_clone().expect("a handle"))
                .spawn()
                .expect("phalanx starts")
        };
        let (model, ranks) = (demo_model().to_string_lossy().into_owned(), RANKS.to_string());
        let own = ["coordinator", &model, "-tp", &ranks, "--device", "cuda"];
        let flags = [
            "--distributed-executor-backend",
            "external_launcher",
            "--execute-model-timeout-seconds",
            STEP_LIMIT,
            // The soft GPU is quicker with NCCL: its blocks need not wait for each other one by one.
            "--disable-custom-all-reduce",
            "--served-model-name",
            "demo",
            "--grpc-uds",
            &socket,
        ];
        let mut children = vec![spawn(&[&own[..], &flags, &SMALL].concat(), "")];
        let coordinator = format!("unix:{socket}");
        for rank in (0..RANKS).map(|rank| rank.to_string()) {
            children.push(spawn(
                &["worker", "--coordinator", &coordinator, "--rank", &rank],
                &rank,
            ));
        }
        let port = free_port().to_string();
        let gateway = ["gateway", "--coordinator", &coordinator];
        children.push(spawn(
            &[&gateway[..], &["--host", "127.0.0.1", "--port", &port]].concat(),
            "",
        ));
        Self {
            children,
            address: format!("127.0.0.1:{port}"),
            log,
            _directory: directory,
        }
    }

    fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
fn a_rank_that_hangs_is_named_with_collective_and_layer() {
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let mut parts = Parts::start(&libraries);
    eventually("readiness", READY_LIMIT, || {
        http::get(&parts.address, "/health").is_ok_and(|reply| reply.status == 200)
    });
    let mut body = chat("Tell me everything about trees.");
    body["stream"] = true.into();
    body["ignore_eos"] = true.into();
    let mut stream = http::open(&parts.address, "/v1/chat/completions", &body).expect("a stream");
    for _ in 0..2 {
        stream.next_event().expect("an event").expect("not over");
    }
    processes::kill(parts.children[2].id(), Signal::STOP);
    let last = last_event(stream);
    // Wherever it was stopped: before or after it had started the collective that the others wait in.
    let told = |text: &str| {
        let known = ["never reached all_", "does not move and never finished all_"];
        let collective = known.iter().any(|known| text.contains(known));
        // Unless it was stopped between two steps, or where the ranks choose a token.
        let elsewhere = text.contains("took longer than") || text.contains("timed out");
        text.contains("rank 1 ") && (collective && text.contains(" within 9s") || elsewhere)
    };
    assert!(last.contains("rank 1 lost: ") && told(&last), "{last}");
    let coordinator = &mut parts.children[0];
    eventually("the coordinator's end", GIVEN_UP, || {
        coordinator.try_wait().expect("it is a child").is_some()
    });
    assert!(!coordinator.wait().expect("its status").success());
    let log = parts.log_text();
    let reason = log
        .lines()
        .find(|line| line.starts_with("phalanx: rank 1 failed while serving: "));
    assert!(reason.is_some_and(told), "{log}");
}
