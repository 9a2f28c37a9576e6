//! Few rows over long contexts are cut into spans that are computed side by side; many rows are not. Which of the two
//! it was must not show.

use phalanx_kernels::philox::philox4x32;
use phalanx_kernels::{Backend, BatchInput, Columns, Heads, KvSpec};
use phalanx_model::KvDtype;

use crate::support::open;

const HEADS: Heads = Heads {
    num_q: 4,
    num_kv: 2,
    head_dim: 64,
    q_start: 0,
    kv_start: 0,
    group_size: 2,
    sliding_window: None,
};
const BLOCK: usize = 16;
/// More than two spans of 512.
const LENGTHS: [usize; 2] = [1300, 1030];

/// Rows `from..length` of each sequence whose range is not empty. Blocks of the sequences alternate.
fn batch(from: [usize; 2]) -> BatchInput {
    let mut input = BatchInput {
        cu_seqlens_q: vec![0],
        cu_blocks: vec![0],
        ..BatchInput::default()
    };
    for (sequence, (from, len)) in from.into_iter().zip(LENGTHS).enumerate() {
        if from == len {
            continue;
        }
        let block = |position: usize| position / BLOCK * 2 + sequence;
        for position in from..len {
            input.token_ids.push(0);
            input.positions.push(position as u32);
            input
                .slot_mapping
                .push((block(position) * BLOCK + position % BLOCK) as u32);
        }
        input.cu_seqlens_q.push(input.token_ids.len() as u32);
        input.context_lens.push(len as u32);
        input
            .block_tables
            .extend((0..len).step_by(BLOCK).map(|position| block(position) as u32));
        input.cu_blocks.push(input.block_tables.len() as u32);
    }
    input
}

/// The qkv row of a position of a sequence.
fn row(sequence: usize, position: usize) -> Vec<f32> {
    (0..HEADS.qkv_width())
        .map(|column| {
            let word = philox4x32([column as u32, position as u32, 0, 0], [sequence as u32, 7])[0];
            (word as f32 * 2f32.powi(-32) - 0.5) * 4.0
        })
        .collect()
}

fn rows(from: [usize; 2]) -> Vec<f32> {
    let sequences = from.into_iter().zip(LENGTHS).enumerate();
    sequences
        .flat_map(|(sequence, (from, len))| (from..len).flat_map(move |position| row(sequence, position)))
        .collect()
}

#[test]
#[ignore = "needs a device"]
fn a_split_row_has_the_bits_of_a_whole_one() {
    for (dtype, sliding_window) in [
        (KvDtype::BF16, None),
        (KvDtype::F16, Some(700)),
        (KvDtype::E4M3, None),
    ] {
        let backend = open();
        let heads = Heads {
            sliding_window,
            ..HEADS
        };
        let spec = KvSpec {
            num_blocks: 2 * LENGTHS[0].div_ceil(BLOCK),
            block_size: BLOCK,
            num_kv_heads: heads.num_kv,
            head_dim: heads.head_dim,
            dtype,
        };
        let mut kv = backend.kv_cache(spec).unwrap();
        let upload = |from| {
            let (input, values) = (backend.batch(&batch(from)).unwrap(), rows(from));
            let mut qkv = backend
                .buffer(values.len() / heads.qkv_width(), heads.qkv_width())
                .unwrap();
            backend.write(&mut qkv, &values).unwrap();
            (input, qkv)
        };
        let (all, qkv) = upload([0, 0]);
        backend.reshape_and_cache(&mut kv, &qkv, &heads, &all).unwrap();
        let width = heads.num_q * heads.head_dim;
        let attend = |from: [usize; 2]| {
            let (input, qkv) = upload(from);
            let mut out = backend.buffer(qkv.rows(), width).unwrap();
            let columns = Columns {
                buffer: &mut out,
                start: 0,
            };
            backend
                .paged_attention(columns, &qkv, &kv, &heads, &input)
                .unwrap();
            let values = backend.read(&out, qkv.rows()).unwrap();
            values.chunks(width).map(<[f32]>::to_vec).collect::<Vec<_>>()
        };
        // 40 rows are 80 vectors of a KV head: not split. One, or five, are.
        let whole = attend([LENGTHS[0] - 40, LENGTHS[1] - 40]);
        let split = attend([LENGTHS[0] - 1, LENGTHS[1] - 5]);
        assert!(split.iter().flatten().all(|x| x.is_finite() && x.abs() < 2.0));
        assert_eq!(split[0], whole[39], "{dtype}");
        assert_eq!(split[1..], whole[75..], "{dtype}");
        // One of each kind in a step.
        let mixed = attend([LENGTHS[0] - 1, LENGTHS[1] - 40]);
        assert_eq!(mixed[0], whole[39], "{dtype}");
        assert_eq!(mixed[1..], whole[40..], "{dtype}");
    }
}
