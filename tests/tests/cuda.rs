//! A rank per GPU, end to end, on the soft GPU: the binary is the same, its libraries are stand-ins.
//! One server at a time: the soft GPU wants all the CPUs there are.

use std::{
    ffi::OsStr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use phalanx_tests::{
    demo_model, http,
    processes::{self, eventually},
    server::{Server, assert_gone, chat},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use softgpu::LibraryDir;

/// Where the CPU's best two tokens are closer than this, bf16 may choose otherwise, and after that texts differ.
const DECIDED: f64 = 0.1;
/// Natural logarithms of probabilities, between f32 sums of quantized weights and bf16.
const TOLERANCE: f64 = 0.15;
const TOKENS: usize = 8;
const PROMPTS: [&str; 3] = [
    "The three laws of motion are",
    "1, 2, 3, 4, 5, 6,",
    "The chemical symbols of gold, silver and iron are",
];
/// A short context: few blocks, small workspaces.
const SMALL: [&str; 6] = [
    "--max-model-len",
    "256",
    "--max-num-batched-tokens",
    "64",
    "--max-num-seqs",
    "8",
];

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server on the soft GPU, which shows it these devices.
fn launch(libraries: &LibraryDir, visible: &str, arguments: &[&str]) -> Server {
    let model = demo_model();
    let arguments = [&SMALL, arguments].concat();
    let environment: [(&str, &OsStr); 4] = [
        ("LD_LIBRARY_PATH", &libraries.library_path()),
        ("CUDA_VISIBLE_DEVICES", visible.as_ref()),
        ("SOFTGPU_MEM_MIB", "1536".as_ref()),
        (
            "PHALANX_KERNEL_CACHE",
            concat!(env!("CARGO_TARGET_TMPDIR"), "/kernels").as_ref(),
        ),
    ];
    Server::launch_in(&model.to_string_lossy(), &arguments, &environment)
}

fn on_gpus(libraries: &LibraryDir, arguments: &[&str]) -> Server {
    let server = launch(libraries, "0,1,2,3", &[&["--device", "cuda"], arguments].concat());
    server.wait_ready();
    let log = server.log_text();
    assert!(log.contains("hardware=Cuda(["), "{log}");
    server
}

/// Log-probabilities of a greedy completion, as the API gives them.
fn answer(server: &Server, prompt: &str) -> Value {
    let body =
        json!({"model": "demo", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 5});
    let reply = http::post(&server.address, "/v1/completions", &body).expect("a reply");
    assert_eq!(reply.status, 200, "{}", reply.text());
    reply.json()["choices"][0]["logprobs"].clone()
}

fn answers(server: &Server) -> Vec<Value> {
    PROMPTS.iter().map(|prompt| answer(server, prompt)).collect()
}

/// Compares token by token until the CPU itself was undecided; returns how many tokens were compared.
fn compare(cpu: &Value, gpu: &Value) -> usize {
    for at in 0..TOKENS {
        let logprob = |answer: &Value| answer["token_logprobs"][at].as_f64().expect("a number");
        let best = cpu["top_logprobs"][at].as_object().expect("the best tokens");
        let mut best: Vec<f64> = best.values().filter_map(Value::as_f64).collect();
        best.sort_by(|a, b| b.total_cmp(a));
        if best[0] - best[1] < DECIDED {
            return at;
        }
        assert_eq!(gpu["tokens"][at], cpu["tokens"][at], "token {at}:\n{cpu}\n{gpu}");
        let difference = (logprob(gpu) - logprob(cpu)).abs();
        assert!(
            difference < TOLERANCE,
            "token {at} differs by {difference}:\n{cpu}\n{gpu}"
        );
    }
    TOKENS
}

fn endless_stream(server: &Server) -> http::Stream {
    let mut body = chat("Tell me everything about trees.");
    body["stream"] = true.into();
    body["ignore_eos"] = true.into();
    body["max_tokens"] = 100.into();
    let mut stream = http::open(&server.address, "/v1/chat/completions", &body).expect("a stream");
    for _ in 0..2 {
        stream.next_event().expect("an event").expect("not over");
    }
    stream
}

#[test]
fn one_two_and_three_gpus_write_what_cpus_write() {
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let cpu = Server::start(&[&SMALL[..], &["--device", "cpu"]].concat());
    let expected = answers(&cpu);
    assert!(cpu.stop().success());
    // Reduce style by default; 9 query heads over 3 KV heads, unevenly over 2 ranks; columns are gathered, too.
    let runs: [&[&str]; 4] = [
        &["-tp", "1"],
        &["-tp", "2"],
        &["-tp", "3"],
        &["-tp", "2", "--tensor-parallel-style", "gather"],
    ];
    for arguments in runs {
        let server = on_gpus(&libraries, arguments);
        let found = answers(&server);
        let compared: usize = expected
            .iter()
            .zip(&found)
            .map(|(cpu, gpu)| compare(cpu, gpu))
            .sum();
        assert!(
            compared >= TOKENS,
            "{arguments:?}: only {compared} tokens were decided"
        );
        assert!(server.stop().success());
    }
}

#[test]
fn a_killed_rank_ends_the_collectives_of_the_others_at_once() {
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let mut server = on_gpus(&libraries, &["-tp", "3"]);
    let family = server.family();
    let mut stream = endless_stream(&server);
    let victim = processes::with_argument(&server.part("worker"), "1")[0];
    let survivors: Vec<u32> = server
        .part("worker")
        .into_iter()
        .filter(|pid| *pid != victim)
        .collect();
    processes::kill(victim, Signal::KILL);
    let killed = Instant::now();
    let mut last = String::new();
    while let Ok(Some(data)) = stream.next_event() {
        last = if data == "[DONE]" { last } else { data };
    }
    assert!(last.contains("rank 1"), "{last}");
    // The step's timeout is a minute: only an aborted collective lets a rank go now.
    eventually("the survivors' end", Duration::from_secs(5), || {
        survivors.iter().all(|pid| !processes::is_alive(*pid))
    });
    assert!(
        killed.elapsed() < Duration::from_secs(3),
        "{:?}",
        killed.elapsed()
    );
    assert!(!server.wait(Duration::from_secs(20)).success());
    let log = server.log_text();
    assert!(
        log.contains("rank 1 failed while serving: its process was killed by signal 9"),
        "{log}"
    );
    assert_gone(&family);
}

#[test]
fn a_rank_that_hangs_is_named_with_the_collective() {
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let mut server = on_gpus(&libraries, &["-tp", "3", "--execute-model-timeout-seconds", "10"]);
    let family = server.family();
    let mut stream = endless_stream(&server);
    let victim = processes::with_argument(&server.part("worker"), "1")[0];
    processes::kill(victim, Signal::STOP);
    let mut last = String::new();
    while let Ok(Some(data)) = stream.next_event() {
        last = if data == "[DONE]" { last } else { data };
    }
    assert!(last.contains("rank 1"), "{last}");
    assert!(!server.wait(Duration::from_secs(30)).success());
    // Wherever it was stopped: before or after it had started the collective that the others wait in.
    let log = server.log_text();
    let told = [
        "rank 1 never reached all_",
        "rank 1 does not move and never finished all_",
    ];
    let told = told.iter().any(|text| log.contains(text));
    // Unless it was stopped between two steps, when it never took up the plan.
    assert!(told || log.contains("rank 1 failed while serving"), "{log}");
    assert_gone(&family);
}

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
    let one = launch(&libraries, "0", &["--device", "cuda", "-tp", "2"]);
    refused(
        one,
        "rank 1 cannot use a GPU: device discovery: CUDA_ERROR_NO_DEVICE",
    );
    std::fs::remove_file(libraries.path().join("libnccl.so")).expect("removed");
    std::fs::remove_file(libraries.path().join("libnccl.so.2")).expect("removed");
    let without_nccl = launch(&libraries, "0,1", &["--device", "cuda", "-tp", "2"]);
    refused(
        without_nccl,
        "cannot use a GPU: libnccl not found: looked for libnccl.so,",
    );
}

#[test]
fn auto_takes_cpus_when_there_are_fewer_gpus_than_ranks() {
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let server = launch(&libraries, "0", &["-tp", "2"]);
    server.wait_ready();
    assert!(
        server.log_text().contains("not every rank has a GPU: using CPUs"),
        "{}",
        server.log_text()
    );
    assert!(!server.complete("Hello", 4).is_empty());
    assert!(server.stop().success());
}
