//! The same greedy text, and the same bits of every log-probability, at any number of ranks, in chunks, under memory
//! pressure that forces preemption, and from the prefix cache.

use std::thread;

use phalanx_tests::{http, server::Server};
use serde_json::{Value, json};

/// Longer than two blocks, so that the prefix cache has something to give.
const PROMPTS: [&str; 4] = [
    "Isaac Newton published his three laws of motion in 1687. They describe how a body moves when forces act on it, and \
     every engineer learns them. The three laws of motion are",
    "# A module of small exercises in recursion, with the usual examples from the first week of a programming course: \
     factorials, towers, and the sequence that everybody knows.\ndef fibonacci(n):",
    "Once upon a time, in a village by the sea, where the houses were painted in all the colours of the rainbow and the \
     fishermen went out every morning before dawn, there lived",
    "The periodic table lists every element with a symbol of one or two letters, many of which come from Latin names. \
     The chemical symbols of gold, silver and iron are",
];

/// Text and log-probabilities (the chosen token's and the best five) of every prompt, all at once. JSON numbers are
/// written so that they read back to the same bits.
fn answers(server: &Server, max_tokens: u32) -> Vec<Value> {
    let answer = |prompt: &str| {
        let body = json!({"model": "demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 5});
        let reply = http::post(&server.address, "/v1/completions", &body).expect("a reply");
        assert_eq!(reply.status, 200, "{}", reply.text());
        let choice = reply.json()["choices"][0].clone();
        json!({"text": choice["text"], "logprobs": choice["logprobs"]})
    };
    thread::scope(|scope| {
        let requests: Vec<_> = PROMPTS
            .iter()
            .map(|prompt| scope.spawn(move || answer(prompt)))
            .collect();
        requests
            .into_iter()
            .map(|request| request.join().expect("no panic"))
            .collect()
    })
}

#[test]
fn one_two_and_three_ranks_write_the_same() {
    let run = |arguments: &[&str]| {
        let server = Server::start(arguments);
        let answers = answers(&server, 32);
        assert_eq!(self::answers(&server, 32), answers, "from the prefix cache");
        assert!(
            server
                .metric("vllm:prefix_cache_hits_total")
                .is_some_and(|hits| hits > 0.0)
        );
        server.wait_idle();
        assert!(server.stop().success());
        answers
    };
    let one = run(&["--tensor-parallel-size", "1"]);
    assert!(
        one.iter()
            .all(|answer| answer["text"].as_str().is_some_and(|text| text.len() > 20)),
        "{one:?}"
    );
    assert_eq!(run(&["-tp", "2"]), one);
    assert_eq!(run(&["-tp", "3", "--threads-per-rank", "1"]), one);
    assert_eq!(
        run(&[
            "-tp",
            "2",
            "--rank-weights",
            "1,2",
            "--max-num-seqs",
            "4",
            "--max-num-batched-tokens",
            "7"
        ]),
        one,
        "chunked, uneven"
    );
}

#[test]
fn a_tiny_pool_preempts_and_every_text_stays_the_same() {
    let roomy = Server::start(&["-tp", "2", "--max-model-len", "256"]);
    let want = answers(&roomy, 120);
    assert_eq!(roomy.metric("vllm:num_preemptions_total"), Some(0.0));
    assert!(roomy.stop().success());
    // 20 blocks of 16 tokens: four sequences of about 130 tokens do not fit together.
    let tiny = Server::start(&[
        "-tp",
        "2",
        "--max-model-len",
        "256",
        "--num-gpu-blocks-override",
        "20",
    ]);
    assert_eq!(answers(&tiny, 120), want);
    assert!(tiny.metric("vllm:num_preemptions_total").expect("counted") > 0.0);
    tiny.wait_idle();
    assert!(tiny.stop().success());
}
