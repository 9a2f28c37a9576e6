//! What GPUs write is what CPUs write, as far as CPUs are sure of it.

use std::thread;

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

/// Of all prompts at once: what a step batches differs from run to run.
fn answers(server: &Server) -> Vec<Value> {
    thread::scope(|scope| {
        let ask = |prompt| scope.spawn(move || answer(server, prompt));
        let asked: Vec<_> = PROMPTS.map(ask).into();
        let answers = asked.into_iter().map(|thread| thread.join().expect("an answer"));
        answers.collect()
    })
}

fn compared(expected: &[Value], found: &[Value], limits: [f64; 2]) -> usize {
    let pairs = expected.iter().zip(found);
    pairs
        .map(|(expected, found)| compare(expected, found, limits))
        .sum()
}

fn on_cpus(arguments: &[&str]) -> Vec<Value> {
    let server = Server::start(&[&SMALL[..], &["--device", "cpu"], arguments].concat());
    let answers = answers(&server);
    assert!(server.stop().success());
    answers
}

/// Compares token by token until the CPU's best two are closer than `decided`; returns how many tokens were compared.
/// Log-probabilities differ by less than `tolerance`.
fn compare(cpu: &Value, gpu: &Value, [decided, tolerance]: [f64; 2]) -> usize {
    for at in 0..TOKENS {
        let logprob = |answer: &Value| answer["token_logprobs"][at].as_f64().expect("a number");
        let best = cpu["top_logprobs"][at].as_object().expect("the best tokens");
        let mut best: Vec<f64> = best.values().filter_map(Value::as_f64).collect();
        best.sort_by(|a, b| b.total_cmp(a));
        if best[0] - best[1] < decided {
            return at;
        }
        assert_eq!(gpu["tokens"][at], cpu["tokens"][at], "token {at}:\n{cpu}\n{gpu}");
        let difference = (logprob(gpu) - logprob(cpu)).abs();
        assert!(
            difference < tolerance,
            "token {at} differs by {difference}:\n{cpu}\n{gpu}"
        );
    }
    TOKENS
}

/// What CPUs write, and GPUs with each of these sets of flags.
fn compare_with_cpus(runs: &[&[&str]]) {
    let libraries = LibraryDir::new().expect("the soft GPU");
    let expected = on_cpus(&[]);
    for arguments in runs {
        let server = on_gpus(&libraries, arguments);
        let compared = compared(&expected, &answers(&server), [DECIDED, TOLERANCE]);
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

/// Three bits of mantissa decide less than ten; CPUs and GPUs round K and V to the same ones.
#[test]
fn a_cache_of_fp8_writes_what_f16_decides() {
    const FP8: [&str; 4] = ["--kv-cache-dtype", "fp8", "-tp", "2"];
    /// As for f16, eight times as wide: three bits of mantissa fewer than bf16 has.
    const LIMITS: [f64; 2] = [8.0 * DECIDED, 8.0 * TOLERANCE];
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let (exact, fp8) = (on_cpus(&[]), on_cpus(&FP8));
    assert!(compared(&exact, &fp8, LIMITS) >= TOKENS);
    let server = on_gpus(&libraries, &FP8);
    let gpu = answers(&server);
    assert!(server.stop().success());
    // A value that bf16 products put on the other side of a midpoint moves by a whole step of E4M3.
    assert!(compared(&fp8, &gpu, LIMITS) >= TOKENS);
}

/// One row at a time, and three at a time that are padded to four: a graph gives the bits of its ops one by one.
#[test]
fn graphs_change_no_token() {
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let tokens = |server: &Server| -> Vec<Value> {
        let answers = answers(server).into_iter();
        answers.map(|mut answer| answer["tokens"].take()).collect()
    };
    let eager = on_gpus(&libraries, &["-tp", "2", "--enforce-eager"]);
    let expected = tokens(&eager);
    assert!(
        !eager.log_text().contains("graph capturing"),
        "{}",
        eager.log_text()
    );
    assert!(eager.stop().success());
    let arguments = ["-tp", "2", "--log-level", "info,phalanx_worker=trace"];
    let graphs = on_gpus(&libraries, &arguments);
    assert_eq!(tokens(&graphs), expected);
    let log = graphs.log_text();
    assert!(
        log.contains("graph capturing finished") && log.contains("replaying a graph"),
        "{log}"
    );
    assert!(graphs.stop().success());
}
