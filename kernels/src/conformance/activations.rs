//! Norms, rotary embedding, the gated activation, and the ops that copy rows.

use half::bf16;
use phalanx_model::{RopeLayout, TensorFormat};

use super::random::Random;
use super::{
    Tolerances, assert_close, assert_row_wise, assert_same, filled, poisoned, simple_batch, written,
};
use crate::{Backend, BatchInput, Columns, Heads, Norm, Rope, WeightSource};

const WIDTHS: [usize; 6] = [1, 7, 64, 100, 576, 4096];

fn rms_norm_of(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    let x: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = (mean + f64::from(eps)).sqrt().recip();
    x.iter()
        .zip(weight)
        .map(|(x, &w)| x * scale * f64::from(w))
        .collect()
}

pub fn rms_norm<B: Backend>(make: &impl Fn(usize) -> B, tolerances: &Tolerances) {
    let mut random = Random::new(1);
    for width in WIDTHS {
        let rows = 9;
        let (x, weight, eps) = (random.normals(rows * width), random.normals(width), 1e-5);
        let got = assert_row_wise(make, rows, |backend, rows| {
            let input = filled(backend, &x[rows.start * width..rows.end * width], width, 1);
            let mut out = poisoned(backend, rows.len() + 2, width);
            let norm = Norm {
                weight: &backend.vector(&weight).unwrap(),
                eps,
            };
            backend.rms_norm(&mut out, &input, &norm, rows.len()).unwrap();
            written(backend, &out, [rows.len() + 2, width], rows.len(), 0..width)
        });
        let want: Vec<f64> = x
            .chunks(width)
            .flat_map(|x| rms_norm_of(x, &weight, eps))
            .collect();
        assert_close("rms_norm", &got, &want, width, tolerances.norm);
    }
}

pub fn fused_add_rms_norm<B: Backend>(make: &impl Fn(usize) -> B, tolerances: &Tolerances) {
    let mut random = Random::new(2);
    for width in WIDTHS {
        let rows = 7;
        let (x, delta) = (random.normals(rows * width), random.normals(rows * width));
        let (weight, eps) = (random.normals(width), 1e-6);
        let sums: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
        let got = assert_row_wise(make, rows, |backend, rows| {
            let values = rows.start * width..rows.end * width;
            let mut residual = filled(backend, &x[values.clone()], width, 1);
            let delta = filled(backend, &delta[values.clone()], width, 0);
            let mut out = poisoned(backend, rows.len() + 1, width);
            let norm = Norm {
                weight: &backend.vector(&weight).unwrap(),
                eps,
            };
            backend
                .fused_add_rms_norm(&mut out, &mut residual, &delta, &norm, rows.len())
                .unwrap();
            let shape = [rows.len() + 1, width];
            let residual = written(backend, &residual, shape, rows.len(), 0..width);
            assert_same("the residual", &residual, &sums[values]);
            written(backend, &out, shape, rows.len(), 0..width)
        });
        let want: Vec<f64> = sums
            .chunks(width)
            .flat_map(|x| rms_norm_of(x, &weight, eps))
            .collect();
        assert_close("fused_add_rms_norm", &got, &want, width, tolerances.norm);
    }
}

pub fn silu_and_mul<B: Backend>(make: &impl Fn(usize) -> B, tolerances: &Tolerances) {
    let mut random = Random::new(3);
    for width in WIDTHS {
        let rows = 5;
        // Gates of all magnitudes: the exponential must neither overflow nor lose its tail.
        let gate_up: Vec<f32> = random
            .normals(rows * 2 * width)
            .iter()
            .map(|x| x * x * x * 9.0)
            .collect();
        let got = assert_row_wise(make, rows, |backend, rows| {
            let input = &gate_up[rows.start * 2 * width..rows.end * 2 * width];
            let input = filled(backend, input, 2 * width, 1);
            let mut out = poisoned(backend, rows.len() + 1, width + 5);
            let columns = Columns {
                buffer: &mut out,
                start: 3,
            };
            backend.silu_and_mul(columns, &input, rows.len()).unwrap();
            written(
                backend,
                &out,
                [rows.len() + 1, width + 5],
                rows.len(),
                3..3 + width,
            )
        });
        let silu = |x: f32| f64::from(x) / (1.0 + (-f64::from(x)).exp());
        let want: Vec<f64> = gate_up
            .chunks(2 * width)
            .flat_map(|row| {
                row[..width]
                    .iter()
                    .zip(&row[width..])
                    .map(|(&g, &u)| silu(g) * f64::from(u))
            })
            .collect();
        // One value at a time: small ones must be as accurate as large ones.
        assert_close("silu_and_mul", &got, &want, 1, tolerances.silu);
    }
}

fn heads(num_q: usize, num_kv: usize, head_dim: usize) -> Heads {
    let group_size = num_q / num_kv;
    Heads {
        num_q,
        num_kv,
        head_dim,
        q_start: 0,
        kv_start: 0,
        group_size,
        sliding_window: None,
    }
}

fn rotated(row: &[f32], position: u32, rope: (&[f32], f32, RopeLayout), heads: &Heads) -> Vec<f64> {
    let (frequencies, factor, layout) = rope;
    let mut row: Vec<f64> = row.iter().map(|&x| x.into()).collect();
    let pairs = frequencies.len();
    for head in row
        .chunks_exact_mut(heads.head_dim)
        .take(heads.num_q + heads.num_kv)
    {
        for (i, &frequency) in frequencies.iter().enumerate() {
            let (a, b) = match layout {
                RopeLayout::Half => (i, i + pairs),
                RopeLayout::Interleaved => (2 * i, 2 * i + 1),
            };
            let (sin, cos) = (f64::from(position) * f64::from(frequency)).sin_cos();
            let (x, y, factor) = (head[a], head[b], f64::from(factor));
            head[a] = (x * cos - y * sin) * factor;
            head[b] = (y * cos + x * sin) * factor;
        }
    }
    row
}

pub fn rotary_embedding<B: Backend>(make: &impl Fn(usize) -> B, tolerances: &Tolerances) {
    let mut random = Random::new(4);
    for (head_dim, rotary_dim) in [(64, 64), (128, 128), (80, 32), (6, 4), (16, 0)] {
        for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
            let heads = heads(6, 2, head_dim);
            let width = heads.qkv_width();
            let positions = [0, 1, 2, 17, 4095, 131_071, 131_072, 1_000_003];
            let rows = positions.len();
            let qkv = random.normals(rows * width);
            let frequencies: Vec<f32> = (0..rotary_dim / 2)
                .map(|i| 10_000f32.powf(-2.0 * i as f32 / rotary_dim as f32))
                .collect();
            let got = assert_row_wise(make, rows, |backend, rows| {
                let mut buffer = filled(backend, &qkv[rows.start * width..rows.end * width], width, 1);
                let batch = scattered_batch(&positions[rows.clone()]);
                let rope = Rope {
                    inverse_frequencies: &backend.vector(&frequencies).unwrap(),
                    attention_factor: 1.25,
                    layout,
                };
                let batch = backend.batch(&batch).unwrap();
                backend
                    .rotary_embedding(&mut buffer, &rope, &heads, &batch)
                    .unwrap();
                written(backend, &buffer, [rows.len() + 1, width], rows.len(), 0..width)
            });
            let rope = (&frequencies[..], 1.25, layout);
            let rows = qkv.chunks(width).zip(positions);
            let want: Vec<f64> = rows
                .flat_map(|(row, position)| rotated(row, position, rope, &heads))
                .collect();
            assert_close("rotary_embedding", &got, &want, width, tolerances.rotary);
        }
    }
}

/// One sequence per row, each at its own position.
fn scattered_batch(positions: &[u32]) -> BatchInput {
    let rows = positions.len() as u32;
    BatchInput {
        token_ids: vec![0; positions.len()],
        positions: positions.to_vec(),
        slot_mapping: (0..rows).collect(),
        cu_seqlens_q: (0..=rows).collect(),
        context_lens: positions.iter().map(|p| p + 1).collect(),
        block_tables: Vec::new(),
        cu_blocks: vec![0; positions.len() + 1],
    }
}

pub fn embedding<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    let mut random = Random::new(5);
    let (width, vocab) = (96, 40..70);
    // Numbers that every backend's weights hold exactly.
    let table: Vec<f32> = random
        .normals(vocab.len() * width)
        .into_iter()
        .map(|x| bf16::from_f32(x).to_f32())
        .collect();
    let bytes: Vec<u8> = table.iter().flat_map(|x| x.to_le_bytes()).collect();
    let tokens: Vec<u32> = (0..23).map(|_| random.below(100) as u32).collect();
    let backend = make(2);
    let source = WeightSource {
        format: TensorFormat::F32,
        rows: vocab.len(),
        cols: width,
        data: &bytes,
        row_stride: 4 * width,
        row_scales: None,
    };
    let weight = backend.weight(&[source]).unwrap();
    let mut out = poisoned(&backend, tokens.len() + 1, width);
    let batch = backend.batch(&simple_batch(&tokens)).unwrap();
    backend
        .embedding(&mut out, &weight, vocab.clone(), &batch)
        .unwrap();
    let got = backend.read(&out, tokens.len() + 1).unwrap();
    assert!(tokens.iter().any(|&t| vocab.contains(&(t as usize))));
    for (row, got) in got.chunks(width).enumerate() {
        match tokens.get(row).filter(|&&t| vocab.contains(&(t as usize))) {
            Some(&token) => assert_eq!(got, &table[(token as usize - vocab.start) * width..][..width]),
            None => assert!(got.iter().all(|x| x.is_nan()), "row {row} was overwritten"),
        }
    }
}

pub fn select_rows<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    let mut random = Random::new(6);
    let (rows, width) = (12, 33);
    let x = random.normals(rows * width);
    let backend = make(2);
    let input = filled(&backend, &x, width, 0);
    let mut out = poisoned(&backend, 5, width);
    let chosen = [11, 0, 3, 3];
    backend.select_rows(&mut out, &input, &chosen).unwrap();
    let got = written(&backend, &out, [5, width], 4, 0..width);
    for (got, row) in got.chunks(width).zip(chosen) {
        assert_eq!(got, &x[row as usize * width..][..width]);
    }
    assert!(
        backend.select_rows(&mut out, &input, &[12]).is_err(),
        "row 12 of 12"
    );
}
