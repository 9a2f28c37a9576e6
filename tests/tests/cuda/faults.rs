//! Ranks that die or hang in the middle of a step.

use std::{
    thread,
    time::{Duration, Instant},
};

use phalanx_tests::{
    processes,
    server::{Server, assert_gone},
};
use rustix::process::Signal;
use softgpu::LibraryDir;

use crate::support::{alone, endless_stream, last_event, on_gpus};

/// From the loss of a rank to its report. Medians of a few runs are compared with it and with the next one, because a busy
/// machine may keep any one run waiting.
const NAMED: Duration = Duration::from_secs(1);
/// From the loss of a rank to the end of its peers' processes, which take half a second to say good-bye where a thread is
/// still in the driver. Without the end of their collectives it would be the step's limit, a minute.
const RELEASED: Duration = Duration::from_secs(2);
const RUNS: usize = 3;
/// When waiting is given up.
const LIMIT: Duration = Duration::from_secs(20);

/// From a signal to rank 1 until the coordinator has named it, and until both survivors have ended.
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
    let survivors: Vec<u32> = server
        .part("worker")
        .into_iter()
        .filter(|pid| *pid != victim)
        .collect();
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
        if !survivors.iter().any(|pid| processes::is_alive(*pid)) {
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
        named < NAMED && released < RELEASED,
        "named after {named:?}, peers gone after {released:?}"
    );
}

#[test]
fn a_killed_rank_is_named_within_a_second_and_its_peers_are_released() {
    assert_prompt(Signal::KILL, "its process was killed by signal 9");
}

#[test]
fn a_stopped_rank_is_named_within_a_second_and_its_peers_are_released() {
    assert_prompt(
        Signal::STOP,
        "its process was stopped by signal 19 and did not go on within 500ms",
    );
}
