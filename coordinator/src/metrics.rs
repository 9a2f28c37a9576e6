//! What the coordinator counts and measures, under the names, labels and buckets that vLLM's dashboards expect, and a few
//! of our own (`phalanx_*`) for what vLLM has no name for.

mod families;
mod group;
mod speculation;
#[cfg(test)]
mod tests;

use std::{
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use phalanx_proto::v1::RankStatus;
use phalanx_shm::Segment;
use prometheus_client::{encoding::text, registry::Registry};

use self::{
    families::{ByLabel, EngineMetrics, RequestMetrics, RequestTimes, TokenMetrics, add},
    group::GroupMetrics,
    speculation::SpeculationMetrics,
};
use crate::engine::{EngineConfig, ExecutorError, FinishReason, Snapshot, StepStats};

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The numbers of one finished request, in the terms of vLLM's histograms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestStats {
    pub(crate) reason: FinishReason,
    pub(crate) num_prompt_tokens: usize,
    pub(crate) num_cached_tokens: usize,
    pub(crate) num_generation_tokens: usize,
    pub(crate) max_tokens: u32,
    pub(crate) num_preemptions: u32,
    /// Submission to end.
    pub(crate) e2e: Duration,
    /// Submission to the first step; none if it never ran.
    pub(crate) queue: Option<Duration>,
    /// First step to first token; none without a token, as for the two that follow.
    pub(crate) prefill: Option<Duration>,
    /// First token to last.
    pub(crate) decode: Option<Duration>,
}

/// Every metric of one engine. Recording takes no lock that is held for long; encoding may happen at any time.
pub struct Metrics {
    registry: Registry,
    engine: EngineMetrics,
    tokens: TokenMetrics,
    request: RequestMetrics,
    times: RequestTimes,
    group: GroupMetrics,
    /// Of the group that runs; its counters are read when somebody looks.
    segment: Mutex<Weak<Segment>>,
    speculation: SpeculationMetrics,
    admission_rejections: ByLabel,
}

impl Metrics {
    /// `model_name` is the served name, `max_model_len` bounds the buckets of token counts.
    pub fn new(model_name: &str, max_model_len: u32) -> Self {
        let label = |name: &'static str, value: &str| (name.into(), value.to_owned().into());
        let mut registry = Registry::with_labels([label("model_name", model_name)].into_iter());
        let admission_rejections = add(
            &mut registry,
            "vllm:admission_rejections",
            "Requests refused because a queue was full",
            ByLabel::default(),
        );
        for limit in ["max_num_queued_reqs", "max_num_queued_tokens"] {
            let _zero = admission_rejections.get_or_create(&[("reason", limit)]);
        }
        let labelled = registry.sub_registry_with_label(label("engine", "0"));
        let request = RequestMetrics::new(labelled, max_model_len);
        // A rate over a counter that appears only with its first event misses that event.
        for reason in ["stop", "length", "abort", "error"] {
            let _zero = request.success.get_or_create(&[("finished_reason", reason)]);
        }
        Self {
            engine: EngineMetrics::new(labelled),
            tokens: TokenMetrics::new(labelled),
            request,
            times: RequestTimes::new(labelled),
            group: GroupMetrics::new(labelled),
            segment: Mutex::default(),
            speculation: SpeculationMetrics::new(labelled),
            admission_rejections,
            registry,
        }
    }

    /// OpenMetrics text of everything.
    pub fn encode(&self) -> String {
        if let Some(segment) = self.segment.lock().ok().and_then(|segment| segment.upgrade()) {
            self.group.observe_barriers(&segment.barrier_counts());
        }
        let mut text = String::new();
        // Writing into a String cannot fail, and no metric here has an encoder of its own that could.
        if let Err(error) = text::encode(&mut text, &self.registry) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        text
    }

    pub(crate) fn engine_started(&self, config: &EngineConfig) {
        let labels = vec![
            ("block_size", config.block_size.to_string()),
            ("num_gpu_blocks", config.num_blocks.to_string()),
            ("enable_prefix_caching", config.enable_prefix_caching.to_string()),
        ];
        self.engine.cache_config_info.get_or_create(&labels).set(1);
        self.speculation.started(config.speculative.as_ref());
        self.group.epoch.set(config.epoch.into());
    }

    /// The engine's state after a turn; counters grow by the difference to the snapshot before.
    pub(crate) fn engine_turned(&self, before: &Snapshot, now: &Snapshot) {
        let m = &self.engine;
        m.num_requests_running.set(now.num_running as i64);
        m.num_requests_waiting.set(now.num_waiting as i64);
        let (capacity, deferred) = if now.paused {
            (0, now.num_waiting)
        } else {
            (now.num_waiting, 0)
        };
        self.waiting_by_reason(capacity as i64, deferred as i64);
        self.group.paused.set(now.paused.into());
        m.kv_cache_usage_perc.set(now.kv_cache_usage());
        m.num_preemptions
            .inc_by(now.num_preemptions - before.num_preemptions);
        m.prefix_cache_queries
            .inc_by(now.prefix_cache_queries - before.prefix_cache_queries);
        m.prefix_cache_hits
            .inc_by(now.prefix_cache_hits - before.prefix_cache_hits);
        self.speculation.grew(&before.speculation, &now.speculation);
        self.group.epoch.set(now.epoch.into());
    }

    /// Nothing runs or waits any more, however the engine ended.
    pub(crate) fn engine_ended(&self) {
        let m = &self.engine;
        m.num_requests_running.set(0);
        m.num_requests_waiting.set(0);
        self.waiting_by_reason(0, 0);
        m.kv_cache_usage_perc.set(0.0);
    }

    fn waiting_by_reason(&self, capacity: i64, deferred: i64) {
        for (reason, count) in [("capacity", capacity), ("deferred", deferred)] {
            self.engine
                .num_requests_waiting_by_reason
                .get_or_create(&[("reason", reason)])
                .set(count);
        }
    }

    pub(crate) fn stepped(&self, step: &StepStats) {
        self.engine.iteration_tokens.observe(step.num_tokens as f64);
        let m = &self.group;
        m.steps.inc();
        m.step_seconds.observe(step.took.as_secs_f64());
        m.step_forward_seconds.observe(step.forward.as_secs_f64());
        m.step_rows.observe(step.num_rows as f64);
    }

    /// The state of every rank, as its stream tells it.
    pub(crate) fn ranks(&self, ranks: &[RankStatus]) {
        self.group.observe_ranks(ranks);
    }

    /// A group has been formed over `segment`.
    pub(crate) fn group_formed(&self, segment: &Arc<Segment>) {
        self.group.segment_bytes.set(segment.shape().total_bytes() as i64);
        if let Ok(mut current) = self.segment.lock() {
            *current = Arc::downgrade(segment);
        }
    }

    pub(crate) fn group_lost(&self, cause: &ExecutorError) {
        if matches!(cause, ExecutorError::RankLost { .. }) {
            self.group.ranks_lost.inc();
        }
    }

    pub(crate) fn group_recovered(&self, took: Duration) {
        self.group.recovery_seconds.observe(took.as_secs_f64());
    }

    /// `limit` is the name of the setting that refused the request.
    pub(crate) fn rejected(&self, limit: &'static str) {
        self.admission_rejections
            .get_or_create(&[("reason", limit)])
            .inc();
    }

    /// The prompt has been computed; `since_submission` is the time to first token.
    pub(crate) fn first_token(
        &self,
        num_prompt_tokens: usize,
        num_cached: usize,
        since_submission: Duration,
    ) {
        let m = &self.tokens;
        m.prompt.inc_by(num_prompt_tokens as u64);
        m.prompt_cached.inc_by(num_cached as u64);
        // KV lies nowhere but with the ranks.
        m.prompt_cached_by_source
            .get_or_create(&[("source", "device")])
            .inc_by(num_cached as u64);
        for (source, count) in [
            ("local_compute", num_prompt_tokens - num_cached),
            ("local_cache_hit", num_cached),
        ] {
            m.prompt_by_source
                .get_or_create(&[("source", source)])
                .inc_by(count as u64);
        }
        m.generation.inc();
        m.time_to_first_token.observe(since_submission.as_secs_f64());
    }

    pub(crate) fn next_token(&self, since_last: Duration) {
        self.tokens.generation.inc();
        self.tokens.inter_token_latency.observe(since_last.as_secs_f64());
    }

    pub(crate) fn request_finished(&self, stats: &RequestStats) {
        let m = &self.request;
        let reason = match stats.reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Repetition => "repetition",
            FinishReason::Abort => "abort",
            FinishReason::NotFinite => {
                m.corrupted.inc();
                "error"
            }
        };
        m.success.get_or_create(&[("finished_reason", reason)]).inc();
        m.prompt_tokens.observe(stats.num_prompt_tokens as f64);
        m.generation_tokens.observe(stats.num_generation_tokens as f64);
        m.params_max_tokens.observe(stats.max_tokens.into());
        m.num_preemptions.observe(stats.num_preemptions.into());
        self.times.e2e.observe(stats.e2e.as_secs_f64());
        if let Some(queue) = stats.queue {
            self.times.queue.observe(queue.as_secs_f64());
        }
        let (Some(prefill), Some(decode)) = (stats.prefill, stats.decode) else {
            return;
        };
        self.times.prefill.observe(prefill.as_secs_f64());
        self.times.decode.observe(decode.as_secs_f64());
        self.times.inference.observe((prefill + decode).as_secs_f64());
        m.prefill_kv_computed_tokens
            .observe((stats.num_prompt_tokens - stats.num_cached_tokens) as f64);
        if stats.num_generation_tokens > 1 {
            let per_token = decode.as_secs_f64() / (stats.num_generation_tokens - 1) as f64;
            self.times.time_per_output_token.observe(per_token);
        }
    }

    /// A request's completions, each of so many tokens, have all ended.
    pub(crate) fn request_completed(&self, generated: impl ExactSizeIterator<Item = u32>) {
        self.request.params_n.observe(generated.len() as f64);
        let longest = generated.max().unwrap_or(0);
        self.request.max_num_generation_tokens.observe(longest.into());
    }

    /// A request ended with an error of ours rather than with tokens.
    pub(crate) fn request_failed(&self) {
        self.request
            .success
            .get_or_create(&[("finished_reason", "error")])
            .inc();
    }
}
