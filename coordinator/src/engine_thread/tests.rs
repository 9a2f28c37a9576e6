//! The thread with real channels over the simulated ranks.

use std::sync::mpsc::Receiver;

use phalanx_proto::step::{StepMasks, StepOutput, StepPlan};

use super::*;
use crate::engine::{
    PauseMode,
    sim::{Faults, Prng, SimExecutor, VOCAB_SIZE, oracle},
};

const DEADLINE: std::time::Duration = std::time::Duration::from_secs(20);

/// Ranks that begin a step only when the test lets them, or freely once the gate is dropped.
struct Gated {
    ranks: SimExecutor,
    gate: Receiver<()>,
}

impl Executor for Gated {
    fn submit(&mut self, plan: &StepPlan) -> Result<(), ExecutorError> {
        let _open = self.gate.recv();
        self.ranks.submit(plan)
    }
    fn post_masks(&mut self, masks: &StepMasks) -> Result<(), ExecutorError> {
        self.ranks.post_masks(masks)
    }
    fn wait(&mut self, step: u64, limit: std::time::Duration) -> Result<StepOutput, ExecutorError> {
        self.ranks.wait(step, limit)
    }
    fn rebuild(&mut self) -> Result<u32, ExecutorError> {
        self.ranks.rebuild()
    }
}

struct Engine {
    handle: EngineHandle,
    thread: JoinHandle<Result<(), EngineFailure>>,
    metrics: Arc<Metrics>,
    gate: Sender<()>,
}

fn config() -> EngineThreadConfig {
    let mut engine = EngineConfig::new(40, 256, VOCAB_SIZE);
    engine.block_size = 4;
    engine.max_num_seqs = 8;
    engine.max_num_batched_tokens = 32;
    EngineThreadConfig::new(engine)
}

fn start(config: EngineThreadConfig, faults: Faults) -> Engine {
    let metrics = Arc::new(Metrics::new("sim", 256));
    let (gate, permits) = channel();
    let ranks = Gated {
        ranks: SimExecutor::new(&config.engine, faults),
        gate: permits,
    };
    let (handle, thread) = spawn_engine(config, ranks, Arc::clone(&metrics)).expect("starts");
    Engine {
        handle,
        thread,
        metrics,
        gate,
    }
}

fn sequence(prompt: Vec<u32>, max_tokens: u32) -> NewSequence {
    NewSequence {
        prompt,
        output: vec![],
        sampling: SamplingParams::GREEDY,
        stop: StopRules {
            max_tokens,
            min_tokens: 0,
            stop_token_ids: vec![],
            repetition: None,
        },
        constraint: Constraint::default(),
        priority: 0,
        cache_salt: None,
        tenant: TenantId::default(),
    }
}

/// What the oracle says that a submission must yield.
fn expected(id: SequenceId, new: &NewSequence) -> Vec<u32> {
    let request = EngineRequest {
        id,
        prompt: new.prompt.clone(),
        output: vec![],
        sampling: new.sampling.clone(),
        stop: new.stop.clone(),
        constraint: Box::new(new.constraint.clone()),
        priority: 0,
        cache_salt: None,
        tenant: TenantId::default(),
    };
    oracle(&request).0
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .expect("within the deadline")
}

/// Reads to the end: tokens and the last event, after which there must be none.
async fn read(submission: &mut Submission) -> (Vec<u32>, StreamEvent) {
    let mut tokens = Vec::new();
    loop {
        match within(submission.events.recv()).await.expect("an end") {
            StreamEvent::Started { .. } => assert!(tokens.is_empty()),
            StreamEvent::Token(sampled) => tokens.push(sampled.token),
            end => {
                assert!(within(submission.events.recv()).await.is_none());
                return (tokens, end);
            }
        }
    }
}

fn failure(end: StreamEvent) -> ErrorKind {
    match end {
        StreamEvent::Failed(error) => error.kind,
        other => panic!("ended with {other:?}"),
    }
}

#[tokio::test]
async fn a_pause_is_answered_and_seen_and_ends_with_a_resume() {
    let engine = start(config(), Faults::default());
    drop(engine.gate);
    let handle = &engine.handle;
    assert_eq!(within(handle.pause(PauseMode::Wait, true)).await, Ok(true));
    assert!(handle.status().snapshot.paused);
    let new = sequence(vec![1, 2, 3], 4);
    let mut held = handle.submit(new.clone()).expect("admitted");
    within(handle.reset_prefix_cache(true))
        .await
        .expect("while paused");
    assert!(held.events.try_recv().is_err(), "it waits");
    assert!(
        engine
            .metrics
            .encode()
            .contains("phalanx_paused{model_name=\"sim\",engine=\"0\"} 1")
    );
    within(handle.resume()).await.expect("resumed");
    assert!(!handle.status().snapshot.paused);
    assert_eq!(read(&mut held).await.0, expected(held.id, &new));
}

#[tokio::test]
async fn a_resume_answers_who_waits_for_a_pause() {
    let engine = start(config(), Faults::default());
    let handle = engine.handle.clone();
    let new = sequence(vec![1, 2, 3], 4);
    let mut running = handle.submit(new.clone()).expect("admitted");
    // All three find the engine in the first step, and are sent in this order.
    let pause = handle.pause(PauseMode::Wait, false);
    let (paused, resumed, ()) =
        within(async { tokio::join!(pause, handle.resume(), async { drop(engine.gate) }) }).await;
    assert_eq!((paused, resumed), (Ok(false), Ok(())));
    assert_eq!(read(&mut running).await.0, expected(running.id, &new));
    handle.shutdown();
    within(async { while handle.pause(PauseMode::Keep, false).await.is_ok() {} }).await;
    assert_eq!(
        handle.resume().await.expect_err("the engine has ended").kind,
        ErrorKind::Unavailable
    );
}

async fn drain(handle: &EngineHandle) {
    handle.drain();
    within(handle.drained()).await;
}

fn assert_metric(metrics: &Metrics, line: &str) {
    let text = metrics.encode();
    assert!(text.lines().any(|it| it == line), "{line} not in\n{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_streams_get_the_oracles_tokens_over_lost_ranks() {
    let faults = Faults {
        one_in: 8,
        most: 20,
        seed: 3,
        ..Faults::default()
    };
    let mut config = config();
    config.engine.max_step_failures = 100;
    let engine = start(config, faults);
    drop(engine.gate);
    let mut prng = Prng(11);
    let mut readers = Vec::new();
    for _ in 0..40 {
        let prompt = (0..prng.range(1, 40)).map(|_| prng.below(200) as u32).collect();
        let new = sequence(prompt, prng.range(1, 30));
        let mut submission = engine.handle.submit(new.clone()).expect("room in the queue");
        readers.push(tokio::spawn(async move {
            let (tokens, end) = read(&mut submission).await;
            assert!(matches!(end, StreamEvent::Finished(FinishReason::Length)));
            assert_eq!(tokens, expected(submission.id, &new));
        }));
    }
    for reader in readers {
        reader.await.expect("tokens as expected");
    }
    drain(&engine.handle).await;
    let status = engine.handle.status();
    assert_eq!(status.state, EngineState::Drained);
    assert!(status.last_step.is_some() && status.snapshot.epoch > 0);
    let labels = r#"model_name="sim",engine="0""#;
    for gauge in [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
    ] {
        let zero = if gauge.ends_with("perc") { "0.0" } else { "0" };
        assert_metric(&engine.metrics, &format!("{gauge}{{{labels}}} {zero}"));
    }
    assert_metric(
        &engine.metrics,
        &format!(r#"vllm:request_success_total{{{labels},finished_reason="length"}} 40"#),
    );
    assert_metric(
        &engine.metrics,
        &format!("vllm:e2e_request_latency_seconds_count{{{labels}}} 40"),
    );
    engine.handle.shutdown();
    assert_eq!(engine.thread.join().expect("no panic"), Ok(()));
    assert_eq!(engine.handle.status().state, EngineState::Stopped);
}

#[tokio::test]
async fn dropping_a_submission_aborts_within_a_step() {
    let engine = start(config(), Faults::default());
    let mut dropped = engine.handle.submit(sequence(vec![1; 20], 100)).expect("room");
    engine.gate.send(()).expect("the engine runs");
    let first = within(dropped.events.recv()).await;
    assert!(matches!(first, Some(StreamEvent::Started { cached_tokens: 0 })));
    drop(dropped);
    // It may be in its second step by now, but never gets a third.
    engine.gate.send(()).expect("the engine runs");
    drain(&engine.handle).await;
    let snapshot = engine.handle.status().snapshot;
    assert!(snapshot.num_steps <= 2, "{snapshot:?}");
    assert_eq!(snapshot.num_free_blocks, snapshot.num_blocks);
    assert_metric(
        &engine.metrics,
        r#"vllm:request_success_total{model_name="sim",engine="0",finished_reason="abort"} 1"#,
    );
}

#[tokio::test]
async fn a_slow_reader_loses_its_own_stream_only() {
    let mut config = config();
    config.stream_capacity = 4;
    let engine = start(config, Faults::default());
    let mut slow = engine.handle.submit(sequence(vec![1, 2], 60)).expect("room");
    let short = sequence(vec![3, 4], 3);
    let mut other = engine.handle.submit(short.clone()).expect("room");
    drop(engine.gate);
    drain(&engine.handle).await;
    let (tokens, end) = read(&mut slow).await;
    assert_eq!((tokens.len(), failure(end)), (3, ErrorKind::QueueFull));
    let (tokens, end) = read(&mut other).await;
    assert!(matches!(end, StreamEvent::Finished(FinishReason::Length)));
    assert_eq!(tokens, expected(other.id, &short));
    assert!(
        engine.handle.status().snapshot.num_steps < 20,
        "the rest is not computed"
    );
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_recovers() {
    let mut config = config();
    config.max_num_queued_reqs = 1;
    config.engine.max_num_seqs = 1;
    let engine = start(config, Faults::default());
    let submit = || engine.handle.submit(sequence(vec![1], 2));
    let (mut a, mut b) = (submit().expect("room"), submit().expect("room"));
    assert_eq!(submit().expect_err("full").kind, ErrorKind::QueueFull);
    assert_metric(
        &engine.metrics,
        r#"vllm:admission_rejections_total{model_name="sim",reason="max_num_queued_reqs"} 1"#,
    );
    drop(engine.gate);
    read(&mut a).await;
    read(&mut b).await;
    assert!(matches!(
        read(&mut submit().expect("room again")).await.1,
        StreamEvent::Finished(_)
    ));
}

#[tokio::test]
async fn a_fatal_loss_fails_every_stream_and_later_submissions() {
    let faults = Faults {
        poison: Some(SequenceId(1)),
        max_rebuilds: Some(0),
        ..Faults::default()
    };
    let engine = start(config(), faults);
    let mut streams: Vec<_> = (0..3)
        .map(|_| engine.handle.submit(sequence(vec![1, 2], 40)).expect("room"))
        .collect();
    drop(engine.gate);
    for stream in &mut streams {
        let kind = failure(read(stream).await.1);
        // One that was still in the inbox never reached the engine.
        assert!(matches!(kind, ErrorKind::WorkerLost | ErrorKind::Unavailable));
    }
    let failure = engine.thread.join().expect("no panic").expect_err("fatal");
    assert!(matches!(failure, EngineFailure::NotRebuilt { .. }));
    let refused = engine.handle.submit(sequence(vec![1], 1)).expect_err("refused");
    assert_eq!(refused.kind, ErrorKind::Unavailable);
    assert_eq!(engine.handle.status().state, EngineState::Failed);
    within(engine.handle.drained()).await;
    assert_metric(
        &engine.metrics,
        r#"phalanx_ranks_lost_total{model_name="sim",engine="0"} 1"#,
    );
    assert_metric(
        &engine.metrics,
        r#"vllm:num_requests_running{model_name="sim",engine="0"} 0"#,
    );
}

#[tokio::test]
async fn draining_finishes_what_was_admitted_and_refuses_the_rest() {
    let engine = start(config(), Faults::default());
    let mut admitted = engine.handle.submit(sequence(vec![1, 2], 5)).expect("room");
    engine.handle.drain();
    let refused = engine.handle.submit(sequence(vec![1], 1)).expect_err("refused");
    assert_eq!(refused.kind, ErrorKind::Unavailable);
    assert_eq!(engine.handle.status().state, EngineState::Draining);
    drop(engine.gate);
    let (tokens, end) = read(&mut admitted).await;
    assert!(matches!(end, StreamEvent::Finished(FinishReason::Length)));
    assert_eq!(tokens.len(), 5);
    within(engine.handle.drained()).await;
}

#[tokio::test]
async fn shutting_down_ends_open_streams() {
    let engine = start(config(), Faults::default());
    let mut open = engine.handle.submit(sequence(vec![1, 2], 150)).expect("room");
    engine.handle.shutdown();
    drop(engine.gate);
    assert_eq!(failure(read(&mut open).await.1), ErrorKind::Unavailable);
    assert_eq!(engine.thread.join().expect("no panic"), Ok(()));
}

#[tokio::test]
async fn a_panic_ends_open_streams_too() {
    struct Broken;
    impl Executor for Broken {
        fn submit(&mut self, _: &StepPlan) -> Result<(), ExecutorError> {
            panic!("planted");
        }
        fn post_masks(&mut self, _: &StepMasks) -> Result<(), ExecutorError> {
            Err(ExecutorError::Closed)
        }
        fn wait(&mut self, step: u64, _: std::time::Duration) -> Result<StepOutput, ExecutorError> {
            Err(ExecutorError::Deadline { step })
        }
        fn rebuild(&mut self) -> Result<u32, ExecutorError> {
            Err(ExecutorError::Closed)
        }
    }
    let metrics = Arc::new(Metrics::new("sim", 256));
    let (handle, thread) = spawn_engine(config(), Broken, metrics).expect("starts");
    let mut open = handle.submit(sequence(vec![1, 2], 2)).expect("room");
    assert_eq!(failure(read(&mut open).await.1), ErrorKind::Unavailable);
    assert!(thread.join().is_err());
    assert_eq!(handle.status().state, EngineState::Failed);
}

#[tokio::test]
async fn a_request_that_can_never_run_is_refused_before_the_queue() {
    let engine = start(config(), Faults::default());
    let refused = |new| engine.handle.submit(new).expect_err("refused");
    let long = refused(sequence(vec![1; 100], 100));
    assert_eq!(long.kind, ErrorKind::ContextLengthExceeded);
    assert_eq!(
        long.message,
        "100 prompt tokens and 100 to generate need 50 KV blocks, the cache has 40, which is room for 161 tokens"
    );
    let mut odd = sequence(vec![1], 1);
    odd.sampling.top_p = f32::NAN;
    let odd = refused(odd);
    assert_eq!(
        (odd.kind, odd.param.as_deref()),
        (ErrorKind::InvalidArgument, Some("top_p"))
    );
}

#[tokio::test]
async fn a_rank_lost_while_idle_is_replaced_without_a_request() {
    let engine = start(config(), Faults::default());
    let mut status = engine.handle.shared.status.subscribe();
    engine.handle.rank_lost(0, 1, "its stream ended");
    let recovered = within(status.wait_for(|status| status.snapshot.epoch == 1)).await;
    assert_eq!(recovered.expect("the engine runs").state, EngineState::Running);
}

#[test]
fn the_thread_ends_with_its_last_handle() {
    let engine = start(config(), Faults::default());
    drop(engine.handle);
    assert_eq!(engine.thread.join().expect("no panic"), Ok(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_counts_nowhere() {
    let engine = start(config(), Faults::default());
    drop(engine.gate);
    let mut probe = engine.handle.probe(sequence(vec![1, 2, 3], 2)).expect("queued");
    let (tokens, end) = read(&mut probe).await;
    assert!(tokens.len() == 2 && matches!(end, StreamEvent::Finished(FinishReason::Length)));
    drain(&engine.handle).await;
    let labels = r#"model_name="sim",engine="0""#;
    for name in [
        "vllm:generation_tokens_total",
        "vllm:prompt_tokens_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
    ] {
        assert_metric(&engine.metrics, &format!("{name}{{{labels}}} 0"));
    }
}
