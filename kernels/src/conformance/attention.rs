//! Attention and the cache it reads, driven as a model does: write a step's K and V, attend, next step.

use std::ops::Range;

use half::{bf16, f16};
use phalanx_model::KvDtype;

use super::random::Random;
use super::{THREADS, Tolerances, assert_close, assert_same, filled, poisoned, written};
use crate::{Backend, BatchInput, Columns, E4m3, Heads, KvSpec};

/// One layer's attention in a model, and the blocks of its cache.
#[derive(Clone, Copy, Debug)]
struct Model {
    num_q: usize,
    num_kv: usize,
    head_dim: usize,
    window: Option<usize>,
    block_size: usize,
    dtype: KvDtype,
}

impl Model {
    fn heads(&self) -> Heads {
        Heads {
            num_q: self.num_q,
            num_kv: self.num_kv,
            head_dim: self.head_dim,
            q_start: 0,
            kv_start: 0,
            group_size: self.num_q / self.num_kv,
            sliding_window: self.window,
        }
    }

    /// The heads of a rank that has the q heads `q`.
    fn rank(&self, q: Range<usize>) -> Heads {
        let group = self.num_q / self.num_kv;
        let kv = q.start / group..q.end.div_ceil(group);
        let (num_q, num_kv) = (q.len(), kv.len());
        Heads {
            num_q,
            num_kv,
            q_start: q.start,
            kv_start: kv.start,
            ..self.heads()
        }
    }

    /// A head's K or V of one position as the cache has it.
    fn round(&self, row: &[f32]) -> Vec<f64> {
        let largest = row.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let round = |&x: &f32| match self.dtype {
            KvDtype::F32 => x.into(),
            KvDtype::F16 => f16::from_f32(x).into(),
            KvDtype::BF16 => bf16::from_f32(x).into(),
            KvDtype::E4M3 => E4m3::from_f32(x).to_f32().into(),
            KvDtype::INT8 => {
                f64::from((x * (127.0 / largest)).round_ties_even()) * f64::from(largest / 127.0)
            }
        };
        row.iter().map(round).collect()
    }
}

const MODELS: [Model; 9] = [
    Model {
        num_q: 9,
        num_kv: 3,
        head_dim: 64,
        window: None,
        block_size: 16,
        dtype: KvDtype::F32,
    },
    Model {
        num_q: 8,
        num_kv: 2,
        head_dim: 128,
        window: None,
        block_size: 32,
        dtype: KvDtype::F16,
    },
    Model {
        num_q: 8,
        num_kv: 1,
        head_dim: 80,
        window: Some(50),
        block_size: 16,
        dtype: KvDtype::BF16,
    },
    Model {
        num_q: 3,
        num_kv: 3,
        head_dim: 40,
        window: None,
        block_size: 128,
        dtype: KvDtype::F16,
    },
    Model {
        num_q: 7,
        num_kv: 1,
        head_dim: 12,
        window: Some(1),
        block_size: 8,
        dtype: KvDtype::F32,
    },
    Model {
        num_q: 2,
        num_kv: 1,
        head_dim: 100,
        window: Some(70),
        block_size: 24,
        dtype: KvDtype::F32,
    },
    Model {
        num_q: 5,
        num_kv: 5,
        head_dim: 8,
        window: None,
        block_size: 8,
        dtype: KvDtype::BF16,
    },
    Model {
        num_q: 9,
        num_kv: 3,
        head_dim: 64,
        window: None,
        block_size: 16,
        dtype: KvDtype::E4M3,
    },
    Model {
        num_q: 6,
        num_kv: 2,
        head_dim: 100,
        window: Some(70),
        block_size: 24,
        dtype: KvDtype::E4M3,
    },
];

/// The qkv rows of every sequence.
struct Data {
    rows: Vec<Vec<f32>>,
}

impl Data {
    fn new(random: &mut Random, model: &Model, lens: &[usize]) -> Self {
        let width = model.heads().qkv_width();
        Self {
            rows: lens.iter().map(|len| random.normals(len * width)).collect(),
        }
    }
    fn len(&self, model: &Model, sequence: usize) -> usize {
        self.rows[sequence].len() / model.heads().qkv_width()
    }
    /// The parts of row `position` that belong to `heads`.
    fn row(&self, model: &Model, heads: &Heads, (sequence, position): (usize, usize)) -> Vec<f32> {
        let (d, width) = (model.head_dim, model.heads().qkv_width());
        let row = &self.rows[sequence][position * width..][..width];
        let part = |first: usize, count: usize| &row[first * d..(first + count) * d];
        let k = model.num_q + heads.kv_start;
        [
            part(heads.q_start, heads.num_q),
            part(k, heads.num_kv),
            part(k + model.num_kv, heads.num_kv),
        ]
        .concat()
    }
}

/// Positions of each sequence that a step computes.
type Step = Vec<Range<usize>>;

/// A cache full of NaN, and which of its blocks the sequences have.
struct Run<'a, B: Backend> {
    backend: &'a B,
    model: Model,
    heads: Heads,
    kv: B::KvCache,
    tables: Vec<Vec<u32>>,
}

impl<'a, B: Backend> Run<'a, B> {
    fn new(backend: &'a B, model: Model, heads: Heads, data: &Data, random: &mut Random) -> Self {
        let blocks = |s| data.len(&model, s).div_ceil(model.block_size);
        let num_blocks = 2 + (0..data.rows.len()).map(blocks).sum::<usize>();
        let (num_kv_heads, head_dim) = (heads.num_kv, heads.head_dim);
        let (block_size, dtype) = (model.block_size, model.dtype);
        let kv = backend
            .kv_cache(KvSpec {
                num_blocks,
                block_size,
                num_kv_heads,
                head_dim,
                dtype,
            })
            .unwrap();
        let mut ids: Vec<u32> = (0..num_blocks as u32).collect();
        random.shuffle(&mut ids);
        let mut ids = ids.into_iter();
        let tables = (0..data.rows.len())
            .map(|s| ids.by_ref().take(blocks(s)).collect())
            .collect();
        let mut run = Self {
            backend,
            model,
            heads,
            kv,
            tables,
        };
        run.poison(num_blocks * block_size);
        run
    }

    fn poison(&mut self, slots: usize) {
        let qkv = poisoned(self.backend, slots, self.heads.qkv_width());
        let input = BatchInput {
            token_ids: vec![0; slots],
            positions: vec![0; slots],
            slot_mapping: (0..slots as u32).collect(),
            cu_seqlens_q: vec![0, slots as u32],
            context_lens: vec![1],
            block_tables: vec![],
            cu_blocks: vec![0, 0],
        };
        let batch = self.backend.batch(&input).unwrap();
        self.backend
            .reshape_and_cache(&mut self.kv, &qkv, &self.heads, &batch)
            .unwrap();
    }

    fn batch(&self, step: &Step) -> BatchInput {
        let mut input = BatchInput {
            cu_seqlens_q: vec![0],
            cu_blocks: vec![0],
            ..BatchInput::default()
        };
        for (table, range) in self
            .tables
            .iter()
            .zip(step)
            .filter(|(_, range)| !range.is_empty())
        {
            for position in range.clone() {
                let block = table[position / self.model.block_size] as usize;
                let slot = block * self.model.block_size + position % self.model.block_size;
                input.token_ids.push(0);
                input.positions.push(position as u32);
                input.slot_mapping.push(slot as u32);
            }
            input.cu_seqlens_q.push(input.token_ids.len() as u32);
            input.context_lens.push(range.end as u32);
            // As many blocks as the step needs: later ones may not exist yet.
            input
                .block_tables
                .extend(&table[..range.end.div_ceil(self.model.block_size)]);
            input.cu_blocks.push(input.block_tables.len() as u32);
        }
        input
    }

    /// Attention of the step's rows, `[rows, num_q * head_dim]`.
    fn step(&mut self, data: &Data, step: &Step) -> Vec<f32> {
        let (model, heads) = (self.model, self.heads);
        let positions = step
            .iter()
            .enumerate()
            .flat_map(|(s, range)| range.clone().map(move |p| (s, p)));
        let qkv: Vec<f32> = positions.flat_map(|at| data.row(&model, &heads, at)).collect();
        let qkv = filled(self.backend, &qkv, heads.qkv_width(), 1);
        let input = self.batch(step);
        let batch = self.backend.batch(&input).unwrap();
        self.backend
            .reshape_and_cache(&mut self.kv, &qkv, &heads, &batch)
            .unwrap();
        let (rows, width) = (input.num_rows(), heads.num_q * heads.head_dim);
        let mut out = poisoned(self.backend, rows + 1, width + 8);
        let columns = Columns {
            buffer: &mut out,
            start: 4,
        };
        self.backend
            .paged_attention(columns, &qkv, &self.kv, &heads, &batch)
            .unwrap();
        written(self.backend, &out, [rows + 1, width + 8], rows, 4..4 + width)
    }

    /// Attention of every row of every sequence, computed in `steps`; by sequence, then position.
    fn all(&mut self, data: &Data, steps: &[Step]) -> Vec<f32> {
        let width = self.heads.num_q * self.heads.head_dim;
        let mut out: Vec<Vec<f32>> = (0..data.rows.len())
            .map(|s| vec![f32::NAN; data.len(&self.model, s) * width])
            .collect();
        for step in steps {
            let rows = self.step(data, step);
            let mut rows = rows.chunks_exact(width);
            for (out, range) in out.iter_mut().zip(step) {
                for position in range.clone() {
                    out[position * width..][..width].copy_from_slice(rows.next().unwrap());
                }
            }
        }
        out.concat()
    }
}

/// All rows at once.
fn whole(model: &Model, data: &Data) -> Vec<Step> {
    vec![(0..data.rows.len()).map(|s| 0..data.len(model, s)).collect()]
}

/// Each sequence in chunks of random lengths, single rows among them.
fn chunked(random: &mut Random, model: &Model, data: &Data) -> Vec<Step> {
    let mut done = vec![0; data.rows.len()];
    let mut steps = Vec::new();
    while (0..done.len()).any(|s| done[s] < data.len(model, s)) {
        let step: Step = (0..done.len())
            .map(|s| {
                let most = [0, 1, 1, 5, 40][random.below(5)];
                done[s]..data.len(model, s).min(done[s] + most)
            })
            .collect();
        for (done, range) in done.iter_mut().zip(&step) {
            *done = range.end;
        }
        steps.push(step);
    }
    steps
}

/// The definition, in f64.
fn reference(model: &Model, data: &Data) -> Vec<f64> {
    let (d, heads) = (model.head_dim, model.heads());
    let mut out = Vec::new();
    for (sequence, _) in data.rows.iter().enumerate() {
        let rows: Vec<Vec<f32>> = (0..data.len(model, sequence))
            .map(|position| data.row(model, &heads, (sequence, position)))
            .collect();
        let in_cache: Vec<Vec<f64>> = rows
            .iter()
            .map(|row| row.chunks(d).flat_map(|head| model.round(head)).collect())
            .collect();
        for (position, row) in rows.iter().enumerate() {
            let first = model
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            for q in 0..model.num_q {
                let k = (model.num_q + heads.kv_of(q)) * d;
                let v = k + model.num_kv * d;
                let dot =
                    |at: &Vec<f64>| -> f64 { (0..d).map(|i| f64::from(row[q * d + i]) * at[k + i]).sum() };
                let seen = &in_cache[first..=position];
                let scores: Vec<f64> = seen.iter().map(|at| dot(at) / (d as f64).sqrt()).collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..d).map(|i| {
                    let sum: f64 = weights.iter().zip(seen).map(|(w, at)| w * at[v + i]).sum();
                    sum / total
                }));
            }
        }
    }
    out
}

const LENGTHS: [usize; 4] = [1, 19, 150, 64];

pub fn attention_is_of_its_definition<B: Backend>(make: &impl Fn(usize) -> B, tolerances: &Tolerances) {
    for model in MODELS {
        let mut random = Random::new(20);
        let data = Data::new(&mut random, &model, &LENGTHS);
        let backend = make(2);
        let got =
            Run::new(&backend, model, model.heads(), &data, &mut random).all(&data, &whole(&model, &data));
        let what = format!("attention of {model:?}");
        assert_close(
            &what,
            &got,
            &reference(&model, &data),
            model.head_dim,
            tolerances.attention,
        );
    }
}

/// Whole prompts, chunks, single rows; beside other sequences or alone; other blocks, other threads: the same bits.
pub fn attention_is_the_same_however_prompts_are_cut<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    for model in MODELS {
        let mut random = Random::new(21);
        let data = Data::new(&mut random, &model, &LENGTHS);
        let backend = make(1);
        let want =
            Run::new(&backend, model, model.heads(), &data, &mut random).all(&data, &whole(&model, &data));
        for threads in THREADS {
            let backend = make(threads);
            for _ in 0..2 {
                let steps = chunked(&mut random, &model, &data);
                let got = Run::new(&backend, model, model.heads(), &data, &mut random).all(&data, &steps);
                assert_same(&format!("{model:?}, {threads} threads, {steps:?}"), &got, &want);
            }
        }
        let alone = Data {
            rows: vec![data.rows[2].clone()],
        };
        let row = |p: usize| p..p + 1;
        let steps: Vec<Step> = (0..alone.len(&model, 0)).map(|p| vec![row(p)]).collect();
        let got = Run::new(&backend, model, model.heads(), &alone, &mut random).all(&alone, &steps);
        let first = (LENGTHS[0] + LENGTHS[1]) * model.num_q * model.head_dim;
        assert_same(
            &format!("{model:?}, row by row"),
            &got,
            &want[first..first + got.len()],
        );
    }
}

/// A rank with some of the heads, cut anywhere, computes what a rank with all of them does.
pub fn attention_is_the_same_on_any_rank<B: Backend>(make: &impl Fn(usize) -> B, _: &Tolerances) {
    for model in MODELS {
        let mut random = Random::new(22);
        let data = Data::new(&mut random, &model, &LENGTHS);
        let backend = make(2);
        let steps = whole(&model, &data);
        let want = Run::new(&backend, model, model.heads(), &data, &mut random).all(&data, &steps);
        let width = model.num_q * model.head_dim;
        let cut = 1 + random.below(model.num_q - 1);
        for q in [0..cut, cut..model.num_q] {
            let heads = model.rank(q.clone());
            let got = Run::new(&backend, model, heads, &data, &mut random).all(&data, &steps);
            let columns = q.start * model.head_dim..q.end * model.head_dim;
            let want: Vec<f32> = want
                .chunks(width)
                .flat_map(|row| row[columns.clone()].to_vec())
                .collect();
            assert_same(&format!("{model:?}, q heads {q:?}"), &got, &want);
        }
    }
}

/// Long contexts, which may be cut for more threads, and a cache of int8: whole or last row alone, with a window or without, the same bits,
/// and those of the definition.
pub fn attention_over_long_contexts_is_the_same<B: Backend>(
    make: &impl Fn(usize) -> B,
    tolerances: &Tolerances,
) {
    const LENGTH: usize = 1_111;
    for (window, dtype) in [
        (None, KvDtype::F16),
        (Some(700), KvDtype::F16),
        (None, KvDtype::INT8),
    ] {
        let model = Model {
            num_q: 3,
            num_kv: 1,
            head_dim: 32,
            window,
            block_size: 16,
            dtype,
        };
        let mut random = Random::new(23);
        let data = Data::new(&mut random, &model, &[LENGTH]);
        let backend = make(1);
        let want =
            Run::new(&backend, model, model.heads(), &data, &mut random).all(&data, &whole(&model, &data));
        let (what, expected) = (format!("attention of {model:?}"), reference(&model, &data));
        assert_close(&what, &want, &expected, model.head_dim, tolerances.attention);
        let step = |positions| -> Step { std::iter::once(positions).collect() };
        let steps = [step(0..LENGTH - 1), step(LENGTH - 1..LENGTH)];
        for threads in THREADS {
            let backend = make(threads);
            let got = Run::new(&backend, model, model.heads(), &data, &mut random).all(&data, &steps);
            assert_same(&format!("{model:?}, {threads} threads"), &got, &want);
        }
    }
}
