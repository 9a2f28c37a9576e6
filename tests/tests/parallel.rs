//! The same greedy text at any number of ranks, and under memory pressure that forces preemption.

use std::thread;

use phalanx_tests::server::Server;

const PROMPTS: [&str; 4] = [
    "The three laws of motion are",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The chemical symbols of gold, silver and iron are",
];

fn texts(server: &Server, max_tokens: u32) -> Vec<String> {
    thread::scope(|scope| {
        let requests: Vec<_> = PROMPTS
            .iter()
            .map(|prompt| scope.spawn(move || server.complete(prompt, max_tokens)))
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
        let texts = texts(&server, 32);
        server.wait_idle();
        assert!(server.stop().success());
        texts
    };
    let one = run(&["--tensor-parallel-size", "1"]);
    assert!(one.iter().all(|text| text.len() > 20), "{one:?}");
    assert_eq!(run(&["-tp", "2"]), one);
    assert_eq!(run(&["-tp", "3", "--threads-per-rank", "1"]), one);
    assert_eq!(
        run(&[
            "-tp",
            "2",
            "--rank-weights",
            "1,2",
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
    let want = texts(&roomy, 120);
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
    assert_eq!(texts(&tiny, 120), want);
    assert!(tiny.metric("vllm:num_preemptions_total").expect("counted") > 0.0);
    tiny.wait_idle();
    assert!(tiny.stop().success());
}
