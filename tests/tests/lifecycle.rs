//! Starting, stopping, and dying: nothing is left behind, whoever goes first, and everybody is told why.
//! One test at a time: they look at the whole machine's /dev/shm.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use phalanx_tests::{
    demo_model, http,
    processes::{self, eventually},
    server::{Server, assert_gone, chat, free_port},
};
use rustix::process::Signal;
use serde_json::Value;

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn endless_stream(server: &Server) -> http::Stream {
    let mut body = chat("Tell me everything about trees.");
    body["stream"] = true.into();
    body["ignore_eos"] = true.into();
    body["max_tokens"] = 2000.into();
    let mut stream = http::open(&server.address, "/v1/chat/completions", &body).expect("a stream");
    for _ in 0..4 {
        stream.next_event().expect("an event").expect("not over");
    }
    stream
}

#[test]
fn sigterm_lets_streams_end_and_leaves_nothing() {
    let _alone = alone();
    let before = processes::segments();
    let server = Server::start(&["-tp", "2"]);
    assert_eq!(
        (server.part("worker").len(), server.part("gateway").len()),
        (2, 1)
    );
    assert_eq!(
        processes::segments(),
        before,
        "the segment has no name once everybody has mapped it"
    );
    let mut body = chat("Write a poem about rain.");
    body["stream"] = true.into();
    let mut stream = http::open(&server.address, "/v1/chat/completions", &body).expect("a stream");
    stream.next_event().expect("an event").expect("not over");
    let reader = thread::spawn(move || {
        let mut last = String::new();
        while let Some(data) = stream.next_event().expect("the stream is not cut") {
            last = data;
        }
        last
    });
    // Some supervisors signal the process and then its group.
    processes::kill(server.pid(), Signal::TERM);
    server.wait_logged("letting running requests end");
    assert!(server.stop().success());
    assert_eq!(reader.join().expect("no panic"), "[DONE]");
    assert_eq!(processes::segments(), before);
}

#[test]
fn a_killed_worker_ends_every_stream_with_a_clear_error() {
    let _alone = alone();
    let before = processes::segments();
    let mut server = Server::start(&["-tp", "2"]);
    let family = server.family();
    let mut stream = endless_stream(&server);
    let victim = processes::with_argument(&server.part("worker"), "1")[0];
    processes::kill(victim, Signal::KILL);
    let start = Instant::now();
    let mut error = Value::Null;
    while let Ok(Some(data)) = stream.next_event() {
        let event: Value = serde_json::from_str(&data).unwrap_or(Value::Null);
        if !event["error"].is_null() {
            error = event["error"].clone();
        }
    }
    assert_eq!(error["code"], "worker_lost", "{error}");
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|message| message.contains("rank 1")),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(!server.wait(Duration::from_secs(20)).success());
    let log = server.log_text();
    assert!(
        log.contains("rank 1 failed while serving: its process was killed by signal 9"),
        "{log}"
    );
    assert_gone(&family);
    assert_eq!(processes::segments(), before);
}

#[test]
fn a_stopped_worker_is_named_long_before_the_steps_limit() {
    let _alone = alone();
    let mut server = Server::start(&["-tp", "2"]);
    let family = server.family();
    let mut stream = endless_stream(&server);
    let victim = processes::with_argument(&server.part("worker"), "1")[0];
    processes::kill(victim, Signal::STOP);
    let mut last = String::new();
    while let Ok(Some(data)) = stream.next_event() {
        last = if data == "[DONE]" { last } else { data };
    }
    assert!(last.contains("worker_lost") || last.contains("error"), "{last}");
    assert!(!server.wait(Duration::from_secs(30)).success());
    let log = server.log_text();
    assert!(
        log.contains("rank 1 failed while serving: its process was stopped by signal 19"),
        "{log}"
    );
    assert_gone(&family);
}

#[test]
fn a_killed_coordinator_leaves_no_orphans() {
    let _alone = alone();
    let before = processes::segments();
    let mut server = Server::start(&["-tp", "2"]);
    let family = server.family();
    let stream = endless_stream(&server);
    processes::kill(server.pid(), Signal::KILL);
    server.wait(Duration::from_secs(5));
    assert_gone(&family);
    assert_eq!(processes::segments(), before);
    drop(stream);
}

#[test]
fn a_killed_gateway_comes_back_and_its_requests_are_freed() {
    let _alone = alone();
    let server = Server::start(&["-tp", "2"]);
    let stream = endless_stream(&server);
    let gateway = server.part("gateway")[0];
    processes::kill(gateway, Signal::KILL);
    drop(stream);
    eventually("a new gateway", Duration::from_secs(10), || {
        http::get(&server.address, "/health").is_ok_and(|reply| reply.status == 200)
    });
    server.wait_idle();
    assert!(!server.complete("Hello", 4).is_empty());
    assert!(server.stop().success());
}

#[test]
fn a_gateway_that_ends_by_itself_comes_back_too() {
    let _alone = alone();
    let server = Server::start(&[]);
    let gateway = server.part("gateway")[0];
    processes::kill(gateway, Signal::TERM);
    eventually("another gateway", Duration::from_secs(20), || {
        let now = server.part("gateway");
        !now.is_empty() && !now.contains(&gateway)
    });
    server.wait_ready();
    assert!(!server.complete("Hello", 4).is_empty());
    assert!(server.stop().success());
}

/// Sends what a terminal sends, to the group; then nothing is left: no process, no segment, no socket.
fn ends_clean_by(signals: &[Signal], streaming: bool) {
    let before = processes::segments();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("http.sock");
    let path = socket.to_string_lossy();
    let mut server = Server::launch_in_group(&demo_model().to_string_lossy(), &["-tp", "2", "--uds", &path]);
    server.wait_logged(" ready");
    eventually("the socket", Duration::from_secs(30), || socket.exists());
    let stream = streaming.then(|| {
        let body = r#"{"prompt": "a", "stream": true, "ignore_eos": true, "max_tokens": 4000}"#;
        let mut stream = UnixStream::connect(&socket).expect("a connection");
        let head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n";
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).expect("sent");
        let mut begin = [0; 12];
        stream.read_exact(&mut begin).expect("an answer");
        assert_eq!(&begin, b"HTTP/1.1 200");
        stream
    });
    let family = server.family();
    for (count, signal) in signals.iter().enumerate() {
        processes::kill_group(server.pid(), *signal);
        if count == 0 {
            server.wait_logged("letting running requests end");
        }
    }
    assert!(
        server.wait(Duration::from_secs(20)).success(),
        "{}",
        server.log_text()
    );
    assert_gone(&family);
    assert_eq!(processes::segments(), before);
    assert!(!socket.exists(), "the socket is left: {}", server.log_text());
    drop(stream);
}

#[test]
fn ctrl_c_and_hangup_leave_nothing() {
    let _alone = alone();
    ends_clean_by(&[Signal::INT], false);
    ends_clean_by(&[Signal::HUP], false);
    ends_clean_by(&[Signal::INT, Signal::INT], true);
}

#[test]
fn idle_costs_less_than_a_hundredth_of_a_core() {
    let _alone = alone();
    let server = Server::start(&["-tp", "2"]);
    server.complete("Warm up, then rest.", 16);
    server.wait_idle();
    let family = server.family();
    let used = || {
        family
            .iter()
            .map(|pid| processes::cpu_time(*pid))
            .sum::<Duration>()
    };
    let (before, start) = (used(), Instant::now());
    thread::sleep(Duration::from_secs(20));
    let share = (used() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    assert!(share < 0.01, "{:.2} % of a core", share * 100.0);
    assert!(server.stop().success());
}

#[test]
fn a_rank_takes_its_share_and_not_the_file() {
    let _alone = alone();
    // A small workspace and KV cache, so that what is left is weights.
    let small = [
        "-tp",
        "3",
        "--max-model-len",
        "256",
        "--num-gpu-blocks-override",
        "16",
    ];
    let steps = ["--max-num-seqs", "8", "--max-num-batched-tokens", "64"];
    let server = Server::start(&[small.as_slice(), steps.as_slice()].concat());
    let file = std::fs::metadata(demo_model()).expect("the model").len();
    let workers = server.part("worker");
    assert_eq!(workers.len(), 3);
    for worker in workers {
        // A third of the weights and a process are about 64 MB. The peak moves by some 20 MB with how much of the file
        // the kernel maps around a read; a rank that kept the file mapped, or all weights, would be far above.
        let (_, peak) = processes::rss(worker);
        assert!(peak < file, "peak {peak} of a file of {file}");
    }
    assert!(server.stop().success());
}

#[test]
fn a_start_that_cannot_work_ends_with_one_clear_line() {
    let _alone = alone();
    let before = processes::segments();
    let ends = |model: &str, extra: &[&str], word: &str| {
        let mut server = Server::launch(model, extra);
        let status = server.wait(Duration::from_secs(20));
        assert!(!status.success());
        assert!(
            server.log_text().contains(word),
            "{word:?} not in: {}",
            server.log_text()
        );
    };
    let model = demo_model().to_string_lossy().into_owned();
    ends("/nowhere/model.gguf", &[], "/nowhere/model.gguf");
    ends(&model, &["-tp", "10"], "9");
    ends(&model, &["--max-model-len", "1000000"], "max_model_len");
    ends(&model, &["--kv-cache-memory-bytes", "1Mi"], "KV cache");
    let truncated = tempfile::NamedTempFile::with_suffix(".gguf").expect("a temporary file");
    let bytes = std::fs::read(demo_model()).expect("the model");
    std::fs::write(truncated.path(), &bytes[..bytes.len() / 2]).expect("written");
    ends(&truncated.path().to_string_lossy(), &["-tp", "2"], "tensor");
    let port = free_port();
    let taken = std::net::TcpListener::bind(("127.0.0.1", port)).expect("bound");
    ends(&model, &["--port", &port.to_string()], &port.to_string());
    drop(taken);
    assert_eq!(processes::segments(), before);
}
