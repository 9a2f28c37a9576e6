//! AWQ and GPTQ checkpoints, made here with random codes, against the same weights in f32.

mod support;

use std::{fs, path::Path};

use phalanx_kernels::int4::Int4Source;
use phalanx_model::{
    TensorFormat, TensorParallelOptions, TensorParallelStyle,
    quantization::{GptqZeros, Int4Packing, Int4Quantization},
};
use support::*;

const HIDDEN: usize = 128;
const INTERMEDIATE: usize = 192;
const VOCAB: usize = 520;
const LAYERS: usize = 2;
/// Largest difference of logits, of the largest logit: activations are rounded to 8 bits in every layer.
const TOLERANCE: f32 = 5e-2;

/// xorshift64*.
struct Noise(u64);

impl Noise {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % n
    }

    fn unit(&mut self) -> f32 {
        self.below(1 << 20) as f32 / (1 << 19) as f32 - 1.0
    }
}

/// Tensors of a directory: name, dtype, shape, bytes.
type Tensor = (String, &'static str, Vec<usize>, Vec<u8>);

/// A matrix as its method stores it, and what it means.
struct Matrix {
    qweight: Vec<u32>,
    qzeros: Vec<u32>,
    scales: Vec<u8>,
    weights: Vec<f32>,
}

/// Where a word has the code of lane `lane`: by the list that quantizers pack with.
fn place(packing: Int4Packing, lane: usize) -> usize {
    let order = match packing {
        Int4Packing::Awq => [0, 2, 4, 6, 1, 3, 5, 7],
        Int4Packing::Gptq { .. } => [0, 1, 2, 3, 4, 5, 6, 7],
    };
    order.iter().position(|&output| output == lane).unwrap()
}

impl Matrix {
    fn random(method: Int4Quantization, [rows, cols]: [usize; 2], noise: &mut Noise) -> Self {
        let group_size = method.group_size.unwrap_or(cols);
        let groups = cols.div_ceil(group_size);
        let awq = method.packing == Int4Packing::Awq;
        let mut matrix = Self {
            qweight: vec![0; rows * cols / 8],
            qzeros: vec![0; groups * rows / 8],
            scales: vec![],
            weights: vec![0.0; rows * cols],
        };
        let (mut zeros, mut scales) = (vec![], vec![]);
        for group in 0..groups {
            for row in 0..rows {
                let less = u64::from(
                    method.packing
                        == (Int4Packing::Gptq {
                            zeros: GptqZeros::LessOne,
                        }),
                );
                let zero = if method.symmetric {
                    8
                } else {
                    less + noise.below(16)
                };
                let scale = half(0.01 + 0.02 * noise.unit().abs());
                let shift = 4 * place(method.packing, row % 8);
                matrix.qzeros[group * rows / 8 + row / 8] |= ((zero - less) as u32) << shift;
                matrix.scales.extend(scale.0);
                zeros.push(zero as f32);
                scales.push(scale.1);
            }
        }
        for row in 0..rows {
            for col in 0..cols {
                let code = noise.below(16) as u32;
                let (word, lane) = match awq {
                    true => (col * (rows / 8) + row / 8, row % 8),
                    false => (col / 8 * rows + row, col % 8),
                };
                matrix.qweight[word] |= code << (4 * place(method.packing, lane));
                let at = col / group_size * rows + row;
                matrix.weights[row * cols + col] = scales[at] * (code as f32 - zeros[at]);
            }
        }
        matrix
    }

    fn source(
        &self,
        quantization: Int4Quantization,
        [rows, cols]: [usize; 2],
    ) -> (Vec<u8>, Vec<u8>, TensorFormat) {
        let (qweight, qzeros) = (words(&self.qweight), words(&self.qzeros));
        let source = Int4Source {
            quantization,
            rows,
            cols,
            qweight: &qweight,
            qzeros: &qzeros,
            scales: &self.scales,
            g_idx: &[],
        };
        let all = source.blocks(0..rows, 0..cols).unwrap();
        let part = source.blocks(5..rows - 2, 32..cols).unwrap();
        (all, part, source.format())
    }
}

/// The nearest f16 of a number from 2^-14 to 1: its bytes and value.
fn half(value: f32) -> ([u8; 2], f32) {
    let bits = value.to_bits() >> 13 << 13;
    let half = (bits >> 13) as i32 - ((127 - 15) << 10);
    ((half as u16).to_le_bytes(), f32::from_bits(bits))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn methods() -> Vec<(Int4Quantization, String)> {
    let gptq = |zeros| Int4Packing::Gptq { zeros };
    let cases = [
        (
            Int4Packing::Awq,
            Some(64),
            false,
            r#""quant_method":"awq","zero_point":true,"version":"gemm""#,
        ),
        (
            Int4Packing::Awq,
            Some(32),
            true,
            r#""quant_method":"awq","zero_point":false"#,
        ),
        (
            gptq(GptqZeros::LessOne),
            Some(128),
            true,
            r#""quant_method":"gptq","sym":true,"desc_act":false"#,
        ),
        (
            gptq(GptqZeros::LessOne),
            Some(32),
            false,
            r#""quant_method":"gptq","sym":false"#,
        ),
        (
            gptq(GptqZeros::Plain),
            None,
            false,
            r#""quant_method":"gptq","sym":false,"checkpoint_format":"gptq_v2""#,
        ),
    ];
    let case = |(packing, group_size, symmetric, fields): (_, Option<usize>, _, _)| {
        let size = group_size.map_or("-1".to_owned(), |size| size.to_string());
        let method = Int4Quantization {
            packing,
            group_size,
            symmetric,
        };
        (method, format!(r#"{{"bits":4,"group_size":{size},{fields}}}"#))
    };
    cases.into_iter().map(case).collect()
}

#[test]
fn blocks_hold_the_same_weights() {
    let mut noise = Noise(3);
    let (rows, cols) = (40, 256);
    for (method, name) in methods() {
        let matrix = Matrix::random(method, [rows, cols], &mut noise);
        let (all, part, format) = matrix.source(method, [rows, cols]);
        let decode = |bytes: &[u8], cols: usize| -> Vec<f32> {
            let mut out = vec![0.0; cols];
            bytes
                .chunks(format.row_bytes(cols).unwrap())
                .flat_map(|row| {
                    phalanx_kernels::cpu::quant::dequantize_row(format, row, &mut out).unwrap();
                    out.clone()
                })
                .collect()
        };
        assert_eq!(decode(&all, cols), matrix.weights, "{name}");
        let want: Vec<f32> = matrix.weights[5 * cols..(rows - 2) * cols]
            .chunks(cols)
            .flat_map(|row| &row[32..])
            .copied()
            .collect();
        assert_eq!(decode(&part, cols - 32), want, "{name}");
    }
}

#[test]
fn damaged_matrices_are_refused() {
    let mut noise = Noise(4);
    let (method, _) = methods().remove(2);
    let matrix = Matrix::random(method, [16, 256], &mut noise);
    let (qweight, mut qzeros) = (words(&matrix.qweight), words(&matrix.qzeros));
    qzeros[1] ^= 1;
    let g_idx: Vec<u8> = (0..256u32).flat_map(|k| (k / 128).to_le_bytes()).collect();
    let good = Int4Source {
        quantization: method,
        rows: 16,
        cols: 256,
        qweight: &qweight,
        qzeros: &words(&matrix.qzeros),
        scales: &matrix.scales,
        g_idx: &g_idx,
    };
    let error = |source: Int4Source<'_>| source.blocks(0..16, 0..256).unwrap_err().to_string();
    assert!(good.blocks(0..16, 0..256).is_ok());
    assert!(
        error(Int4Source {
            qzeros: &qzeros,
            ..good
        })
        .contains("zero point of row 2 in group 0")
    );
    assert!(
        error(Int4Source {
            qweight: &qweight[4..],
            ..good
        })
        .contains("qweight has 2044 bytes")
    );
    assert!(error(Int4Source { scales: &[], ..good }).contains("scales has 0 bytes"));
    let shuffled: Vec<u8> = g_idx.iter().rev().copied().collect();
    assert!(
        error(Int4Source {
            g_idx: &shuffled,
            ..good
        })
        .contains("g_idx")
    );
    assert!(good.blocks(0..17, 0..256).is_err());
    assert!(good.blocks(0..16, 16..256).is_err());
}

/// Writes both checkpoints.
fn write(quantized: &Path, dense: &Path, method: Int4Quantization, config: &str) {
    let mut noise = Noise(5);
    let (mut ours, mut reference): (Vec<Tensor>, Vec<Tensor>) = (vec![], vec![]);
    let mut plain = |noise: &mut Noise, name: String, shape: Vec<usize>, mean: f32| {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| mean + noise.unit() * 0.1)
            .collect();
        let tensor = (name, "F32", shape, floats(&values));
        ours.push(tensor.clone());
        reference.push(tensor);
    };
    plain(
        &mut noise,
        "model.embed_tokens.weight".to_owned(),
        vec![VOCAB, HIDDEN],
        0.0,
    );
    plain(&mut noise, "model.norm.weight".to_owned(), vec![HIDDEN], 1.0);
    for layer in 0..LAYERS {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            plain(
                &mut noise,
                format!("model.layers.{layer}.{norm}.weight"),
                vec![HIDDEN],
                1.0,
            );
        }
    }
    let shapes = [
        ("self_attn.q_proj", [HIDDEN, HIDDEN]),
        ("self_attn.k_proj", [HIDDEN, HIDDEN]),
        ("self_attn.v_proj", [HIDDEN, HIDDEN]),
        ("self_attn.o_proj", [HIDDEN, HIDDEN]),
        ("mlp.gate_proj", [INTERMEDIATE, HIDDEN]),
        ("mlp.up_proj", [INTERMEDIATE, HIDDEN]),
        ("mlp.down_proj", [HIDDEN, INTERMEDIATE]),
    ];
    for layer in 0..LAYERS {
        for (module, shape) in shapes {
            let [rows, cols] = shape;
            let matrix = Matrix::random(method, shape, &mut noise);
            let name = |part: &str| format!("model.layers.{layer}.{module}.{part}");
            let groups = cols.div_ceil(method.group_size.unwrap_or(cols));
            let words_shape = match method.packing {
                Int4Packing::Awq => vec![cols, rows / 8],
                Int4Packing::Gptq { .. } => vec![cols / 8, rows],
            };
            ours.push((name("qweight"), "I32", words_shape, words(&matrix.qweight)));
            ours.push((
                name("qzeros"),
                "I32",
                vec![groups, rows / 8],
                words(&matrix.qzeros),
            ));
            ours.push((name("scales"), "F16", vec![groups, rows], matrix.scales));
            reference.push((name("weight"), "F32", vec![rows, cols], floats(&matrix.weights)));
        }
    }
    save(quantized, &ours, config);
    save(dense, &reference, "null");
}

fn save(directory: &Path, tensors: &[Tensor], quantization: &str) {
    let (mut header, mut data) = (vec![], vec![]);
    for (name, dtype, shape, bytes) in tensors {
        let (start, end) = (data.len(), data.len() + bytes.len());
        header.push(format!(
            r#""{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#
        ));
        data.extend(bytes);
    }
    let header = format!("{{{}}}", header.join(","));
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(directory.join("model.safetensors"), file).unwrap();
    let config = format!(
        r#"{{"model_type":"llama","hidden_size":{HIDDEN},"intermediate_size":{INTERMEDIATE},
        "num_hidden_layers":{LAYERS},"num_attention_heads":4,"num_key_value_heads":4,"vocab_size":{VOCAB},
        "max_position_embeddings":512,"tie_word_embeddings":true,"quantization_config":{quantization}}}"#
    );
    fs::write(directory.join("config.json"), config).unwrap();
}

fn logits(path: &Path, world_size: usize, style: TensorParallelStyle) -> Vec<f32> {
    let prompt: Vec<u32> = (0..20).map(|i| i * 37 % VOCAB as u32).collect();
    let options = TensorParallelOptions::equal(world_size, style);
    let parts = on_model(path, &options, |runner| {
        runner.logits(&plan(0, vec![row(0, 0, &prompt, true)])).unwrap()
    });
    join_logits(&parts, 1)
}

#[test]
fn checkpoints_give_the_logits_of_their_weights_at_any_number_of_ranks() {
    use TensorParallelStyle::{Gather, Reduce};
    for (method, config) in methods() {
        let (quantized, dense) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(quantized.path(), dense.path(), method, &config);
        let want = logits(dense.path(), 1, Gather);
        let alone = logits(quantized.path(), 1, Gather);
        let largest = want.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let close = |got: &[f32]| {
            got.iter()
                .zip(&want)
                .all(|(a, b)| (a - b).abs() <= TOLERANCE * largest)
        };
        assert!(largest > 0.0 && close(&alone), "{config}");
        for world_size in [2, 3] {
            assert!(
                logits(quantized.path(), world_size, Gather) == alone,
                "{world_size} ranks, {config}"
            );
            assert!(
                close(&logits(quantized.path(), world_size, Reduce)),
                "{world_size} ranks, {config}"
            );
        }
    }
}
