//! What becomes of each flag of `vllm serve` that has no field in `args.rs`. Those that have one are not here.

use super::{Flag, Group, many, switch, value};

/// Groups of flags with the same fate for the same reason. `docs/compatibility.md` prints all of it.
#[rustfmt::skip]
pub(super) const GROUPS: &[Group] = &[
    Group::refused("one server is one pipeline stage and one replica; put several replicas behind a router", &[
        value("--pipeline-parallel-size", &["1"]).short("-pp"),
        value("--data-parallel-size", &["1"]).short("-dp"),
        value("--data-parallel-size-local", &["1"]).short("-dpl"),
        value("--data-parallel-rank", &["0"]).short("-dpn"),
        value("--data-parallel-start-rank", &["0"]).short("-dpr"),
        value("--prefill-context-parallel-size", &["1"]).short("-pcp"),
        value("--decode-context-parallel-size", &["1"]).short("-dcp"),
        value("--api-server-count", &["1"]).short("-asc"),
        switch("--data-parallel-external-lb"), switch("--data-parallel-hybrid-lb"),
        switch("--data-parallel-multi-port-external-lb"), switch("--enable-elastic-ep"), switch("--enable-scale-out"),
    ]),
    Group::refused("ranks on other hosts join with `phalanx worker`", &[
        value("--nnodes", &["1"]).short("-n"), value("--node-rank", &["0"]).short("-r"), switch("--headless"),
    ]),
    Group::refused("the workers of `serve` are its children; `phalanx coordinator` waits for others", &[
        value("--distributed-executor-backend", &["mp", "uni"]),
    ]),
    Group::ignored("means something only with data parallelism or several nodes", &[
        value("--data-parallel-address", &[]).short("-dpa"), value("--data-parallel-backend", &["mp"]).short("-dpb"),
        value("--data-parallel-rpc-port", &[]).short("-dpp"), value("--data-parallel-supervisor-port", &[]),
        value("--dp-supervisor-probe-failure-threshold", &[]), value("--dp-supervisor-probe-interval-s", &[]),
        value("--dp-supervisor-probe-timeout-s", &[]), value("--dp-sync-interval", &[]),
        switch("--disable-nccl-for-dp-synchronization"), value("--elastic-ep-max-dp-size", &[]),
        value("--master-addr", &[]), value("--master-port", &[]), switch("--aggregate-engine-logging"),
        value("--cp-kv-cache-interleave-size", &[]), value("--dcp-comm-backend", &[]),
        value("--dcp-kv-cache-interleave-size", &[]), switch("--dcp-q-replicate"),
    ]),
    Group::ignored("models with experts are not served", &[
        value("--all2all-backend", &[]), switch("--enable-dbo"), value("--dbo-decode-token-threshold", &[]),
        value("--dbo-prefill-token-threshold", &[]), value("--ubatch-size", &[]), switch("--enable-ep-weight-filter"),
        switch("--enable-eplb"), switch("--enable-expert-parallel").short("-ep"), value("--eplb-config", &[]),
        value("--expert-placement-strategy", &[]), value("--moe-backend", &[]),
    ]),
    Group::refused("adapters are not offered", &[
        switch("--enable-lora"), many("--lora-modules"), many("--lora-target-modules"), value("--default-mm-loras", &["{}"]),
        switch("--enable-tower-connector-lora"),
    ]),
    Group::ignored("means something only with adapters, which are not offered", &[
        switch("--enable-mixed-moe-lora-format"), switch("--enable-moe-shared-loras"), switch("--fully-sharded-loras"),
        value("--lora-dtype", &[]), value("--max-cpu-loras", &[]), value("--max-lora-cls-labels", &[]),
        value("--max-lora-rank", &[]), value("--max-loras", &[]), switch("--specialize-active-lora"),
    ]),
    Group::refused("the tokenizer and the configuration are those of the model's files", &[
        value("--tokenizer", &[]), value("--tokenizer-mode", &["auto", "hf", "slow"]), value("--hf-config-path", &[]),
        value("--config-format", &["auto", "hf"]), value("--hf-overrides", &["{}"]), value("--model-class-overrides", &["{}"]),
        value("--load-format", &["auto", "safetensors", "gguf"]), value("--quantization-config", &["{}"]),
        value("--pt-load-map-location", &["cpu"]),
    ]),
    Group::ignored("models are local files, which are mapped", &[
        value("--revision", &[]), value("--code-revision", &[]), value("--tokenizer-revision", &[]), value("--hf-token", &[]),
        value("--download-dir", &[]), many("--ignore-patterns"), value("--model-loader-extra-config", &["{}"]),
        value("--max-parallel-loading-workers", &[]), value("--safetensors-load-strategy", &[]),
        value("--safetensors-prefetch-block-size", &[]), value("--safetensors-prefetch-num-threads", &[]),
        switch("--use-tqdm-on-load"), value("--renderer-num-workers", &[]),
    ]),
    Group::ignored("no code of a model or a plugin is ever run", &[switch("--trust-remote-code")]),
    Group::refused("Python classes are not loaded", &[
        many("--logits-processors"), value("--middleware", &[]), value("--io-processor-plugin", &[]),
        value("--reasoning-parser-plugin", &[]), value("--tool-parser-plugin", &[]), value("--scheduler-cls", &[]),
        value("--worker-cls", &["auto"]), value("--worker-extension-cls", &[]),
    ]),
    Group::ignored("activations are F32 on CPUs and bf16 on GPUs, whatever the checkpoint", &[
        value("--dtype", &["auto", "bfloat16"]),
    ]),
    Group::ignored("the kernels are ours: there is one implementation of each, and no compiler to configure", &[
        value("--attention-backend", &[]), value("--attention-config", &["{}"]).short("-ac"),
        value("--compilation-config", &["{}"]).short("-cc"), value("--optimization-level", &[]).short("-O"),
        switch("--cudagraph-metrics"), value("--max-cudagraph-capture-size", &[]), switch("--disable-cascade-attn"),
        switch("--enable-flashinfer-autotune"), switch("--enable-cumem-allocator"), switch("--enable-hc-sp"),
        value("--kernel-config", &["{}"]), value("--ir-op-priority", &[]), value("--jit-monitor-mode", &[]),
        switch("--jit-monitor-verbose"), value("--linear-backend", &[]), value("--model-impl", &["auto", "vllm"]),
        switch("--monokernel"), value("--performance-mode", &[]), value("--sparse-indexer-topk-backend", &[]),
        switch("--use-fp64-gumbel"), switch("--allow-deprecated-quantization"), switch("--enable-batch-sharded-sampling"),
        switch("--enable-nccl-comm-suspend"), switch("--enable-shm-tensor-arena"), value("--additional-config", &["{}"]),
    ]),
    Group::ignored("models with a recurrent state are not served", &[
        switch("--enable-mamba-cache-stochastic-rounding"), switch("--enable-mamba-shared-prefix-checkpoint"),
        value("--gdn-prefill-backend", &[]), value("--kda-decode-backend", &[]), value("--kda-prefill-backend", &[]),
        value("--mamba-backend", &[]), value("--mamba-block-size", &[]), value("--mamba-cache-dtype", &[]),
        value("--mamba-cache-mode", &[]), value("--mamba-cache-philox-rounds", &[]), value("--mamba-ssm-cache-dtype", &[]),
        value("--mamba-ssu-algorithm", &[]), value("--replayssm-buffer-len", &[]), switch("--use-replayssm"),
        switch("--enable-trace-replay"),
    ]),
    Group::ignored("text alone is served: requests with media are refused, and no URL in a request is fetched", &[
        value("--allowed-local-media-path", &[]), many("--allowed-media-domains"), switch("--disable-chunked-mm-input"),
        switch("--enable-mm-embeds"), switch("--interleave-mm-strings"), switch("--language-model-only"),
        value("--limit-mm-per-prompt", &[]), value("--media-io-kwargs", &[]), switch("--mm-device-do-normalize"),
        value("--mm-encoder-attn-backend", &[]), value("--mm-encoder-attn-dtype", &[]),
        value("--mm-encoder-fp8-scale-path", &[]), value("--mm-encoder-fp8-scale-save-margin", &[]),
        value("--mm-encoder-fp8-scale-save-path", &[]), value("--mm-encoder-tp-mode", &[]),
        value("--mm-hasher-algorithm", &[]), value("--mm-ipc-gpu-memory-gb", &[]), value("--mm-processor-cache-gb", &[]),
        value("--mm-processor-cache-type", &[]), value("--mm-processor-device", &[]), value("--mm-processor-kwargs", &[]),
        value("--mm-shm-cache-max-object-size-mb", &[]), value("--mm-tensor-ipc", &[]), switch("--skip-mm-profiling"),
        switch("--trust-request-mm-kwargs"), value("--video-pruning-method", &[]), value("--video-pruning-rate", &[]),
        switch("--enable-flash-late-interaction"),
    ]),
    Group::refused("text is generated; there is no other task", &[
        value("--runner", &["auto", "generate"]), value("--convert", &["auto", "none"]), value("--pooler-config", &["{}"]),
        switch("--mm-encoder-only"), value("--diffusion-config", &["{}"]), value("--engram-config", &["{}"]),
        switch("--enable-prompt-embeds"), switch("--cohere-is-reasoning-model"), value("--cohere-format", &[]),
    ]),
    Group::refused("would change what is generated or reported, and is not offered", &[
        many("--kv-cache-dtype-skip-layers"), switch("--kv-sharing-fast-prefill"), value("--watermark-config", &["{}"]),
        switch("--disable-sliding-window"), switch("--return-sampling-mask"), switch("--enable-return-routed-experts"),
        value("--aux-output-config", &["{}"]), value("--tool-server", &[]),
        value("--reasoning-effort-map", &[]), value("--tool-strict-level", &[]),
    ]),
    Group::refused("KV is neither moved to nor fetched from elsewhere", &[
        value("--kv-transfer-config", &["{}"]), value("--ec-transfer-config", &["{}"]), value("--ec-manager-config", &["{}"]),
        value("--weight-transfer-config", &["{}"]),
    ]),
    Group::refused("the model cannot be put to sleep", &[
        switch("--enable-sleep-mode"), switch("--sleep-mode-offload-cudagraph"),
    ]),
    Group::ignored("means something only with a sleep mode, which is not offered", &[
        value("--sleep-mode-backend", &[]), many("--sleep-preserve-parameter-names"),
    ]),
    Group::ignored("nothing is offloaded: a model that does not fit is refused with the bytes, and KV is computed again", &[
        value("--cpu-offload-gb", &["0"]), many("--cpu-offload-params"), value("--offload-backend", &[]),
        value("--offload-group-size", &[]), value("--offload-num-in-group", &[]), many("--offload-params"),
        value("--offload-prefetch-step", &[]), value("--kv-offloading-backend", &[]), value("--kv-offloading-size", &[]),
        value("--swap-space", &[]),
    ]),
    Group::ignored("drafts change the speed and not the tokens; ask for them with --speculative-config", &[
        value("--spec-method", &[]), value("--spec-model", &[]),
        value("--spec-tokens", &[]), switch("--per-request-spec-decode-metrics"),
    ]),
    Group::ignored("the scheduler decides it by itself; the tokens are the same", &[
        switch("--async-scheduling"), switch("--enable-chunked-prefill"),
        switch("--long-prefill-token-threshold-adaptive"), value("--max-num-active-seqs", &[]),
        value("--max-num-scheduled-tokens", &[]), value("--prefill-schedule-interval", &[]),
        value("--stream-interval", &["1"]),
        value("--prefix-cache-retention-interval", &[]), value("--prefix-match-unit", &[]),
        switch("--disable-hybrid-kv-cache-manager"), switch("--swa-bounded-replay"), switch("--use-v2-block-manager"),
    ]),
    Group::ignored("structured outputs and thinking budgets have no settings", &[
        value("--structured-outputs-config", &["{}"]), value("--guided-decoding-backend", &["auto"]),
        value("--reasoning-config", &["{}"]), value("--anthropic-disabled-thinking-effort", &[]),
        switch("--enable-reasoning"),
    ]),
    Group::refused("choose GPUs with CUDA_VISIBLE_DEVICES", &[many("--device-ids")]),
    Group::ignored("every rank is bound to its CPUs and their memory", &[
        switch("--numa-bind"), many("--numa-bind-cpus"), many("--numa-bind-nodes"),
    ]),
    Group::ignored("a step's deadline is --execute-model-timeout-seconds, a lost rank is named within a second", &[
        value("--distributed-timeout-seconds", &[]), value("--cpu-distributed-timeout-seconds", &[]),
        switch("--enable-fault-tolerance"), value("--fault-tolerance-config", &["{}"]), value("--watchdog-config", &["{}"]),
        switch("--ray-workers-use-nsight"), switch("--fail-on-environ-validation"),
    ]),
    Group::ignored("token ids are accepted with or without it", &[switch("--skip-tokenizer-init"), switch("--tokens-only")]),
    Group::ignored("neither prompts nor outputs are ever logged", &[
        switch("--enable-log-outputs"), switch("--enable-log-deltas"), value("--max-log-len", &[]),
    ]),
    Group::ignored("logs have --log-level and --log-format, and no line per request unless --enable-log-requests", &[
        value("--log-config-file", &[]), value("--logging-config", &[]), switch("--log-error-stack"),
        switch("--disable-uvicorn-access-log"), value("--disable-access-log-for-endpoints", &[]),
        value("--uvicorn-log-level", &[]), switch("--disable-log-stats"), switch("--enable-logging-iteration-details"),
        switch("--disable-log-requests"), switch("--disable-frontend-multiprocessing"),
    ]),
    Group::ignored("metrics have vLLM's buckets, and the names of all its versions at once", &[
        many("--custom-histogram-buckets"), value("--show-hidden-metrics-for-version", &[]), switch("--enable-mfu-metrics"),
        switch("--kv-cache-metrics"), value("--kv-cache-metrics-sample", &[]), switch("--enable-per-request-metrics"),
    ]),
    Group::ignored("spans say what they can: queue, prefill and decode", &[
        value("--collect-detailed-traces", &[]), switch("--enable-layerwise-nvtx-tracing"), value("--profiler-config", &["{}"]),
    ]),
    Group::ignored("X-Request-Id is always echoed", &[switch("--enable-request-id-headers")]),
    Group::ignored("/load always counts", &[switch("--enable-server-load-tracking")]),
    Group::ignored("replies carry no fingerprint", &[value("--fingerprint-mode", &[]), value("--fingerprint-value", &[])]),
    Group::ignored("no comments are sent on an idle stream", &[value("--sse-keep-alive-interval", &[])]),
    Group::ignored("/docs loads nothing from elsewhere", &[switch("--enable-offline-docs")]),
    Group::ignored("no CORS headers are sent: browsers on other origins are kept out", &[
        switch("--allow-credentials"), value("--allowed-headers", &[]), value("--allowed-methods", &[]),
        value("--allowed-origins", &[]),
    ]),
    Group::refused("rustls has safe suites alone", &[value("--ssl-ciphers", &[])]),
    Group::ignored("certificates are read again whenever their files change", &[switch("--enable-ssl-refresh")]),
];

/// Every flag of the table with its group.
pub(super) fn entries() -> impl Iterator<Item = (&'static Group, &'static Flag)> {
    GROUPS
        .iter()
        .flat_map(|group| group.flags.iter().map(move |flag| (group, flag)))
}
