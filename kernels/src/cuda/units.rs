//! The CUDA sources in `kernels/cuda`, embedded: what is compiled, with which parameters, and which kernels come out.
//! A kernel's arguments, grid and block are in the comment at the top of its file.

/// One file that NVRTC compiles by itself.
#[derive(Debug)]
pub(crate) struct Unit {
    pub(crate) name: &'static str,
    pub(crate) source: &'static str,
    /// Names of its `extern "C"` kernels.
    pub(crate) kernels: &'static [&'static str],
    /// Macros that a compilation must define (`-DNAME=value`): the model's facts that the code is specialized for.
    pub(crate) parameters: &'static [&'static str],
}

/// Files that the units include, by the name they include them by.
pub(crate) const HEADERS: &[(&str, &str)] = &[
    ("phx.cuh", include_str!("../../cuda/phx.cuh")),
    ("quant.cuh", include_str!("../../cuda/quant.cuh")),
    ("kv_layout.cuh", include_str!("../../cuda/kv_layout.cuh")),
];

pub(crate) const UNITS: &[Unit] = &[
    Unit {
        name: "convert",
        source: include_str!("../../cuda/convert.cu"),
        kernels: &["convert_f32_to_bf16", "convert_f32_to_f16"],
        parameters: &[],
    },
    Unit {
        name: "fp8",
        source: include_str!("../../cuda/fp8.cu"),
        kernels: &["quantize_rows_e4m3", "scale_product", "dequantize_rows_e4m3"],
        parameters: &[],
    },
    Unit {
        name: "quantization",
        source: include_str!("../../cuda/quantization.cu"),
        kernels: &[
            "dequantize_rows",
            "dequantize_rows_f32",
            "pack_rows",
            "unpack_rows",
        ],
        parameters: &[],
    },
    Unit {
        name: "embedding",
        source: include_str!("../../cuda/embedding.cu"),
        kernels: &["embedding", "select_rows"],
        parameters: &[],
    },
    Unit {
        name: "norm",
        source: include_str!("../../cuda/norm.cu"),
        kernels: &["rms_norm", "fused_add_rms_norm"],
        parameters: &[],
    },
    Unit {
        name: "rotary",
        source: include_str!("../../cuda/rotary.cu"),
        kernels: &["rotary_embedding"],
        parameters: &[],
    },
    Unit {
        name: "activation",
        source: include_str!("../../cuda/activation.cu"),
        kernels: &["silu_and_mul", "add_bias"],
        parameters: &[],
    },
    Unit {
        name: "kv_cache",
        source: include_str!("../../cuda/kv_cache.cu"),
        kernels: &["reshape_and_cache"],
        parameters: &["HEAD_DIM", "KV_FORMAT"],
    },
    Unit {
        name: "attention",
        source: include_str!("../../cuda/attention.cu"),
        kernels: &[
            "paged_attention_chunk",
            "paged_attention_split",
            "paged_attention_combine",
        ],
        parameters: &["HEAD_DIM", "KV_FORMAT"],
    },
    Unit {
        name: "candidates",
        source: include_str!("../../cuda/candidates.cu"),
        kernels: &["candidate_chunks", "candidate_winners", "select_top"],
        parameters: &[],
    },
    Unit {
        name: "count",
        source: include_str!("../../cuda/count.cu"),
        kernels: &["count_at_least"],
        parameters: &[],
    },
    Unit {
        name: "linear",
        source: include_str!("../../cuda/linear.cu"),
        kernels: &["linear_few_rows", "linear_many_rows"],
        parameters: &["WEIGHT_FORMAT"],
    },
    Unit {
        name: "all_reduce",
        source: include_str!("../../cuda/all_reduce.cu"),
        kernels: &["one_shot_all_reduce"],
        parameters: &[],
    },
];
