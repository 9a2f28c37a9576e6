//! What GPUs write is what CPUs write, as far as CPUs are sure of it.

use phalanx_tests::{http, server::Server};
use serde_json::{Value, json};
use softgpu::LibraryDir;

use crate::support::{SMALL, alone, on_gpus};

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

/// What CPUs write, and GPUs with each of these sets of flags.
fn compare_with_cpus(runs: &[&[&str]]) {
    let libraries = LibraryDir::new().expect("the soft GPU");
    let cpu = Server::start(&[&SMALL[..], &["--device", "cpu"]].concat());
    let expected = answers(&cpu);
    assert!(cpu.stop().success());
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
fn one_gpu_writes_what_cpus_write() {
    let _alone = alone();
    compare_with_cpus(&[&["-tp", "1"]]);
}

#[test]
fn several_gpus_write_what_cpus_write() {
    let _alone = alone();
    // Reduce style by default; 9 query heads over 3 KV heads, unevenly over 2 ranks; columns are gathered, too.
    compare_with_cpus(&[
        &["-tp", "2"],
        &["-tp", "3"],
        &["-tp", "2", "--disable-custom-all-reduce"],
        &["-tp", "2", "--tensor-parallel-style", "gather"],
    ]);
}
