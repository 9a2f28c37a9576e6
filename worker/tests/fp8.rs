//! Weights and KV caches in E4M3: checkpoints of it, checkpoints that are rounded to it, at any number of ranks.

mod support;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use phalanx_kernels::{Fp8Matrix, WeightSource};
use phalanx_model::{Checkpoint, TensorFormat, TensorParallelOptions, TensorParallelStyle, TensorRole};
use phalanx_proto::v1;
use phalanx_shm::MappedFile;
use phalanx_worker::runner::ModelRunner;
use support::*;

const HIDDEN: usize = 64;
const CONFIG: &str = r#""model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "vocab_size": 70,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": true"#;

struct Stored {
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// The tensors of a model with random weights in BF16.
fn plain() -> BTreeMap<String, Stored> {
    let mut tensors = BTreeMap::new();
    let mut state = 1u32;
    let mut add = |name: String, shape: Vec<usize>| {
        let norm = name.contains("norm");
        let values = (0..shape.iter().product()).map(|_| {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            let unit = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
            if norm { 1.0 + unit / 8.0 } else { unit / 4.0 }
        });
        let bytes = values.flat_map(|value: f32| value.to_bits().to_le_bytes()[2..].to_vec());
        let bytes = bytes.collect();
        let dtype = "BF16";
        tensors.insert(name, Stored { dtype, shape, bytes });
    };
    add("model.embed_tokens.weight".into(), vec![70, HIDDEN]);
    add("model.norm.weight".into(), vec![HIDDEN]);
    for layer in 0..2 {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        add(name("input_layernorm"), vec![HIDDEN]);
        add(name("post_attention_layernorm"), vec![HIDDEN]);
        for (part, shape) in [
            ("self_attn.q_proj", [96, HIDDEN]),
            ("self_attn.k_proj", [48, HIDDEN]),
            ("self_attn.v_proj", [48, HIDDEN]),
            ("self_attn.o_proj", [HIDDEN, 96]),
            ("mlp.gate_proj", [96, HIDDEN]),
            ("mlp.up_proj", [96, HIDDEN]),
            ("mlp.down_proj", [HIDDEN, 96]),
        ] {
            add(name(part), shape.to_vec());
        }
    }
    tensors
}

/// The same with the matrices of layers in E4M3, each with a scale for every row.
fn rounded(plain: BTreeMap<String, Stored>) -> BTreeMap<String, Stored> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in plain {
        if !name.contains("_proj") {
            tensors.insert(name, tensor);
            continue;
        }
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        let matrix = Fp8Matrix::quantize(&WeightSource {
            format: TensorFormat::BF16,
            rows,
            cols,
            data: &tensor.bytes,
            row_stride: 2 * cols,
            row_scales: None,
        });
        let matrix = matrix.unwrap();
        let source = matrix.source();
        let scales = source.row_scales.unwrap().iter();
        let scale = Stored {
            dtype: "F32",
            shape: vec![rows, 1],
            bytes: scales.flat_map(|scale| scale.to_le_bytes()).collect(),
        };
        tensors.insert(format!("{name}_scale"), scale);
        let weight = Stored {
            dtype: "F8_E4M3",
            bytes: source.data.to_vec(),
            ..tensor
        };
        tensors.insert(name, weight);
    }
    tensors
}

/// Writes a Hugging Face directory.
fn write(directory: &Path, tensors: &BTreeMap<String, Stored>, quantization: &str) -> PathBuf {
    fs::create_dir_all(directory).unwrap();
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, Stored { dtype, shape, bytes }) in tensors {
        let (start, end) = (data.len(), data.len() + bytes.len());
        entries.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
        data.extend(bytes);
    }
    let header = format!("{{{}}}", entries.join(","));
    let length = (header.len() as u64).to_le_bytes();
    let file = [&length[..], header.as_bytes(), &data].concat();
    fs::write(directory.join("model.safetensors"), file).unwrap();
    fs::write(
        directory.join("config.json"),
        format!("{{{CONFIG}{quantization}}}"),
    )
    .unwrap();
    directory.to_owned()
}

/// Last-token logits of a prompt that is computed in two steps.
fn logits(path: &Path, options: &TensorParallelOptions, change: impl Fn(&mut v1::Assign) + Sync) -> Vec<f32> {
    let prompt: Vec<u32> = (0..40).map(|i| i * 37 % 70).collect();
    let parts = Ranks::new(options.world_size, options.style).run(|rank, comm| {
        let mut assign = assign(path, rank, options);
        change(&mut assign);
        let mut model = load(&assign);
        let mut runner = ModelRunner::new(&mut model, comm).unwrap();
        runner
            .logits(&plan(0, vec![row(0, 0, &prompt[..23], false)]))
            .unwrap();
        runner
            .logits(&plan(1, vec![row(0, 23, &prompt[23..], true)]))
            .unwrap()
    });
    join_logits(&parts, 1)
}

fn equal(world_size: usize, style: TensorParallelStyle) -> TensorParallelOptions {
    TensorParallelOptions::equal(world_size, style)
}

/// Root of the mean square difference, in units of the root of `want`'s mean square.
fn relative_error(got: &[f32], want: &[f32]) -> f32 {
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>();
    let error = square(&mut got.iter().zip(want).map(|(got, want)| got - want));
    (error / square(&mut want.iter().copied())).sqrt()
}

#[test]
fn a_checkpoint_of_e4m3_is_what_rounding_one_gives() {
    let root = tempfile::tempdir().unwrap();
    let plain_path = write(&root.path().join("plain"), &plain(), "");
    let quantization = r#", "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}"#;
    let fp8_path = write(&root.path().join("fp8"), &rounded(plain()), quantization);
    let gather = |ranks| equal(ranks, TensorParallelStyle::Gather);
    let exact = logits(&plain_path, &gather(1), |_| {});
    let fp8 = logits(&fp8_path, &gather(1), |_| {});
    let error = relative_error(&fp8, &exact);
    assert!(error > 1e-3 && error < 0.15, "{error}");
    for ranks in 1..=3 {
        assert_eq!(logits(&fp8_path, &gather(ranks), |_| {}), fp8, "{ranks} ranks");
        let online = logits(&plain_path, &gather(ranks), |assign| {
            assign.quantize_to_fp8 = true
        });
        assert_eq!(online, fp8, "{ranks} ranks, online");
    }
    // Cut along the inputs as well, where the scales are every rank's.
    let reduced = logits(&fp8_path, &equal(3, TensorParallelStyle::Reduce), |_| {});
    assert!(relative_error(&reduced, &fp8) < 1e-5);
}

#[test]
fn a_cache_of_8_bits_is_close_and_the_same_at_any_number_of_ranks() {
    let root = tempfile::tempdir().unwrap();
    let path = write(root.path(), &plain(), "");
    let gather = |ranks| equal(ranks, TensorParallelStyle::Gather);
    let exact = logits(&path, &gather(1), |_| {});
    for (dtype, limit) in [(v1::KvDtype::E4m3, 0.1), (v1::KvDtype::Int8, 0.02)] {
        let of_ranks = |ranks| {
            logits(&path, &gather(ranks), |assign| {
                assign.kv_dtype = dtype.into();
            })
        };
        let one = of_ranks(1);
        let error = relative_error(&one, &exact);
        assert!(error > 1e-5 && error < limit, "{dtype:?}: {error}");
        assert_eq!(of_ranks(2), one, "{dtype:?}");
        assert_eq!(of_ranks(3), one, "{dtype:?}");
    }
}

#[test]
fn quantization_that_is_not_the_checkpoints_is_refused() {
    use phalanx_model::QuantizationMethod::{Awq, Fp8};
    let root = tempfile::tempdir().unwrap();
    let open = |path: &Path| Checkpoint::open(path, MappedFile::open).unwrap();
    let plain_path = write(&root.path().join("plain"), &plain(), "");
    let online = open(&plain_path).quantized(Fp8).unwrap();
    assert!(online.is_quantized_online());
    let formats = online.formats();
    assert_eq!(formats[&TensorRole::TokenEmbedding], TensorFormat::BF16);
    assert_eq!(
        formats
            .values()
            .filter(|&&format| format == TensorFormat::F8_E4M3)
            .count(),
        14
    );
    let refused = |path: &Path, method| open(path).quantized(method).unwrap_err().to_string();
    let awq = "quantization awq was asked for, but the checkpoint is not quantized with it";
    assert_eq!(refused(&plain_path, Awq), awq);
    let coded = refused(&demo_model(), Fp8);
    assert!(
        coded.contains("is quantized already: `blk.0.attn_q.weight` is Q4_1"),
        "{coded}"
    );
    let quantization = r#", "quantization_config": {"quant_method": "fp8"}"#;
    let fp8_path = write(&root.path().join("fp8"), &rounded(plain()), quantization);
    assert!(!open(&fp8_path).quantized(Fp8).unwrap().is_quantized_online());
    assert!(refused(&fp8_path, Awq).ends_with("the checkpoint is quantized with fp8"));
}
