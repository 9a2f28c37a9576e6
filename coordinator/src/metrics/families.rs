//! The metrics themselves: names, help texts, labels and buckets.

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Metric, Registry},
};

pub(super) type FloatGauge = Gauge<f64, std::sync::atomic::AtomicU64>;
type OneLabel = [(&'static str, &'static str); 1];
pub(super) type ByLabel = Family<OneLabel, Counter>;

const TTFT_BUCKETS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const TOKEN_LATENCY_BUCKETS: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
pub(super) const REQUEST_LATENCY_BUCKETS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
pub(super) const ITERATION_TOKENS_BUCKETS: [f64; 13] = [
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];

/// Registers and returns a metric.
pub(super) fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

/// The same under a name that vLLM once had, or that its articles and dashboards still have.
fn also<M: Metric + Clone>(registry: &mut Registry, older: &str, today: &str, metric: &M) {
    add(registry, older, &format!("Older name of {today}"), metric.clone());
}

pub(super) fn histogram(registry: &mut Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    add(registry, name, help, Histogram::new(buckets.iter().copied()))
}

/// 1, 2, 5, 10, 20, 50, ... up to `max`.
fn one_two_five(max: u32) -> Vec<f64> {
    let decades = (0..10).map(|exponent| 10_u64.pow(exponent));
    let steps = decades.flat_map(|decade| [decade, 2 * decade, 5 * decade]);
    steps
        .take_while(|&step| step <= u64::from(max))
        .map(|step| step as f64)
        .collect()
}

pub(super) struct EngineMetrics {
    pub(super) num_requests_running: Gauge,
    pub(super) num_requests_waiting: Gauge,
    pub(super) num_requests_waiting_by_reason: Family<OneLabel, Gauge>,
    pub(super) kv_cache_usage_perc: FloatGauge,
    pub(super) cache_config_info: Family<Vec<(&'static str, String)>, Gauge>,
    pub(super) num_preemptions: Counter,
    pub(super) prefix_cache_queries: Counter,
    pub(super) prefix_cache_hits: Counter,
    pub(super) iteration_tokens: Histogram,
}

impl EngineMetrics {
    pub(super) fn new(r: &mut Registry) -> Self {
        let metrics = Self::current(r);
        metrics.older(r);
        metrics
    }

    fn older(&self, r: &mut Registry) {
        also(
            r,
            "vllm:gpu_cache_usage_perc",
            "vllm:kv_cache_usage_perc",
            &self.kv_cache_usage_perc,
        );
        also(
            r,
            "vllm:num_preemption",
            "vllm:num_preemptions",
            &self.num_preemptions,
        );
        let (queries, hits) = (&self.prefix_cache_queries, &self.prefix_cache_hits);
        also(
            r,
            "vllm:gpu_prefix_cache_queries",
            "vllm:prefix_cache_queries",
            queries,
        );
        also(r, "vllm:gpu_prefix_cache_hits", "vllm:prefix_cache_hits", hits);
        // Dashboards of the first vLLM add them up with the running ones.
        add(
            r,
            "vllm:num_requests_swapped",
            "Sequences whose KV lies elsewhere: none ever",
            Gauge::<i64>::default(),
        );
        add(
            r,
            "vllm:cpu_cache_usage_perc",
            "Share of a second cache: there is none",
            FloatGauge::default(),
        );
    }

    fn current(r: &mut Registry) -> Self {
        Self {
            num_requests_running: add(
                r,
                "vllm:num_requests_running",
                "Sequences that hold KV blocks",
                Gauge::default(),
            ),
            num_requests_waiting: add(
                r,
                "vllm:num_requests_waiting",
                "Sequences that wait to be scheduled",
                Gauge::default(),
            ),
            num_requests_waiting_by_reason: add(
                r,
                "vllm:num_requests_waiting_by_reason",
                "Waiting sequences by what they wait for: blocks (capacity), or the end of a pause (deferred)",
                Family::default(),
            ),
            kv_cache_usage_perc: add(
                r,
                "vllm:kv_cache_usage_perc",
                "Share of the KV blocks that sequences hold, 0 to 1",
                FloatGauge::default(),
            ),
            cache_config_info: add(
                r,
                "vllm:cache_config_info",
                "Configuration of the KV cache",
                Family::default(),
            ),
            num_preemptions: add(
                r,
                "vllm:num_preemptions",
                "Sequences that gave their blocks to a more urgent one",
                Counter::default(),
            ),
            prefix_cache_queries: add(
                r,
                "vllm:prefix_cache_queries",
                "Tokens looked up in the prefix cache",
                Counter::default(),
            ),
            prefix_cache_hits: add(
                r,
                "vllm:prefix_cache_hits",
                "Tokens found in the prefix cache",
                Counter::default(),
            ),
            iteration_tokens: histogram(
                r,
                "vllm:iteration_tokens_total",
                "Tokens computed per step",
                &ITERATION_TOKENS_BUCKETS,
            ),
        }
    }
}

pub(super) struct TokenMetrics {
    pub(super) prompt: Counter,
    pub(super) prompt_by_source: ByLabel,
    pub(super) prompt_cached: Counter,
    pub(super) prompt_cached_by_source: ByLabel,
    pub(super) generation: Counter,
    pub(super) time_to_first_token: Histogram,
    pub(super) inter_token_latency: Histogram,
}

impl TokenMetrics {
    pub(super) fn new(r: &mut Registry) -> Self {
        let inter_token_latency = histogram(
            r,
            "vllm:inter_token_latency_seconds",
            "One token to the next",
            &TOKEN_LATENCY_BUCKETS,
        );
        also(
            r,
            "vllm:time_per_output_token_seconds",
            "vllm:inter_token_latency_seconds",
            &inter_token_latency,
        );
        Self {
            prompt: add(
                r,
                "vllm:prompt_tokens",
                "Prompt tokens processed",
                Counter::default(),
            ),
            prompt_by_source: add(
                r,
                "vllm:prompt_tokens_by_source",
                "Prompt tokens by where their KV came from",
                ByLabel::default(),
            ),
            prompt_cached: add(
                r,
                "vllm:prompt_tokens_cached",
                "Prompt tokens taken from the prefix cache",
                Counter::default(),
            ),
            prompt_cached_by_source: add(
                r,
                "vllm:prompt_tokens_cached_by_source",
                "Cached prompt tokens by where their KV lay",
                ByLabel::default(),
            ),
            generation: add(
                r,
                "vllm:generation_tokens",
                "Tokens generated",
                Counter::default(),
            ),
            time_to_first_token: histogram(
                r,
                "vllm:time_to_first_token_seconds",
                "Submission to first token",
                &TTFT_BUCKETS,
            ),
            inter_token_latency,
        }
    }
}

pub(super) struct RequestTimes {
    pub(super) e2e: Histogram,
    pub(super) queue: Histogram,
    pub(super) inference: Histogram,
    pub(super) prefill: Histogram,
    pub(super) decode: Histogram,
    pub(super) time_per_output_token: Histogram,
}

impl RequestTimes {
    pub(super) fn new(r: &mut Registry) -> Self {
        let queue = histogram(
            r,
            "vllm:request_queue_time_seconds",
            "Submission to first step",
            &REQUEST_LATENCY_BUCKETS,
        );
        also(
            r,
            "vllm:time_in_queue_requests",
            "vllm:request_queue_time_seconds",
            &queue,
        );
        Self {
            e2e: histogram(
                r,
                "vllm:e2e_request_latency_seconds",
                "Submission to end",
                &REQUEST_LATENCY_BUCKETS,
            ),
            queue,
            inference: histogram(
                r,
                "vllm:request_inference_time_seconds",
                "First step to last token",
                &REQUEST_LATENCY_BUCKETS,
            ),
            prefill: histogram(
                r,
                "vllm:request_prefill_time_seconds",
                "First step to first token",
                &REQUEST_LATENCY_BUCKETS,
            ),
            decode: histogram(
                r,
                "vllm:request_decode_time_seconds",
                "First token to last token",
                &REQUEST_LATENCY_BUCKETS,
            ),
            time_per_output_token: histogram(
                r,
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after the first",
                &TOKEN_LATENCY_BUCKETS,
            ),
        }
    }
}

pub(super) struct RequestMetrics {
    pub(super) success: ByLabel,
    pub(super) corrupted: Counter,
    pub(super) prompt_tokens: Histogram,
    pub(super) generation_tokens: Histogram,
    pub(super) params_max_tokens: Histogram,
    pub(super) params_n: Histogram,
    pub(super) max_num_generation_tokens: Histogram,
    pub(super) num_preemptions: Histogram,
    pub(super) prefill_kv_computed_tokens: Histogram,
}

impl RequestMetrics {
    pub(super) fn new(r: &mut Registry, max_model_len: u32) -> Self {
        let tokens = one_two_five(max_model_len);
        Self {
            success: add(
                r,
                "vllm:request_success",
                "Finished requests by reason",
                ByLabel::default(),
            ),
            corrupted: add(
                r,
                "vllm:corrupted_requests",
                "Requests whose logits held a NaN or an infinity",
                Counter::default(),
            ),
            prompt_tokens: histogram(
                r,
                "vllm:request_prompt_tokens",
                "Prompt tokens per request",
                &tokens,
            ),
            generation_tokens: histogram(
                r,
                "vllm:request_generation_tokens",
                "Generated tokens per request",
                &tokens,
            ),
            params_max_tokens: histogram(
                r,
                "vllm:request_params_max_tokens",
                "max_tokens of the request",
                &tokens,
            ),
            params_n: histogram(r, "vllm:request_params_n", "n of the request", &one_two_five(20)),
            max_num_generation_tokens: histogram(
                r,
                "vllm:request_max_num_generation_tokens",
                "Generated tokens of a request's longest completion",
                &tokens,
            ),
            num_preemptions: histogram(
                r,
                "vllm:request_num_preemptions",
                "Preemptions per request",
                &one_two_five(100),
            ),
            prefill_kv_computed_tokens: histogram(
                r,
                "vllm:request_prefill_kv_computed_tokens",
                "Prompt tokens per request that were not cached",
                &tokens,
            ),
        }
    }
}
