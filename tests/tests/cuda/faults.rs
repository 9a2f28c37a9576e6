//! Ranks that die or hang in the middle of a step.

use std::{
    thread,
    time::{Duration, Instant},
};

use phalanx_tests::{
    processes::{self, eventually},
    server::{Server, assert_gone},
};
use rustix::process::Signal;
use softgpu::LibraryDir;

use crate::support::{alone, endless_stream, last_event, on_gpus};

/// From the loss of a rank to its report, and to the end of its peers' collectives. Medians of a few runs are compared
/// with it, because a busy machine may keep any one of them waiting.
const PROMPT: Duration = Duration::from_secs(1);
const RUNS: usize = 3;
/// When waiting is given up.
const LIMIT: Duration = Duration::from_secs(20);

/// From a signal to rank 1 until the coordinator has named it, and until both survivors have left their collectives.
struct Times {
    named: Duration,
    released: Duration,
}

/// Sends `signal` to rank 1 of three in the middle of a step, and checks what everybody says about it: `cause` is what
/// the coordinator, the client and the last line must name.
fn lose_rank_1(libraries: &LibraryDir, signal: Signal, cause: &str) -> Times {
    let mut server = on_gpus(libraries, &["-tp", "3"]);
    let family = server.family();
    let stream = endless_stream(&server);
    let victim = processes::with_argument(&server.part("worker"), "1")[0];
    processes::kill(victim, signal);
    let lost = Instant::now();
    let (mut named, mut released) = (None, None);
    while named.is_none() || released.is_none() {
        let log = server.log_text();
        if named.is_none()
            && log
                .lines()
                .any(|line| line.contains("rank failed") && line.contains(cause))
        {
            named = Some(lost.elapsed());
        }
        if log.matches("the group ended").count() >= 2 {
            released = released.or(Some(lost.elapsed()));
        }
        assert!(
            lost.elapsed() < LIMIT,
            "named {named:?}, released {released:?}:\n{log}"
        );
        thread::sleep(Duration::from_millis(2));
    }
    let last = last_event(stream);
    assert!(last.contains(&format!("rank 1 lost: {cause}")), "{last}");
    assert!(!server.wait(LIMIT).success());
    assert_gone(&family);
    assert_last_line(&server, &format!("phalanx: rank 1 failed while serving: {cause}"));
    Times {
        named: named.unwrap_or_default(),
        released: released.unwrap_or_default(),
    }
}

fn assert_last_line(server: &Server, expected: &str) {
    let log = server.log_text();
    let last = log.lines().last().unwrap_or_default();
    assert_eq!(last, expected, "{log}");
}

fn assert_prompt(signal: Signal, cause: &str) {
    let _alone = alone();
    let libraries = LibraryDir::new().expect("the soft GPU");
    let runs: Vec<Times> = (0..RUNS)
        .map(|_| lose_rank_1(&libraries, signal, cause))
        .collect();
    let median = |time: fn(&Times) -> Duration| {
        let mut times: Vec<Duration> = runs.iter().map(time).collect();
        times.sort();
        times[RUNS / 2]
    };
    let (named, released) = (median(|times| times.named), median(|times| times.released));
    assert!(
        named < PROMPT && released < PROMPT,
        "named after {named:?}, peers released after {released:?}"
    );
}

#[test]
fn a_killed_rank_is_named_and_its_peers_are_released_within_a_second() {
    assert_prompt(Signal::KILL, "its process was killed by signal 9");
}

#[test]
fn a_stopped_rank_is_named_and_its_peers_are_released_within_a_second() {
    assert_prompt(
        Signal::STOP,
        "its process was stopped by signal 19 and did not go on within 500ms",
    );
}
