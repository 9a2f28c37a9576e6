//! What a graph cannot hold is refused by name, and so are steps that a graph does not fit.

use phalanx_kernels::cuda::{CudaBackend, CudaBatch, CudaGraphCache};
use phalanx_kernels::{Backend, BatchInput, DecodeShape, GraphCache, Heads, KernelError, KvSpec, Result};
use phalanx_model::KvDtype;

use crate::support::open;

const HEADS: Heads = Heads {
    num_q: 2,
    num_kv: 1,
    head_dim: 64,
    q_start: 0,
    kv_start: 0,
    group_size: 2,
    sliding_window: None,
};
const SHAPE: DecodeShape = DecodeShape {
    rows: 4,
    blocks_per_row: 2,
    num_blocks: 8,
    block_size: 16,
    heads: HEADS,
};

fn cache(backend: &CudaBackend) -> CudaGraphCache {
    backend.graph_cache(&SHAPE).unwrap().unwrap()
}

/// One token of each sequence, in a block of its own.
fn decode(rows: u32) -> BatchInput {
    BatchInput {
        token_ids: vec![1; rows as usize],
        positions: vec![3; rows as usize],
        slot_mapping: (0..rows).map(|row| row * 16 + 3).collect(),
        cu_seqlens_q: (0..=rows).collect(),
        context_lens: vec![4; rows as usize],
        block_tables: (0..rows).collect(),
        cu_blocks: (0..=rows).collect(),
    }
}

#[test]
#[ignore = "needs a device"]
fn what_waits_or_allocates_is_not_captured() {
    let backend = open();
    let mut x = backend.buffer(4, 8).unwrap();
    let mut out = backend.buffer(4, 8).unwrap();
    backend.write(&mut x, &[1.0; 32]).unwrap();
    let mut cache = cache(&backend);
    cache.load(&backend, &decode(2), 2).unwrap();
    let mut refused = |op: &str, ops: &mut dyn FnMut(&CudaBatch) -> Result<()>| {
        let error = cache.capture(&backend, ops).unwrap_err();
        assert!(
            matches!(error, KernelError::Capture { op: found } if found == op),
            "{error:?}, not of {op}"
        );
        let text = error.to_string();
        assert!(
            text.starts_with(op) && text.contains("while a step is captured"),
            "{text}"
        );
        // The stream is as before: nothing of it was captured, and nothing is lost.
        assert!(matches!(cache.replay(&backend), Err(KernelError::Shape { .. })));
        assert_eq!(backend.read(&x, 4).unwrap(), [1.0; 32]);
    };
    refused("synchronize", &mut |_| backend.synchronize());
    refused("download", &mut |_| backend.read(&x, 1).map(drop));
    refused("a step's input", &mut |_| backend.batch(&decode(1)).map(drop));
    refused("activations", &mut |_| backend.buffer(1, 1).map(drop));
    // Rows that do not follow each other are uploaded; others are not.
    refused("a step's input", &mut |_| {
        backend.select_rows(&mut out, &x, &[1, 0])
    });
    cache
        .capture(&backend, |_| backend.select_rows(&mut out, &x, &[1, 2]))
        .unwrap();
    assert_eq!(backend.read(&out, 2).unwrap(), [0.0; 16], "it only was captured");
    cache.replay(&backend).unwrap();
    assert_eq!(backend.read(&out, 2).unwrap(), [1.0; 16]);
}

#[test]
#[ignore = "needs a device"]
fn steps_that_do_not_fit_are_refused() {
    let backend = open();
    let mut cache = cache(&backend);
    let mut refused = |input: &BatchInput, rows: usize, why: &str| {
        let error = cache.load(&backend, input, rows).unwrap_err();
        assert!(matches!(error, KernelError::Shape { .. }), "{error:?}");
        assert!(error.to_string().contains(why), "{error} says nothing of {why}");
    };
    refused(&decode(1), 5, "5 rows, at most 4");
    refused(&decode(3), 2, "3 rows in 2");
    let mut prompt = decode(2);
    prompt.cu_seqlens_q = vec![0, 2];
    prompt.context_lens.pop();
    prompt.cu_blocks = vec![0, 2];
    refused(&prompt, 2, "2 rows of 1 sequences");
    let mut beyond = decode(1);
    beyond.block_tables = vec![8];
    refused(&beyond, 1, "block 8 of 8");
    let mut beyond = decode(1);
    beyond.slot_mapping = vec![128];
    refused(&beyond, 1, "slot 128 of 128");
}

/// A row of padding writes to no slot: the cache is what it was.
#[test]
#[ignore = "needs a device"]
fn padding_writes_nothing() {
    let backend = open();
    let spec = KvSpec {
        num_blocks: SHAPE.num_blocks,
        block_size: SHAPE.block_size,
        num_kv_heads: HEADS.num_kv,
        head_dim: HEADS.head_dim,
        dtype: KvDtype::F32,
    };
    let mut kv = backend.kv_cache(spec).unwrap();
    let mut qkv = backend.buffer(4, HEADS.qkv_width()).unwrap();
    let mut out = backend.buffer(4, HEADS.num_q * HEADS.head_dim).unwrap();
    let ones = vec![1.0; 4 * HEADS.qkv_width()];
    let twos = vec![2.0; 4 * HEADS.qkv_width()];
    // Positions 0 to 3 of a sequence hold ones.
    let prompt = BatchInput {
        token_ids: vec![0; 4],
        positions: (0..4).collect(),
        slot_mapping: (0..4).collect(),
        cu_seqlens_q: vec![0, 4],
        context_lens: vec![4],
        block_tables: vec![0],
        cu_blocks: vec![0, 1],
    };
    let batch = backend.batch(&prompt).unwrap();
    backend.write(&mut qkv, &ones).unwrap();
    backend.reshape_and_cache(&mut kv, &qkv, &HEADS, &batch).unwrap();
    // Steps of four rows of padding, which are full of twos.
    let mut cache = cache(&backend);
    cache.load(&backend, &BatchInput::default(), 4).unwrap();
    backend.write(&mut qkv, &twos).unwrap();
    cache
        .capture(&backend, |batch| {
            backend.reshape_and_cache(&mut kv, &qkv, &HEADS, batch)?;
            let columns = phalanx_kernels::Columns {
                buffer: &mut out,
                start: 0,
            };
            backend.paged_attention(columns, &qkv, &kv, &HEADS, batch)
        })
        .unwrap();
    cache.replay(&backend).unwrap();
    let width = HEADS.num_q * HEADS.head_dim;
    assert_eq!(
        backend.read(&out, 4).unwrap(),
        vec![0.0; 4 * width],
        "no row attends"
    );
    // The prompt's last row still sees ones and nothing else.
    let columns = phalanx_kernels::Columns {
        buffer: &mut out,
        start: 0,
    };
    backend
        .paged_attention(columns, &qkv, &kv, &HEADS, &batch)
        .unwrap();
    assert_eq!(backend.read(&out, 4).unwrap(), vec![1.0; 4 * width]);
}
