//! `--trace-file`: one file in Chrome's Trace Event Format, written by the engine and by every rank.

use std::time::Duration;

use phalanx_tests::{
    http,
    server::{Server, chat},
};
use serde_json::Value;

/// The format allows an array to lack its end, and a JSON parser does not.
fn events(text: &str) -> Vec<Value> {
    let whole = format!("{}]", text.trim_end().trim_end_matches(','));
    serde_json::from_str(&whole).expect("the file is an array but for its end")
}

fn spans<'a>(events: &'a [Value], row: u64, name: &str) -> Vec<&'a Value> {
    let is = |event: &&Value| event["ph"] == "X" && event["pid"] == row && event["name"] == name;
    events.iter().filter(is).collect()
}

/// Start and end in microseconds.
fn extent(span: &Value) -> (f64, f64) {
    let start = span["ts"].as_f64().expect("a time");
    (start, start + span["dur"].as_f64().expect("a duration"))
}

#[test]
fn engine_and_ranks_write_what_they_did() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("trace.json");
    let file = path.to_str().expect("UTF-8");
    let server = Server::start(&["-tp", "2", "--trace-file", file, "--trace-steps", "20"]);
    let mut body = chat("Count from one to ten.");
    body["max_tokens"] = 40.into();
    body["ignore_eos"] = true.into();
    let reply = http::post(&server.address, "/v1/chat/completions", &body).expect("a reply");
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(server.stop().success());

    let events = events(&std::fs::read_to_string(&path).expect("a trace"));
    assert_eq!(spans(&events, 0, "wait").len(), 20);
    for rank in [1, 2] {
        let steps = spans(&events, rank, "step");
        assert_eq!(steps.len(), 20, "of 41 that there were");
        // 30 layers, each with one attention and, in gather style, four gathers; the embedding's is one more.
        assert_eq!(spans(&events, rank, "paged_attention").len(), 20 * 30);
        assert_eq!(spans(&events, rank, "all_gather").len(), 20 * (4 * 30 + 1));
        let (start, end) = extent(steps[7]);
        let within = spans(&events, rank, "down_proj").into_iter().filter(|span| {
            let (first, last) = extent(span);
            start <= first && last <= end
        });
        assert_eq!(within.count(), 30, "a step's ops lie within it");
    }
    // Of the same clock: a rank's step lies within the engine's submission and its wait.
    let (submitted, _) = extent(spans(&events, 0, "submit")[7]);
    let (_, received) = extent(spans(&events, 0, "wait")[7]);
    let (start, end) = extent(spans(&events, 1, "step")[7]);
    assert!(submitted <= start && start < received && end - start < received - submitted + 1e3);
}

#[test]
fn a_file_that_cannot_be_written_ends_the_start() {
    let missing = ["--trace-file", "/nonexistent/trace.json"];
    let mut server = Server::launch(&phalanx_tests::demo_model().to_string_lossy(), &missing);
    assert!(!server.wait(Duration::from_secs(30)).success());
    let log = server.log_text();
    assert!(log.contains("--trace-file: No such file or directory"), "{log}");
}
