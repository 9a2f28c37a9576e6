"""Scrapes a running server as Prometheus does, with the strict parsers of its own Python client.

usage: metrics_client.py URL        e.g. http://127.0.0.1:8000/metrics

Checks both text formats, vLLM's names, types and labels, and that the older names tell the same. Exits 0 and prints one
line when every check passed.
"""

import sys
import urllib.request

import prometheus_client.openmetrics.parser as openmetrics
import prometheus_client.parser as text_format

COUNTERS = """
num_preemptions prompt_tokens prompt_tokens_cached generation_tokens prefix_cache_queries prefix_cache_hits
corrupted_requests gpu_prefix_cache_queries gpu_prefix_cache_hits num_preemption
""".split()
GAUGES = """
num_requests_running num_requests_waiting kv_cache_usage_perc gpu_cache_usage_perc num_requests_swapped
""".split()
HISTOGRAMS = """
time_to_first_token_seconds inter_token_latency_seconds time_per_output_token_seconds e2e_request_latency_seconds
request_queue_time_seconds request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds
request_time_per_output_token_seconds request_prompt_tokens request_generation_tokens iteration_tokens_total
request_max_num_generation_tokens request_params_n request_params_max_tokens request_num_preemptions
request_prefill_kv_computed_tokens
""".split()
LABELLED = {
    "prompt_tokens_by_source": ("source", "local_compute"),
    "prompt_tokens_cached_by_source": ("source", "device"),
    "request_success": ("finished_reason", "length"),
}
OLDER = {
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
    "prefix_cache_queries_total": "gpu_prefix_cache_queries_total",
    "inter_token_latency_seconds_count": "time_per_output_token_seconds_count",
}
NATIVE = "phalanx_steps phalanx_ranks phalanx_rank_barriers phalanx_segment_bytes phalanx_step_forward_seconds".split()
TTFT_BUCKETS = ["0.001", "0.005", "0.01", "0.02", "0.04", "0.06", "0.08", "0.1", "0.25", "0.5", "0.75", "1.0", "2.5"]


def fetch(url, accept):
    request = urllib.request.Request(url, headers={"accept": accept} if accept else {})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return reply.headers["content-type"], reply.read().decode()


def check_families(families):
    def family(name, kind):
        found = families[f"vllm:{name}"]
        assert found.type == kind, (name, found.type)
        for sample in found.samples:
            assert sample.labels["model_name"] == "demo" and sample.labels["engine"] == "0", sample
        return found.samples

    for name in COUNTERS:
        family(name, "counter")
    for name in GAUGES:
        family(name, "gauge")
    for name in HISTOGRAMS:
        family(name, "histogram")
    for name, (label, value) in LABELLED.items():
        assert any(sample.labels[label] == value for sample in family(name, "counter")), name
    bounds = [sample.labels["le"] for sample in family("time_to_first_token_seconds", "histogram") if "le" in sample.labels]
    assert bounds[: len(TTFT_BUCKETS)] == TTFT_BUCKETS and bounds[-1] == "+Inf", bounds
    (info,) = families["vllm:cache_config_info"].samples
    assert int(info.labels["num_gpu_blocks"]) > 0 and int(info.labels["block_size"]) == 16, info
    for name in NATIVE:
        assert families[name].samples, name
    assert families["http_requests"].type == "counter"
    assert families["http_request_duration_highr_seconds"].type == "histogram"


def check_values(families):
    values = {sample.name: sample.value for family in families.values() for sample in family.samples}
    for today, older in OLDER.items():
        assert values[f"vllm:{today}"] == values[f"vllm:{older}"], (today, older)
    assert values["vllm:generation_tokens_total"] == values["vllm:request_generation_tokens_sum"] > 0
    ranks = [sample for sample in families["phalanx_ranks"].samples if sample.labels["phase"] == "serving"]
    assert ranks[0].value == 2, ranks


def main():
    url = sys.argv[1]
    kind, text = fetch(url, None)
    assert kind.startswith("text/plain; version=0.0.4"), kind
    families = {family.name: family for family in text_format.text_string_to_metric_families(text)}
    check_families(families)
    check_values(families)
    for line in text.splitlines():
        if line.startswith("# TYPE ") and line.endswith(" counter"):
            assert line.split()[2].endswith("_total"), line
    kind, text = fetch(url, "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert kind.startswith("application/openmetrics-text"), kind
    check_families({family.name: family for family in openmetrics.text_string_to_metric_families(text)})
    print(f"{len(families)} metric families of {url} are well formed in both formats")


if __name__ == "__main__":
    main()
