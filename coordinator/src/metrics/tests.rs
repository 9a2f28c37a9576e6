use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::*;
use crate::engine::SpeculationStats;

/// Name, labels and value of every sample, read as a scraper would.
fn parse(text: &str) -> Vec<Sample> {
    assert!(text.ends_with("# EOF\n"));
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples
        .map(|line| {
            let (name, rest) = line.split_once('{').expect("labels");
            let (labels, value) = rest.rsplit_once("} ").expect("a value");
            let labels = labels.split("\",").map(|label| {
                let (key, value) = label.split_once("=\"").expect("a quoted label");
                (key.to_owned(), value.trim_end_matches('"').to_owned())
            });
            (
                name.to_owned(),
                labels.collect(),
                value.parse().expect("a number"),
            )
        })
        .collect()
}

fn recorded() -> Metrics {
    let metrics = Metrics::new("SmolLM2", 8192);
    let config = EngineConfig::new(100, 8192, 1000);
    metrics.engine_started(&config);
    let mut serving = RankStatus {
        rank: 1,
        rss_bytes: 77,
        ..RankStatus::default()
    };
    serving.set_phase(phalanx_proto::v1::Phase::Serving);
    metrics.ranks(&[RankStatus::default(), serving]);
    let now = Snapshot {
        epoch: 2,
        num_running: 3,
        num_waiting: 4,
        num_blocks: 100,
        num_free_blocks: 75,
        prefix_cache_queries: 30,
        prefix_cache_hits: 16,
        num_preemptions: 5,
        num_steps: 9,
        speculation: SpeculationStats {
            num_drafts: 3,
            num_draft_tokens: 7,
            num_accepted_tokens: 4,
            num_accepted_per_position: [3, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        },
        paused: false,
    };
    metrics.engine_turned(&Snapshot::default(), &now);
    metrics.engine_turned(&now, &now);
    metrics.stepped(&StepStats {
        step: 9,
        num_tokens: 40,
        num_rows: 3,
        took: Duration::from_millis(7),
        forward: Duration::from_millis(6),
    });
    metrics.group_lost(&ExecutorError::RankLost {
        rank: 1,
        cause: "killed".into(),
    });
    metrics.group_recovered(Duration::from_millis(400));
    metrics.rejected("max_num_queued_reqs");
    metrics.first_token(30, 16, Duration::from_millis(50));
    metrics.next_token(Duration::from_millis(20));
    metrics.request_finished(&RequestStats {
        reason: FinishReason::NotFinite,
        num_prompt_tokens: 30,
        num_cached_tokens: 16,
        num_generation_tokens: 2,
        max_tokens: 64,
        num_preemptions: 1,
        e2e: Duration::from_millis(90),
        queue: Some(Duration::from_millis(10)),
        prefill: Some(Duration::from_millis(40)),
        decode: Some(Duration::from_millis(20)),
    });
    metrics.request_completed([2, 7, 3].into_iter());
    metrics
}

const PLAIN: [&str; 34] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_by_source_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:prompt_tokens_cached_by_source_total",
    "vllm:gpu_cache_usage_perc",
    "vllm:cpu_cache_usage_perc",
    "vllm:num_requests_swapped",
    "vllm:num_preemption_total",
    "vllm:gpu_prefix_cache_queries_total",
    "vllm:gpu_prefix_cache_hits_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:corrupted_requests_total",
    "vllm:admission_rejections_total",
    "phalanx_steps_total",
    "phalanx_segment_bytes",
    "phalanx_ranks",
    "phalanx_rank_resident_bytes",
    "phalanx_rank_loaded_bytes",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "phalanx_epoch",
    "phalanx_paused",
    "phalanx_ranks_lost_total",
];
const HISTOGRAMS: [&str; 22] = [
    "vllm:iteration_tokens_total",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:time_per_output_token_seconds",
    "vllm:time_in_queue_requests",
    "vllm:request_time_per_output_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_inference_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "vllm:request_params_max_tokens",
    "vllm:request_params_n",
    "vllm:request_max_num_generation_tokens",
    "vllm:request_num_preemptions",
    "vllm:request_prefill_kv_computed_tokens",
    "phalanx_step_seconds",
    "phalanx_step_forward_seconds",
    "phalanx_step_rows",
    "phalanx_recovery_seconds",
];

#[test]
fn names_are_those_that_dashboards_know() {
    let text = recorded().encode();
    let names: BTreeSet<_> = parse(&text).into_iter().map(|(name, ..)| name).collect();
    let suffixes = ["_bucket", "_count", "_sum"];
    let of_histograms = HISTOGRAMS
        .iter()
        .flat_map(|name| suffixes.map(|suffix| format!("{name}{suffix}")));
    let expected: BTreeSet<_> = PLAIN
        .iter()
        .map(|name| name.to_string())
        .chain(of_histograms)
        .collect();
    assert_eq!(names, expected);
}

type Sample = (String, BTreeMap<String, String>, f64);

/// Of the first sample with this name and label.
fn value(samples: &[Sample], name: &str, label: Option<(&str, &str)>) -> f64 {
    let matches = |labels: &BTreeMap<String, String>| {
        label.is_none_or(|(key, value)| labels.get(key).is_some_and(|it| it == value))
    };
    let mut found = samples
        .iter()
        .filter(|(it, labels, _)| it == name && matches(labels));
    found.next().unwrap_or_else(|| panic!("no {name} {label:?}")).2
}

#[test]
fn labels_and_values_are_those_recorded() {
    let samples = parse(&recorded().encode());
    for (name, labels, _) in &samples {
        assert_eq!(labels["model_name"], "SmolLM2", "{name}");
        let engine = labels.get("engine").map(String::as_str);
        let expected = (name != "vllm:admission_rejections_total").then_some("0");
        assert_eq!(engine, expected, "{name}");
    }
    let value = |name, label| value(&samples, name, label);
    assert_eq!(value("vllm:num_requests_running", None), 3.0);
    assert_eq!(
        value(
            "vllm:num_requests_waiting_by_reason",
            Some(("reason", "capacity"))
        ),
        4.0
    );
    assert_eq!(value("vllm:kv_cache_usage_perc", None), 0.25);
    assert_eq!(value("vllm:num_preemptions_total", None), 5.0);
    assert_eq!(value("vllm:prefix_cache_hits_total", None), 16.0);
    assert_eq!(value("vllm:cache_config_info", Some(("block_size", "16"))), 1.0);
    let by_source = |source| value("vllm:prompt_tokens_by_source_total", Some(("source", source)));
    assert_eq!(
        (by_source("local_compute"), by_source("local_cache_hit")),
        (14.0, 16.0)
    );
    let success = |reason| value("vllm:request_success_total", Some(("finished_reason", reason)));
    assert_eq!((success("error"), success("stop")), (1.0, 0.0));
    assert_eq!(value("vllm:corrupted_requests_total", None), 1.0);
    assert_eq!(value("vllm:spec_decode_num_draft_tokens_total", None), 7.0);
    let at = |position| {
        value(
            "vllm:spec_decode_num_accepted_tokens_per_pos_total",
            Some(("position", position)),
        )
    };
    assert_eq!((at("0"), at("1")), (3.0, 1.0));
    let rejected = |limit| value("vllm:admission_rejections_total", Some(("reason", limit)));
    assert_eq!(
        rejected("max_num_queued_tokens"),
        0.0,
        "a rate needs a zero first"
    );
    assert_eq!(
        value("vllm:time_to_first_token_seconds_bucket", Some(("le", "0.04"))),
        0.0
    );
    assert_eq!(
        value("vllm:time_to_first_token_seconds_bucket", Some(("le", "0.06"))),
        1.0
    );
    assert_eq!(
        value("vllm:request_generation_tokens_bucket", Some(("le", "5000.0"))),
        1.0
    );
    assert_eq!(value("vllm:request_params_n_sum", None), 3.0);
    assert_eq!(value("vllm:request_max_num_generation_tokens_sum", None), 7.0);
    assert_eq!(value("vllm:request_inference_time_seconds_sum", None), 0.06);
    assert_eq!(value("phalanx_epoch", None), 2.0);
    assert_eq!(value("phalanx_ranks", Some(("phase", "serving"))), 1.0);
    assert_eq!(value("phalanx_ranks", Some(("phase", "warming_up"))), 0.0);
    assert_eq!(value("phalanx_rank_resident_bytes", Some(("rank", "1"))), 77.0);
}

#[test]
fn the_older_names_tell_the_same() {
    let samples = parse(&recorded().encode());
    let value = |name, label| value(&samples, name, label);
    assert_eq!(value("vllm:gpu_cache_usage_perc", None), 0.25);
    assert_eq!(value("vllm:gpu_prefix_cache_hits_total", None), 16.0);
    assert_eq!(value("vllm:num_preemption_total", None), 5.0);
    assert_eq!(value("vllm:time_per_output_token_seconds_count", None), 1.0);
}

#[test]
fn an_engine_that_ended_leaves_no_gauge_standing() {
    let metrics = recorded();
    metrics.engine_ended();
    let gauges = [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:num_requests_waiting_by_reason",
        "vllm:kv_cache_usage_perc",
    ];
    for (name, _, value) in parse(&metrics.encode()) {
        assert!(!gauges.contains(&name.as_str()) || value == 0.0, "{name}");
    }
}

#[test]
fn the_document_has_the_metrics_that_there_are() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/compatibility.md");
    let text = std::fs::read_to_string(path).expect("docs/compatibility.md");
    let (_, text) = text.split_once("## Metrics").expect("the table");
    let exposition = recorded().encode();
    let is_there = |name: &str| {
        let family = name
            .strip_suffix("_total")
            .or(name.strip_suffix("_info"))
            .unwrap_or(name);
        [name, family]
            .iter()
            .any(|name| exposition.contains(&format!("# TYPE {name} ")))
    };
    let mut rows = 0;
    for line in text.lines().filter_map(|line| line.strip_prefix("| `vllm:")) {
        let (name, rest) = line.split_once("` | ").expect("a row");
        assert_eq!(
            is_there(&format!("vllm:{name}")),
            rest.starts_with("same |"),
            "{name}: {rest}"
        );
        rows += 1;
    }
    assert!(rows > 40, "{rows}");
}
